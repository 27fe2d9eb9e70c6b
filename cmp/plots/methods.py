"""Figures of update methods: two numbers of each, gains by dataset, what a budget allows."""

import itertools
from collections.abc import Mapping

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from cmp.plots import COLOURS, MARKERS, ROLES, Colours, canvas, palette
from cmp.plots.labels import label_points


def scatter(points: pd.DataFrame, x: str, y: str, colours: Colours = None) -> Figure:
    """A labelled point a setting, with intervals where there are some.

    points: index setting; columns `x` and `y` are also the axes' labels, and "`x` half", "`y` half"
    the half widths of intervals, if they are there.
    """
    colours = colours or palette(points.index)
    note = "Means with 95% t-intervals over replicates" if f"{y} half" in points else ""
    with canvas(9, 5.8, note) as (figure, axes):
        named = []
        for place, (name, row) in enumerate(points.iterrows()):
            bars = {f"{axis}err": row.get(f"{key} half") for axis, key in (("x", x), ("y", y))}
            look = {"marker": MARKERS[place // len(COLOURS) % len(MARKERS)], "markersize": 10}
            look |= {"color": colours[name], "capsize": 3, "elinewidth": 1.3, "linestyle": ""}
            axes.errorbar(row[x], row[y], **bars, **look, markeredgecolor="white")
            named.append((row[x], row[y], name, {"color": colours[name], "fontweight": "bold"}))
        axes.margins(0.14)
        axes.set(xlabel=x, ylabel=y)
        axes.plot(points[x], points[y], linestyle="", color="none")
        label_points(axes, named)
    return figure


def gains(change: pd.DataFrame, roles: Mapping[str, str]) -> Figure:
    """How much each dataset gained or lost in each setting, as a heat map.

    change: a row a dataset, a column a setting, points. roles: dataset -> role; rows are grouped by
    it, with a line between groups.
    """
    order = [name for role in ROLES for name in change.index if roles[name] == role]
    table, last = change.loc[order], np.abs(change.to_numpy()).max()
    lines = [roles[one] != roles[other] for one, other in itertools.pairwise(order)]
    with canvas(2.6 + 0.78 * table.shape[1], 1.6 + 0.36 * len(table)) as (figure, axes):
        sns.heatmap(
            table, ax=axes, cmap="PuOr", vmin=-last, vmax=last, annot=True, fmt=".0f",
            linewidths=1, annot_kws={"size": 10}, cbar_kws={"label": "Points", "shrink": 0.6},
        )  # fmt: skip
        for place in np.flatnonzero(lines):
            axes.axhline(place + 1, color="0.15", linewidth=2)
        axes.tick_params(length=0, labelsize=11)
        axes.tick_params(axis="x", rotation=40)
        for label in axes.get_xticklabels():
            label.set(ha="right", rotation_mode="anchor")
        axes.set(xlabel="", ylabel="")
    return figure


def allowed(table: pd.DataFrame) -> Figure:
    """What a step costs, and how many of them a task's budget allows: a bar a method.

    table: index method; columns `GMAFs` (memory-adjusted GFLOPs of a step) and `steps`.
    """
    with canvas(11, 1.5 + 0.42 * len(table), ncols=2, sharey=True) as (figure, (left, right)):
        places, labels = range(len(table)), list(table.index)
        costs = left.barh(places, table["GMAFs"], color=COLOURS[0])
        steps = right.barh(places, table["steps"], color=COLOURS[1])
        left.bar_label(costs, [f"{cost:,.3g}" for cost in table["GMAFs"]], padding=3, fontsize=11)
        right.bar_label(steps, [f"{count:,}" for count in table["steps"]], padding=3, fontsize=11)
        left.set_yticks(places, labels)
        left.set(ylim=(len(table) - 0.4, -0.6), xlabel="Memory-adjusted GFLOPs of a step")
        right.set(xlabel="Steps a task")
        for axes in (left, right):
            axes.margins(x=0.16)
    return figure
