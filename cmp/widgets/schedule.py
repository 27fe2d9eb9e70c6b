"""The schedule explorer: the learning rate over a stream, and what stored runs say beside it."""

from typing import get_args, get_type_hints

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
from matplotlib.figure import Figure

from cmp import config, schedules
from cmp.config import RunConfig, Schedule
from cmp.plots import inputs as plot_inputs
from cmp.widgets import settings
from cmp.widgets.settings import Stored
from cmp.widgets.view import TABLE, Drawn, copyable, explorer, html_table

TASKS, STEPS = 8, 40
FREE_PEAKS = (1.0, 0.5, 0.5, 0.25, 0.25, 0.25, 0.1, 0.1)
"""Peaks of `free` to begin with, one a task."""


def schedule_still() -> Figure:
    """Every curve, and every meta schedule on a curve that it goes with, over a stream."""
    every = (
        [(name, "none") for name in schedules.CURVES],
        [
            ("rsqrt" if meta.startswith("rsqrt") else Schedule().name, meta)
            for meta in schedules.METAS
            if meta != "none"
        ],
    )
    titles = "Curves within a task, no meta schedule", "Meta schedules: a peak for each task"
    groups = {}
    for title, pairs in zip(titles, every, strict=True):
        runs = [_run(name, meta, 1.0) for name, meta in pairs]
        groups[title] = {settings.label(run): settings.rates(run) for run in runs}
    return plot_inputs.schedule_grid(groups)


def _run(name: str, meta: str, peak: float) -> RunConfig:
    return settings.setting(name, meta, peak, TASKS, STEPS, peaks=FREE_PEAKS)


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
        "warmup": FloatSlider(config.SHARES["warmup"], **percent, description="Warmup, of a task"),
        "cooldown": FloatSlider(
            config.SHARES["cooldown"], **percent, description="Cooldown, of a task"
        ),
        "shift": IntSlider(default.shift, min=0, max=400, description="Shift, steps"),
        "level": FloatSlider(default.level, **share, description="Level, in peaks"),
        "decay": FloatSlider(default.decay, **share, description="Decay, a task"),
        "peaks": Text(peaks, description="Peak of each task, in peaks"),
    }


def _values(name: str, meta: str, peak: float, peaks: str, **more: float) -> dict:
    """Values of controls as `settings.setting` takes them: sliders' floats have stray digits."""
    tidy = {key: round(each, 6) if isinstance(each, float) else each for key, each in more.items()}
    if "peaks" in settings.used(name, meta):
        tidy["peaks"] = settings.numbers(peaks)
    return {"name": name, "meta": meta, "peak": float(f"{peak:.3g}")} | tidy


def _below(run: RunConfig, curves: dict[str, np.ndarray], known: list[Stored]) -> str:
    """The table of means, the stored runs that are nearest, and the command, as HTML."""
    scale, power = plot_inputs.unit(list(curves.values()))
    text = f"{TABLE}<b>Mean learning rate of each task ({power})</b>"
    text += settings.means(curves, scale).to_html(border=0, classes="cmp-table")
    near = settings.nearest(run, known)
    if len(near):
        text += (
            "<b>The nearest stored runs</b>, by the sum of the rates of each task: distance 0.69 "
        )
        text += "is a factor of two in each. Scores after the stream, means over replicates"
        text += html_table(near)
    elif known:
        text += f"<p>No stored run is of a stream of {run.stream.tasks} tasks.</p>"
    return text + copyable(settings.assignments(run))


def schedule_explorer(published: pd.DataFrame | None = None) -> VBox:
    """Schedule, meta schedule, their keys, tasks and steps -> the learning rate over the stream.

    "Hold this one" keeps a setting in grey, to compare with. published: the metrics of a study,
    several settings and replicates with their `config`, of which the nearest are listed.
    """
    known = [] if published is None else settings.stored(published)
    controls = _controls()
    hold, release = Button(description="Hold this one"), Button(description="Let go")
    shown, held = {}, {}

    def draw(**values) -> Drawn:
        used = settings.used(values["name"], values["meta"])
        for key in config.OF_NAMES | config.OF_METAS:
            if key in controls:
                controls[key].disabled = key not in used
        release.disabled = not held
        run = settings.setting(**_values(**values))
        found = settings.rates(run)
        shown.clear()
        shown[f"{settings.label(run)}, peak {run.schedule.peak:g}"] = found
        curves = shown | {f"held: {name}": rates for name, rates in held.items()}
        figure = plot_inputs.learning_rates(curves)
        return Drawn(figure, settings.sentence(run, found), _below(run, curves, known))

    def keep() -> None:
        held.clear()
        held.update(shown)

    return explorer(controls, draw, {hold: keep, release: held.clear})
