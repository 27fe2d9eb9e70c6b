"""Figures of results, as pure functions of frames: one house style, one colour a setting, nothing
left open. `cmp.plots.inputs` has those of what goes into a run.

A trajectory frame has a row a (setting, replicate, task): `task` (0 = before the stream), `scope`
("subset" or "full"), `A_KA`, `A_ZS`, `GM` in percent. Lines are means over replicates, bands and
bars 95% t-intervals; with one replicate there is no interval. Where a frame has "subset" rows,
those are drawn, for they ask the same questions after every task.
"""

import contextlib
import itertools
import textwrap
from collections.abc import Iterable, Iterator
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from lab.figures import labels
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cmp.errors import CmpError
from cmp.experiments.claims import t_interval

JOINT, CONTROL = "joint", "replay-only control"
SPECIAL = {JOINT: "#222222", CONTROL: "#858585"}
COLOURS = [*sns.color_palette("colorblind").as_hex()[:5], "#56b4e9", "#882255", "#ca9161"]
MARKERS, LINES = "osD^vPh", ("-", "-.", ":")
AXES = {"A_KA": "Knowledge accumulation A_KA (%)", "A_ZS": "Zero-shot retention A_ZS (%)"}
ROLES = {"adapt": "Adaptation (A_KA)", "eval": "Retention (A_ZS)", "transfer": "Transfer"}
STYLE = {
    "font.size": 13, "axes.labelsize": 13, "xtick.labelsize": 12, "ytick.labelsize": 12,
    "axes.edgecolor": "0.4", "axes.labelcolor": "0.1", "xtick.color": "0.25", "ytick.color": "0.25",
    "axes.spines.top": False, "axes.spines.right": False, "lines.linewidth": 2.2,
    "lines.markersize": 5, "figure.dpi": 110, "figure.facecolor": "white",
}  # fmt: skip

Colours = dict[str, str] | None


@contextlib.contextmanager
def canvas(width: float, height: float, note: str = "", **grid: Any) -> Iterator[tuple]:
    """(figure, axes) in the house style; closed at the end, so that a notebook draws it once."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(width, height), layout="constrained", **grid)
        try:
            figure.supxlabel(note, x=0.01, ha="left", fontsize=10.5, color="0.4")
            yield figure, axes
            figure.draw_without_rendering()  # ticks are made now, in this style
        finally:
            plt.close(figure)


def palette(settings: Iterable[str]) -> dict[str, str]:
    """Setting -> colour, by first appearance; the upper bound and the control are never coloured.

    Hand one palette to all figures of a chapter where they show different parts of a frame.
    """
    ordinary = [name for name in dict.fromkeys(settings) if name not in SPECIAL]
    return dict(zip(ordinary, itertools.cycle(COLOURS), strict=False)) | SPECIAL


def summary(trajectory: pd.DataFrame) -> pd.DataFrame:
    """Index (setting, task): the means "A_KA" and "A_ZS", the half widths of their intervals
    "A_KA half" and "A_ZS half" (not a number where n = 1), and `n`, the number of replicates."""
    scope = "subset" if (trajectory["scope"] == "subset").any() else "full"
    frame = trajectory[trajectory["scope"] == scope]
    if lacking := set(trajectory["setting"]) - set(frame["setting"]):
        raise CmpError(f"trajectory: no {scope!r} rows of {', '.join(sorted(lacking))}")
    groups = frame.groupby(["setting", "task"], sort=False, observed=True)[list(AXES)]
    half = groups.agg(lambda values: t_interval(values.to_numpy())[2])
    return groups.mean().join(half.add_suffix(" half")).assign(n=groups.count().min(axis=1))


def _layers(
    trajectory: pd.DataFrame, background: pd.DataFrame | None, colours: Colours
) -> tuple[list[tuple[str, pd.DataFrame, dict[str, Any], dict[str, Any] | None]], str]:
    """([(setting, rows by task, line style, label style or None for no label)], what is shown).

    Those of the background come first and pale, and unlabelled where `trajectory` has them too.
    """
    frames = [summary(each) for each in (background, trajectory) if each is not None]
    layers = [(name, frame) for frame in frames for name in frame.index.unique("setting")]
    colours = colours or palette(name for name, _ in layers)
    places = {name: place for place, name in enumerate(n for n in colours if n not in SPECIAL)}
    for index, (name, frame) in enumerate(layers):
        pale, place = frame is not frames[-1], places.get(name, 0)
        style = {"color": colours[name], "marker": MARKERS[place % len(MARKERS)]}
        style["linestyle"] = LINES[place // len(COLOURS) % len(LINES)]
        style |= {"linestyle": "--", "marker": "X", "markersize": 4} if name in SPECIAL else {}
        style |= {"alpha": 0.35, "linewidth": 1.3, "markersize": 3.5} if pale else {}
        label = {"color": colours[name]} | ({"alpha": 0.6} if pale else {"fontweight": "bold"})
        label = None if pale and name in frames[-1].index else label
        layers[index] = (name, frame.loc[name].sort_index(), style, label)
    counts = sorted(set(frames[-1]["n"]))
    note = f"Replicates: {', '.join(map(str, counts))}."
    if counts[-1] > 1:
        note += f" Means with 95% t-intervals{' where there are several' * (counts[0] == 1)}."
    note += " On fixed subsets of the tests." if "subset" in set(trajectory["scope"]) else ""
    return layers, note + (" Pale: for comparison." if background is not None else "")


def _contours(axes: Axes) -> None:
    """Lines of equal geometric mean, named above the axes; the limits stay as they are."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    above = {"textcoords": "offset points", "color": "0.55", "fontsize": 10}
    for mean in MaxNLocator(8, steps=[1, 2, 5, 10]).tick_values(1, np.sqrt(right * top))[1:]:
        x = np.linspace(max(mean**2 / top, left), right, 100)
        axes.plot(x, mean**2 / x, color="0.9", linewidth=1, zorder=0)
        if left <= mean**2 / top <= right:
            axes.annotate(f"{mean:g}", (mean**2 / top, top), (0, 4), ha="center", **above)
    axes.annotate("geometric mean (%)", (right, top), (0, 20), ha="right", **above)
    axes.set(xlim=(left, right), ylim=(bottom, top))


