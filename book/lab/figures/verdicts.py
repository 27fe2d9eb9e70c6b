"""Figures of verdicts: each claim's difference with its interval, and where the claim is true."""

import textwrap

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cmp.experiments.claims import MEASURE_WORDS, REFUTED, SUPPORTED, UNDECIDED
from lab.figures import style
from lab.scoreboard import HELD, TRANSFER, UNPUBLISHED

LOOKS = {
    SUPPORTED: (style.COLOURS[0], "o"),
    REFUTED: (style.COLOURS[3], "X"),
    UNDECIDED: ("#6b6b6b", "s"),
    UNPUBLISHED: ("0.55", ""),
}
"""Verdict -> colour and marker."""
UNITS = {
    "points": ("Difference{} (points)", ".1f"),
    "rank correlation": ("Rank correlation{}", ".2f"),
}
"""Unit -> label of the axis, with room for the measure, and the form of numbers."""
MEASURES = MEASURE_WORDS | {"end": " at the end of the stream"}
"""When the difference is taken -> words for it, which stand in the rows where these differ."""
NOTE = "Shaded: where the claim is true; its edges are the margins. Bars: the verdicts' intervals."
HELD_COLOURS = dict(zip(HELD, ("#2b7bba", "#b7d4ea", "#f3d3b8", "#d1782f"), strict=True))
HELD_NOTE = (
    f"Blue: on the expected side; orange: on the other. Deep and bold: {HELD[0]}, by the "
    "95% interval. Pale: by the sign of the mean."
)


def plot_claims(verdicts: pd.DataFrame) -> Figure:
    """Each claim's estimate with its interval, and the region in which the claim is true.

    Verdicts differ in colour, in marker and in words. A claim without an interval has a hollow
    marker, one without replicates none.

    Args:
        verdicts: Rows of one unit as `cmp.experiments.claims.verdicts` returns them.

    Returns:
        The figure.
    """
    (label, form), names = UNITS[verdicts["unit"].iloc[0]], []
    measures = [MEASURES[at] for at in verdicts["at"].unique()]
    with style.canvas(11, 1.5 + 0.95 * len(verdicts), NOTE) as (figure, axes):
        shown = verdicts[["estimate", "low", "high", "above", "below"]].to_numpy(float)
        shown = np.append(shown[np.isfinite(shown)], 0)
        air = 0.1 * np.ptp(shown)
        axes.set(xlim=(shown.min() - air, shown.max() + air), ylim=(len(verdicts) - 0.5, -0.5))
        for place, (name, row) in enumerate(verdicts.iterrows()):
            words = f"n = {row['n']}: no interval"
            if np.isfinite(row["low"]):
                interval = f"{row['low']:{form}} to {row['high']:{form}}".replace("-", "−")
                words = f"{interval} ({100 * row['level']:.3g}%)"
            _draw_claim(axes, place, row, f"{row['verdict']}\n{words}", 12)
            measure = MEASURES[row["at"]] if len(measures) > 1 else ""
            lines = (name, f"{row['what']}, {row['aggregate']}{measure}")
            names.append("\n".join(textwrap.fill(line, 34) for line in lines))
        _label_claims(axes, names, label.format(measures[0] if len(measures) == 1 else ""))
    return figure


def plot_scoreboard(claims: pd.DataFrame) -> Figure:
    """Every claim under its guideline: estimate, interval, and the verdict in words.

    Args:
        claims: As `scoreboard.claims_table` returns them. A claim whose study is not published has
            no marker.

    Returns:
        The figure.
    """
    groups = claims.groupby("guideline", sort=False)
    rows = [row for name, group in groups for row in (name, *group.to_dict("records"))]
    with style.canvas(11, 1.2 + 0.29 * len(rows), NOTE) as (figure, axes):
        bounds = claims.reindex(columns=["low", "high", "estimate"]).to_numpy(float)
        reach = 1.08 * np.nanmax(np.abs(np.append(bounds, 1.0)))
        axes.set(xlim=(-reach, reach), ylim=(len(rows) - 0.4, -0.6))
        names = [row if isinstance(row, str) else row["claim"] for row in rows]
        _label_claims(axes, names, "Difference of the two settings (points)")
        for place, (row, label) in enumerate(zip(rows, axes.get_yticklabels(), strict=True)):
            label.set(fontsize=10, fontweight="bold" if isinstance(row, str) else "normal")
            if not isinstance(row, str):
                _draw_claim(axes, place, row, row["verdict"], 10)
    return figure


def _draw_claim(axes: Axes, place: int, row: dict | pd.Series, words: str, size: float) -> None:
    """Draw a claim's region, margins, interval and marker, and its words at the right."""
    (left, right), (colour, marker) = axes.get_xlim(), LOOKS[row["verdict"]]
    beside = {"transform": axes.get_yaxis_transform(), "va": "center", "fontsize": size}
    axes.text(1.01, place, words, color=colour, **beside)
    if row["verdict"] == UNPUBLISHED:
        return
    start, end = max(row["above"], left), min(row["below"], right)
    axes.barh(place, end - start, 0.8, start, color="#dce9f2", zorder=0)
    for margin in (row["above"], row["below"]):
        if np.isfinite(margin):
            dots = {"color": "0.55", "linewidth": 1.2, "linestyle": ":", "zorder": 1}
            axes.vlines(margin, place - 0.4, place + 0.4, **dots)
    estimate, known = row["estimate"], np.isfinite(row["low"])
    half = [[estimate - row["low"]], [row["high"] - estimate]] if known else None
    look = {"marker": marker, "markersize": 0.75 * size, "linestyle": "", "capsize": 0.3 * size}
    face = colour if known else "white"
    axes.errorbar(estimate, place, xerr=half, color=colour, markerfacecolor=face, zorder=4, **look)
    axes.set_xlim(left, right)


def _label_claims(axes: Axes, names: list[str], label: str) -> None:
    """Name the rows and the horizontal axis, and mark zero."""
    axes.axvline(0, color="0.4", linewidth=1)
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(label)


def plot_networks(networks: pd.DataFrame) -> Figure:
    """The difference of each contrast on each network, in points, coloured by how it held.

    Args:
        networks: As `scoreboard.across_networks` returns them; where there are no rows, a line
            says so.

    Returns:
        The figure.
    """
    if networks.empty:
        with style.canvas(9, 0.8, f"Study {TRANSFER} is {UNPUBLISHED}.") as (figure, axes):
            axes.set_axis_off()
        return figure
    names, contrasts = (list(networks[key].unique()) for key in ("network", "contrast"))
    size = (3.6 + 1.5 * len(names), 1.2 + 0.5 * len(contrasts))
    with style.canvas(*size, HELD_NOTE) as (figure, axes):
        for row in networks.itertuples():
            x, y = names.index(row.network), contrasts.index(row.contrast)
            axes.barh(y, 0.96, 0.92, x - 0.48, color=HELD_COLOURS[row.held])
            clear = row.held in (HELD[0], HELD[3])
            look = {"fontweight": "bold", "color": "white"} if clear else {"color": "0.15"}
            axes.text(x, y, style.signed(row.difference), ha="center", va="center", **look)
        axes.set_xticks(range(len(names)), names)
        axes.set_yticks(range(len(contrasts)), contrasts)
        axes.xaxis.tick_top()
        axes.tick_params(length=0)
        axes.set(xlim=(-0.55, len(names) - 0.45), ylim=(len(contrasts) - 0.5, -0.5))
        axes.spines[:].set_visible(False)
    return figure
