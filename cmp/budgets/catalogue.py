"""Real models side by side: what open_clip's vision transformers cost to update (spec 1.2)."""

import pandas as pd

from cmp import config, models
from cmp.budgets import counting, table4

MODELS = ("ViT-S-16", "ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-H-14", "ViT-g-14")
GIGA = 1e9


def catalogue(
    names: tuple[str, ...] = MODELS, batch: int = table4.BATCH, total: float = table4.TOTAL
) -> pd.DataFrame:
    """A row a model, fully fine-tuned: `parameters` (millions), `GFLOPs` a sample, forward and
    backward, `GB` at the peak of a step of `batch` samples in fp32, as accounted for on shapes,
    and the `steps` and `samples` that `total` GFLOPs buy in all."""
    rows = {}
    for name in names:
        tree = {"model": {"name": name, "start": "random"}, "training": {"batch": batch}}
        cost = counting.cost(config.parse(tree, "catalogue"))
        steps = int(total * GIGA / cost.step)
        rows[name] = {
            "parameters": sum(p.numel() for p in models.blank(name).parameters()) / 1e6,
            "GFLOPs": cost.step / batch / GIGA,
            "GB": cost.memory / GIGA,
            "steps": steps,
            "samples": steps * batch,
        }
    return pd.DataFrame.from_dict(rows, orient="index")
