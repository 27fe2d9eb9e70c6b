"""The paper's Table 4, a catalogue of real models, and small models of the reference's behaviour.

Table 4 is of ViT-B/16, batch 512, and 1.8e9 memory-adjusted GFLOPs over 20 tasks (spec 9.1). The
column that the paper heads "Per-Task GFlops" is of one step. EWC's holds 98 batches of Fisher
information beside each step's own, though they are measured once per task.
"""

import math
from typing import NamedTuple

import pandas as pd
import torch
from torch.nn import functional as F

from cmp import budgets, config, models
from cmp.budgets import Budget
from cmp.config import Method, RunConfig
from cmp.evaluation import retrieval_hits
from cmp.merging.apply import merge
from cmp.seeds import torch_generator

TABLE4_MODEL, TABLE4_BATCH, TABLE4_TOTAL, TABLE4_TASKS = "ViT-B-16", 512, 1.8e9, 20
FISHER_BATCHES = 98
CATALOGUE_MODELS = ("ViT-S-16", "ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-H-14", "ViT-g-14")
MIN_SUBSET, SUBSET_SHARE = 300, 0.1
"""The reference scores this share of a dataset after each task, and this many images at least."""


class Table4Row(NamedTuple):
    """A row of Table 4.

    Attributes:
        gflops: GFLOPs of a step.
        memory: GB at the peak of a step.
        multiplier: The memory multiplier as printed.
        steps: Steps per task at T = 20.
        method: The method that we compare with, as `cmpt budget --method` takes it.
    """

    gflops: float
    memory: float
    multiplier: float
    steps: int
    method: str


TABLE4: dict[str, Table4Row] = {
    "full": Table4Row(63394.76, 46.59, 1.0, 1420, "full"),
    "locked-text": Table4Row(57254.62, 37.58, 0.8064, 1949, "locked-text"),
    "locked-image": Table4Row(27176.67, 11.88, 0.2551, 12982, "locked-image"),
    "LNFit": Table4Row(43165.60, 30.56, 0.6558, 3179, "lnfit"),
    "BitFit": Table4Row(43165.60, 30.55, 0.6558, 3179, "bitfit"),
    "LoRA r=4": Table4Row(54479.25, 40.54, 0.8702, 1898, "lora,rank=4"),
    "LoRA r=64": Table4Row(54505.02, 40.68, 0.8730, 1891, "lora,rank=64"),
    "DoRA r=4": Table4Row(54479.82, 40.66, 0.8726, 1893, "dora,rank=4"),
    "DoRA r=64": Table4Row(54514.18, 40.79, 0.8754, 1886, "dora,rank=64"),
    "VeRA r=4": Table4Row(54479.34, 40.54, 0.8702, 1898, "vera,rank=4"),
    "VeRA r=64": Table4Row(54507.83, 40.57, 0.8708, 1896, "vera,rank=64"),
    "EWC": Table4Row(6276081.09, 47.21, 1.0132, 14, f"ewc,fisher=batch,batches={FISHER_BATCHES}"),
    "SI": Table4Row(63394.76, 46.65, 1.0013, 1418, "si"),
}
"""By method. The row of full fine-tuning is that of ZS-, FT- and EMA-Merge too; GaLore has none."""


def rule_steps(row: Table4Row, tasks: int = TABLE4_TASKS) -> int:
    """Return the steps per task of a row by the paper's rule.

    They are rounded, and what comes at a task's end is charged to each of its steps.
    """
    return round(TABLE4_TOTAL / (tasks * row.gflops * row.multiplier))


def table4_steps(run_config: RunConfig) -> int | None:
    """Return a run's steps per task by the paper's rule, or None if Table 4 has no such run."""
    method, training = run_config.method, run_config.training
    key = (run_config.model.name, training.batch, training.budget, method)
    if key != (TABLE4_MODEL, TABLE4_BATCH, 1, Method(method.name, rank=method.rank)):
        return None
    label = f"{method.name},rank={method.rank}" if method.rank else method.name
    rows = [row for row in TABLE4.values() if row.method.partition(",fisher")[0] == label]
    return rule_steps(rows[0], run_config.stream.tasks) if rows else None


def budget_charged_once(row: Table4Row) -> Budget:
    """Return a row's budget from the paper's numbers, with a task's end charged once."""
    step = min(row.gflops, TABLE4["full"].gflops)
    end = FISHER_BATCHES * step if row.gflops > step else 0.0
    adjusted = (step * row.multiplier, end * row.multiplier)
    return Budget(TABLE4_TOTAL / TABLE4_TASKS, *adjusted, row.multiplier)


