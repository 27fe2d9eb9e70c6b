"""`cmp plan`: a run that is ready to start, from what one has and what must be kept."""

from typing import Annotated

import typer

from cmp import planning
from cmp.planning import DEVICES, KEEP, NEW, Wish, telling


def _listed(words: dict[str, object]) -> str:
    return ", ".join(words)


def plan(
    model: Annotated[str, typer.Option(help="An embedded model or any of open_clip's.")] = "tiny",
    updates: Annotated[int, typer.Option(help="How many updates there will be.")] = 8,
    images: Annotated[
        int | None, typer.Option(help="Images of each, on average; those of the benchmark.")
    ] = None,
    gpu_hours: Annotated[
        float | None, typer.Option(help="Hours on the device, for training all updates.")
    ] = None,
    gmafs: Annotated[
        float | None, typer.Option(help="Or memory-adjusted GFLOPs in all, as the paper has it.")
    ] = None,
    device: Annotated[str, typer.Option(help=f"One of {_listed(DEVICES)}.")] = "h100",
    keep: Annotated[str, typer.Option(help=f"What must be kept: {_listed(KEEP)}.")] = "balance",
    new: Annotated[str, typer.Option(help=f"What is new in updates: {_listed(NEW)}.")] = "both",
    pool: Annotated[float, typer.Option(help="Part of the pretraining data at hand.")] = 0.1,
    other_pool: Annotated[
        bool, typer.Option("--other-pool", help="Public data would stand in for them.")
    ] = False,
    buffer: Annotated[
        int | None, typer.Option(help="Images of earlier updates that can be kept; all.")
    ] = None,
) -> None:
    """Print a file for `cmp run FILE`: its costs, where such runs ended, and why, as comments."""
    wish = Wish(
        model, updates, images, gpu_hours, gmafs, device, keep, new,
        0.0 if other_pool else pool, other_pool, buffer,
    )  # fmt: skip
    typer.echo(telling.as_yaml(planning.plan(wish, planning.gather())), nl=False)
