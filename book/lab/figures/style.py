"""The house style of all figures: canvas, appearance of settings, and placement of labels."""

import contextlib
import itertools
import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator

from cmp.parsing import read_yaml
from lab import chapters
from lab.evidence.scores import level_in_words

WIDTH = 9
"""Width of every figure in inches. Pages scale all figures to the width of the text, so that their
letters have the same size."""
JOINT = "joint"
# seaborn's "colorblind", except for the seventh
COLOURS = ["#0173b2", "#de8f05", "#029e73", "#d55e00", "#cc78bc", "#56b4e9", "#882255", "#ca9161"]
MARKERS, LINES = "osD^vPh", ("-", "-.", ":")
AXES = {"A_KA": "Knowledge accumulation A_KA (%)", "A_ZS": "Zero-shot retention A_ZS (%)"}
STYLE = read_yaml(chapters.BOOK / "style.yaml")
HALO = [withStroke(linewidth=3, foreground="white")]


@contextlib.contextmanager
def canvas(height: float, note: str = "", **grid: Any) -> Iterator[tuple]:
    """Open a figure in the house style, and close it at the end, so that a notebook shows it only
    once.

    Args:
        height: The height in inches.
        note: The text below the axes, which is wrapped.
        **grid: Arguments of `plt.subplots`.

    Yields:
        The figure and its axes, as returned by `plt.subplots`.
    """
    with plt.rc_context(STYLE["matplotlib"]):
        figure, axes = plt.subplots(figsize=(WIDTH, height), layout="constrained", **grid)
        try:
            note = "\n".join(textwrap.fill(line, 13 * WIDTH) for line in note.splitlines())
            figure.supxlabel(note, x=0.01, ha="left", fontsize=10.5, color="0.4")
            yield figure, axes
            for text in figure.findobj(Text):
                text.set_text(with_subscripts(text.get_text()))
            figure.draw_without_rendering()  # creates the ticks while the style is active
        finally:
            plt.close(figure)


@contextlib.contextmanager
def plane(height: float, note: str = "") -> Iterator[tuple[Figure, Axes]]:
    """Open a figure of A_ZS over A_KA, with the same arguments and result as `canvas`."""
    with canvas(height, note) as (figure, axes):
        axes.set(xlabel=AXES["A_KA"], ylabel=AXES["A_ZS"])
        yield figure, axes


def with_subscripts(text: str) -> str:
    """Return a text with the aggregates written as in formulas."""
    return re.sub(r"\bA_(KA|ZS)\b", r"$A_{\\mathrm{\1}}$", text)


