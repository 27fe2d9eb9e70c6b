"""`cmp budget`: how many steps each update method has for the same compute."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, get_args

import torch
import typer
from rich import box
from rich.table import Table

from cmp import budgets, config
from cmp.budgets import table4
from cmp.budgets.catalogue import catalogue
from cmp.budgets.rules import Cost, paper_steps
from cmp.cli.shared import console
from cmp.config import RunConfig
from cmp.errors import CmpError

GIGA = 1e9
METHODS = get_args(config.Method.__dataclass_fields__["name"].type)


def configured(model: str, batch: int, text: str) -> RunConfig:
    """The run of a method as `--method` writes it: "lora,rank=64"."""
    name, *settings = text.split(",")
    tree = {"model": {"name": model, "start": "random"}, "training": {"batch": batch}}
    assignments = [f"method.name={name}", *(f"method.{each}" for each in settings)]
    return config.parse(config.override(tree, assignments), f"--method {text}")


def costs(run_config: RunConfig) -> Cost:
    """A method's cost; its memory is measured where there is a CUDA card, else accounted for."""
    found = budgets.counting.cost(run_config)
    if not torch.cuda.is_available():
        return found
    return dataclasses.replace(found, memory=budgets.measured_memory(run_config))


def budget(
    model: Annotated[str, typer.Option(help="An embedded model or any of open_clip's.")] = "tiny",
    batch: Annotated[int, typer.Option(min=2, help="Samples a step.")] = 64,
    total: Annotated[
        float | None, typer.Option(help="Memory-adjusted GFLOPs in all; what `cpu` costs.")
    ] = None,
    tasks: Annotated[int, typer.Option(min=1, help="Updates that share the total.")] = 8,
    method: Annotated[
        list[str] | None, typer.Option(help="Such as lora,rank=64; again for more; all.")
    ] = None,
    paper: Annotated[
        bool, typer.Option("--table4", help="The paper's Table 4 beside ours instead.")
    ] = False,
    models: Annotated[
        bool, typer.Option("--models", help="Real models, fully fine-tuned, instead.")
    ] = False,
) -> None:
    """FLOPs, memory and steps of each method under one budget; nothing is computed but shapes."""
    if models:
        if paper or method:
            raise CmpError("--models is of full fine-tuning: leave out --method and --table4")
        console.print(table_of_models(total or table4.TOTAL))
        return
    if paper:
        if method or total is not None:
            raise CmpError("--table4 has its own methods and total: leave out --method and --total")
        console.print(table_4())
        console.print(
            "steps: as printed, by its rule, and with what comes after a task charged once a task",
            highlight=False,
        )
        return
    console.print(table_of(model, batch, total, tasks, method or METHODS))
    kind = "measured on this card" if torch.cuda.is_available() else "accounted for"
    console.print(
        f"a step: GFLOPs, memory ({kind}, in fp32), GMAFs = GFLOPs x memory / full's; a task: "
        "GMAFs at its end, charged once, its steps and samples",
        highlight=False,
    )


def table_of_models(total: float) -> Table:
    """A row a real model: what `total` GFLOPs buy."""
    columns = ("million", "GFLOPs", "GB", "steps", "samples")
    table = narrow(f"batches of {table4.BATCH}: {total:,.4g} GFLOPs", columns, "model")
    for row in catalogue(total=total).itertuples():
        numbers = (f"{row.parameters:,.0f}", f"{row.GFLOPs:,.1f}", f"{row.GB:,.0f}")
        table.add_row(row.Index, *numbers, f"{row.steps:,}", f"{row.samples:,}")
    return table


def table_of(
    model: str, batch: int, total: float | None, tasks: int, wanted: Sequence[str]
) -> Table:
    """A row a method under one total, in memory-adjusted GFLOPs; by default what `cpu` costs."""
    full = costs(configured(model, batch, "full"))
    if total is None:
        total = tasks * config.profile("cpu")["training"]["steps"] * full.step / GIGA
    if not total > 0:
        raise CmpError(f"--total: {total:g} memory-adjusted GFLOPs; must be above 0")
    title = f"{model}, batch {batch}: {total:,.4g} memory-adjusted GFLOPs over {tasks} tasks"
    columns = ("GFLOPs", "GB", "x full", "GMAFs", "at end", "steps", "samples")
    table = narrow(title, columns)
    for text in wanted:
        found = costs(configured(model, batch, text))
        table.add_row(text, *cells(found, budgets.budget(total * GIGA / tasks, found, full), batch))
    return table


def narrow(title: str, columns: tuple[str, ...], first: str = "method") -> Table:
    """A table that fits 80 characters without cutting a number."""
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    table.add_column(first, min_width=12, overflow="fold")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def giga(flops: float) -> str:
    """GFLOPs, with decimals where they are few."""
    return f"{flops / GIGA:,.0f}" if flops >= 1e3 * GIGA else f"{flops / GIGA:.2f}"


def cells(found: Cost, allowed: budgets.Budget, batch: int) -> tuple[str, ...]:
    """A method's row."""
    return (
        giga(found.step),
        f"{found.memory / GIGA:.3f}",
        f"{allowed.multiplier:.4f}",
        giga(allowed.step),
        giga(allowed.end),
        f"{allowed.steps:,}" if allowed.steps else "none fits",
        f"{allowed.steps * batch:,}",
    )


def table_4() -> Table:
    """The paper's rows at T = 20: its steps by its own rule, by ours, and from what we count."""
    columns = ("GFLOPs", "ours", "x full", "ours", "steps", "its rule", "once", "all ours")
    title = f"Table 4: {table4.MODEL}, batch {table4.BATCH}, T = {table4.TASKS}"
    table = narrow(title, columns)
    full = costs(configured(table4.MODEL, table4.BATCH, "full"))
    allowed = table4.TOTAL * GIGA / table4.TASKS
    for label, row in table4.TABLE4.items():
        found = costs(configured(table4.MODEL, table4.BATCH, row.method))
        ours = budgets.budget(allowed, found, full)
        table.add_row(
            label,
            giga(row.gflops * GIGA), giga(found.step),
            f"{row.multiplier:.4f}", f"{ours.multiplier:.4f}",
            f"{row.steps:,}",
            f"{paper_steps(table4.TOTAL, table4.TASKS, row.gflops, row.multiplier):,}",
            f"{table4.once_a_task(row).steps:,}",
            f"{ours.steps:,}",
        )  # fmt: skip
    return table
