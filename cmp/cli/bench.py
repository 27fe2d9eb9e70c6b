"""`cmp bench`: how fast the package is, as ratios."""

import importlib
from typing import Annotated

import torch
import typer

from cmp.cli.shared import console
from cmp.data import corpus
from cmp.errors import CmpError

BENCHMARKS = {
    "step": ("step", ("tiny", "tiny-vit", "bench-nano", "bench-micro", "bench-mid")),
    "pieces": ("step", ("tiny",)),
    "loop": ("loop", ("tiny",)),
    "evaluate": ("evaluate", ("tiny",)),
    "checkpoint": ("checkpoint", ("tiny",)),
    "study": ("study", ("tiny",)),
    "merge": ("merge", ("ViT-B-16",)),
    "data": ("data", ()),
    "gpu": ("gpu", ("tiny", "bench-mid", "ViT-B-16")),
}
"""Name -> (module of `cmp.bench`, which has a function of that name; models by default)."""


def bench(
    name: Annotated[str, typer.Argument(help=", ".join(BENCHMARKS))],
    model: Annotated[list[str] | None, typer.Option(help="Again for more than one.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Times that each alternative runs.")] = 15,
    batch: Annotated[
        int | None, typer.Option(min=2, help="Samples a step; 128, mid 64, ViT-B-16 512.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Torch threads.")] = 1,
) -> None:
    """Measure ratios, alternatives in turn within this process; they go to a JSON file too.

    Each is the median over rounds, with the 10-90 % range of the rounds.
    """
    if name not in BENCHMARKS:
        raise CmpError(f"no benchmark is called {name!r}; there are {', '.join(BENCHMARKS)}")
    module, models = BENCHMARKS[name]
    torch.set_num_threads(threads)
    measure = getattr(importlib.import_module(f"cmp.bench.{module}"), name)
    report = measure(model or list(models), corpus.load(), rounds, batch)
    console.print(report.table())
    for note in report.notes:
        console.print(note, highlight=False)
    console.print(f"written: {report.write()}", highlight=False)
