"""Figures of gains: the front, gains of techniques over it, and verdicts on claims."""

import textwrap
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cmp.releases.sentences import signed
from lab.evidence import fronts, verdicts
from lab.evidence.claims import MATTERS
from lab.evidence.scores import level_in_words
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
SIZE_LOOK = ("0.15", "o")
"""The same for values that are larger or smaller instead of helping or hurting."""
AXIS = "A_ZS beyond plain fine-tuning at the same A_KA (points)"
BAND = f"Grey band: within {MATTERS:g} point of zero."
GAIN_BOUND = " Arrow: a lower bound, because the front ends at a lower A_KA."
OFF_SCALE = " Triangle at the edge: far off the scale; its value is beside it."
NO_GAIN = {
    fronts.BELOW: "Learned too little to compare",
    fronts.BEYOND: "Learned more than the front reaches, at least with one base left out",
    verdicts.NOT_COMPUTED: "Not computed yet",
}
"""Part of the reason why a setting has no gain -> the text of a note."""
VERDICT_NOTE = "Thick: the verdict's {level} interval."
VERDICT_CROSSED = " Thin: the interval for other concepts."
VERDICT_BOUND = " Arrow: the interval is open on this side."


def plot_front(
    table: pd.DataFrame, front: pd.DataFrame, level: tuple[str, float, float] | None = None
) -> Figure:
    """The front in the plane of both aggregates, and settings that lie above or below it.

    A bar at a setting is the interval of its gain, seen from the front.

    Args:
        table: The settings to show, from `lab.analyses.gains_table`.
        front: One row per peak, from the lowest: `peak`, mean `A_KA` and `A_ZS`.
        level: The name and the A_ZS of something to compare with, drawn as a short horizontal line,
            and the A_KA of what it is compared with, where this line lies.

    Returns:
        The figure.
    """
    curve = fronts.fit_front(*front[["peak", "A_KA", "A_ZS"]].to_numpy().T)
    x = np.linspace(curve.accumulation[0], curve.accumulation[-1], 200)
    looks, known = style.looks(table["setting"]), table.dropna(subset="gain")
    has_intervals = bool(known["low"].notna().any())
    note = "Bars: the interval of a gain. " * has_intervals
    note += style.interval_note(known, has_intervals)
    with style.plane(5.6, note) as (figure, axes):
        axes.plot(x, [curve.retention_at(value) for value in x], color="0.3", linewidth=2)
        axes.plot(front["A_KA"], front["A_ZS"], "o", color="0.3")
        labels = []
        for row in table.itertuples():
            look, end = looks[row.setting], min(row.A_KA, curve.accumulation[-1])
            if not np.isnan(row.gain):
                foot = curve.retention_at(end)
                dashes = "-" if end == row.A_KA else ":"
                line = {"color": look["color"], "linewidth": 1.5, "linestyle": dashes}
                axes.vlines(row.A_KA, foot, row.A_ZS, **line)
                axes.hlines(foot, end, row.A_KA, **line)
                if not np.isnan(row.low):
                    ends = [[row.gain - row.low], [(row.high - row.gain) * (not row.is_bound)]]
                    bar = {"color": look["color"], "capsize": 4, "linewidth": 1.2, "alpha": 0.6}
                    axes.errorbar(row.A_KA, row.A_ZS, yerr=ends, **bar)
            axes.plot(row.A_KA, row.A_ZS, **look | {"linestyle": "", "markersize": 9})
            name = textwrap.fill(row.setting, 14)
            labels.append((row.A_KA, row.A_ZS, name, style.bold(look["color"])))
        small = {"color": "0.4", "fontsize": 11}
        if level:
            name, height, middle = level
            ends = [middle - np.ptp(x) / 25, middle + np.ptp(x) / 25]
            axes.plot(ends, [height] * 2, **style.looks([name])[name] | {"marker": ""})
            labels.append((ends[1], height, textwrap.fill(name, 12), small))
        for peak, *place in front.to_numpy():
            labels.append((*place, style.peak_label(peak), small))
        axes.margins(0.2, 0.1)
        style.label_points(axes, labels)
    return figure


