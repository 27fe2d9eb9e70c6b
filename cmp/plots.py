"""Figures as pure functions of frames: one house style, one colour a setting, nothing left open.

A trajectory frame has a row a (setting, replicate, task): `task` (0 = before the stream), `scope`
("subset" or "full"), `A_KA`, `A_ZS`, `GM` in percent. Lines are means over replicates, bands and
bars 95% t-intervals; with one replicate there is no interval. Where a frame has "subset" rows,
those are drawn, for they ask the same questions after every task.
"""

import contextlib
import functools
import itertools
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cmp.errors import CmpError

JOINT, CONTROL = "joint", "replay-only control"
SPECIAL = {JOINT: "#222222", CONTROL: "#858585"}
COLOURS = [*sns.color_palette("colorblind").as_hex()[:5], "#56b4e9", "#882255", "#ca9161"]
MARKERS, LINES = "osD^vPh", ("-", "-.", ":")
POOLS = {"pretraining pool": COLOURS[0], "update": COLOURS[1], "buffer": COLOURS[2]}
AXES = {"A_KA": "Knowledge accumulation A_KA (%)", "A_ZS": "Zero-shot retention A_ZS (%)"}
ROLES = {"adapt": "Adaptation (A_KA)", "eval": "Retention (A_ZS)", "transfer": "Transfer"}
STYLE = {
    "font.size": 13, "axes.labelsize": 13, "xtick.labelsize": 12, "ytick.labelsize": 12,
    "axes.edgecolor": "0.4", "axes.labelcolor": "0.1", "xtick.color": "0.25", "ytick.color": "0.25",
    "axes.spines.top": False, "axes.spines.right": False, "lines.linewidth": 2.2,
    "lines.markersize": 5, "figure.dpi": 110, "figure.facecolor": "white",
}  # fmt: skip

Label = tuple[float, float, str, dict[str, Any]]  # x, y, text, properties of the text


