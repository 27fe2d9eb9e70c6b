"""Figures of trajectories: where settings go in A_KA and A_ZS while updates arrive.

A trajectory frame has a row per (setting, replicate, task): `task` (0 = before the stream), `scope`
("subset" or "full"), `A_KA`, `A_ZS` and `GM` in percent. Lines are means over replicates; bands and
bars are 95% t-intervals, of which one replicate has none. Where a frame has "subset" rows, those
are drawn, because they score the same questions after every task.
"""

import textwrap
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cmp.errors import CmpError
from cmp.experiments import results, store
from cmp.experiments.claims import t_interval
from lab import chapters
from lab.figures import style

ROLES = {"adapt": "Adaptation (A_KA)", "eval": "Retention (A_ZS)", "transfer": "Transfer"}
IDEA = chapters.BOOK / "idea.svg"
IDEA_NAMES = {
    "update only": "new data alone",
    "pool only": "new + pretraining data",
    "buffer only": "new + earlier updates",
    "thirds": "new + both",
}
"""Settings of study 01 that the first page's picture shows -> what they train on."""


def summarise(trajectory: pd.DataFrame) -> pd.DataFrame:
    """Average a trajectory over replicates.

    Args:
        trajectory: A trajectory frame.

    Returns:
        Index (setting, task): the means "A_KA" and "A_ZS", the half widths of their intervals
        "A_KA half" and "A_ZS half" (NaN where n = 1), and `n`, the number of replicates.

    Raises:
        CmpError: A setting has no rows of the scope that is drawn.
    """
    scope = "subset" if (trajectory["scope"] == "subset").any() else "full"
    frame = trajectory[trajectory["scope"] == scope]
    if missing := set(trajectory["setting"]) - set(frame["setting"]):
        raise CmpError(f"trajectory: no {scope!r} rows of {', '.join(sorted(missing))}")
    groups = frame.groupby(["setting", "task"], sort=False, observed=True)[list(style.AXES)]
    half = groups.agg(lambda values: t_interval(values.to_numpy())[2])
    return groups.mean().join(half.add_suffix(" half")).assign(n=groups.count().min(axis=1))


def _layers(
    trajectory: pd.DataFrame, background: pd.DataFrame | None, colours: style.Colours
) -> tuple[list[tuple], str]:
    """Return (setting, rows by task, line style, label style or None) per line, and the note."""
    frames = [summarise(frame) for frame in (background, trajectory) if frame is not None]
    names = [(frame, name) for frame in frames for name in frame.index.unique("setting")]
    colours = colours or style.palette(name for _, name in names)
    layers = []
    for frame, name in names:
        look = style.line_style(list(colours).index(name), colours[name])
        label = style.bold(colours[name])
        if name in style.SPECIAL:
            look |= {"linestyle": "--", "marker": "X", "markersize": 4}
        if frame is not frames[-1]:
            look |= {"alpha": 0.35, "linewidth": 1.3, "markersize": 3.5}
            shown = name in frames[-1].index
            label = None if shown else {"color": colours[name], "alpha": 0.6}
        layers.append((name, frame.loc[name].sort_index(), look, label))
    counts = sorted(set(frames[-1]["n"]))
    note = f"Replicates: {', '.join(map(str, counts))}."
    if counts[-1] > 1:
        note += f" Means with 95% t-intervals{' where there are several' * (counts[0] == 1)}."
    note += " On fixed subsets of the tests." if "subset" in set(trajectory["scope"]) else ""
    return layers, note + (" Pale: for comparison." if background is not None else "")


