"""Figures as pure functions of frames: one house style, one colour a setting, nothing left open.

A trajectory frame has a row a (setting, replicate, task): `task` (0 = before the stream), `scope`
("subset" or "full"), `A_KA`, `A_ZS`, `GM` in percent. Lines are means over replicates, bands and
bars are 95% t-intervals; with one replicate there is no interval. Where a frame has "subset" rows,
those are drawn, for they ask the same questions after every task.
"""

import contextlib
import functools
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cmp.errors import CmpError

JOINT, CONTROL = "joint", "replay-only control"
SPECIAL = {JOINT: "#222222", CONTROL: "#858585"}
COLOURS = [sns.color_palette("colorblind").as_hex()[i] for i in (0, 1, 2, 3, 4, 9, 5, 6)]
MARKERS = "osD^vPph"
POOLS = {"pretraining pool": COLOURS[0], "update": COLOURS[1], "buffer": COLOURS[2]}
GAIN, LOSS = COLOURS[0], COLOURS[3]
AXES = {"A_KA": "Knowledge accumulation A_KA (%)", "A_ZS": "Zero-shot retention A_ZS (%)"}
ROLES = {"adapt": "Adaptation", "eval": "Retention", "transfer": "Transfer"}
PALE = 0.35
STYLE = {
    "font.size": 13, "axes.labelsize": 13, "axes.titlesize": 13, "axes.titlelocation": "left",
    "xtick.labelsize": 12, "ytick.labelsize": 12, "axes.edgecolor": "0.4", "axes.labelcolor": "0.1",
    "xtick.color": "0.25", "ytick.color": "0.25", "axes.spines.top": False,
    "axes.spines.right": False, "lines.linewidth": 2.2, "lines.markersize": 5,
    "figure.dpi": 110, "figure.facecolor": "white", "axes.facecolor": "white",
}  # fmt: skip


@contextlib.contextmanager
def _figure(width: float, height: float, **subplots: Any) -> Iterator[tuple[Figure, Any]]:
    """A figure in the house style; closed at the end, so that a notebook draws it once."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(width, height), layout="constrained", **subplots)
        try:
            yield figure, axes
            figure.draw_without_rendering()  # ticks are made now, in this style
        finally:
            plt.close(figure)


def palette(settings: Iterable[str]) -> dict[str, str]:
    """Setting -> colour, by first appearance; the upper bound and the control are never coloured.

    Hand one palette to all figures of a chapter where they show different parts of a frame.
    """
    ordinary = [name for name in dict.fromkeys(settings) if name not in SPECIAL]
    colours = {name: COLOURS[place % len(COLOURS)] for place, name in enumerate(ordinary)}
    return colours | SPECIAL


@functools.cache
def t_quantile(freedom: int) -> float:
    """The 97.5% point of Student's t. With t = sqrt(f) tan(a), the density of a is cos(a)^(f - 1);
    not a number without a degree of freedom."""
    if freedom < 1:
        return float("nan")
    angle = np.linspace(0, np.pi / 2, 200_001)
    density = np.cos(angle) ** (freedom - 1)
    mass = np.concatenate([[0], np.cumsum(density[1:] + density[:-1])])
    return float(np.sqrt(freedom) * np.tan(np.interp(0.95, mass / mass[-1], angle)))


def _summary(trajectory: pd.DataFrame) -> pd.DataFrame:
    """Index (setting, task); the means A_KA and A_ZS, the half widths of their intervals
    ("A_KA half"; not a number where n = 1), and `n`, the number of replicates."""
    scope = "subset" if (trajectory["scope"] == "subset").any() else "full"
    frame = trajectory[trajectory["scope"] == scope]
    if lacking := set(trajectory["setting"]) - set(frame["setting"]):
        raise CmpError(f"trajectory: no {scope!r} rows of {', '.join(sorted(lacking))}")
    groups = frame.groupby(["setting", "task"], sort=False, observed=True)[list(AXES)]
    half = groups.sem() * (groups.count() - 1).map(t_quantile)
    means = groups.mean().join(half.add_suffix(" half"))
    return means.assign(n=groups.count().min(axis=1)).sort_index(level="task", sort_remaining=False)


def _layers(
    trajectory: pd.DataFrame, background: pd.DataFrame | None, colours: dict[str, str] | None
) -> tuple[list[tuple[str, pd.DataFrame, dict[str, Any], bool]], str]:
    """([(setting, its rows by task, line style, whether pale)], what the intervals are): pale ones
    first; all settings' colours come from the order in background, then trajectory."""
    frames = [(background, True), (trajectory, False)]
    frames = [(_summary(frame), pale) for frame, pale in frames if frame is not None]
    order = [name for frame, _ in frames for name in frame.index.unique("setting")]
    colours, layers = colours or palette(order), []
    markers = dict(zip([n for n in colours if n not in SPECIAL], MARKERS * 9, strict=False))
    for frame, pale in frames:
        for name in frame.index.unique("setting"):
            style = {"color": colours[name], "marker": markers.get(name, "X")}
            style |= {"linestyle": "--" if name in SPECIAL else "-"}
            style |= {"alpha": PALE, "linewidth": 1.3, "markersize": 3.5} if pale else {}
            layers.append((name, frame.loc[name], style, pale))
    low, high = frames[-1][0]["n"].min(), frames[-1][0]["n"].max()
    count = f"{low}" if low == high else f"{low} to {high}"
    note = f"Means of {count} replicates, 95% t-intervals" if high > 1 else "One replicate"
    return layers, note + (". Pale: for comparison" if background is not None else "")


