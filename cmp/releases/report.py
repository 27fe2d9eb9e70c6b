"""A comparison as one page of HTML: images first, no network, and no script needed to read it."""

import html
import itertools
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cmp import evaluation
from cmp.errors import clean_text
from cmp.evaluation import RETRIEVAL_K
from cmp.files import write_atomic
from cmp.releases import sentences
from cmp.releases.compare import ALL, NAMING, TO_IMAGE, Comparison
from cmp.releases.gate import GateLine
from cmp.releases.index import KNOWN, NEW, RECALL_AT
from cmp.releases.sentences import count_of, decimal, interval_in_words, signed
from cmp.releases.thumbnails import SIDE, picture_uris

LARGEST = 3_000_000
"""Maximum bytes of a page."""
ON_WALL, PER_CONCEPT = {"lost": 42, "gained": 28}, 2
"""The most images on each wall, and per concept."""
WORST, SHOTS = 20, (3, 8)
"""The most concepts per set in the list of the worst; the most images per concept, and concepts per
set with images."""
MOST_SETS = 80
"""The most sets with a list of their worst concepts."""
CLEARLY = 1.0
"""By how many points recall must differ to decide what is encoded again."""
FEW_QUERIES = 50
"""Fewer queries of one kind are too few to decide it."""
LONGEST = 90
"""The most characters of a name or a caption; the rest is cut off."""
ROLES = {"adapt": "New content (A_KA)", "eval": "Old content (A_ZS)", "transfer": "Transfer"}
MEANS = {role: name for name, role in evaluation.ROLES.items()}
QUERIES = {"text": "words", "picture": "an image"}
NAME_WALLS = {
    "lost": ("Names lost", "images that lost a name", "No correct name became wrong."),
    "gained": ("Names gained", "images that gained a name", "No wrong name became correct."),
}
"""Of each wall: its heading, what it counts, and what it says if it is empty."""
CAPTION_WALLS = {
    "lost": (
        "Images that captions no longer find", "images that a caption no longer finds",
        "Each caption that found its image still does.",
    ),
    "gained": (
        "Images that captions find now", "images that a caption finds only now",
        "No caption finds its image that did not before.",
    ),
}  # fmt: skip
"""The same where no set has names."""
INDEX_COLUMNS = {
    "before": "old model on its own index",
    "as_is": "new model, old index",
    "new_first": "new images re-encoded",
    "reencoded": "everything re-encoded",
}


def write_report(
    comparison: Comparison,
    path: str | os.PathLike[str],
    title: str | None = None,
    gate: Sequence[GateLine] = (),
    notes: Sequence[str] = (),
    background: Sequence[str] = (),
) -> None:
    """Write a comparison as a page of at most 3 MB, whole or not at all.

    Args:
        comparison: The models.
        path: The HTML file.
        title: The page's heading. If None, it asks whether the new model may be deployed.
        gate: The limits, and whether they were kept, see `cmp.releases.gate.apply_gate`.
        notes: Sentences that follow the heading.
        background: Sentences to fold below them, such as what arrived.

    Raises:
        CmpError: The file cannot be written.

    Example:
        >>> corpus = cmp.load_data("embedded")
        >>> tables = cmp.compare("small:annealed", "small:unannealed", corpus, subset=4)
        >>> cmp.write_report(tables, folder / "report.html")
        >>> (folder / "report.html").stat().st_size < 3_000_000
        True
    """
    write_atomic(
        Path(os.path.expanduser(path)), report_page(comparison, title, gate, notes, background)
    )


def report_page(
    comparison: Comparison,
    title: str | None = None,
    gate: Sequence[GateLine] = (),
    notes: Sequence[str] = (),
    background: Sequence[str] = (),
) -> str:
    """Return the page of `write_report`, whose arguments these are."""
    walls = {kind: choose_flips(comparison, kind) for kind in ON_WALL}
    shots = _choose_shots(comparison)
    wanted = [*(row for wall in walls.values() for row in wall["row"])]
    wanted += itertools.chain.from_iterable(shots.values())
    title = title or "Deploy the new model?"

    def make(uris: dict[int, str]) -> str:
        parts = [
            _head(comparison, title, gate, notes, background),
            *(_wall(comparison, kind, walls[kind], uris) for kind in ON_WALL),
            _scores(comparison),
            _concepts(comparison, shots, uris),
            _retrieval(comparison),
            _index(comparison),
            _gate(gate),
            _caveats(comparison),
        ]
        return _document(title, "\n".join(filter(None, parts)))

    # images get the space that the text leaves
    framed = len(make(dict.fromkeys(wanted, "")).encode())
    return make(picture_uris(comparison.corpus, wanted, max(0, LARGEST - framed)))


