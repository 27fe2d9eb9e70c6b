"""The command `budget`, which computes the cost of methods and models from shapes."""

from collections.abc import Sequence
from pathlib import Path

import torch
import typer

from cmp import budgets, config, values
from cmp.cli import shared
from cmp.errors import CmpError
from cmp.experiments import paper
from cmp.experiments.forecast import GIGA
from cmp.registry import option_names

TABLE4_NOTE = Path(__file__).with_name("table4.txt").read_text(encoding="utf-8").rstrip()


def budget(
    model: str = "small",
    batch: shared.Batch = 64,
    total: float | None = None,
    tasks: shared.Positive = 20,
    method: list[str] | None = None,
    table4: bool = False,
    models: bool = False,
) -> None:
    """Compare FLOPs, memory and steps of methods under one compute budget.

    Costs are computed from shapes, without training.

    Args:
        model: An embedded or open_clip model, hf-hub:ORG/NAME, or local-dir:FOLDER for a folder in
            open_clip's format.
        batch: Samples per step.
        total: Budget of the whole stream, in memory-adjusted GFLOPs. Default: that of a cpu run.
        tasks: Number of updates that share the budget.
        method: A method with its settings, such as lora,rank=64; repeat for more. Default: all
            methods.
        table4: Only compare the paper's Table 4 with our counts.
        models: Only print the cost of full fine-tuning for real models.

    Example:
        cmpt budget --method full --method lora,rank=4
    """
    if total is not None and not 0 < total <= values.MAX_COMPUTE:
        raise CmpError(
            f"--total: {total:g} GFLOPs: must be above 0, and at most {values.MAX_COMPUTE:g}"
        )
    if models:
        if table4 or method:
            raise CmpError("--models: only for full fine-tuning; leave out --method and --table4")
        print_models(total or paper.TABLE4_TOTAL)
    elif table4:
        if method or total is not None:
            raise CmpError(
                "--table4: has its own methods and total; leave out --method and --total"
            )
        print_table4()
    else:
        print_methods(model, batch, total, tasks, method)


def print_methods(
    model: str, batch: int, total: float | None, tasks: int, methods: Sequence[str] | None
) -> None:
    """Print the costs of methods under one total, in memory-adjusted GFLOPs. By default, print all
    methods that work with the model, and why others are left out."""
    refused: dict[str, str] = {}
    full = paper.method_cost(model, batch, "full").step / GIGA
    if total is None:
        total = tasks * config.parse(config.profile("cpu")).training.steps * full
    has_card = torch.cuda.is_available()
    names, left_out = (methods, None) if methods else (option_names("method"), refused)
    steps = total / tasks / full
    table = paper.budget_table(model, batch, steps, names, has_card, left_out)
    title = f"{model}, batch {batch}: {total:,.4g} memory-adjusted GFLOPs over {tasks} tasks"
    shared.print_table(("method", *table.columns), table.itertuples(), title)
    kind = "measured on this GPU" if has_card else "computed"
    typer.echo(
        f"per step: GFLOPs, memory ({kind}, fp32), GMAFs = GFLOPs x memory relative to full\nper "
        "task: end GMAFs, charged once; steps; samples"
    )
    for name, reason in refused.items():
        typer.echo(f"left out: {name}: {reason}")


def print_table4() -> None:
    """Print the paper's rows at T = 20: steps by its rule and by ours, and our counts."""
    run, has_card = (paper.TABLE4_MODEL, paper.TABLE4_BATCH), torch.cuda.is_available()
    full = paper.method_cost(*run, "full", has_card)
    allowed, rows = paper.TABLE4_TOTAL * GIGA / paper.TABLE4_TASKS, []
    for label, row in paper.TABLE4.items():
        cost = paper.method_cost(*run, row.method, has_card)
        ours = budgets.make_budget(allowed, cost, full)
        steps = (row.steps, paper.rule_steps(row), paper.budget_charged_once(row).steps, ours.steps)
        sizes = (row.gflops, cost.step / GIGA, row.multiplier, ours.multiplier)
        rows.append((label, *sizes, *steps))
    shared.print_table(
        ("method", "GFLOPs", "ours", "x full", "ours", "steps", "its rule", "once", "all ours"),
        rows,
        f"Table 4: {paper.TABLE4_MODEL}, batch {paper.TABLE4_BATCH}, T = {paper.TABLE4_TASKS}",
    )
    typer.echo(TABLE4_NOTE)


def print_models(total: float) -> None:
    """Print how far `total` GFLOPs of full fine-tuning go for real models."""
    columns = ("model", "million", "GFLOPs", "GB", "steps", "samples")
    title = f"batches of {paper.TABLE4_BATCH}: {total:,.4g} GFLOPs"
    shared.print_table(columns, paper.model_catalogue(total=total).itertuples(), title)