def _note(figure: Figure, text: str) -> None:
    figure.supxlabel(text, x=0.01, ha="left", fontsize=10.5, color="0.4")


def spread(places: Sequence[float], gap: float) -> np.ndarray:
    """Places at least `gap` apart, in the same order, moved as little as possible (least squares).

    Without the gaps it is isotonic regression: neighbours that would cross share their mean.
    """
    places = np.asarray(places, float)
    order, ramp = np.argsort(places, kind="stable"), gap * np.arange(len(places))
    blocks: list[list[float]] = []
    for place in places[order] - ramp:
        blocks.append([place])
        while len(blocks) > 1 and np.mean(blocks[-2]) >= np.mean(blocks[-1]):
            last = blocks.pop()
            blocks[-1] += last
    flat = np.concatenate([np.full(len(b), np.mean(b)) for b in blocks]) if blocks else places
    result = np.empty(len(places))
    result[order] = flat + ramp
    return result


def _label_ends(axes: Axes, ends: list[tuple[float, float, str, dict[str, Any]]]) -> None:
    """Labels (x, y, text, {color, alpha}) right of the axes, none on top of another."""
    axes.figure.draw_without_rendering()
    low, high = axes.get_ylim()
    line = 1.3 * plt.rcParams["font.size"] * axes.figure.dpi / 72
    places = spread([y for _, y, _, _ in ends], line / axes.bbox.height * (high - low))
    for (x, y, text, style), place in zip(ends, places, strict=True):
        arrow = {"arrowstyle": "-", "linewidth": 0.8, "shrinkA": 1, "shrinkB": 5, **style}
        axes.annotate(
            text, (x, y), (1.05, place), textcoords=axes.get_yaxis_transform(), va="center",
            annotation_clip=False, arrowprops=arrow, **style,
        )  # fmt: skip


def _label_points(
    axes: Axes, points: list[tuple[float, float, str, dict[str, Any]]], drawn: np.ndarray
) -> None:
    """Labels (x, y, text, style) beside their points, where they hide least of each other and of
    what is drawn ([N, 2], in the axes' units)."""
    axes.figure.draw_without_rendering()
    drawn, inside, boxes = axes.transData.transform(drawn), axes.bbox, []
    scale = axes.figure.dpi / 72
    directions = [(np.cos(a), np.sin(a)) for a in np.arange(0, 2 * np.pi, np.pi / 6)]
    for x, y, text, style in points:
        label = axes.annotate(
            text, (x, y), (0, 0), textcoords="offset points", ha="center", va="center", **style
        )
        box, best = label.get_window_extent(), (np.inf, (0, 0), None)
        for radius in (8, 14, 22):
            for right, up in directions:
                move = (right * (box.width / 2 + radius), up * (box.height / 2 + radius))
                low, high = box.min + move - 2, box.max + move + 2
                cost = 0.2 * radius + np.all((drawn > low) & (drawn < high), axis=1).sum()
                cost += 1000 * bool((low < inside.min).any() or (high > inside.max).any())
                cost += 1000 * sum((low < b).all() and (high > a).all() for a, b in boxes)
                best = min(best, (cost, move, (low, high)), key=lambda each: each[0])
        label.set_position((best[1][0] / scale, best[1][1] / scale))
        boxes.append(best[2])


