"""Summarise the runs of a study: means over streams, paired differences, and their intervals.

Streams that start from the same base are not independent, so they are averaged by base before an
interval is computed. There is no interval until a study has all its streams, see `Estimate`.
"""

import json
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from cmp.errors import CmpError
from cmp.runs import store
from cmp.runs.store import RUN_KEYS
from lab.evidence import results, studies

AGGREGATES = ("A_KA", "A_ZS", "GM")
PARTS = {
    "names": tuple(
        f"new-{kind}" for kind in ("emoji-living", "emoji-signs", "emoji-things", "flags", "icons")
    ),
    "looks": tuple(f"new-{kind}" for kind in ("animals", "counts", "digits", "solids", "sprites")),
    "flags": ("new-flags",),
}
"""The datasets of each part of A_KA: new names for drawings like those of pretraining, new looks,
which programs drew, and flags alone, which are among the names. A_KA was split after its scores had
been seen."""
MEASURES = (*AGGREGATES, *PARTS)
ALPHA = 0.05
"""Probability that any claim of a family is wrong."""
FAMILY = 12
"""The most claims in a family. Intervals are as wide as so many need, even if there are fewer."""


def claims_level() -> float:
    """Return the confidence level of claims and of all measured intervals.

    With Bonferroni's correction, at most one family in twenty has any wrong claim. Other values
    have the same level, so that no text excludes what a verdict leaves open.
    """
    return 1 - ALPHA / FAMILY


def level_in_words() -> str:
    """Return `claims_level` as text, such as "99.6%"."""
    return f"{100 * claims_level():.1f}%"


def t_interval(values: np.ndarray, level: float) -> tuple[float, float, float]:
    """Return the mean of independent values, its standard error, and the half-width of its
    t-interval.

    For a single value, the last two are NaN; without values, all three are.
    """
    count, unknown = len(values), float("nan")
    mean = float(np.mean(values)) if count else unknown
    if count < 2:
        return mean, unknown, unknown
    error = float(np.std(values, ddof=1) / np.sqrt(count))
    return mean, error, error * t_factor(count, level)


def t_factor(count: int, level: float) -> float:
    """Return the half-width of a t-interval over independent values, in standard errors."""
    return float(stats.t.isf((1 - level) / 2, count - 1))


class Estimate(NamedTuple):
    """A mean over streams, with a t-interval over the bases that they start from.

    Attributes:
        value: The estimate.
        half: The half-width of the interval, or NaN if there is none.
        streams: The number of streams.
        planned: The number of planned streams.
        bases: The number of bases that they start from.
    """

    value: float
    half: float
    streams: int
    planned: int
    bases: int

    @property
    def low(self) -> float:
        """The lower end of the interval."""
        return self.value - self.half

    @property
    def high(self) -> float:
        """The upper end of the interval."""
        return self.value + self.half

    @property
    def progress(self) -> str:
        """The number of streams so far, such as "2 of 20 streams", or "" if complete."""
        return "" if self.streams >= self.planned else f"{self.streams} of {self.planned} streams"

    def in_words(
        self, sign: str = "+", convert: Callable[[float], float] = lambda value: value
    ) -> str:
        """Return the estimate with its interval, such as "+4.9 (3.1 to 6.7)", or with the reason
        why it has none.

        Args:
            sign: "+" to show the sign of positive values, or "".
            convert: An increasing function to apply to the value and the interval's ends, such as a
                root.
        """
        ends = (self.value, self.low, self.high)
        value, low, high = (round(convert(x), 1) + 0.0 for x in ends)  # avoids -0.0
        words = f"{low:.1f} to {high:.1f}"
        if self.progress:
            words = f"preliminary, {self.progress}"
        elif self.bases < 2:
            words = f"{self.streams} streams of one base" if self.streams > 1 else "one stream"
        return f"{value:{sign}.1f} ({words})".replace("-", "−")


def estimate_mean(values: pd.Series, bases: pd.Series, planned: int) -> Estimate:
    """Return the mean of the values of streams, averaged by base.

    Args:
        values: The value of each stream.
        bases: The base of each, with the same index.
        planned: The number of planned streams.
    """
    by_base = values.groupby(bases.reindex(values.index)).mean()
    return estimate_from_bases(float(values.mean()), by_base, len(values), planned)


def estimate_from_bases(value: float, by_base: pd.Series, streams: int, planned: int) -> Estimate:
    """Return an estimate with the interval of the mean of one value per base."""
    _, _, half = t_interval(by_base.to_numpy(float), claims_level())
    if streams < planned:
        half = float("nan")
    return Estimate(value, half, streams, planned, len(by_base))


