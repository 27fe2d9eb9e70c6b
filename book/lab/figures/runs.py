"""Figures of runs: their data and settings, and their A_KA and A_ZS as updates arrive.

A trajectory frame has one row per (setting, replicate, task): `task` (0 = before the stream),
`scope` ("subset" or "full"), `A_KA`, `A_ZS` and `GM` in percent. Lines are means over replicates.
Bands and bars are t-intervals over bases, at the level of the claims, in frames from
`lab.evidence.scores.study_trajectory` once all streams of a setting are published. If a frame
has "subset" rows, these are drawn, because they score the same questions after every task.
"""

import itertools
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from cmp.config import Schedule
from cmp.errors import CmpError
from cmp.runs.store import StoredRun
from lab import analyses, chapters
from lab.evidence import scores
from lab.figures import style

IDEA = chapters.BOOK / "idea.svg"
HELD = "#7a7a7a"
"""The colour of learning rates used for comparison."""
MIN_SPAN = 5.0
"""Smallest range in points of an axis with a reader's runs."""
INSET = (0.54, 0.1, 0.44, 0.46)
"""The position of a plane's inset, below the ends of runs, as fractions of its width and height."""
SMOOTH = 5
"""Steps that a point of a loss curve is the mean of."""
IN_A_ROW, MOMENTS = 7, 6
"""Images per row of a gallery, and columns of predicted names, that leave enough space for text."""
EXPONENT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
RECIPE = ("with replay", "with moments", "with more earlier data", "recipe")
"""The settings of `recipe_steps` that each add a step to the previous one."""
SCHEDULES = (
    ("cosine", "none"), ("rsqrt", "none"), ("wsd", "none"), ("infinite", "none"),
    ("cosine", "cosine"), ("rsqrt", "rsqrt"),
)  # fmt: skip
"""The curves and meta schedules that chapter 04 explains."""


def recipe_steps() -> pd.DataFrame:
    """Return the published runs that build up the recipe, as a trajectory frame.

    "with more earlier data" has the recipe's mixture and no merging, at the best of three peaks.
    """
    recipe_runs = scores.study_trajectory("recipe")
    shares = scores.study_trajectory("recipe-parts").query("setting == 'shares alone, peak 0.0006'")
    steps = pd.concat([recipe_runs, shares.assign(setting="with more earlier data")])
    return steps.query("scope == 'full' and not setting.str.startswith('first recipe')")


def summarise(trajectory: pd.DataFrame) -> pd.DataFrame:
    """Average a trajectory over replicates.

    Args:
        trajectory: A trajectory frame.

    Returns:
        Rows indexed by (setting, task): the means "A_KA" and "A_ZS", the half-widths of their
        intervals "A_KA half" and "A_ZS half" (NaN if there is none), `n`, the number of replicates,
        and `preliminary`, such as "2 of 20 streams", or "".

    Raises:
        CmpError: A setting has no rows with the scope to draw.
    """
    scope = "subset" if (trajectory["scope"] == "subset").any() else "full"
    frame = trajectory[trajectory["scope"] == scope]
    if missing := set(trajectory["setting"]) - set(frame["setting"]):
        raise CmpError(
            f"trajectory: no {scope!r} rows of {', '.join(sorted(missing))}; leave these settings "
            "out"
        )
    rows = {}
    for key, group in frame.groupby(["setting", "task"], sort=False, observed=True):
        row, progress = group[list(style.AXES)].mean().to_dict(), ""
        for name in style.AXES:
            row[f"{name} half"] = np.nan
            if "planned" in group:
                planned = int(group["planned"].iloc[0])
                mean = scores.estimate_mean(group[name], group["base"], planned)
                row[f"{name} half"], progress = mean.half, mean.progress
        rows[key] = row | {"n": len(group), "preliminary": progress}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis(["setting", "task"])


