"""Figures that compare settings: scores against each other, along a quantity, over mixtures; and
claims, each with the interval of its difference, and where it is true."""

import itertools
import textwrap
from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cmp.experiments.claims import MEASURE_WORDS, REFUTED, SUPPORTED, UNDECIDED, setting_means
from cmp.experiments.evidence import Evidence
from cmp.experiments.planner import Plan
from lab.analyses import Surface
from lab.figures import style
from lab.figures.runs import ROLES
from lab.scoreboard import HELD, TRANSFER, UNPUBLISHED

CORNERS = {"Pool P": (0.5, np.sqrt(0.75)), "Update D": (0.0, 0.0), "Buffer B": (1.0, 0.0)}
"""Where the mixtures of a single part lie."""
MEANS_NOTE = "Means with 95% t-intervals over replicates"
LOG_NOTE = f"{MEANS_NOTE}. The horizontal axis is logarithmic."
LOOKS = {
    SUPPORTED: (style.COLOURS[0], "o"),
    REFUTED: (style.COLOURS[3], "X"),
    UNDECIDED: ("#6b6b6b", "s"),
    UNPUBLISHED: ("0.55", ""),
}
"""Verdict -> colour and marker."""
UNITS = {
    "points": ("Difference{} (points)", ".1f"),
    "rank correlation": ("Rank correlation{}", ".2f"),
}
"""Unit -> label of the axis, with room for the measure, and the form of numbers."""
MEASURES = MEASURE_WORDS | {"end": " at the end of the stream"}
"""When the difference is taken -> words for it, which stand in the rows where these differ."""
NOTE = "Shaded: where the claim is true; its edges are the margins. Bars: the verdicts' intervals."
HELD_COLOURS = dict(zip(HELD, ("#2b7bba", "#b7d4ea", "#f3d3b8", "#d1782f"), strict=True))
HELD_NOTE = (
    f"Blue: on the expected side; orange: on the other. Deep and bold: {HELD[0]}, by the "
    "95% interval. Pale: by the sign of the mean."
)


