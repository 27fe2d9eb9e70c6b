"""What runs of a study came to: means over replicates, and paired differences."""

from collections.abc import Iterable

import numpy as np
import pandas as pd
from scipy import stats

from cmp.errors import CmpError

LEVEL = 0.95
AGGREGATES = ("A_KA", "A_ZS", "GM")
RUN_KEYS = ["setting", "replicate"]


def t_interval(values: np.ndarray) -> tuple[float, float, float]:
    """Return the mean of independent values, its standard error, and half its t-interval's width.

    A single value says nothing about spread: the last two are NaN then, and all are without values.
    """
    count, unknown = len(values), float("nan")
    mean = float(np.mean(values)) if count else unknown
    if count < 2:
        return mean, unknown, unknown
    error = float(np.std(values, ddof=1) / np.sqrt(count))
    return mean, error, error * float(stats.t.ppf((1 + LEVEL) / 2, count - 1))


def _widest_scope(trajectory: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of the widest test that was scored."""
    wide = "full" if (trajectory["scope"] == "full").any() else "subset"
    return trajectory[trajectory["scope"] == wide]


def final_scores(trajectory: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of each run after its last task, on the widest test that was scored.

    Args:
        trajectory: As `cmp.experiments.store.trajectory` returns it, of several settings and
            replicates; so for the other functions of this module.
    """
    rows = _widest_scope(trajectory)
    last = rows.groupby(RUN_KEYS, sort=False)["task"].transform("max")
    return rows[rows["task"] == last]


def setting_means(trajectory: pd.DataFrame) -> pd.DataFrame:
    """Return the mean of each aggregate at the end over replicates, a row per setting.

    Returns:
        The means, and half the width of their 95% intervals as "A_KA half" and so on.
    """
    groups = final_scores(trajectory).groupby("setting", sort=False)[list(AGGREGATES)]
    half = groups.agg(lambda values: t_interval(values.to_numpy())[2])
    return groups.mean().join(half.add_suffix(" half"))


def by_replicate(trajectory: pd.DataFrame) -> pd.DataFrame:
    """Return what all runs came to at the end, a row per replicate.

    Returns:
        Columns (aggregate, setting), sorted; NaN where a run is missing.

    Raises:
        CmpError: A run is there twice; it would count as two replicates.
    """
    rows = final_scores(trajectory)
    if (twice := rows.duplicated(RUN_KEYS)).any():
        setting, replicate = rows.loc[twice, RUN_KEYS].iloc[0]
        raise CmpError(f"trajectory: replicate {replicate} of {setting!r} is there twice")
    table = rows.set_index(["replicate", "setting"])[list(AGGREGATES)].unstack("setting")
    columns = pd.MultiIndex.from_product([AGGREGATES, sorted(trajectory["setting"].unique())])
    return table.reindex(index=sorted(trajectory["replicate"].unique()), columns=columns)


def paired_difference(trajectory: pd.DataFrame, one: str, other: str) -> pd.DataFrame:
    """Return one setting minus another, paired by replicate, a row per aggregate.

    Args:
        trajectory: The runs.
        one: A setting.
        other: The setting that is subtracted.

    Returns:
        `difference`, `standard_error`, `low` and `high` (the 95% interval, not corrected for other
        comparisons), `errors` (the difference in standard errors) and `replicates`.

    Raises:
        CmpError: A setting is not there.
    """
    _check_settings(trajectory["setting"], (one, other), "paired difference")
    table, rows = by_replicate(trajectory), []
    for name in AGGREGATES:
        differences = (table[name, one] - table[name, other]).dropna()
        mean, error, half = t_interval(differences.to_numpy())
        errors = mean / error if error else float("nan")
        rows.append((mean, error, mean - half, mean + half, errors, len(differences)))
    columns = ["difference", "standard_error", "low", "high", "errors", "replicates"]
    return pd.DataFrame(rows, list(AGGREGATES), columns)


def _check_settings(settings: Iterable[str], names: Iterable[str], source: str) -> None:
    known = list(dict.fromkeys(settings))
    if missing := [name for name in names if name not in known]:
        raise CmpError(f"{source}: no setting {missing[0]!r}; there are {', '.join(known)}")
