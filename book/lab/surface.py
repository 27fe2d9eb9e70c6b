"""Predict the scores of mixtures that did not run, from those of stored runs around them."""

from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from cmp import config
from cmp.errors import CmpError
from cmp.runs import store
from lab.evidence import results
from lab.evidence.scores import by_replicate, run_bases

SHARE_KEYS = ("mixture.pretraining", "mixture.update", "mixture.buffer", "seeds.")
"""The keys that differ on a surface, and those that distinguish replicates."""


class Surface(NamedTuple):
    """Stored runs that differ only in the shares of their batches.

    Attributes:
        names: The names of n settings.
        shares: The shares of pool P, update D and buffer B, [n, 3].
        scores: A_KA and A_ZS after the stream in percent, [bases, n, 2].
    """

    names: list[str]
    shares: np.ndarray
    scores: np.ndarray

    def weights(self, shares: np.ndarray) -> np.ndarray:
        """Return the weight of each stored mixture in a linear interpolation at other mixtures.

        Args:
            shares: The shares of pool, update and buffer, [m, 3].

        Returns:
            Weights [m, n], at most three per row nonzero, or NaN for a mixture not surrounded by
            stored ones.
        """
        from scipy.interpolate import LinearNDInterpolator

        # P is the rest
        return LinearNDInterpolator(self.shares[:, 1:], np.eye(len(self.names)))(shares[:, 1:])

    def spans_triangle(self) -> bool:
        """Return whether the mixtures do not all lie on one line."""
        return bool(np.linalg.matrix_rank(self.shares - self.shares[:1]) == 2)

    def misses(self) -> pd.Series:
        """Return the error of interpolation at left-out stored mixtures, in points.

        Returns:
            For each aggregate, the root mean square over mixtures surrounded by others, or NaN if
            there are none.
        """
        rows = []
        for place in range(len(self.names)):
            names = [*self.names[:place], *self.names[place + 1 :]]
            shares, scores = np.delete(self.shares, place, 0), np.delete(self.scores, place, 1)
            others = Surface(names, shares, scores)
            if others.spans_triangle():
                guess = (others.weights(self.shares[[place]]) @ others.scores)[:, 0]
                rows.append((guess - self.scores[:, place]).mean(axis=0) ** 2)
        return np.sqrt(pd.DataFrame(rows, columns=["A_KA", "A_ZS"], dtype=float).mean())


def collect_surface(published: pd.DataFrame, like: str) -> Surface:
    """Collect the settings of a study that differ from one of them only in shares.

    Args:
        published: Published metrics.
        like: The name of that setting.

    Returns:
        The settings, with the replicates that all of them have, averaged by base.

    Raises:
        CmpError: There is no such setting, or the settings do not span a triangle.
    """
    configs = results.setting_configs(published)
    if like not in configs:
        raise CmpError(f"surface: no setting {like!r}; the settings are {', '.join(configs)}")
    wanted = _changes_beside_shares(configs[like])
    names = [name for name, run in configs.items() if _changes_beside_shares(run) == wanted]
    points = np.array([configs[name].mixture.shares for name in names])
    table = by_replicate(store.trajectory(published))
    chosen = table[[(key, name) for name in names for key in ("A_KA", "A_ZS")]].dropna()
    # streams from the same base are not independent
    chosen = chosen.groupby(run_bases(published)[like]).mean()
    scores = chosen.to_numpy().reshape(len(chosen), len(names), 2)
    surface = Surface(names, points, scores)
    if not surface.spans_triangle() or not len(scores):
        raise CmpError("surface: the study's mixtures do not span a triangle; choose another study")
    return surface


def _changes_beside_shares(run: config.RunConfig) -> dict[str, Any]:
    return {k: v for k, v in run.changes().items() if not k.startswith(SHARE_KEYS)}
