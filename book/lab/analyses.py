"""What chapters compute from stored runs: fronts, costs, schedules, mixtures.

A trajectory frame is what `cmp.experiments.store.trajectory` returns: a row per (setting,
replicate, task) with `scope`, `A_KA`, `A_ZS` and `GM` in percent. Published metrics are what
`cmp.experiments.results.published_metrics` returns.
"""

from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from cmp import budgets, config, mixtures, schedules
from cmp.data import Corpus
from cmp.errors import CmpError
from cmp.experiments import claims, results, statistics, store
from cmp.experiments.pretraining import pretraining_config
from cmp.experiments.studies import Study
from cmp.readers.files import read_yaml
from cmp.registry import get_option
from cmp.seeds import numpy_generator
from lab import chapters

FRONT_DRAWS = 10_000
AXES = {"A_KA": "A_KA (%)", "A_ZS": "A_ZS (%)", "GM": "GM (%)"}
STEPS = "Steps per task"
POOL, ARRIVING = 5893, 6375
"""Images of the embedded benchmark: the pretraining set, and all updates together."""
SHARE_KEYS = ("mixture.pretraining", "mixture.update", "mixture.buffer", "seeds.")
"""What differs on a surface, and what tells replicates apart."""
SCHEDULE_KEYS = ("schedule.", "seeds.", "stream.tasks", "training.steps")
"""What the schedule explorer sets, and what tells replicates apart."""
SHORTEST = 1e-9
"""A shorter path counts as this long, because zero has no logarithm."""


def setting_ends(published: pd.DataFrame) -> pd.DataFrame:
    """Tabulate where settings end.

    Args:
        published: Published metrics.

    Returns:
        A row per setting: the mean of each of `AXES` after the stream with "... half", half the
        width of its 95% t-interval, and `STEPS`.
    """
    halves = {f"{key} half": f"{label} half" for key, label in AXES.items()}
    table = claims.setting_means(store.trajectory(published)).rename(columns=AXES | halves)
    configs = results.setting_configs(published)
    steps = [budgets.apply_budget(configs[name]).training.steps for name in table.index]
    return table.assign(**{STEPS: steps})


# fronts


def pareto_front(trajectory: pd.DataFrame) -> pd.DataFrame:
    """Find the settings that no other beats on both A_KA and A_ZS, and how sure that is.

    A draw moves all means together, by the replicates' deviations with normal weights over a
    chi-square, so that every difference of two means has the t-distribution of its paired interval.
    Resampling five replicates with replacement would not do: there are only 126 ways, and their
    spread is a tenth too small even before the tails of t are missed.

    Args:
        trajectory: A trajectory frame. Only replicates that hold every setting count.

    Returns:
        A row per setting, by falling A_KA: the means `A_KA` and `A_ZS` at the end of the stream,
        `on_front` (of the means), `share` (of draws in which the setting is on the front; NaN with
        one replicate) and `n`, the number of replicates.

    Raises:
        CmpError: No replicate holds every setting.
    """
    table = claims.by_replicate(trajectory)[["A_KA", "A_ZS"]].dropna()
    count, settings = len(table), table.columns.unique(1)
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
    frame = pd.DataFrame(columns | {"share": share, "n": count}, settings.rename("setting"))
    return frame.sort_values("A_KA", ascending=False, kind="stable")


def _undominated(points: np.ndarray) -> np.ndarray:
    """[..., settings, 2] -> [..., settings]: no other is as good on both axes and better on one."""
    own, other = points[..., :, None, :], points[..., None, :, :]
    return ~((other >= own).all(-1) & (other > own).any(-1)).any(-1)


# costs


def run_compute(run: config.RunConfig) -> float:
    """Return the memory-adjusted FLOPs of a run's training (spec 1.2).

    Args:
        run: A run; of a method under a budget, what the method uses of it counts.

    Returns:
        FLOPs of all tasks together.
    """
    budget, tasks = budgets.task_budget(run), run.stream.tasks
    if budget is not None:
        return budget.used(tasks)
    return tasks * run.training.steps * budgets.full_cost(run).step


def compute_unit() -> float:
    """Return the FLOPs of the `cpu` profile's own run, the unit in which compute is given."""
    return run_compute(config.parse(config.profile("cpu")))


def setting_costs(study: Study) -> pd.DataFrame:
    """Tabulate what the settings of a study cost with the `cpu` profile.

    Args:
        study: A study.

    Returns:
        A row per setting that learns anything: `model`, `method` (what trains, or the merging
        policy), `updates`, `steps` per update, and `compute` in multiples of `compute_unit`.
    """
    unit, rows = compute_unit(), {}
    for (name, _), run in study.configs("cpu", 1).items():
        if run.mixture.update > 0:
            policy, steps = run.merging.policy, budgets.apply_budget(run).training.steps
            method = run.method.name if policy == "none" else policy
            compute = run_compute(run) / unit
            rows[name] = (run.model.name, method, run.stream.tasks, steps, compute)
    columns = ["model", "method", "updates", "steps", "compute"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns)


