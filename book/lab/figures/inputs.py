"""Figures of what goes into a run: images, streams, batches, learning rates."""

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cmp.config import Schedule
from cmp.registry import option_names
from lab import analyses
from lab.figures import style

POOLS = dict(zip(("pretraining pool", "update", "buffer"), style.COLOURS, strict=False))
"""Part of a batch -> colour."""
HELD = "#7a7a7a"
"""The colour of the learning rates that others are compared with."""
EXPONENT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
FREE_PEAKS = (1.0, 0.5, 0.5, 0.25, 0.25, 0.25, 0.1, 0.1)
"""Peaks of the meta schedule `free` that are shown, one per task."""


def plot_stream(counts: pd.DataFrame, report: pd.DataFrame | None = None) -> Figure:
    """How many classes of each dataset arrive in each update and, above that, how many images.

    Args:
        counts: Index task (1, 2, ...), a column per dataset: numbers of classes.
        report: Index task, column `images`; see `cmp.experiments.statistics.stream_report`.

    Returns:
        The figure.
    """
    table = counts.T.set_axis([f"{name}  ({total})" for name, total in counts.sum().items()])
    above = [] if report is None else [0.28]
    size = (3 + 0.5 * max(len(counts), 4), 0.42 * len(table) * (1 + sum(above)) + 1.1)
    grid = {"nrows": 1 + len(above), "height_ratios": [*above, 1], "squeeze": False}
    with style.canvas(*size, "Classes; in brackets: over all updates", **grid) as (figure, panels):
        text = {"annot": table.astype(str).mask(table == 0, ""), "fmt": "", "cbar": False}
        shade = {"cmap": "Blues", "vmin": 0, "vmax": 1.15 * table.to_numpy().max()}
        style.heatmap(panels[-1, 0], table, **text, **shade)
        panels[-1, 0].set_xlabel("Update")
        if report is not None:
            axes, images = panels[0, 0], report["images"]
            bars = axes.bar(range(len(images)), images, color=style.COLOURS[1], width=0.8)
            axes.bar_label(bars, images, fontsize=10 if len(images) < 12 else 8)
            axes.set(xlim=(-0.5, len(images) - 0.5), ylim=(0, 1.2 * images.max()), ylabel="Images")
            axes.set(xticks=[], yticks=[])
    return figure


