"""Figures of releases: pictures that changed their name, and scores month by month."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cmp.releases.compare import NAMING, Comparison
from lab.figures import style
from lab.figures.runs import IN_A_ROW, over_white

LOST, KEPT = "#d55e00", "#0173b2"
"""Colours of a wrong and of a right name, as elsewhere in the book."""
COLUMN = style.WIDTH / IN_A_ROW
"""Inches of a column of pictures."""
ROW = 2.35
"""Inches of a row of pictures, with three lines of text above and below each."""


def plot_flips(comparison: Comparison) -> Figure:
    """Two rows of pictures whose name became wrong: the old name above, the new one below.

    Args:
        comparison: Two models on the same pictures. Their sets take turns, and no name comes twice.

    Returns:
        The figure.
    """
    flips = comparison.flips
    flips = flips[(flips["kind"] == "lost") & (flips["asked"] == NAMING)]
    flips = flips.drop_duplicates(["dataset", "concept"])
    turn = flips.groupby("dataset").cumcount().sort_values(kind="stable")
    shown = flips.loc[turn.index].head(2 * IN_A_ROW)
    images = comparison.corpus.images[shown["row"].to_numpy(copy=True)]
    return plot_wall(images, [*shown["said_old"]], [*shown["said_new"]], (KEPT, LOST))


def plot_wall(
    images: Any,
    above: Sequence[str],
    below: Sequence[str],
    colours: tuple[str, str] = (KEPT, KEPT),
    truth: Sequence[str] = (),
) -> Figure:
    """Pictures in rows, enlarged without smoothing, each with a text above and one below.

    Args:
        images: uint8 array or tensor [N, 4, H, W], RGBA, shown over white.
        above, below: A text per picture.
        colours: Of the texts above, and of those below.
        truth: The right name of each picture. If given, each text is marked and coloured as right
            or wrong.

    Returns:
        The figure.
    """
    side, room = 0.8, {"ha": "center", "fontsize": 10.5, "linespacing": 1.05}
    count = max(1, -(-len(images) // IN_A_ROW))
    with style.canvas(ROW * count) as (figure, axes):
        for n, image in enumerate(over_white(images)):
            row, column = divmod(n, IN_A_ROW)
            x, y = column + 0.5, ROW * row + 0.6  # one unit is a column's width, or an inch
            box = (x - side / 2, x + side / 2, y + side * COLUMN, y)
            axes.imshow(image, extent=box, interpolation="nearest", aspect="auto")
            for text, place, at, colour, weight in (
                (above[n], y - 0.06, "bottom", colours[0], "normal"),
                (below[n], box[2] + 0.06, "top", colours[1], "bold"),
            ):
                if truth:
                    is_right = text == truth[n]
                    colour = KEPT if is_right else LOST
                    text = f"{'✓' if is_right else '✗'} {text}"
                look = {"va": at, "color": style.ink(colour), "fontweight": weight}
                axes.text(x, place, textwrap.fill(text, 14), **room, **look)
        axes.set(xlim=(0, IN_A_ROW), ylim=(ROW * count, 0))
        axes.set_axis_off()
    return figure


def plot_months(matrix: pd.DataFrame, names: Mapping[int, str]) -> Figure:
    """How many pictures of each month are named right after each update, among all names so far.

    Args:
        matrix: What a release has as `matrix.parquet`: `after`, `update`, `score`, `images`.
        names: The name of each update by its number.

    Returns:
        The figure.
    """
    import seaborn

    table = matrix.pivot(index="after", columns="update", values="score")
    images = matrix.groupby("update")["images"].last()
    below = [f"{names[n]}\n({images[n]})" for n in table.columns]
    note = "In brackets: how many of the month's test pictures were scored after the last update."
    with style.canvas(0.62 * len(table) + 1.9, note) as (figure, axes):
        text = {"annot": table.round(0), "fmt": ".0f", "annot_kws": {"size": 13}}
        seaborn.heatmap(
            table, ax=axes, cmap="Blues", vmin=0, vmax=110, linewidths=1.5, cbar=False, **text
        )
        axes.set_xticks(np.arange(len(below)) + 0.5, below)
        axes.set_yticks(np.arange(len(table)) + 0.5, [names[n] for n in table.index])
        axes.tick_params(length=0, labelrotation=0)
        axes.set(xlabel="Pictures that arrived in", ylabel="After the update of")
    return figure


def plot_two_ways(ways: Mapping[str, pd.DataFrame], names: Mapping[int, str]) -> Figure:
    """A_KA and A_ZS after each month, for updates one at a time and for a stream that is simulated.

    Args:
        ways: Name -> table with index `task` (0 = before the first) and columns "A_KA", "A_ZS"; the
            first is drawn as a wide line, the second as dots upon it.
        names: The name of each update by its number.

    Returns:
        The figure.
    """
    looks = (
        {"color": "#56b4e9", "linewidth": 7, "alpha": 0.6, "solid_capstyle": "round"},
        {"color": "#882255", "linewidth": 1.4, "marker": "o", "markersize": 9},
    )
    with style.canvas(3.9, ncols=2) as (figure, panels):
        for axes, (column, title) in zip(panels, style.AXES.items(), strict=True):
            for (way, scores), look in zip(ways.items(), looks, strict=True):
                axes.plot(scores.index, scores[column], label=way, **look)
            low, high = axes.get_ylim()
            spare = max(0.0, 12 - (high - low)) / 2
            axes.set(ylim=(max(0, low - spare), min(100, high + spare)), ylabel=title)
            months = [scores.index.min(), *names]
            axes.set_xticks(months, ["before", *(name[-2:] for name in names.values())])
            axes.set_xlabel("After the month")
            axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
        panels[1].legend(frameon=False, fontsize=plt.rcParams["font.size"] - 1, loc="upper right")
    return figure
