"""Sentences and numbers in words for the plan, the card and the report of an update."""

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from safetensors import SafetensorError
from safetensors.torch import load_file

from cmp.errors import explain_errors
from cmp.readers.manifest import SPLIT_SHARES
from cmp.releases import release
from cmp.releases.compare import Comparison
from cmp.releases.ledger import NAMED, ArrivalReport, changed_retention
from cmp.releases.release import Release, UpdateRecord
from cmp.runs.logs import read_log

LAST_STEPS, GUESSING = 10, 0.99
"""How many last steps show a ruined model, and the share of log(batch), the loss of guessing, that
their mean loss then reaches. Collapsed models end above log(batch) by up to 0.002%, healthy ones of
this book below 60% of it, and a month with no more than two names below 90%."""
SCORES = (
    "A_KA is the mean score of the sets that updates teach, A_ZS of those that the model knew "
    "before, both in percent; GM, which tuning maximises, is their geometric mean."
)
"""What the summaries mean."""


def count_of(count: int, noun: str) -> str:
    """Return a count with its noun, in the plural unless the count is one."""
    plural = noun.removesuffix("y") + "ies" if noun.endswith("ry") else f"{noun}s"
    return f"{count:,} {noun if count == 1 else plural}"


def decimal(value: float, sign: str = "", digits: int = 1) -> str:
    """Return a number with some decimals and a true minus sign, or a dash for NaN. With `sign` "+",
    numbers above zero have a plus."""
    if math.isnan(value):
        return "–"
    text = f"{value:{sign}.{digits}f}"
    return text.replace("-", "−") if float(text) else text.lstrip("+-")


def signed(value: float, digits: int = 1) -> str:
    """Return a change with its sign, such as "−10.1"; zero has no sign."""
    return decimal(value, "+", digits)


def interval_in_words(low: float, high: float) -> str:
    """Return an interval as text, or "no interval"."""
    return "no interval" if math.isnan(low) else f"{decimal(low)} to {decimal(high)}"


def describe_splits() -> str:
    """Return a sentence on which images are held out."""
    arrived, kept = SPLIT_SHARES["adapt"], SPLIT_SHARES["eval"]
    return (
        f"Unless files or a manifest give splits, {arrived['test']:.0%} of an update's images "
        f"are held out for tests and {arrived['validation']:.0%} for tuning; of a retention set, "
        f"{kept['test']:.0%} and {kept['validation']:.0%}."
    )


def describe_updates(comparison: Comparison) -> str:
    """Return a sentence on the rows of updates, or "" without any."""
    if comparison.updates.empty:
        return ""
    names = ", ".join(comparison.corpus.by_role("adapt"))
    return (
        f"The images of all updates so far are scored as {names}, and again for each update, one "
        "row each."
    )


def describe_unscored(report: ArrivalReport) -> str:
    """Return a sentence on what the test images of an update cannot show, or ""."""
    if not report.new.get("test"):
        return "no test images, so what this update taught is not scored"
    if not report.untested_names:
        return ""
    total = count_of(len({*report.new_names, *report.old_names}), "name")
    return (
        f"not scored, since there are no test images so far: {len(report.untested_names)} of "
        f"{total}: {list_names(report.untested_names)}"
    )


def list_names(names: Sequence[str]) -> str:
    """Return the first names, and whether there are others."""
    return ", ".join(names[:NAMED]) + " and others" * (len(names) > NAMED)


def describe_skipped(report: ArrivalReport) -> str:
    """Return a sentence on what was left out as it cannot be used, or ""."""
    if not report.skipped:
        return ""
    return f"left out by `faults: skip`: {report.skipped:,} ({report.skipped_faults})"


def describe_peak(is_given: bool, earlier: Sequence[UpdateRecord]) -> str:
    """Return where the peak of an update comes from, or "" for the recipe's.

    Args:
        is_given: Whether the update's own settings give it.
        earlier: The earlier updates.
    """
    if is_given:
        return "given"
    chosen = [update.name for update in earlier if update.is_peak_given]
    return f"kept from {chosen[-1]}" if chosen else ""


