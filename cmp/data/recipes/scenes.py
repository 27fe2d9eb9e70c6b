"""Datasets drawn by `cmp.data.procedural`."""

from pathlib import Path

import numpy as np
import pandas as pd

from cmp.data import procedural
from cmp.data.manifest import SceneRecipe
from cmp.data.samples import COLUMNS, Samples
from cmp.seeds import numpy_generator


def make(recipe: SceneRecipe, archives: dict[str, Path]) -> Samples:
    """Draw each split from a random stream of its own."""
    names = procedural.SCENES[recipe.scene]
    images, rows = [], []
    for split, count in recipe.splits.items():
        labels = np.repeat(np.arange(len(names)), count)
        rng = numpy_generator("scene", 0, recipe.scene, split)
        images.append(procedural.draw(recipe.scene, labels, rng))
        for index, label in enumerate(labels):
            source = f"{recipe.scene}/{split}/{index}"
            rows.append((split, names[label], source, source, [names[label]]))
    return Samples(np.concatenate(images), pd.DataFrame(rows, columns=COLUMNS))
