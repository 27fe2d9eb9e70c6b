"""What the commands share: the console, options, names."""

from typing import Annotated

import typer
from rich.console import Console

console = Console()

Threads = Annotated[
    int, typer.Option(min=1, help="Torch threads; results depend on it in the last bits.")
]
Data = Annotated[str, typer.Option(help="embedded, fomo, or the path of a folder of manifests.")]
Seed = Annotated[int, typer.Option(min=0, help="Number of the base.")]

ROLE_NAMES = {
    "pool": "pretraining pool",
    "substitute": "stand-in for the pool",
    "adapt": "adaptation (A_KA)",
    "eval": "retention (A_ZS)",
    "transfer": "transfer (reported apart)",
}