def _contours(axes: Axes) -> None:
    """Lines of equal geometric mean, named outside the axes; the limits stay as they are."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    x = np.linspace(max(left, 1e-3), right, 200)
    lowest, highest = np.sqrt(max(left, 0) * max(bottom, 0)), np.sqrt(right * top)
    step = next(s for s in (1, 2, 5, 10, 20) if (highest - lowest) / s < 9)
    style = {"color": "0.6", "fontsize": 9.5, "annotation_clip": False}
    for mean in np.arange(step, highest, step):
        axes.plot(x, mean**2 / x, color="0.9", linewidth=1, zorder=0)
        place, offset = (mean**2 / top, top), (0, 3)
        if place[0] > right:
            place, offset = (right, mean**2 / right), (4, -3)
        if place[0] >= left and place[1] >= bottom:
            axes.annotate(f"{mean:g}", place, offset, textcoords="offset points", **style)
    axes.set(xlim=(left, right), ylim=(bottom, top))
    axes.text(1, 1.045, "grey: geometric mean", transform=axes.transAxes, ha="right",
              color="0.6", fontsize=9.5)  # fmt: skip


def plane(
    trajectory: pd.DataFrame,
    background: pd.DataFrame | None = None,
    colours: dict[str, str] | None = None,
) -> Figure:
    """A_KA against A_ZS: each setting's way through the stream, a marker a task, the end large.

    background: another trajectory frame, drawn pale. colours: a `palette` shared between figures.
    """
    layers, note = _layers(trajectory, background, colours)
    shown = {name for name, _, _, pale in layers if not pale}
    points, drawn = [], []
    with _figure(9, 6.2) as (figure, axes):
        for name, rows, style, pale in layers:
            way = rows[list(AXES)].to_numpy()
            x, y, size = *way[-1], 7 if pale else 11
            if name != JOINT:
                axes.plot(*way.T, **style, clip_on=False)
                axes.plot(*way[0], "o", color="white", markeredgecolor="0.2", zorder=4)
                near = [np.hypot(*(way[0] - (a, b))) for a, b, text, _ in points if text == "before"]
                points += [] if min(near, default=9) < 1.5 else [(*way[0], "before", {"color": "0.2"})]
            half = rows.iloc[-1]
            error = {"xerr": half["A_KA half"], "yerr": half["A_ZS half"], "elinewidth": 1.3}
            axes.errorbar(
                x, y, **(error if half["n"] > 1 else {}), color=style["color"], capsize=2.5,
                marker="*" if name == JOINT else style["marker"], markersize=size + 5 * (name == JOINT),
                markeredgecolor="white", alpha=style.get("alpha"), zorder=3 if pale else 5,
            )  # fmt: skip
            drawn += [np.linspace(a, b, 25) for a, b in zip(way[:-1], way[1:], strict=True)] * (name != JOINT)
            drawn += [np.repeat(way[-1:], 60, axis=0)]
            if not pale or name not in shown:
                weight = {"fontweight": "normal" if pale else "bold", "alpha": 0.6 if pale else 1}
                points.append((x, y, name, {"color": style["color"], **weight}))
        axes.margins(0.12, 0.1)
        axes.set(xlabel=AXES["A_KA"], ylabel=AXES["A_ZS"])
        _contours(axes)
        _label_points(axes, points, np.concatenate(drawn))
        _note(figure, note)
    return figure
