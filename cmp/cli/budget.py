"""The command `budget`, which computes the cost of methods from shapes."""

import typer

from cmp.cli import shared
from cmp.errors import CmpError


def budget(
    model: str = "small",
    batch: shared.Batch = 64,
    total: float | None = None,
    tasks: shared.Positive = 20,
    method: list[str] | None = None,
) -> None:
    """Compare FLOPs, memory and steps of methods under one compute budget.

    Costs are computed from shapes, without training.

    Args:
        model: A model of this book or of open_clip, hf-hub:ORG/NAME, or local-dir:FOLDER for a
            folder in open_clip's format.
        batch: Samples per step.
        total: Budget of the whole stream, in memory-adjusted GFLOPs. Default: that of a cpu run.
        tasks: Number of updates that share the budget.
        method: A method with its settings, such as lora,rank=64; repeat for more. Default: all
            methods.

    Example:
        cmpt budget --method full --method lora,rank=4
    """
    from cmp import config, values
    from cmp.registry import option_names
    from cmp.runs import paper
    from cmp.runs.forecast import GIGA

    if total is not None and not 0 < total <= values.MAX_COMPUTE:
        raise CmpError(
            f"--total: {total:g} GFLOPs: must be above 0, and at most {values.MAX_COMPUTE:g}"
        )
    refused: dict[str, str] = {}
    full = paper.method_cost(model, batch, "full").step / GIGA
    if total is None:
        total = tasks * config.parse(config.profile("cpu")).training.steps * full
    names, left_out = (method, None) if method else (option_names("method"), refused)
    steps = total / tasks / full
    table = paper.budget_table(model, batch, steps, names, left_out)
    title = f"{model}, batch {batch}: {total:,.4g} memory-adjusted GFLOPs over {tasks} updates"
    shared.print_table(("method", *table.columns), table.itertuples(), title)
    typer.echo(
        "per step: GFLOPs, memory (computed, fp32), GMAFs = GFLOPs x memory relative to full\nper "
        "update: end GMAFs, charged once; steps; samples"
    )
    for name, reason in refused.items():
        typer.echo(f"left out: {name}: {reason}")
