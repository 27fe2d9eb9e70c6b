"""The first screen: the same pictures and their predicted names after each update, for several ways
to update.

`compute_predictions` trains each way once, and `write_predictions` stores the results. The site,
JupyterLab's start page and README's picture are made from the stored results.
"""

import functools
import html
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

import cmp
from cmp.config import RunConfig
from cmp.data import Corpus
from cmp.files import write_atomic
from cmp.merging.rules import Weights
from cmp.parsing import parse_json, read_text, read_yaml
from lab import analyses, chapters, explorers, scrubber

SHEET = chapters.BOOK / "first_screen.yaml"
STORED = chapters.BOOK / "first_screen.json"
PICTURE = chapters.BOOK / "forgetting.svg"
SHOWN = 24
KINDS = ("emoji-living", "emoji-things", "emoji-signs", "emoji-line")
"""The datasets of the pictures."""
FORGETS, KEEPS = "at a normal rate", "recipe"
"""The stops that README's picture shows side by side."""


def stop_configs() -> dict[str, RunConfig]:
    """Return the run of each stop of the slider by name."""
    sheet = read_yaml(SHEET)
    found = {}
    for stop in sheet["stops"]:
        changes = sheet["all"] | stop["changes"]
        found[stop["name"]] = explorers.changed_run(sheet["profile"], changes)
    return found


def served_weights(run: RunConfig, corpus: Corpus) -> Iterator[Weights]:
    """Yield the deployed weights before the stream and after each update.

    Args:
        run: A run without merging, or with EMA-Merge.
        corpus: The embedded benchmark.
    """
    share, served = run.merging.weight, None
    for trained in analyses.task_end_weights(run, corpus):
        if served is None or run.merging.policy == "none":
            served = trained
        else:
            served = cmp.merge("interpolation", [trained, served], weights=(share, 1 - share))
        yield served


def shown_images(names: pd.DataFrame, corpus: Corpus) -> tuple[list[int], int]:
    """Choose emoji that training on only new data loses: named correctly before the updates, and
    wrongly after them.

    Args:
        names: The `old` predictions for training on only new data.
        corpus: The embedded benchmark.

    Returns:
        The corpus positions of the emoji to show, from each dataset in turn, and the number of lost
        emoji. Pictures with duplicate names are left out.
    """
    first, last = names.columns[1], names.columns[-1]
    lost = names.index[names[first].eq(names["truth"]) & names[last].ne(names["truth"])]
    datasets = corpus.table["dataset"].astype(str)
    queues = {kind: [row for row in sorted(lost) if datasets[row] == kind] for kind in KINDS}
    count, chosen, seen = sum(map(len, queues.values())), list[int](), set[str]()
    for kind in itertools.cycle(KINDS):
        if len(chosen) == SHOWN or not any(queues.values()):
            break
        while queues[kind]:
            row = queues[kind].pop(0)
            if (truth := names.loc[row, "truth"]) not in seen:
                seen.add(truth)
                chosen.append(int(row))
                break
    return chosen, count


def new_images(names: pd.DataFrame, corpus: Corpus) -> list[int]:
    """Choose pictures of the kinds that the updates bring: of each dataset the first one, in the
    order of the data, that is named wrongly before the updates.

    Args:
        names: The `new` predictions of any run, which agree before the updates.
        corpus: The embedded benchmark.

    Returns:
        The corpus positions of the pictures.
    """
    wrong = names.index[names[names.columns[1]].ne(names["truth"])].sort_values()
    datasets = corpus.table["dataset"].astype(str).loc[wrong]
    return wrong[~datasets.duplicated()].tolist()


