"""What commands share: types of options, tables, and the way to the book's package."""

import importlib
import re
import sys
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Annotated

import typer

from cmp.config import OWN_MODEL_PROFILES
from cmp.errors import CmpError
from cmp.files import project_folder

Settings = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Changes, such as schedule.peak=0.0005."),
]
RunId = Annotated[str, typer.Argument(help="A run's id, or its beginning.")]
Threads = Annotated[
    int, typer.Option(min=1, help="Torch threads. Their number moves the last bits of results.")
]
Data = Annotated[str, typer.Option(help="Data: embedded, fomo, or a folder of manifests.")]
Device = Annotated[
    str | None,
    typer.Option(help="cpu or cuda; of several processes, a card each. Default: cuda for gpu."),
]
MicroBatch = Annotated[
    int | None,
    typer.Option(
        min=1, help="Samples at a time, for a batch larger than the memory. Default: all."
    ),
]
Checkpointing = Annotated[
    bool,
    typer.Option("--checkpoint-activations", help="Use less memory, for a third more time."),
]
KeepWeights = Annotated[
    bool,
    typer.Option(
        "--keep-weights", help="Store the final weights of an embedded model, too, for export."
    ),
]
Seed = Annotated[int, typer.Option(min=0, help="Number of the base.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and compute nothing.")]

ROLE_NAMES = {
    "pool": "pretraining pool",
    "substitute": "stand-in for the pool",
    "adapt": "adaptation (A_KA)",
    "eval": "retention (A_ZS)",
    "transfer": "transfer (reported apart)",
}


def default_device(profile: str, device: str | None) -> str:
    """Return the device of a run: the one that was asked for, or the usual one of its profile."""
    return device or ("cuda" if profile in OWN_MODEL_PROFILES else "cpu")


def import_lab(name: str) -> ModuleType:
    """Import a module of the book's package, which is in a checkout of the project only.

    Args:
        name: The module within `lab`, such as "figures.inputs".

    Raises:
        CmpError: The current folder is not in a checkout.
    """
    book = project_folder() / "book"
    if not (book / "lab").is_dir():
        raise CmpError(f"{book / 'lab'}: no such folder; run this in a checkout of the project")
    if str(book) not in sys.path:
        sys.path.append(str(book))
    return importlib.import_module(f"lab.{name}")


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[object] | None], title: str | None = None
) -> None:
    """Print a table that fits 80 characters without cutting a number.

    Args:
        columns: Headers. Columns of numbers are aligned right.
        rows: The cells; None draws a line.
        title: The heading.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    rows = [row and [str(cell) for cell in row] for row in rows]
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    for number, column in enumerate(columns):
        cells = [row[number] for row in rows if row]
        is_number = all(re.fullmatch(r"[-+]?[\d.,/]*", cell) for cell in cells)
        justify = "right" if is_number else "left"
        table.add_column(column, justify=justify, no_wrap=is_number or not number)
    for row in rows:
        if row is None:
            table.add_section()
        else:
            table.add_row(*row)
    Console(highlight=False, markup=False).print(table)