def size_rows(costs: pd.DataFrame) -> pd.DataFrame:
    """Select the family's members by compute; `group` is the model, `x` the compute.

    Args:
        costs: As `setting_costs` returns it, with any other columns.

    Returns:
        The rows with the columns `group` and `x`.
    """
    rows = costs[(costs["model"] != "tiny") & (costs["method"] == "full")]
    return rows.assign(group=rows["model"], x=_nominal(rows["compute"]))


def step_rows(costs: pd.DataFrame) -> pd.DataFrame:
    """Select `tiny` in the profile's number of updates; `group` is the method, `x` the compute.

    Args:
        costs: As `setting_costs` returns it, with any other columns.

    Returns:
        The rows with the columns `group` and `x`.
    """
    updates = config.profile("cpu")["stream"]["tasks"]
    rows = costs[(costs["model"] == "tiny") & (costs["updates"] == updates)]
    return rows.assign(group=rows["method"], x=_nominal(rows["compute"]))


def update_rows(costs: pd.DataFrame) -> pd.DataFrame:
    """Select `tiny` at the compute of the profile's run; `group` is the method, `x` the updates.

    Args:
        costs: As `setting_costs` returns it, with any other columns.

    Returns:
        The rows with the columns `group` and `x`.
    """
    rows = costs[(costs["model"] == "tiny") & costs["compute"].between(0.9, 1.1)]
    return rows.assign(group=rows["method"], x=rows["updates"])


def regime_table(runs: dict[str, config.RunConfig], corpus: Corpus) -> pd.DataFrame:
    """Tabulate in which regime runs train, beside the paper's (`book/regime.yaml`).

    Args:
        runs: Runs of embedded models, by the name of their column.
        corpus: The embedded benchmark.

    Returns:
        A row per measure.
    """
    columns = {"the paper": read_yaml(chapters.BOOK / "regime.yaml")}
    for name, run in runs.items():
        pretraining = pretraining_config(run.model.name, 0)
        rates, before = (
            schedules.learning_rates(each.schedule, each.stream.tasks, each.training.steps)
            for each in (run, pretraining)
        )
        pools, counts = mixtures.task_pools(run, corpus), statistics.sample_counts(run, corpus)
        own = [counts[task, pool.update].mean() for task, pool in enumerate(pools)]
        pool = len(mixtures.replay_pool(corpus, pretraining.mixture, 0))
        seen = pretraining.training.steps * pretraining.training.batch / pool
        numbers = {
            "updates": run.stream.tasks,
            "steps of an update": run.training.steps,
            "sum of learning rates": rates.sum(),
            "the same, per cent of pretraining's": 100 * rates.sum() / before.sum(),
            "peak, per cent of pretraining's": 100 * run.schedule.peak / pretraining.schedule.peak,
            "passes over an update's images": np.median(own),
            "draws of a replayed pool image": counts.sum(axis=0)[pools[0].pretraining].mean(),
            "passes of pretraining over its data": seen,
        }
        columns[name] = {key: f"{value:.3g}" for key, value in numbers.items()}
        columns[name]["moments"] = "carried" if run.carries_moments else "begun anew"
    return pd.DataFrame(columns)


def _nominal(compute: pd.Series) -> pd.Series:
    """Return the power of two that is meant: whole steps cost a few hundredths more or less."""
    return 2.0 ** np.log2(compute).round()


# schedules


def schedule_keys(name: str, meta: str) -> set[str]:
    """Return the keys of a schedule that a curve and a meta schedule use, beyond the peak.

    Args:
        name, meta: Names of the two.

    Returns:
        Keys of `Schedule`.
    """
    return {*get_option("schedule", name).settings, *get_option("meta_schedule", meta).settings}


def schedule_run(
    name: str, meta: str, peak: float, tasks: int, steps: int, **others: Any
) -> config.RunConfig:
    """Make the run of a schedule.

    Args:
        name, meta: Names of curve and meta schedule.
        peak: The highest learning rate.
        tasks: Tasks of the stream.
        steps: Steps per task.
        **others: Keys of `Schedule`; those that the schedule does not use are left out, and so are
            shares of a task that are the default.

    Returns:
        The run.

    Raises:
        CmpError: There is no such run.
    """
    used = {key: others[key] for key in sorted(schedule_keys(name, meta) & others.keys())}
    used = {key: value for key, value in used.items() if value != config.DEFAULT_SHARES.get(key)}
    tree = {"schedule": {"name": name, "meta": meta, "peak": peak} | used}
    tree |= {"stream": {"tasks": tasks}, "training": {"steps": steps}}
    return config.parse(config.overlay(config.profile("cpu"), tree), "this setting")