def describe_ruin(metrics: pd.DataFrame, log: Path, batch: int) -> str:
    """Return a sentence if a model may be ruined, since its training ended in guessing or an update
    halved A_ZS; otherwise "".

    Args:
        metrics: The scores of a run or stream, as in `RunResult.metrics`.
        log: The file of its log, which may be missing.
        batch: Its batch size.
    """
    steps, guess, signs = read_log(log), math.log(batch), []
    last = steps["loss"].dropna().tail(LAST_STEPS) if "loss" in steps else ()
    if len(last) == LAST_STEPS and last.mean() >= GUESSING * guess:
        signs.append(f"its last losses are {last.mean():.2f}, and those of guessing {guess:.2f}")
    every_time = metrics["scope"].isin(metrics["scope"].head(1))  # the others are of the ends only
    kept = metrics[every_time & (metrics["role"] == "eval")]
    now = kept.pivot_table("score", "task", ["dataset", "images"])
    was = now.shift()
    was, now = was.where(now.notna()).mean(axis=1), now.where(was.notna()).mean(axis=1)
    for task in now.index[now < was / 2][-1:]:
        signs.append(f"A_ZS fell from {was[task]:.1f} to {now[task]:.1f} in update {task}")
    if not signs:
        return ""
    what = f"The model may be ruined or untrained: {' and '.join(signs)}"
    return f"{what}; compare it with the one before, and try a lower schedule.peak."


def describe_retention(
    metrics: pd.DataFrame,
    hits: Mapping[str, np.ndarray],
    updates: int,
    changed: Collection[str] = (),
) -> str:
    """Return a sentence on how A_ZS has changed since before the first update, or "" if there was
    only one update or nothing to compare.

    Args:
        metrics: The scores of the stream, as in `RunResult.metrics`.
        hits: Whether each question was answered correctly, as in `RunResult.hits`.
        updates: The number of updates.
        changed: Sets to leave out, see `cmp.releases.ledger.changed_retention`.
    """
    table = _widest(metrics)
    kept = table[(table["role"] == "eval") & ~table["dataset"].isin([*changed])].set_index(
        "dataset"
    )
    first, last = (kept[kept["task"] == task] for task in (0, updates))
    same = [x for x in first.index if x in last.index and first["images"][x] == last["images"][x]]
    if updates < 2 or not same:
        return ""
    was, now = (part.loc[same, "score"].mean() for part in (first, last))
    what = "A_ZS"
    if len(same) < ((table["role"] == "eval") & (table["task"] == updates)).sum():
        what = f"The mean of {count_of(len(same), 'unchanged retention set')} ({', '.join(same)})"
    words = (
        f"{what} was {was:.1f} before the first update and is {now:.1f} after {updates} "
        f"({signed(now - was)})"
    )
    right = [hits[f"0/{name}"] for name in same if f"0/{name}" in hits]
    still = [hits[f"{updates}/{name}"] for name in same if f"{updates}/{name}" in hits]
    if len(right) == len(still) and [*map(len, right)] == [*map(len, still)] and right:
        before, after = np.concatenate(right), np.concatenate(still)
        if before.any():
            share = 100 * (before & ~after).sum() / before.sum()
            words += f"; {share:.1f}% of what was right then is wrong now"
    return (
        f"{words}. Losses add up even if each update keeps its limits, so also compare with a "
        "fixed release, such as the first: cmpt compare takes any two."
    )


def _widest(metrics: pd.DataFrame) -> pd.DataFrame:
    """Return the metrics on the largest test that was scored."""
    is_full = metrics["scope"] == "full"
    return metrics[is_full] if is_full.any() else metrics


def describe_release_retention(made: Release) -> str:
    """Return sentences on whether a release may be ruined and how A_ZS has changed since before its
    first update, see `describe_ruin` and `describe_retention`."""
    changed, path = changed_retention(made.ledger()), made.path(release.SCORES_FILE)
    hits_path = made.path(release.HITS_FILE)
    errors = *release.RECORD_ERRORS, SafetensorError
    with explain_errors(f"{path} or {hits_path.name}: cannot be read", release.REMEDY, *errors):
        metrics = pd.read_parquet(path)
        hits = {name: x.numpy() for name, x in load_file(hits_path).items()}
        words = describe_retention(metrics, hits, len(made.record.updates), changed)
        ruin = describe_ruin(metrics, made.folder / release.LOG_FILE, made.config.training.batch)
    return "\n".join(filter(None, (ruin, words)))
