"""The house style of every figure: a canvas, colours of settings, and where labels go."""

import contextlib
import itertools
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from cmp.experiments.verdicts import level_in_words
from cmp.readers.files import read_yaml
from lab import chapters

JOINT, CONTROL = "joint", "replay-only control"
SPECIAL = {JOINT: "#222222", CONTROL: "#858585"}
"""Settings that look the same in every figure: the upper bound and the control."""
# of seaborn's "colorblind", but for the seventh
COLOURS = ["#0173b2", "#de8f05", "#029e73", "#d55e00", "#cc78bc", "#56b4e9", "#882255", "#ca9161"]
MARKERS, LINES = "osD^vPh", ("-", "-.", ":")
AXES = {"A_KA": "Knowledge accumulation A_KA (%)", "A_ZS": "Zero-shot retention A_ZS (%)"}
STYLE = read_yaml(chapters.BOOK / "style.yaml")
"""Settings of matplotlib."""
HALO = [withStroke(linewidth=3, foreground="white")]


@contextlib.contextmanager
def canvas(width: float, height: float, note: str = "", **grid: Any) -> Iterator[tuple]:
    """Open a figure in the house style; it is closed at the end, so that a notebook shows it once.

    Args:
        width, height: In inches.
        note: What stands below the axes.
        **grid: Arguments of `plt.subplots`.

    Yields:
        The figure and its axes, as `plt.subplots` returns them.
    """
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(width, height), layout="constrained", **grid)
        try:
            note = textwrap.fill(note, int(width * 13))
            figure.supxlabel(note, x=0.01, ha="left", fontsize=10.5, color="0.4")
            yield figure, axes
            figure.draw_without_rendering()  # makes the ticks while the style holds
        finally:
            plt.close(figure)


def palette(settings: Iterable[str]) -> dict[str, str]:
    """Give each setting a colour by its first appearance; `SPECIAL` ones keep theirs.

    Args:
        settings: Names; repeated names count once.

    Returns:
        Setting -> colour.
    """
    ordinary = [name for name in dict.fromkeys(settings) if name not in SPECIAL]
    return dict(zip(ordinary, itertools.cycle(COLOURS), strict=False)) | SPECIAL