def _layers(trajectory: pd.DataFrame) -> tuple[list[tuple], str]:
    """Return (setting, rows by task, line style) for each line, and the note."""
    frame = summarise(trajectory)
    looks = style.looks(frame.index.unique("setting"))
    layers = [(name, frame.loc[name].sort_index(), look) for name, look in looks.items()]
    streams = frame["n"].groupby("setting", sort=False).max()
    usual = streams.mode().max()
    others = [f"; {name}: {n}" for name, n in streams.items() if n != usual]
    notes = [f"Means over {usual} streams{''.join(others)}."]
    notes.append(style.interval_note(frame, bool(frame["A_KA half"].notna().any())))
    notes += ["On fixed subsets of the tests."] * ("subset" in set(trajectory["scope"]))
    return layers, " ".join(filter(None, notes))


def _contours(axes: Axes) -> None:
    """Draw lines of equal geometric mean, labelled above the axes, without changing the limits."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    above = {"textcoords": "offset points", "color": "0.45", "fontsize": 10}
    for mean in MaxNLocator(8, steps=[1, 2, 5, 10]).tick_values(1, np.sqrt(right * top))[1:]:
        x = np.linspace(max(mean**2 / top, left), right, 100)
        axes.plot(x, mean**2 / x, color="0.9", linewidth=1, zorder=0)
        if left <= mean**2 / top <= right - 0.06 * (right - left):  # otherwise its arc is tiny
            axes.annotate(f"{mean:g}", (mean**2 / top, top), (0, 4), ha="center", **above)
    axes.annotate("geometric mean (%)", (right, top), (0, 20), ha="right", **above)
    axes.set(xlim=(left, right), ylim=(bottom, top))


def plot_plane(trajectory: pd.DataFrame, steps: Sequence[str] = ()) -> Figure:
    """A_KA against A_ZS of each setting: a marker per evaluation, the one at the end large.

    The joint upper bound is a star at its end, because it sees all tasks at once.

    Args:
        trajectory: A trajectory frame.
        steps: Settings that each add a step to the previous one. Their ends are joined by arrows
            and also shown enlarged.

    Returns:
        The figure.
    """
    layers, note = _layers(trajectory)
    labels, enlarged = [], {}
    circle = {"color": "white", "markeredgecolor": "0.2", "markersize": 7, "zorder": 6}
    bars = {"elinewidth": 1.4, "capsize": 3, "markeredgecolor": "white", "linestyle": ""}
    with style.plane(6.2, note) as (figure, axes):
        inset = axes.inset_axes(INSET) if steps else None
        for name, rows, look in layers:
            path, end = rows[list(style.AXES)].to_numpy(), {"markersize": 11, "zorder": 5}
            end |= {"marker": "*", "markersize": 17} if name == style.JOINT else {}
            half = rows[["A_ZS half", "A_KA half"]].iloc[-1]
            label = (*path[-1], textwrap.fill(name, 18), style.bold(look["color"]))
            axes.errorbar(*path[-1], *half, **look | bars | end)
            if name in steps:
                inset.errorbar(*path[-1], *half, **look | bars | end)
                enlarged[name] = label
            else:
                labels.append(label)
            if name != style.JOINT and name not in steps[1:]:
                axes.plot(*path.T, **look)
                axes.plot(*path[0], "o", **circle)
                near = [text for x, y, text, _ in labels if np.hypot(*(path[0] - (x, y))) < 1.5]
                labels += [] if "before" in near else [(*path[0], "before", {"color": "0.2"})]
        axes.margins(0.12, 0.1)
        if steps:
            _enlarge_steps(axes, inset, [enlarged[name] for name in steps])
        style.label_points(axes, labels)
        _contours(axes)
    return figure


def _enlarge_steps(axes: Axes, inset: Axes, labels: Sequence[tuple]) -> None:
    """Join the labelled ends of steps by arrows, in the axes and enlarged in the inset."""
    arrow = {"arrowstyle": "-|>", "color": "0.3", "shrinkA": 6, "shrinkB": 6}
    for (*start, _, _), (*end, _, _) in itertools.pairwise(labels):
        for part in (axes, inset):
            part.annotate("", end, start, arrowprops=arrow)
            part.plot(*zip(start, end, strict=True), color="0.3", linewidth=1, zorder=1)
    inset.margins(0.25, 0.3)
    inset.tick_params(labelsize=10)
    style.label_points(inset, labels)
    axes.indicate_inset_zoom(inset, edgecolor="0.5")


def plot_among_runs(own: Mapping[str, StoredRun], others: pd.DataFrame) -> Figure:
    """Final scores of your own runs, among other runs of the same size.

    Args:
        own: Runs by label.
        others: The result of `lab.analyses.runs_of_size`; settings are labelled at their means.

    Returns:
        The figure.
    """
    note = "Small marks: other runs of this size, on other streams and with other batches."
    if others.empty:
        note = "No other runs of this size are published."
    looks = style.looks(others["setting"].unique())
    with style.plane(3.6, note) as (figure, axes):
        labels = []
        for name, rows in others.groupby("setting", sort=False):
            dots = looks[name] | {"linestyle": "", "alpha": 0.5, "markersize": 5}
            axes.plot(rows["A_KA"], rows["A_ZS"], **dots)
            colour = style.bold(looks[name]["color"])
            labels.append((*rows[["A_KA", "A_ZS"]].mean(), name, colour))
        for words, run in own.items():
            metrics = run.metrics.assign(setting=words, replicate=0)
            place = analyses.ends_on_subset(metrics)[["A_KA", "A_ZS"]].iloc[0]
            axes.plot(*place, "*", color="0.1", markersize=16)
            labels.append((*place, words, style.bold("0.1")))
        axes.margins(0.15)
        for axis in (axes.xaxis, axes.yaxis):  # small differences should look small
            low, high = axis.get_view_interval()
            wider = max(0.0, MIN_SPAN - (high - low)) / 2
            axis.set_view_interval(low - wider, high + wider, ignore=True)
        style.label_points(axes, labels)
    return figure


def plot_grid(ends: pd.DataFrame) -> Figure:
    """Final scores of each grid point's runs: streams as dots around their mean.

    Args:
        ends: One row per run: the point's parameters, `run`, `A_KA` and `A_ZS`.

    Returns:
        The figure.
    """
    keys = [key for key in ends.columns if key not in ("stream_seed", "A_KA", "A_ZS")]
    note = "Small dots: single runs. Large dots: means over streams."
    with style.plane(5.4, note) as (figure, axes):
        labels, groups = [], list(ends.groupby(keys, sort=False))
        looks = style.looks(str(point) for point, _ in groups)
        for point, rows in groups:
            colour, mean = looks[str(point)]["color"], rows[["A_KA", "A_ZS"]].mean()
            axes.plot(rows["A_KA"], rows["A_ZS"], "o", color=colour, alpha=0.5, markersize=4)
            axes.plot(*mean, "o", color=colour, markersize=9)
            labels.append((*mean, ", ".join(map(str, point)), style.bold(colour)))
        axes.margins(0.15)
        style.label_points(axes, labels)
    return figure


def plot_over_tasks(trajectory: pd.DataFrame) -> Figure:
    """A_KA and A_ZS over the updates learned, one above the other.

    The joint upper bound is a horizontal line at its score after the last task.

    Args:
        trajectory: A trajectory frame.

    Returns:
        The figure.
    """
    layers, note = _layers(trajectory)
    last = max(rows.index[-1] for _, rows, _ in layers)
    with style.canvas(6.6, note, nrows=2, sharex=True) as (figure, panels):
        for axes, (column, title) in zip(panels, style.AXES.items(), strict=True):
            for name, rows, look in layers:
                if name == style.JOINT:
                    rows, look = rows.iloc[[-1, -1]].set_axis([0, last]), look | {"marker": ""}
                tasks, mean, half = rows.index, rows[column], rows[f"{column} half"]
                spaced = max(1, len(tasks) // 20)  # marks of a hundred updates would touch
                axes.plot(tasks, mean, **look, label=name, markevery=spaced)
                band = {"color": look["color"], "alpha": 0.18, "linewidth": 0}
                axes.fill_between(tasks, *np.clip([mean - half, mean + half], 0, 100), **band)
            axes.set(ylabel=title.replace(" A_", "\nA_"), xlim=(-0.02 * last, 1.02 * last))
            style.mark_updates(axes)
            style.label_ends(axes)
        axes.set_xlabel("Updates learned")
    return figure


def plot_beside(trajectory: pd.DataFrame, reference: str) -> Figure:
    """A_KA and A_ZS over the updates learned, a column per setting, each beside the same reference.

    Args:
        trajectory: A trajectory frame.
        reference: The setting that every column shows in grey.

    Returns:
        The figure.
    """
    layers, note = _layers(trajectory)
    [grey] = [layer for layer in layers if layer[0] == reference]
    others = [layer for layer in layers if layer[0] != reference]
    grid = {"nrows": 2, "ncols": len(others), "sharex": True, "sharey": "row", "squeeze": False}
    with style.canvas(5, f"Grey: {reference}. {note}", **grid) as (figure, panels):
        for column, (name, rows, look) in zip(panels.T, others, strict=True):
            for axes, measure in zip(column, style.AXES, strict=True):
                for each, colour in ((grey[1], "0.55"), (rows, look["color"])):
                    mean, half = each[measure], each[f"{measure} half"]
                    band = {"color": colour, "alpha": 0.2, "linewidth": 0}
                    axes.fill_between(each.index, mean - half, mean + half, **band)
                    axes.plot(each.index, mean, color=colour)
                style.mark_updates(axes)
            place = {"transform": column[0].transAxes, "ha": "center"}  # a title above all has none
            column[0].text(0.5, 1.04, name, **place, **style.bold(look["color"]))
        for axes, title in zip(panels[:, 0], style.AXES.values(), strict=True):
            axes.set_ylabel(title.replace(" A_", "\nA_"), fontsize=12)
        panels[-1, len(others) // 2].set_xlabel("Updates learned")
    return figure


def plot_losses(losses: Mapping[str, Sequence[float]]) -> Figure:
    """The loss of each step of training.

    Args:
        losses: The losses in order, by the name of the training.

    Returns:
        The figure.
    """
    with style.canvas(3.4) as (figure, axes):
        for name, look in style.looks(losses).items():
            steps = range(1, len(losses[name]) + 1)
            axes.plot(steps, losses[name], **look | {"marker": ""}, label=name)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(xlabel="Optimiser step", ylabel="Loss of the batch", ylim=(0, None))
        if len(losses) > 1:
            style.label_ends(axes)
    return figure


def plot_loss_drift(losses: pd.DataFrame, reference: str) -> Figure:
    """How far runs of one config differ in arithmetic: each column's distance from the reference.

    Equal losses, which a logarithmic axis cannot show, are drawn at the bottom.

    Args:
        losses: One row per optimiser step, and one column per way of computing it.
        reference: The column to compare the others with.

    Returns:
        The figure.
    """
    distance = losses.drop(columns=reference).sub(losses[reference], axis=0).abs()
    floor = np.floor(np.log10(distance[distance > 0].min().min())) - 1
    with style.canvas(4.2, f"Bottom line: equal to {reference}, to the bit.") as (figure, axes):
        axes.axhline(floor, color="0.7", linewidth=1)
        logarithms = np.log10(distance.clip(lower=10**floor))
        for name, look in style.looks(distance.columns).items():
            axes.plot(logarithms.index, logarithms[name], **look | {"marker": ""}, label=name)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_formatter(lambda power, _: f"$10^{{{power:.0f}}}$")
        axes.set(xlabel="Optimiser step", ylabel="Absolute difference of the loss")
        style.label_ends(axes)
    return figure


def write_idea(path: Path = IDEA) -> Path:
    """Draw the first page's picture from published results, byte for byte reproducible.

    Args:
        path: The path of the SVG.

    Returns:
        The path.
    """
    figure = plot_plane(recipe_steps(), RECIPE)
    named = style.with_subscripts
    figure.axes[0].set_xlabel(named("A_KA (%): what is new is learned  \N{RIGHTWARDS ARROW}"))
    figure.axes[0].set_ylabel(named("A_ZS (%): what was known is kept  \N{RIGHTWARDS ARROW}"))
    with plt.rc_context({"svg.hashsalt": "idea", "svg.fonttype": "path"}):
        figure.savefig(path, metadata={"Date": None, "Creator": None})
    return path


def plot_stream(counts: pd.DataFrame, report: pd.DataFrame | None = None) -> Figure:
    """How many classes of each dataset arrive in each update and, above that, how many images.

    Args:
        counts: The number of classes, with one column per dataset, indexed by task (1, 2, ...).
        report: A table with column `images`, indexed by task; see
            `cmp.readers.class_statistics.stream_report`.

    Returns:
        The figure.
    """
    import seaborn

    table = counts.T.set_axis([f"{name} ({total})" for name, total in counts.sum().items()])
    above = [] if report is None else [0.28]
    height = 0.42 * len(table) * (1 + sum(above)) + 1.1
    grid = {"nrows": 1 + len(above), "height_ratios": [*above, 1], "squeeze": False}
    note = "Classes; in brackets: over all updates."
    with style.canvas(height, note, **grid) as (figure, panels):
        figure.set_figwidth(max(style.WIDTH, 2.5 + 0.3 * len(counts)))  # room for the numbers
        text = {"annot": table.astype(str).mask(table == 0, ""), "fmt": "", "cbar": False}
        text["annot_kws"] = {"size": 11, "color": "0.1"}
        shade = {"cmap": "Blues", "vmin": 0, "vmax": 2 * table.to_numpy().max()}
        axes = seaborn.heatmap(table, ax=panels[-1, 0], linewidths=1.5, **text, **shade)
        axes.tick_params(length=0, labelrotation=0)
        axes.set(xlabel="Update", ylabel="")
        if report is not None:
            axes, images = panels[0, 0], report["images"]
            bars = axes.bar(range(len(images)), images, color=style.COLOURS[1], width=0.8)
            axes.bar_label(bars, images, fontsize=10)
            axes.set(xlim=(-0.5, len(images) - 0.5), ylim=(0, 1.2 * images.max()), ylabel="Images")
            axes.set(xticks=[], yticks=[])
    return figure


def over_white(images: Any) -> np.ndarray:
    """Return images [N, C, H, W] of uint8, RGBA or RGB, as RGB over white: [N, H, W, 3], 0 to 1."""
    pixels = np.asarray(images).transpose(0, 2, 3, 1) / 255
    if pixels.shape[-1] == 3:
        return pixels
    return 1 - pixels[..., 3:] * (1 - pixels[..., :3])


def plot_gallery(images: Any, titles: Sequence[str]) -> Figure:
    """Images, enlarged without smoothing, each with its name below.

    Args:
        images: uint8 array or tensor [N, 4, H, W], RGBA, shown over white.
        titles: One name per image.

    Returns:
        The figure.
    """
    pixels = over_white(images)
    rows = max(1, -(-len(pixels) // IN_A_ROW))
    below = {"ha": "center", "va": "top", "fontsize": 10.5}
    size = {"nrows": rows, "ncols": IN_A_ROW, "squeeze": False}
    with style.canvas(1.75 * rows, **size) as (figure, grid):
        for axes in grid.flat:
            axes.set_axis_off()
        for axes, image, title in zip(grid.flat, pixels, titles, strict=False):
            axes.imshow(image, interpolation="nearest")
            words, units = textwrap.fill(title, 14), ("axes fraction", "offset points")
            axes.annotate(words, (0.5, 0), (0, -5), *units, **below)
    return figure


def power_of_ten(rates: Iterable[np.ndarray]) -> tuple[float, str]:
    """Return the power of ten of which the largest learning rate is a small multiple.

    Args:
        rates: Arrays of learning rates.

    Returns:
        The power and its text, such as (0.0001, "10⁻⁴"), in plain characters, because a formula is
        slow to draw.
    """
    largest = max(float(array.max()) for array in rates)
    power = math.floor(math.log10(largest)) if largest > 0 else 0
    return 10.0**power, f"10{str(power).translate(EXPONENT)}"


def _draw_rates(axes: Axes, rates: np.ndarray, colour: str, held: bool = False) -> None:
    """Draw rates [tasks, steps] over steps, and each task's mean, shaded or, if held, dashed."""
    tasks, steps = rates.shape
    edges = np.arange(tasks + 1) * steps - 0.5
    shade, line = {"fill": True, "alpha": 0.22}, {"linewidth": 1.8}
    if held:
        shade = {"linestyle": ":", "linewidth": 1.3, "baseline": None}
        line = {"linestyle": "--", "linewidth": 1.7}
    axes.stairs(rates.mean(axis=1), edges, color=colour, **shade)
    axes.plot(rates.ravel(), color=colour, **line)


