"""The figure of verdicts: every number where it belongs, verdicts told apart without colour."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from cmp.experiments.claims import Claim, verdicts
from lab import figures

pytestmark = pytest.mark.usefixtures("clean_drawing")

SHIFTS = {"up": 6.0, "flat": 1.0, "down": -3.0, "rare": 0.0}
FAMILY = [
    Claim("it rises", "s", "up", "base", "A_KA"),
    Claim("it may rise", "s", "flat", "base", "A_KA", margin=1.0),
    Claim("it stays", "s", "down", "base", "A_KA", kind="equivalence"),
    Claim("it falls", "s", "down", "base", "A_KA", direction="lower"),
    Claim("who knows", "s", "rare", "base", "A_KA"),
]


def table(family=FAMILY):
    noise = np.array([-0.2, -0.1, 0.0, 0.1, 0.2])
    rows = [
        (name, replicate, 1, "full", 30 + shift + noise[replicate])
        for name, shift in (SHIFTS | {"base": 0}).items()
        for replicate in range(1 if name == "rare" else 5)
    ]
    frame = pd.DataFrame(rows, columns=["setting", "replicate", "task", "scope", "A_KA"])
    wave = np.resize([0.3, -0.1, 0.2], len(frame))
    return verdicts(frame.assign(A_KA=frame["A_KA"] + wave, A_ZS=30.0, GM=30.0), family)


def test_forest():
    found = table()
    told = ["supported", "undecided", "not supported", "supported", "undecided"]
    assert found["verdict"].tolist() == told
    (axes,) = figures.plot_claims(found).axes
    assert axes.get_xlabel() == "Difference at the end of the stream (points)"
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels[0] == "it rises\nup − base, A_KA"
    assert [text.get_text().split("\n")[0] for text in axes.texts] == told
    low, high, level = found.loc["it rises", ["low", "high", "level"]]
    assert axes.texts[0].get_text().endswith(f"\n{low:.1f} to {high:.1f} ({100 * level:.3g}%)")
    assert axes.texts[-1].get_text().endswith("n = 1: no interval")
    bars = [each for each in axes.containers if each.get_label().startswith("_container")]
    bars = [each.lines for each in bars if hasattr(each, "has_xerr")]
    assert len(bars) == len(found)
    for place, ((marker, _, ends), (_, row)) in enumerate(zip(bars, found.iterrows(), strict=True)):
        assert marker.get_xydata().tolist() == [[row["estimate"], place]]
        if np.isfinite(row["low"]):
            segment = ends[0].get_segments()[0]
            np.testing.assert_allclose(segment, [[row["low"], place], [row["high"], place]])


def test_the_axis_says_when_or_the_rows_do():
    found = table(FAMILY[:2]).assign(at="area")
    (axes,) = figures.plot_claims(found).axes
    assert axes.get_xlabel() == "Difference in the mean over tasks (points)"
    (axes,) = figures.plot_claims(found.assign(at=["end", "area"])).axes
    assert axes.get_xlabel() == "Difference (points)"
    labels = [" ".join(label.get_text().split()) for label in axes.get_yticklabels()]
    assert labels[0] == "it rises up − base, A_KA at the end of the stream"
    assert labels[1] == "it may rise flat − base, A_KA in the mean over tasks"


def test_verdicts_differ_in_marker_as_well_as_in_colour():
    (axes,) = figures.plot_claims(table()).axes
    markers = [line for line in axes.lines if line.get_marker() in "oXs"]
    assert [line.get_marker() for line in markers] == list("osXos")
    assert len({to_hex(line.get_color()) for line in markers}) == 3
    hollow = [to_hex(line.get_markerfacecolor()) == "#ffffff" for line in markers]
    assert hollow == [False] * 4 + [True]


def test_the_regions_are_where_claims_are_true():
    found = table()
    (axes,) = figures.plot_claims(found).axes
    left, right = axes.get_xlim()
    spans = [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in axes.patches]
    expected = [(2, right), (1, right), (-2, 2), (left, -2), (2, right)]
    np.testing.assert_allclose(spans, expected)
    assert [round(bar.get_y() + bar.get_height() / 2, 6) for bar in axes.patches] == [*range(5)]
    assert found["low"].min() > left and found["high"].max() < right


def test_words_do_not_collide_with_the_axes():
    figure = figures.plot_claims(table())
    figure.draw_without_rendering()
    (axes,) = figure.axes
    for text in axes.texts:
        box = text.get_window_extent()
        assert box.x0 > axes.bbox.x1 and box.x1 <= figure.bbox.x1
