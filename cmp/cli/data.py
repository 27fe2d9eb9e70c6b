"""`cmp data`: build, list, show, attribution."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from cmp.cli.shared import ROLE_NAMES, console
from cmp.data import attribution, build, manifest, packed, sheet
from cmp.paths import ROOT

app = typer.Typer(no_args_is_help=True, help="Datasets: build, list, show.")


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


@app.command("attribution")
def attribution_() -> None:
    """Write ATTRIBUTION.md from the manifests."""
    path = ROOT / "ATTRIBUTION.md"
    path.write_text(attribution.attribution(manifest.load_packages(), manifest.load_datasets()))
    console.print(f"wrote {path}")