def schedule_label(run: config.RunConfig) -> str:
    """Return the schedule's name and, if it has one, its meta schedule's."""
    name, meta = run.schedule.name, run.schedule.meta
    return name if meta == "none" else f"{name}, meta {meta}"


def schedule_rates(run: config.RunConfig) -> np.ndarray:
    """Return the learning rates of a run's stream, [tasks, steps]."""
    return schedules.learning_rates(run.schedule, run.stream.tasks, run.training.steps)


def schedule_distance(path: np.ndarray, other: np.ndarray) -> float:
    """Measure how far two streams are apart by the path lengths of their tasks.

    Args:
        path, other: Sums of the learning rates of each task, [tasks].

    Returns:
        The root of the mean square, over tasks, of the difference of natural logarithms: 0.69 is a
        factor of two in each task. Infinite for different numbers of tasks.
    """
    if len(path) != len(other):
        return np.inf
    logarithms = [np.log(np.maximum(lengths, SHORTEST)) for lengths in (path, other)]
    return float(np.sqrt(np.mean(np.subtract(*logarithms) ** 2)))


def stored_schedules(published: pd.DataFrame) -> pd.DataFrame:
    """Tabulate the schedules of stored runs.

    Args:
        published: Published metrics.

    Returns:
        A row per setting: `A_KA` and `A_ZS` after the stream (percent, means over replicates),
        `path` (sums of the learning rates of each task, [tasks]) and `also` (what the setting
        changes beside its schedule, as texts key=value).
    """
    configs = results.setting_configs(published)
    means = claims.setting_means(store.trajectory(published))[["A_KA", "A_ZS"]]
    runs = [configs[name] for name in means.index]
    others = [[f"{k}={v}" for k, v in _changes(run, SCHEDULE_KEYS).items()] for run in runs]
    return means.assign(path=[schedule_rates(run).sum(axis=1) for run in runs], also=others)


def _changes(run: config.RunConfig, besides: tuple[str, ...]) -> dict[str, Any]:
    """Return what a run changes besides keys that begin so."""
    return {k: v for k, v in run.changes().items() if not k.startswith(besides)}


def nearest_schedules(run: config.RunConfig, stored: pd.DataFrame, count: int = 6) -> pd.DataFrame:
    """Find the stored settings whose tasks have path lengths nearest to a run's.

    Args:
        run: A run.
        stored: As `stored_schedules` returns it.
        count: How many settings at most.

    Returns:
        A row per setting, the nearest first and of equally near ones those that differ least in
        other keys: `setting`, `distance`, "A_KA (%)", "A_ZS (%)", "differs also in".
    """
    path = schedule_rates(run).sum(axis=1)
    distance = [round(schedule_distance(path, other), 3) for other in stored["path"]]
    table = stored.assign(distance=distance, keys=stored["also"].str.len())
    table = table[np.isfinite(distance)].sort_values(["distance", "keys"], kind="stable")[:count]
    names = {"A_KA": "A_KA (%)", "A_ZS": "A_ZS (%)", "also": "differs also in"}
    table = table.assign(also=table["also"].str.join(" ")).rename(columns=names)
    return table[["distance", *names.values()]].rename_axis("setting").reset_index()


# mixtures


def mixture_run(
    shares: Sequence[float], batch: int, tasks: int, steps: int, **others: Any
) -> config.RunConfig:
    """Make the run of a mixture.

    Args:
        shares: Of pool, update and buffer; taken as fractions, without a slider's stray digits.
        batch: Samples per step.
        tasks: Tasks of the stream.
        steps: Steps per task.
        **others: Other keys of `Mixture`.

    Returns:
        The run.

    Raises:
        CmpError: There is no such run.
    """
    names = ("pretraining", "update", "buffer")
    tidy = [float(Fraction(share).limit_denominator(1000)) for share in shares]
    tree = {"mixture": dict(zip(names, tidy, strict=True)) | others}
    tree |= {"stream": {"tasks": tasks}, "training": {"batch": batch, "steps": steps}}
    return config.parse(tree, "mixture_explorer")