def plot_learning_rates(curves: Mapping[str, np.ndarray]) -> Figure:
    """The learning rate of one setting over its stream; a second one in grey, to compare with.

    Args:
        curves: Setting -> rates [tasks, steps], for one or two settings.

    Returns:
        The figure.
    """
    (name, rates), *held = curves.items()
    scale, power = power_of_ten(curves.values())
    note = f"Thin lines: an update begins. Shaded{', dotted' * bool(held)}: mean of each update."
    with style.canvas(3.7, note) as (figure, axes):
        line = {"transform": axes.get_xaxis_transform(), "color": "0.85", "linewidth": 1}
        axes.vlines(np.arange(1, len(rates)) * rates.shape[1] - 0.5, 0, 1, **line, zorder=0)
        for other, other_rates in held:
            _draw_rates(axes, other_rates / scale, HELD, held=True)
            axes.text(1, 1.04, other, transform=axes.transAxes, ha="right", color=style.ink(HELD))
        _draw_rates(axes, rates / scale, style.COLOURS[0])
        axes.text(0, 1.04, name, transform=axes.transAxes, **style.bold(style.COLOURS[0]))
        axes.set(xlabel="Optimiser step", ylabel=f"Learning rate ({power})", ylim=(0, None))
        axes.margins(x=0.01)
    return figure


