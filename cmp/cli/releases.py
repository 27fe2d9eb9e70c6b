"""Show a release, or free disk space."""

from pathlib import Path
from typing import Annotated

import typer

from cmp.cli import shared
from cmp.cli.results import print_log
from cmp.releases import release


def show(folder: Annotated[Path, typer.Argument(metavar="RELEASE")]) -> None:
    """Print the updates in a release and the log of the last one, and check all of its files.

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
    columns = ("", "update", "images", "steps", "batch", "peak", "seconds")
    shared.print_table(columns, rows, release.describe(made))
    print_log(folder / release.LOG_FILE)
    typer.echo("all files are intact")


def slim(folder: Annotated[Path, typer.Argument(metavar="RELEASE")]) -> None:
    """Free disk space: remove the weights and moments that only another update would need.

    Args:
        folder: The folder of the release.

    Example:
        cmpt release slim releases/2026-01
    """
    freed = release.slim(folder)
    typer.echo(f"{folder}: {freed / 2**20:,.0f} MiB freed; updates can no longer start from it")


app = shared.make_group(__doc__, show, slim)
