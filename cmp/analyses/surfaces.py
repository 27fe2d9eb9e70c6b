"""A_KA and A_ZS over the triangle of mixtures, between the runs of a published study.

A mixture's scores are interpolated linearly in the triangle of stored mixtures around it, for each
replicate by itself: no shape is assumed, and where runs are far apart so are the answers.
"""

import json
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.spatial import Delaunay

from cmp import claims, config
from cmp.config import Mixture, RunConfig
from cmp.errors import CmpError
from cmp.runs import store

AGGREGATES = ("A_KA", "A_ZS")
SHARES = ("mixture.pretraining", "mixture.update", "mixture.buffer")
OUTSIDE = 1e-9


@dataclass(frozen=True)
class Surface:
    """Runs that differ in their shares alone. names: of n settings; shares: [n, 3], P, D and B;
    scores: [replicates, n, 2], A_KA and A_ZS in percent after the stream; like: the run that they
    all are but for shares and seeds."""

    names: list[str]
    shares: np.ndarray
    scores: np.ndarray
    like: RunConfig

    def holds(self, mixture: Mixture) -> bool:
        """Whether stored mixtures lie around this one."""
        return self._place(mixture)[1] >= 0

    def _place(self, mixture: Mixture) -> tuple[Delaunay, int]:
        """The triangles of stored mixtures, and which of them this one is in, -1 for none."""
        mesh = Delaunay(self.shares[:, 1:])  # P is what D and B leave
        return mesh, int(mesh.find_simplex([mixture.update, mixture.buffer], tol=OUTSIDE))

    def weights(self, mixture: Mixture) -> np.ndarray:
        """Of each stored mixture in the interpolation of this one, [n]: at most three are not 0."""
        found = np.zeros(len(self.names))
        mesh, place = self._place(mixture)
        if place < 0:
            p, d, b = mixture.pretraining, mixture.update, mixture.buffer
            raise CmpError(f"no stored mixtures lie around P {p:.2f}, D {d:.2f}, B {b:.2f}")
        corner = mesh.transform[place]
        two = np.clip(corner[:2] @ ([mixture.update, mixture.buffer] - corner[2]), 0, 1)
        found[mesh.simplices[place]] = [*two, max(0.0, 1 - two.sum())]
        return found / found.sum()

    def predict(self, mixture: Mixture) -> pd.DataFrame:
        """A row an aggregate: `mean`, `low` and `high` (95% t-interval over replicates), percent.

        The interval is of the interpolated values; `misses` says what interpolation adds.
        """
        rows = {}
        for name, values in zip(AGGREGATES, (self.weights(mixture) @ self.scores).T, strict=True):
            mean, _, half = claims.t_interval(values)
            rows[name] = {"mean": mean, "low": mean - half, "high": mean + half}
        return pd.DataFrame.from_dict(rows, orient="index")

    def misses(self) -> pd.Series:
        """By aggregate, in points: how far interpolation is from the mean of a stored mixture that
        is left out, as the root of the mean square over those that have others around them."""
        squares = [np.full(len(AGGREGATES), np.nan)]
        for place, shares in enumerate(self.shares):
            rest = np.arange(len(self.names)) != place
            names = [name for name, kept in zip(self.names, rest, strict=True) if kept]
            others = Surface(names, self.shares[rest], self.scores[:, rest], self.like)
            mixture = Mixture(*map(float, shares))
            if len(names) > 2 and others.holds(mixture):
                guess = others.weights(mixture) @ others.scores
                squares.append((guess - self.scores[:, place]).mean(axis=0) ** 2)
        return pd.Series(np.sqrt(np.mean(squares[1:] or squares, axis=0)), AGGREGATES)

    def nearest(self, mixture: Mixture, count: int = 5) -> pd.DataFrame:
        """The stored mixtures nearest to one: `setting`, P, D, B, `distance` (the share of a batch
        that differs) and the means of both aggregates."""
        here = np.array([mixture.pretraining, mixture.update, mixture.buffer])
        far = np.abs(self.shares - here).sum(axis=1) / 2
        order = np.argsort(far, kind="stable")[:count]
        table = pd.DataFrame(self.shares[order], columns=list("PDB"))
        table.insert(0, "setting", [self.names[place] for place in order])
        means = self.scores.mean(axis=0)[order]
        return table.assign(distance=far[order], A_KA=means[:, 0], A_ZS=means[:, 1])


def surface(published: pd.DataFrame, like: str) -> Surface:
    """The settings of a published study that differ from one of them in shares alone.

    like: that setting's name. Only replicates that every such setting has are taken. `CmpError` if
    the settings span no triangle.
    """
    trees = published.groupby("setting", sort=False)["config"].first()
    if like not in trees:
        raise CmpError(f"surface: no setting {like!r}; there are {', '.join(trees.index)}")
    runs = {name: config.parse(json.loads(tree), name) for name, tree in trees.items()}
    others = _but_shares(runs[like])
    shares = {
        name: (run.mixture.pretraining, run.mixture.update, run.mixture.buffer)
        for name, run in runs.items()
        if _but_shares(run) == others
    }
    table = claims.by_replicate(store.trajectory(published))[list(AGGREGATES)]
    chosen = table.loc[:, [(key, name) for key in AGGREGATES for name in shares]].dropna()
    scores = np.stack([chosen[key][list(shares)].to_numpy() for key in AGGREGATES], axis=-1)
    points = np.array(list(shares.values()))
    if np.linalg.matrix_rank(points - points[0]) < 2 or not len(scores):
        raise CmpError("surface: the study's mixtures span no triangle")
    return Surface(list(shares), points, scores, runs[like])


def _but_shares(run: RunConfig) -> dict[str, object]:
    changes = run.changes().items()
    return {k: v for k, v in changes if k not in SHARES and not k.startswith("seeds.")}
