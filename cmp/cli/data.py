"""Datasets: build, list, show, check, init."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from cmp.cli.shared import ROLE_NAMES, console
from cmp.data import attribution, build, collection, filesets, looking, manifest, packed, sheet
from cmp.paths import ROOT

app = typer.Typer(no_args_is_help=True, help=__doc__)


@app.command("build")
def build_(
    names: Annotated[list[str] | None, typer.Argument(help="Datasets; all by default.")] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes; one a core.")] = None,
) -> None:
    """Fetch the packages that are missing, render and pack them; nothing to do is a second."""
    built = build.build(names, jobs)
    console.print(
        f"{len(built)} datasets built, {len(build.select(names)) - len(built)} up to date"
    )


@app.command("list")
def list_() -> None:
    """Every dataset with its role and counts."""
    table = Table()
    table.add_column("dataset", no_wrap=True)
    table.add_column("role", no_wrap=True)
    for column in ("classes", "train", "val.", "test"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for role in ROLE_NAMES:
        for dataset in (d for d in manifest.embedded().values() if d.role == role):
            c = dataset.counts
            numbers = [str(n) if n else "" for n in (c.classes, c.train, c.validation, c.test)]
            missing = "extra" if dataset.optional else "missing"
            state = "built" if packed.is_built(dataset) else missing
            table.add_row(dataset.name, role, *numbers, state)
        table.add_section()
    console.print(table)
    console.print("; ".join(f"{role}: {name}" for role, name in ROLE_NAMES.items()))


@app.command("show")
def show(
    name: str,
    sheet_file: Annotated[
        Path | None, typer.Option("--sheet", help="Write 64 images here.")
    ] = None,
) -> None:
    """What a dataset is, where it comes from, and samples of it."""
    [dataset] = build.select([name])
    packages = manifest.load_packages()
    console.print(f"[bold]{dataset.name}[/bold]: {dataset.title}")
    console.print(f"role: {ROLE_NAMES[dataset.role]}; task: {dataset.task}")
    console.print(f"images: {dataset.images}\nprompt: {dataset.prompt!r}", highlight=False)
    for source in dataset.sources:
        p = packages[source]
        console.print(f"source: {p.attribution}, {p.licence}, {p.package} {p.version} ({p.url})")
    opened = packed.read(dataset)
    counts = opened.table["split"].value_counts()
    sizes = ", ".join(f"{n} {split}" for split, n in counts.items())
    console.print(f"{len(opened.header.classes)} classes; images: {sizes}")
    for row in opened.table.iloc[:: max(1, len(opened.table) // 6)].itertuples():
        texts = " | ".join(row.captions)
        console.print(f"  {row.split:10} {row.source}: {texts}", markup=False, highlight=False)
    if sheet_file:
        sheet.contact_sheet(opened, sheet_file)
        console.print(f"contact sheet: {sheet_file}")


@app.command("check")
def check(
    name: Annotated[
        str, typer.Argument(help="embedded, fomo, or the path of a folder of manifests.")
    ] = "embedded",
    decode: Annotated[bool, typer.Option(help="Decode every image, once.")] = True,
) -> None:
    """What there is of every set: present, absent, partial, wrong counts, faulty. The status is 1
    if anything that is there cannot be used as it is."""
    if name == "embedded":
        good = {each.name: packed.is_intact(each) for each in build.select()}
        for each in (each for each, intact in good.items() if not intact):
            console.print(f"{each}: not built or damaged; run `cmp data build {each}`")
        console.print(f"{sum(good.values())} of {len(good)} embedded sets are intact")
        raise typer.Exit(0 if all(good.values()) else 1)
    states = [collection.state(*place, decode) for place in filesets.read_all(name)]
    console.print(states_table(states))
    reasons: dict[str, list[str]] = {}
    for each in (each for each in states if each.why):
        reasons.setdefault(each.why, []).append(each.dataset.name)
    for why, names in reasons.items():
        console.print(f"{', '.join(names)}: {why}", markup=False, highlight=False)
    skipped = [s for s in states if s.state in ("partial", "faulty") and s.dataset.faults == "skip"]
    usable = sum(s.state == "present" for s in states) + len(skipped)
    absent = sum(s.state == "absent" for s in states)
    console.print(f"{usable} of {len(states)} sets can be used, {absent} are absent")
    raise typer.Exit(0 if usable + absent == len(states) and usable else 1)


def states_table(states: list[collection.State]) -> Table:
    """A row a set: what was found, out of what its manifest counts."""
    table = Table()
    for column in ("set", "role"):
        table.add_column(column, no_wrap=True)
    for column in ("classes", "train", "val.", "test", "B/32 %"):
        table.add_column(column, justify="right")
    table.add_column("state", no_wrap=True)
    for state in states:
        counts = state.index.counts() if state.index else {}
        expected = state.dataset.counts
        cells = []
        for key in ("classes", "train", "validation", "test"):
            found, wanted = counts.get(key, 0), getattr(expected, key) if expected else None
            used = key == "classes" or key in state.dataset.allowed()
            of = f"/{wanted}" if wanted else ""
            cells.append(f"{found}{of}" if used and (found or of) else "")
        score = state.dataset.zero_shot
        shown = "" if score is None else f"{score:.1f}"
        table.add_row(state.dataset.name, state.dataset.role, *cells, shown, state.state)
    return table


@app.command("init")
def init(
    folder: Annotated[Path, typer.Argument(help="A folder of pictures, tars or tables.")],
    write: Annotated[bool, typer.Option(help="Write the manifest; else only print it.")] = True,
) -> None:
    """Look into a folder and write a manifest of what is there, with what is left to fill in."""
    path, text, words = looking.look(folder)
    console.print(words, markup=False, highlight=False, soft_wrap=True)
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    if write:
        looking.write(path, text)
        console.print(f"written: {path}; `cmp data check {folder}` checks it", highlight=False)


@app.command("attribution")
def attribution_() -> None:
    """Write ATTRIBUTION.md from the manifests."""
    path = ROOT / "ATTRIBUTION.md"
    path.write_text(attribution.attribution(manifest.load_packages(), manifest.load_datasets()))
    console.print(f"wrote {path}")
