"""Figures of scaling: curves over compute or over the number of updates, and rankings by model."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from cmp.plots import COLOURS, LINES, MARKERS, Colours, canvas, palette
from cmp.plots.labels import label_ends

NOTE = "Means with 95% t-intervals over replicates. The horizontal axis is logarithmic."


def curves(
    points: pd.DataFrame, x: str, panels: dict[str, str], label: str, note: str = NOTE,
    colours: Colours = None,
) -> Figure:  # fmt: skip
    """A line a group over a quantity that doubles, a panel a column.

    points: a row a point; columns `group`, `x`, those of `panels` (column -> title of its axis) and
    "`column` half", the half width of its interval. label: of the horizontal axis.
    """
    names = list(dict.fromkeys(points["group"]))
    colours = colours or palette(names)
    with canvas(3.7 * len(panels) + 1.3, 4.4, note, ncols=len(panels), squeeze=False) as (
        figure,
        grid,
    ):
        for axes, (column, title) in zip(grid[0], panels.items(), strict=True):
            ends = []
            for place, name in enumerate(names):
                rows = points[points["group"] == name].sort_values(x)
                look = {"color": colours[name], "marker": MARKERS[place % len(MARKERS)]}
                look |= {"linestyle": LINES[place // len(COLOURS)], "markersize": 7, "capsize": 3}
                axes.errorbar(rows[x], rows[column], yerr=rows.get(f"{column} half"), **look)
                style = {"color": colours[name], "fontweight": "bold"}
                ends.append((rows[x].iloc[-1], rows[column].iloc[-1], name, style))
            doubling(axes, points[x])
            axes.set(xlabel=label, ylabel=title)
        label_ends(grid[0, -1], ends)
        figure.get_layout_engine().set(wspace=0.05)
    return figure


def doubling(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic horizontal axis, whose ticks are the values that there are."""
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(sorted(set(values))))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(
        lambda value, _: f"{value:,.3g}" if value < 1e3 else f"{value:,.0f}"
    )


def rankings(scores: pd.DataFrame, label: str, colours: Colours = None) -> Figure:
    """Who is first, second and last in each model: a line a setting, the best on top.

    scores: a row a setting, a column a model, higher is better; label: what they are scores of.
    """
    ranks = scores.rank(ascending=False)
    colours = colours or palette(scores.index)
    places = np.arange(scores.shape[1])
    with canvas(2.4 * scores.shape[1] + 2.2, 0.46 * len(scores) + 1.6, label) as (figure, axes):
        ends = []
        for place, (name, row) in enumerate(ranks.iterrows()):
            look = {"color": colours[name], "marker": MARKERS[place % len(MARKERS)]}
            look |= {"linestyle": LINES[place // len(COLOURS)], "markersize": 10}
            axes.plot(places, row, **look, markeredgecolor="white")
            for at, (rank, score) in enumerate(zip(row, scores.loc[name], strict=True)):
                above = {"textcoords": "offset points", "ha": "center", "fontsize": 9.5}
                axes.annotate(f"{score:.1f}", (at, rank), (0, 8), color="0.35", **above)
            style = {"color": colours[name], "fontweight": "bold"}
            ends.append((places[-1], row.iloc[-1], name, style))
        axes.set_xticks(places, scores.columns)
        axes.set_yticks(range(1, len(scores) + 1))
        axes.set(ylim=(len(scores) + 0.6, 0.2), xlim=(-0.3, places[-1] + 0.3), ylabel="Rank")
        label_ends(axes, ends)
    return figure
