"""Between stored mixtures: linear functions come back, and what is not known is said."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmp.config import Mixture, RunConfig
from cmp.errors import CmpError
from lab import analyses, figures
from lab.analyses import Surface
from lab.figures import comparisons
from tests.test_widgets import TRIANGLE, published, shares

GRID = [(p / 4, d / 4, (4 - p - d) / 4) for p in range(5) for d in range(5 - p)]


def linear(points):
    """A surface of two replicates that are linear in the shares, 1 point apart."""
    points = np.array(points)
    values = np.stack([points @ [10, 20, 30], points @ [40, 0, 8]], axis=-1)
    names = [str(place) for place in range(len(points))]
    return Surface(names, points, np.stack([values, values + 1]), RunConfig())


@given(st.lists(st.integers(0, 30), min_size=3, max_size=3).filter(any))
def test_a_linear_function_is_interpolated_exactly(weights):
    p, d, b = (weight / sum(weights) for weight in weights)
    found = linear(GRID)
    used = found.weights(Mixture(p, d, b))
    assert (used > 0).sum() <= 3
    assert used.sum() == pytest.approx(1)
    assert used @ found.shares == pytest.approx([p, d, b], abs=1e-6)
    rows = found.predict(Mixture(p, d, b))
    assert rows.loc["A_KA", "mean"] == pytest.approx(10 * p + 20 * d + 30 * b + 0.5)
    assert rows.loc["A_ZS", "mean"] == pytest.approx(40 * p + 8 * b + 0.5)
    half = 12.706 * 0.5  # t of one degree of freedom, times the standard error
    assert (rows["high"] - rows["mean"]).to_numpy() == pytest.approx(half, rel=1e-3)


def test_a_stored_mixture_is_itself():
    found = linear(GRID)
    for place, point in enumerate(GRID):
        expected = np.zeros(len(GRID))
        expected[place] = 1
        assert found.weights(Mixture(*point)) == pytest.approx(expected, abs=1e-6)


def test_misses_are_zero_where_all_is_linear_and_not_where_it_is_not():
    found = linear(GRID)
    assert found.misses().to_numpy() == pytest.approx(0, abs=1e-6)
    bent = Surface(found.names, found.shares, found.scores + 0, RunConfig())
    bent.scores[:, GRID.index((0.25, 0.5, 0.25)), 0] += 6
    assert bent.misses()["A_KA"] > 1
    assert bent.misses()["A_ZS"] == pytest.approx(0, abs=1e-6)
    assert linear(GRID[:1] + GRID[4:5] + GRID[-1:]).misses().isna().all()


def test_outside_of_the_stored_mixtures_nothing_is_known():
    found = linear([(1, 0, 0), (0, 1, 0), (1 / 3, 1 / 3, 1 / 3)])
    assert not found.holds(Mixture(0, 0, 1))
    assert found.predict(Mixture(0, 0, 1)).isna().all(axis=None)


def test_the_nearest_differ_least():
    near = linear(GRID).nearest(Mixture(0.5, 0.3, 0.2), 3)
    assert near[["P", "D", "B"]].to_numpy().tolist()[0] == [0.5, 0.25, 0.25]
    assert near["distance"].tolist() == pytest.approx([0.05, 0.2, 0.25])
    assert near["A_KA"][0] == pytest.approx(5 + 5 + 7.5 + 0.5)


def test_a_surface_takes_the_settings_that_differ_in_shares_alone():
    table = published(TRIANGLE)
    table = table[~((table["setting"] == "pool") & (table["replicate"] == 2))]
    found = analyses.surface(table, "thirds")
    assert found.names == ["thirds", "pool", "update", "buffer"]
    assert found.scores.shape == (2, 4, 2)  # of replicates that all of them have
    assert found.scores[1, 2].tolist() == [31, 20]
    with pytest.raises(CmpError, match="no setting 'halves'; there are thirds, pool"):
        analyses.surface(table, "halves")
    with pytest.raises(CmpError, match="span no triangle"):
        analyses.surface(published({"thirds": {}, "pool": shares(1.0, 0.0, 0.0)}), "thirds")


# --- figures


@pytest.mark.usefixtures("clean_drawing")
def test_triangles_show_every_stored_mixture_at_its_place():
    found = linear(GRID)
    figure = figures.plot_triangles(found)
    for axes, column in zip(figure.axes[:2], (0, 1), strict=True):
        texts = [text.get_text() for text in axes.texts]
        assert {"Pool P", "Update D", "Buffer B"} <= set(texts)
        values = [f"{value:.0f}" for value in found.scores.mean(axis=0)[:, column]]
        assert sorted(texts) == sorted([*values, "Pool P", "Update D", "Buffer B"])
    corners = np.array(list(comparisons.CORNERS.values()))
    assert np.linalg.norm(corners[0] - corners[1]) == pytest.approx(1)
    assert np.linalg.norm(corners[1] - corners[2]) == pytest.approx(1)
    assert np.linalg.norm(corners[2] - corners[0]) == pytest.approx(1)


@pytest.mark.usefixtures("clean_drawing")
def test_curves_are_in_the_order_of_the_quantity():
    points = pd.DataFrame({"group": ["a", "a", "b"], "steps": [100, 10, 10], "A_KA": [30, 20, 5]})
    [axes] = figures.plot_curves(points, "steps", {"A_KA": "A_KA (%)"}, "Steps").axes
    lines = [bars.lines[0].get_xydata().tolist() for bars in axes.containers]
    assert lines == [[[10, 20], [100, 30]], [[10, 5]]]
    assert axes.get_xscale() == "log"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("Steps", "A_KA (%)")
    assert {text.get_text() for text in axes.texts} == {"a", "b"}