def mixture_counts(
    mixture: config.Mixture, batch: int, tasks: int, steps: int, replay: float
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Count what a batch is made of and how often images of the embedded benchmark are seen.

    Args:
        mixture: Shares of a batch.
        batch: Samples per step.
        tasks: Tasks of the stream, of equally many images.
        steps: Steps per task.
        replay: Share of the pool that is kept for replay.

    Returns:
        See `cmp.experiments.statistics.expected_counts`.
    """
    return statistics.expected_counts(mixture, batch, tasks, steps, replay * POOL, ARRIVING / tasks)


class Surface(NamedTuple):
    """Stored runs that differ in the shares of their batches alone.

    Attributes:
        names: Of n settings.
        shares: [n, 3]: of pool P, update D and buffer B.
        scores: [replicates, n, 2]: A_KA and A_ZS after the stream, in percent.
        like: The run that they all are but for shares and seeds.
    """

    names: list[str]
    shares: np.ndarray
    scores: np.ndarray
    like: config.RunConfig

    def weights(self, mixture: config.Mixture) -> np.ndarray:
        """Return the weight of each stored mixture in the linear interpolation of this one.

        Args:
            mixture: Shares of a batch.

        Returns:
            [n], of which at most three are not 0; NaN where no stored mixtures lie around this one.
        """
        from scipy.interpolate import LinearNDInterpolator

        # P is what D and B leave
        interpolate = LinearNDInterpolator(self.shares[:, 1:], np.eye(len(self.names)))
        return interpolate([[mixture.update, mixture.buffer]])[0]

    def holds(self, mixture: config.Mixture) -> bool:
        """Return whether stored mixtures lie around this one."""
        return bool(np.isfinite(self.weights(mixture)).all())

    def predict(self, mixture: config.Mixture) -> pd.DataFrame:
        """Interpolate the scores of a mixture.

        Args:
            mixture: Shares of a batch.

        Returns:
            A row per aggregate: `mean`, `low` and `high` (95% t-interval over replicates) in
            percent, NaN where no stored mixtures lie around this one. The interval is of
            interpolated values; `misses` says what that adds.
        """
        values = self.weights(mixture) @ self.scores  # [replicates, 2]
        means, _, halves = np.transpose([claims.t_interval(column) for column in values.T])
        columns = {"mean": means, "low": means - halves, "high": means + halves}
        return pd.DataFrame(columns, index=["A_KA", "A_ZS"])

    def misses(self) -> pd.Series:
        """Return how far interpolation is from stored mixtures that are left out, in points.

        Returns:
            Per aggregate, the root of the mean square over mixtures that have others around them;
            NaN if there are none.
        """
        rows = []
        for place, shares in enumerate(self.shares):
            rest = [other for other in range(len(self.names)) if other != place]
            names = [self.names[other] for other in rest]
            others = Surface(names, self.shares[rest], self.scores[:, rest], self.like)
            if len(rest) > 2:
                guess = others.weights(config.Mixture(*map(float, shares))) @ others.scores
                rows.append((guess - self.scores[:, place]).mean(axis=0) ** 2)
        return np.sqrt(pd.DataFrame(rows, columns=["A_KA", "A_ZS"], dtype=float).mean())

    def nearest(self, mixture: config.Mixture, count: int = 5) -> pd.DataFrame:
        """Find the stored mixtures nearest to one.

        Args:
            mixture: Shares of a batch.
            count: How many at most.

        Returns:
            A row per mixture, the nearest first: `setting`, P, D, B, `distance` (the share of a
            batch that differs) and the mean scores.
        """
        shares = [mixture.pretraining, mixture.update, mixture.buffer]
        table = pd.DataFrame(self.shares, columns=list("PDB"))
        table.insert(0, "setting", self.names)
        table["distance"] = np.abs(self.shares - shares).sum(axis=1) / 2
        table[["A_KA", "A_ZS"]] = self.scores.mean(axis=0)
        return table.sort_values("distance", kind="stable")[:count].reset_index(drop=True)


def surface(published: pd.DataFrame, like: str) -> Surface:
    """Gather the settings of a study that differ from one of them in shares alone.

    Args:
        published: Published metrics.
        like: The name of that setting.

    Returns:
        The settings, with the replicates that all of them have.

    Raises:
        CmpError: There is no such setting, or the settings span no triangle.
    """
    configs = results.setting_configs(published)
    if like not in configs:
        raise CmpError(f"surface: no setting {like!r}; there are {', '.join(configs)}")
    wanted = _changes(configs[like], SHARE_KEYS)
    shares = {
        name: (run.mixture.pretraining, run.mixture.update, run.mixture.buffer)
        for name, run in configs.items()
        if _changes(run, SHARE_KEYS) == wanted
    }
    names, points = list(shares), np.array(list(shares.values()))
    table = claims.by_replicate(store.trajectory(published))
    chosen = table[[(key, name) for name in names for key in ("A_KA", "A_ZS")]].dropna()
    scores = chosen.to_numpy().reshape(len(chosen), len(names), 2)
    if np.linalg.matrix_rank(points - points[0]) < 2 or not len(scores):
        raise CmpError("surface: the study's mixtures span no triangle")
    return Surface(names, points, scores, configs[like])
