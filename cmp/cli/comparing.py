"""The command `compare`, which reports what a new model gains and loses, and whether to deploy
it."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cmp.cli import shared
from cmp.cli.updates import Gone, Moved, parse_moved
from cmp.errors import CmpError
from cmp.files import check_target

if TYPE_CHECKING:
    from cmp.releases.compare import Comparison
    from cmp.releases.ledger import Ledger
    from cmp.releases.release import Release

WORST = 8
"""Number of concepts to print."""


def compare(
    old: Annotated[str, typer.Argument(metavar="OLD")],
    new: Annotated[str, typer.Argument(metavar="NEW")],
    data: str | None = None,
    arrived: Annotated[str | None, typer.Option("--new", metavar="NAME[,...]", parser=str)] = None,
    gate_file: Annotated[Path | None, typer.Option("--gate")] = None,
    page: Annotated[Path | None, typer.Option("--report")] = None,
    gone: Gone = "refuse",
    moved: Moved = None,
    split: Literal["test", "validation"] = "test",
    subset: shared.OptionalPositive = None,
    threads: shared.Threads = 2,
    device: str | None = None,
) -> None:
    """Compare two models on the same images: scores, names lost and gained, and how well NEW
    searches an index that OLD made.

    OLD and NEW are NAME:START (small:annealed, small:annealed:3 for base 3,
    ViT-B-32:laion2b_s34b_b79k, NAME:FILE.safetensors), run:ID, hf-hub:ORG/NAME, or a folder in
    open_clip's layout, such as a release. Each model prepares images in its own way.

    With a gate, the exit status is 1 if the new model breaks a limit. A limit applies to A_KA or
    A_ZS overall, to the mean of `all` datasets, to `each` dataset, to single datasets under `sets`,
    to the `last_update`, to `each_update`, or to single updates under `updates`. A limit is the
    largest `drop` you allow or the smallest `gain` you require, in points, or the largest
    percentage of correct answers that may be `lost`. It is checked against the estimate or, with
    `sure: true`, the worse end of the 95% interval. An update with fewer test `images` than its
    limits say is not judged.

    Args:
        old: The deployed model.
        new: The model that may replace it.
        data: Source of the data: embedded, fomo, or a folder of manifests. Default: all images up
            to the release NEW, or up to OLD if only OLD is a release or OLD continues NEW, and
            embedded without releases.
        arrived: Datasets or updates that the old model's index lacks; "" for none. Default: the
            updates between two releases; otherwise all datasets of role adapt; none if the data
            have no eval or transfer set.
        gate_file: A YAML file of limits, such as `A_ZS: {drop: 2, lost: 15}`.
        page: Write an HTML page to this .html file, with the images that lost or gained their name.
            It replaces the file.
        gone: If images of a release are missing: refuse, or skip them; changed files count as
            missing.
        moved: A folder of a release's images that has moved, as OLD=NEW; repeat for others.
            Default: none.
        split: Images to score: test, or validation.
        subset: Images per dataset. Default: all.
        device: Device: cpu or cuda. Default: cpu for this book's own models, such as small,
            otherwise cuda.

    Example:
        cmpt compare releases/2026-01 releases/2026-02 --gate gate.yaml --report report.html
    """
    import numpy as np
    import torch

    from cmp.data import load_data
    from cmp.evaluation import make_test_sets
    from cmp.releases import candidates, gate, report
    from cmp.releases import compare as comparing
    from cmp.releases.release import Release

    torch.set_num_threads(threads)
    if page:
        shared.check_out(page, "--report", ".html")
        check_target(page)
    limits = gate.read_gate(gate_file) if gate_file else None
    pair = [candidates.find_release(x) or candidates.find_candidate(x) for x in (old, new)]
    releases = [x for x in pair if isinstance(x, Release)]
    names = [x.config.model.name if isinstance(x, Release) else x.name for x in pair]
    device = comparing.common_device(names, device)
    if releases and not data:
        owner = _choose_owner(releases)
        corpus = owner.corpus(gone == "skip", parse_moved(moved, owner.folder))
        notes = [f"scored: the {split} images up to the release {owner.folder}"]
        notes += [note for x in releases for note in _release_notes(x, owner, split, x is pair[0])]
    elif moved or gone == "skip":
        raise CmpError(
            "--moved and --gone work only if OLD or NEW is a release and --data is not given"
        )
    else:
        data = data or "embedded"
        corpus = load_data(data)
        notes = [f"scored: the {split} images of {data}"]
    if limits:
        sets = make_test_sets(corpus, split, subset)
        rows = [each.rows for each in sets if each.dataset.role == "adapt"]
        updates = comparing.shown_updates(corpus, np.concatenate(rows)) if rows else {}
        roles = {each.dataset.name: each.dataset.role for each in sets}
        gate.check_scopes(limits, roles, list(updates.values()))
    new_names = [name for name in arrived.split(",") if name] if arrived is not None else None
    comparison = comparing.compare(
        *pair, corpus, arrived=new_names, split=split, subset=subset, device=device, progress=True
    )
    print_comparison(comparison)
    lines = gate.apply_gate(limits, comparison) if limits else []
    typer.echo("\n".join(notes))
    broken = [line for line in lines if not line.passed]
    unjudged = [line for line in lines if not line.judged]
    kept = [line for line in lines if line.passed and line.judged]
    for state, some in (("passed", kept), ("not judged", unjudged), ("broken", broken)):
        for line in some:
            typer.echo(f"{state}: {line.sentence}")
    if lines:
        more = f", {len(unjudged)} not judged" if unjudged else ""
        typer.echo(f"gate: {len(kept)} of {len(lines)} limits kept{more}")
    if page:  # last, since it may fail
        report.write_report(comparison, page, gate=lines, notes=notes)
        typer.echo(f"written: {page}")
    if broken:
        raise typer.Exit(1)


def _choose_owner(releases: "list[Release]") -> "Release":
    """Return the release whose images are scored: the last one, unless the first one continues it
    and so has images of later updates, whose loss would be unseen."""
    ids = [[update.id for update in each.record.updates] for each in releases]
    return releases[0] if ids[0][: len(ids[-1])] == ids[-1] else releases[-1]


def _release_notes(other: "Release", owner: "Release", split: str, is_old: bool) -> Iterator[str]:
    """Yield sentences on the scores of a release on the images of another one.

    Args:
        other: The release.
        owner: The one whose images are scored.
        split: Their split.
        is_old: Whether `other` is the old model.
    """
    from cmp.releases.ledger import NAMED, is_among
    from cmp.releases.sentences import count_of

    if other is owner:
        return
    which, when = ("old", "before") if is_old else ("new", "now")
    if len(other.record.updates) < len(owner.record.updates):
        yield (
            f"A_KA {when} can be lower than on the {which} release's card: here the {which} model "
            "is also tested on the images of later updates, and chooses among their names or "
            "captions, too"
        )
    own, scored = other.ledger(), owner.ledger()
    theirs, known = (x.pictures[x.pictures["split"] == split] for x in (own, scored))
    lacking = theirs[~is_among(theirs, known)]
    if len(lacking):
        arrivals = [own.arrivals[n] for n in lacking["arrival"].unique()]
        more = ", ..." if len(arrivals) > NAMED else ""
        places = ", ".join(arrival.name for arrival in arrivals[:NAMED]) + more
        yield (
            f"not scored: {count_of(len(lacking), f'{split} image')} of {other.folder}, from "
            f"{places}, which {owner.folder} does not have among its {split} images"
        )
    own_prompts, scored_prompts = (_prompts(x) for x in (own, scored))
    pairs = [(other.record.prompt, owner.record.prompt)]
    shared_sets = own_prompts.keys() & scored_prompts.keys()
    pairs += [(own_prompts[name], scored_prompts[name]) for name in sorted(shared_sets)]
    for theirs, used in dict.fromkeys(pairs):
        if theirs != used:
            yield (
                f'both models are scored with the prompt "{used}" of {owner.folder}, but the '
                f'{which} model was trained with "{theirs}", so its scores may be too low'
            )


def _prompts(ledger: "Ledger") -> dict[str, str]:
    """Return the prompt of each set with names."""
    from cmp import starts
    from cmp.releases.ledger import known_sets

    named = {x: y for x, y in known_sets(ledger).items() if y["task"] == "classification"}
    return {name: tree.get("prompt", starts.USUAL_PROMPT) for name, tree in named.items()}


def print_comparison(comparison: "Comparison") -> None:
    """Print the scores of both models, the worst concepts, and the recall of the old index."""
    from cmp.releases import report
    from cmp.releases.index import RECALL_AT

    rows, sets = [], comparison.sets
    for role in shared.ROLE_NAMES:
        members = sets[sets["role"] == role]
        rows += [(name, *_score_cells(row)) for name, row in members.iterrows()]
        if role == "adapt":
            updates = comparison.updates
            rows += [(f"- {name}", *_score_cells(row)) for name, row in updates.iterrows()]
        rows += [None] if len(members) else []
    rows += [(name, *_score_cells(row)) for name, row in comparison.summary.iterrows()]
    columns = ("", "before", "now", "change", "95%", "lost", "% lost", "gained")
    shared.print_table(columns, rows, f"{comparison.old} -> {comparison.new}, {comparison.split}")
    if len(comparison.updates):
        typer.echo("rows with a dash: one per update")
    typer.echo(_lost_unit(comparison))
    worst = comparison.worst_concepts(WORST, each=False)
    if len(worst):
        cells = ("dataset", "concept", "questions", "lost", "gained", "became")
        shown = [tuple(getattr(row, cell) for cell in cells) for row in worst.itertuples()]
        shared.print_table(cells, shown, "concepts that lost most")
    index = comparison.index[comparison.index["k"] == max(comparison.index["k"])]
    cells = report.INDEX_COLUMNS
    shown = [
        (row.content, row.query, *(shared.score_text(getattr(row, cell)) for cell in cells))
        for row in index.itertuples()
    ]
    columns = ("content", "query", *cells)
    title = f"recall@{max(RECALL_AT)}, in percent, by what is in the index"
    shared.print_table(columns, shown, title)
    typer.echo("; ".join(f"{cell}: {words}" for cell, words in cells.items()))


def _lost_unit(comparison: "Comparison") -> str:
    """Return what the numbers of `lost` and `gained` count."""
    images, answers = (int(comparison.sets[key].sum()) for key in ("images", "questions"))
    words = f"lost and gained count answers, of which there are {answers:,} for {images:,} images"
    if answers == images:
        return words
    return f"{words}: a set with captions asks in both directions"


def _score_cells(row) -> tuple[object, ...]:
    """Return the cells of a row of `Comparison.sets` or `Comparison.summary`."""
    from cmp.releases import sentences

    change = sentences.signed(row["change"])
    interval = sentences.interval_in_words(row["low"], row["high"])
    share = shared.score_text(row["lost_share"])
    return (
        *map(shared.score_text, (row["old"], row["new"])), change, interval,
        int(row["lost"]), share, int(row["gained"]),
    )  # fmt: skip
