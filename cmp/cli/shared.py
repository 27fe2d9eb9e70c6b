"""What the commands share: the console, options, names."""

import importlib
import sys
from types import ModuleType
from typing import Annotated

import typer
from rich.console import Console

from cmp.errors import CmpError
from cmp.files import project_folder

console = Console()

Threads = Annotated[
    int, typer.Option(min=1, help="Torch threads; results depend on it in the last bits.")
]
Data = Annotated[str, typer.Option(help="embedded, fomo, or the path of a folder of manifests.")]
Device = Annotated[
    str | None, typer.Option(help="cpu, or cuda: of several processes, a card each. gpu has cuda.")
]
MicroBatch = Annotated[
    int | None,
    typer.Option(min=1, help="Samples at a time, where a batch is too large for the memory."),
]
Checkpointing = Annotated[
    bool, typer.Option("--checkpoint-activations", help="Less memory for a third more time.")
]
KeepWeights = Annotated[
    bool,
    typer.Option(
        "--keep-weights", help="Store the final weights too, as is done for every larger model."
    ),
]
Seed = Annotated[int, typer.Option(min=0, help="Number of the base.")]


def place(profile: str, device: str | None) -> str:
    """Where a run is computed: as asked for, or as is usual for a profile."""
    from cmp.config import OWN_MODEL_PROFILES

    return device or ("cuda" if profile in OWN_MODEL_PROFILES else "cpu")


def import_lab(name: str) -> ModuleType:
    """Import a module of the book's package, which lies in the project's folder and in no wheel.

    Args:
        name: The module within `lab`, such as "figures.inputs".

    Returns:
        The module.

    Raises:
        CmpError: The current folder is in no clone of the project.
    """
    book = project_folder() / "book"
    if not (book / "lab").is_dir():
        raise CmpError(f"{book / 'lab'}: not here; run this command within a clone of the project")
    if str(book) not in sys.path:
        sys.path.append(str(book))
    return importlib.import_module(f"lab.{name}")


ROLE_NAMES = {
    "pool": "pretraining pool",
    "substitute": "stand-in for the pool",
    "adapt": "adaptation (A_KA)",
    "eval": "retention (A_ZS)",
    "transfer": "transfer (reported apart)",
}
