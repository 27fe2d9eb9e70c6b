"""Figures of merging: the path between two models, and how weights move over a stream."""

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from cmp.plots import AXES, COLOURS, canvas


def path(between: pd.DataFrame, here: pd.Series | None = None) -> Figure:
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


def drift(table: pd.DataFrame, cosines: np.ndarray) -> Figure:
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
