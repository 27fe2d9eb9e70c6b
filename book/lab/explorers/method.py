"""The method explorer: any two numbers of the stored runs against each other; and the budget
calculator: what the same compute allows each method."""

import dataclasses
import json

import ipywidgets
import pandas as pd
from ipywidgets import Dropdown, FloatLogSlider, IntSlider, SelectMultiple
from lab import figures
from lab.explorers.view import Drawn, explorer, html_table
from lab.figures import methods

from cmp import budgets, config, models
from cmp.config import Method, Model, RunConfig, Training
from cmp.errors import CmpError
from cmp.experiments import store
from cmp.experiments.claims import setting_means
from cmp.registry import option_names

AXES = {"A_KA": "A_KA (%)", "A_ZS": "A_ZS (%)", "GM": "GM (%)"}
STEPS = "Steps a task"
LARGER = ("ViT-B-32", "ViT-B-16")
"""Models beside the embedded ones; each takes seconds to count."""
METHODS = option_names("method")
SHOWN = ("full", "locked-image", "bitfit", "lora", "ewc")


def ends(published: pd.DataFrame) -> pd.DataFrame:
    """A row a setting: mean and "... half" (of the 95% t-interval) of each of `AXES` after the
    stream, and `STEPS`."""
    halves = {f"{key} half": f"{label} half" for key, label in AXES.items()}
    table = setting_means(store.trajectory(published)).rename(columns=AXES | halves)
    trees = published.groupby("setting", sort=False)["config"].first()
    runs = {name: config.parse(json.loads(tree), name) for name, tree in trees.items()}
    return table.assign(
        **{STEPS: [budgets.apply_budget(runs[name]).training.steps for name in table.index]}
    )


def method_explorer(published: pd.DataFrame, shown: list[str] | None = None) -> ipywidgets.VBox:
    """Settings and two axes -> where those settings end.

    published: the metrics of a study with their `config`. shown: the settings to begin with.
    """
    table = ends(published)
    axes = [*AXES.values(), STEPS]
    colours = figures.palette(table.index)
    controls = {
        "names": SelectMultiple(
            options=list(table.index), value=tuple(shown or table.index[:8]), rows=8,
            description="Settings",
        ),
        "x": Dropdown(options=axes, value=axes[0], description="To the right"),
        "y": Dropdown(options=axes, value=axes[1], description="Upwards"),
    }  # fmt: skip

    def draw(names, x, y) -> Drawn:
        if not names:
            raise CmpError("choose a setting at least (Ctrl or Cmd with a click takes several)")
        if x == y:
            raise CmpError("choose two different axes")
        chosen = table.loc[list(names)]
        best = chosen[AXES["GM"]].idxmax()
        sentence = f"Of these, {best} ends highest in GM: {chosen.loc[best, AXES['GM']]:.1f}%."
        columns = [*AXES.values(), STEPS]
        shown = chosen[columns].round(1).astype(str).rename_axis("setting").reset_index()
        return Drawn(methods.method_scatter(chosen, x, y, colours), sentence, html_table(shown))

    return explorer(controls, draw)


def allowances(model: str, batch: int, full_steps: float, names: list[str]) -> pd.DataFrame:
    """A row a method: what its step costs, and the steps that a task has for what `full_steps`
    steps of full fine-tuning cost, see `cmp.budgets`."""
    run = RunConfig(model=Model(model, "random"), training=Training(batch=batch))
    full, rows = budgets.full_cost(run), {}
    for name in names:
        cost = budgets.method_cost(dataclasses.replace(run, method=Method(name)))
        found = budgets.make_budget(full_steps * full.step, cost, full)
        rows[name] = {
            "GFLOPs": cost.step / 1e9,
            "GB": cost.memory / 1e9,
            "x full": found.multiplier,
            "GMAFs": found.step / 1e9,
            "at end": found.end / 1e9,
            "steps": found.steps,
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def budget_calculator() -> ipywidgets.VBox:
    """Model, batch, updates, budget and methods -> what a step of each costs and how many fit."""
    controls = {
        "model": Dropdown(options=[*models.family_names(), *LARGER], value="tiny", description="Model"),
        "batch": IntSlider(64, min=16, max=512, step=16, description="Batch"),
        "tasks": IntSlider(8, min=1, max=200, description="Updates T"),
        "total": FloatLogSlider(
            320, min=1, max=5, step=0.05, readout_format=".0f",
            description="Budget, in steps of full",
        ),
        "names": SelectMultiple(options=METHODS, value=SHOWN, rows=6, description="Methods"),
    }  # fmt: skip

    def draw(model, batch, tasks, total, names) -> Drawn:
        if not names:
            raise CmpError("choose a method at least (Ctrl or Cmd with a click takes several)")
        total = round(total)
        table = allowances(model, batch, total / tasks, list(names))
        sentence = (
            f"{total:,} steps of full fine-tuning, over {tasks} updates of {model} at batch "
            f"{batch}: {total / tasks:,.1f} of them an update."
        )
        shown = table.assign(steps=table["steps"].map("{:,}".format)).rename_axis("method")
        text = shown.map(lambda value: f"{value:,.3g}" if isinstance(value, float) else value)
        return Drawn(methods.allowed_steps(table), sentence, html_table(text.reset_index()))

    return explorer(controls, draw)