def choose_flips(comparison: Comparison, kind: str) -> pd.DataFrame:
    """Return the flips that a wall shows: from each set in turn, largest changes first, and at most
    a few per concept.

    Args:
        comparison: The models.
        kind: "lost" or "gained".
    """
    flips = _shown_flips(comparison, kind)
    size = flips.groupby(["dataset", "concept"])["row"].transform("size")
    flips = flips.assign(size=size).sort_values("size", ascending=False, kind="stable")
    place = flips.groupby(["dataset", "concept"]).cumcount()
    flips = flips[place < PER_CONCEPT]
    share = comparison.sets[f"{kind}_share"]
    flips = flips.assign(
        turn=flips.groupby("dataset").cumcount(), share=-flips["dataset"].map(share).astype(float)
    )
    return flips.sort_values(["turn", "share"], kind="stable").head(ON_WALL[kind])


def _shown_flips(comparison: Comparison, kind: str) -> pd.DataFrame:
    """Return the images that lost or gained their name or, if no set has names, those that a
    caption no longer finds, or finds now."""
    flips, question = comparison.flips, NAMING if _has_names(comparison) else TO_IMAGE
    chosen = (flips["kind"] == kind) & (flips["asked"] == question)
    return flips[chosen].drop_duplicates(["dataset", "row"])


def _has_names(comparison: Comparison) -> bool:
    """Return whether any set has names; the others have captions."""
    return bool((comparison.sets["metric"] == "top-1").any())


def _wall_words(comparison: Comparison, kind: str) -> tuple[str, str, str]:
    """Return the heading of a wall, what it counts, and what it says if it is empty."""
    return (NAME_WALLS if _has_names(comparison) else CAPTION_WALLS)[kind]


def _choose_shots(comparison: Comparison) -> dict[tuple[str, str], list[int]]:
    """Return the images to show beside the worst concepts, by dataset and concept."""
    flips = comparison.flips
    lost = flips[(flips["kind"] == "lost") & (flips["asked"] == NAMING)]
    rows = lost.groupby(["dataset", "concept"])["row"].apply(lambda rows: list(rows)[: SHOTS[0]])
    shots = {}
    for _, table in comparison.worst_concepts(SHOTS[1]).groupby("dataset", sort=False):
        for row in table[table["questions"] > 1].itertuples():
            shots[row.dataset, row.concept] = rows.get((row.dataset, row.concept), [])
    return shots


# words


def _text(value: object, longest: int = LONGEST) -> str:
    """Return a user's text for HTML: escaped, without control characters, and cut if too long."""
    text = clean_text(str(value)).encode("utf-8", "ignore").decode()  # without half characters
    return html.escape(text if len(text) <= longest else text[: longest - 1] + "…")


def _document(title: str, body: str) -> str:
    folder = Path(__file__).parent
    style, script = ((folder / f"report.{kind}").read_text("utf-8") for kind in ("css", "js"))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        f"{body}\n</main>\n<script>\n{script}</script>\n</body>\n</html>\n"
    )


# the parts of the page


