"""The schedule explorer: the learning rate over a stream, and what stored runs say beside it."""

import json
import shlex
from dataclasses import dataclass
from typing import Any, get_args, get_type_hints

import numpy as np
import pandas as pd
from ipywidgets import (
    Button,
    Dropdown,
    FloatLogSlider,
    FloatSlider,
    IntSlider,
    Text,
    ValueWidget,
    VBox,
)
from lab.explorers.view import TABLE, Drawn, copyable, explorer, html_table
from lab.figures import inputs
from matplotlib.figure import Figure
from pydantic import ValidationError

from cmp import config, schedules
from cmp.config import (
    DEFAULT_SHARES,
    RunConfig,
    Schedule,
    Stream,
    Training,
)
from cmp.errors import CmpError
from cmp.experiments import store
from cmp.registry import get_option, option_names

TASKS, STEPS = 8, 40
FREE_PEAKS = (1.0, 0.5, 0.5, 0.25, 0.25, 0.25, 0.1, 0.1)
"""Peaks of `free` to begin with, one a task."""


def schedule_still() -> Figure:
    """Every curve, and every meta schedule on a curve that it goes with, over a stream."""
    every = (
        [(name, "none") for name in option_names("schedule")],
        [
            ("rsqrt" if meta.startswith("rsqrt") else Schedule().name, meta)
            for meta in option_names("meta_schedule")
            if meta != "none"
        ],
    )
    titles = "Curves within a task, no meta schedule", "Meta schedules: a peak for each task"
    groups = {}
    for title, pairs in zip(titles, every, strict=True):
        runs = [_run(name, meta, 1.0) for name, meta in pairs]
        groups[title] = {schedule_label(run): schedule_rates(run) for run in runs}
    return inputs.schedule_grid(groups)


def _run(name: str, meta: str, peak: float) -> RunConfig:
    return schedule_run(name, meta, peak, TASKS, STEPS, peaks=FREE_PEAKS)


def _controls() -> dict[str, ValueWidget]:
    """By the names of `settings.setting`; a key of the schedule that this lacks cannot be set."""
    kinds, default = get_type_hints(Schedule), Schedule()
    share = {"min": 0.0, "max": 1.0, "step": 0.05}
    percent = share | {"readout_format": ".0%"}
    peak = {"min": -5, "max": -2, "step": 0.05, "readout_format": ".1e"}
    names = {key: get_args(kinds[key]) for key in ("name", "meta")}
    peaks = ", ".join(f"{peak:g}" for peak in FREE_PEAKS)
    return {
        "name": Dropdown(options=names["name"], value=default.name, description="Schedule"),
        "meta": Dropdown(options=names["meta"], value=default.meta, description="Meta schedule"),
        "peak": FloatLogSlider(default.peak, **peak, description="Peak"),
        "tasks": IntSlider(TASKS, min=1, max=20, description="Tasks T"),
        "steps": IntSlider(STEPS, min=5, max=200, description="Steps a task"),
        "warmup": FloatSlider(
            config.DEFAULT_SHARES["warmup"], **percent, description="Warmup, of a task"
        ),
        "cooldown": FloatSlider(
            config.DEFAULT_SHARES["cooldown"], **percent, description="Cooldown, of a task"
        ),
        "shift": IntSlider(default.shift, min=0, max=400, description="Shift, steps"),
        "level": FloatSlider(default.level, **share, description="Level, in peaks"),
        "decay": FloatSlider(default.decay, **share, description="Decay, a task"),
        "peaks": Text(peaks, description="Peak of each task, in peaks"),
    }


def _values(name: str, meta: str, peak: float, peaks: str, **more: float) -> dict:
    """Values of controls as `settings.setting` takes them: sliders' floats have stray digits."""
    tidy = {key: round(each, 6) if isinstance(each, float) else each for key, each in more.items()}
    if "peaks" in used_settings(name, meta):
        tidy["peaks"] = schedule_numbers(peaks)
    return {"name": name, "meta": meta, "peak": float(f"{peak:.3g}")} | tidy


def schedule_explorer(published: pd.DataFrame | None = None) -> VBox:
    """Schedule, meta schedule, their keys, tasks and steps -> the learning rate over the stream.

    "Hold this one" keeps a setting in grey, to compare with. published: the metrics of a study,
    several settings and replicates with their `config`, of which the nearest are listed.
    """
    known = [] if published is None else stored_schedules(published)
    controls = _controls()
    hold, release = Button(description="Hold this one"), Button(description="Let go")
    shown, held = {}, {}

    def draw(**values) -> Drawn:
        used = used_settings(values["name"], values["meta"])
        for key in used_settings(*option_names("schedule"), *option_names("meta_schedule")):
            if key in controls:
                controls[key].disabled = key not in used
        release.disabled = not held
        run = schedule_run(**_values(**values))
        found = schedule_rates(run)
        shown.clear()
        shown[f"{schedule_label(run)}, peak {run.schedule.peak:g}"] = found
        curves = shown | {f"held: {name}": rates for name, rates in held.items()}
        figure = inputs.learning_rates(curves)
        return Drawn(figure, schedule_sentence(run, found), _below(run, curves, known))

    def keep() -> None:
        held.clear()
        held.update(shown)

    return explorer(controls, draw, {hold: keep, release: held.clear})


