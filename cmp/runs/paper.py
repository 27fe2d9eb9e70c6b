"""The paper's Table 4, and tables of the costs of methods and real models.

Table 4 is for ViT-B/16 with batch 512 and 1.8e9 memory-adjusted GFLOPs over 20 tasks. The column
"Per-Task GFlops" is actually per step. For EWC, it charges 98 batches of Fisher information to each
step, although they are measured once per task.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from cmp import budgets, config, models
from cmp.errors import CmpError
from cmp.runs.forecast import GIGA

TABLE4_MODEL, TABLE4_BATCH, TABLE4_TOTAL, TABLE4_TASKS = "ViT-B-16", 512, 1.8e9, 20
FISHER_BATCHES = 98
CATALOGUE_MODELS = ("ViT-S-16", "ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-H-14", "ViT-g-14")


class Table4Row(NamedTuple):
    """A row of Table 4.

    Attributes:
        gflops: The GFLOPs of a step.
        memory: The GB at the peak of a step.
        multiplier: The memory multiplier as printed.
        steps: The steps per task at T = 20.
        method: Our corresponding method, in the form of `cmpt budget --method`.
    """

    gflops: float
    memory: float
    multiplier: float
    steps: int
    method: str


_CSV = pd.read_csv(Path(__file__).with_name("table4.csv"), index_col="label")
TABLE4 = {row[0]: Table4Row(*row[1:]) for row in _CSV.itertuples()}
"""Rows by method. The row of full fine-tuning also applies to ZS-, FT- and EMA-Merge. GaLore has no
row.

The GFLOPs differ from ours. The paper counts fused attention, which computes its scores again in
the backward pass: 404 more per step, 366 of them in the image tower. Its adapters are on q, k, v
and c_proj, ours on every projection. Its LoRA and VeRA form W + BA and take the gradient of the
whole matrix, so the rank hardly counts; ours multiply by A and B. DoRA needs that gradient in both:
ours of rank 4 on q, k, v and c_proj takes 54,076, and with those 404 the 54,479 of the paper's
LoRA. The paper charges EWC's Fisher information to each step, and its memory is the card's peak."""


def rule_steps(row: Table4Row, tasks: int = TABLE4_TASKS) -> int:
    """Return the steps per task of a row by the paper's rule.

    They are rounded, and the cost at the end of a task is charged to each of its steps.
    """
    return round(TABLE4_TOTAL / (tasks * row.gflops * row.multiplier))


def table4_steps(run_config: config.RunConfig) -> int | None:
    """Return a run's steps per task by the paper's rule, or None if Table 4 has no such run."""
    method, training = run_config.method, run_config.training
    key = (run_config.model.name, training.batch, training.budget, method)
    if key != (TABLE4_MODEL, TABLE4_BATCH, 1, config.Method(method.name, rank=method.rank)):
        return None
    label = f"{method.name},rank={method.rank}" if method.rank else method.name
    rows = [row for row in TABLE4.values() if row.method.partition(",fisher")[0] == label]
    return rule_steps(rows[0], run_config.stream.tasks) if rows else None


def budget_charged_once(row: Table4Row) -> budgets.Budget:
    """Return a row's budget from the paper's numbers, charging the end of a task once."""
    step = min(row.gflops, TABLE4["full"].gflops)
    end = FISHER_BATCHES * step if row.gflops > step else 0.0
    adjusted = (step * row.multiplier, end * row.multiplier)
    return budgets.Budget(TABLE4_TOTAL / TABLE4_TASKS, *adjusted, row.multiplier)


def model_catalogue(names: tuple[str, ...] = CATALOGUE_MODELS) -> pd.DataFrame:
    """Return the cost of full fine-tuning of real models at the paper's batch, computed from
    shapes.

    Args:
        names: The models' names in open_clip.

    Returns:
        One row per model: `parameters` (millions), `GFLOPs` per sample, forward and backward, `GB`
        at the peak of a step in fp32, and the `steps` and `samples` that the paper's budget buys.
    """
    rows, batch = {}, TABLE4_BATCH
    for name in names:
        cost = method_cost(name, batch, "full")
        parameters = sum(p.numel() for p in models.create_on_meta(name).parameters()) / 1e6
        count = int(TABLE4_TOTAL * GIGA / cost.step)
        sizes = (cost.step / batch / GIGA, cost.memory / GIGA)
        rows[name] = (parameters, *sizes, count, count * batch)
    columns = ["parameters", "GFLOPs", "GB", "steps", "samples"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns)


def method_cost(model: str, batch: int, text: str) -> budgets.Cost:
    """Return the cost of a method.

    Args:
        model: The network's name.
        batch: Samples per step.
        text: The method in the form of `cmpt budget --method`, such as "lora,rank=64".
    """
    tree = {"model": {"name": model, "start": "random"}, "training": {"batch": batch}}
    assignments = [f"method.{setting}" for setting in f"name={text}".split(",")]
    run_config = config.parse(config.override(tree, assignments), f"--method {text}")
    return budgets.method_cost(run_config)


def budget_table(
    model: str,
    batch: int,
    full_steps: float,
    methods: Iterable[str],
    refused: dict[str, str] | None = None,
) -> pd.DataFrame:
    """Return how many steps each method gets for the cost of a number of full fine-tuning steps.

    Args:
        model: The network's name.
        batch: Samples per step.
        full_steps: Steps of full fine-tuning per task that the budget pays for.
        methods: The methods, in the form of `method_cost`.
        refused: Receives the reasons why methods do not work with the network, which are then left
            out. If None, they raise an error.

    Returns:
        One row per method: `GFLOPs` and `GB` of a step, `x full` (its memory relative to full
        fine-tuning), `GMAFs` (memory-adjusted GFLOPs of a step), `at end` (GMAFs at the end of a
        task), and `steps` and `samples` per task.
    """
    full, rows = method_cost(model, batch, "full"), {}
    for text in methods:
        try:
            cost = method_cost(model, batch, text)
        except CmpError as error:
            if refused is None:
                raise
            refused[text] = str(error)
            continue
        bought = budgets.make_budget(full_steps * full.step, cost, full)
        sizes = (cost.step / GIGA, cost.memory / GIGA, bought.multiplier)
        adjusted = (bought.step / GIGA, bought.end / GIGA)
        rows[text] = (*sizes, *adjusted, bought.steps, bought.steps * batch)
    columns = ["GFLOPs", "GB", "x full", "GMAFs", "at end", "steps", "samples"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns)