def _head(
    comparison: Comparison,
    title: str,
    gate: Sequence[GateLine],
    notes: Sequence[str],
    background: Sequence[str],
) -> str:
    tiles = []
    for name, words in (
        ("A_ZS", "A_ZS, known content"),
        ("A_KA", "A_KA, new content"),
        (ALL, "all sets"),
    ):
        table = comparison.summary
        if name in table.index and (name != ALL or len(table) == 1):
            row = table.loc[name]
            tiles.append(
                f"<li><b>{decimal(row['old'])} → {decimal(row['new'])}</b><span>{words}: mean of "
                f"{count_of(int(row['sets']), 'set')}, {signed(row['change'])} "
                f"({interval_in_words(row['low'], row['high'])})</span></li>"
            )
    for kind in ON_WALL:
        _, counted, _ = _wall_words(comparison, kind)
        tiles.append(
            f'<li><b class="{"lost" if kind == "lost" else "found"}">'
            f"{len(_shown_flips(comparison, kind)):,}</b><span>{counted}</span></li>"
        )
    verdict = ""
    if gate:
        broken = sum(not line.passed for line in gate)
        state = f"✗ not passed: {broken} of {count_of(len(gate), 'limit')} broken"
        if not broken:
            judged = sum(line.judged for line in gate)
            state = f"✓ passed: {count_of(judged, 'limit')} kept{_unjudged(gate)}"
        kind = "lost" if broken else "found"
        verdict = f'<p><a class="verdict {kind}" href="#gate">{state}</a></p>'
    # a terminal has them as lines
    paragraphs = (f"{note[:1].upper()}{note[1:].removesuffix('.')}." for note in notes)
    said = "".join(f"<p>{_text(paragraph, 500)}</p>" for paragraph in paragraphs)
    who = f"<b>{_text(comparison.old)}</b> before, <b>{_text(comparison.new)}</b> now"
    return (
        f'<header>\n<h1>{_text(title, 300)}</h1>\n<p class="who">{who}</p>\n{verdict}\n'
        f'<p class="lede">{_finding(comparison)}</p>\n{said}'
        f'<ul class="tiles">{"".join(tiles)}</ul>\n{_fold(background)}</header>'
    )


def _fold(background: Sequence[str]) -> str:
    """Return a folded list of what arrived and how it was trained."""
    lines = "".join(f"<li>{_text(line, 500)}</li>" for line in background)
    summary = "<summary>What arrived, and how it was trained</summary>"
    return f"<details>{summary}<ul>{lines}</ul></details>\n" if lines else ""


def _finding(comparison: Comparison) -> str:
    """Return the main result in a sentence or two."""
    if comparison.is_same:
        return "Both models have the same features to the last bit, so nothing was lost or gained."
    named = comparison.sets[comparison.sets["metric"] == "top-1"]
    if named.empty:
        return "No set has names, so only searches by caption are compared; see below."
    right = round(float((named["old"] * named["questions"]).sum() / 100))
    lost, gained = (len(_shown_flips(comparison, kind)) for kind in ON_WALL)
    if not right:
        return f"{count_of(gained, 'image')} gained a name; the old model named none of them right."
    words = (
        f"Of {count_of(right, 'image')} that the old model named right, the new one gets "
        f"{lost:,} wrong ({100 * lost / right:.0f}%). It names {gained:,} others right that the "
        "old one did not."
    )
    for row in comparison.worst_concepts(1, each=False).itertuples():
        words += (
            f" The worst concept is <b>{_text(row.concept)}</b> ({_text(row.dataset)}): of its "
            f"{count_of(row.questions, 'image')}, {row.lost:,} lost their right name, and "
            f"{row.gained:,} gained it."
        )
    return words


def _image(comparison: Comparison, uri: str, alt: str) -> str:
    images: Any = comparison.corpus.images
    is_small = not comparison.corpus.in_files and images.shape[-1] < SIDE
    small = ' class="small"' if is_small else ""
    return f'<img{small} src="{uri}" alt="{alt}" loading="lazy">'


def _wall(comparison: Comparison, kind: str, flips: pd.DataFrame, uris: dict[int, str]) -> str:
    heading, _, nothing = _wall_words(comparison, kind)
    if flips.empty:
        return f'<section id="{kind}">\n<h2>{heading}</h2>\n<p>{nothing}</p>\n</section>'
    cards = "\n".join(_card(comparison, row, uris) for row in flips.itertuples())
    total = len(_shown_flips(comparison, kind))
    shown = f"{len(flips)} of {count_of(total, 'image')}" if total > len(flips) else "All of them"
    text, answers = "caption", ""
    if _has_names(comparison):
        text = "name"
        answers = " The upper name is the old model's answer, the lower one the new model's."
    words = f"{shown}, at most {PER_CONCEPT} per {text}, from each set in turn.{answers}"
    options = "".join(f"<option>{_text(name)}</option>" for name in flips["dataset"].unique())
    controls = (
        f'<div class="filter" data-wall="wall-{kind}"><select aria-label="Set"><option value="">'
        f'all sets</option>{options}</select><input type="search" placeholder="a '
        f'{text}" aria-label="Show only {text}s with these letters"><output></output></div>'
    )
    gains = " gains" if kind == "gained" else ""
    return (
        f'<section id="{kind}">\n<h2>{heading}</h2>\n<p class="quiet">{words}</p>\n{controls}\n'
        f'<ul class="wall{gains}" id="wall-{kind}">\n{cards}\n</ul>\n</section>'
    )


