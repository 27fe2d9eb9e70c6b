"""Verdicts as a figure: each claim's difference with its interval, and where the claim is true."""

import textwrap

import numpy as np
import pandas as pd
from lab.figures import COLOURS, canvas
from lab.scoreboard import HELD, TRANSFER, UNPUBLISHED
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import blended_transform_factory

from cmp.experiments.claims import REFUTED, SUPPORTED, UNDECIDED

STYLES = {SUPPORTED: (COLOURS[0], "o"), REFUTED: (COLOURS[3], "X"), UNDECIDED: ("#6b6b6b", "s")}
REGION = "#dce9f2"
LABELS = {
    "points": "Difference at the end of the stream (points)",
    "rank correlation": "Rank correlation at the end of the stream",
}
FOREST_NOTE = (
    "Shaded: where the claim is true; its edges are the margins. Bars: the verdicts' intervals."
)


def forest(verdicts: pd.DataFrame) -> Figure:
    """A row a claim: its estimate, its interval, the region of which the claim is true.

    verdicts: rows of one unit, of what `cmp.claims.verdicts` gives. Verdicts differ in colour, in
    marker and in words. A claim without an interval has a hollow marker, one without replicates
    none.
    """
    with canvas(11, 1.5 + 0.95 * len(verdicts), FOREST_NOTE) as (figure, axes):
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


BOARD_COLOURS = dict(zip(HELD, ("#2b7bba", "#b7d4ea", "#f3d3b8", "#d1782f"), strict=True))
"""Of a cell, by how a contrast held; the sign is also in its number, and clear ones are bold."""
BOARD_ROW = 0.29
BOARD_NOTE = "Points. Shaded: where the claim is true. Bars: the verdicts' intervals."


def board(rows: pd.DataFrame) -> Figure:
    """Every claim on a line, under its guideline: estimate, interval, verdict in words.

    rows: of `cmp.analyses.scoreboard.table`. A claim whose study is not published has no marker.
    """
    lines = []
    for name, group in rows.groupby("guideline", sort=False):
        lines += [name, *(row for _, row in group.iterrows())]
    with canvas(11, 1.2 + BOARD_ROW * len(lines), BOARD_NOTE) as (figure, axes):
        known = rows[rows["verdict"] != UNPUBLISHED]
        bounds = known.reindex(columns=["low", "high", "estimate"]).to_numpy(float)
        reach = 1.08 * np.nanmax(np.abs(np.append(bounds, 1.0)))
        axes.set(xlim=(-reach, reach), ylim=(len(lines) - 0.4, -0.6))
        axes.axvline(0, color="0.4", linewidth=1)
        labels = [line if isinstance(line, str) else line["claim"] for line in lines]
        axes.set_yticks(range(len(lines)), labels, fontsize=10)
        for place, (line, label) in enumerate(zip(lines, axes.get_yticklabels(), strict=True)):
            if isinstance(line, str):
                label.set_fontweight("bold")
            else:
                _line(axes, place, line)
        axes.tick_params(axis="y", length=0)
        axes.set(xlabel="Difference of the two settings (points)")
    return figure


def _line(axes: Axes, place: int, row: pd.Series) -> None:
    """A claim's region, interval and verdict; of an unpublished one the word alone."""
    left, right = axes.get_xlim()
    colour, marker = STYLES.get(row["verdict"], ("0.55", ""))
    if row["verdict"] != UNPUBLISHED:
        start, end = max(row["above"], left), min(row["below"], right)
        axes.barh(place, end - start, 0.8, start, color=REGION, zorder=0)
        if np.isfinite(row["low"]):
            axes.hlines(place, row["low"], row["high"], color=colour, linewidth=2, zorder=3)
        axes.plot(row["estimate"], place, color=colour, marker=marker, markersize=6, zorder=4)
    beside = {"transform": axes.get_yaxis_transform(), "va": "center", "fontsize": 10}
    axes.text(1.01, place, row["verdict"], color=colour, **beside)


def matrix(networks: pd.DataFrame) -> Figure:
    """A row a contrast, a column a network: the difference in points, coloured by how it held.

    networks: of `cmp.analyses.scoreboard.across`; where it has no rows, a line says so.
    """
    if networks.empty:
        with canvas(9, 0.8, f"Study {TRANSFER} is {UNPUBLISHED}.") as (figure, axes):
            axes.set_axis_off()
        return figure
    names = list(dict.fromkeys(networks["network"]))
    contrasts = list(dict.fromkeys(networks["contrast"]))
    note = f"Blue: on the expected side; orange: on the other. Deep and bold: {HELD[0]}, by the "
    note += "95% interval. Pale: by the sign of the mean."
    with canvas(3.6 + 1.5 * len(names), 1.2 + 0.5 * len(contrasts), note) as (figure, axes):
        for row in networks.itertuples():
            x, y = names.index(row.network), contrasts.index(row.contrast)
            axes.barh(y, 0.96, 0.92, x - 0.48, color=BOARD_COLOURS[row.held])
            clear = row.held in (HELD[0], HELD[3])
            look = {"fontweight": "bold", "color": "white"} if clear else {"color": "0.15"}
            text = f"{row.difference:+.1f}".replace("-", "−")
            axes.text(x, y, text, ha="center", va="center", **look)
        axes.set_xticks(range(len(names)), names)
        axes.set_yticks(range(len(contrasts)), contrasts)
        axes.xaxis.tick_top()
        axes.tick_params(length=0)
        axes.set(xlim=(-0.55, len(names) - 0.45), ylim=(len(contrasts) - 0.5, -0.5))
        for side in axes.spines.values():
            side.set_visible(False)
    return figure