def plot_technique_gains(table: pd.DataFrame) -> Figure:
    """What each technique buys: its gain over the front, with an interval.

    Colour marks intervals, at the level of the claims, that exclude zero. A single gain far from
    all others is off the scale. Rows keep the table's order, under the heads of `book/style.yaml`
    if they are of several kinds, because sorting by gain would suggest a ranking.

    Args:
        table: The result of `lab.analyses.gains_table`. Settings without a gain are
            left out and named below the axes.

    Returns:
        The figure.
    """
    table = table.reset_index(drop=True)
    table["kind"] = table["setting"].map(style.STYLE["heads"]).ffill().fillna("")
    known = table.dropna(subset="gain")
    kinds = known.groupby("kind", sort=False)
    lines = [
        line for kind, group in kinds for line in (*[kind] * (len(kinds) > 1), *group.itertuples())
    ]
    left, right = _limits(known)
    outside = known["gain"].lt(left) | known["gain"].gt(right)
    note = f"{BAND}{GAIN_BOUND * bool(known['is_bound'].any())}{OFF_SCALE * bool(outside.any())} "
    note += style.interval_note(known, bool(known["low"].notna().any()))
    with style.canvas(1.4 + 0.36 * len(lines), note + _left_out(table)) as (figure, axes):
        axes.axvspan(-MATTERS, MATTERS, color="0.92", zorder=0)
        axes.axvline(0, color="0.4", linewidth=1)
        for place, row in enumerate(lines):
            if isinstance(row, str):
                continue
            half = 0 if np.isnan(row.low) else row.gain - row.low
            side = int(row.low > 0) - int(row.high < 0 and not row.is_bound)
            colour = {1: style.COLOURS[0], 0: "0.4", -1: style.COLOURS[3]}[side]
            if outside[row.Index]:
                inset = 0.02 * (right - left)
                edge, marker = (left + inset, "<") if row.gain < left else (right - inset, ">")
                axes.plot(edge, place, marker, color=colour, markersize=8)
            else:
                look = {"color": colour, "marker": "o", "capsize": 3, "linestyle": ""}
                axes.errorbar(row.gain, place, xerr=[[half], [half * (not row.is_bound)]], **look)
                if row.is_bound:
                    style.draw_open_end(axes, row.gain, place, 1, colour)
            words = f"{'at least ' * row.is_bound}{signed(row.gain)} (n = {row.n})"
            beside = {"transform": axes.get_yaxis_transform(), "va": "center", "fontsize": 11}
            axes.text(1.01, place, words, color=style.ink(colour), **beside)
        names = [row if isinstance(row, str) else row.setting for row in lines]
        _name_rows(axes, names, lines)
        axes.set(xlabel=AXIS, xlim=(left, right))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _name_rows(axes: Axes, names: list[str], lines: list[Any]) -> None:
    """Name the rows of axes, from top to bottom, with those whose line is text as bold heads."""
    axes.set_yticks(range(len(lines)), [style.with_subscripts(name) for name in names])
    for label, line in zip(axes.get_yticklabels(), lines, strict=True):
        label.set_fontweight("bold" if isinstance(line, str) else "normal")
    axes.set(ylim=(len(lines) - 0.4, -0.6))
    axes.tick_params(axis="y", length=0)


def plot_loss_parts(controls: Mapping[str, pd.DataFrame]) -> Figure:
    """What happens to A_ZS: lost without any new picture, lost beyond that on thirds, regained by
    merging.

    Args:
        controls: The result of `lab.analyses.loss_parts` for each control, by a title for its axes.

    Returns:
        The figure.
    """
    rows = pd.concat(controls.values())
    note = style.interval_note(rows, bool(rows["half"].notna().any()))
    with style.canvas(4.4, note, ncols=len(controls), sharey=True, squeeze=False) as drawn:
        figure, [panels] = drawn
        for axes, (title, parts) in zip(panels, controls.items(), strict=True):
            _draw_loss_parts(axes, parts)
            axes.set_title(title, fontsize=11, loc="left")
        heights = np.concatenate([_ends_of_parts(parts) for parts in controls.values()])
        panels[0].set(ylabel=style.AXES["A_ZS"], ylim=(heights.min() - 4, heights.max() + 3))
    return figure


def _draw_loss_parts(axes: Axes, parts: pd.DataFrame) -> None:
    """Draw the score at the start, and a bar for each change, from level to level."""
    levels = parts["value"].cumsum()
    for place, row in enumerate(parts.reset_index().itertuples()):
        start = 0.0 if place == 0 else levels.iloc[place - 1]
        if place == 0:  # a level, since the axis does not begin at zero
            axes.hlines(row.value, -0.3, 0.3, color="0.3", linewidth=3)
        else:
            colour = style.COLOURS[3 if row.value < 0 else 0]
            axes.bar(place, row.value, bottom=start, color=colour, width=0.6)
            look = {"color": "0.15", "capsize": 4, "linestyle": ""}
            axes.errorbar(place, levels.iloc[place], yerr=row.half, **look)
            axes.hlines(start, place - 1.3, place + 0.3, color="0.4", linewidth=0.8)
        words = f"{row.value:.1f}" if place == 0 else signed(row.value)
        top = max(start, levels.iloc[place] + np.nan_to_num(row.half))
        look = {"ha": "center", "va": "bottom", "fontweight": "bold"}
        axes.annotate(words, (place, top), (0, 4), textcoords="offset points", **look)
    axes.set_xticks(range(len(parts)), [textwrap.fill(name, 11) for name in parts.index])
    axes.tick_params(axis="x", length=0, labelsize=9.5)


