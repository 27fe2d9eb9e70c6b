"""Verdicts as a figure: each claim's difference with its interval, and where the claim is true."""

import textwrap

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import blended_transform_factory

from cmp.claims import REFUTED, SUPPORTED, UNDECIDED
from cmp.plots import COLOURS, canvas

STYLES = {SUPPORTED: (COLOURS[0], "o"), REFUTED: (COLOURS[3], "X"), UNDECIDED: ("#6b6b6b", "s")}
REGION = "#dce9f2"
LABELS = {
    "points": "Difference at the end of the stream (points)",
    "rank correlation": "Rank correlation at the end of the stream",
}
NOTE = "Shaded: where the claim is true; its edges are the margins. Bars: the verdicts' intervals."


def forest(verdicts: pd.DataFrame) -> Figure:
    """A row a claim: its estimate, its interval, the region of which the claim is true.

    verdicts: rows of one unit, of what `cmp.claims.verdicts` gives. Verdicts differ in colour, in
    marker and in words. A claim without an interval has a hollow marker, one without replicates
    none.
    """
    with canvas(11, 1.5 + 0.95 * len(verdicts), NOTE) as (figure, axes):
        names = []
        for place, row in enumerate(verdicts.itertuples()):
            _row(axes, place, row)
            pair = f"{row.what}, {row.aggregate}"
            names.append("\n".join(textwrap.fill(text, 34) for text in (row.Index, pair)))
        axes.axvline(0, color="0.4", linewidth=1)
        axes.set_yticks(range(len(names)), names)
        axes.set(ylim=(len(names) - 0.5, -0.5), xlim=_limits(verdicts))
        axes.tick_params(axis="y", length=0)
        axes.set(xlabel=LABELS[verdicts["unit"].iloc[0]])
        _shade(axes, verdicts)
    return figure


def _row(axes: Axes, place: int, row: tuple) -> None:
    """Marker and interval of a claim, and the verdict in words at the right."""
    colour, marker = STYLES[row.verdict]
    sure = np.isfinite(row.low)
    half = [[row.estimate - row.low], [row.high - row.estimate]] if sure else None
    face = colour if sure else "white"
    look = {"marker": marker, "markersize": 9, "markerfacecolor": face, "linestyle": ""}
    axes.errorbar(row.estimate, place, xerr=half, color=colour, capsize=4, zorder=4, **look)
    form = ".2f" if row.unit == "rank correlation" else ".1f"
    interval = f"{row.low:{form}} to {row.high:{form}}".replace("-", "−")
    words = f"{interval} ({100 * row.level:.3g}%)" if sure else f"n = {row.n}: no interval"
    text = f"{row.verdict}\n{words}"
    beside = blended_transform_factory(axes.transAxes, axes.transData)
    axes.text(1.02, place, text, color=colour, transform=beside, va="center", fontsize=12)


def _limits(verdicts: pd.DataFrame) -> tuple[float, float]:
    """From the leftmost to the rightmost of what is shown, with some air: zero, intervals, and both
    margins of an equivalence."""
    shown = verdicts[["estimate", "low", "high", "above", "below"]].to_numpy(float)
    shown = np.append(shown[np.isfinite(shown)], 0)
    air = 0.1 * np.ptp(shown)
    return shown.min() - air, shown.max() + air


def _shade(axes: Axes, verdicts: pd.DataFrame) -> None:
    """The region of which each claim is true, as far as the axis goes."""
    left, right = axes.get_xlim()
    for place, (above, below) in enumerate(verdicts[["above", "below"]].to_numpy(float)):
        start, end = max(above, left), min(below, right)
        axes.barh(place, end - start, 0.8, start, color=REGION, zorder=0)
        for margin in (above, below):
            if np.isfinite(margin):
                at = {"color": "0.55", "linewidth": 1.2, "linestyle": ":", "zorder": 1}
                axes.vlines(margin, place - 0.4, place + 0.4, **at)
    axes.set_xlim(left, right)