def _card(comparison: Comparison, row: Any, uris: dict[int, str]) -> str:
    """Return the card of one flip: the image, and its names before and now."""
    concept, lost = _text(row.concept), row.kind == "lost"
    if row.asked == NAMING:
        wrong = _text(row.said_new if lost else row.said_old)
        was, now = (concept, wrong) if lost else (wrong, concept)
        marks = ("✓", "✗") if lost else ("✗", "✓")
        kinds = ("found", "lost") if lost else ("lost", "found")
        words = (
            f'<span class="{kinds[0]}">{marks[0]}</span> {was}<br>'
            f'<span class="{kinds[1]}">{marks[1]}</span> <b>{now}</b>'
        )
        alt = f"{concept}; before: {was}; now: {now}"
    else:
        words = f"“{concept}” {'no longer finds it' if lost else 'finds it now'}"
        alt = f"image of “{concept}”"
    shown = _image(comparison, uris[row.row], alt) if row.row in uris else ""
    frame = f'<div class="frame">{shown}</div>' if shown else "<div></div>"
    return (
        f'<li class="card" data-set="{_text(row.dataset)}">{frame}<div>{words}'
        f'<span class="set">{_text(row.dataset)}</span></div></li>'
    )


def _scores(comparison: Comparison) -> str:
    """Return the scores of all sets, each with its change and interval drawn."""
    sets, summary = comparison.sets, comparison.summary
    down, up = int((sets["high"] < 0).sum()), int((sets["low"] > 0).sum())
    updates = comparison.updates
    shown = pd.concat([sets, updates]) if len(updates) else sets
    ends = [value for value in (*shown["low"], *shown["high"], *shown["change"]) if value == value]
    low, high = min(0.0, *ends), max(0.0, *ends)
    margin = 0.04 * (high - low) or 1.0
    scale = (low - margin, high + margin)
    lines = []
    for role, heading in ROLES.items():
        members = sets[sets["role"] == role].sort_values("change", kind="stable")
        if members.empty:
            continue
        lines.append(f'<li class="role">{heading}</li>')
        if role in MEANS and len(members) > 1:
            words = f"mean of {len(members)} sets"
            lines.append(_score_line(words, summary.loc[MEANS[role]], scale, "mean"))
        lines += [_score_line(_text(name), row, scale) for name, row in members.iterrows()]
        if role == "adapt" and len(updates):
            lines.append('<li class="role">The same new content by update</li>')
            lines += [_score_line(_text(name), row, scale) for name, row in updates.iterrows()]
    lines.append(_axis(scale))
    heading = f"{count_of(down, 'set')} of {len(sets)} clearly worse, {up} clearly better"
    if comparison.is_same:
        heading = "No score changes"
    about_updates = _text(sentences.describe_updates(comparison), 5_000)
    return (
        f'<section id="scores">\n<h2>{heading}</h2>\n<p class="quiet">Points by which each score '
        "changed, with 95% intervals over groups of images. "
        '<span class="lost">■ clearly lower</span>, <span class="found">● clearly higher</span>, '
        "○ could be either. In brackets: the number of scored images. On the right: the share of "
        f"right answers that are wrong now.{_explain_answers(comparison)}</p>\n"
        f'<p class="quiet">{sentences.SCORES} {sentences.describe_splits()} {about_updates}</p>\n'
        f'<ul class="scores">\n{chr(10).join(lines)}\n</ul>\n</section>'
    )


def _explain_answers(comparison: Comparison) -> str:
    """Return why more answers than images can be lost, or "" if no set has captions."""
    if (comparison.sets["metric"] == "top-1").all():
        return ""
    words = " A set with captions asks in both directions, so it has more answers than images"
    if _has_names(comparison):
        words += "; they are not among the images that lost a name"
    return f"{words}."


