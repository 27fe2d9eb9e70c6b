"""Figures of update methods: two numbers of each, gains by dataset, what a budget allows."""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from lab.figures import AXES, COLOURS, LINES, MARKERS, ROLES, Colours, canvas, palette
from lab.figures.labels import label_ends, label_points
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from cmp.experiments.claims import AGGREGATES
from cmp.experiments.evidence import Evidence
from cmp.experiments.planner import Plan


def method_scatter(points: pd.DataFrame, x: str, y: str, colours: Colours = None) -> Figure:
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


def method_gains(change: pd.DataFrame, roles: Mapping[str, str]) -> Figure:
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


def allowed_steps(table: pd.DataFrame) -> Figure:
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


def merge_path(between: pd.DataFrame, here: pd.Series | None = None) -> Figure:
    """A_KA against A_ZS along a path between two models, and where one is on it.

    between: index the share of the fine-tuned model, from 0 to 1; columns "A_KA" and "A_ZS" in
    percent. here: one such row, drawn large. The dashed line is what averaging the scores, and not
    the weights, would give.
    """
    with canvas(8, 5.4, "Dashed: between the scores of both ends") as (figure, axes):
        x, y = (between[name].to_numpy() for name in AXES)
        axes.plot(x, y, color=COLOURS[0], marker="o", markersize=5)
        axes.plot(x[[0, -1]], y[[0, -1]], color="0.6", linestyle="--", linewidth=1.4)
        for place, words, down in ((0, "before", 8), (-1, "fine-tuned", -18)):
            at = {"textcoords": "offset points", "ha": "right"}
            axes.annotate(words, (x[place], y[place]), (-8, down), **at)
        if here is not None:
            look = {"color": COLOURS[1], "markersize": 14, "markeredgecolor": "0.2", "zorder": 5}
            axes.plot(here["A_KA"], here["A_ZS"], "o", **look)
            axes.annotate(
                f"share {here.name:.2f}", (here["A_KA"], here["A_ZS"]), (12, -16),
                textcoords="offset points", color=COLOURS[1], fontweight="bold",
            )  # fmt: skip
        axes.margins(0.14)
        axes.set(xlabel=AXES["A_KA"], ylabel=AXES["A_ZS"])
    return figure


def drift_figure(table: pd.DataFrame, cosines: np.ndarray) -> Figure:
    """How far each task took the weights and how far they are from the start, and the cosines
    between the tasks' steps; arguments as `cmp.merging.geometry.drift` returns them."""
    with canvas(11.5, 4.4, ncols=2, width_ratios=[1.25, 1]) as (figure, (left, right)):
        left.bar(table.index, table["step"], color=COLOURS[0], width=0.6)
        left.plot(table.index, table["away"], color=COLOURS[1], marker="o")
        last = table.index[-1]
        text = {"textcoords": "offset points", "va": "bottom", "ha": "right"}
        left.annotate("from the start", (last, table["away"].iloc[-1]), (0, 8), **text)
        left.annotate("this task", (last, table["step"].iloc[-1]), (0, 3), **text)
        left.set(xlabel="Update", ylabel="Distance (% of the length of all weights)")
        left.set_ylim(0, 1.15 * table["away"].max())
        left.set_xticks(table.index)
        sns.heatmap(
            pd.DataFrame(cosines, table.index, table.index), ax=right, annot=True, fmt=".2f",
            cmap="Blues", vmin=0, vmax=1, cbar=False, linewidths=1.5, annot_kws={"size": 11},
        )  # fmt: skip
        right.tick_params(length=0, labelrotation=0)
        right.set(title="Cosine between the steps of two updates", xlabel="", ylabel="")
        right.title.set_fontsize(13)
    return figure


SIGNS = {"+": COLOURS[0], "−": COLOURS[3]}


def plan_picture(plan: Plan, known: Evidence) -> Figure:
    """The plane of A_KA and A_ZS with the place of a plan; signs alone where there is no place."""
    return plan_signs(plan.effects) if plan.place is None else plan_place(plan, known)


def plan_place(plan: Plan, known: Evidence) -> Figure:
    """Every stored setting of the plan's model, pale, and the nearest one with its intervals."""
    x, y = AGGREGATES[:2]
    note = f"Blue: {plan.place.setting}, study {plan.place.study}, with 95% t-intervals. "
    note += "Grey: all other stored settings of this model."
    with canvas(9, 5.4, note) as (figure, axes):
        for (study, setting), run in known.runs.items():
            if run.model.name == plan.run.model.name:
                means = known.scores(study, setting)[0]["mean"]
                axes.plot(means[x], means[y], "o", color="0.8", markersize=6, zorder=1)
        scores = plan.place.scores
        mean, half = scores["mean"], scores["high"] - scores["mean"]
        look = {"marker": "o", "markersize": 11, "color": COLOURS[0], "capsize": 4, "zorder": 5}
        axes.errorbar(mean[x], mean[y], xerr=half[x], yerr=half[y], **look)
        axes.set(xlabel=AXES[x], ylabel=AXES[y])
    return figure


def plan_signs(effects: pd.DataFrame) -> Figure:
    """A row a choice, the largest effect first, and the side that it moves each aggregate to.

    effects: of a plan without numbers.
    """
    note = "Signs in the stored runs, by 95% intervals; largest effect first. "
    note += "o: no difference that is seen."
    with canvas(9, 1.6 + 0.55 * len(effects), note) as (figure, axes):
        for y, row in enumerate(effects.itertuples()):
            for x, sign in enumerate((row.A_KA, row.A_ZS)):
                text, colour = (sign, SIGNS[sign]) if sign in SIGNS else ("o", "0.55")
                axes.text(x, y, text, color=colour, ha="center", va="center", fontsize=20)
        axes.set_xticks(range(2), AGGREGATES[:2])
        axes.set_yticks(range(len(effects)), effects["choice"])
        axes.xaxis.tick_top()
        axes.tick_params(length=0)
        axes.set(xlim=(-0.6, 1.6), ylim=(len(effects) - 0.5, -0.5))
    return figure


SCALING_NOTE = "Means with 95% t-intervals over replicates. The horizontal axis is logarithmic."


def scaling_curves(
    points: pd.DataFrame, x: str, panels: dict[str, str], label: str, note: str = SCALING_NOTE,
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
            doubling_curves(axes, points[x])
            axes.set(xlabel=label, ylabel=title)
        label_ends(grid[0, -1], ends)
        figure.get_layout_engine().set(wspace=0.05)
    return figure


def doubling_curves(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic horizontal axis, whose ticks are the values that there are."""
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(sorted(set(values))))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(
        lambda value, _: f"{value:,.3g}" if value < 1e3 else f"{value:,.0f}"
    )


def rank_figure(scores: pd.DataFrame, label: str, colours: Colours = None) -> Figure:
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