def looks(settings: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return the colour, marker and dashes of each setting's line.

    Settings in `book/style.yaml` have the same style in every figure. Others get unused styles in
    order.

    Args:
        settings: The names; repeated names count once.

    Returns:
        Setting -> arguments of `plot`.
    """
    arguments = {name: STYLE["looks"].get(name) for name in settings}
    taken = {look["color"] for look in arguments.values() if look}
    free = [colour for colour in COLOURS if colour not in taken] or COLOURS
    for place, name in enumerate([name for name, look in arguments.items() if not look]):
        line = LINES[place // len(COLOURS) % len(LINES)]
        marker = MARKERS[place % len(MARKERS)]
        arguments[name] = {"color": free[place % len(free)], "marker": marker, "linestyle": line}
    return arguments


def peak_label(peak: float) -> str:
    """Return a peak learning rate as text without an exponent, such as "0.00063"."""
    return np.format_float_positional(peak, precision=3, fractional=False, trim="-")


def ink(colour: str) -> str:
    """Return a colour darkened for text on white, to a contrast of 4.5 to 1."""
    rgb = np.array(to_rgb(colour))
    while _luminance(rgb) > 1.05 / 4.5 - 0.05:
        rgb *= 0.98
    return to_hex(rgb)


def _luminance(rgb: np.ndarray) -> float:
    """Return the relative luminance (WCAG 2) of an sRGB colour."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def bold(colour: str) -> dict[str, str]:
    """Return the properties of a label in a line's colour."""
    return {"color": ink(colour), "fontweight": "bold"}


def mark_updates(axes: Axes) -> None:
    """Set ticks of a horizontal axis of updates, such as 0, 5, ... 20."""
    axes.xaxis.set_major_locator(MaxNLocator(9, integer=True, steps=[1, 2, 5, 10]))


def draw_open_end(axes: Axes, x: float, y: float, sign: int, colour: str) -> None:
    """Draw an arrow from a point towards the open end of its interval."""
    arrow = {"arrowstyle": "<|-", "color": colour, "linewidth": 1.5, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", (x, y), (30 * sign, 0), textcoords="offset points", arrowprops=arrow)


def interval_note(table: pd.DataFrame, has_intervals: bool) -> str:
    """Return the text of a note on intervals and on settings without one.

    Args:
        table: The settings; `preliminary` says if one lacks streams, such as "2 of 20 streams".
        has_intervals: Whether any setting has an interval.
    """
    parts = [f"{level_in_words()} t-intervals over bases."] * has_intervals
    progress = sorted({*table.get("preliminary", [])} - {""})
    return " ".join(parts + [f"Preliminary: {', '.join(progress)}."] * bool(progress))


def spread(places: Sequence[float], gap: float) -> np.ndarray:
    """Move positions as little as possible until they are at least `gap` apart, keeping their
    order.

    This is isotonic regression (least squares) of the positions minus the gaps.

    Args:
        places: The positions, in any order.
        gap: The smallest distance between two of them.

    Returns:
        The positions, in the original order.
    """
    from scipy.optimize import isotonic_regression

    order = np.argsort(places, kind="stable")
    result, offsets = np.array(places, float), gap * np.arange(len(places))
    if len(places):
        result[order] = isotonic_regression(result[order] - offsets).x + offsets
    return result


def with_title(figure: Figure, finding: str) -> Figure:
    """Write a finding above a figure, in lines of similar length, and return the figure.

    Args:
        figure: The figure. If its note says that it is preliminary, the title does not.
        finding: A sentence.
    """
    if "Preliminary" in figure.get_supxlabel():
        finding = re.sub(r" \(preliminary, [^)]*\)", "", finding)
    lines, width = len(textwrap.wrap(finding, 9 * WIDTH)), 1
    while len(textwrap.wrap(finding, width)) > lines:
        width += 1
    title = with_subscripts(textwrap.fill(finding, width))
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
    return figure


def label_ends(axes: Axes) -> None:
    """Write the labels of lines at their right ends, connected to their lines and without
    overlaps."""
    axes.figure.draw_without_rendering()
    height = 1.3 * plt.rcParams["font.size"] * axes.figure.dpi / 72
    gap = height / axes.bbox.height * np.ptp(axes.get_ylim())
    tie = {"arrowstyle": "-", "linewidth": 0.8, "shrinkA": 1, "shrinkB": 6, "relpos": (0, 0.5)}
    look = {"va": "center", "annotation_clip": False, "path_effects": HALO}
    to_screen = axes.transData
    lines = [line for line in axes.lines if not line.get_label().startswith("_")]  # with labels
    known = [line.get_xydata()[np.isfinite(line.get_xydata()).all(axis=1)] for line in lines]
    pairs = [(line, each[-1]) for line, each in zip(lines, known, strict=True) if len(each)]
    pairs.sort(key=lambda pair: pair[1][0])
    lines, ends = [line for line, _ in pairs], np.reshape([end for _, end in pairs], (-1, 2))
    # ends closer together than the spacing of labels share a column of labels
    column = np.cumsum(np.diff(to_screen.transform(ends)[:, 0], prepend=-np.inf) > 28)
    for group in (np.flatnonzero(column == number) for number in np.unique(column)):
        for n, place in zip(group, spread(ends[group, 1], gap), strict=True):
            start = to_screen.transform((ends[group[-1], 0], place))
            beside = to_screen.inverted().transform((start[0] + 28, start[1]))
            line, colour = lines[n], lines[n].get_color()
            arrow = {"xytext": beside, "arrowprops": tie | {"color": colour}}
            axes.annotate(line.get_label(), ends[n], **arrow, **look, **bold(colour))


def label_points(axes: Axes, points: Iterable[tuple[float, float, str, dict[str, Any]]]) -> None:
    """Label points where labels overlap least with each other and with the drawing.

    Args:
        axes: The axes with the points.
        points: The x, y, text and text properties of each point.
    """
    axes.figure.draw_without_rendering()
    marks, lines = _drawn_marks(axes), _drawn_lines(axes)
    scale, boxes = axes.figure.dpi / 72, {}
    centred = {"textcoords": "offset points", "ha": "center", "va": "center", "path_effects": HALO}
    places = []
    for x, y, text, style in points:
        middle = axes.transData.transform((x, y))
        own = marks[np.hypot(*(marks[:, :2] - middle).T) < 1, 2].max(initial=0.0)
        tie = {"arrowstyle": "-", "linewidth": 0.8, "shrinkA": 0, "shrinkB": own / scale + 1}
        tie |= {"color": style.get("color", "0.4")}
        tie = tie if own else None  # a cloud has no mark to connect to
        label = axes.annotate(text, (x, y), (0, 0), arrowprops=tie, **centred, **style)
        places.append((label, middle, own, label.get_window_extent().size))
    tried = itertools.product((5, 12, 22, 36, 54), np.arange(24) * np.pi / 12)
    beyond, angle = np.array([*tried]).T
    directions = np.column_stack([np.cos(angle), np.sin(angle)])
    for number, (label, middle, own, size) in [*enumerate(places)] * 2:  # now that all are placed
        moves = directions * (size / 2 + own + beyond[:, None])
        low, high = (middle + moves + sign * (size / 2 + 3) for sign in (-1, 1))  # [N, 2]
        cost = 0.3 * beyond + 4 * (_distance(low, high, lines) == 0).sum(1)
        cost += 40 * (_distance(low, high, marks[:, :2]) < marks[:, 2]).sum(1)
        cost += 1000 * ((low < axes.bbox.min).any(1) | (high > axes.bbox.max).any(1))
        for box in (box for key, box in boxes.items() if key != number):
            cost += 1000 * ((low < box[1]) & (high > box[0])).all(1)
        to_points = _distance(low, high, np.array([point for _, point, *_ in places]))
        cost += 60 * (to_points < to_points[:, [number]]).sum(1)  # it would look like their label
        best = cost.argmin()
        boxes[number] = low[best], high[best]
        label.set_position(moves[best] / scale)


def _distance(low: np.ndarray, high: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Return the distances of boxes from `low` to `high` [N, 2] to points [M, 2], as [N, M]."""
    nearest = np.clip(points, low[:, None], high[:, None])
    return np.hypot(*np.moveaxis(points - nearest, -1, 0))


def _drawn_marks(axes: Axes) -> np.ndarray:
    """Return the x, y and radius of each marker in pixels, [N, 3]."""
    scale, circles = axes.figure.dpi / 144, [np.empty((0, 3))]
    for line in axes.lines:
        if line.get_marker() not in ("", "None", None) and len(line.get_xydata()):
            places = axes.transData.transform(line.get_xydata())
            circles.append(np.insert(places, 2, line.get_markersize() * scale, axis=1))
    return np.concatenate(circles)


def _drawn_lines(axes: Axes) -> np.ndarray:
    """Return points on all lines in pixels, about five pixels apart, [N, 2]."""
    drawn = [line for line in axes.lines if line.get_linestyle() != "None"]
    paths = [line.get_transform().transform(line.get_xydata()) for line in drawn]
    bars = [path for bars in axes.collections for path in bars.get_segments() if len(path)]
    paths += map(axes.transData.transform, bars)
    pairs = [pair for path in paths for pair in itertools.pairwise(path) if np.isfinite(pair).all()]
    steps = [max(2, int(np.hypot(*(end - start)) / 5)) for start, end in pairs]
    points = [np.linspace(*pair, count) for pair, count in zip(pairs, steps, strict=True)]
    return np.concatenate([np.empty((0, 2)), *points])
