"""Packed datasets side by side in memory: what training draws from and evaluation looks at."""

import functools
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from cmp.data import packed
from cmp.data.manifest import Dataset, embedded


@dataclass(frozen=True)
class Corpus:
    """All images of some datasets.

    images: uint8 [N, 4, H, W], RGBA.
    table: a row an image: `dataset`, `split`, `label` (a class name), `group`.
    texts: the distinct captions; `caption_ids[caption_starts[i]:caption_starts[i + 1]]` are image
        i's captions as positions in `texts`.
    datasets: the manifests by name; classes: each dataset's class names in label order.
    hashes: dataset -> sha256 of its pixels and table.
    """

    images: Tensor
    table: pd.DataFrame
    texts: list[str]
    caption_ids: np.ndarray
    caption_starts: np.ndarray
    datasets: dict[str, Dataset]
    classes: dict[str, list[str]]
    hashes: dict[str, str]

    def rows(self, split: str, **equal: str) -> np.ndarray:
        """Positions of a split's images, restricted by column values such as dataset="shapes"."""
        chosen = (self.table["split"] == split).to_numpy()
        for column, value in equal.items():
            chosen = chosen & (self.table[column] == value).to_numpy()
        return np.flatnonzero(chosen)

    def by_role(self, role: str) -> list[str]:
        """Names of the datasets of a role."""
        return [name for name, dataset in self.datasets.items() if dataset.role == role]

    def captions(self, row: int) -> list[str]:
        """The captions of one image."""
        start, stop = self.caption_starts[row : row + 2]
        return [self.texts[index] for index in self.caption_ids[start:stop]]


@functools.cache
def load(*roles: str) -> Corpus:
    """The embedded benchmark's datasets of the given roles (all roles where none is named)."""
    chosen = [d for d in embedded().values() if not d.optional and (not roles or d.role in roles)]
    return join([packed.read(dataset) for dataset in chosen])


def join(chosen: list[packed.Packed]) -> Corpus:
    """Put packed datasets side by side, in the order given."""
    tables = [each.table.assign(dataset=each.dataset.name) for each in chosen]
    table = pd.concat(tables, ignore_index=True)
    captions = table.pop("captions")
    lengths = captions.map(len).to_numpy()
    ids, texts = pd.factorize(np.concatenate(captions.to_numpy()))
    images = np.concatenate([each.images for each in chosen])
    for column in ("dataset", "split", "label"):
        table[column] = table[column].astype("category")
    return Corpus(
        images=torch.from_numpy(images),
        table=table[["dataset", "split", "label", "group"]],
        texts=list(texts),
        caption_ids=ids,
        caption_starts=np.concatenate([[0], np.cumsum(lengths)]),
        datasets={each.dataset.name: each.dataset for each in chosen},
        classes={each.dataset.name: each.header.classes for each in chosen},
        hashes={each.dataset.name: each.data_hash() for each in chosen},
    )
