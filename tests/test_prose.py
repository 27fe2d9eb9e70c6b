"""The prose of the README and the book, and the program that checks it."""

import re
import subprocess
import sys

import pytest

from tests import prose

MAXIMA = {
    "01_fomo_in_flux.md": (0, 2),  # worked examples
    "A2_trusting_a_run.md": (0, 1),
    "A4_solutions.md": (0, 1),
}
"""The private words and the warnings that a text may have; texts that are not listed have none.
Lower a number when you rewrite a text."""


def texts(markdown):
    return [sentence.text for sentence in prose.split_sentences(markdown)]


def messages(sentence, measured=True):
    return [finding.message for finding in prose.check_text(sentence, measured)]


@pytest.mark.parametrize("path", prose.default_files(), ids=lambda path: path.name)
def test_a_text_has_no_more_findings_than_it_may(path):
    findings = prose.check_file(path)
    errors = [finding for finding in findings if finding.is_error]
    warnings = [finding for finding in findings if not finding.is_error]
    most_errors, most_warnings = MAXIMA.get(path.name, (0, 0))
    assert len(errors) <= most_errors, errors
    assert len(warnings) <= most_warnings, warnings


QUOTING = {"prose.py", "test_prose.py"}
"""The modules that list the private words, and sentences with them."""


@pytest.mark.parametrize("tree", ["cmp", "book/lab"])
def test_code_speaks_as_the_book_does(tree):
    files = [path for path in prose.code_files() if path.is_relative_to(prose.ROOT / tree)]
    assert len(files) > 20
    found = [
        (path, x) for path in files if path.name not in QUOTING for x in prose.check_file(path)
    ]
    assert not found


def test_private_words_are_found_in_docstrings_comments_and_messages():
    code = '"""Nought\n\nwhoever reads."""\nx = f"{1} is nought"  # nought\n# all is well\n'
    found = [(line, message.split(":")[0]) for line, _, message in prose.check_code(code)]
    assert found == [
        (1, "private word 'Nought'"), (3, "private word 'whoever'"),
        (4, "private word 'nought'"), (4, "private word 'nought'"),
    ]  # fmt: skip


def test_every_maximum_is_of_a_text():
    assert set(MAXIMA) <= {path.name for path in prose.default_files()}


def test_the_program_names_file_and_line_and_fails_on_a_private_word(tmp_path):
    path = tmp_path / "02_x.md"
    path.write_text("# 02 · X\n\nAll is well.\n\nFirst line,\nwhoever reads it.\n")
    command = [sys.executable, "-m", "tests.prose", str(path)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=prose.ROOT)
    assert result.returncode == 1
    assert f"{path}:5: error: private word 'whoever'" in result.stdout
    path.write_text("All is well.\n")
    result = subprocess.run(command, capture_output=True, text=True, cwd=prose.ROOT)
    assert result.returncode == 0 and re.search(r"02_x\.md +0 +0 +1", result.stdout)


# where sentences end


@pytest.mark.parametrize(
    "whole",
    [
        "The rate, e.g. 0.001, is tuned.",
        "Some rules, i.e. TIES and DARE, draw cf. Table 4.",
        "Roth et al. find that merging helps.",
        "It costs 3.5 GFLOPs with open_clip 3.3.0 on Python 3.11.",
        "ViT-B/16 and FoMo-in-Flux have 1.5-2 million parameters and 63 datasets.",
        "As in Fig. 3 and Eq. 2, the loss falls.",
        "This was shown by K. Roth and V. Udandarao in 2024.",
        "“Is it worth it?” is the wrong question.",
        "Press Ctrl-C ... and go on.",
        "Set `merging.policy=ema. Then run` before you begin.",
        "With $w = 0.5. Then$ the mean is plain.",
        "What arrives: classes, images; what stays: the pool.",
        "Read [this short page](architecture.md) first.",
    ],
)
def test_one_sentence_stays_one(whole):
    assert len(texts(whole)) == 1


