"""Figures of what goes into a run, as pure functions: images, streams, batches, learning rates."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from lab.figures import COLOURS, STYLE, canvas
from matplotlib.axes import Axes
from matplotlib.figure import Figure

POOLS = {"pretraining pool": COLOURS[0], "update": COLOURS[1], "buffer": COLOURS[2]}
HELD = "#7a7a7a"
"""The colour of what a curve is compared with."""
EXPONENT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def stream(counts: pd.DataFrame, report: pd.DataFrame | None = None) -> Figure:
    """How many classes of each dataset arrive in each update and, above that, how many images.

    counts: index task (1, 2, ...), a column a dataset, values number of classes; report: index
    task, column `images`, see `cmp.mixtures.exposures.report`.
    """
    table = counts.T.set_axis([f"{name}  ({total})" for name, total in counts.sum().items()])
    above = [] if report is None else [0.28]
    size = (3 + 0.5 * max(len(counts), 4), 0.42 * len(table) * (1 + sum(above)) + 1.1)
    grid = {"nrows": 1 + len(above), "height_ratios": [*above, 1], "squeeze": False}
    with canvas(*size, "Classes; in brackets: over all updates", **grid) as (figure, panels):
        axes = panels[-1, 0]
        if report is not None:
            _images(panels[0, 0], report["images"])
        text = {"annot": table.astype(str).mask(table == 0, ""), "fmt": "", "cbar": False}
        shade = {"cmap": "Blues", "vmin": 0, "vmax": 1.15 * table.to_numpy().max()}
        sns.heatmap(table, ax=axes, linewidths=1.5, annot_kws={"size": 11}, **text, **shade)
        axes.tick_params(length=0, labelrotation=0)
        axes.set(xlabel="Update", ylabel="")
    return figure


def _images(axes: Axes, images: pd.Series) -> None:
    """A bar a task with its number of images."""
    bars = axes.bar(range(len(images)), images, color=COLOURS[1], width=0.8)
    axes.bar_label(bars, images, fontsize=10 if len(images) < 12 else 8)
    axes.set(xlim=(-0.5, len(images) - 0.5), ylim=(0, 1.2 * images.max()), ylabel="Images")
    axes.set_xticks([])
    axes.set_yticks([])


def gallery(
    images: Any, titles: Sequence[str], columns: int = 8, subtitles: Sequence[str] = ()
) -> Figure:
    """Images, enlarged without smoothing, each with its name below.

    images: uint8 [N, 4, H, W], RGBA, shown over white, array or tensor. titles, subtitles: of each.
    """
    pixels = np.asarray(images).transpose(0, 2, 3, 1) / 255
    pixels = 1 - pixels[..., 3:] * (1 - pixels[..., :3])
    lines, below = -(-len(pixels) // columns), {"ha": "center", "va": "top"}
    size = (1.45 * columns, (2.1 if len(subtitles) else 1.9) * lines)
    with canvas(*size, nrows=lines, ncols=columns, squeeze=False) as (figure, axes):
        for place in axes.flat:
            place.set_axis_off()
        for n, (place, image) in enumerate(zip(axes.flat, pixels, strict=False)):
            place.imshow(image, interpolation="nearest")
            title, points = textwrap.fill(titles[n], 15), ("axes fraction", "offset points")
            place.annotate(title, (0.5, 0), (0, -5), *points, fontsize=10.5, **below)
            if len(subtitles):
                down, text = (0, -21 - 13 * title.count("\n")), textwrap.fill(subtitles[n], 18)
                grey = {"fontsize": 9, "color": "0.45", **below}
                place.annotate(text, (0.5, 0), down, *points, **grey)
    return figure


def unit(rates: Sequence[np.ndarray]) -> tuple[float, str]:
    """The power of ten that the largest of some learning rates is a small multiple of: (0.0001,
    "10⁻⁴"). Plain characters, since a formula is what takes longest to draw."""
    top = max(float(each.max()) for each in rates)
    power = math.floor(math.log10(top)) if top > 0 else 0
    return 10.0**power, f"10{str(power).translate(EXPONENT)}"


def _course(axes: Axes, rates: np.ndarray, colour: str, held: bool = False) -> None:
    """One stream, [tasks, steps], over its steps, and the mean of each task: shaded, or held, in
    dashes."""
    tasks, steps = rates.shape
    edges = np.arange(tasks + 1) * steps - 0.5
    shade, line = {"fill": True, "alpha": 0.22}, {"linewidth": 1.8}
    if held:
        shade = {"linestyle": ":", "linewidth": 1.3, "baseline": None}
        line = {"linestyle": "--", "linewidth": 1.7}
    axes.stairs(rates.mean(axis=1), edges, color=colour, **shade)
    axes.plot(rates.ravel(), color=colour, **line)


def learning_rates(curves: Mapping[str, np.ndarray]) -> Figure:
    """One setting's learning rates over its stream, with its tasks and their means; a second one,
    if there is one, in grey, to compare with.

    curves: the settings' names and rates, [tasks, steps] each. Drawn at every move of a control:
    margins are fixed and nothing is measured, which takes a third of the time of the other figures.
    """
    (name, shown), *held = curves.items()
    scale, power = unit(list(curves.values()))
    with plt.rc_context(STYLE):
        figure = Figure((9, 3.7))
        axes = figure.add_axes((0.075, 0.215, 0.91, 0.685))
        borders = np.arange(1, len(shown)) * shown.shape[1] - 0.5
        line = {"transform": axes.get_xaxis_transform(), "color": "0.85", "linewidth": 1}
        axes.vlines(borders, 0, 1, **line, zorder=0)
        for other, rates in held:
            _course(axes, rates / scale, HELD, held=True)
            axes.text(1, 1.04, other, transform=axes.transAxes, ha="right", color=HELD)
        _course(axes, shown / scale, COLOURS[0])
        title = {"color": COLOURS[0], "fontweight": "bold"}
        axes.text(0, 1.04, name, transform=axes.transAxes, **title)
        axes.set(xlabel="Optimizer step", ylabel=f"Learning rate ({power})", ylim=(0, None))
        axes.margins(x=0.01)
        axes.tick_params(labelsize=STYLE["xtick.labelsize"], labelcolor="0.25")
        note = "Thin lines: a new task begins. Shaded" + (", dotted" if held else "")
        figure.text(0.01, 0.025, f"{note}: mean of each task", fontsize=10.5, color="0.4")
    return figure


def schedule_grid(groups: Mapping[str, Mapping[str, np.ndarray]], columns: int = 4) -> Figure:
    """Many schedules side by side, on the same axes, in groups that each begin with their title.

    groups: title -> name -> rates in multiples of the peak, [tasks, steps], all of the same shape.
    """
    rows = [-(-(1 + len(curves)) // columns) for curves in groups.values()]
    grid = {"nrows": sum(rows), "ncols": columns, "sharex": True, "sharey": True, "squeeze": False}
    with canvas(12, 1.75 * sum(rows), "Shaded: mean of each task", **grid) as (figure, axes):
        for place in axes.flat:
            place.set_axis_off()
        for title, curves, row in zip(groups, groups.values(), np.cumsum(rows) - rows, strict=True):
            first, *places = axes[row:].flat
            words, at = textwrap.fill(title, 22), {"transform": first.transAxes, "va": "center"}
            first.text(0, 0.5, words, fontweight="bold", **at)
            for place, (name, rates) in zip(places, curves.items(), strict=False):
                place.set_axis_on()
                _course(place, rates, COLOURS[0])
                place.set_title(name, fontsize=12)
                begins = place is axes[row, 1] or place in axes[:, 0]
                place.tick_params(labelbottom=True, labelleft=begins, labelsize=10)
        for place in axes[-1]:
            place.set_xlabel("Optimizer step", fontsize=11)
        axes[0, 0].margins(x=0.01)
        figure.supylabel("Learning rate, in peaks", fontsize=12)
    return figure


def batch_mixture(parts: pd.DataFrame, passes: pd.DataFrame) -> Figure:
    """What a batch is made of, and how often an image is seen over the stream.

    Both have the columns "pretraining pool", "update" and "buffer". parts: a row a kind of batch
    (index: its name), samples of each. passes: a row a task in which an image arrives (0: images of
    the pretraining pool), how often such an image is seen as a sample of each, on average.
    """
    names, bold = list(POOLS), {"color": "white", "fontweight": "bold"}
    shared = {"stacked": True, "color": POOLS, "width": 0.7, "legend": False}
    with canvas(12, 4.4, ncols=2, width_ratios=[1, 1.3]) as (figure, (left, right)):
        parts[names].plot.barh(ax=left, **shared)
        for bars, name in zip(left.containers, names, strict=True):
            counts = [f"{count:g}" if count else "" for count in parts[name]]
            left.bar_label(bars, counts, label_type="center", **bold)
        left.set(xlabel="Samples in a batch", ylabel="", ylim=(max(len(parts), 2) - 0.5, -0.5))
        passes[names].rename(index={0: "pool"}).plot.bar(ax=right, rot=0, **shared)
        total = [f"{seen:.{int(seen < 9.95)}f}" for seen in passes[names].sum(axis=1)]
        right.bar_label(right.containers[-1], total, padding=2, fontsize=10, color="0.3")
        right.set(xlabel="Update in which the image arrives", ylabel="Times an image is seen")
        entries = left.get_legend_handles_labels()
        figure.legend(*entries, loc="outside upper left", ncols=3, frameon=False)
        figure.get_layout_engine().set(wspace=0.06)
    return figure