def plot_schedules() -> Figure:
    """The curves and meta schedules of chapter 04, over eight updates of 40 steps.

    Returns:
        The figure.
    """
    grid = {"nrows": 3, "ncols": 2, "sharex": True, "sharey": True}
    with style.canvas(6, "Shaded: mean of each update.", **grid) as (figure, axes):
        for panel, (name, meta) in zip(axes.flat, SCHEDULES, strict=True):
            rates = analyses.learning_rates(Schedule(name, meta, 1.0), tasks=8, steps=40)
            _draw_rates(panel, rates, style.COLOURS[0])
            panel.set_title(name if meta == "none" else f"{name}, meta {meta}", fontsize=12)
        for panel in axes[-1]:
            panel.set_xlabel("Optimiser step")
        figure.supylabel("Learning rate (multiple of the peak)", fontsize=13)
    return figure


def plot_rates_and_losses(
    rates: Mapping[str, np.ndarray], losses: Mapping[str, np.ndarray]
) -> Figure:
    """The learning rate of each step of a stream, and below it the loss, a column per setting.

    Args:
        rates: Setting -> rates [tasks, steps].
        losses: Setting -> losses [tasks, steps], drawn as means over `SMOOTH` steps of an update.

    Returns:
        The figure.
    """
    scale, power = power_of_ten(rates.values())
    grid = {"nrows": 2, "ncols": len(rates), "sharex": True, "sharey": "row", "squeeze": False}
    means = {
        name: np.array([np.convolve(each, np.full(SMOOTH, 1 / SMOOTH), "valid") for each in every])
        for name, every in losses.items()
    }
    with style.canvas(5.2, **grid) as (figure, panels):
        for (above, below), (name, every) in zip(panels.T, rates.items(), strict=True):
            tasks, steps = every.shape
            for axes in (above, below):
                line = {"transform": axes.get_xaxis_transform(), "color": "0.85", "linewidth": 1}
                axes.vlines(np.arange(1, tasks) * steps - 0.5, 0, 1, **line, zorder=0)
            above.plot(every.ravel() / scale, color=style.COLOURS[0])
            place = {"transform": above.transAxes, "ha": "center"}  # a title above all has none
            above.text(0.5, 1.04, name, **place, **style.bold("0.2"))
            for task, mean in enumerate(means[name]):
                first = task * steps + SMOOTH - 1
                below.plot(np.arange(first, first + len(mean)), mean, color=style.COLOURS[3])
            below.set_xlabel("Optimiser step")
        rest = np.concatenate(
            [(mean[1:] if len(mean) > 1 else mean).ravel() for mean in means.values()]
        )
        panels[1, 0].set(ylabel="Loss of the batch", ylim=(0.9 * rest.min(), 1.1 * rest.max()))
        panels[0, 0].set(ylabel=f"Learning rate ({power})", ylim=(0, None))
    return figure


