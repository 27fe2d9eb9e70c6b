"""Figures: right axes and artists, one colour per setting, exact intervals, nothing left open."""

import itertools

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from scipy import stats

from cmp.errors import CmpError
from lab import figures
from lab.evidence.scores import claims_level, level_in_words
from lab.figures import runs, style

pytestmark = pytest.mark.usefixtures("clean_drawing")

CONTROL = "replay-only control"
ENDS = {"thirds": (40, 29), "update only": (22, 13), "joint": (51, 32), CONTROL: (10, 36)}


def trajectory(names=tuple(ENDS), replicates=6, tasks=4, scopes=("subset", "full"), planned=6):
    """A made-up study of three bases; "full" rows only before and after a stream, as a run gives
    them."""
    random, rows = np.random.default_rng(0), []
    for name, replicate in itertools.product(names, range(replicates)):
        last = 1 if name == "joint" else tasks
        for task, scope in itertools.product(range(last + 1), scopes):
            if scope == "full" and len(scopes) > 1 and task not in (0, last):
                continue
            ka, zs = np.add((10, 44), np.subtract(ENDS[name], (10, 44)) * task / last)
            ka, zs = np.add((ka, zs), random.normal(0, 0.5, 2) + 5 * (scope == "full"))
            run = (name, replicate, task, scope, replicate % 3, planned)
            rows.append((*run, ka, zs, np.sqrt(ka * zs)))
    columns = ["setting", "replicate", "task", "scope", "base", "planned", "A_KA", "A_ZS", "GM"]
    return pd.DataFrame(rows, columns=columns)


def scores(shift=0.0):
    rows = [("a", "adapt", 10), ("b", "adapt", 20), ("c", "eval", 40), ("d", "transfer", 30)]
    table = pd.DataFrame(rows, columns=["dataset", "role", "score"]).set_index("dataset")
    gain = table["role"].map({"adapt": shift, "eval": -shift, "transfer": 0})
    return table.assign(score=table["score"] + gain, standard_error=1.5, chance=5.0)


def texts(figure):
    """All words of a figure's axes, line breaks taken out."""
    return {text.get_text().replace("\n", " ") for axes in figure.axes for text in axes.texts}


def colour_of(axes, points):
    """The colour of the line through `points`, [N, 2]."""
    for line in axes.lines:
        if line.get_xydata().shape == points.shape and np.allclose(line.get_xydata(), points):
            return to_hex(line.get_color())
    raise AssertionError("no such line")


def test_summary_is_the_t_interval_over_bases_by_hand():
    values, level = [20.0, 23.0, 25.0, 24.0], claims_level()
    frame = pd.DataFrame({"setting": "x", "replicate": range(4), "task": 0, "scope": "full"})
    frame = frame.assign(A_KA=values, A_ZS=30.0, base=[2, 3, 2, 3], planned=4)
    row = runs.summarise(frame).loc[("x", 0)]
    assert row["A_KA"] == 23
    assert row["A_KA half"] == pytest.approx(stats.t.isf((1 - level) / 2, 1) * 0.5)
    assert (row["A_ZS half"], row["n"], row["preliminary"]) == (0, 4, "")
    less = runs.summarise(frame[:3]).loc[("x", 0)]
    assert less.isna().to_list() == [False, False, True, True, False, False]
    assert less["preliminary"] == "3 of 4 streams"
    assert runs.summarise(frame.drop(columns="planned")).loc[("x", 0)].isna().sum() == 2


def test_summary_keeps_to_one_scope():
    frame = trajectory()
    subset = frame[frame["scope"] == "subset"]
    pd.testing.assert_frame_equal(runs.summarise(frame), runs.summarise(subset))
    only_full = subset["setting"].eq("joint")
    mixed = subset.assign(scope=subset["scope"].mask(only_full, "full"))
    with pytest.raises(CmpError, match="'subset' rows of joint"):
        runs.summarise(mixed)


def test_looks():
    names = [f"s{i}" for i in range(len(figures.COLOURS))]
    found = figures.looks([CONTROL, *names, *names, "joint"])
    assert [found[name]["color"] for name in names] == figures.COLOURS
    assert len({look["color"] for look in found.values()}) == len(names) + 2
    assert figures.looks(["joint"])["joint"] == found["joint"]
    few = figures.looks(["a", "LoRA", "b"])
    assert few["LoRA"] == figures.looks(["LoRA"])["LoRA"]
    assert len({look["color"] for look in few.values()}) == 3


@pytest.mark.parametrize("colour", [*figures.COLOURS, runs.HELD, "white"])
def test_words_have_the_contrast_that_reading_needs(colour):
    contrast = 1.05 / (style._luminance(np.array(to_rgb(style.ink(colour)))) + 0.05)
    assert contrast >= 4.5
    assert colour == "white" or contrast < 8 or style.ink(colour) == colour


