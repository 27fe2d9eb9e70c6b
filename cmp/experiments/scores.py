"""What runs of a study came to: means over streams, paired differences, and their intervals.

Two streams that start from one base are not independent, so that streams are averaged by base
before an interval is made. There is none before a study has all its streams, see `Estimate`.
"""

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from cmp.errors import CmpError
from cmp.experiments import results, studies
from cmp.files import read_yaml
from cmp.project import book_folder
from cmp.runs import store
from cmp.runs.store import RUN_KEYS

AGGREGATES = ("A_KA", "A_ZS", "GM")
CLAIMS = book_folder() / "claims.yaml"
ALPHA = 0.05
"""How often any of the claims may be wrong."""


def claims_level(count: int | None = None) -> float:
    """Return the level of every interval of a measured value: that of the claims.

    Bonferroni's correction makes all claims wrong together in one book of twenty. Other values have
    the same level, so that no text excludes what a verdict leaves open.

    Args:
        count: How many claims there are; those of the book where None.
    """
    if count is None:
        count = _count_claims(str(CLAIMS), CLAIMS.stat().st_mtime_ns)
    return 1 - ALPHA / max(1, count)


@functools.lru_cache(maxsize=2)
def _count_claims(path: str, stamp: int) -> int:
    return len(read_yaml(Path(path))["claims"])


def level_in_words() -> str:
    """Return `claims_level` as a text, such as "99.6%"."""
    return f"{100 * claims_level():.1f}%"


def t_interval(values: np.ndarray, level: float) -> tuple[float, float, float]:
    """Return the mean of independent values, its standard error, and half its t-interval's width.

    A single value says nothing about spread: the last two are NaN then, and all are without values.
    """
    count, unknown = len(values), float("nan")
    mean = float(np.mean(values)) if count else unknown
    if count < 2:
        return mean, unknown, unknown
    error = float(np.std(values, ddof=1) / np.sqrt(count))
    return mean, error, error * t_factor(count, level)


def t_factor(count: int, level: float) -> float:
    """Return half the width of a t-interval over independent values, in standard errors."""
    return float(stats.t.isf((1 - level) / 2, count - 1))


class Estimate(NamedTuple):
    """A mean over streams, with a t-interval over the bases that they start from.

    Attributes:
        value: The estimate.
        error: Its standard error.
        half: Half the interval's width; NaN where there is no interval.
        streams: How many streams it is from.
        planned: How many there will be.
        bases: How many bases they start from.
    """

    value: float
    error: float
    half: float
    streams: int
    planned: int
    bases: int

    @property
    def low(self) -> float:
        """The interval's lower end."""
        return self.value - self.half

    @property
    def high(self) -> float:
        """The interval's upper end."""
        return self.value + self.half

    @property
    def progress(self) -> str:
        """How many streams there are of how many, such as "2 of 20 streams"; "" with all."""
        return "" if self.streams >= self.planned else f"{self.streams} of {self.planned} streams"

    def in_words(
        self, sign: str = "+", convert: Callable[[float], float] = lambda value: value
    ) -> str:
        """Return the estimate with its interval, such as "+4.9 (3.1 to 6.7)", or why it has none.

        Args:
            sign: "+" shows the sign of what is positive, "" does not.
            convert: A rising function of the value and of the interval's ends, such as a root.
        """
        ends = (self.value, self.low, self.high)
        value, low, high = (round(convert(x), 1) + 0.0 for x in ends)  # no minus before zero
        words = f"{low:.1f} to {high:.1f}"
        if self.progress:
            words = f"preliminary, {self.progress}"
        elif self.bases < 2:
            words = f"{self.streams} streams of one base" if self.streams > 1 else "one stream"
        return f"{value:{sign}.1f} ({words})".replace("-", "−")


def signed(value: float) -> str:
    """Return points with their sign and one digit, such as "−10.1"; zero has no sign."""
    text = f"{value:+.1f}".replace("-", "−")
    return text[1:] if text[1:] == "0.0" else text


def estimate_mean(values: pd.Series, bases: pd.Series, planned: int) -> Estimate:
    """Return the mean of the values of streams, which are averaged by base.

    Args:
        values: Of each stream.
        bases: The base of each, of the same index.
        planned: How many streams there will be.
    """
    by_base = values.groupby(bases.reindex(values.index)).mean()
    return estimate_from_bases(float(values.mean()), by_base, len(values), planned)