def line_style(place: int, colour: str) -> dict[str, Any]:
    """Return colour, marker and dashes of the line that is at a place among the settings."""
    marker, line = MARKERS[place % len(MARKERS)], LINES[place // len(COLOURS) % len(LINES)]
    return {"color": colour, "marker": marker, "linestyle": line}


def bold(colour: str) -> dict[str, str]:
    """Return the properties of a label in a line's colour."""
    return {"color": colour, "fontweight": "bold"}


def signed(value: float) -> str:
    """Return a number of points with its sign and one digit."""
    return f"{value:+.1f}".replace("-", "−")


def interval_note(table: pd.DataFrame, has_intervals: bool) -> str:
    """Return what a note says of intervals and of settings that have none yet.

    Args:
        table: Settings; those that lack streams say so in `preliminary`, such as "2 of 20 streams".
        has_intervals: Whether any has one.
    """
    parts = [f"{level_in_words()} t-intervals over bases."] * has_intervals
    progress = sorted({*table.get("preliminary", [])} - {""})
    return " ".join(parts + [f"Preliminary: {', '.join(progress)}."] * bool(progress))


def heatmap(axes: Axes, table: pd.DataFrame, **options: Any) -> None:
    """Draw a table as shaded cells; options as those of `seaborn.heatmap`."""
    import seaborn

    seaborn.heatmap(table, ax=axes, linewidths=1.5, annot_kws={"size": 11}, **options)
    axes.tick_params(length=0, labelrotation=0)
    axes.set(xlabel="", ylabel="")


def spread(places: Sequence[float], gap: float) -> np.ndarray:
    """Move places until they are at least `gap` apart, in the same order and as little as possible.

    This is isotonic regression (least squares) of the places less the gaps.

    Args:
        places: In any order.
        gap: The smallest distance between two of them.

    Returns:
        The places, in the order that they came in.
    """
    from scipy.optimize import isotonic_regression

    order = np.argsort(places, kind="stable")
    result, offsets = np.array(places, float), gap * np.arange(len(places))
    if len(places):
        result[order] = isotonic_regression(result[order] - offsets).x + offsets
    return result


def with_title(figure: Figure, finding: str) -> Figure:
    """Write what a figure shows above it, and return the figure.

    Args:
        figure: The figure.
        finding: A sentence.
    """
    width = int(figure.get_figwidth() * 9.5)
    figure.axes[0].set_title("")
    figure.suptitle(
        textwrap.fill(finding, width), x=0.01, ha="left", fontsize=13, fontweight="bold"
    )
    return figure


def label_ends(axes: Axes, weight: str = "bold") -> None:
    """Write the labels of lines at their right ends, each tied to its own and none on another."""
    axes.figure.draw_without_rendering()
    height = 1.3 * plt.rcParams["font.size"] * axes.figure.dpi / 72
    gap = height / axes.bbox.height * np.ptp(axes.get_ylim())
    shift = 0.06 * np.ptp(axes.get_xlim())
    tie = {"arrowstyle": "-", "linewidth": 0.8, "shrinkA": 1, "shrinkB": 5, "relpos": (0, 0.5)}
    look = {"va": "center", "annotation_clip": False, "path_effects": HALO, "fontweight": weight}
    lines = [line for line in axes.lines if not line.get_label().startswith("_")]  # labelled
    lines.sort(key=lambda line: line.get_xdata()[-1])
    for x, group in itertools.groupby(lines, lambda line: line.get_xdata()[-1]):
        ends = [(line, line.get_ydata()[-1], line.get_color()) for line in group]
        places = spread([y for _, y, _ in ends], gap)
        for (line, y, colour), place in zip(ends, places, strict=True):
            arrow = {"xytext": (x + shift, place), "arrowprops": tie | {"color": colour}}
            axes.annotate(line.get_label(), (x, y), color=colour, **arrow, **look)


def label_points(axes: Axes, points: Iterable[tuple[float, float, str, dict[str, Any]]]) -> None:
    """Label points where the labels hide least of each other and of what is drawn.

    Args:
        axes: Where the points are drawn.
        points: x, y, text and the properties of the text.
    """
    axes.figure.draw_without_rendering()
    paths = [line.get_xydata() for line in axes.lines]
    paths += [path for bars in axes.collections for path in bars.get_segments() if len(path)]
    pairs = [pair for path in paths for pair in itertools.pairwise(axes.transData.transform(path))]
    drawn = np.concatenate([np.empty((0, 2)), *(np.linspace(*pair, 40) for pair in pairs)])
    inside, boxes = axes.bbox, []
    centred = {"textcoords": "offset points", "ha": "center", "va": "center", "path_effects": HALO}
    tie = {"arrowstyle": "-", "color": "0.6", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 7}
    for x, y, text, style in points:
        label = axes.annotate(text, (x, y), (0, 0), arrowprops=tie, **centred, **style)
        size, middle, options = label.get_window_extent().size, axes.transData.transform((x, y)), []
        for radius, angle in itertools.product((11, 18, 28, 40), np.arange(24) * np.pi / 12):
            move = np.array([np.cos(angle), np.sin(angle)]) * (size / 2 + radius)
            low, high = middle + move - size / 2 - 3, middle + move + size / 2 + 3
            cost = 0.3 * radius + np.all((drawn > low) & (drawn < high), axis=1).sum()
            cost += 1000 * ((low < inside.min).any() + (high > inside.max).any())
            cost += 1000 * sum((low < b).all() and (high > a).all() for a, b in boxes)
            options.append((cost, move, (low, high)))
        _, move, box = min(options, key=lambda option: option[0])
        label.set_position(move * 72 / axes.figure.dpi)
        boxes.append(box)
