"""The front in the plane of A_KA and A_ZS: settings that no other beats on both, and how surely."""

import numpy as np
import pandas as pd

from cmp import seeds
from cmp.claims import by_replicate
from cmp.errors import CmpError

DRAWS = 10_000


def front(trajectory: pd.DataFrame) -> pd.DataFrame:
    """Which settings no other beats on both A_KA and A_ZS, and how sure that is.

    A row a setting, by falling A_KA: the means `A_KA` and `A_ZS` at the end of the stream,
    `on_front` (of the means), `share` (of draws in which it is on the front), `n`. Only replicates
    that hold every setting count; with one there is no share (NaN), with none a `CmpError`.

    A draw moves all means together, by the replicates' deviations with normal weights over a
    chi-square: every difference of two means then has just the t-distribution of its paired
    interval. Resampling five replicates with replacement would not do: there are only 126 ways,
    and their spread is a tenth too small before the tails of t are missed as well.
    """
    table = by_replicate(trajectory)[["A_KA", "A_ZS"]].dropna()
    count, settings = len(table), list(table.columns.unique(1))
    if not count:
        raise CmpError("front: no replicate holds every setting; leave some settings out")
    values = table.to_numpy().reshape(count, 2, -1).swapaxes(1, 2)  # [replicate, setting, 2]
    means, share = values.mean(axis=0), np.full(len(settings), np.nan)
    if count > 1:
        random = seeds.numpy_generator("front", 0)
        weights = random.normal(size=(DRAWS, count)) / np.sqrt(count * (count - 1))
        weights /= np.sqrt(random.chisquare(count - 1, size=(DRAWS, 1)) / (count - 1))
        draws = means + np.einsum("dr,rsa->dsa", weights, values - means)
        share = _undominated(draws).mean(axis=0)
    columns = {"A_KA": means[:, 0], "A_ZS": means[:, 1], "on_front": _undominated(means)}
    frame = pd.DataFrame(columns | {"share": share, "n": count}, index=settings)
    return frame.rename_axis("setting").sort_values("A_KA", ascending=False, kind="stable")


def _undominated(points: np.ndarray) -> np.ndarray:
    """[..., settings, 2] -> [..., settings]: no other is as good on both axes and better on one."""
    mine, other = points[..., :, None, :], points[..., None, :, :]
    return ~((other >= mine).all(-1) & (other > mine).any(-1)).any(-1)
