"""The front in the plane of A_KA and A_ZS: settings that no other beats on both, and how surely."""

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.spatial import Delaunay
from torch import Tensor

from cmp import budgets, config
from cmp.config import Mixture, RunConfig
from cmp.errors import CmpError
from cmp.experiments import store
from cmp.experiments.claims import (
    AGGREGATES,
    by_replicate,
    rank_agreement,
    rank_repeatability,
    t_interval,
)
from cmp.experiments.studies import Study
from cmp.merging.rules import inner_products
from cmp.seeds import numpy_generator

FRONT_DRAWS = 10_000


def pareto_front(trajectory: pd.DataFrame) -> pd.DataFrame:
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
        random = numpy_generator("front", 0)
        weights = random.normal(size=(FRONT_DRAWS, count)) / np.sqrt(count * (count - 1))
        weights /= np.sqrt(random.chisquare(count - 1, size=(FRONT_DRAWS, 1)) / (count - 1))
        draws = means + np.einsum("dr,rsa->dsa", weights, values - means)
        share = _undominated(draws).mean(axis=0)
    columns = {"A_KA": means[:, 0], "A_ZS": means[:, 1], "on_front": _undominated(means)}
    frame = pd.DataFrame(columns | {"share": share, "n": count}, index=settings)
    return frame.rename_axis("setting").sort_values("A_KA", ascending=False, kind="stable")


def _undominated(points: np.ndarray) -> np.ndarray:
    """[..., settings, 2] -> [..., settings]: no other is as good on both axes and better on one."""
    mine, other = points[..., :, None, :], points[..., None, :, :]
    return ~((other >= mine).all(-1) & (other > mine).any(-1)).any(-1)


GIGA = 1e9


def run_compute(run_config: RunConfig) -> float:
    """Memory-adjusted FLOPs of a run's training in all (spec 1.2): of full fine-tuning, its FLOPs;
    of a method under a budget, what it uses of it."""
    found, tasks = budgets.task_budget(run_config), run_config.stream.tasks
    if found is not None:
        return found.used(tasks)
    return tasks * run_config.training.steps * budgets.full_cost(run_config).step


def compute_unit() -> float:
    """The FLOPs of the `cpu` profile's own run, which is what compute is told in."""
    return run_compute(config.parse(config.profile("cpu")))


def setting_costs(study: Study) -> pd.DataFrame:
    """A row a setting of the `cpu` profile that learns anything: `model`, `method` (what trains, or
    the merging policy), `updates`, `steps` an update, and `compute` in multiples of the profile's
    own run."""
    grid = study.configs("cpu", 1)
    rows = {
        name: {
            "model": each.model.name,
            "method": _method(each),
            "updates": each.stream.tasks,
            "steps": budgets.apply_budget(each).training.steps,
            "compute": run_compute(each) / compute_unit(),
        }
        for (name, _), each in grid.items()
        if each.mixture.update > 0
    }
    return pd.DataFrame.from_dict(rows, orient="index")


def _method(run_config: RunConfig) -> str:
    merging, method = run_config.merging.policy, run_config.method.name
    return method if merging == "none" else merging


def rank_agreements(table: pd.DataFrame, reference: str, others: list[str]) -> pd.DataFrame:
    """Mean rank correlation with `reference`, a row another family, a column an aggregate, with the
    lowest and the highest of a replicate; in the last row that of the reference's replicates with
    each other, which no other family can be expected to exceed.

    table: as `claims.by_replicate` gives it.
    """
    rows = {name: {} for name in [*others, f"{reference}, other replicates"]}
    for aggregate in AGGREGATES:
        scores = table[aggregate].dropna(axis=0, how="all")
        found = {name: rank_agreement(scores, reference, name).dropna() for name in others}
        found[f"{reference}, other replicates"] = rank_repeatability(scores, reference)
        for name, values in found.items():
            rows[name] |= {aggregate: values.mean()}
            rows[name] |= {
                f"{aggregate} lowest": values.min(),
                f"{aggregate} highest": values.max(),
            }
    return pd.DataFrame.from_dict(rows, orient="index")


def size_rows(costs: pd.DataFrame) -> pd.DataFrame:
    """Those of `costs` that take the family's members through the stream, by `compute`: `group` is
    the model."""
    rows = costs[(costs["model"] != "tiny") & (costs["method"] == "full")]
    return rows.assign(group=rows["model"], x=_nominal(rows["compute"]))


