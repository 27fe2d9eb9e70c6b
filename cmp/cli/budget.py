"""`cmpt budget`: what methods and models cost, counted on shapes."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated

import torch
import typer

from cmp import budgets, config
from cmp.budgets import Cost
from cmp.cli import shared
from cmp.errors import CmpError
from cmp.experiments import paper
from cmp.experiments.forecast import GIGA, measured_memory
from cmp.registry import option_names


def budget(
    model: str = "tiny",
    batch: Annotated[int, typer.Option(min=2)] = 64,
    total: float | None = None,
    tasks: shared.Positive = 8,
    method: list[str] | None = None,
    table4: bool = False,
    models: bool = False,
) -> None:
    """Show FLOPs, memory and steps of each method under one budget, counted on shapes.

    Args:
        model: An embedded model, or any of open_clip's.
        batch: Samples per step.
        total: Memory-adjusted GFLOPs in all. Default: what a run of cpu costs.
        tasks: Updates that share the total.
        method: A method, such as lora,rank=64; repeat it for more. Default: all.
        table4: Show the paper's Table 4 beside our numbers instead.
        models: Show what full fine-tuning of real models costs instead.

    Example:
        cmpt budget --method full --method lora,rank=4
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


def method_cost(model: str, batch: int, text: str) -> Cost:
    """Return the cost of a method as `--method` writes it: "lora,rank=64".

    Its memory is measured where there is a CUDA card.
    """
    tree = {"model": {"name": model, "start": "random"}, "training": {"batch": batch}}
    assignments = [f"method.{setting}" for setting in f"name={text}".split(",")]
    run_config = config.parse(config.override(tree, assignments), f"--method {text}")
    cost = budgets.method_cost(run_config)
    if torch.cuda.is_available():
        return dataclasses.replace(cost, memory=measured_memory(run_config))
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
        sizes = (cost.step / GIGA, cost.memory / GIGA, bought.multiplier)
        adjusted = (bought.step / GIGA, bought.end / GIGA)
        rows.append((text, *sizes, *adjusted, bought.steps, bought.steps * batch))
    columns = ("method", "GFLOPs", "GB", "x full", "GMAFs", "at end", "steps", "samples")
    title = f"{model}, batch {batch}: {total:,.4g} memory-adjusted GFLOPs over {tasks} tasks"
    shared.print_table(columns, rows, title)
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
        sizes = (row.gflops, cost.step / GIGA, row.multiplier, ours.multiplier)
        rows.append((label, *sizes, *steps))
    shared.print_table(
        ("method", "GFLOPs", "ours", "x full", "ours", "steps", "its rule", "once", "all ours"),
        rows,
        f"Table 4: {paper.TABLE4_MODEL}, batch {paper.TABLE4_BATCH}, T = {paper.TABLE4_TASKS}",
    )
    typer.echo(
        "steps: as printed, by the paper's rule, and with a task's end charged once per task"
    )


def print_models(total: float) -> None:
    """Print what `total` GFLOPs of full fine-tuning buy for real models."""
    columns = ("model", "million", "GFLOPs", "GB", "steps", "samples")
    title = f"batches of {paper.TABLE4_BATCH}: {total:,.4g} GFLOPs"
    shared.print_table(columns, paper.model_catalogue(total=total).itertuples(), title)