def plane(
    trajectory: pd.DataFrame, background: pd.DataFrame | None = None, colours: Colours = None
) -> Figure:
    """A_KA against A_ZS: each setting's way through the stream, a marker a task, the end large.

    background: another trajectory frame, drawn pale. colours: a `palette` shared between figures.
    The joint upper bound is a star at its end, for it has no way through the stream.
    """
    layers, note = _layers(trajectory, background, colours)
    ends, circle = [], {"color": "white", "markeredgecolor": "0.2", "markersize": 7, "zorder": 6}
    with canvas(9, 6.2, note) as (figure, axes):
        for name, rows, style, label in layers:
            way, pale = rows[list(AXES)].to_numpy(), "alpha" in style
            error = {"xerr": rows["A_KA half"].iloc[-1], "yerr": rows["A_ZS half"].iloc[-1]}
            end = {"markersize": 7 if pale else 11, "zorder": 3 if pale else 5, "linestyle": ""}
            end |= {"marker": "*", "markersize": 12 if pale else 17} if name == JOINT else {}
            bars = {"elinewidth": 1.4, "capsize": 3, "markeredgecolor": "white"}
            axes.errorbar(*way[-1], **error, **style | end | bars)
            ends += [(*way[-1], textwrap.fill(name, 18), label)] if label else []
            if name != JOINT:
                axes.plot(*way.T, **style)
                axes.plot(*way[0], "o", **circle)
                near = [text for x, y, text, _ in ends if np.hypot(*(way[0] - (x, y))) < 1.5]
                ends += [] if "before" in near else [(*way[0], "before", {"color": "0.2"})]
        axes.margins(0.12, 0.1)
        axes.set(xlabel=AXES["A_KA"], ylabel=AXES["A_ZS"])
        labels.label_points(axes, ends)
        _contours(axes)
    return figure


