"""Figures of releases: pictures that changed their name, and scores month by month."""

import textwrap
from collections.abc import Mapping

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
PER_CONCEPT = 1


def plot_flips(comparison: Comparison, kind: str = "lost", rows: int = 2) -> Figure:
    """Pictures whose name became wrong, or right: the old name above, the new one below.

    Args:
        comparison: Two models on the same pictures.
        kind: "lost" or "gained".
        rows: Rows of pictures; the sets take turns, and no name comes twice.

    Returns:
        The figure.
    """
    flips = comparison.flips.query("kind == @kind and asked == @NAMING")
    flips = flips.groupby(["dataset", "concept"], sort=False).head(PER_CONCEPT)
    turn = flips.groupby("dataset").cumcount().sort_values(kind="stable")
    shown = flips.loc[turn.index].head(rows * IN_A_ROW)
    pixels = over_white(comparison.corpus.images[shown["row"].to_numpy(copy=True)])
    size = {"nrows": max(1, -(-len(shown) // IN_A_ROW)), "ncols": IN_A_ROW, "squeeze": False}
    colours = (KEPT, LOST) if kind == "lost" else (LOST, KEPT)
    with style.canvas(2.3 * size["nrows"], **size) as (figure, grid):
        for axes in grid.flat:
            axes.set_axis_off()
        for axes, image, (_, flip) in zip(grid.flat, pixels, shown.iterrows(), strict=False):
            axes.imshow(image, interpolation="nearest")
            for words, y, colour in zip(flip[["said_old", "said_new"]], (1, 0), colours, strict=True):
                place = {"xytext": (0, 5 if y else -5), "textcoords": "offset points"}
                look = {"ha": "center", "va": "bottom" if y else "top", "color": style.ink(colour)}
                axes.annotate(
                    textwrap.fill(words, 14), (0.5, y), **place, **look, fontsize=10.5,
                    xycoords="axes fraction", fontweight="normal" if y else "bold",
                )  # fmt: skip
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
    note = "Below each month, in brackets: its test pictures that were scored after the last update."
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
