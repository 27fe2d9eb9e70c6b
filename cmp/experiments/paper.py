"""Table 4 of the paper: ViT-B/16, batch 512, 1.8e9 memory-adjusted GFLOPs over 20 tasks (spec 9.1).

The column that the paper heads "Per-Task GFlops" is of one step. EWC's holds 98 batches of Fisher
information beside each step's own, though they are measured once a task.
"""

import math
from typing import NamedTuple

import pandas as pd
import torch
from torch.nn import functional as F

from cmp import budgets, config, models
from cmp.budgets import Budget
from cmp.evaluation import retrieval_hits
from cmp.merging.apply import merge
from cmp.merging.rules import MergeOptions
from cmp.seeds import torch_generator

TABLE4_MODEL, TABLE4_BATCH, TABLE4_TOTAL, TABLE4_TASKS = "ViT-B-16", 512, 1.8e9, 20
FISHER_BATCHES = 98


class Table4Row(NamedTuple):
    """gflops: of a step; memory: GB at the peak; multiplier: as printed; steps: a task at T = 20;
    method: what we compare with, as `cmpt budget --method` takes it."""

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


def budget_charged_once(row: Table4Row) -> Budget:
    """A row's budget from the paper's own numbers, with what comes after a task charged once."""
    step = min(row.gflops, TABLE4["full"].gflops)
    end = FISHER_BATCHES * step if row.gflops > step else 0.0
    adjusted = (step * row.multiplier, end * row.multiplier)
    return Budget(TABLE4_TOTAL / TABLE4_TASKS, *adjusted, row.multiplier)


CATALOGUE_MODELS = ("ViT-S-16", "ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-H-14", "ViT-g-14")
GIGA = 1e9


def model_catalogue(
    names: tuple[str, ...] = CATALOGUE_MODELS,
    batch: int = TABLE4_BATCH,
    total: float = TABLE4_TOTAL,
) -> pd.DataFrame:
    """A row a model, fully fine-tuned: `parameters` (millions), `GFLOPs` a sample, forward and
    backward, `GB` at the peak of a step of `batch` samples in fp32, as accounted for on shapes,
    and the `steps` and `samples` that `total` GFLOPs buy in all."""
    rows = {}
    for name in names:
        tree = {"model": {"name": name, "start": "random"}, "training": {"batch": batch}}
        cost = budgets.method_cost(config.parse(tree, "catalogue"))
        steps = int(total * GIGA / cost.step)
        rows[name] = {
            "parameters": sum(p.numel() for p in models.create_on_meta(name).parameters()) / 1e6,
            "GFLOPs": cost.step / batch / GIGA,
            "GB": cost.memory / GIGA,
            "steps": steps,
            "samples": steps * batch,
        }
    return pd.DataFrame.from_dict(rows, orient="index")


MIN_SUBSET, SUBSET_SHARE = 300, 0.1
"""Of what is evaluated after each task: images a dataset at least, and the share of it."""


def subset_sizes(images: int, classes: int, evaluations: int, in_place: bool) -> list[int]:
    """Images of a dataset that are scored at each of some subset evaluations. in_place: each cuts
    what the one before it left, as there; else all images, every time (spec 2.3)."""
    sizes, left = [], images
    for _ in range(evaluations):
        size = min(left, max(2 * classes, MIN_SUBSET, int(SUBSET_SHARE * left)))
        left = size if in_place else left
        sizes.append(size)
    return sizes


def standard_error(images: int, accuracy: float = 0.7) -> float:
    """Of an accuracy over so many images, in points."""
    return 100 * math.sqrt(accuracy * (1 - accuracy) / images)


def perfect_recall(pairs: int = 200, shift: int = 0) -> dict[str, float]:
    """Recall@5 of a model that gives each image and its one caption the same feature, in percent;
    shift: what is taken off the image that each caption should find (spec 2.2)."""
    features = F.normalize(torch.randn(pairs, 32, generator=torch_generator("recall", 0)), dim=1)
    own = torch.arange(pairs)
    to_text, _ = retrieval_hits(features, features, own)
    _, to_image = retrieval_hits(features, features, own - shift)
    found = 100 * float(to_text.mean()), 100 * float(to_image.mean())
    return {"image to text": found[0], "text to image": found[1], "R@5": sum(found) / 2}


def ewc_steps() -> pd.DataFrame:
    """Steps a task that the paper's own numbers leave EWC: with its pass after a task charged to
    every step, and charged once (spec 1.2)."""
    row = TABLE4["EWC"]
    every, full = (
        budgets.paper_steps(TABLE4_TOTAL, TABLE4_TASKS, each.gflops, each.multiplier)
        for each in (row, TABLE4["full"])
    )
    once = budget_charged_once(row).steps
    return pd.DataFrame(
        {"steps a task": [every, once, full]},
        index=["EWC, charged to every step", "EWC, charged once", "fine-tuning"],
    )


def slerp_shares(weight: float) -> pd.DataFrame:
    """How much of two models at a right angle is in their merge, where the first gets `weight`; and
    if the weights are handed over in the other order, as there for slerp (spec 4)."""
    models = [{"x": torch.tensor([1.0, 0.0])}, {"x": torch.tensor([0.0, 1.0])}]
    kinds = {
        "interpolation": ("interpolation", (weight, 1 - weight)),
        "slerp": ("slerp", (weight, 1 - weight)),
        "slerp, other order": ("slerp", (1 - weight, weight)),
    }
    found = {
        label: merge(rule, models, options=MergeOptions(weights=weights))["x"].tolist()
        for label, (rule, weights) in kinds.items()
    }
    return pd.DataFrame.from_dict(found, orient="index", columns=["of the first", "of the second"])


def task_arithmetic_lengths(scale: float, tasks: int) -> list[float]:
    """How far the merged weights are from the start after each task, where every task trains a step
    of length one further, the same way, from the merge, and is then merged with it (spec 4)."""
    base, merged, found = {"x": torch.zeros(1)}, {"x": torch.zeros(1)}, []
    for _ in range(tasks):
        trained = {"x": merged["x"] + 1}
        merged = merge("task-arithmetic", [trained, merged], base, MergeOptions(scale=scale))
        found.append(float(merged["x"].abs()))
    return found


def if_restarted(trajectory: pd.DataFrame) -> pd.DataFrame:
    """A run's trajectory beside what is reported where each task starts from the weights before the
    stream, and those are scored (spec 3): the first row, again and again."""
    kept = trajectory.set_index("task")[["A_KA", "A_ZS"]]
    again = kept.iloc[[0] * len(kept)].set_axis(kept.index)
    return kept.join(again.add_suffix(", restarted"))