FREE = ("schedule.", "seeds.", "stream.tasks", "training.steps")
"""What the explorer sets, and what tells replicates apart."""
SHORTEST = 1e-9
"""A path that is shorter counts as this long: a logarithm of zero has no distance to anything."""


def used_settings(*names: str) -> set[str]:
    """Return the keys that some curves and meta schedules read, beside the peak."""
    options = [
        get_option(kind, name)
        for kind in ("schedule", "meta_schedule")
        for name in names
        if name in option_names(kind)
    ]
    return {key for option in options for key in option.settings}


def schedule_run(
    name: str, meta: str, peak: float, tasks: int, steps: int, **more: Any
) -> RunConfig:
    """The run that these values ask for; of `more`, what it does not look at is left out, and so
    are shares of a task that are the default anyway. `CmpError` where there is no such run."""
    kept = {key: more[key] for key in sorted(used_settings(name, meta) & more.keys())}
    kept = {key: value for key, value in kept.items() if value != DEFAULT_SHARES.get(key)}
    try:
        schedule = Schedule(name, meta, peak, **kept)
        return RunConfig(schedule=schedule, stream=Stream(tasks=tasks), training=Training(steps))
    except ValidationError as error:
        fault = error.errors()[0]
        where = "".join(f"{key}: " for key in fault["loc"])
        raise CmpError(where + fault["msg"].removeprefix("Value error, ")) from error


def schedule_numbers(text: str) -> tuple[float, ...]:
    """Numbers from a line of them, with commas or without; `CmpError` for anything else."""
    try:
        return tuple(float(part) for part in text.replace(",", " ").split())
    except ValueError as error:
        raise CmpError(f"{text!r}: expected numbers, such as 1, 0.5, 0.25") from error


def schedule_label(run: RunConfig) -> str:
    """The schedule's name and, if it has one, its meta schedule's."""
    name, meta = run.schedule.name, run.schedule.meta
    return name if meta == "none" else f"{name}, meta {meta}"


def schedule_rates(run: RunConfig) -> np.ndarray:
    """The learning rates of a run's stream, [tasks, steps]."""
    return schedules.learning_rates(run.schedule, run.stream.tasks, run.training.steps)


def schedule_sentence(run: RunConfig, found: np.ndarray) -> str:
    """The mean rate against the peak, and the path length, in words. found: the run's `rates`."""
    mean, (tasks, steps) = found.mean(), found.shape
    return (
        f"Mean rate {mean:.2g} = {mean / run.schedule.peak:.2f} of the peak {run.schedule.peak:g}, "
        f"over {tasks} tasks x {steps} steps; path length (the sum of all rates) {found.sum():.3g}."
    )


def stored_means(every: dict[str, np.ndarray], scale: float) -> pd.DataFrame:
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
    """The key=value arguments of `cmpt run cpu` that make this run, for a shell."""
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


def _below(run: RunConfig, curves: dict[str, np.ndarray], known: list[Stored]) -> str:
    """The table of means, the stored runs that are nearest, and the command, as HTML."""
    scale, power = inputs.unit(list(curves.values()))
    text = f"{TABLE}<b>Mean learning rate of each task ({power})</b>"
    text += stored_means(curves, scale).to_html(border=0, classes="cmp-table")
    near = nearest_schedules(run, known)
    if len(near):
        text += (
            "<b>The nearest stored runs</b>, by the sum of the rates of each task: distance 0.69 "
        )
        text += "is a factor of two in each. Scores after the stream, means over replicates"
        text += html_table(near)
    elif known:
        text += f"<p>No stored run is of a stream of {run.stream.tasks} tasks.</p>"
    return text + copyable(assignments(run))


def path_lengths(found: np.ndarray) -> np.ndarray:
    """The sum of the learning rates of each task, [tasks]."""
    return found.sum(axis=1)


def schedule_distance(one: np.ndarray, other: np.ndarray) -> float:
    """How far two settings are apart by the path lengths of their tasks: the root of the mean
    square, over tasks, of the difference of natural logarithms. For tasks of as many steps, that is
    the difference of their log mean rates: 0.69 is a factor of two in each task.

    Infinite for streams of different numbers of tasks, which have no tasks to compare.
    """
    if len(one) != len(other):
        return np.inf
    logarithms = [np.log(np.maximum(each, SHORTEST)) for each in (one, other)]
    return float(np.sqrt(np.mean(np.subtract(*logarithms) ** 2)))


def stored_schedules(published: pd.DataFrame) -> list[Stored]:
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
        found.append(Stored(name, path_lengths(schedule_rates(run)), *score, tuple(changes)))
    return found


def nearest_schedules(run: RunConfig, known: list[Stored], count: int = 6) -> pd.DataFrame:
    """The settings nearest to a run, by `distance`; of equally near ones, first those that differ
    least in what the explorer does not set. Columns as text: setting, distance, A_KA, A_ZS,
    "differs also in"."""
    here = path_lengths(schedule_rates(run))
    found = [
        (round(schedule_distance(here, each.paths), 3), len(each.besides), each) for each in known
    ]
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
