"""What the published code of the benchmark does otherwise, as small models of it for chapter A3
(spec 11, at its commit 3e123d9). They are written from a description; no code is taken over.
"""

import math

import pandas as pd
import torch
from torch.nn import functional as F

from cmp.budgets import rules, table4
from cmp.evaluation import retrieval_hits
from cmp.merging.combining import merge
from cmp.merging.rules import How
from cmp.seeds import torch_generator

LEAST, SHARE = 300, 0.1
"""Of what is evaluated after each task: images a dataset at least, and the share of it."""


def subset_sizes(images: int, classes: int, evaluations: int, in_place: bool) -> list[int]:
    """Images of a dataset that are scored at each of some subset evaluations. in_place: each cuts
    what the one before it left, as there; else all images, every time (spec 2.3)."""
    sizes, left = [], images
    for _ in range(evaluations):
        size = min(left, max(2 * classes, LEAST, int(SHARE * left)))
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
    row = table4.TABLE4["EWC"]
    every, full = (
        rules.paper_steps(table4.TOTAL, table4.TASKS, each.gflops, each.multiplier)
        for each in (row, table4.TABLE4["full"])
    )
    once = table4.once_a_task(row).steps
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
        label: merge(rule, models, how=How(weights=weights))["x"].tolist()
        for label, (rule, weights) in kinds.items()
    }
    return pd.DataFrame.from_dict(found, orient="index", columns=["of the first", "of the second"])


def task_arithmetic_lengths(scale: float, tasks: int) -> list[float]:
    """How far the merged weights are from the start after each task, where every task trains a step
    of length one further, the same way, from the merge, and is then merged with it (spec 4)."""
    base, merged, found = {"x": torch.zeros(1)}, {"x": torch.zeros(1)}, []
    for _ in range(tasks):
        trained = {"x": merged["x"] + 1}
        merged = merge("task-arithmetic", [trained, merged], base, How(scale=scale))
        found.append(float(merged["x"].abs()))
    return found


def if_restarted(trajectory: pd.DataFrame) -> pd.DataFrame:
    """A run's trajectory beside what is reported where each task starts from the weights before the
    stream, and those are scored (spec 3): the first row, again and again."""
    kept = trajectory.set_index("task")[["A_KA", "A_ZS"]]
    again = kept.iloc[[0] * len(kept)].set_axis(kept.index)
    return kept.join(again.add_suffix(", restarted"))
