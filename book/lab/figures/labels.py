"""Where the labels of a figure go, so that they hide neither each other nor what is drawn."""

import itertools
from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke

HALO = [withStroke(linewidth=3, foreground="white")]
Label = tuple[float, float, str, dict[str, Any]]  # x, y, text, properties of the text


def spread(places: Sequence[float], gap: float) -> np.ndarray:
    """Places at least `gap` apart, in the same order, moved as little as possible: isotonic
    regression (least squares, by its max-min formula) of what is left when gaps are taken off."""
    n, values, result = len(places), np.asarray(places, float), np.empty(len(places))
    order = np.argsort(values, kind="stable")
    v = values[order] - gap * np.arange(n)
    for k in range(n):
        level = max(min(v[i:j].mean() for j in range(k + 1, n + 1)) for i in range(k + 1))
        result[order[k]] = level + gap * k
    return result


def label_ends(axes: Axes, ends: list[Label]) -> None:
    """Labels right of their points, each tied to its own; none on top of another of the same x."""
    axes.figure.draw_without_rendering()
    line = 1.3 * plt.rcParams["font.size"] * axes.figure.dpi / 72
    gap, shift = line / axes.bbox.height * np.ptp(axes.get_ylim()), 0.06 * np.ptp(axes.get_xlim())
    tie = {"arrowstyle": "-", "linewidth": 0.8, "shrinkA": 1, "shrinkB": 5, "relpos": (0, 0.5)}
    for x, group in itertools.groupby(sorted(ends, key=lambda end: end[0]), lambda end: end[0]):
        group = list(group)
        places = spread([y for _, y, _, _ in group], gap)
        for (_, y, text, style), place in zip(group, places, strict=True):
            arrow = {"arrowprops": tie | {"color": style["color"]}, "path_effects": HALO}
            at = {"xytext": (x + shift, place), "va": "center", "annotation_clip": False}
            axes.annotate(text, (x, y), **at, **arrow, **style)


def label_points(axes: Axes, points: list[Label]) -> None:
    """Labels beside their points, where they hide least of each other and of what is drawn."""
    axes.figure.draw_without_rendering()
    paths = [line.get_xydata() for line in axes.lines]
    paths += [path for each in axes.collections for path in each.get_segments() if len(path)]
    pairs = [pair for path in paths for pair in itertools.pairwise(axes.transData.transform(path))]
    drawn, inside, boxes = np.concatenate([np.linspace(*p, 40) for p in pairs]), axes.bbox, []
    centred = {"textcoords": "offset points", "ha": "center", "va": "center", "path_effects": HALO}
    for x, y, text, style in points:
        tie = {"arrowstyle": "-", "color": "0.6", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 7}
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
