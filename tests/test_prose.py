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
    assert (found.intervals, found.figures) == (4, 1)
    assert found.evidence == 4 and 15 < found.words < 30
    assert prose.split_lesson("No evidence.") == ("No evidence.", "")


def test_a_readers_own_run_is_no_result():
    own = LESSON.replace("plot_front", "plot_among_runs")
    assert prose.count_chapter(own).figures == 0
