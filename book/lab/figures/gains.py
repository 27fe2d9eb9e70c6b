"""Figures of gains: the front, what each technique keeps beyond it, and the verdicts of claims."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from cmp.experiments import fronts, verdicts
from lab.figures import style

LOOKS = {
    verdicts.HELPS: (style.COLOURS[0], "o"),
    verdicts.HELPS_OPEN: (style.COLOURS[0], "o"),
    verdicts.SAME: (style.COLOURS[2], "D"),
    verdicts.OPEN: ("#6b6b6b", "s"),
    verdicts.HURTS_OPEN: (style.COLOURS[3], "X"),
    verdicts.HURTS: (style.COLOURS[3], "X"),
}
"""Reading -> colour and marker."""
AXIS = "A_ZS beyond plain fine-tuning at the same A_KA (points)"
BAND = f"Grey band: within {verdicts.MATTERS:g} point of zero."
GAIN_NOTE = f"{BAND} Arrow: a lower bound, as the front ends before this A_KA."
VERDICT_NOTE = (
    "Thick: the verdict's {level} interval. Thin: with other concepts, too. Arrow: a bound, which "
    "leaves that end open."
)


def plot_front(table: pd.DataFrame, front: pd.DataFrame) -> Figure:
    """The front in the plane of both aggregates, and settings that lie above or below it.

    Args:
        table: Settings to show, as `cmp.experiments.verdicts.gains_table` returns them.
        front: A row per peak, from the lowest: `peak`, mean `A_KA` and `A_ZS`.

    Returns:
        The figure.
    """
    curve = fronts.fit_front(*front[["peak", "A_KA", "A_ZS"]].to_numpy().T)
    x = np.linspace(curve.accumulation[0], curve.accumulation[-1], 200)
    with style.canvas(9, 6) as (figure, axes):
        axes.plot(x, [curve.retention_at(value) for value in x], color="0.3", linewidth=2)
        axes.plot(front["A_KA"], front["A_ZS"], "o", color="0.3")
        labels = [(a, z, f"{peak:g}", {"color": "0.4"}) for peak, a, z in front.to_numpy()]
        for row, colour in zip(table.itertuples(), style.COLOURS * len(table), strict=False):
            end = min(row.A_KA, curve.accumulation[-1])
            if not np.isnan(row.gain):
                axes.vlines(
                    row.A_KA, curve.retention_at(end), row.A_ZS, color=colour, linewidth=1.5
                )
            axes.plot(row.A_KA, row.A_ZS, "D", color=colour, markersize=8)
            labels.append((row.A_KA, row.A_ZS, row.setting, style.bold(colour)))
        axes.set(xlabel=style.AXES["A_KA"], ylabel=style.AXES["A_ZS"])
        axes.margins(0.12)
        style.label_points(axes, labels)
    return figure


def plot_technique_gains(table: pd.DataFrame) -> Figure:
    """What each technique buys: its gain over the front, with an interval.

    A colour says that the interval, which has the level of the claims, does not hold zero.

    Args:
        table: As `cmp.experiments.verdicts.gains_table` returns it; settings that have no gain are
            left out, and named below the axes.

    Returns:
        The figure.
    """
    table = table.reset_index(drop=True)
    known = table.dropna(subset="gain")
    note = f"{GAIN_NOTE} {style.interval_note(known, bool(known['low'].notna().any()))}"
    groups = [fronts.BELOW, fronts.BEYOND, verdicts.NOT_COMPUTED]
    reason = table["reason"].map(lambda said: next((part for part in groups if part in said), said))
    for words, rows in table[reason != ""].groupby(reason, sort=False):
        note += f" {words.capitalize()}: {', '.join(rows['setting'])}."
    with style.canvas(10, 1.4 + 0.36 * len(known), note) as (figure, axes):
        axes.axvspan(-verdicts.MATTERS, verdicts.MATTERS, color="0.92", zorder=0)
        axes.axvline(0, color="0.4", linewidth=1)
        for place, row in enumerate(known.itertuples()):
            half = 0 if np.isnan(row.low) else row.gain - row.low
            side = int(row.low > 0) - int(row.high < 0 and not row.is_bound)
            colour = {1: style.COLOURS[0], 0: "0.4", -1: style.COLOURS[3]}[side]
            look = {"color": colour, "marker": "o", "capsize": 3, "linestyle": ""}
            axes.errorbar(row.gain, place, xerr=half, xlolims=row.is_bound, **look)
            words = f"{'at least ' * row.is_bound}{style.signed(row.gain)}  (n = {row.n})"
            beside = {"transform": axes.get_yaxis_transform(), "va": "center", "fontsize": 11}
            axes.text(1.01, place, words, color=colour, **beside)
        axes.set_yticks(range(len(known)), known["setting"])
        axes.set(xlabel=AXIS, ylim=(len(known) - 0.4, -0.6))
        axes.tick_params(axis="y", length=0)
    return figure


def plot_verdicts(rows: pd.DataFrame) -> Figure:
    """Every claim under its guideline: estimate, both intervals and the reading in words.

    Args:
        rows: As `cmp.experiments.verdicts.judge_claims` returns them. A claim that is not computed
            has words alone.

    Returns:
        The figure.
    """
    groups = rows.reset_index().groupby("guideline", sort=False)
    lines = [line for name, group in groups for line in (name, *group.to_dict("records"))]
    note = f"{BAND} {VERDICT_NOTE}".format(level=f"{100 * rows['level'].iloc[0]:.1f}%")
    with style.canvas(11, 1.3 + 0.34 * len(lines), note) as (figure, axes):
        axes.axvspan(-verdicts.MATTERS, verdicts.MATTERS, color="0.92", zorder=0)
        axes.axvline(0, color="0.4", linewidth=1)
        for place, line in enumerate(lines):
            if not isinstance(line, str):
                colour, marker = LOOKS.get(line["reading"], ("0.5", ""))
                if line["reading"] in LOOKS:
                    beyond, own = (
                        [line[f"low{part}"], line[f"high{part}"]] for part in (" crossed", "")
                    )
                    axes.plot(beyond, [place] * 2, color=colour, linewidth=1)
                    axes.plot(own, [place] * 2, color=colour, linewidth=4, alpha=0.6)
                    axes.plot(line["estimate"], place, marker, color=colour, markersize=8)
                    if bound := line["bound"]:
                        end, arrow = (beyond[1], ">") if bound > 0 else (beyond[0], "<")
                        axes.plot(end, place, arrow, color=colour, markersize=6)
                beside = {"transform": axes.get_yaxis_transform(), "va": "center", "fontsize": 11}
                words = verdicts.reading_in_words(line)
                axes.text(1.01, place, words, color=colour, **beside)
        names = [line if isinstance(line, str) else line["claim"] for line in lines]
        axes.set_yticks(range(len(names)), names)
        for label, line in zip(axes.get_yticklabels(), lines, strict=True):
            label.set_fontweight("bold" if isinstance(line, str) else "normal")
        axes.set(xlabel="Points", ylim=(len(lines) - 0.4, -0.6))
        axes.tick_params(axis="y", length=0)
    return figure
