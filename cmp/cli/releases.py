"""Look at a release, or make room on the disk."""

from pathlib import Path
from typing import Annotated

import typer

from cmp.cli import shared
from cmp.releases import release


def show(folder: Annotated[Path, typer.Argument(metavar="RELEASE")]) -> None:
    """Print the updates that a release has seen, and check every file of it.

    Args:
        folder: The folder of the release.

    Example:
        cmpt release show releases/2026-02
    """
    made = release.read_release(folder)
    removed = made.slimmable()
    for name in made.record.files:
        if name not in removed or (folder / name).exists():
            made.path(name)
    rows = [
        (n, x.name, x.images, x.steps, sum(x.counts), f"{x.peak:g}", f"{x.seconds:.0f}")
        for n, x in enumerate(made.record.updates, 1)
    ]
    columns = ("", "update", "pictures", "steps", "batch", "peak", "seconds")
    shared.print_table(columns, rows, release.describe(made))
    typer.echo("every file is what was written")


def slim(folder: Annotated[Path, typer.Argument(metavar="RELEASE")]) -> None:
    """Remove the weights and moments that only a next update needs; the ledger stays.

    Args:
        folder: The folder of the release.

    Example:
        cmpt release slim releases/2026-01
    """
    freed = release.slim(folder)
    typer.echo(f"{folder}: {freed / 2**20:,.0f} MiB freed; no update can go on from it any more")


app = shared.make_group(__doc__, show, slim)