@pytest.mark.parametrize(
    ("both", "second"),
    [
        ("It trains ViT-B/16. The rest is frozen.", "The rest is frozen."),
        ("Samples come from pool P. The rest is new.", "The rest is new."),
        ("Images, tables, etc. All are read.", "All are read."),
        ("It costs 5 points. 3 of them come back.", "3 of them come back."),
        ("Merge it. mergekit does the same.", "mergekit does the same."),
        ("Keep the buffer (see chapter 07.) Then train.", "Then train."),
        ("Does it help? Yes, in A_ZS.", "Yes, in A_ZS."),
        ("**What helps.** Replay does.", "Replay does."),
        ("He said “no.” We did not.", "We did not."),
        ("The answer is No. We kept it.", "We kept it."),
        ("Run it.\n`cmpt run` stores it.", prose.WORD + " stores it."),
        ("Less is lost [1]. More is gained.", "More is gained."),
    ],
)
def test_two_sentences_are_parted(both, second):
    assert texts(both)[1:] == [second]


def test_blocks_end_sentences_and_lines_are_those_of_the_file():
    markdown = (
        "---\ntitle: A title. With two.\n---\n\n# Heading\nA paragraph\nof two lines.\n\n"
        "* one item\n* another. With more\n\n1. first\n2. second\n\nTerm\n: Its meaning.\n"
    )
    found = [(sentence.line, sentence.text) for sentence in prose.split_sentences(markdown)]
    assert found == [
        (5, "Heading"),
        (6, "A paragraph of two lines."),
        (9, "one item"),
        (10, "another."),
        (10, "With more"),
        (12, "first"),
        (13, "second"),
        (15, "Term"),
        (16, "Its meaning."),
    ]


def test_only_prose_counts():
    markdown = (
        "Before.\n\n```{code-cell} ipython3\nwhoever = 1  # told. Twice.\n```\n\n"
        "```sh\ncmpt run  # whoever\n```\n\n| whoever | told |\n|---|---|\n| 1 | 2 |\n\n"
        "$$\n1 + 2. Then 3\n$$\n\n<!-- whoever. -->\n(03-told)=\n\n"
        ":::{figure} told.svg\n:alt: Whoever sees it.\n:label: told\nA caption of text.\n:::\n\n"
        "See {cite:p}`told2024` at https://told.example/whoever.html here.\n"
    )
    first, caption, last = texts(markdown)
    assert (first, caption) == ("Before.", "A caption of text.")
    assert last.startswith("See") and last.endswith("here.")
    assert not messages(markdown)


# quantities and words


@pytest.mark.parametrize(
    ("count", "sentence"),
    [
        (0, "ViT-B/16, ViT-L-14, fp32, bf16, SHA256, H100 and R@5 are names, as is FoMo-in-Flux."),
        (0, "Chapters 03, 04 and 05, Table 4 and exercise 2 are references, as is NeurIPS 2024."),
        (0, "In $3 + 4 = 7$ and `x = 5` nothing counts."),
        (1, "The gain is +4.9 (3.1 to 6.7)."),
        (1, "The gain is +4.9 points (95 % interval 3.1 to 6.7)."),
        (1, "The gain is {{gain merging/EMA}}."),
        (1, "It takes 10 to 15 lines."),
        (1, "A_KA is 24.1 ± 0.9."),
        (1, "An image has 224 × 224 pixels."),
        (2, "Its error is 2·10⁻⁶ in 1,420 steps."),
        (3, "It takes 17 s, 2.5 GB and 30% of a card."),
        (5, "The scores were 1, 2.5, −3, +4 and 5 %."),
        (1, "Training runs for 8 updates in chapter 03."),
    ],
)
def test_quantities_are_counted(count, sentence):
    [found] = prose.split_sentences(sentence)
    assert found.quantities == count


def test_words_are_counted_with_code_and_formulas_as_one():
    [sentence] = prose.split_sentences("Run `cmpt run cpu` for $x + y$ - at once, {{n a/b}} times.")
    assert sentence.words == 8
    assert len(texts("word " * 36)) == 1
    assert messages("word " * 35) == []
    assert messages("word " * 36) == ["36 words: word word word word word word word word ..."]
    assert messages("We saw 1, 2, 3 and 4.") == []
    assert messages("We saw 1, 2, 3, 4 and 5.") == ["5 quantities: We saw 1, 2, 3, 4 and 5. ..."]