def test_titles_have_lines_of_about_one_length_and_leave_the_streams_to_the_note():
    words = "Gain +4.0 (preliminary, 4 of 20 streams) points of A_ZS at equal A_KA, " + "word " * 12
    with style.canvas(3, "Preliminary: 4 of 20 streams.") as (figure, _):
        pass
    title = style.with_title(figure, words)._suptitle.get_text()
    assert "preliminary" not in title
    assert "$A_{\\mathrm{ZS}}$" in title
    first, second = style.with_title(figure, "word " * 20)._suptitle.get_text().splitlines()
    assert abs(len(first) - len(second)) <= 5
    with style.canvas(3) as (figure, _):
        pass
    assert "preliminary" in style.with_title(figure, words)._suptitle.get_text()


def test_labels_of_points_keep_off_the_markers_of_others():
    with style.canvas(3) as (_, axes):
        places = [(0, 0), (1, 0), (0.16, 0.02), (0.5, 1)]
        for place in places:
            axes.plot(*place, "o", color="k", markersize=14)
        style.label_points(axes, [(0, 0, "a long name", {})])
    [label] = axes.texts
    box = label.get_window_extent()
    assert not any(box.contains(*axes.transData.transform(place)) for place in places)


@given(st.lists(st.floats(-100, 100), max_size=9), st.floats(0.01, 20))
def test_spread(places, gap):
    result = style.spread(places, gap)
    order = np.argsort(places, kind="stable")
    assert (np.diff(result[order]) >= gap - 1e-9).all()
    if places:
        assert np.mean(result) == pytest.approx(np.mean(places), abs=1e-9)
    if (np.diff(np.sort(places)) >= gap).all():
        np.testing.assert_allclose(result, places, atol=1e-9)


def test_plane():
    frame = trajectory()
    figure = figures.plot_plane(frame)
    assert isinstance(figure, Figure)
    (axes,) = figure.axes
    assert axes.get_xlabel() == r"Knowledge accumulation $A_{\mathrm{KA}}$ (%)"
    assert axes.get_ylabel() == r"Zero-shot retention $A_{\mathrm{ZS}}$ (%)"
    assert {*ENDS, "before", "geometric mean (%)"} <= texts(figure)
    note = f"Means over 6 streams. {level_in_words()} t-intervals over bases."
    assert note in figure.get_supxlabel().replace("\n", " ")
    rows, bars = runs.summarise(frame).loc["thirds"], axes.containers[0].lines[2]
    half = [abs(np.diff(bar.get_segments()[0], axis=0)).max() / 2 for bar in bars]
    assert half == pytest.approx(rows[["A_KA half", "A_ZS half"]].iloc[-1].to_list())


def test_plane_labels_do_not_collide():
    figure = figures.plot_plane(trajectory())
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts if text.get_text()]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


@pytest.mark.parametrize("draw", [figures.plot_plane, figures.plot_over_tasks])
def test_one_replicate_has_no_interval(draw):
    figure = draw(trajectory(replicates=1))
    note = "Means over 1 streams. Preliminary: 1 of 6 streams. On fixed subsets of the tests."
    assert figure.get_supxlabel() == note
    for collection in figure.axes[0].collections:
        assert all(
            np.isnan(path.vertices).any() or not len(path) for path in collection.get_paths()
        )


@pytest.mark.parametrize("draw", [figures.plot_plane, figures.plot_over_tasks])
def test_settings_have_the_colours_of_the_palette(draw):
    axis, frame = ["A_KA", "A_ZS"] if draw is figures.plot_plane else ["task", "A_KA"], trajectory()
    points = runs.summarise(frame).loc["update only"].sort_index().reset_index()[axis]
    assert (
        colour_of(draw(frame).axes[0], points.to_numpy())
        == figures.looks(ENDS)["update only"]["color"]
    )


def test_settings_stand_beside_a_reference_each():
    frame = trajectory()
    figure = figures.plot_beside(frame, "thirds")
    panels = np.reshape(figure.axes, (2, -1))
    names = [name for name in ENDS if name != "thirds"]
    assert [axes.texts[0].get_text() for axes in panels[0]] == names
    means = runs.summarise(frame)
    for row, measure in zip(panels, style.AXES, strict=True):
        for axes, name in zip(row, names, strict=True):
            drawn = [line.get_ydata() for line in axes.lines]
            for values, setting in zip(drawn, ("thirds", name), strict=True):
                assert values == pytest.approx(means.loc[setting, measure].sort_index().to_numpy())
    assert figure.get_supxlabel().startswith("Grey: thirds. Means over")


def test_losses_stand_below_their_rates_as_means_within_an_update():
    rates = {name: np.full((2, 8), 0.001) for name in "ab"}
    losses = {"a": np.arange(16.0).reshape(2, 8), "b": np.ones((2, 8))}
    figure = figures.plot_rates_and_losses(rates, losses)
    above, _, below, _ = figure.axes
    assert above.lines[0].get_ydata() == pytest.approx(np.ones(16))  # of a thousandth
    first, second = below.lines
    assert list(first.get_xdata()) == [4, 5, 6, 7] and list(second.get_xdata()) == [12, 13, 14, 15]
    assert first.get_ydata() == pytest.approx([2, 3, 4, 5])
    assert second.get_ydata() == pytest.approx([10, 11, 12, 13])


