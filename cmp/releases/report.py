"""A comparison as one page of HTML: images first, no network, and no script needed to read it."""

import functools
import itertools
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cmp import evaluation
from cmp.evaluation import RETRIEVAL_K
from cmp.files import write_atomic
from cmp.releases import sentences
from cmp.releases.compare import ALL, NAMING, TO_IMAGE, Comparison
from cmp.releases.gate import GateLine
from cmp.releases.index import KNOWN, NEW, RECALL_AT
from cmp.releases.sentences import count_of, decimal
from cmp.releases.templates import render
from cmp.releases.thumbnails import SIDE, picture_uris

LARGEST = 3_000_000
"""Maximum bytes of a page."""
ON_WALL, PER_CONCEPT = {"lost": 42, "gained": 28}, 2
"""The most images on each wall, and per concept."""
WORST, SHOTS = 20, (3, 8)
"""The most concepts per set in the list of the worst; the most images per concept, and concepts per
set with images."""
MOST_SETS = 80
"""The most sets with a list of their worst concepts."""
CLEARLY = 1.0
"""By how many points recall must differ to decide what is encoded again."""
FEW_QUERIES = 50
"""Fewer queries of one kind are too few to decide it."""
ROLES = {"adapt": "New content (A_KA)", "eval": "Old content (A_ZS)", "transfer": "Transfer"}
TILES = {"A_ZS": "A_ZS, known content", "A_KA": "A_KA, new content", ALL: "all sets"}
QUERIES = {"text": "words", "picture": "an image"}
NAME_WALLS = {
    "lost": ("Names lost", "images that lost a name", "No correct name became wrong."),
    "gained": ("Names gained", "images that gained a name", "No wrong name became correct."),
}
"""Of each wall: its heading, what it counts, and what it says if it is empty."""
CAPTION_WALLS = {
    "lost": (
        "Images that captions no longer find", "images that a caption no longer finds",
        "Each caption that found its image still does.",
    ),
    "gained": (
        "Images that captions find now", "images that a caption finds only now",
        "No caption finds its image that did not before.",
    ),
}  # fmt: skip
"""The same where no set has names."""
INDEX_COLUMNS = {
    "before": "old model on its own index",
    "as_is": "new model, old index",
    "new_first": "new images re-encoded",
    "reencoded": "everything re-encoded",
}


def write_report(
    comparison: Comparison,
    path: str | os.PathLike[str],
    title: str | None = None,
    gate: Sequence[GateLine] = (),
    notes: Sequence[str] = (),
    background: Sequence[str] = (),
) -> None:
    """Write a comparison as a page of at most 3 MB, whole or not at all.

    Args:
        comparison: The models.
        path: The HTML file.
        title: The page's heading. If None, it asks whether the new model may be deployed.
        gate: The limits, and whether they were kept, see `cmp.releases.gate.apply_gate`.
        notes: Sentences that follow the heading.
        background: Sentences to fold below them, such as what arrived.

    Raises:
        CmpError: The file cannot be written.

    Example:
        >>> corpus = cmp.load_data("embedded")
        >>> tables = cmp.compare("small:annealed", "small:unannealed", corpus, subset=4)
        >>> cmp.write_report(tables, folder / "report.html")
        >>> (folder / "report.html").stat().st_size < 3_000_000
        True
    """
    write_atomic(
        Path(os.path.expanduser(path)), report_page(comparison, title, gate, notes, background)
    )


def report_page(
    comparison: Comparison,
    title: str | None = None,
    gate: Sequence[GateLine] = (),
    notes: Sequence[str] = (),
    background: Sequence[str] = (),
) -> str:
    """Return the page of `write_report`, whose arguments these are."""
    words = NAME_WALLS if _has_names(comparison) else CAPTION_WALLS
    flips = {kind: _shown_flips(comparison, kind) for kind in ON_WALL}
    walls = {
        kind: dict(zip(("heading", "counted", "nothing"), words[kind], strict=True))
        | {"shown": choose_flips(comparison, kind)}
        for kind in ON_WALL
    }
    shots = _choose_shots(comparison)
    wanted = [*(row for wall in walls.values() for row in wall["shown"]["row"])]
    wanted += itertools.chain.from_iterable(shots.values())
    is_small = not comparison.corpus.in_files and comparison.corpus.images.shape[-1] < SIDE
    make = functools.partial(
        render, "report.html.j2", comparison=comparison, title=title or "Deploy the new model?",
        notes=notes, background=background, flips=flips, walls=walls, shots=shots, naming=NAMING,
        per_concept=PER_CONCEPT, is_small=is_small, retrieval_k=RETRIEVAL_K,
        **_summary_facts(comparison), **_score_facts(comparison), **_concept_facts(comparison),
        **_index_facts(comparison), **_gate_facts(gate),
    )  # fmt: skip
    # images get the space that the text leaves
    framed = len(make(uris=dict.fromkeys(wanted, "")).encode())
    return make(uris=picture_uris(comparison.corpus, wanted, max(0, LARGEST - framed)))