def _score_line(name: str, row: pd.Series, scale: tuple[float, float], kind: str = "") -> str:
    change, low, high = (float(row[key]) for key in ("change", "low", "high"))
    words = f"{signed(change)} ({interval_in_words(low, high)})"
    state = "down" if high < 0 else "up" if low > 0 else "open"
    at = f"{_percent(change, scale)}%"
    mark = f'<circle class="{state}" cx="{at}" cy="50%" r="5"/>'
    if state == "down":
        mark = f'<rect class="down" x="{at}" y="50%" width="9" height="9" '
        mark += 'transform="translate(-4.5,-4.5)"/>'
    interval = ""
    if not math.isnan(low):
        ends = f'x1="{_percent(low, scale)}%" x2="{_percent(high, scale)}%"'
        interval = f'<line class="{state}" {ends} y1="50%" y2="50%"/>'
    zero = f"{_percent(0, scale)}%"
    lost = "nothing was right" if math.isnan(row["lost_share"]) else ""
    lost = lost or f"{row['lost_share']:.0f}% lost ({count_of(int(row['lost']), 'answer')})"
    lost = "nothing lost" if not row["lost"] and row["old"] else lost
    count = f' <span class="quiet">({row["images"]:,.0f})</span>' if "images" in row else ""
    return (
        f'<li class="{kind}"><span>{name}{count}</span>'
        f"<span>{decimal(row['old'])} → {decimal(row['new'])}</span>"
        f'<svg role="img" aria-label="{words}"><title>{words}</title><line class="zero" '
        f'x1="{zero}" x2="{zero}" y1="0" y2="100%"/>{interval}{mark}</svg>'
        f'<span class="right">{lost}</span></li>'
    )


def _percent(value: float, scale: tuple[float, float]) -> str:
    return f"{100 * (value - scale[0]) / (scale[1] - scale[0]):.1f}"


def _axis(scale: tuple[float, float]) -> str:
    """Return the line with the numbers of the axis: zero and round numbers on either side."""
    span = max(-scale[0], scale[1])
    step = next(x for x in (0.5, 1, 2, 5, 10, 20, 50, 100) if span / x <= 4 or x == 100)
    ticks = [n * step for n in range(-4, 5) if scale[0] <= n * step <= scale[1]]
    texts = "".join(
        f'<text x="{_percent(tick, scale)}%" y="70%" text-anchor="middle">'
        f"{f'{tick:+g}'.replace('-', '−') if tick else '0'}</text>"
        for tick in ticks
    )
    return f'<li aria-hidden="true"><span></span><span></span><svg>{texts}</svg><span></span></li>'


def _concepts(
    comparison: Comparison, shots: dict[tuple[str, str], list[int]], uris: dict[int, str]
) -> str:
    worst = comparison.worst_concepts(WORST)
    if worst.empty:
        return ""
    parts, tables = [], list(worst.groupby("dataset", sort=False))
    net = {name: int((table["gained"] - table["lost"]).sum()) for name, table in tables}
    tables = sorted(tables, key=lambda item: net[item[0]])[:MOST_SETS]
    for number, (name, table) in enumerate(tables):
        several, single = table[table["questions"] > 1], table[table["questions"] == 1]
        rows = "".join(_concept_row(comparison, row, shots, uris) for row in several.itertuples())
        if len(single):
            names = ", ".join(f"<b>{_text(name)}</b>" for name in single["concept"])
            rows += f'<li class="single">Wrong now, with a single image each: {names}</li>\n'
        first = table.iloc[0]
        about = f"{_text(first['concept'])}, {first['old']:.0f}% → {first['new']:.0f}%"
        opened = " open" if not number else ""
        parts.append(
            f"<details{opened}><summary>{_text(name)} <span>worst: {about}</span></summary>\n"
            f'<ul class="concepts">\n{rows}</ul></details>'
        )
    worse = int((comparison.concepts["change"] < 0).sum())
    heading = f"{count_of(worse, 'concept')} of {len(comparison.concepts):,} got worse"
    return (
        f'<section id="concepts">\n<h2>{heading}</h2>\n<p class="quiet">Up to {WORST} per set, '
        "sorted by images lost minus images gained: the share of images with the "
        "right name, before and now, and the most frequent name of the lost ones.</p>\n"
        + "\n".join(parts)
        + "\n</section>"
    )


def _concept_row(
    comparison: Comparison,
    row: Any,
    shots: dict[tuple[str, str], list[int]],
    uris: dict[int, str],
) -> str:
    chosen = shots.get((row.dataset, row.concept), [])
    alt = f"{_text(row.concept)}, which lost its name"
    images = [f"<span>{_image(comparison, uris[n], alt)}</span>" for n in chosen if n in uris]
    called = f"called <b>{_text(row.became)}</b>" if row.became else ""
    return (
        f"<li><b>{_text(row.concept)}</b><span>{row.old:.0f}% → {row.new:.0f}% of "
        f'{row.questions}</span><span class="lost">{called}</span>'
        f'<span class="shots">{"".join(images)}</span></li>\n'
    )


