"""Estimates: what a run came to, and paired differences of settings over replicates."""

from collections.abc import Iterable

import numpy as np
import pandas as pd
from scipy import stats

from cmp.errors import CmpError

LEVEL = 0.95
AGGREGATES = ("A_KA", "A_ZS", "GM")


def known(settings: Iterable[str], names: Iterable[str], source: str) -> None:
    """`CmpError` for a name that is no setting."""
    there = list(dict.fromkeys(settings))
    for name in names:
        if name not in there:
            raise CmpError(f"{source}: no setting {name!r}; there are {', '.join(there)}")


def t_interval(values: np.ndarray, level: float = LEVEL) -> tuple[float, float, float]:
    """(mean, standard error, half the width of the t-interval) of independent values.

    With a single value the last two are NaN, for one replicate says nothing about spread; with no
    value all three are.
    """
    count, unknown = len(values), float("nan")
    mean = float(np.mean(values)) if count else unknown
    if count < 2:
        return mean, unknown, unknown
    error = float(np.std(values, ddof=1) / np.sqrt(count))
    return mean, error, error * float(stats.t.ppf((1 + level) / 2, count - 1))


def _widest(trajectory: pd.DataFrame) -> pd.DataFrame:
    """The rows of the widest test that was scored."""
    wide = "full" if (trajectory["scope"] == "full").any() else "subset"
    return trajectory[trajectory["scope"] == wide]


def final(trajectory: pd.DataFrame) -> pd.DataFrame:
    """The rows of each (setting, replicate) after its last task, on the widest test scored."""
    chosen = _widest(trajectory)
    last = chosen.groupby(["setting", "replicate"], sort=False)["task"].transform("max")
    return chosen[chosen["task"] == last]


def change(trajectory: pd.DataFrame) -> pd.DataFrame:
    """A row a (setting, replicate): each aggregate at the end of the stream minus before it, on the
    widest test scored. Models that start from different scores can be compared by it."""
    keys, chosen = ["setting", "replicate"], _widest(trajectory)
    before = chosen[chosen["task"] == 0].set_index(keys)[list(AGGREGATES)]
    after = final(trajectory).set_index(keys)[list(AGGREGATES)]
    return (after - before).reset_index()


def area(trajectory: pd.DataFrame) -> pd.DataFrame:
    """A row a (setting, replicate): each aggregate's mean over the tasks of the stream, on the
    subset that is scored after every task; the area under its trajectory, per task. `CmpError` if
    no subset was scored."""
    chosen = trajectory[(trajectory["scope"] == "subset") & (trajectory["task"] > 0)]
    if not len(chosen):
        raise CmpError("trajectory: an area takes the scores after each task, scope 'subset'")
    keys = ["setting", "replicate"]
    return chosen.groupby(keys, sort=False)[list(AGGREGATES)].mean().reset_index()


MEASURES = {"end": final, "area": area, "change": change}
"""What a run comes to, by name: a row a (setting, replicate) with its aggregates."""


def means(trajectory: pd.DataFrame, at: str = "end") -> pd.DataFrame:
    """A row a setting: the mean of each aggregate by one of `MEASURES`, and half the width of its
    interval, as "A_KA half"."""
    groups = MEASURES[at](trajectory).groupby("setting", sort=False)[list(AGGREGATES)]
    half = groups.agg(lambda values: t_interval(values.to_numpy())[2])
    return groups.mean().join(half.add_suffix(" half"))


def ends(trajectory: pd.DataFrame) -> pd.DataFrame:
    """A row a setting: each aggregate at the end of the stream, as "mean ± half the interval"."""
    rows = final(trajectory).groupby("setting", sort=False)
    table = rows[list(AGGREGATES)].agg(lambda values: "{:.1f} ± {:.1f}".format(*_ends(values)))
    return table.assign(replicates=rows.size())


def _ends(values: pd.Series) -> tuple[float, float]:
    mean, _, half = t_interval(values.to_numpy())
    return mean, half


def by_replicate(trajectory: pd.DataFrame, at: str = "end") -> pd.DataFrame:
    """What all runs came to, by one of `MEASURES`: a row a replicate, columns (aggregate, setting),
    sorted; NaN where a run is missing. `CmpError` if a run is there twice, for it would count as
    two replicates."""
    rows = MEASURES[at](trajectory)
    if (twice := rows.duplicated(["setting", "replicate"])).any():
        setting, replicate = rows.loc[twice, ["setting", "replicate"]].iloc[0]
        raise CmpError(f"trajectory: replicate {replicate} of {setting!r} is there twice")
    table = rows.set_index(["replicate", "setting"])[list(AGGREGATES)].unstack("setting")
    every = [AGGREGATES, sorted(trajectory["setting"].unique())]
    return table.reindex(
        index=sorted(trajectory["replicate"].unique()), columns=pd.MultiIndex.from_product(every)
    )


def paired_difference(
    trajectory: pd.DataFrame, one: str, other: str, at: str = "end"
) -> pd.DataFrame:
    """`one` minus `other` by one of `MEASURES`, paired by replicate: a row an aggregate.

    Columns: `difference`, `standard_error`, `low` and `high` (the 95% interval, for looking: it
    knows of no other comparison), `errors` (the difference in standard errors), `replicates`.
    """
    known(trajectory["setting"], (one, other), "paired difference")
    table, rows = by_replicate(trajectory, at), {}
    for name in AGGREGATES:
        differences = (table[name, one] - table[name, other]).dropna()
        mean, error, half = t_interval(differences.to_numpy())
        rows[name] = {
            "difference": mean,
            "standard_error": error,
            "low": mean - half,
            "high": mean + half,
            "errors": mean / error if error else float("nan"),
            "replicates": len(differences),
        }
    return pd.DataFrame.from_dict(rows, orient="index")