def plot_gallery(
    images: Any, titles: Sequence[str], columns: int = 8, subtitles: Sequence[str] = ()
) -> Figure:
    """Images, enlarged without smoothing, each with its name below.

    Args:
        images: uint8 array or tensor [N, 4, H, W], RGBA, shown over white.
        titles: A name per image.
        columns: Images per row.
        subtitles: A second line per image.

    Returns:
        The figure.
    """
    pixels = np.asarray(images).transpose(0, 2, 3, 1) / 255
    pixels = 1 - pixels[..., 3:] * (1 - pixels[..., :3])
    rows, below = -(-len(pixels) // columns), {"ha": "center", "va": "top"}
    size = (1.45 * columns, (2.1 if len(subtitles) else 1.9) * rows)
    with style.canvas(*size, nrows=rows, ncols=columns, squeeze=False) as (figure, grid):
        for axes in grid.flat:
            axes.set_axis_off()
        for n, (axes, image) in enumerate(zip(grid.flat, pixels, strict=False)):
            axes.imshow(image, interpolation="nearest")
            title, units = textwrap.fill(titles[n], 15), ("axes fraction", "offset points")
            axes.annotate(title, (0.5, 0), (0, -5), *units, fontsize=10.5, **below)
            if len(subtitles):
                down, text = (0, -21 - 13 * title.count("\n")), textwrap.fill(subtitles[n], 18)
                axes.annotate(text, (0.5, 0), down, *units, fontsize=9, color="0.45", **below)
    return figure


def power_of_ten(rates: Iterable[np.ndarray]) -> tuple[float, str]:
    """Return the power of ten that the largest learning rate is a small multiple of.

    Args:
        rates: Arrays of learning rates.

    Returns:
        The power and its text, such as (0.0001, "10⁻⁴"): plain characters, because a formula takes
        long to draw.
    """
    largest = max(float(array.max()) for array in rates)
    power = math.floor(math.log10(largest)) if largest > 0 else 0
    return 10.0**power, f"10{str(power).translate(EXPONENT)}"


def _draw_rates(axes: Axes, rates: np.ndarray, colour: str, held: bool = False) -> None:
    """Draw rates [tasks, steps] over steps and each task's mean: shaded, or dashed if held."""
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
        curves: Setting -> rates [tasks, steps]; one or two settings.

    Returns:
        The figure.
    """
    (name, rates), *held = curves.items()
    scale, power = power_of_ten(curves.values())
    note = f"Thin lines: a new task begins. Shaded{', dotted' * bool(held)}: mean of each task"
    with style.canvas(9, 3.7, note) as (figure, axes):
        line = {"transform": axes.get_xaxis_transform(), "color": "0.85", "linewidth": 1}
        axes.vlines(np.arange(1, len(rates)) * rates.shape[1] - 0.5, 0, 1, **line, zorder=0)
        for other, other_rates in held:
            _draw_rates(axes, other_rates / scale, HELD, held=True)
            axes.text(1, 1.04, other, transform=axes.transAxes, ha="right", color=HELD)
        _draw_rates(axes, rates / scale, style.COLOURS[0])
        axes.text(0, 1.04, name, transform=axes.transAxes, **style.bold(style.COLOURS[0]))
        axes.set(xlabel="Optimizer step", ylabel=f"Learning rate ({power})", ylim=(0, None))
        axes.margins(x=0.01)
    return figure


def plot_schedules(tasks: int = 8, steps: int = 40, columns: int = 4) -> Figure:
    """Every curve, and every meta schedule on a curve that it goes with, over a stream.

    Args:
        tasks: Tasks of the stream, at most `len(FREE_PEAKS)`.
        steps: Steps per task.
        columns: Schedules per row.

    Returns:
        The figure.
    """
    pairs = [(name, "none") for name in option_names("schedule")]
    pairs += [
        ("rsqrt" if meta.startswith("rsqrt") else Schedule().name, meta)
        for meta in option_names("meta_schedule")
        if meta != "none"
    ]
    rows = -(-len(pairs) // columns)
    grid = {"nrows": rows, "ncols": columns, "sharex": True, "sharey": True}
    with style.canvas(12, 1.75 * rows, "Shaded: mean of each task", **grid) as (figure, axes):
        for panel in axes.flat[len(pairs) :]:
            panel.set_axis_off()
        for panel, (name, meta) in zip(axes.flat, pairs, strict=False):
            run = analyses.schedule_run(name, meta, 1.0, tasks, steps, peaks=FREE_PEAKS[:tasks])
            _draw_rates(panel, analyses.schedule_rates(run), style.COLOURS[0])
            panel.set_title(analyses.schedule_label(run), fontsize=12)
        for panel in axes[-1]:
            panel.set_xlabel("Optimizer step", fontsize=11)
        figure.supylabel("Learning rate, in peaks", fontsize=12)
    return figure


def plot_batch(parts: pd.DataFrame, passes: pd.DataFrame) -> Figure:
    """What a batch is made of, and how often an image is seen over the stream.

    Args:
        parts: A row per kind of batch (index: its name), a column per part: samples.
        passes: A row per task in which an image arrives (0: images of the pretraining pool), a
            column per part: how often such an image is seen as a sample of it, on average.

    Returns:
        The figure.
    """
    names, bold = list(POOLS), {"color": "white", "fontweight": "bold"}
    shared = {"stacked": True, "color": POOLS, "width": 0.7, "legend": False}
    with style.canvas(12, 4.4, ncols=2, width_ratios=[1, 1.3]) as (figure, (left, right)):
        parts[names].plot.barh(ax=left, **shared)
        for bars in left.containers:
            counts = [f"{count:g}" if count else "" for count in bars.datavalues]
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
