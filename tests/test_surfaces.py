"""Between stored mixtures: linear functions come back, and what is not known is said."""

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmp import config
from cmp.errors import CmpError
from lab import figures
from lab.figures import comparisons
from lab.surface import Surface, collect_surface

PROFILE = {"training": {"batch": 64, "steps": 40}, "stream": {"tasks": 8}}
GRID = [(p / 4, d / 4, (4 - p - d) / 4) for p in range(5) for d in range(5 - p)]


def published(settings, replicates=3, **scores):
    """A study's metrics: A_KA 10 + 40 B + 20 D + replicate, A_ZS 20 + 30 P at the end, half of
    both on the way; of settings name -> tree."""
    rows = []
    for name, tree in settings.items():
        for replicate in range(replicates):
            run = config.parse(PROFILE | tree | {"seeds": {"init": replicate % 2}})
            p, d, b = run.mixture.pretraining, run.mixture.update, run.mixture.buffer
            text = json.dumps(run.to_dict())
            ends = {"adapt": 10 + 40 * b + 20 * d + replicate, "eval": 20 + 30 * p}
            for task, scope in ((1, "subset"), (8, "subset"), (8, "full")):
                for role, score in ends.items():
                    value = score * (0.5 if task == 1 else 1)
                    rows.append((name, replicate, task, scope, role, value, text))
    columns = ["setting", "replicate", "task", "scope", "role", "score", "config"]
    return pd.DataFrame(rows, columns=columns)


def shares(p, d, b, **more):
    return {"mixture": {"pretraining": p, "update": d, "buffer": b, **more}}


TRIANGLE = {
    "thirds": {},
    "pool": shares(1.0, 0.0, 0.0),
    "update": shares(0.0, 1.0, 0.0),
    "buffer": shares(0.0, 0.0, 1.0),
    "whole pool": shares(0.5, 0.5, 0.0, replay=1.0),
}


def linear(points):
    """A surface of two replicates that are linear in the shares, 1 point apart."""
    points = np.array(points)
    values = np.stack([points @ [10, 20, 30], points @ [40, 0, 8]], axis=-1)
    names = [str(place) for place in range(len(points))]
    return Surface(names, points, np.stack([values, values + 1]))


@given(st.lists(st.integers(0, 30), min_size=3, max_size=3).filter(any))
def test_a_linear_function_is_interpolated_exactly(weights):
    p, d, b = (weight / sum(weights) for weight in weights)
    found = linear(GRID)
    [used] = found.weights(np.array([[p, d, b]]))
    assert (used > 0).sum() <= 3
    assert used.sum() == pytest.approx(1)
    assert used @ found.shares == pytest.approx([p, d, b], abs=1e-6)
    scores = used @ found.scores
    assert scores[:, 0] == pytest.approx(10 * p + 20 * d + 30 * b + np.array([0, 1]))
    assert scores[:, 1] == pytest.approx(40 * p + 8 * b + np.array([0, 1]))


def test_a_stored_mixture_is_itself():
    found = linear(GRID)
    assert found.weights(np.array(GRID)) == pytest.approx(np.eye(len(GRID)), abs=1e-6)


def test_misses_are_zero_where_all_is_linear_and_not_where_it_is_not():
    found = linear(GRID)
    assert found.misses().to_numpy() == pytest.approx(0, abs=1e-6)
    bent = Surface(found.names, found.shares, found.scores + 0)
    bent.scores[:, GRID.index((0.25, 0.5, 0.25)), 0] += 6
    assert bent.misses()["A_KA"] > 1
    assert bent.misses()["A_ZS"] == pytest.approx(0, abs=1e-6)
    assert linear(GRID[:1] + GRID[4:5] + GRID[-1:]).misses().isna().all()


def test_outside_of_the_stored_mixtures_nothing_is_known():
    found = linear([(1, 0, 0), (0, 1, 0), (1 / 3, 1 / 3, 1 / 3)])
    assert np.isnan(found.weights(np.array([[0, 0, 1]]))).all()


def test_a_surface_takes_the_settings_that_differ_in_shares_alone():
    table = published(TRIANGLE, 4)
    table = table[~((table["setting"] == "pool") & (table["replicate"] == 3))]
    found = collect_surface(table, "thirds")
    assert found.names == ["thirds", "pool", "update", "buffer"]
    assert found.scores.shape == (2, 4, 2)  # of replicates that all of them have, by base
    assert found.scores[:, 2].tolist() == [[31, 20], [31, 20]]  # replicates 0 and 2, and 1
    with pytest.raises(CmpError, match="no setting 'halves'; the settings are thirds, pool"):
        collect_surface(table, "halves")
    with pytest.raises(CmpError, match="do not span a triangle"):
        collect_surface(published({"thirds": {}, "pool": shares(1.0, 0.0, 0.0)}), "thirds")


# --- figures


@pytest.mark.usefixtures("clean_drawing")
def test_triangles_show_every_stored_mixture_at_its_place():
    found = linear(GRID)
    found.names[4] = "thirds"
    figure = figures.plot_triangles(found)
    for axes, column in zip(figure.axes[:2], (0, 1), strict=True):
        texts = [text.get_text() for text in axes.texts]
        assert {"Pool P", "Update D", "Buffer B"} <= set(texts)
        values = [f"{value:.0f}" for value in found.scores.mean(axis=0)[:, column]]
        values[4] = f"thirds {values[4]}"
        assert sorted(texts) == sorted([*values, "Pool P", "Update D", "Buffer B"])
    corners = np.array(list(comparisons.CORNERS.values()))
    assert np.linalg.norm(corners[0] - corners[1]) == pytest.approx(1)
    assert np.linalg.norm(corners[1] - corners[2]) == pytest.approx(1)
    assert np.linalg.norm(corners[2] - corners[0]) == pytest.approx(1)


@pytest.mark.usefixtures("clean_drawing")
def test_curves_are_in_the_order_of_the_quantity():
    points = pd.DataFrame({"group": ["a", "a", "b"], "steps": [100, 10, 10], "A_KA": [30, 20, 5]})
    [axes] = figures.plot_curves(points, "steps", {"A_KA": "A_KA (%)"}, "Steps").axes
    lines = [bars.lines[0].get_xydata() for bars in axes.containers]
    for line, expected in zip(lines, ([[10, 20], [100, 30]], [[10, 5]]), strict=True):
        np.testing.assert_allclose(line, expected, rtol=0.02)
    assert lines[0][0, 0] < 10 < lines[1][0, 0]  # beside each other
    assert axes.get_xscale() == "log"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("Steps", r"$A_{\mathrm{KA}}$ (%)")
    assert {text.get_text() for text in axes.texts} == {"a", "b"}