def _nominal(compute: pd.Series) -> pd.Series:
    """The power of two that is meant: whole steps cost a few hundredths more or less."""
    return 2.0 ** np.log2(compute).round()


def step_rows(costs: pd.DataFrame) -> pd.DataFrame:
    """Those of `tiny` in the profile's number of updates, by `compute`: `group` is the method."""
    updates = config.profile("cpu")["stream"]["tasks"]
    rows = costs[(costs["model"] == "tiny") & (costs["updates"] == updates)]
    return rows.assign(group=rows["method"], x=_nominal(rows["compute"]))


def update_rows(costs: pd.DataFrame) -> pd.DataFrame:
    """Those of `tiny` for the compute of the profile's run, by `updates`: `group` is the method."""
    rows = costs[(costs["model"] == "tiny") & costs["compute"].between(0.9, 1.1)]
    return rows.assign(group=rows["method"], x=rows["updates"])


SURFACE_AGGREGATES = ("A_KA", "A_ZS")
SHARE_KEYS = ("mixture.pretraining", "mixture.update", "mixture.buffer")
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
        for name, values in zip(
            SURFACE_AGGREGATES, (self.weights(mixture) @ self.scores).T, strict=True
        ):
            mean, _, half = t_interval(values)
            rows[name] = {"mean": mean, "low": mean - half, "high": mean + half}
        return pd.DataFrame.from_dict(rows, orient="index")

    def misses(self) -> pd.Series:
        """By aggregate, in points: how far interpolation is from the mean of a stored mixture that
        is left out, as the root of the mean square over those that have others around them."""
        squares = [np.full(len(SURFACE_AGGREGATES), np.nan)]
        for place, shares in enumerate(self.shares):
            rest = np.arange(len(self.names)) != place
            names = [name for name, kept in zip(self.names, rest, strict=True) if kept]
            others = Surface(names, self.shares[rest], self.scores[:, rest], self.like)
            mixture = Mixture(*map(float, shares))
            if len(names) > 2 and others.holds(mixture):
                guess = others.weights(mixture) @ others.scores
                squares.append((guess - self.scores[:, place]).mean(axis=0) ** 2)
        return pd.Series(np.sqrt(np.mean(squares[1:] or squares, axis=0)), SURFACE_AGGREGATES)

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
    table = by_replicate(store.trajectory(published))[list(SURFACE_AGGREGATES)]
    chosen = table.loc[:, [(key, name) for key in SURFACE_AGGREGATES for name in shares]].dropna()
    scores = np.stack([chosen[key][list(shares)].to_numpy() for key in SURFACE_AGGREGATES], axis=-1)
    points = np.array(list(shares.values()))
    if np.linalg.matrix_rank(points - points[0]) < 2 or not len(scores):
        raise CmpError("surface: the study's mixtures span no triangle")
    return Surface(list(shares), points, scores, runs[like])


def _but_shares(run: RunConfig) -> dict[str, object]:
    changes = run.changes().items()
    return {k: v for k, v in changes if k not in SHARE_KEYS and not k.startswith("seeds.")}


def weight_drift(ends: Sequence[Mapping[str, Tensor]]) -> tuple[pd.DataFrame, np.ndarray]:
    """How far each task took the weights, and the cosines between the steps of all tasks.

    ends: the weights before the stream and after each of T tasks. Returns (a row a task (index
    `task`, from 1): `step`, the length of theta_t - theta_{t-1}, and `away`, of theta_t - theta_0,
    in percent of the length of theta_0; cosines [T, T] of the steps).
    """
    names = [name for name, x in ends[0].items() if x.is_floating_point()]
    steps = [
        {name: now[name] - before[name] for name in names}
        for before, now in itertools.pairwise(ends)
    ]
    away = [{name: now[name] - ends[0][name] for name in names} for now in ends[1:]]
    product = sum(inner_products([step[name] for step in steps]) for name in names)
    size = {key: _lengths(of, names) for key, of in (("step", steps), ("away", away))}
    [whole] = _lengths([ends[0]], names)
    index = pd.RangeIndex(1, len(ends), name="task")
    table = pd.DataFrame({key: 100 * x / whole for key, x in size.items()}, index)
    lengths = np.sqrt(np.diag(product))
    return table, product / np.outer(lengths, lengths)


def _lengths(models: Sequence[Mapping[str, Tensor]], names: Sequence[str]) -> np.ndarray:
    squares = [sum(float(x[name].double().square().sum()) for name in names) for x in models]
    return np.sqrt(squares)
