"""`cmpt budget`: what methods and models cost, counted on shapes."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated

import torch
import typer

from cmp import budgets, config
from cmp.budgets import Cost
from cmp.cli.shared import print_table
from cmp.config import RunConfig
from cmp.errors import CmpError
from cmp.experiments import forecast, paper
from cmp.registry import option_names

GIGA = 1e9


def budget(
    model: Annotated[str, typer.Option(help="An embedded model or any of open_clip's.")] = "tiny",
    batch: Annotated[int, typer.Option(min=2, help="Samples per step.")] = 64,
    total: Annotated[
        float | None,
        typer.Option(help="Memory-adjusted GFLOPs in all. Default: what a cpu run costs."),
    ] = None,
    tasks: Annotated[int, typer.Option(min=1, help="Updates that share the total.")] = 8,
    method: Annotated[
        list[str] | None,
        typer.Option(help="A method, such as lora,rank=64; repeat it for more. Default: all."),
    ] = None,
    table4: Annotated[
        bool, typer.Option("--table4", help="Show the paper's Table 4 beside ours instead.")
    ] = False,
    models: Annotated[
        bool, typer.Option("--models", help="Show what real models cost instead.")
    ] = False,
) -> None:
    """Show FLOPs, memory and steps of each method under one budget.

    Nothing is computed but shapes.

    Example: cmpt budget --method full --method lora,rank=4
    """
    if models:
        if table4 or method:
            raise CmpError("--models is of full fine-tuning: leave out --method and --table4")
        print_models(total or paper.TABLE4_TOTAL)
    elif table4:
        if method or total is not None:
            raise CmpError("--table4 has its own methods and total: leave out --method and --total")
        print_table4()
    else:
        print_methods(model, batch, total, tasks, method or option_names("method"))


def method_config(model: str, batch: int, text: str) -> RunConfig:
    """Return the run of a method as `--method` writes it: "lora,rank=64"."""
    name, *settings = text.split(",")
    tree = {"model": {"name": model, "start": "random"}, "training": {"batch": batch}}
    assignments = [f"method.name={name}", *(f"method.{setting}" for setting in settings)]
    return config.parse(config.override(tree, assignments), f"--method {text}")


def method_cost(model: str, batch: int, text: str) -> Cost:
    """Return a method's cost; its memory is measured where there is a CUDA card."""
    run_config = method_config(model, batch, text)
    cost = budgets.method_cost(run_config)
    if torch.cuda.is_available():
        return dataclasses.replace(cost, memory=forecast.measured_memory(run_config))
    return cost


def print_methods(
    model: str, batch: int, total: float | None, tasks: int, methods: Sequence[str]
) -> None:
    """Print what methods cost under one total, in memory-adjusted GFLOPs."""
    full = method_cost(model, batch, "full")
    if total is None:
        total = tasks * config.profile("cpu")["training"]["steps"] * full.step / GIGA
    if not total > 0:
        raise CmpError(f"--total: {total:g} memory-adjusted GFLOPs; must be above 0")
    rows = []
    for text in methods:
        cost = method_cost(model, batch, text)
        bought = budgets.make_budget(total * GIGA / tasks, cost, full)
        flops = (_giga(cost.step), f"{cost.memory / GIGA:.3f}", f"{bought.multiplier:.4f}")
        adjusted = (_giga(bought.step), _giga(bought.end))
        rows.append((text, *flops, *adjusted, f"{bought.steps:,}", f"{bought.steps * batch:,}"))
    columns = ("method", "GFLOPs", "GB", "x full", "GMAFs", "at end", "steps", "samples")
    title = f"{model}, batch {batch}: {total:,.4g} memory-adjusted GFLOPs over {tasks} tasks"
    print_table(columns, rows, title)
    kind = "measured on this card" if torch.cuda.is_available() else "accounted for"
    typer.echo(
        f"per step: GFLOPs, memory ({kind}, in fp32), GMAFs = GFLOPs x memory / full's\n"
        "per task: GMAFs at its end, charged once, its steps and samples"
    )


def print_table4() -> None:
    """Print the paper's rows at T = 20: its steps by its rule and by ours, and what we count."""
    full = method_cost(paper.TABLE4_MODEL, paper.TABLE4_BATCH, "full")
    allowed, rows = paper.TABLE4_TOTAL * GIGA / paper.TABLE4_TASKS, []
    for label, row in paper.TABLE4.items():
        cost = method_cost(paper.TABLE4_MODEL, paper.TABLE4_BATCH, row.method)
        ours = budgets.make_budget(allowed, cost, full)
        steps = (row.steps, paper.rule_steps(row), paper.budget_charged_once(row).steps, ours.steps)
        rows.append((
            label, _giga(row.gflops * GIGA), _giga(cost.step),
            f"{row.multiplier:.4f}", f"{ours.multiplier:.4f}", *(f"{count:,}" for count in steps),
        ))  # fmt: skip
    columns = (
        "method",
        "GFLOPs",
        "ours",
        "x full",
        "ours",
        "steps",
        "its rule",
        "once",
        "all ours",
    )
    title = f"Table 4: {paper.TABLE4_MODEL}, batch {paper.TABLE4_BATCH}, T = {paper.TABLE4_TASKS}"
    print_table(columns, rows, title)
    typer.echo(
        "steps: as printed, by the paper's rule, and with a task's end charged once per task"
    )


def print_models(total: float) -> None:
    """Print what `total` GFLOPs of full fine-tuning buy for real models."""
    rows = [
        (row.Index, f"{row.parameters:,.0f}", f"{row.GFLOPs:,.1f}", f"{row.GB:,.0f}",
         f"{row.steps:,}", f"{row.samples:,}")
        for row in paper.model_catalogue(total=total).itertuples()
    ]  # fmt: skip
    title = f"batches of {paper.TABLE4_BATCH}: {total:,.4g} GFLOPs"
    print_table(("model", "million", "GFLOPs", "GB", "steps", "samples"), rows, title)


def _giga(flops: float) -> str:
    """Return GFLOPs as text, with decimals where they are few."""
    return f"{flops / GIGA:,.0f}" if flops >= 1e3 * GIGA else f"{flops / GIGA:.2f}"
