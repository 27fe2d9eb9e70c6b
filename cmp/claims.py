"""What a study says: means and paired differences over replicates, with 95% t-intervals."""

import numpy as np
import pandas as pd
from scipy import stats

LEVEL = 0.95
AGGREGATES = ("A_KA", "A_ZS", "GM")


def t_interval(values: np.ndarray) -> tuple[float, float, float]:
    """(mean, standard error, half the width of the t-interval) of independent values.

    With a single value the last two are NaN: one replicate says nothing about spread.
    """
    count = len(values)
    mean = float(np.mean(values))
    if count < 2:
        return mean, float("nan"), float("nan")
    error = float(np.std(values, ddof=1) / np.sqrt(count))
    return mean, error, error * float(stats.t.ppf((1 + LEVEL) / 2, count - 1))


def final(trajectory: pd.DataFrame) -> pd.DataFrame:
    """The rows of each (setting, replicate) after its last task, on the widest test scored."""
    wide = "full" if (trajectory["scope"] == "full").any() else "subset"
    chosen = trajectory[trajectory["scope"] == wide]
    last = chosen.groupby(["setting", "replicate"], sort=False)["task"].transform("max")
    return chosen[chosen["task"] == last]


def ends(trajectory: pd.DataFrame) -> pd.DataFrame:
    """A row a setting: each aggregate at the end of the stream, as "mean ± half the interval"."""
    rows = final(trajectory).groupby("setting", sort=False)
    table = rows[list(AGGREGATES)].agg(lambda values: "{:.1f} ± {:.1f}".format(*_ends(values)))
    return table.assign(replicates=rows.size())


def _ends(values: pd.Series) -> tuple[float, float]:
    mean, _, half = t_interval(values.to_numpy())
    return mean, half


def paired_difference(trajectory: pd.DataFrame, one: str, other: str) -> pd.DataFrame:
    """`one` minus `other` at the end of the stream, paired by replicate: a row an aggregate.

    Columns: `difference`, `standard_error`, `low` and `high` (the interval), `errors` (the
    difference in standard errors), `replicates`.
    """
    table = final(trajectory).set_index(["setting", "replicate"])[list(AGGREGATES)]
    differences = (table.loc[one] - table.loc[other]).dropna()
    rows = {}
    for name in AGGREGATES:
        mean, error, half = t_interval(differences[name].to_numpy())
        rows[name] = {
            "difference": mean,
            "standard_error": error,
            "low": mean - half,
            "high": mean + half,
            "errors": mean / error,
            "replicates": len(differences),
        }
    return pd.DataFrame.from_dict(rows, orient="index")