def _contours(axes: Axes) -> None:
    """Draw lines of equal geometric mean, named above the axes, whose limits stay as they are."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    above = {"textcoords": "offset points", "color": "0.55", "fontsize": 10}
    for mean in MaxNLocator(8, steps=[1, 2, 5, 10]).tick_values(1, np.sqrt(right * top))[1:]:
        x = np.linspace(max(mean**2 / top, left), right, 100)
        axes.plot(x, mean**2 / x, color="0.9", linewidth=1, zorder=0)
        if left <= mean**2 / top <= right:
            axes.annotate(f"{mean:g}", (mean**2 / top, top), (0, 4), ha="center", **above)
    axes.annotate("geometric mean (%)", (right, top), (0, 20), ha="right", **above)
    axes.set(xlim=(left, right), ylim=(bottom, top))


def plot_plane(
    trajectory: pd.DataFrame, background: pd.DataFrame | None = None, colours: style.Colours = None
) -> Figure:
    """A_KA against A_ZS of each setting: a marker per evaluation, the one at the end large.

    The joint upper bound is a star at its end, because it sees all tasks at once.

    Args:
        trajectory: A trajectory frame.
        background: Another one, drawn pale.
        colours: A `palette` that several figures share.

    Returns:
        The figure.
    """
    layers, note = _layers(trajectory, background, colours)
    labels, circle = [], {"color": "white", "markeredgecolor": "0.2", "markersize": 7, "zorder": 6}
    bars = {"elinewidth": 1.4, "capsize": 3, "markeredgecolor": "white", "linestyle": ""}
    with style.canvas(9, 6.2, note) as (figure, axes):
        for name, rows, look, label in layers:
            path, pale = rows[list(style.AXES)].to_numpy(), "alpha" in look
            end = {"markersize": 7 if pale else 11, "zorder": 3 if pale else 5}
            end |= {"marker": "*", "markersize": 12 if pale else 17} if name == style.JOINT else {}
            half = rows[["A_ZS half", "A_KA half"]].iloc[-1]
            axes.errorbar(*path[-1], *half, **look | bars | end)
            labels += [(*path[-1], textwrap.fill(name, 18), label)] if label else []
            if name != style.JOINT:
                axes.plot(*path.T, **look)
                axes.plot(*path[0], "o", **circle)
                near = [text for x, y, text, _ in labels if np.hypot(*(path[0] - (x, y))) < 1.5]
                labels += [] if "before" in near else [(*path[0], "before", {"color": "0.2"})]
        axes.margins(0.12, 0.1)
        axes.set(xlabel=style.AXES["A_KA"], ylabel=style.AXES["A_ZS"])
        style.label_points(axes, labels)
        _contours(axes)
    return figure


def plot_over_tasks(trajectory: pd.DataFrame, colours: style.Colours = None) -> Figure:
    """A_KA and A_ZS over the updates learned, side by side.

    The joint upper bound is a level: its score after its last task.

    Args:
        trajectory: A trajectory frame.
        colours: A `palette` that several figures share.

    Returns:
        The figure.
    """
    layers, note = _layers(trajectory, None, colours)
    last = max(rows.index[-1] for _, rows, _, _ in layers)
    with style.canvas(12, 5, note, ncols=2) as (figure, panels):
        for axes, (column, title) in zip(panels, style.AXES.items(), strict=True):
            for name, rows, look, _ in layers:
                if name == style.JOINT:
                    rows, look = rows.iloc[[-1, -1]].set_axis([0, last]), look | {"marker": ""}
                tasks, mean, half = rows.index, rows[column], rows[f"{column} half"]
                axes.plot(tasks, mean, **look, label=name)
                band = {"color": look["color"], "alpha": 0.18, "linewidth": 0}
                axes.fill_between(tasks, mean - half, mean + half, **band)
            axes.set(xlabel="Updates learned", ylabel=title, xlim=(-0.02 * last, 1.02 * last))
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        style.label_ends(panels[1])
        figure.get_layout_engine().set(wspace=0.05)
    return figure


def plot_change_by_dataset(before: pd.DataFrame, after: pd.DataFrame) -> Figure:
    """Scores before and after by dataset, in groups by role, the largest gain first.

    Args:
        before, after: Index dataset; columns `role`, `score`, `standard_error`, `chance` (percent).

    Returns:
        The figure.
    """
    gain = (after["score"] - before["score"]).sort_values(ascending=False, kind="stable")
    roles = after["role"][gain.index]
    groups = [(title, gain.index[roles == role]) for role, title in ROLES.items()]
    rows = [row for title, names in groups if len(names) for row in (title, *names)]
    note = "Hollow: before, filled: after, with 95% intervals over concepts. Grey tick: chance"
    with style.canvas(9, 0.36 * len(rows) + 1.4, note) as (figure, axes):
        axes.set_yticks(range(len(rows)), rows)
        for y, (name, label) in enumerate(zip(rows, axes.get_yticklabels(), strict=True)):
            if name not in gain.index:
                label.set_fontweight("bold")
                continue
            colour = style.COLOURS[0 if gain[name] >= 0 else 3]
            old, new, places = before.loc[name], after.loc[name], [y - 0.13, y + 0.13]
            axes.plot([old["score"], new["score"]], places, color=colour, linewidth=3, alpha=0.35)
            for row, place, fill in zip((old, new), places, ("white", colour), strict=True):
                dot = {"fmt": "o", "color": colour, "markerfacecolor": fill, "elinewidth": 1.4}
                axes.errorbar(row["score"], place, xerr=1.96 * row["standard_error"], ms=8, **dot)
            axes.vlines(new["chance"], y - 0.3, y + 0.3, color="0.6", zorder=0)
            right = {"transform": axes.get_yaxis_transform(), "va": "center", "color": colour}
            axes.text(1.02, y, style.signed(gain[name]), **right)
        axes.tick_params(axis="y", length=0)
        axes.set(xlabel="Score (%)", ylim=(len(rows) - 0.4, -0.6))
        axes.grid(axis="x", color="0.92", zorder=-1)
    return figure


def plot_loss_drift(losses: pd.DataFrame, reference: str) -> Figure:
    """How far runs of one config differ in arithmetic: each column's distance from the reference.

    Equal losses, which a logarithm cannot show, lie on the floor.

    Args:
        losses: A row per optimizer step, a column per way of computing it.
        reference: The column that the others are compared with.

    Returns:
        The figure.
    """
    distance = losses.drop(columns=reference).sub(losses[reference], axis=0).abs()
    floor = np.floor(np.log10(distance[distance > 0].min().min())) - 1
    with style.canvas(9, 4.2, f"Bottom line: equal to {reference}, to the bit") as (figure, axes):
        axes.axhline(floor, color="0.7", linewidth=1)
        logarithms = np.log10(distance.clip(lower=10**floor))
        logarithms.plot(ax=axes, color=style.palette(distance.columns), legend=False)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_formatter(lambda power, _: f"$10^{{{power:.0f}}}$")
        axes.set(xlabel="Optimizer step", ylabel="Distance of the loss")
        style.label_ends(axes, "normal")
    return figure


def write_idea(path: Path = IDEA) -> Path:
    """Draw the first page's picture from published results, the same to the byte every time.

    Args:
        path: Where the SVG is written.

    Returns:
        The path.
    """
    trajectory = store.trajectory(results.published_metrics("01"))
    chosen = trajectory[trajectory["setting"].isin([*IDEA_NAMES, *style.SPECIAL])]
    figure = plot_plane(chosen.replace({"setting": IDEA_NAMES}))
    figure.axes[0].set_xlabel("A_KA (%): what is new is learned  \N{RIGHTWARDS ARROW}")
    figure.axes[0].set_ylabel("A_ZS (%): what was known is kept  \N{RIGHTWARDS ARROW}")
    with plt.rc_context({"svg.hashsalt": "idea", "svg.fonttype": "path"}):
        figure.savefig(path, metadata={"Date": None, "Creator": None})
    return path