def choose_flips(comparison: Comparison, kind: str) -> pd.DataFrame:
    """Return the flips that a wall shows: from each set in turn, largest changes first, and at most
    a few per concept.

    Args:
        comparison: The models.
        kind: "lost" or "gained".
    """
    flips = _shown_flips(comparison, kind)
    size = flips.groupby(["dataset", "concept"])["row"].transform("size")
    flips = flips.assign(size=size).sort_values("size", ascending=False, kind="stable")
    place = flips.groupby(["dataset", "concept"]).cumcount()
    flips = flips[place < PER_CONCEPT]
    share = comparison.sets[f"{kind}_share"]
    flips = flips.assign(
        turn=flips.groupby("dataset").cumcount(), share=-flips["dataset"].map(share).astype(float)
    )
    return flips.sort_values(["turn", "share"], kind="stable").head(ON_WALL[kind])


def _shown_flips(comparison: Comparison, kind: str) -> pd.DataFrame:
    """Return the images that lost or gained their name or, if no set has names, those that a
    caption no longer finds, or finds now."""
    flips, question = (
        comparison.flips,
        NAMING if (comparison.sets["metric"] == "top-1").any() else TO_IMAGE,
    )
    chosen = (flips["kind"] == kind) & (flips["asked"] == question)
    return flips[chosen].drop_duplicates(["dataset", "row"])


def _has_names(comparison: Comparison) -> bool:
    """Return whether any set has names; the others have captions."""
    return bool((comparison.sets["metric"] == "top-1").any())


def _choose_shots(comparison: Comparison) -> dict[tuple[str, str], list[int]]:
    """Return the images to show beside the worst concepts, by dataset and concept."""
    flips = comparison.flips
    lost = flips[(flips["kind"] == "lost") & (flips["asked"] == NAMING)]
    rows = lost.groupby(["dataset", "concept"])["row"].apply(lambda rows: list(rows)[: SHOTS[0]])
    shots = {}
    for _, table in comparison.worst_concepts(SHOTS[1]).groupby("dataset", sort=False):
        for row in table[table["questions"] > 1].itertuples():
            shots[row.dataset, row.concept] = rows.get((row.dataset, row.concept), [])
    return shots


def _summary_facts(comparison: Comparison) -> dict[str, Any]:
    """Return the means at the head of the page, and how many images the old model named right."""
    summary = comparison.summary
    named = comparison.sets[comparison.sets["metric"] == "top-1"]
    means = [
        (words, summary.loc[name])
        for name, words in TILES.items()
        if name in summary.index and (name != ALL or len(summary) == 1)
    ]
    return {"means": means, "right": round((named["old"] * named["questions"]).sum() / 100)}


def _score_facts(comparison: Comparison) -> dict[str, Any]:
    """Return what the list of scores needs, each with its change and interval drawn."""
    sets, ends = comparison.sets, ["low", "high", "change"]
    drawn = np.nan_to_num(pd.concat([sets[ends], comparison.updates.reindex(columns=ends)]))
    low, high = min(0.0, drawn.min()), max(0.0, drawn.max())
    margin = 0.04 * (high - low) or 1.0
    low, high = low - margin, high + margin
    return {
        "down": int((sets["high"] < 0).sum()),
        "up": int((sets["low"] > 0).sum()),
        "roles": ROLES,
        "mean_of": {role: name for name, role in evaluation.ROLES.items()},
        "ticks": _choose_ticks(low, high),
        "percent": lambda value: f"{100 * (value - low) / (high - low):.1f}",
        "about_scores": sentences.SCORES,
        "splits": sentences.describe_splits(),
        "about_updates": sentences.describe_updates(comparison),
    }