def _ends_of_parts(parts: pd.DataFrame) -> np.ndarray:
    """Return the lower and upper ends of the intervals of all levels."""
    levels, half = parts["value"].cumsum(), parts["half"].fillna(0)
    return np.concatenate([levels - half, levels + half])


def _left_out(table: pd.DataFrame) -> str:
    """Return one line of a note for each reason why settings have no gain."""
    lines = ""
    reason = table["reason"].map(lambda said: next((p for p in NO_GAIN if p in said), said))
    for part, rows in table[reason != ""].groupby(reason, sort=False):
        lines += f"\n{NO_GAIN.get(part, part)}: {'; '.join(rows['setting'])}."
    return lines


def _limits(known: pd.DataFrame) -> tuple[float, float]:
    """Return the limits of the axis of gains, ignoring a single gain that would double it."""
    zero, gains = [-1.5, 1.5], np.sort(known["gain"])
    for rest in (gains[1:], gains[:-1]):
        if len(rest) and np.ptp([*gains, *zero]) > 2 * np.ptp([*rest, *zero]):
            gains = rest
            break
    rows = known[known["gain"].isin(gains)]
    ends = np.concatenate([rows[["gain", "low", "high"]].to_numpy(float).ravel(), zero])
    left, right = np.nanmin(ends), np.nanmax(ends)
    return left - 0.05 * (right - left), right + 0.13 * (right - left)  # the length of an arrow


def plot_verdicts(rows: pd.DataFrame) -> Figure:
    """Every claim under its guideline: estimate, both intervals and the reading in words.

    Claims are named after what they compare, see `book/style.yaml`.

    Args:
        rows: The result of `lab.evidence.verdicts.judge_claims`. A claim that is not computed
            has only text.

    Returns:
        The figure.
    """
    groups = rows.reset_index().groupby("guideline", sort=False)
    lines = [line for name, group in groups for line in (name, *group.to_dict("records"))]
    known = rows[rows["reading"].isin(LOOKS)]
    note = ""
    if len(known):
        note = f"{BAND} {VERDICT_NOTE}".format(level=level_in_words())
        note += VERDICT_CROSSED * bool(known["low crossed"].notna().any())
        note += VERDICT_BOUND * bool(known["bound"].astype(bool).any())
    with style.canvas((0.9 if len(known) else 0.2) + 0.32 * len(lines), note) as (figure, axes):
        for place, line in enumerate(lines):
            if not isinstance(line, str):
                words, x = verdicts.reading_in_words(line), 1.01 if len(known) else 0.02
                look = SIZE_LOOK if words != line["reading"] else LOOKS.get(line["reading"])
                colour = look[0] if look else "0.4"
                if look:
                    _draw_verdict(axes, place, line, *look)
                beside = {"transform": axes.get_yaxis_transform(), "va": "center", "fontsize": 11}
                axes.text(x, place, words, color=style.ink(colour), **beside)
        called = style.STYLE["claims"]
        claims = [line if isinstance(line, str) else line["claim"] for line in lines]
        names = [called.get(name, name) for name in claims]
        _name_rows(axes, names, lines)
        if len(known):
            axes.margins(x=0.13 if known["bound"].astype(bool).any() else 0.05)  # room for arrows
            axes.axvspan(-MATTERS, MATTERS, color="0.92", zorder=0)
            axes.axvline(0, color="0.4", linewidth=1)
            axes.set_xlabel("Points")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        else:
            axes.xaxis.set_visible(False)
            axes.spines[:].set_visible(False)
    return figure


def _draw_verdict(axes: Axes, place: int, line: dict[str, Any], colour: str, marker: str) -> None:
    """Draw the estimate of a claim with both intervals."""
    beyond, own = ([line[f"low{part}"], line[f"high{part}"]] for part in (" crossed", ""))
    if bound := line["bound"]:
        side = int(bound > 0)
        end = own[side] = np.nanmax([beyond[1], own[1]]) if side else np.nanmin([beyond[0], own[0]])
        style.draw_open_end(axes, end, place, 1 if side else -1, colour)
    axes.plot(beyond, [place] * 2, color=colour, linewidth=1)
    axes.plot(own, [place] * 2, color=colour, linewidth=4, alpha=0.6)
    axes.plot(line["estimate"], place, marker, color=colour, markersize=6)