def over_tasks(
    trajectory: pd.DataFrame, background: pd.DataFrame | None = None, colours: Colours = None
) -> Figure:
    """A_KA and A_ZS over the updates learned, side by side; arguments as those of `plane`.

    The joint upper bound is a level: its score after its last task.
    """
    layers, note = _layers(trajectory, background, colours)
    last = max(rows.index[-1] for _, rows, _, _ in layers)
    with canvas(12, 5, note, ncols=2) as (figure, panels):
        for axes, (column, title) in zip(panels, AXES.items(), strict=True):
            ends = []
            for name, rows, style, label in layers:
                tasks, mean, half = rows.index, rows[column], rows[f"{column} half"]
                if name == JOINT:
                    axes.axhline(mean.iloc[-1], **style | {"linewidth": 1.6, "marker": ""})
                else:
                    axes.plot(tasks, mean, **style)
                    band = {"color": style["color"], "alpha": 0.4 * style.get("alpha", 0.45)}
                    axes.fill_between(tasks, mean - half, mean + half, **band, linewidth=0)
                x = last if name == JOINT else tasks[-1]
                ends += [(x, mean.iloc[-1], name, label)] if label else []
            axes.set(xlabel="Updates learned", ylabel=title, xlim=(-0.02 * last, 1.02 * last))
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        labels.label_ends(panels[1], ends)
        figure.get_layout_engine().set(wspace=0.05)
    return figure


def change_by_dataset(before: pd.DataFrame, after: pd.DataFrame) -> Figure:
    """Scores before and after by dataset, in groups by role, the largest gain first.

    before, after: index dataset; columns `role`, `score`, `standard_error`, `chance` (percent).
    Raises `CmpError` if the two have different datasets.
    """
    if odd := set(before.index) ^ set(after.index):
        raise CmpError(f"only one of before and after has {', '.join(sorted(odd))}")
    gain = (after["score"] - before["score"]).sort_values(ascending=False, kind="stable")
    roles = after["role"][gain.index]
    groups = [(title, gain.index[roles == role]) for role, title in ROLES.items()]
    rows = [row for title, names in groups if len(names) for row in (title, *names)]
    note = "Hollow: before, filled: after, with 95% intervals over concepts. Grey tick: chance"
    with canvas(9, 0.36 * len(rows) + 1.4, note) as (figure, axes):
        axes.set_yticks(range(len(rows)), rows)
        for y, (name, label) in enumerate(zip(rows, axes.get_yticklabels(), strict=True)):
            if name not in gain.index:
                label.set_fontweight("bold")
                continue
            colour, ends = COLOURS[0 if gain[name] >= 0 else 3], (before.loc[name], after.loc[name])
            scores, places = [end["score"] for end in ends], [y - 0.13, y + 0.13]
            axes.plot(scores, places, color=colour, linewidth=3, alpha=0.35)
            for end, place, fill in zip(ends, places, ("white", colour), strict=True):
                dot = {"fmt": "o", "color": colour, "markerfacecolor": fill, "elinewidth": 1.4}
                axes.errorbar(end["score"], place, xerr=1.96 * end["standard_error"], ms=8, **dot)
            axes.vlines(ends[1]["chance"], y - 0.3, y + 0.3, color="0.6", zorder=0)
            text, at = f"{gain[name]:+.1f}".replace("-", "−"), axes.get_yaxis_transform()
            axes.text(1.02, y, text, transform=at, va="center", color=colour)
        axes.tick_params(axis="y", length=0)
        axes.set(xlabel="Score (%)", ylim=(len(rows) - 0.4, -0.6))
        axes.grid(axis="x", color="0.92", zorder=-1)
    return figure


def drift(losses: pd.DataFrame, reference: str) -> Figure:
    """How far runs of one config part in arithmetic: each column's distance from `reference`.

    losses: a row an optimizer step, a column a way of computing it. Equal losses, which a
    logarithm cannot show, lie on the floor.
    """
    others = losses.drop(columns=reference)
    distance = others.sub(losses[reference], axis=0).abs()
    floor = np.floor(np.log10(distance[distance > 0].min().min())) - 1
    with canvas(9, 4.2, f"Bottom line: equal to {reference}, to the bit") as (figure, axes):
        colours, ends = palette(others.columns), []
        axes.axhline(floor, color="0.7", linewidth=1)
        for name, values in np.log10(distance.clip(lower=10**floor)).items():
            axes.plot(values.index, values, color=colours[name])
            ends.append((values.index[-1], values.iloc[-1], name, {"color": colours[name]}))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_formatter(lambda power, _: f"$10^{{{power:.0f}}}$")
        axes.set(xlabel="Optimizer step", ylabel="Distance of the loss")
        labels.label_ends(axes, ends)
    return figure
