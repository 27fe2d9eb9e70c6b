"""List, show, build and check datasets, and write manifests for your own.

Example: cmpt data check pictures
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cmp.cli.shared import ROLE_NAMES, print_table
from cmp.embedded.manifest import (
    embedded_manifests,
    is_built,
    load_datasets,
    load_packages,
    select_datasets,
)
from cmp.files import project_folder
from cmp.readers.manifest import load_manifests

if TYPE_CHECKING:
    from cmp.readers.collection import DatasetState

app = typer.Typer(no_args_is_help=True, help=__doc__)


@app.command("build")
def build_(
    names: Annotated[list[str] | None, typer.Argument(help="Datasets. Default: all.")] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Processes. Default: one per core.")
    ] = None,
) -> None:
    """Fetch the packages of datasets, render and pack them; what is up to date is skipped.

    Example: cmpt data build new-flags
    """
    from cmp.embedded import build

    built = build.build_datasets(names, jobs)
    current = len(select_datasets(names)) - len(built)
    typer.echo(f"{len(built)} datasets built, {current} up to date")


@app.command("list")
def list_() -> None:
    """List every embedded dataset with its role, its counts, and whether it is built.

    Example: cmpt data list
    """
    rows = []
    for role in ROLE_NAMES:
        for dataset in embedded_manifests().values():
            if dataset.role == role:
                counts = dataset.counts
                numbers = (counts.classes, counts.train, counts.validation, counts.test)
                state = "built" if is_built(dataset) else "missing"
                rows.append((dataset.name, role, *(number or "" for number in numbers), state))
        rows.append(None)
    print_table(("dataset", "role", "classes", "train", "val.", "test", "state"), rows)
    typer.echo("; ".join(f"{role}: {name}" for role, name in ROLE_NAMES.items()))


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="An embedded dataset, such as new-flags.")],
    sheet: Annotated[
        Path | None, typer.Option(help="A .png to write with 64 images. Default: none.")
    ] = None,
) -> None:
    """Show what a dataset is, where it comes from, and some of its samples.

    Example: cmpt data show new-flags --sheet flags.png
    """
    from cmp.embedded import packed, sheets

    [dataset] = select_datasets([name])
    packages, opened = load_packages(), packed.read_packed(dataset)
    typer.echo(f"{dataset.name}: {dataset.title}")
    typer.echo(f"role: {ROLE_NAMES[dataset.role]}; task: {dataset.task}")
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


@app.command()
def check(
    name: Annotated[
        str, typer.Argument(help="embedded, fomo, or a folder of manifests.")
    ] = "embedded",
    decode: Annotated[bool, typer.Option(help="Decode every image once.")] = True,
) -> None:
    """Check what there is of every set: present, absent, partial, wrong counts, or faulty.

    Status 1 if anything that is there cannot be used as it is.

    Example: cmpt data check fomo --no-decode
    """
    from cmp.embedded import packed
    from cmp.readers import collection

    if name == "embedded":
        datasets = select_datasets()
        broken = [dataset.name for dataset in datasets if not packed.is_intact(dataset)]
        for dataset in broken:
            typer.echo(f"{dataset}: not built or damaged; run `cmpt data build {dataset}`")
        typer.echo(f"{len(datasets) - len(broken)} of {len(datasets)} embedded sets are intact")
        raise typer.Exit(bool(broken))
    states = [collection.dataset_state(*place, decode) for place in load_manifests(name)]
    columns = ("set", "role", "classes", "train", "val.", "test", "B/32 %", "state")
    print_table(columns, map(_state_row, states))
    reasons: dict[str, list[str]] = {}
    for state in states:
        if state.reason:
            reasons.setdefault(state.reason, []).append(state.dataset.name)
    for reason, names in reasons.items():
        typer.echo(f"{', '.join(names)}: {reason}")
    kinds = [
        "present" if s.state in ("partial", "faulty") and s.dataset.faults == "skip" else s.state
        for s in states
    ]
    usable, absent = kinds.count("present"), kinds.count("absent")
    typer.echo(f"{usable} of {len(states)} sets can be used, {absent} are absent")
    raise typer.Exit(0 if usable and usable + absent == len(states) else 1)


def _state_row(state: "DatasetState") -> tuple[str, ...]:
    """Return what there is of a set, out of what its manifest counts."""
    dataset, cells = state.dataset, []
    counts = state.index.counts() if state.index else {}
    for key in ("classes", "train", "validation", "test"):
        wanted = getattr(dataset.counts, key) if dataset.counts else None
        cell = f"{counts.get(key, 0)}/{wanted}" if wanted else str(counts.get(key) or "")
        cells.append(cell if key == "classes" or key in dataset.allowed_splits() else "")
    score = "" if dataset.zero_shot is None else f"{dataset.zero_shot:.1f}"
    return dataset.name, dataset.role, *cells, score, state.state


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="A folder of pictures, tars or tables.")],
    write: Annotated[bool, typer.Option(help="Write the manifest, or only print it.")] = True,
) -> None:
    """Look into a folder and write a manifest of what is there, with what is left to fill in.

    Example: cmpt data init pictures --no-write
    """
    from cmp.readers import infer

    path, text, words = infer.infer_manifest(folder)
    typer.echo(f"{words}\n{text}")
    if write:
        infer.write_manifest(path, text)
        typer.echo(f"written: {path}; `cmpt data check {folder}` checks it")


@app.command()
def attribution() -> None:
    """Write ATTRIBUTION.md from the manifests.

    Example: cmpt data attribution
    """
    from cmp.embedded import sheets

    path = project_folder() / "ATTRIBUTION.md"
    path.write_text(sheets.attribution_text(load_packages(), load_datasets()))
    typer.echo(f"written: {path}")