def test_one_update_has_rates_and_losses():
    figure = figures.plot_rates_and_losses({"a": np.ones((1, 8))}, {"a": np.ones((1, 8))})
    assert figure.axes[1].get_ylim() == pytest.approx((0.9, 1.1))


def test_a_line_that_ends_in_nothing_is_labelled_where_it_ends():
    (axes,) = figures.plot_losses({"a": [1.0, 2.0, np.nan], "b": [2.0, 1.0, 1.0]}).axes
    assert {text.get_text(): text.xy[0] for text in axes.texts} == {"a": 2, "b": 3}


def test_no_images_are_an_empty_gallery():
    figure = figures.plot_gallery(np.zeros((0, 4, 8, 8), np.uint8), [])
    assert not any(axes.images for axes in figure.axes)


def test_a_single_gain_is_on_the_scale():
    row = {"setting": "a", "gain": 8.0, "low": 7.0, "high": 9.0, "is_bound": False, "reason": ""}
    table = pd.DataFrame([row | {"n": 20, "preliminary": ""}])
    (axes,) = figures.plot_technique_gains(table).axes
    assert axes.get_xlim()[1] > 9


def test_names_on_a_wall_are_marked_as_right_or_wrong():
    images = np.zeros((2, 4, 8, 8), np.uint8)
    figure = figures.plot_wall(images, ["cat", "dog"], ["cow", "dog"], truth=["cat", "dog"])
    texts = {text.get_text(): text.get_color() for text in figure.axes[0].texts}
    assert [*texts] == ["✓ cat", "✗ cow", "✓ dog"]
    assert texts["✓ cat"] == texts["✓ dog"] != texts["✗ cow"]


def test_over_tasks():
    frame = trajectory()
    figure = figures.plot_over_tasks(frame)
    left, right = figure.axes
    assert right.get_xlabel() == "Updates learned"
    assert [axes.get_ylabel().replace("\n", " ") for axes in (left, right)] == [
        style.with_subscripts(title) for title in style.AXES.values()
    ]
    assert [{text.get_text() for text in axes.texts} for axes in (left, right)] == [{*ENDS}] * 2
    joint = runs.summarise(frame).loc[("joint", 1), "A_KA"]
    levels = [line for line in left.lines if set(line.get_ydata()) == {joint}]
    assert [line.get_linestyle() for line in levels] == ["--"]
    rows, band = (
        runs.summarise(frame).loc["thirds"],
        left.collections[0].get_paths()[0].vertices,
    )
    for task, row in rows.iterrows():
        heights = band[band[:, 0] == task, 1]
        assert heights.max() == pytest.approx(row["A_KA"] + row["A_KA half"])
        assert heights.min() == pytest.approx(row["A_KA"] - row["A_KA half"])


def test_drift_keeps_equal_losses_on_the_floor():
    losses = pd.DataFrame({"a": [1.0, 2.0, 3.0], "b": [1.0, 2.001, 3.0], "c": [1.1, 2.0, 3.01]})
    (axes,) = figures.plot_loss_drift(losses, reference="a").axes
    floor = axes.lines[0].get_ydata()[0]
    drawn = {tuple(np.round(line.get_ydata(), 6)) for line in axes.lines[1:]}
    assert drawn == {(floor, -3, floor), (-1, floor, -2)}
    assert floor < -3
    assert {"b", "c"} <= texts(axes.figure)


def test_a_long_note_is_wrapped():
    with style.canvas(3, ", ".join(["the name of a setting"] * 12)) as (figure, _):
        pass
    note = figure._supxlabel.get_window_extent()
    assert "\n" in figure.get_supxlabel()
    assert note.x1 < figure.bbox.x1


def test_a_finding_leaves_the_names_of_panels():
    figure = figures.with_title(figures.plot_schedules(), "A finding")
    assert figure.get_suptitle() == "A finding" and figure.axes[0].get_title() == "cosine"


def test_an_error_leaves_no_figure_open():
    with pytest.raises(ValueError, match="while drawing"), style.canvas(2):
        raise ValueError("while drawing")


def test_the_parts_of_a_loss_stand_on_each_other_and_say_their_values():
    parts = pd.DataFrame(
        {"value": [58.9, -9.6, -2.2, 5.3], "half": [0.8, 1.3, 1.9, np.nan], "preliminary": ""},
        index=["before the stream", "pool alone", "new data", "EMA-Merge"],
    )
    axes, other = figures.plot_loss_parts({"batches of 22": parts, "batches of 64": parts}).axes
    assert [axes.get_title("left"), other.get_title("left")] == ["batches of 22", "batches of 64"]
    bars = axes.patches
    assert [bar.get_height() for bar in bars] == pytest.approx(parts["value"].iloc[1:])
    tops = [58.9, *(bar.get_y() + bar.get_height() for bar in bars)]
    assert [bar.get_y() for bar in bars] == pytest.approx(tops[:-1])
    assert [text.get_text() for text in axes.texts] == ["58.9", "−9.6", "−2.2", "+5.3"]
    assert level_in_words() in axes.figure.get_supxlabel()