def _retrieval(comparison: Comparison) -> str:
    table = comparison.retrieval
    if table.empty:
        return ""
    means = table[(table["asked"] == TO_IMAGE) & (table["k"] == max(RECALL_AT))]
    was, now = (decimal(means[key].mean()) for key in ("old", "new"))
    heading = f"Captions find their image in {now}% of searches, {was}% before"
    rows = "\n".join(
        f"<tr><td>{_text(row.dataset)}<br>{row.asked}, first {row.k}</td>"
        f"<td class=n>{decimal(row.old)} → {decimal(row.new)}</td>"
        f"<td class=n>{signed(row.change)} "
        f"<span>({interval_in_words(row.low, row.high)})</span></td>"
        "</tr>"
        for row in table.itertuples()
    )
    return (
        f'<section id="retrieval">\n<h2>{heading}</h2>\n'
        '<p class="quiet">Percentage of queries with a match among the first one or five.</p>\n'
        "<table><thead><tr><th>set and query</th><th class=n>before → now</th>"
        f"<th class=n>change (95% interval)</th></tr></thead><tbody>\n{rows}\n</tbody></table>\n"
        "</section>"
    )


def _index(comparison: Comparison) -> str:
    """Return the recall of a stored index, with a finding as its title."""
    table = comparison.index
    if table.empty:
        return ""
    groups = "\n".join(
        _index_bars(part) for _, part in table.groupby(["content", "query"], sort=False)
    )
    about = (
        "A query by words is a class name or a caption, and may match several images; a query by "
        "an image asks for another of its class. One index holds all scored images. The bars show "
        "the percentage of queries that find what they ask for among the first "
        f"{max(RECALL_AT)} (in brackets: first of all). Re-encoded images are closer to the new "
        "model's queries than the others, so they can push known ones out of the first places. An "
        "index stays valid as long as the image tower is locked (method.name=locked-image)."
    )
    return (
        f'<section id="index">\n<h2>{_index_finding(table)}</h2>\n<p class="quiet">{about}</p>\n'
        f'<div class="index">\n{groups}\n</div>\n</section>'
    )


def _index_bars(part: pd.DataFrame) -> str:
    """Return the bars of one kind of content and query, whose rows differ in k."""
    first, last = part.iloc[0], part.iloc[-1]
    lines = []
    for key, words in INDEX_COLUMNS.items():
        if math.isnan(last[key]):
            continue
        numbers = f"{decimal(last[key])} ({decimal(first[key])})"
        lines.append(
            f'<li><span>{words}</span><span class="bar"><i style="width:{last[key]:.1f}%"></i>'
            f"</span><span>{numbers}</span></li>"
        )
    gains = ""
    if not math.isnan(last["loses"]):
        again = f"{signed(last['loses'])} points ({interval_in_words(last['low'], last['high'])})"
        words = f"Compared with the old index, re-encoding everything adds {again}"
        gains = f'<p class="quiet">{words}.</p>'
    heading = f"{last['content'].capitalize()} content, asked by {QUERIES[last['query']]}"
    count = f'<span class="quiet">{count_of(int(last["queries"]), "query")}</span>'
    return f"<div><h3>{heading} {count}</h3><ul>{''.join(lines)}</ul>{gains}</div>"


def _choose_row(rows: pd.DataFrame) -> pd.Series:
    """Return the row that decides about some content: that of searches by words or, if these are
    few, by images; if both are few, that of the more frequent kind."""
    enough = rows[rows["queries"] >= FEW_QUERIES].set_index("query", drop=False)
    for query in QUERIES:
        if query in enough.index:
            return enough.loc[query]
    return rows.loc[rows["queries"].idxmax()]


def _describe_queries(row: pd.Series) -> str:
    """Return how content was searched, and by how many queries if they are few."""
    few = f" (only {count_of(row['queries'], 'query')})" if row["queries"] < FEW_QUERIES else ""
    return f"by {QUERIES[row['query']]}{few}"