def plot_scatter(points: pd.DataFrame, x: str, y: str, colours: style.Colours = None) -> Figure:
    """Two numbers of each setting against each other, with intervals where there are some.

    Args:
        points: Index setting; columns `x` and `y`, whose names are also the axes' labels, and if
            they are there "`x` half" and "`y` half", the half widths of intervals.
        x, y: Columns.
        colours: A `palette` that several figures share.

    Returns:
        The figure.
    """
    colours, labels = colours or style.palette(points.index), []
    dot = {"markersize": 10, "markeredgecolor": "white", "linestyle": ""}
    dot |= {"capsize": 3, "elinewidth": 1.3}
    with style.canvas(9, 5.8, MEANS_NOTE if f"{y} half" in points else "") as (figure, axes):
        for place, (name, row) in enumerate(points.iterrows()):
            look = style.line_style(place // len(style.COLOURS), colours[name]) | dot
            axes.errorbar(row[x], row[y], row.get(f"{y} half"), row.get(f"{x} half"), **look)
            labels.append((row[x], row[y], name, style.bold(colours[name])))
        axes.margins(0.14)
        axes.set(xlabel=x, ylabel=y)
        axes.plot(points[x], points[y], linestyle="", color="none")  # labels keep off all points
        style.label_points(axes, labels)
    return figure


def plot_against(points: pd.DataFrame, x: str, label: str) -> Figure:
    """Both aggregates against another number of each setting, a labelled point per setting.

    Args:
        points: Index setting; columns `x`, "A_KA" and "A_ZS".
        x: A column.
        label: What it measures, with its unit.

    Returns:
        The figure.
    """
    with style.canvas(12, 4.8, ncols=2) as (figure, panels):
        for axes, column, colour in zip(panels, style.AXES, style.COLOURS, strict=False):
            axes.plot(points[x], points[column], "o", color=colour, markersize=8)
            axes.margins(0.12)
            axes.set(xlabel=label, ylabel=style.AXES[column])
            rows, small = points[[x, column]].itertuples(), {"color": "0.25", "fontsize": 10}
            style.label_points(axes, [(*place, name, small) for name, *place in rows])
    return figure


def plot_gains(change: pd.DataFrame, roles: Mapping[str, str]) -> Figure:
    """How much each dataset gained or lost in each setting, as a heat map.

    Args:
        change: A row per dataset, a column per setting, in points.
        roles: Dataset -> role; rows are grouped by it, with a line between groups.

    Returns:
        The figure.
    """
    order = [name for role in ROLES for name in change.index if roles[name] == role]
    table, largest = change.loc[order], np.abs(change.to_numpy()).max()
    borders = [roles[one] != roles[other] for one, other in itertools.pairwise(order)]
    shade = {"cmap": "PuOr", "vmin": -largest, "vmax": largest, "annot": True, "fmt": ".0f"}
    with style.canvas(2.6 + 0.78 * table.shape[1], 1.6 + 0.36 * len(table)) as (figure, axes):
        style.heatmap(axes, table, **shade, cbar_kws={"label": "Points", "shrink": 0.6})
        for place in np.flatnonzero(borders):
            axes.axhline(place + 1, color="0.15", linewidth=2)
        plt.setp(axes.get_xticklabels(), rotation=40, ha="right", rotation_mode="anchor")
    return figure


def plot_allowed_steps(table: pd.DataFrame) -> Figure:
    """What a step of each method costs, and how many of them a task's budget allows.

    Args:
        table: Index method; columns `GMAFs` (memory-adjusted GFLOPs of a step) and `steps`.

    Returns:
        The figure.
    """
    columns = {"GMAFs": "Memory-adjusted GFLOPs of a step", "steps": "Steps per task"}
    with style.canvas(11, 1.5 + 0.42 * len(table), ncols=2, sharey=True) as (figure, panels):
        for axes, colour, column in zip(panels, style.COLOURS, columns, strict=False):
            bars = axes.barh(table.index, table[column], color=colour)
            form = "{:,.3g}" if column == "GMAFs" else "{:,}"
            axes.bar_label(bars, fmt=form, padding=3, fontsize=11)
            axes.set(xlabel=columns[column], ylim=(len(table) - 0.4, -0.6))
            axes.margins(x=0.16)
    return figure


def plot_merge_path(between: pd.DataFrame, chosen: pd.Series) -> Figure:
    """A_KA against A_ZS along a path between two models; a large point is the share that is chosen.

    The dashed line is what averaging the scores, and not the weights, would give.

    Args:
        between: Index the share of the fine-tuned model, from 0 to 1; columns "A_KA" and "A_ZS" in
            percent.
        chosen: One such row, drawn large; its name is the share.

    Returns:
        The figure.
    """
    with style.canvas(8, 5.4, "Dashed: between the scores of both ends") as (figure, axes):
        x, y = (between[name].to_numpy() for name in style.AXES)
        axes.plot(x, y, color=style.COLOURS[0], marker="o", markersize=5)
        axes.plot(x[[0, -1]], y[[0, -1]], color="0.6", linestyle="--", linewidth=1.4)
        beside = {"textcoords": "offset points"}
        for place, words, down in ((0, "before", 8), (-1, "fine-tuned", -18)):
            axes.annotate(words, (x[place], y[place]), (-8, down), ha="right", **beside)
        point, colour = (chosen["A_KA"], chosen["A_ZS"]), style.COLOURS[1]
        axes.plot(*point, "o", color=colour, markersize=14, markeredgecolor="0.2", zorder=5)
        axes.annotate(f"share {chosen.name:.2f}", point, (12, -16), **beside, **style.bold(colour))
        axes.margins(0.14)
        axes.set(xlabel=style.AXES["A_KA"], ylabel=style.AXES["A_ZS"])
    return figure


def plot_weight_drift(table: pd.DataFrame, cosines: np.ndarray) -> Figure:
    """How far each task moved the weights, how far they are from the start, and cosines of moves.

    Args:
        table, cosines: As `analyses.weight_drift` returns them.

    Returns:
        The figure.
    """
    with style.canvas(11.5, 4.4, ncols=2, width_ratios=[1.25, 1]) as (figure, (left, right)):
        left.bar(table.index, table["step"], color=style.COLOURS[0], width=0.6)
        left.plot(table.index, table["away"], color=style.COLOURS[1], marker="o")
        text = {"textcoords": "offset points", "va": "bottom", "ha": "right"}
        for column, words, up in (("away", "from the start", 8), ("step", "this task", 3)):
            left.annotate(words, (table.index[-1], table[column].iloc[-1]), (0, up), **text)
        left.set(xlabel="Update", ylabel="Distance (% of the length of all weights)")
        left.set(ylim=(0, 1.15 * table["away"].max()), xticks=table.index)
        frame = pd.DataFrame(cosines, table.index, table.index)
        shade = {"annot": True, "fmt": ".2f", "cmap": "Blues", "vmin": 0, "vmax": 1, "cbar": False}
        style.heatmap(right, frame, **shade)
        right.set_title("Cosine between the steps of two updates", fontsize=13)
    return figure


def plot_plan(plan: Plan, evidence: Evidence) -> Figure:
    """Where the stored setting nearest to a plan ended, among all other stored settings.

    Args:
        plan: A plan; one without a place among the stored runs has no mark.
        evidence: What the stored runs say.

    Returns:
        The figure.
    """
    model = plan.run.model.name
    stored = {key for key, run in evidence.runs.items() if run.model.name == model}
    note = f"Grey: stored settings of {model if stored else 'other models'}."
    if plan.place is not None:
        note = f"Blue: {plan.place.setting}, study {plan.place.study}, with 95% t-intervals. {note}"
    with style.canvas(9, 5.4, note) as (figure, axes):
        for study, trajectory in evidence.trajectories.items():
            means = setting_means(trajectory)
            shown = [name for name in means.index if not stored or (study, name) in stored]
            points = means.loc[shown, list(style.AXES)].to_numpy()
            axes.plot(*points.T, "o", color="0.8", markersize=6, zorder=1)
        if plan.place is not None:
            mean, high = plan.place.scores.loc[list(style.AXES), ["mean", "high"]].to_numpy(float).T
            look = {"marker": "o", "markersize": 11, "color": style.COLOURS[0], "capsize": 4}
            axes.errorbar(*mean, *(high - mean)[::-1], zorder=5, **look)
        axes.set(xlabel=style.AXES["A_KA"], ylabel=style.AXES["A_ZS"])
    return figure


def plot_curves(
    points: pd.DataFrame, x: str, panels: Mapping[str, str], label: str, note: str = LOG_NOTE,
    colours: style.Colours = None,
) -> Figure:  # fmt: skip
    """A line per group over a quantity on a logarithmic axis, a panel per column.

    Args:
        points: A row per point; columns `group`, `x`, those of `panels`, and "`column` half", the
            half width of its interval.
        x: The column of the quantity.
        panels: Column -> title of its axis.
        label: Of the horizontal axis.
        note: A line below the panels.
        colours: Group -> colour.

    Returns:
        The figure.
    """
    groups = points.groupby("group", sort=False)
    colours = colours or style.palette(points["group"])
    size, ticks = (3.7 * len(panels) + 1.3, 4.4), sorted(set(points[x]))
    with style.canvas(*size, note, ncols=len(panels), squeeze=False) as (figure, [grid]):
        for axes, (column, title) in zip(grid, panels.items(), strict=True):
            for place, (name, rows) in enumerate(groups):
                rows = rows.sort_values(x)
                look = style.line_style(place, colours[name]) | {"markersize": 7, "capsize": 3}
                bars = axes.errorbar(rows[x], rows[column], rows.get(f"{column} half"), **look)
                bars[0].set_label(name if len(groups) > 1 else "_")
            axes.set_xscale("log")
            axes.set_xticks(ticks, [f"{tick:,g}" for tick in ticks])
            axes.minorticks_off()
            axes.set(xlabel=label, ylabel=title)
        style.label_ends(grid[-1])
        figure.get_layout_engine().set(wspace=0.05)
    return figure


def plot_along(
    trajectory: pd.DataFrame, values: Mapping[str, float], label: str, levels: Mapping[str, str]
) -> Figure:
    """Both aggregates at the end of the stream along a quantity, with 95% t-intervals.

    Args:
        trajectory: A trajectory frame.
        values: Setting -> its quantity.
        label: The quantity's name and unit.
        levels: Settings without a quantity, drawn as dashed levels -> what they are called.

    Returns:
        The figure.
    """
    means = setting_means(trajectory)
    points = means.loc[list(values)].assign(group="", x=list(values.values()))
    colours = {"": style.COLOURS[0]}
    figure = plot_curves(points, "x", style.AXES, label, MEANS_NOTE, colours)
    for axes, column in zip(figure.axes, style.AXES, strict=True):
        for colour, (name, words) in zip(style.COLOURS[1:], levels.items(), strict=False):
            axes.axhline(means.loc[name, column], color=colour, linestyle="--", linewidth=1.6)
            at = {"transform": axes.get_yaxis_transform(), "ha": "right", "va": "bottom"}
            axes.text(0.995, means.loc[name, column], words, color=colour, fontsize=11, **at)
    return figure


def plot_ranks(scores: pd.DataFrame, label: str) -> Figure:
    """Which setting is first, second and last with each model: a line per setting, best on top.

    Args:
        scores: A row per setting, a column per model, higher is better.
        label: What the scores are.

    Returns:
        The figure.
    """
    ranks, places = scores.rank(ascending=False), np.arange(scores.shape[1])
    colours = style.palette(scores.index)
    above = {"textcoords": "offset points", "ha": "center", "fontsize": 9.5, "color": "0.35"}
    size = (2.4 * len(places) + 2.2, 0.46 * len(scores) + 1.6)
    with style.canvas(*size, label) as (figure, axes):
        for place, (name, row) in enumerate(ranks.iterrows()):
            look = style.line_style(place, colours[name]) | {"markeredgecolor": "white"}
            axes.plot(places, row, **look, markersize=10, label=name)
            for point, score in zip(enumerate(row), scores.loc[name], strict=True):
                axes.annotate(f"{score:.1f}", point, (0, 8), **above)
        axes.set_xticks(places, scores.columns)
        axes.set_yticks(range(1, len(scores) + 1))
        axes.set(ylim=(len(scores) + 0.6, 0.2), xlim=(-0.3, places[-1] + 0.3), ylabel="Rank")
        style.label_ends(axes)
    return figure


def plot_triangles(surface: Surface) -> Figure:
    """Both aggregates over the triangle of mixtures, interpolated between the means of stored runs.

    Args:
        surface: The stored runs.

    Returns:
        The figure.
    """
    corners = np.array(list(CORNERS.values()))
    places, means = surface.shares @ corners, surface.scores.mean(axis=0)
    note = f"Means over {len(surface.scores)} replicates at the points; between them, "
    with style.canvas(12, 5.4, f"{note}linear interpolation", ncols=2) as (figure, panels):
        for axes, values, title in zip(panels, means.T, style.AXES.values(), strict=True):
            levels = MaxNLocator(9).tick_values(values.min(), values.max())
            shade = axes.tricontourf(*places.T, values, levels=levels, cmap="cividis")
            axes.plot(*corners[[0, 1, 2, 0]].T, color="0.3", linewidth=1)
            for name, (x, y) in CORNERS.items():
                axes.text(x, y + (0.075 if y else -0.055), name, ha="center", va="center")
            axes.plot(*places.T, "o", color="white", markeredgecolor="0.2", markersize=5)
            halo = {"ha": "center", "fontsize": 11, "path_effects": style.HALO}
            for (x, y), value in zip(places, values, strict=True):
                axes.text(x, y + 0.022, f"{value:.0f}", **halo)
            axes.set_axis_off()
            axes.set(aspect="equal", xlim=(-0.14, 1.14), ylim=(-0.09, 0.98))
            axes.set_title(title, fontsize=13, pad=16)
            figure.colorbar(shade, ax=axes, shrink=0.75, pad=0.02).ax.tick_params(labelsize=10)
    return figure


def plot_claims(verdicts: pd.DataFrame) -> Figure:
    """Each claim's estimate with its interval, and the region in which the claim is true.

    Verdicts differ in colour, in marker and in words. A claim without an interval has a hollow
    marker, one without replicates none.

    Args:
        verdicts: Rows of one unit as `cmp.experiments.claims.verdicts` returns them.

    Returns:
        The figure.
    """
    (label, form), names = UNITS[verdicts["unit"].iloc[0]], []
    measures = [MEASURES[at] for at in verdicts["at"].unique()]
    with style.canvas(11, 1.5 + 0.95 * len(verdicts), NOTE) as (figure, axes):
        shown = verdicts[["estimate", "low", "high", "above", "below"]].to_numpy(float)
        shown = np.append(shown[np.isfinite(shown)], 0)
        air = 0.1 * np.ptp(shown)
        axes.set(xlim=(shown.min() - air, shown.max() + air), ylim=(len(verdicts) - 0.5, -0.5))
        for place, (name, row) in enumerate(verdicts.iterrows()):
            words = f"n = {row['n']}: no interval"
            if np.isfinite(row["low"]):
                interval = f"{row['low']:{form}} to {row['high']:{form}}".replace("-", "−")
                words = f"{interval} ({100 * row['level']:.3g}%)"
            _draw_claim(axes, place, row, f"{row['verdict']}\n{words}", 12)
            measure = MEASURES[row["at"]] if len(measures) > 1 else ""
            lines = (name, f"{row['what']}, {row['aggregate']}{measure}")
            names.append("\n".join(textwrap.fill(line, 34) for line in lines))
        _label_claims(axes, names, label.format(measures[0] if len(measures) == 1 else ""))
    return figure


def plot_scoreboard(claims: pd.DataFrame) -> Figure:
    """Every claim under its guideline: estimate, interval, and the verdict in words.

    Args:
        claims: As `scoreboard.claims_table` returns them. A claim whose study is not published has
            no marker.

    Returns:
        The figure.
    """
    groups = claims.groupby("guideline", sort=False)
    rows = [row for name, group in groups for row in (name, *group.to_dict("records"))]
    with style.canvas(11, 1.2 + 0.29 * len(rows), NOTE) as (figure, axes):
        bounds = claims.reindex(columns=["low", "high", "estimate"]).to_numpy(float)
        reach = 1.08 * np.nanmax(np.abs(np.append(bounds, 1.0)))
        axes.set(xlim=(-reach, reach), ylim=(len(rows) - 0.4, -0.6))
        names = [row if isinstance(row, str) else row["claim"] for row in rows]
        _label_claims(axes, names, "Difference of the two settings (points)")
        for place, (row, label) in enumerate(zip(rows, axes.get_yticklabels(), strict=True)):
            label.set(fontsize=10, fontweight="bold" if isinstance(row, str) else "normal")
            if not isinstance(row, str):
                _draw_claim(axes, place, row, row["verdict"], 10)
    return figure


def _draw_claim(axes: Axes, place: int, row: dict | pd.Series, words: str, size: float) -> None:
    """Draw a claim's region, margins, interval and marker, and its words at the right."""
    (left, right), (colour, marker) = axes.get_xlim(), LOOKS[row["verdict"]]
    beside = {"transform": axes.get_yaxis_transform(), "va": "center", "fontsize": size}
    axes.text(1.01, place, words, color=colour, **beside)
    if row["verdict"] == UNPUBLISHED:
        return
    start, end = max(row["above"], left), min(row["below"], right)
    axes.barh(place, end - start, 0.8, start, color="#dce9f2", zorder=0)
    for margin in (row["above"], row["below"]):
        if np.isfinite(margin):
            dots = {"color": "0.55", "linewidth": 1.2, "linestyle": ":", "zorder": 1}
            axes.vlines(margin, place - 0.4, place + 0.4, **dots)
    estimate, known = row["estimate"], np.isfinite(row["low"])
    half = [[estimate - row["low"]], [row["high"] - estimate]] if known else None
    look = {"marker": marker, "markersize": 0.75 * size, "linestyle": "", "capsize": 0.3 * size}
    face = colour if known else "white"
    axes.errorbar(estimate, place, xerr=half, color=colour, markerfacecolor=face, zorder=4, **look)
    axes.set_xlim(left, right)


def _label_claims(axes: Axes, names: list[str], label: str) -> None:
    """Name the rows and the horizontal axis, and mark zero."""
    axes.axvline(0, color="0.4", linewidth=1)
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(label)


def plot_networks(networks: pd.DataFrame) -> Figure:
    """The difference of each contrast on each network, in points, coloured by how it held.

    Args:
        networks: As `scoreboard.across_networks` returns them; where there are no rows, a line
            says so.

    Returns:
        The figure.
    """
    if networks.empty:
        with style.canvas(9, 0.8, f"Study {TRANSFER} is {UNPUBLISHED}.") as (figure, axes):
            axes.set_axis_off()
        return figure
    names, contrasts = (list(networks[key].unique()) for key in ("network", "contrast"))
    size = (3.6 + 1.5 * len(names), 1.2 + 0.5 * len(contrasts))
    with style.canvas(*size, HELD_NOTE) as (figure, axes):
        for row in networks.itertuples():
            x, y = names.index(row.network), contrasts.index(row.contrast)
            axes.barh(y, 0.96, 0.92, x - 0.48, color=HELD_COLOURS[row.held])
            clear = row.held in (HELD[0], HELD[3])
            look = {"fontweight": "bold", "color": "white"} if clear else {"color": "0.15"}
            axes.text(x, y, style.signed(row.difference), ha="center", va="center", **look)
        axes.set_xticks(range(len(names)), names)
        axes.set_yticks(range(len(contrasts)), contrasts)
        axes.xaxis.tick_top()
        axes.tick_params(length=0)
        axes.set(xlim=(-0.55, len(names) - 0.45), ylim=(len(contrasts) - 0.5, -0.5))
        axes.spines[:].set_visible(False)
    return figure