@contextlib.contextmanager
def _figure(width: float, height: float, note: str = "", **grid: Any) -> Iterator[tuple]:
    """(figure, axes) in the house style; closed at the end, so that a notebook draws it once."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(width, height), layout="constrained", **grid)
        try:
            figure.supxlabel(note, x=0.01, ha="left", fontsize=10.5, color="0.4")
            yield figure, axes
            figure.draw_without_rendering()  # ticks are made now, in this style
        finally:
            plt.close(figure)


def palette(settings: Iterable[str]) -> dict[str, str]:
    """Setting -> colour, by first appearance; the upper bound and the control are never coloured.

    Hand one palette to all figures of a chapter where they show different parts of a frame.
    """
    ordinary = [name for name in dict.fromkeys(settings) if name not in SPECIAL]
    return dict(zip(ordinary, itertools.cycle(COLOURS), strict=False)) | SPECIAL


@functools.cache
def t_quantile(freedom: int) -> float:
    """The 97.5% point of Student's t; not a number without a degree of freedom.

    With t = sqrt(freedom) tan(a), the density of a is proportional to cos(a)^(freedom - 1).
    """
    if freedom < 1:
        return float("nan")
    angle = np.linspace(0, np.pi / 2, 200_001)
    density = np.cos(angle) ** (freedom - 1)
    mass = np.concatenate([[0], np.cumsum(density[1:] + density[:-1])])
    return float(np.sqrt(freedom) * np.tan(np.interp(0.95, mass / mass[-1], angle)))


def summary(trajectory: pd.DataFrame) -> pd.DataFrame:
    """Index (setting, task): the means "A_KA" and "A_ZS", the half widths of their intervals
    "A_KA half" and "A_ZS half" (not a number where n = 1), and `n`, the number of replicates."""
    scope = "subset" if (trajectory["scope"] == "subset").any() else "full"
    frame = trajectory[trajectory["scope"] == scope]
    if lacking := set(trajectory["setting"]) - set(frame["setting"]):
        raise CmpError(f"trajectory: no {scope!r} rows of {', '.join(sorted(lacking))}")
    groups = frame.groupby(["setting", "task"], sort=False, observed=True)[list(AXES)]
    half = groups.sem() * (groups.count() - 1).map(t_quantile)
    return groups.mean().join(half.add_suffix(" half")).assign(n=groups.count().min(axis=1))


def _layers(
    trajectory: pd.DataFrame, background: pd.DataFrame | None, colours: dict[str, str] | None
) -> tuple[list[tuple[str, pd.DataFrame, dict[str, Any], dict[str, Any] | None]], str]:
    """([(setting, rows by task, line style, label style or None for no label)], what is shown).

    Those of the background come first and pale, and unlabelled where `trajectory` has them too.
    """
    frames = [summary(each) for each in (background, trajectory) if each is not None]
    names = [frame.index.unique("setting") for frame in frames]
    colours, layers = colours or palette(itertools.chain(*names)), []
    place = {name: index for index, name in enumerate(n for n in colours if n not in SPECIAL)}
    for frame, name in (
        (f, name) for f, settings in zip(frames, names, strict=True) for name in settings
    ):
        pale, index = frame is not frames[-1], place.get(name, 0)
        style = {"color": colours[name], "linestyle": LINES[index // len(COLOURS) % len(LINES)]}
        style["marker"] = MARKERS[index % len(MARKERS)]
        style |= {"linestyle": "--", "marker": "X", "markersize": 4} if name in SPECIAL else {}
        style |= {"alpha": 0.35, "linewidth": 1.3, "markersize": 3.5} if pale else {}
        label = {"color": colours[name]} | ({"alpha": 0.6} if pale else {"fontweight": "bold"})
        hidden = pale and name in names[-1]
        layers.append((name, frame.loc[name].sort_index(), style, None if hidden else label))
    low, high = frames[-1]["n"].min(), frames[-1]["n"].max()
    count = f"{high}" if low == high else f"{low} to {high}"
    note = f"Means of {count} replicates, 95% t-intervals" if high > 1 else "One replicate"
    note += " where there are two or more" if low < 2 <= high else ""
    return layers, note + (". Pale: for comparison" if background is not None else "")


def spread(places: Sequence[float], gap: float) -> np.ndarray:
    """Places at least `gap` apart, in the same order, moved as little as possible: isotonic
    regression (least squares, by its max-min formula) of what is left when gaps are taken off."""
    values, n = np.asarray(places, float), len(places)
    order, ramp = np.argsort(values, kind="stable"), gap * np.arange(n)
    v, result = values[order] - ramp, np.empty(n)
    for k in range(n):
        result[order[k]] = ramp[k] + max(
            min(v[i : j + 1].mean() for j in range(k, n)) for i in range(k + 1)
        )
    return result


def _label_ends(axes: Axes, ends: list[Label]) -> None:
    """Labels right of the axes, none on top of another, each tied to its point."""
    axes.figure.draw_without_rendering()
    line = 1.3 * plt.rcParams["font.size"] * axes.figure.dpi / 72
    places = spread([y for _, y, _, _ in ends], line / axes.bbox.height * np.ptp(axes.get_ylim()))
    tie = {"arrowstyle": "-", "linewidth": 0.8, "shrinkA": 1, "shrinkB": 5, "relpos": (0, 0.5)}
    for (x, y, text, style), place in zip(ends, places, strict=True):
        axes.annotate(
            text, (x, y), (1.06, place), textcoords=axes.get_yaxis_transform(), va="center",
            annotation_clip=False, arrowprops=tie | {"color": style["color"]}, **style,
        )  # fmt: skip


def _label_points(axes: Axes, points: list[Label], drawn: np.ndarray) -> None:
    """Labels beside their points, where they hide least of each other and of what is drawn
    ([N, 2], in the axes' units)."""
    axes.figure.draw_without_rendering()
    drawn, inside, boxes = axes.transData.transform(drawn), axes.bbox, []
    for x, y, text, style in points:
        label = axes.annotate(
            text, (x, y), (0, 0), textcoords="offset points", ha="center", va="center", **style
        )
        box, options = label.get_window_extent(), []
        for radius, angle in itertools.product((11, 18, 28, 40), np.arange(24) * np.pi / 12):
            way = np.array([np.cos(angle), np.sin(angle)])
            move = way * (box.size / 2 + radius)
            low, high = box.min + move - 3, box.max + move + 3
            cost = 0.3 * radius + np.all((drawn > low) & (drawn < high), axis=1).sum()
            cost += 1000 * ((low < inside.min).any() + (high > inside.max).any())
            cost += 1000 * sum((low < b).all() and (high > a).all() for a, b in boxes)
            options.append((cost, move, low, high))
        _, move, low, high = min(options, key=lambda option: option[0])
        label.set_position(move * 72 / axes.figure.dpi)
        boxes.append((low, high))


def _contours(axes: Axes) -> None:
    """Lines of equal geometric mean, named above the axes; the limits stay as they are."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    x = np.linspace(max(left, 0.1), right, 200)
    grey = {"color": "0.55", "fontsize": 10, "ha": "center"}
    for mean in MaxNLocator(8, steps=[1, 2, 5, 10]).tick_values(0, np.sqrt(right * top))[1:-1]:
        axes.plot(x, mean**2 / x, color="0.9", linewidth=1, zorder=0)
        if left <= mean**2 / top <= right:
            axes.annotate(
                f"{mean:g}", (mean**2 / top, top), (0, 4), textcoords="offset points", **grey
            )
    axes.set(xlim=(left, right), ylim=(bottom, top))
    axes.annotate(
        "geometric mean (%)",
        (1, 1),
        (0, 20),
        "axes fraction",
        "offset points",
        **grey | {"ha": "right"},
    )


def _draw_end(axes: Axes, name: str, rows: pd.DataFrame, style: dict[str, Any]) -> np.ndarray:
    """The end of one setting's way with its interval; the ends of the bars, [2, 2, 2]."""
    end, pale = rows.iloc[-1], "alpha" in style
    middle, half = end[list(AXES)].to_numpy(), end[[f"{name} half" for name in AXES]].fillna(0)
    bars = dict(zip(("xerr", "yerr"), half, strict=True)) if end["n"] > 1 else {}
    size, marker = (17, "*") if name == JOINT else (11, style["marker"])
    axes.errorbar(
        *middle, **bars, color=style["color"], alpha=style.get("alpha"), elinewidth=1.4, capsize=3,
        marker=marker, markersize=0.65 * size if pale else size, markeredgecolor="white",
        zorder=3 if pale else 5,
    )  # fmt: skip
    return middle + np.diag(half)[:, None] * np.array([-1, 1])[:, None]


def plane(
    trajectory: pd.DataFrame,
    background: pd.DataFrame | None = None,
    colours: dict[str, str] | None = None,
) -> Figure:
    """A_KA against A_ZS: each setting's way through the stream, a marker a task, the end large.

    background: another trajectory frame, drawn pale. colours: a `palette` shared between figures.
    The joint upper bound is a star at its end, for it has no way through the stream.
    """
    layers, note = _layers(trajectory, background, colours)
    ends, starts, drawn = [], [], []
    with _figure(9, 6.2, note) as (figure, axes):
        for name, rows, style, label in layers:
            way = rows[list(AXES)].to_numpy()
            bars = _draw_end(axes, name, rows, style)
            drawn += [np.linspace(*bar, 40) for bar in bars] + [np.repeat(way[-1:], 60, axis=0)]
            ends += [(*way[-1], name, label)] if label else []
            if name != JOINT:
                axes.plot(*way.T, **style)
                axes.plot(
                    *way[0], "o", color="white", markeredgecolor="0.2", markersize=7, zorder=4
                )
                drawn += [np.linspace(*pair, 40) for pair in itertools.pairwise(way)]
                starts += [way[0]] * all(np.hypot(*(way[0] - other)) > 1.5 for other in starts)
        axes.margins(0.12, 0.1)
        axes.set(xlabel=AXES["A_KA"], ylabel=AXES["A_ZS"])
        _contours(axes)
        before = [(*start, "before", {"color": "0.2"}) for start in starts]
        _label_points(axes, before + ends, np.concatenate(drawn))
    return figure


def over_tasks(
    trajectory: pd.DataFrame,
    background: pd.DataFrame | None = None,
    colours: dict[str, str] | None = None,
) -> Figure:
    """A_KA and A_ZS over the updates learned, side by side; arguments as those of `plane`.

    The joint upper bound is a level: its score after its last task.
    """
    layers, note = _layers(trajectory, background, colours)
    last = max(rows.index[-1] for _, rows, _, _ in layers)
    with _figure(12, 5, note, ncols=2) as (figure, panels):
        for axes, (column, title) in zip(panels, AXES.items(), strict=True):
            ends = []
            for name, rows, style, label in layers:
                tasks, mean, half = rows.index, rows[column], rows[f"{column} half"]
                if name == JOINT:
                    axes.axhline(mean.iloc[-1], **style | {"linewidth": 1.6, "marker": ""})
                else:
                    axes.plot(tasks, mean, **style)
                    band = {"color": style["color"], "alpha": 0.4 * style.get("alpha", 0.45)}
                    axes.fill_between(tasks, mean - half, mean + half, **band, linewidth=0)
                x = last if name == JOINT else tasks[-1]
                ends += [(x, mean.iloc[-1], name, label)] if label else []
            axes.set(xlabel="Updates learned", ylabel=title, xlim=(-0.02 * last, 1.02 * last))
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _label_ends(panels[1], ends)
    return figure


def _dumbbell(axes: Axes, y: int, before: pd.Series, after: pd.Series) -> None:
    """One dataset of `change_by_dataset`."""
    change = after["score"] - before["score"]
    colour = COLOURS[0] if change >= 0 else COLOURS[3]
    shared = {"color": colour, "markeredgecolor": colour, "marker": "o", "markersize": 8}
    axes.plot(
        [before["score"], after["score"]],
        [y - 0.13, y + 0.13],
        color=colour,
        linewidth=3,
        alpha=0.35,
    )
    for row, place, fill in ((before, y - 0.13, "white"), (after, y + 0.13, colour)):
        half = 1.96 * row["standard_error"]
        axes.errorbar(
            row["score"], place, xerr=half, elinewidth=1.3, markerfacecolor=fill, **shared
        )
    axes.vlines(after["chance"], y - 0.3, y + 0.3, color="0.6", linewidth=1.5, zorder=0)
    text = f"{change:+.1f}".replace("-", "−")
    axes.text(1.02, y, text, transform=axes.get_yaxis_transform(), va="center", color=colour)


def change_by_dataset(before: pd.DataFrame, after: pd.DataFrame) -> Figure:
    """Scores before and after by dataset, in groups by role, the largest gain first.

    before, after: index dataset; columns `role`, `score`, `standard_error`, `chance` (percent).
    Raises `CmpError` if the two have different datasets.
    """
    if odd := set(before.index) ^ set(after.index):
        raise CmpError(f"only one of before and after has {', '.join(sorted(odd))}")
    gains = (after["score"] - before["score"]).sort_values(ascending=False, kind="stable")
    roles = after["role"][gains.index]
    groups = [(title, gains.index[roles == role]) for role, title in ROLES.items()]
    rows = [row for title, names in groups if len(names) for row in (title, *names)]
    note = "Hollow: before, filled: after, with 95% intervals over test images. Grey tick: chance"
    with _figure(9, 0.36 * len(rows) + 1.4, note) as (figure, axes):
        axes.set_yticks(range(len(rows)), rows)
        for y, (name, label) in enumerate(zip(rows, axes.get_yticklabels(), strict=True)):
            if name in gains.index:
                _dumbbell(axes, y, before.loc[name], after.loc[name])
            else:
                label.set_fontweight("bold")
        axes.tick_params(axis="y", length=0)
        axes.set(xlabel="Score (%)", ylim=(len(rows) - 0.4, -0.6))
        axes.grid(axis="x", color="0.92", zorder=-1)
    return figure


def stream(counts: pd.DataFrame) -> Figure:
    """How many classes of each dataset arrive in each update.

    counts: index task (1, 2, ...), a column a dataset, values number of classes.
    """
    table = counts.T.set_axis([f"{name}  ({total})" for name, total in counts.sum().items()])
    size = (3 + 0.5 * max(len(counts), 4), 0.42 * len(table) + 1.1)
    with _figure(*size, "Classes; in brackets: over all updates") as (figure, axes):
        text = table.astype(str).mask(table == 0, "")
        style = {"cmap": "Blues", "vmin": 0, "vmax": 1.15 * table.to_numpy().max(), "cbar": False}
        sns.heatmap(
            table, annot=text, fmt="", linewidths=1.5, annot_kws={"size": 11}, ax=axes, **style
        )
        axes.tick_params(length=0, labelrotation=0)
        axes.set(xlabel="Update", ylabel="")
    return figure


def gallery(
    images: Any, titles: Sequence[str], columns: int = 8, subtitles: Sequence[str] | None = None
) -> Figure:
    """Images over white, enlarged without smoothing, each with its title (and subtitle) below.

    images: uint8 [N, 4, H, W], RGBA, array or tensor.
    """
    pixels = np.asarray(images).transpose(0, 2, 3, 1) / 255
    pixels = 1 - pixels[..., 3:] * (1 - pixels[..., :3])
    lines = -(-len(pixels) // columns)
    height = 1.9 + 0.25 * bool(subtitles)
    with _figure(1.45 * columns, height * lines, nrows=lines, ncols=columns) as (figure, axes):
        for place in np.ravel(axes):
            place.set_axis_off()
        below = {"textcoords": "offset points", "ha": "center", "va": "top"}
        for n, (place, image) in enumerate(zip(np.ravel(axes), pixels, strict=False)):
            place.imshow(image, interpolation="nearest")
            title = textwrap.fill(titles[n], 15)
            place.annotate(title, (0.5, 0), (0, -5), "axes fraction", fontsize=10.5, **below)
            if subtitles is not None:
                down = (0, -21 - 13 * title.count("\n"))
                text = textwrap.fill(subtitles[n], 18)
                place.annotate(
                    text, (0.5, 0), down, "axes fraction", fontsize=9, color="0.45", **below
                )
    return figure


def learning_rates(curves: pd.DataFrame) -> Figure:
    """Learning rates over the stream, with the borders between tasks.

    curves: columns `schedule`, `task`, `step` (within the stream), `rate`.
    """
    colours, ends = palette(curves["schedule"]), []
    with _figure(10, 4, "Thin lines: a new task begins") as (figure, axes):
        for border in curves.groupby("task")["step"].min().iloc[1:]:
            axes.axvline(border - 0.5, color="0.85", linewidth=1, zorder=0)
        for name, curve in curves.groupby("schedule", sort=False):
            axes.plot(curve["step"], curve["rate"], color=colours[name])
            ends.append((*curve[["step", "rate"]].iloc[-1], name, {"color": colours[name]}))
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
        axes.set(xlabel="Optimizer step", ylabel="Learning rate", ylim=(0, None))
        axes.margins(x=0.01)
        _label_ends(axes, ends)
    return figure


def batch_mixture(parts: pd.DataFrame, passes: pd.DataFrame) -> Figure:
    """What a batch is made of, and how often an image is seen over the stream.

    parts: a row a kind of batch (index: its name), columns "pretraining pool", "update", "buffer":
    samples. passes: index = the task in which an image arrives, 0 for images of the pretraining
    pool; columns "own task" and "replay": how often it is seen, on average.
    """
    with _figure(12, 4.4, ncols=2, width_ratios=[1, 1.3]) as (figure, (left, right)):
        start = 0 * parts["update"]
        for name, colour in POOLS.items():
            bars = left.barh(parts.index, parts[name], 0.6, start, color=colour, label=name)
            counts = [f"{count:g}" if count else "" for count in parts[name]]
            left.bar_label(bars, counts, label_type="center", color="white", fontweight="bold")
            start = start + parts[name]
        left.set(xlabel="Samples in a batch", ylim=(max(len(parts), 2) - 0.5, -0.5))
        names = [str(task) if task else "pool" for task in passes.index]
        replay = [POOLS["buffer" if task else "pretraining pool"] for task in passes.index]
        right.bar(names, passes["own task"], color=POOLS["update"])
        bars = right.bar(names, passes["replay"], bottom=passes["own task"], color=replay)
        right.bar_label(bars, fmt="{:.3g}", padding=2, fontsize=10, color="0.3")
        right.set(xlabel="Update in which the image arrives", ylabel="Times an image is seen")
        figure.legend(
            *left.get_legend_handles_labels(), loc="outside upper left", ncols=3, frameon=False
        )
        figure.get_layout_engine().set(wspace=0.06)
    return figure