def _index_finding(table: pd.DataFrame) -> str:
    """Return what to do with the old index, and the recall of queries after that."""
    last = table.groupby(["content", "query"], sort=False).tail(1)
    rows = pd.DataFrame({name: _choose_row(part) for name, part in last.groupby("content")}).T
    if rows["as_is"].isna().all():
        return (
            "Encode every image again: the new model cannot search the old index, since their "
            "features differ in size"
        )
    if KNOWN in rows.index:
        now, mixed, again = rows.loc[KNOWN, ["as_is", "new_first", "reencoded"]]
        finding = f"{_describe_queries(rows.loc[KNOWN])}, {KNOWN} content is found in"
        what = "Encode every image again"
        if NEW in rows.index:
            what += ", or keep two indexes"
        if mixed < now - CLEARLY:  # the mixed index is NaN where nothing is new
            return (
                f"{what}: {finding} {decimal(mixed)}% of queries beside re-encoded new images, "
                f"{decimal(now)}% without"
            )
        if again > np.nanmax([now, mixed]) + CLEARLY:
            return f"{what}: {finding} {decimal(again)}% of queries instead of {decimal(now)}%"
        if NEW not in rows.index:
            return (
                f"The old index still serves: {finding} {decimal(now)}% of queries, or in "
                f"{decimal(again)}% if re-encoded"
            )
    now, mixed, again = rows.loc[NEW, ["as_is", "new_first", "reencoded"]]
    again = again if math.isnan(mixed) else mixed
    finding = f"{_describe_queries(rows.loc[NEW])}, {NEW} content is found in"
    if again <= now + CLEARLY:
        return (
            f"The old model may encode the new images, too: {finding} {decimal(now)}% of queries, "
            f"or in {decimal(again)}% if the new model encodes it"
        )
    return (
        f"Let the new model encode only the new images: {finding} {decimal(again)}% of queries "
        f"instead of {decimal(now)}%"
    )


def _gate(gate: Sequence[GateLine]) -> str:
    if not gate:
        return ""
    broken = [line for line in gate if not line.passed]
    heading = "no limit broken" if _unjudged(gate) else "all limits kept"
    if broken:
        heading = f"{len(broken)} of {count_of(len(gate), 'limit')} broken"
    heading += _unjudged(gate)
    kept = _gate_list([line for line in gate if line.passed])
    if broken and kept:
        count = sum(line.judged for line in gate) - len(broken)
        summary = f"{count_of(count, 'limit')} kept{_unjudged(gate)}"
        kept = f"<details><summary>{summary}</summary>{kept}</details>"
    return (
        f'<section id="gate">\n<h2>The gate: {heading}</h2>\n{_gate_list(broken)}\n{kept}\n'
        "</section>"
    )


def _unjudged(gate: Sequence[GateLine]) -> str:
    """Return how many limits are not judged, to follow how many are kept, or ""."""
    count = sum(not line.judged for line in gate)
    return f", {count} not judged" if count else ""


def _gate_list(lines: list[GateLine]) -> str:
    items = "\n".join(
        f"<li{'' if line.passed else ' class=broken'}>"
        f"{('✓' if line.judged else '–') if line.passed else '✗'} {_text(line.sentence, 400)}</li>"
        for line in lines
    )
    return f'<ul class="gate">\n{items}\n</ul>' if lines else ""


def _what_is_lost(comparison: Comparison) -> str:
    """Return a sentence on when a wall says that something was lost."""
    if _has_names(comparison):
        return "A name counts as lost when another one comes first, however close it was."
    return (
        f"A caption no longer finds its image when {RETRIEVAL_K} others come first, however close "
        "it was."
    )


def _caveats(comparison: Comparison) -> str:
    sets = len(comparison.sets)
    lines = [
        "It shows what got worse, not why: the update, its learning rate, its data and chance look "
        "the same here.",
        f"The scored images are those of the {_text(comparison.split)} split. Anything that no set "
        "covers, such as other customers' words, may have been lost unseen.",
        "Each interval is right about 19 times in 20, by itself. "
        f"Among {count_of(sets, 'set')}, about {max(1, round(sets / 20))} may look clearly changed "
        "by chance, and a concept with few images changes by chance alone.",
        _what_is_lost(comparison),
    ]
    body = "".join(f"<li>{line}</li>" for line in lines)
    return f'<section id="limits">\n<h2>What this does not show</h2>\n<ul>{body}</ul>\n</section>'