def model_catalogue(
    names: tuple[str, ...] = CATALOGUE_MODELS, total: float = TABLE4_TOTAL
) -> pd.DataFrame:
    """Return what full fine-tuning of real models costs at the paper's batch, counted on shapes.

    Args:
        names: open_clip's names.
        total: A budget in GFLOPs.

    Returns:
        A row per model: `parameters` (millions), `GFLOPs` per sample, forward and backward, `GB` at
        the peak of a step in fp32, and the `steps` and `samples` that `total` buys.
    """
    rows, batch = {}, TABLE4_BATCH
    for name in names:
        tree = {"model": {"name": name, "start": "random"}, "training": {"batch": batch}}
        cost = budgets.method_cost(config.parse(tree, "catalogue"))
        count = int(total * 1e9 / cost.step)
        rows[name] = {
            "parameters": sum(p.numel() for p in models.create_on_meta(name).parameters()) / 1e6,
            "GFLOPs": cost.step / batch / 1e9,
            "GB": cost.memory / 1e9,
            "steps": count,
            "samples": count * batch,
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def subset_sizes(images: int, classes: int, evaluations: int, in_place: bool) -> list[int]:
    """Return how many images of a dataset are scored at each of some subset evaluations (spec 2.3).

    Args:
        images: Images of the dataset.
        classes: Its classes.
        evaluations: How many evaluations.
        in_place: Whether each cuts what the one before it left, as in the reference.
    """
    sizes, left = [], images
    for _ in range(evaluations):
        size = min(left, max(2 * classes, MIN_SUBSET, int(SUBSET_SHARE * left)))
        left = size if in_place else left
        sizes.append(size)
    return sizes


def standard_error(images: int, accuracy: float = 0.7) -> float:
    """Return the standard error of an accuracy over so many images, in points."""
    return 100 * math.sqrt(accuracy * (1 - accuracy) / images)


def perfect_recall(pairs: int = 200, shift: int = 0) -> dict[str, float]:
    """Return the recall@5 of a model that gives an image and its one caption the same feature.

    Args:
        pairs: Number of images.
        shift: Subtracted from the number of the image that each caption should find (spec 2.2).

    Returns:
        Percent: "image to text", "text to image" and their mean, "R@5".
    """
    features = F.normalize(torch.randn(pairs, 32, generator=torch_generator("recall", 0)), dim=1)
    own = torch.arange(pairs)
    to_text, _ = retrieval_hits(features, features, own)
    _, to_image = retrieval_hits(features, features, own - shift)
    recall = 100 * float(to_text.mean()), 100 * float(to_image.mean())
    return {"image to text": recall[0], "text to image": recall[1], "R@5": sum(recall) / 2}


def ewc_steps() -> pd.DataFrame:
    """Return the steps per task that the paper's numbers leave EWC (spec 1.2).

    EWC's pass after a task is charged to every step, as printed, or once.
    """
    row = TABLE4["EWC"]
    steps = {
        "EWC, charged to every step": rule_steps(row),
        "EWC, charged once": budget_charged_once(row).steps,
        "fine-tuning": rule_steps(TABLE4["full"]),
    }
    return pd.DataFrame.from_dict(steps, orient="index", columns=["steps a task"])


def slerp_shares(weight: float) -> pd.DataFrame:
    """Return how much of two orthogonal models is in their merge (spec 4).

    Args:
        weight: Of the first model; the last row has the weights in the other order, as the
            reference hands them to slerp.
    """
    models = [{"x": torch.tensor([1.0, 0.0])}, {"x": torch.tensor([0.0, 1.0])}]
    merged = {
        "interpolation": merge("interpolation", models, weights=(weight, 1 - weight)),
        "slerp": merge("slerp", models, weights=(weight, 1 - weight)),
        "slerp, other order": merge("slerp", models, weights=(1 - weight, weight)),
    }
    shares = {label: weights["x"].tolist() for label, weights in merged.items()}
    return pd.DataFrame.from_dict(shares, orient="index", columns=["of the first", "of the second"])


def task_arithmetic_lengths(scale: float, tasks: int) -> list[float]:
    """Return how far merged weights are from the start after each task (spec 4).

    Every task trains a step of length one further in one direction, from the merge, and is then
    merged with it.
    """
    base, merged, lengths = {"x": torch.zeros(1)}, {"x": torch.zeros(1)}, []
    for _ in range(tasks):
        trained = {"x": merged["x"] + 1}
        merged = merge("task-arithmetic", [trained, merged], base, scale=scale)
        lengths.append(float(merged["x"].abs()))
    return lengths


def if_restarted(trajectory: pd.DataFrame) -> pd.DataFrame:
    """Return a trajectory beside what a run reports whose tasks all start before the stream.

    The reference scores those weights (spec 3): the first row, again and again.
    """
    scores = trajectory.set_index("task")[["A_KA", "A_ZS"]]
    first = scores.iloc[[0] * len(scores)].set_axis(scores.index)
    return scores.join(first.add_suffix(", restarted"))