def estimate_from_bases(value: float, by_base: pd.Series, streams: int, planned: int) -> Estimate:
    """Return an estimate whose interval is that of the mean of one value per base."""
    _, error, half = t_interval(by_base.to_numpy(float), claims_level())
    if streams < planned:
        error = half = float("nan")
    return Estimate(value, error, half, streams, planned, len(by_base))


def planned_streams(study: str, setting: str) -> int:
    """Return how many streams a study plans of a setting.

    Raises:
        CmpError: There is no such study or setting.
    """
    counts = studies.load_study(study).counts
    if setting not in counts:
        raise CmpError(f"study {study} has no setting {setting!r}; there are {', '.join(counts)}")
    return counts[setting]


def run_bases(published: pd.DataFrame) -> pd.Series:
    """Return the base that each published run starts from, by setting and replicate.

    Args:
        published: As `cmp.experiments.results.published_metrics` returns it.
    """
    trees = published.groupby(RUN_KEYS)["config"].first().astype(str)
    return trees.map(lambda tree: json.loads(tree)["seeds"]["init"]).rename("base")


def study_trajectory(study: str) -> pd.DataFrame:
    """Return the trajectory of a published study with what intervals take.

    Returns:
        As `cmp.runs.store.trajectory`, with the `base` of each run, and how many streams are
        `planned` of its setting.
    """
    published = results.published_metrics(study)
    table = store.trajectory(published).join(run_bases(published), on=RUN_KEYS)
    counts = studies.load_study(study).counts
    # a setting that the study has no more lacks streams for good
    planned = table["setting"].map(counts).fillna(max(counts.values()))
    return table.assign(planned=planned.astype(int))


def setting_means(trajectory: pd.DataFrame) -> pd.DataFrame:
    """Return the mean of each aggregate at the end over replicates, a row per setting.

    Args:
        trajectory: As `cmp.runs.store.trajectory` returns it, of several settings and
            replicates; so for the other functions of this module.
    """
    return store.final_scores(trajectory).groupby("setting", sort=False)[list(AGGREGATES)].mean()


def setting_estimates(trajectory: pd.DataFrame, setting: str) -> dict[str, Estimate]:
    """Return where a setting ended, by aggregate.

    Args:
        trajectory: As `study_trajectory` returns it.
        setting: The setting.
    """
    rows = store.final_scores(trajectory[trajectory["setting"] == setting]).set_index("replicate")
    planned = int(rows["planned"].iloc[0])
    return {name: estimate_mean(rows[name], rows["base"], planned) for name in AGGREGATES}


def by_replicate(trajectory: pd.DataFrame, columns: Sequence[str] = AGGREGATES) -> pd.DataFrame:
    """Return what all runs came to at the end, a row per replicate.

    Args:
        trajectory: The runs.
        columns: What is returned of each.

    Returns:
        Columns (aggregate, setting), sorted; NaN where a run is missing.

    Raises:
        CmpError: A run is there twice; it would count as two replicates.
    """
    rows = store.final_scores(trajectory)
    if (twice := rows.duplicated(RUN_KEYS)).any():
        setting, replicate = rows.loc[twice, RUN_KEYS].iloc[0]
        raise CmpError(f"trajectory: replicate {replicate} of {setting!r} is there twice")
    table = rows.set_index(["replicate", "setting"])[list(columns)].unstack("setting")
    names = pd.MultiIndex.from_product([columns, sorted(trajectory["setting"].unique())])
    return table.reindex(index=sorted(trajectory["replicate"].unique()), columns=names)


def paired_differences(trajectory: pd.DataFrame, one: str, other: str) -> dict[str, Estimate]:
    """Return one setting minus another, paired by replicate, by aggregate.

    The intervals are not corrected for comparisons other than the claims.

    Args:
        trajectory: As `study_trajectory` returns it; of several studies, too.
        one: A setting.
        other: The setting that is subtracted.

    Raises:
        CmpError: A setting is not there.
    """
    known = trajectory["setting"].unique()
    if missing := [name for name in (one, other) if name not in known]:
        there = ", ".join(known)
        raise CmpError(f"paired difference: no setting {missing[0]!r}; there are {there}")
    rows = trajectory[trajectory["setting"].isin([one, other])]
    table, planned = by_replicate(rows, [*AGGREGATES, "base"]), int(rows["planned"].min())
    differences = {name: (table[name, one] - table[name, other]).dropna() for name in AGGREGATES}
    return {name: estimate_mean(x, table["base", one], planned) for name, x in differences.items()}
