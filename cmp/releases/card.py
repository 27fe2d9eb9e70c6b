"""Model cards of releases and of runs, in Markdown."""

import re
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from huggingface_hub import ModelCardData  # noqa: TID251 - it is plain data

from cmp import starts
from cmp.config import STARTS, RunConfig
from cmp.data import Corpus
from cmp.releases import sentences
from cmp.releases.compare import Comparison
from cmp.releases.release import ReleaseRecord
from cmp.releases.templates import code_span, render

SHOWN_NAMES = 4
"""The number of names in the code."""


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
    rows = []
    for number, update in enumerate(record.updates):
        source = sentences.describe_peak(update.is_peak_given, record.updates[:number])
        row = update.name, f"{update.images:,}", update.steps, f"{update.peak:g}"
        rows.append((*row, source or "the recipe's"))
    sets = [
        (tree["name"], arrival.role, tree.get("prompt", ""), tree.get("licence", "not given"))
        for arrival in record.arrivals
        for tree in arrival.sets or [{"name": arrival.folder}]
    ]
    return fill_card(
        run_config, corpus, record.provenance, ("data", "training.task_steps"), record,
        last=record.updates[-1], taught=corpus.by_role("adapt")[-1],
        scores=score_table(comparison), about_scores=sentences.SCORES,
        splits=sentences.describe_splits(), about_updates=sentences.describe_updates(comparison),
        score_sentences=score_sentences, update_sentences=update_sentences,
        updates=_table(rows, "", "training images", "steps", "peak rate", "source"),
        data=_table([*dict.fromkeys(sets)], "", "role", "prompt", "licence"), differences=(),
    )  # fmt: skip


def fill_card(
    run_config: RunConfig, corpus: Corpus, provenance: Mapping[str, object],
    hidden: Sequence[str] = (), record: ReleaseRecord | None = None, **parts: object,
) -> str:  # fmt: skip
    """Return a card from its template.

    The head names the licence and the repository, or the file, of the weights that the model
    descends from, if they are known.

    Args:
        run_config: The config of the run or the last update.
        corpus: Its data, for the code.
        provenance: The machine that computed it.
        hidden: Settings that the card leaves out.
        record: The content of a release's stream.json, or None for the card of a run.
        **parts: What only this card says.
    """
    name, start, licence = run_config.model.name, run_config.model.start, None
    base = starts.hub_location(name, start).rpartition("/")[0] or None
    family = starts.family_of(name)
    if family and start in STARTS and start != "random":
        base = family.base_path(name, start, run_config.seeds.init).stem
        licence = getattr(family, "LICENCE", None)
    head = ModelCardData(
        license=licence, base_model=base, library_name="open_clip",
        pipeline_tag="zero-shot-image-classification", tags=["clip", "continual-pretraining"],
    )  # fmt: skip
    names, prompt = example_names(corpus)
    changes = [(k, str(x)) for k, x in run_config.changes().items() if k not in hidden]
    card = render(
        "card.md.j2", head=head.to_yaml().rstrip(), licence=licence, name=code_span(name),
        start=code_span(start), known_name=starts.known_name(name), family=family, names=names,
        prompt=prompt, config=run_config, settings=_table(changes, "", "value"),
        provenance=provenance, record=record, **parts,
    )  # fmt: skip
    return re.sub(r"\n{3,}", "\n\n", card)


def _table(rows: Sequence[Sequence[object]], *columns: str) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=pd.Index(columns))


def example_names(corpus: Corpus) -> tuple[list[str], str]:
    """Return the first names that the last set of updates taught, and its prompt; without names,
    captions and "{}".

    Args:
        corpus: The data so far.
    """
    dataset = corpus.by_role("adapt")[-1]
    if corpus.datasets[dataset].task == "classification":
        return corpus.classes[dataset][:SHOWN_NAMES], corpus.datasets[dataset].prompt
    rows = np.flatnonzero((corpus.table["dataset"] == dataset) & (corpus.table["split"] != ""))
    captions = dict.fromkeys(text for row in rows for text in corpus.captions(row))
    return [*captions][:SHOWN_NAMES], "{}"


def score_table(comparison: Comparison) -> pd.DataFrame:
    """Return the scores before and after an update in words."""
    table = pd.concat([comparison.summary, comparison.sets, comparison.updates])
    return pd.DataFrame(
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