def compute_predictions() -> dict[str, Any]:
    """Train each stop of the slider once, and return the data of the first screen.

    Returns:
        `stops`: for each stop its texts, the `names` of the shown images and the `new_names` of the
        new ones after each update, and the `scores`; `images` and `new_images`: the `truth` of
        each; `sprite` and `new_sprite`: their pictures side by side, as data URLs; `rule`: how they
        were chosen.
    """
    corpus = cmp.load_data("embedded")
    predictions = {}
    for name, run in stop_configs().items():
        served = served_weights(run, corpus)
        predictions[name] = analyses.predict_names(served, run.model.name, corpus)
    sheet, alone = read_yaml(SHEET), predictions[FORGETS]
    (rows, lost), new_rows = shown_images(alone.old, corpus), new_images(alone.new, corpus)
    stops = []
    for stop in sheet["stops"]:
        made = predictions[stop["name"]]
        names, new_names = (
            table.drop(columns="truth").loc[shown].to_numpy().tolist()
            for table, shown in ((made.old, rows), (made.new, new_rows))
        )
        about = {key: stop[key] for key in ("name", "stop", "label")}
        stops.append(about | {"names": names, "new_names": new_names, "scores": made.scores})
    last = len(stops[0]["scores"]) - 1
    return {
        "script": "scrubber",
        "begins": [stop["name"] for stop in stops].index(sheet["begins"]),
        "images": _truths(alone.old, rows),
        "sprite": scrubber.sprite(corpus, rows),
        "new_images": _truths(alone.new, new_rows),
        "new_sprite": scrubber.sprite(corpus, new_rows),
        "stops": stops,
        "rule": sheet["rule"].format(shown=len(rows), lost=lost, new=len(new_rows), updates=last),
    }


def _truths(names: pd.DataFrame, rows: list[int]) -> list[dict[str, Any]]:
    return [{"truth": names.loc[row, "truth"], "row": row} for row in rows]


@functools.cache
def stored_table() -> dict[str, Any]:
    """Return the stored table of the first screen."""
    return parse_json(read_text(STORED))


def first_explorer(**state: Any) -> explorers.Explorer:
    """Explore which pictures a model still names correctly, depending on how much old data is
    replayed.

    Args:
        **state: The initial state: `stop`, counted from 0, and `update`.

    Returns:
        The explorer.
    """
    still = {"text/html": f'<div data-explorer="first">{picture()}</div>'}
    return explorers.Explorer("scrubber", stored_table(), still, state)


# README's picture, an animation without a script

COLUMNS, ROWS = 4, 3
TILE, GAP, HEAD = (92, 74), 6, 46
HOLD, ENDS = 0.9, 3.2
"""Seconds for which each frame, and the last frame, is shown. The loop begins with the last
frame, so that a glance sees how it ends."""
MOMENTS = (0, 1, 2, 3, 4, 5, 7, 10, 14)
"""The step between shown updates, and the last one."""
LONGEST = 15
RIGHT, WRONG = "#0173b2", "#b04a00"


def picture() -> str:
    """Draw the same pictures with and without the recipe after each update, as an animated SVG."""
    table = stored_table()
    stops = {stop["name"]: stop for stop in table["stops"]}
    wide, high = COLUMNS * (TILE[0] + GAP) - GAP, ROWS * (TILE[1] + GAP) - GAP
    width, height = 2 * wide + 44, HEAD + high + 34
    titles = {FORGETS: "New data alone", KEEPS: "The recipe: replay and averaging"}
    last = len(table["stops"][0]["scores"]) - 1
    moments = [*(update for update in MOMENTS if update < last), last]
    parts = [
        _style(len(moments)),
        f'<rect x="-14" y="-10" width="{width + 28}" height="{height + 20}" rx="10" fill="#fff"/>',
    ]
    for side, (name, title) in enumerate(titles.items()):
        left = side * (wide + 44)
        parts.append(f'<text class="title" x="{left}" y="18">{html.escape(title)}</text>')
        parts += [
            f'<text class="sum m{n}" x="{left}" y="38">after {update} update{"s" * (update != 1)}: '
            f"{stops[name]['scores'][update]['A_ZS']:.0f}% of what is old, "
            f"{stops[name]['scores'][update]['A_KA']:.0f}% of what is new</text>"
            for n, update in enumerate(moments)
        ]
        for place in range(COLUMNS * ROWS):
            row, column = divmod(place, COLUMNS)
            x, y = left + column * (TILE[0] + GAP), HEAD + row * (TILE[1] + GAP)
            parts.append(_tile(table, stops[name], moments, place, x, y))
    words = "Each picture was named correctly before the updates. Blue: correct. Orange: wrong."
    parts.append(f'<text class="sum" x="0" y="{height - 8}">{words}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="-14 -10 {width + 28} {height + 20}" width="{width + 28}" '
        f'height="{height + 20}" role="img" '
        f'aria-label="{ALT}">\n' + "\n".join(parts) + "\n</svg>\n"
    )


