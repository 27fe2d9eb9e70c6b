"""List, show and check datasets, or write a manifest for your own.

Example:
    cmpt data check pictures
"""

import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cmp.cli import shared
from cmp.errors import clean_text
from cmp.files import write_atomic

if TYPE_CHECKING:
    from cmp.readers.manifest import FileSet


def list_() -> None:
    """List every embedded dataset with its role, its counts, and whether it is built.

    Example:
        cmpt data list
    """
    from cmp.embedded import manifest

    rows = []
    for role in shared.ROLE_NAMES:
        for dataset in manifest.embedded_manifests().values():
            if dataset.role == role:
                counts = dataset.counts.model_dump().values()
                state = "built" if manifest.is_built(dataset) else "missing"
                rows.append((dataset.name, role, *(str(count or "") for count in counts), state))
        rows.append(None)
    shared.print_table(("dataset", "role", "classes", "train", "val.", "test", "state"), rows)
    typer.echo("; ".join(f"{role}: {name}" for role, name in shared.ROLE_NAMES.items()))


def show(name: str, sheet: Path | None = None) -> None:
    """Describe an embedded dataset: its role, sources, licences and some samples.

    Args:
        name: Name of an embedded dataset, such as new-flags.
        sheet: Write a contact sheet of 64 images to this .png file. Default: none.

    Example:
        cmpt data show new-flags --sheet flags.png
    """
    from cmp.embedded import manifest, packed, sheets

    if sheet:
        shared.check_out(sheet, "--sheet", ".png")
    [dataset] = manifest.select_datasets([name])
    packages, opened = manifest.load_packages(), packed.read_packed(dataset)
    typer.echo(f"{dataset.name}: {dataset.title}")
    typer.echo(f"role: {shared.ROLE_NAMES[dataset.role]}; task: {dataset.task}")
    typer.echo(f"images: {dataset.images}\nprompt: {dataset.prompt!r}")
    for source in dataset.sources:
        p = packages[source]
        typer.echo(f"source: {p.attribution}, {p.licence}, {p.package} {p.version} ({p.url})")
    counts = opened.table["split"].value_counts().items()
    sizes = ", ".join(f"{count} {split}" for split, count in counts)
    typer.echo(f"{len(opened.header.classes)} classes; images: {sizes}")
    for row in opened.table.iloc[:: max(1, len(opened.table) // 6)].itertuples():
        typer.echo(f"  {row.split:10} {row.source}: {' | '.join(row.captions)}")
    if sheet:
        sheets.contact_sheet(opened, sheet)
        typer.echo(f"contact sheet: {sheet}")


def check(
    name: shared.Argument = "embedded",
    decode: bool = True,
    faults_file: Annotated[Path | None, typer.Option("--list")] = None,
) -> None:
    """Check which datasets are present, absent, partial, faulty or wrongly counted.

    A folder of images without a manifest is checked as a first `cmpt update --data` would read it.
    In a later update, a file name that was used before gets a new random split.

    The exit status is 1 if a dataset is present but cannot be used as it is. Notes on usable
    datasets, such as images that are both trained on and scored, do not change it.

    Args:
        name: Datasets to check: embedded, fomo, or a folder of manifests or images.
        decode: Decode every image once, to find damaged files.
        faults_file: Write everything that cannot be used to this file, one line each: the set, what
            is wrong, and the name. Default: none.

    Example:
        cmpt data check fomo --no-decode
    """
    from cmp.embedded import manifest, packed
    from cmp.readers import collection, folders, notes
    from cmp.readers.index import MEND_FAULTS
    from cmp.readers.manifest import load_manifests
    from cmp.releases import arrivals
    from cmp.releases.ledger import SET_NAMES
    from cmp.starts import USUAL_PROMPT

    if name == "embedded":
        datasets = manifest.select_datasets()
        broken = [dataset.name for dataset in datasets if not packed.is_intact(dataset)]
        for dataset in broken:
            typer.echo(f"{dataset}: not built or damaged; run `cmpt data build {dataset}`")
        typer.echo(f"{len(datasets) - len(broken)} of {len(datasets)} embedded datasets are intact")
        raise typer.Exit(bool(broken))
    if faults_file:
        shared.check_out(faults_file, "--list")
    folder = Path(name).expanduser()
    arrivals.check_utf8(str(folder), "data")
    is_plain = folder.is_dir() and not arrivals.has_manifests(folder)
    unread = []
    if is_plain:
        [(dataset, root)] = arrivals.read_sets(folder, "adapt", USUAL_PROMPT)
        located = [(dataset.model_copy(update={"name": folder.resolve().name}), root)]
    else:
        located = load_manifests(name)
        unread = folders.undescribed_folders(folder, located) if folder.is_dir() else []
    states = [collection.dataset_state(*place, decode) for place in located]
    if is_plain:
        index, title = states[0].index, states[0].dataset.title
        words = title if index is None else arrivals.describe_reading(index, folder)
        typer.echo(f"no manifest: a first `cmpt update --data` reads the folder as {words}")
    columns = ("set", "role", "classes", "train", "val.", "test", "B/32 (%)", "state")
    rows = [_state_row(s.dataset, s.index.counts() if s.index else {}, s.state) for s in states]
    place = columns.index("B/32 (%)")
    if not any(row[place] for row in rows):  # only manifests of the benchmark have such a score
        columns, *rows = ((*row[:place], *row[place + 1 :]) for row in (columns, *rows))
    shared.print_table(columns, rows)
    named: dict[str, list[str]] = {}
    for s in states:
        mendable = s.index is not None and s.state in ("partial", "faulty")
        reason = f"{s.reason}; {MEND_FAULTS}" if mendable else s.reason
        if is_plain:
            reason = arrivals.without_manifest(reason, SET_NAMES["adapt"], folder)
        named.setdefault(reason, []).append(s.dataset.name)
    for reason in filter(None, named):
        typer.echo(clean_text(f"{', '.join(named[reason])}: {reason}"))
    if faults_file:
        faults = [(s.dataset.name, *fault) for s in states if s.index for fault in s.index.faults]
        _write_faults(faults_file, faults)
    indexes = [state.index for state in states if state.index is not None]
    for path in unread:
        typer.echo(clean_text(f"note: {path} has images but no manifest, so they are not read"))
    for sentence in notes.notes_on(indexes):
        typer.echo(clean_text(f"note: {sentence}"))
    usable = sum(s.state == "present" or s.state.startswith("usable") for s in states)
    absent = sum(s.state == "absent" for s in states)
    typer.echo(f"{usable} of {len(states)} datasets can be used, {absent} are absent")
    raise typer.Exit(0 if usable and usable + absent == len(states) else 1)


def _state_row(dataset: "FileSet", counts: dict[str, int], state: str) -> tuple[str, ...]:
    """Return a table row on a dataset: what was found, out of the counts in its manifest."""
    cells = []
    for key in ("classes", "train", "validation", "test"):
        wanted = getattr(dataset.counts, key) if dataset.counts else None
        cell = f"{counts.get(key, 0)}/{wanted}" if wanted else str(counts.get(key) or "")
        cells.append(cell if key == "classes" or key in dataset.allowed_splits() else "")
    score = "" if dataset.zero_shot is None else f"{dataset.zero_shot:.1f}"
    return dataset.name, dataset.role, *cells, score, state


def _write_faults(path: Path, faults: Iterable[tuple[str, ...]]) -> None:
    """Write a line for each fault: the set, what is wrong, and the name."""
    lines = ["\t".join(clean_text(x).replace("\n", " ") for x in fault) for fault in faults]
    text = "".join(f"{line}\n" for line in lines)
    write_atomic(path, text.encode(errors="replace").decode())  # names may not be UTF-8
    typer.echo(f"written: {path}, {len(lines)} lines")


def init(folder: Path, role: shared.Role = "adapt") -> None:
    """Write a manifest for a folder of your own data, with blanks to fill in.

    To use several datasets, put each with its manifest into its own folder, side by side.

    Args:
        folder: Folder of images, tars or tables.
        role: Purpose of the images: adapt (they arrive in the stream), eval (scored as A_ZS, never
            trained on), transfer (scored separately), pool (replayed) or substitute (replayed
            instead of a pool).

    Example:
        cmpt data init pictures/kept --role eval
    """
    from cmp.readers import infer

    path, text, words = infer.infer_manifest(folder, role)
    typer.echo(f"{words}\n{text}")
    infer.write_manifest(path, text)
    typer.echo(f"written: {path}; check it with `cmpt data check {shlex.quote(str(folder))}`")


app = shared.make_group(__doc__, list_, show, check, init)
