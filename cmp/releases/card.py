"""Model cards of releases and of runs, in Markdown."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from huggingface_hub import ModelCardData  # noqa: TID251 - it is plain data

from cmp import starts
from cmp.config import STARTS, RunConfig
from cmp.data import Corpus
from cmp.errors import clean_text
from cmp.parsing import read_yaml
from cmp.releases import sentences
from cmp.releases.compare import Comparison
from cmp.releases.release import ReleaseRecord

CARD = read_yaml(Path(__file__).with_name("card.yaml"))
"""The templates of cards, and those of the code in them."""
SHOWN_NAMES = 4
"""The number of names in the snippet."""


def release_card(
    record: ReleaseRecord,
    run_config: RunConfig,
    corpus: Corpus,
    comparison: Comparison,
    update_sentences: Sequence[str],
    score_sentences: Sequence[str],
) -> str:
    """Return the card of a release.

    Args:
        record: The content of its stream.json.
        run_config: The config of its last update.
        corpus: The data so far.
        comparison: The models before and after the last update.
        update_sentences: Sentences on the last update.
        score_sentences: Sentences on the scores.
    """
    last = record.updates[-1]
    rows = []
    for number, update in enumerate(record.updates):
        source = sentences.describe_peak(update.is_peak_given, record.updates[:number])
        row = update.name, f"{update.images:,}", update.steps, f"{update.peak:g}"
        rows.append((*row, source or "the recipe's"))
    columns = ["", "training images", "steps", "peak rate", "source"]
    updates = pd.DataFrame(rows, columns=pd.Index(columns))
    sets = [
        (tree["name"], arrival.role, tree.get("prompt", ""), tree.get("licence", "not given"))
        for arrival in record.arrivals
        for tree in arrival.sets or [{"name": arrival.folder}]
    ]
    columns = ["", "role", "prompt", "licence"]
    data = pd.DataFrame([*dict.fromkeys(sets)], columns=pd.Index(columns))
    return fill_card(
        "release", run_config, corpus, record.provenance, ("data", "training.task_steps"),
        set=code_span(corpus.by_role("adapt")[-1]),
        count="once" if len(record.updates) == 1 else f"{len(record.updates)} times",
        last=escape_markdown(last.name), id=record.id,
        images=sentences.count_of(last.images, "training image"),
        scores=score_table(comparison),
        about=sentences.SCORES, splits=sentences.describe_splits(),
        months=escape_markdown(sentences.describe_updates(comparison)),
        said="\n\n".join(map(escape_markdown, score_sentences)),
        plan="\n".join(f"* {escape_markdown(sentence)}" for sentence in update_sentences),
        updates=markdown_table(updates), data=markdown_table(data), batch=sum(last.counts),
    )  # fmt: skip


def fill_card(
    kind: str, run_config: RunConfig, corpus: Corpus, provenance: Mapping[str, object],
    hidden: Sequence[str] = (), **parts: object,
) -> str:  # fmt: skip
    """Return a card from its template.

    The head names the licence and the repository, or the file, of the weights that the model
    descends from, if they are known.

    Args:
        kind: "release" or "run".
        run_config: The config of the run or the last update.
        corpus: Its data, for the code.
        provenance: The machine that computed it.
        hidden: Settings that the card leaves out.
        **parts: What only this card says.
    """
    name, start, licence = run_config.model.name, run_config.model.start, None
    base = starts.hub_location(name, start).rpartition("/")[0] or None
    family = starts.family_of(name)
    if family and start in STARTS and start != "random":
        base = family.base_path(name, start, run_config.seeds.init).stem
        licence = getattr(family, "LICENCE", None)
    head = ModelCardData(license=licence, base_model=base, **CARD["head"])
    changes = [(k, str(x)) for k, x in run_config.changes().items() if k not in hidden]
    card = CARD[kind].format(
        head=head.to_yaml().rstrip(), name=code_span(name), start=code_span(start),
        licence="" if licence else CARD["unlicensed"],
        snippet=snippet(name, corpus).rstrip(), config=run_config, provenance=provenance,
        settings=markdown_table(pd.DataFrame(changes, columns=pd.Index(["", "value"]))),
        **parts,
    )  # fmt: skip
    return re.sub(r"\n{3,}", "\n\n", card)


def snippet(name: str, corpus: Corpus) -> str:
    """Return Python code that names an image with a model, run in the folder of its card.

    Args:
        name: The model.
        corpus: The data so far; its last set of updates gives names and the prompt, or captions.
    """
    dataset = corpus.by_role("adapt")[-1]
    prompt = corpus.datasets[dataset].prompt if _is_named(corpus, dataset) else "{}"
    names = _known_texts(corpus, dataset)[:SHOWN_NAMES]
    how, name = CARD["usual"], starts.known_name(name)
    if family := starts.family_of(name):  # with its package's own networks and tokens
        how = CARD["own"].format(name=name, module=family.__name__)
    return CARD["snippet"].format(how=how.rstrip(), names=names, prompt=prompt)


def _is_named(corpus: Corpus, dataset: str) -> bool:
    """Return whether a set has names; otherwise it has captions."""
    return corpus.datasets[dataset].task == "classification"


def _known_texts(corpus: Corpus, dataset: str) -> list[str]:
    """Return the names of a set or, without names, the captions of its images."""
    if _is_named(corpus, dataset):
        return corpus.classes[dataset]
    rows = np.flatnonzero((corpus.table["dataset"] == dataset) & (corpus.table["split"] != ""))
    return [*dict.fromkeys(text for row in rows for text in corpus.captions(row))]


def score_table(comparison: Comparison) -> str:
    """Return the scores before and after an update in Markdown."""
    sets, updates = comparison.sets, comparison.updates
    table = pd.concat([comparison.summary, sets, updates])
    rows = pd.DataFrame(
        {
            "": table.index,
            "images": ["" if np.isnan(count) else f"{count:,.0f}" for count in table["images"]],
            "before": table["old"],
            "after": table["new"],
            "change, 95% interval": [
                f"{sentences.signed(x.change)} ({sentences.interval_in_words(x.low, x.high)})"
                for x in table.itertuples()
            ],
            "lost": [
                "–" if np.isnan(share) else f"{share:.1f}% ({count:,.0f})"
                for share, count in zip(table["lost_share"], table["lost"], strict=True)
            ],
        }
    )
    return markdown_table(rows)


def escape_markdown(text: str) -> str:
    """Return a user's text as one line of Markdown, with markup escaped."""
    return re.sub(r"([\\<|`\[])", r"\\\1", " ".join(clean_text(text).split()))


def code_span(text: str) -> str:
    """Return a text as one line for a code span, where only a backtick is markup."""
    return " ".join(clean_text(text).split()).replace("`", "'")


def markdown_table(table: pd.DataFrame) -> str:
    """Return a table in Markdown without its index, and with one decimal."""
    texts = table.map(
        lambda value: f"{value:.1f}" if isinstance(value, float) else escape_markdown(str(value))
    )
    rows = [[*table.columns], ["---"] * table.shape[1], *texts.to_numpy()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