def _choose_ticks(low: float, high: float) -> list[float]:
    """Return the numbers of an axis: zero and round numbers on either side."""
    span = max(-low, high)
    step = next(x for x in (0.5, 1, 2, 5, 10, 20, 50, 100) if span / x <= 4 or x == 100)
    return [n * step for n in range(-4, 5) if low <= n * step <= high]


def _concept_facts(comparison: Comparison) -> dict[str, Any]:
    """Return the worst concepts of each set, those of the set that lost most first."""
    tables = [*comparison.worst_concepts(WORST).groupby("dataset", sort=False)]
    tables.sort(key=lambda item: int((item[1]["gained"] - item[1]["lost"]).sum()))
    worse = int((comparison.concepts["change"] < 0).sum())
    return {"concepts": tables[:MOST_SETS], "worse": worse, "worst": WORST}


def _index_facts(comparison: Comparison) -> dict[str, Any]:
    """Return what the searches by captions and the recall of a stored index show."""
    table, index = comparison.retrieval, comparison.index
    means = table[(table["asked"] == TO_IMAGE) & (table["k"] == max(RECALL_AT))]
    return {
        "found": means[["old", "new"]].mean(),
        "index_finding": "" if index.empty else _index_finding(index),
        "index_columns": INDEX_COLUMNS,
        "index_k": max(RECALL_AT),
        "queries": QUERIES,
    }


def _gate_facts(gate: Sequence[GateLine]) -> dict[str, Any]:
    """Return the broken limits, how many are judged, and in words how many are not."""
    judged = sum(line.judged for line in gate)
    unjudged = f", {len(gate) - judged} not judged" if judged < len(gate) else ""
    broken = [line for line in gate if not line.passed]
    return {"gate": gate, "broken": broken, "judged": judged, "unjudged": unjudged}


def _choose_row(rows: pd.DataFrame) -> pd.Series:
    """Return the row that decides about some content: that of searches by words or, if these are
    few, by images; if both are few, that of the more frequent kind."""
    enough = rows[rows["queries"] >= FEW_QUERIES].set_index("query", drop=False)
    for query in QUERIES:
        if query in enough.index:
            return enough.loc[query]
    return rows.loc[rows["queries"].idxmax()]


def _describe_queries(row: pd.Series) -> str:
    """Return how content was searched, and by how many queries if they are few."""
    few = f" (only {count_of(row['queries'], 'query')})" if row["queries"] < FEW_QUERIES else ""
    return f"by {QUERIES[row['query']]}{few}"


def _index_finding(table: pd.DataFrame) -> str:
    """Return what to do with the old index, and the recall of queries after that."""
    last = table.groupby(["content", "query"], sort=False).tail(1)
    rows = pd.DataFrame({name: _choose_row(part) for name, part in last.groupby("content")}).T
    if rows["as_is"].isna().all():
        return (
            "Encode every image again: the new model cannot search the old index, since their "
            "features differ in size"
        )
    if KNOWN in rows.index:
        now, mixed, again = rows.loc[KNOWN, ["as_is", "new_first", "reencoded"]]
        finding = f"{_describe_queries(rows.loc[KNOWN])}, {KNOWN} content is found in"
        what = "Encode every image again"
        if NEW in rows.index:
            what += ", or keep two indexes"
        if mixed < now - CLEARLY:  # the mixed index is NaN where nothing is new
            return (
                f"{what}: {finding} {decimal(mixed)}% of queries beside re-encoded new images, "
                f"{decimal(now)}% without"
            )
        if again > np.nanmax([now, mixed]) + CLEARLY:
            return f"{what}: {finding} {decimal(again)}% of queries instead of {decimal(now)}%"
        if NEW not in rows.index:
            return (
                f"The old index still serves: {finding} {decimal(now)}% of queries, or in "
                f"{decimal(again)}% if re-encoded"
            )
    now, mixed, again = rows.loc[NEW, ["as_is", "new_first", "reencoded"]]
    again = again if math.isnan(mixed) else mixed
    finding = f"{_describe_queries(rows.loc[NEW])}, {NEW} content is found in"
    if again <= now + CLEARLY:
        return (
            f"The old model may encode the new images, too: {finding} {decimal(now)}% of queries, "
            f"or in {decimal(again)}% if the new model encodes it"
        )
    return (
        f"Let the new model encode only the new images: {finding} {decimal(again)}% of queries "
        f"instead of {decimal(now)}%"
    )