def plot_changing_names(images: Any, answers: pd.DataFrame, truth: Sequence[str]) -> Figure:
    """What a model calls the same images before a stream and after each of its updates.

    Args:
        images: uint8 array or tensor [N, 4, H, W], RGBA, shown over white.
        answers: The predicted names, with one row per image and one column per update, or per model
            with its title. The first, the last and some in between are shown.
        truth: The right name of each image.

    Returns:
        The figure.
    """
    pixels = over_white(images)
    shown = np.unique(np.linspace(0, answers.shape[1] - 1, MOMENTS).round().astype(int))
    count, width = len(pixels), len(shown)
    fills, centred = {True: "#dbe9f5", False: "#f8dcc6"}, {"ha": "center", "va": "center"}
    with style.canvas(0.7 * count + 0.6) as (figure, axes):
        for place, (picture, right) in enumerate(zip(pixels, truth, strict=True)):
            box = (-1.47, -1.03, place + 0.42, place - 0.42)  # a square, in inches
            axes.imshow(picture, extent=box, interpolation="nearest", aspect="auto")
            for column, answer in enumerate(answers.iloc[place, shown]):
                cell = (column + 0.02, place - 0.46)
                axes.add_patch(Rectangle(cell, 0.96, 0.92, color=fills[answer == right]))
                words, weight = textwrap.fill(answer, 13), "normal" if answer == right else "bold"
                axes.text(column + 0.5, place, words, fontsize=10.5, fontweight=weight, **centred)
            axes.text(-0.5, place, textwrap.fill(right, 13), fontsize=10.5, **centred)
        columns = (answers.columns[n] for n in shown)
        models = (n if isinstance(n, str) else f"update {n}" if n else "before" for n in columns)
        heads = ["image", "right name", *models]
        axes.set_xticks([-1.25, -0.5, *np.arange(width) + 0.5], heads)
        axes.set(xlim=(-1.6, width), ylim=(count - 0.5, -0.5), yticks=[])
        axes.xaxis.tick_top()
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    return figure