ALT = (
    "Twelve small pictures and their names, twice, update by update: with training on new data "
    "alone all names become wrong, and with the recipe most stay right."
)


def _style(count: int) -> str:
    """Return the style of the picture, which shows the texts of a number of frames in turn."""
    before_last = HOLD * (count - 1)
    total = before_last + ENDS
    lines = [
        "text{font-family:system-ui,sans-serif;fill:#1d2329}.title{font-size:16px;font-weight:700}",
        f".sum{{font-size:12px}}.n{{font-size:10.5px;text-anchor:middle}}.w{{fill:{WRONG}}}",
        f".r{{fill:{RIGHT}}}.c{{fill:#fff;stroke:#d5dbe1}}",
    ]
    for n in range(count):
        begin = 100 * n * HOLD / total
        end = 100 * min(total, (n + 1) * HOLD if n < count - 1 else total) / total
        shown = f"{begin:.2f}%,{end - 0.01:.2f}%{{opacity:1}}"
        hidden = "0%{opacity:0}" if n else ""
        before = f"{max(0.0, begin - 0.01):.2f}%{{opacity:0}}" if n else ""
        after = f"{end:.2f}%,100%{{opacity:0}}" if n < count - 1 else ""
        lines.append(f"@keyframes k{n}{{{hidden}{before}{shown}{after}}}")
        timing = f"{total:.1f}s linear -{before_last:.1f}s infinite"
        lines.append(f".m{n}{{opacity:0;animation:k{n} {timing}}}")
    still = f".m{count - 1}{{animation:none;opacity:1}}"
    others = ",".join(f".m{n}" for n in range(count - 1))
    lines.append(f"@media (prefers-reduced-motion:reduce){{{others}{{animation:none}}{still}}}")
    return f"<style>{''.join(lines)}</style>"


def _tile(
    table: dict[str, Any], stop: dict[str, Any], moments: list[int], place: int, x: int, y: int
) -> str:
    """Draw a picture with its name in each frame, merging equal consecutive names."""
    truth, names = table["images"][place]["truth"], stop["names"][place]
    wide, high = TILE
    pixels = scrubber.one_picture(table["sprite"], place)
    parts = [
        f'<g transform="translate({x},{y})">',
        f'<rect class="c" width="{wide}" height="{high}" rx="6"/>',
        f'<image x="{wide / 2 - 20}" y="6" width="40" height="40" xlink:href="{pixels}" '
        'style="image-rendering:pixelated"/>',
    ]
    for n, update in enumerate(moments):
        name = names[update]
        kind = "r" if name == truth else "w"
        short = name if len(name) <= LONGEST else name[: LONGEST - 1] + "…"
        parts.append(
            f'<g class="m{n}">'
            f'<rect class="{kind}" y="{high - 4}" width="{wide}" height="4" rx="2"/>'
            f'<text class="n {kind}" x="{wide / 2}" y="{high - 12}">{html.escape(short)}</text></g>'
        )
    return "".join(parts) + "</g>"


def write_picture() -> Path:
    """Draw README's picture from the stored predictions, and return its path."""
    write_atomic(PICTURE, picture())
    return PICTURE


def write_predictions() -> Path:
    """Compute and store the predictions of the first screen, and return their path."""
    write_atomic(STORED, json.dumps(compute_predictions(), ensure_ascii=False, indent=0) + "\n")
    return STORED
