"""Figures that compare settings: scores against each other, along a quantity, over mixtures."""

import textwrap
from collections.abc import Iterable, Mapping

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lab.figures import style
from lab.surface import Surface

CORNERS = {"Pool P": (0.5, np.sqrt(0.75)), "Update D": (0.0, 0.0), "Buffer B": (1.0, 0.0)}
"""The positions of mixtures with a single part."""


def plot_scatter(points: pd.DataFrame, x: str, y: str) -> Figure:
    """Two numbers of each setting against each other, with intervals where there are some.

    Args:
        points: Rows indexed by setting, with columns `x` and `y`, whose names label the axes, and
            optionally "`x` half" and "`y` half", the half-widths of intervals, and `preliminary`,
            see `lab.analyses.mean_scores`.
        x, y: The columns.

    Returns:
        The figure.
    """
    looks, labels = style.looks(points.index), []
    dot = {"markersize": 10, "markeredgecolor": "white", "linestyle": ""}
    dot |= {"capsize": 3, "elinewidth": 1.3}
    with style.canvas(5.2, _means_note(points, [x, y])) as (figure, axes):
        for name, row in points.iterrows():
            halves = row.get(f"{y} half"), row.get(f"{x} half")
            axes.errorbar(row[x], row[y], *halves, **looks[name] | dot)
            labels.append((row[x], row[y], name, style.bold(looks[name]["color"])))
        axes.margins(0.14)
        axes.set(xlabel=x, ylabel=y)
        style.label_points(axes, labels)
    return figure