# private words and typed values


@pytest.mark.parametrize(
    "sentence",
    [
        "Whoever updates a model decides twice.",
        "Compute is told in runs.",
        "By how much, it does not tell.",
        "It is written to be embarrassed.",
        "Merging is the price of a trade.",
        "Only the ways there differ.",
        "What is beyond that is not seen within the error.",
        "What an order goes by is a statistic.",
        "On the whole it gains two points.",
        "The so manieth update is scored.",
        "Buffer alone, which has its room, keeps less.",
        "There are forty steps a task.",
        "It takes one folder a class.",
        "Choose one colour a setting.",
        "It makes forty passes an update.",
        "Fisher information is computed once a task.",
        "What we do otherwise is in the table.",
        "Transfer is reported apart.",
        "The card reaches 40 % of its peak.",
    ],
)
def test_private_words_are_errors(sentence):
    assert any(finding.is_error for finding in prose.check_text(sentence))


@pytest.mark.parametrize(
    "sentence",
    [
        "Classes that were not seen in training are scored, too.",
        "Each image is seen once.",
        "As time goes by, the world changes.",
        "Scores are on the whole test set, and on the whole tests of others.",
        "It tells you which rule was used.",
        "The error tells you to lower the rank.",
        "The mean is taken over replicates.",
        "Take a step. A task follows.",
        "The cell runs a task, copies a setting and samples a class.",
        "The figure colours a cell once a run is stored.",
        "Two classes differ otherwise.",
        "The way there is no shortcut.",
        "Make room for the model.",
        "There are forty steps per task.",
        "The card reaches 40% of its peak.",
    ],
)
def test_ordinary_english_is_none(sentence):
    assert prose.check_text(sentence) == []


@pytest.mark.parametrize(
    ("sentence", "value"),
    [
        ("It gains 12 points of A_KA.", "12 points of A_KA"),
        ("It ends at A_ZS of 43.", "A_ZS of 43"),
        ("Then A_KA rises from 24.0 on.", "A_KA rises from 24.0"),
        ("It loses 1.2 points.", "1.2 points"),
        ("Its geometric mean is 41.2.", "geometric mean is 41.2"),
    ],
)
def test_typed_values_are_warnings_in_chapters(sentence, value):
    assert messages(sentence) == [f"typed value {value!r}: fill it in as {{{{...}}}}"]
    assert messages(sentence, measured=False) == []


@pytest.mark.parametrize(
    "sentence",
    [
        "It gains {{gain merging/EMA}} points of A_ZS.",
        "A_KA is the mean of 41 datasets.",
        "Two points of A_KA matter.",
        "FoMo-in-Flux has 41 sets of A_KA.",
        "A difference within 3 points is tolerated.",
    ],
)
def test_filled_values_and_counts_are_none(sentence):
    assert messages(sentence) == []


# what a lesson holds

LESSON = """\
---
title: x
---

# 02 · X

Four words stand here. It gains {{gain a/b}} points, or {{points gain a/b}} (1.5 to 2 or so).

```{code-cell} ipython3
:tags: [parameters]

seeds: int = 1
```

```{code-cell} ipython3
from lab import figures

x = [
    1,
]
figures.with_title(
    figures.plot_front(x), "A title"
)
```

{{caption front: A {{ref front}}.}}

{{verdict a claim}}

+++ {"jp-MarkdownHeadingCollapsed": true}

## Evidence

+++

Three more words, {{gain a/b}}.
"""


def test_a_lesson_is_counted_without_its_evidence():
    found = prose.count_chapter(LESSON)
    assert (found.intervals, found.figures, found.pictures) == (4, 1, 1)
    assert (found.teaching, found.code) == (3, 6)
    assert found.evidence == 4 and 15 < found.words < 30
    assert prose.split_lesson("No evidence.") == ("No evidence.", "")


def test_a_readers_own_run_is_no_result():
    own = LESSON.replace("plot_front", "plot_among_runs")
    assert prose.count_chapter(own).figures == 0
