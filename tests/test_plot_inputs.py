"""Figures of inputs: the right axes and artists, and colours that tell settings apart."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from lab import figures
from lab.figures import runs

pytestmark = pytest.mark.usefixtures("clean_drawing")


def texts(figure):
    return {text.get_text() for axes in figure.axes for text in axes.texts}


@pytest.mark.parametrize("tasks", [4, 20])
def test_stream(tasks):
    counts = pd.DataFrame(1, index=range(1, tasks + 1), columns=list("abcdefghij"))
    counts.iloc[0, 0] = 0
    figure = figures.plot_stream(counts)
    (axes,) = figure.axes
    assert axes.get_xlabel() == "Update"
    assert [label.get_text() for label in axes.get_xticklabels()] == list(map(str, counts.index))
    assert axes.get_yticklabels()[0].get_text() == f"a ({tasks - 1})"
    assert len(axes.texts) == 10 * tasks
    assert axes.texts[0].get_text() == ""


def test_stream_with_images_above():
    counts = pd.DataFrame(1, index=range(1, 5), columns=list("abc"))
    report = pd.DataFrame({"images": [10, 20, 5, 40]}, index=counts.index)
    above, below = figures.plot_stream(counts, report).axes
    assert [bar.get_height() for bar in above.patches] == [10, 20, 5, 40]
    assert [text.get_text() for text in above.texts] == ["10", "20", "5", "40"]
    assert below.get_xlabel() == "Update"
    start, end = above.get_xlim()
    middles = [bar.get_x() + bar.get_width() / 2 for bar in above.patches]
    shares = [(middle - start) / (end - start) for middle in middles]
    assert shares == pytest.approx([(task + 0.5) / 4 for task in range(4)])
    assert below.get_xlim() == (0, 4)


def test_gallery():
    images = np.zeros((5, 4, 32, 32), np.uint8)
    images[1, [0, 3]] = 255
    figure = figures.plot_gallery(images, list("abcde"))
    shown = [axes.images[0] for axes in figure.axes if axes.images]
    assert (len(figure.axes), len(shown)) == (runs.IN_A_ROW, 5)
    assert (shown[0].get_array() == 1).all()  # transparent is white
    assert shown[1].get_array()[0, 0].tolist() == [1, 0, 0]
    assert {image.get_interpolation() for image in shown} == {"nearest"}
    assert texts(figure) == {*"abcde"}


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ([[1e-3]], (1e-3, "10⁻³")),
        ([[9.9e-4, 0.0]], (1e-4, "10⁻⁴")),
        ([[2.5e-4], [4e-2]], (1e-2, "10⁻²")),
        ([[1.0]], (1.0, "10⁰")),
        ([[0.0]], (1.0, "10⁰")),
    ],
)
def test_power_of_ten(rates, expected):
    scale, text = runs.power_of_ten([np.array(each) for each in rates])
    assert (scale, text) == (pytest.approx(expected[0]), expected[1])


def test_learning_rates():
    shown, held = np.array([[1e-3, 5e-4], [4e-4, 2e-4]]), np.array([[3e-4, 3e-4, 3e-4]])
    figure = figures.plot_learning_rates({"one": shown, "two": held})
    (axes,) = figure.axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("Optimiser step", "Learning rate (10⁻³)")
    grey, blue = axes.lines
    assert blue.get_ydata() == pytest.approx([1.0, 0.5, 0.4, 0.2])
    assert grey.get_ydata() == pytest.approx([0.3] * 3)
    colours = [to_hex(line.get_color()) for line in (blue, grey)]
    assert colours == [figures.COLOURS[0], runs.HELD]
    assert grey.get_linestyle() == "--"
    means, shaded = axes.patches
    assert means.get_data().values == pytest.approx([0.3])
    assert shaded.get_data().values == pytest.approx([0.75, 0.3])
    assert shaded.get_data().edges.tolist() == [-0.5, 1.5, 3.5]
    (borders,) = axes.collections
    assert [segment[0, 0] for segment in borders.get_segments()] == [1.5]
    assert texts(figure) == {"one", "two"}
    (axes,) = figures.plot_learning_rates({"one": shown}).axes
    assert [len(axes.lines), len(axes.patches)] == [1, 1]


def test_schedules_are_drawn_on_the_same_axes():
    figure = figures.plot_schedules()
    drawn = {axes.get_title(): axes for axes in figure.axes if axes.lines}
    assert {"cosine", "cosine, meta cosine", "rsqrt, meta rsqrt"} <= drawn.keys()
    assert len({axes.get_ylim() for axes in drawn.values()}) == 1
    assert drawn["wsd"].lines[0].get_ydata().max() == 1.0