def plot_changes(points: pd.DataFrame) -> Figure:
    """What networks learned and lost during a stream, with a line per network over its peaks.

    Args:
        points: One row per peak, with columns `group`, `peak`, `A_KA` and `A_ZS`, see
            `lab.analyses.changes_since_start`. The rows of a group go from its lowest peak up.

    Returns:
        The figure.
    """
    looks, labels = style.looks(points["group"]), []
    note = "Means over streams. Numbers: the lowest and the highest peak."
    with style.canvas(5.2, note) as (figure, axes):
        for name, rows in points.groupby("group", sort=False):
            axes.plot(rows["A_KA"], rows["A_ZS"], **looks[name] | {"markersize": 7})
            middle = rows.iloc[len(rows) // 2]
            words = textwrap.fill(name, 16)
            labels.append((middle["A_KA"], middle["A_ZS"], words, style.bold(looks[name]["color"])))
            for end in rows.iloc[[0, -1]].itertuples() if len(rows) > 1 else ():
                peak = {"color": "0.4", "fontsize": 11}
                labels.append((end.A_KA, end.A_ZS, style.peak_label(end.peak), peak))
        axes.margins(0.14)
        axes.set(xlabel="Change of A_KA, in points", ylabel="Change of A_ZS, in points")
        style.label_points(axes, labels)
    return figure


def _means_note(points: pd.DataFrame, columns: Iterable[str]) -> str:
    """Return the note for a figure of means."""
    halves = points.reindex(columns=[f"{column} half" for column in columns])
    return style.interval_note(points, bool(halves.notna().any(axis=None)))


def plot_allowed_steps(table: pd.DataFrame) -> Figure:
    """What a step of each method costs, and how many of them a task's budget allows.

    Args:
        table: Rows indexed by method, with columns `GMAFs` (memory-adjusted GFLOPs of a step) and
            `steps`.

    Returns:
        The figure.
    """
    columns = {"GMAFs": "Memory-adjusted GFLOPs of a step", "steps": "Steps per update"}
    with style.canvas(1.5 + 0.42 * len(table), ncols=2, sharey=True) as (figure, panels):
        for axes, colour, column in zip(panels, style.COLOURS, columns, strict=False):
            bars = axes.barh(table.index, table[column], color=colour)
            form = "{:,.0f}" if table[column].max() >= 100 else "{:.3g}"
            axes.bar_label(bars, fmt=form, padding=3, fontsize=11)
            axes.set(xlabel=columns[column], ylim=(len(table) - 0.4, -0.6))
            axes.margins(x=0.16)
    return figure


def plot_merge_path(between: pd.DataFrame, chosen: pd.Series) -> Figure:
    """A_KA against A_ZS along a path between two models; a large point is the share that is chosen.

    The dashed line is what averaging the scores, and not the weights, would give.

    Args:
        between: Rows indexed by the share of the fine-tuned model, from 0 to 1, with columns "A_KA"
            and "A_ZS" in percent.
        chosen: A row to draw large; its name is the share.

    Returns:
        The figure.
    """
    with style.plane(5.4, "Dashed: averages of the scores.") as (figure, axes):
        x, y = (between[name].to_numpy() for name in style.AXES)
        axes.plot(x, y, color=style.COLOURS[0], marker="o", markersize=5)
        axes.plot(x[[0, -1]], y[[0, -1]], color="0.6", linestyle="--", linewidth=1.4)
        point, colour = (chosen["A_KA"], chosen["A_ZS"]), style.COLOURS[1]
        axes.plot(*point, "o", color=colour, markersize=14, markeredgecolor="0.2", zorder=5)
        labels = [(*point, f"share {chosen.name:.2f}", style.bold(colour))]
        labels += [(x[0], y[0], "before", {}), (x[-1], y[-1], "fine-tuned", {})]
        axes.margins(0.14)
        style.label_points(axes, labels)
    return figure


def plot_curves(points: pd.DataFrame, x: str, panels: Mapping[str, str], label: str) -> Figure:
    """A line per group over a quantity on a logarithmic axis, a panel per column.

    Groups are slightly offset, so that intervals do not hide each other.

    Args:
        points: One row per point, with columns `group`, `x`, those of `panels`, "`column` half" for
            the half-widths of intervals, and `preliminary`, see `lab.analyses.mean_scores`.
        x: The column of the quantity.
        panels: Column -> label of its axis.
        label: The label of the horizontal axis.

    Returns:
        The figure.
    """
    looks, ticks = style.looks(points["group"]), sorted(set(points[x]))
    note = f"{_means_note(points, panels)} The horizontal axis is logarithmic."
    grid = {"nrows": len(panels), "squeeze": False, "sharex": True}
    with style.canvas(2.9 * len(panels) + 0.9, note.strip(), **grid) as (figure, column_of):
        for axes, (column, title) in zip(column_of[:, 0], panels.items(), strict=True):
            for place, (name, rows) in enumerate(points.groupby("group", sort=False)):
                rows, look = rows.sort_values(x), looks[name] | {"markersize": 7, "capsize": 3}
                beside = rows[x] * 1.03 ** (place - (len(looks) - 1) / 2)
                bars = axes.errorbar(beside, rows[column], rows.get(f"{column} half"), **look)
                bars[0].set_label(name if len(looks) > 1 else "_")
            axes.set_xscale("log")
            axes.set_xticks(ticks, [f"{tick:,g}" for tick in ticks])
            axes.minorticks_off()
            axes.set_ylabel(title)
            style.label_ends(axes)
        axes.set_xlabel(label)
    return figure


def plot_lines_between(scored: pd.DataFrame, score: str) -> Figure:
    """Scores of models on straight lines between pairs of models, in the space of weights.

    Args:
        scored: One column per line, indexed by the second model's share of the average.
        score: The label of the score.

    Returns:
        The figure.
    """
    with style.canvas(4.2) as (figure, axes):
        for name, look in style.looks(scored.columns).items():
            axes.plot(scored.index, scored[name], **look | {"markersize": 7}, label=name)
        axes.set_xticks(scored.index)
        axes.set(
            xlabel="Share of the second model", ylabel=style.with_subscripts(score), ylim=(0, None)
        )
        style.label_ends(axes)
    return figure


def plot_spread(spread: pd.DataFrame) -> Figure:
    """How far settings lie apart after each update, a line per group of settings.

    Args:
        spread: The result of `lab.analyses.spread_over_tasks`.

    Returns:
        The figure.
    """
    last = spread.index[-1]
    with style.canvas(4.2, "Grey: the middle half of the stream.") as (figure, axes):
        axes.axvspan(0.25 * last, 0.75 * last, color="0.93", zorder=0)
        for name, look in style.looks(spread.columns).items():
            axes.plot(spread.index, spread[name], **look, label=name)
        axes.set(xlabel="Updates learned", ylabel="Spread of A_KA (points)", ylim=(0, None))
        style.mark_updates(axes)
        style.label_ends(axes)
    return figure


def plot_triangles(surface: Surface) -> Figure:
    """Both aggregates over the triangle of mixtures, interpolated between the means of stored runs.

    Args:
        surface: The stored runs; the setting "thirds" is labelled.

    Returns:
        The figure.
    """
    corners = np.array(list(CORNERS.values()))
    places, means = surface.shares @ corners, surface.scores.mean(axis=0)
    aside = 0.045 * ((surface.shares[:, 2] == 0) * 1.0 - (surface.shares[:, 1] == 0))  # off edges
    note = f"Means over {len(surface.scores)} bases at the points; between them, "
    with style.canvas(4.9, f"{note}linear interpolation.", ncols=2) as (figure, panels):
        for axes, values, title in zip(panels, means.T, style.AXES.values(), strict=True):
            levels = MaxNLocator(9).tick_values(values.min(), values.max())
            shade = axes.tricontourf(*places.T, values, levels=levels, cmap="cividis")
            axes.plot(*corners[[0, 1, 2, 0]].T, color="0.3", linewidth=1)
            for name, (x, y) in CORNERS.items():
                axes.text(x, y + (0.06 if y else -0.06), name, ha="center", va="center")
            axes.plot(*places.T, "o", color="white", markeredgecolor="0.2", markersize=5)
            halo = {"ha": "center", "fontsize": 11, "path_effects": style.HALO}
            for name, (x, y), side, value in zip(surface.names, places, aside, values, strict=True):
                words, weight = f"{value:.0f}", "normal"
                if name == "thirds":
                    words, weight = f"{name} {words}", "bold"
                axes.text(x + side, y + 0.024, words, fontweight=weight, **halo)
            axes.set_axis_off()
            axes.set(aspect="equal", xlim=(-0.12, 1.12), ylim=(-0.09, 0.95))
            bar = figure.colorbar(shade, ax=axes, location="bottom", pad=0.02, shrink=0.9)
            bar.set_label(title, fontsize=12)
            bar.ax.tick_params(labelsize=10.5)
    return figure
