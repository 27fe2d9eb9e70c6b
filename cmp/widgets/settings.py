"""What the schedule explorer says of a setting: pure functions of a `RunConfig`."""

import json
import shlex
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from pydantic import ValidationError

from cmp import config, schedules
from cmp.config import OF_METAS, OF_NAMES, SHARES, RunConfig, Schedule, Stream, Training
from cmp.errors import CmpError
from cmp.runs import store

FREE = ("schedule.", "seeds.", "stream.tasks", "training.steps")
"""What the explorer sets, and what tells replicates apart."""
SHORTEST = 1e-9
"""A path that is shorter counts as this long: a logarithm of zero has no distance to anything."""


def used(name: str, meta: str) -> set[str]:
    """The keys of a schedule that this curve and this meta schedule look at, beyond the peak."""
    every = (OF_NAMES | OF_METAS).items()
    return {key for key, names in every if (meta if key in OF_METAS else name) in names}


def setting(name: str, meta: str, peak: float, tasks: int, steps: int, **more: Any) -> RunConfig:
    """The run that these values ask for; of `more`, what it does not look at is left out, and so
    are shares of a task that are the default anyway. `CmpError` where there is no such run."""
    kept = {key: more[key] for key in sorted(used(name, meta) & more.keys())}
    kept = {key: value for key, value in kept.items() if value != SHARES.get(key)}
    try:
        schedule = Schedule(name, meta, peak, **kept)
        return RunConfig(schedule=schedule, stream=Stream(tasks=tasks), training=Training(steps))
    except ValidationError as error:
        fault = error.errors()[0]
        where = "".join(f"{key}: " for key in fault["loc"])
        raise CmpError(where + fault["msg"].removeprefix("Value error, ")) from error


def numbers(text: str) -> tuple[float, ...]:
    """Numbers from a line of them, with commas or without; `CmpError` for anything else."""
    try:
        return tuple(float(part) for part in text.replace(",", " ").split())
    except ValueError as error:
        raise CmpError(f"{text!r}: expected numbers, such as 1, 0.5, 0.25") from error


def label(run: RunConfig) -> str:
    """The schedule's name and, if it has one, its meta schedule's."""
    name, meta = run.schedule.name, run.schedule.meta
    return name if meta == "none" else f"{name}, meta {meta}"


def rates(run: RunConfig) -> np.ndarray:
    """The learning rates of a run's stream, [tasks, steps]."""
    return schedules.rates(run.schedule, run.stream.tasks, run.training.steps)


def sentence(run: RunConfig, found: np.ndarray) -> str:
    """The mean rate against the peak, and the path length, in words. found: the run's `rates`."""
    mean, (tasks, steps) = found.mean(), found.shape
    return (
        f"Mean rate {mean:.2g} = {mean / run.schedule.peak:.2f} of the peak {run.schedule.peak:g}, "
        f"over {tasks} tasks x {steps} steps; path length (the sum of all rates) {found.sum():.3g}."
    )


def means(every: dict[str, np.ndarray], scale: float) -> pd.DataFrame:
    """Mean learning rates as text: a row a setting, a column a task and one for the stream, in
    multiples of `scale`; and the path length, the sum of the rates over all steps."""
    rows = {
        name: dict(enumerate((f"{mean:.2f}" for mean in found.mean(axis=1) / scale), 1))
        | {"stream": f"{found.mean() / scale:.2f}", "path length": f"{found.sum():.3g}"}
        for name, found in every.items()
    }
    columns = max(rows.values(), key=len)
    return pd.DataFrame.from_dict(rows, orient="index").reindex(columns=list(columns)).fillna("")


def assignments(run: RunConfig) -> list[str]:
    """The key=value arguments of `cmp run cpu` that make this run, for a shell."""
    cpu = dict(config.flat_keys(config.parse(config.profile("cpu")).to_dict()))
    changed = [pair for pair in config.flat_keys(run.to_dict()) if pair[1] != cpu[pair[0]]]
    return [
        shlex.quote(f"{key}={json.dumps(value, separators=(',', ':'))}".replace('"', ""))
        for key, value in changed
    ]


@dataclass(frozen=True)
class Stored:
    """A setting of a study. paths: see `path_lengths`; A_KA, A_ZS: percent, after the stream;
    besides: what it changes that the explorer does not set, as key=value."""

    name: str
    paths: np.ndarray
    A_KA: float
    A_ZS: float
    besides: tuple[str, ...]


def path_lengths(found: np.ndarray) -> np.ndarray:
    """The sum of the learning rates of each task, [tasks]."""
    return found.sum(axis=1)


def distance(one: np.ndarray, other: np.ndarray) -> float:
    """How far two settings are apart by the path lengths of their tasks: the root of the mean
    square, over tasks, of the difference of natural logarithms. For tasks of as many steps, that is
    the difference of their log mean rates: 0.69 is a factor of two in each task.

    Infinite for streams of different numbers of tasks, which have no tasks to compare.
    """
    if len(one) != len(other):
        return np.inf
    logarithms = [np.log(np.maximum(each, SHORTEST)) for each in (one, other)]
    return float(np.sqrt(np.mean(np.subtract(*logarithms) ** 2)))


def stored(published: pd.DataFrame) -> list[Stored]:
    """The settings of a published study, scores as means over replicates; where the whole test was
    scored, by that. `CmpError` if a column is missing or a config cannot be read."""
    if lacking := {"setting", "replicate", "config"} - set(published):
        raise CmpError(f"published: no column {', '.join(sorted(lacking))}")
    trees = published.groupby("setting", sort=False)["config"].first()
    ends, found = store.trajectory(published), []
    for name, rows in ends.groupby("setting", sort=False):
        rows = rows[rows["scope"] == ("full" if "full" in set(rows["scope"]) else "subset")]
        score = rows[rows["task"] == rows["task"].max()][["A_KA", "A_ZS"]].mean()
        run = config.parse(json.loads(trees[name]), f"setting {name!r}")
        changes = [f"{k}={v}" for k, v in run.changes().items() if not k.startswith(FREE)]
        found.append(Stored(name, path_lengths(rates(run)), *score, tuple(changes)))
    return found


def nearest(run: RunConfig, known: list[Stored], count: int = 6) -> pd.DataFrame:
    """The settings nearest to a run, by `distance`; of equally near ones, first those that differ
    least in what the explorer does not set. Columns as text: setting, distance, A_KA, A_ZS,
    "differs also in"."""
    here = path_lengths(rates(run))
    found = [(round(distance(here, each.paths), 3), len(each.besides), each) for each in known]
    found = sorted((one for one in found if np.isfinite(one[0])), key=lambda one: one[:2])[:count]
    return pd.DataFrame(
        {
            "setting": [each.name for *_, each in found],
            "distance": [f"{far:.2f}" for far, *_ in found],
            "A_KA (%)": [f"{each.A_KA:.1f}" for *_, each in found],
            "A_ZS (%)": [f"{each.A_ZS:.1f}" for *_, each in found],
            "differs also in": [" ".join(each.besides) for *_, each in found],
        }
    )