def planned_streams(study: str, setting: str) -> int:
    """Return how many streams a study plans for a setting.

    Raises:
        CmpError: There is no such study or setting.
    """
    counts = studies.load_study(study).counts
    if setting not in counts:
        raise CmpError(
            f"study {study} has no setting {setting!r}; its settings are {', '.join(counts)}"
        )
    return counts[setting]


def run_bases(published: pd.DataFrame) -> pd.Series:
    """Return the base that each published run starts from, by setting and replicate.

    Args:
        published: The result of `lab.evidence.results.published_metrics`.
    """
    trees = published.groupby(RUN_KEYS)["config"].first().astype(str)
    return trees.map(lambda tree: json.loads(tree)["seeds"]["init"]).rename("base")


def part_scores(published: pd.DataFrame) -> pd.DataFrame:
    """Return the mean scores over the `PARTS` of A_KA, by setting, replicate, task and scope.

    Args:
        published: The result of `lab.evidence.results.published_metrics`.
    """
    keys = [*RUN_KEYS, "task", "scope"]
    means = {
        name: published[published["dataset"].isin(datasets)].groupby(keys)["score"].mean()
        for name, datasets in PARTS.items()
    }
    return pd.DataFrame(means)


def study_trajectory(study: str, published: pd.DataFrame | None = None) -> pd.DataFrame:
    """Return the trajectory of a published study, with the columns needed for intervals.

    Args:
        study: The study.
        published: Its published metrics, if they were read already.

    Returns:
        The result of `cmp.runs.store.trajectory`, with the `PARTS` of A_KA, the `base` of each run
        and the number of `planned` streams of its setting.
    """
    published = results.published_metrics(study) if published is None else published
    table = store.trajectory(published).join(run_bases(published), on=RUN_KEYS)
    table = table.join(part_scores(published), on=[*RUN_KEYS, "task", "scope"])
    counts = studies.load_study(study).counts
    # a setting removed from the study stays incomplete
    planned = table["setting"].map(counts).fillna(max(counts.values()))
    return table.assign(planned=planned.astype(int))


def setting_estimates(trajectory: pd.DataFrame, setting: str) -> dict[str, Estimate]:
    """Return the final scores of a setting by measure.

    Args:
        trajectory: The result of `study_trajectory`.
        setting: The setting.
    """
    rows = store.final_scores(trajectory[trajectory["setting"] == setting]).set_index("replicate")
    planned = int(rows["planned"].iloc[0])
    return {name: estimate_mean(rows[name], rows["base"], planned) for name in MEASURES}


def by_replicate(trajectory: pd.DataFrame, columns: Sequence[str] = AGGREGATES) -> pd.DataFrame:
    """Return the final scores of all runs, one row per replicate.

    Args:
        trajectory: The runs.
        columns: The columns to return.

    Returns:
        Columns (aggregate, setting), sorted; NaN if a run is missing.

    Raises:
        CmpError: A run occurs twice, so it would count as two replicates.
    """
    rows = store.final_scores(trajectory)
    if (twice := rows.duplicated(RUN_KEYS)).any():
        setting, replicate = rows.loc[twice, RUN_KEYS].iloc[0]
        raise CmpError(f"trajectory: replicate {replicate} of {setting!r} occurs twice; remove one")
    table = rows.set_index(["replicate", "setting"])[list(columns)].unstack("setting")
    names = pd.MultiIndex.from_product([columns, sorted(trajectory["setting"].unique())])
    return table.reindex(index=sorted(trajectory["replicate"].unique()), columns=names)


def paired_differences(trajectory: pd.DataFrame, one: str, other: str) -> dict[str, Estimate]:
    """Return one setting minus another by measure, paired by replicate.

    The intervals are corrected only for the claims, not for other comparisons.

    Args:
        trajectory: The result of `study_trajectory`, possibly of several studies.
        one: A setting.
        other: The setting to subtract.

    Raises:
        CmpError: A setting is missing.
    """
    known = trajectory["setting"].unique()
    if missing := [name for name in (one, other) if name not in known]:
        there = ", ".join(known)
        raise CmpError(f"paired difference: no setting {missing[0]!r}; the settings are {there}")
    rows = trajectory[trajectory["setting"].isin([one, other])]
    table, planned = by_replicate(rows, [*MEASURES, "base"]), int(rows["planned"].min())
    differences = {name: (table[name, one] - table[name, other]).dropna() for name in MEASURES}
    return {name: estimate_mean(x, table["base", one], planned) for name, x in differences.items()}
