"""The method explorer and the budget calculator say what the runs and the budgets say."""

import numpy as np
import pandas as pd
import pytest

from cmp import budgets, config
from lab import analyses, explorers, figures
from tests.test_widgets import parts_of, published

pytestmark = pytest.mark.usefixtures("clean_drawing")
SETTINGS = {
    "full": {},
    "lora": {"method": {"name": "lora"}, "training": {"budget": 1.0, "steps": 40, "batch": 64}},
    "update": {"mixture": {"pretraining": 0.0, "update": 1.0, "buffer": 0.0}},
}


def test_ends_are_means_with_intervals_and_the_steps_that_a_budget_allows():
    table = analyses.setting_ends(published(SETTINGS))
    assert table.loc["update", "A_KA (%)"] == pytest.approx(31)
    assert table.loc["update", "A_KA (%) half"] == pytest.approx(4.303 / np.sqrt(3), rel=1e-3)
    lora = config.parse(SETTINGS["lora"])
    assert table.loc["lora", analyses.STEPS] == budgets.apply_budget(lora).training.steps > 40
    assert table.loc["full", analyses.STEPS] == 40


def test_the_explorer_draws_what_is_chosen(monkeypatch):
    drawn, original = [], figures.plot_scatter
    monkeypatch.setattr(
        figures, "plot_scatter", lambda *args: drawn.append(args) or original(*args)
    )
    controls, _, sentence, picture, below = parts_of(
        explorers.method_explorer(published(SETTINGS), ["full", "update"])
    )
    assert list(drawn[-1][0].index) == ["full", "update"]
    colours = drawn[-1][3]
    before = bytes(picture.value)
    controls["Settings"].value = ("lora", "update")
    controls["To the right"].value = analyses.STEPS
    assert (list(drawn[-1][0].index), drawn[-1][1]) == (["lora", "update"], analyses.STEPS)
    assert drawn[-1][3] == colours  # a setting keeps its colour
    assert bytes(picture.value) != before
    assert "ends highest in GM" in sentence.value
    assert "<td>lora</td>" in below.value
    controls["Upwards"].value = analyses.STEPS
    assert "Refused:</b> choose two different axes" in sentence.value
    controls["Settings"].value = ()
    assert "Refused:</b> choose a setting" in sentence.value


def test_the_calculator_is_the_budget(monkeypatch):
    drawn, original = [], figures.plot_allowed_steps
    monkeypatch.setattr(figures, "plot_allowed_steps", lambda t: drawn.append(t) or original(t))
    controls, _, sentence, _, below = parts_of(explorers.budget_calculator())
    controls["Methods"].value = ("full", "ewc")
    controls["Updates T"].value = 4
    table = drawn[-1]
    assert table.loc["full", "steps"] == 80
    run = config.parse(
        {"model": {"start": "random"}, "method": {"name": "ewc"}}
        | {"training": {"batch": 64, "steps": 80, "budget": 1.0}}
    )
    assert table.loc["ewc", "steps"] == budgets.apply_budget(run).training.steps
    assert table.loc["ewc", "GFLOPs"] == pytest.approx(budgets.method_cost(run).step / 1e9)
    assert (
        "320 steps of full fine-tuning, over 4 updates of small at batch 64: 80.0" in sentence.value
    )
    assert "<td>ewc</td>" in below.value
    controls["Methods"].value = ()
    assert "Refused:</b> choose a method" in sentence.value


def test_gains_are_grouped_by_role_with_a_line_between():
    change = pd.DataFrame({"a": [1.0, -2.0, 3.0], "b": [0.0, 4.0, -1.0]}, index=["x", "y", "z"])
    figure = figures.plot_gains(change, {"x": "eval", "y": "adapt", "z": "eval"})
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["y", "x", "z"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "b"]
    assert [text.get_text() for text in axes.texts] == ["-2", "4", "1", "0", "3", "-1"]
    assert [line.get_ydata()[0] for line in axes.lines] == [1]
