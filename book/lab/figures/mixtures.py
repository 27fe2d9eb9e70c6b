"""Figures of what goes with what: scores over the triangle of mixtures, and along one quantity."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from lab.analyses import Surface
from lab.figures import AXES, COLOURS, canvas
from lab.figures.labels import HALO, label_points
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from cmp.experiments.claims import by_replicate, t_interval

CORNERS = {"P": (0.5, np.sqrt(0.75)), "D": (0.0, 0.0), "B": (1.0, 0.0)}
"""Where the mixtures of a single part lie: pool above, update left, buffer right."""
TITLES = {"P": "Pool P", "D": "Update D", "B": "Buffer B"}


def flat(shares: np.ndarray) -> np.ndarray:
    """Places in the plane, [n, 2], of mixtures, [n, 3]: P, D and B."""
    return np.asarray(shares) @ np.array(list(CORNERS.values()))


def triangles(surface: Surface) -> Figure:
    """Both aggregates over the triangle of mixtures, interpolated between its runs, whose means
    stand at their places."""
    places, means = flat(surface.shares), surface.scores.mean(axis=0)
    count = len(surface.scores)
    note = f"Means over {count} replicates at the points; between them, linear interpolation"
    with canvas(12, 5.4, note, ncols=2) as (figure, panels):
        for axes, values, title in zip(panels, means.T, AXES.values(), strict=True):
            levels = MaxNLocator(9).tick_values(values.min(), values.max())
            shade = axes.tricontourf(*places.T, values, levels=levels, cmap="cividis")
            _frame(axes)
            axes.plot(*places.T, "o", color="white", markeredgecolor="0.2", markersize=5)
            for (x, y), value in zip(places, values, strict=True):
                text = axes.text(x, y + 0.022, f"{value:.0f}", ha="center", fontsize=11)
                text.set_path_effects(HALO)
            axes.set_title(title, fontsize=13, pad=16)
            figure.colorbar(shade, ax=axes, shrink=0.75, pad=0.02).ax.tick_params(labelsize=10)
    return figure


def _frame(axes: Axes) -> None:
    """The triangle's edges and the names of its corners, without axes."""
    corners = np.array([*CORNERS.values(), CORNERS["P"]])
    axes.plot(*corners.T, color="0.3", linewidth=1)
    for key, (x, y) in CORNERS.items():
        above = key == "P"
        axes.text(x, y + (0.075 if above else -0.055), TITLES[key], ha="center", va="center")
    axes.set_axis_off()
    axes.set(aspect="equal", xlim=(-0.14, 1.14), ylim=(-0.09, 0.98))


def along(
    trajectory: pd.DataFrame,
    values: Mapping[str, float],
    label: str,
    levels: Mapping[str, str] | None = None,
    log: bool = True,
) -> Figure:
    """Both aggregates at the end of the stream along a quantity, with 95% t-intervals.

    values: setting -> its quantity; label: the quantity's name and unit. levels: settings without
    one, drawn as dashed levels, and what to call them.
    """
    table = by_replicate(trajectory)
    order = sorted(values, key=values.get)
    x, counts = [values[name] for name in order], set()
    with canvas(12, 4.4, "Means with 95% t-intervals over replicates", ncols=2) as (figure, panels):
        for axes, (column, title) in zip(panels, AXES.items(), strict=True):
            found = [t_interval(table[column, name].dropna().to_numpy()) for name in order]
            y, half = [each[0] for each in found], [each[2] for each in found]
            bars = {"marker": "o", "markersize": 8, "capsize": 4, "elinewidth": 1.4}
            axes.errorbar(x, y, yerr=half, color=COLOURS[0], **bars)
            counts |= {int(table[column, name].notna().sum()) for name in order}
            for colour, (name, words) in zip(COLOURS[1:], (levels or {}).items(), strict=False):
                level = float(table[column, name].mean())
                axes.axhline(level, color=colour, linestyle="--", linewidth=1.6)
                text = {"transform": axes.get_yaxis_transform(), "ha": "right", "va": "bottom"}
                axes.text(0.995, level, words, color=colour, fontsize=11, **text)
            if log:
                axes.set_xscale("log")
                axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.set_xticks(x, [f"{value:g}" for value in x])
            axes.minorticks_off()
            axes.set(xlabel=label, ylabel=title)
    return figure


def against(points: pd.DataFrame, x: str, labels: Mapping[str, str]) -> Figure:
    """Both aggregates against another number of each setting, a labelled point a setting.

    points: index setting; columns `x`, "A_KA" and "A_ZS". labels: column -> what the axis says.
    """
    with canvas(12, 4.8, ncols=2) as (figure, panels):
        for axes, column, colour in zip(panels, AXES, COLOURS, strict=False):
            axes.plot(points[x], points[column], "o", color=colour, markersize=8)
            axes.set(xlabel=labels[x], ylabel=AXES[column])
            axes.margins(0.12)
            named = [
                (row[x], row[column], str(name), {"color": "0.25", "fontsize": 10})
                for name, row in points.iterrows()
            ]
            axes.plot(points[x], points[column], linestyle="", color="none")
            label_points(axes, named)
    return figure
