"""Datasets side by side, packed in memory or in their files: what training draws from and
evaluation looks at."""

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from cmp.config import RunConfig
from cmp.data import collection, packed
from cmp.data.backed import Files, files
from cmp.data.filesets import FileSet, folders
from cmp.data.manifest import Dataset, embedded
from cmp.data.readers.index import Index
from cmp.errors import CmpError


@dataclass(frozen=True)
class Corpus:
    """All images of some datasets.

    images: uint8 [N, 4, H, W], RGBA; or, of files, what gives uint8 [B, 3, side, side].
    table: a row an image: `dataset`, `split`, `label` (a class name), `group`.
    texts: the distinct captions; `caption_ids[caption_starts[i]:caption_starts[i + 1]]` are image
        i's captions as positions in `texts`.
    datasets: the manifests by name; classes: each dataset's class names in label order.
    hashes: dataset -> sha256 of its pixels and table; of files, of their names, sizes and texts.
    """

    images: Tensor | Files
    table: pd.DataFrame
    texts: list[str]
    caption_ids: np.ndarray
    caption_starts: np.ndarray
    datasets: dict[str, Dataset | FileSet]
    classes: dict[str, list[str]]
    hashes: dict[str, str]

    @property
    def in_files(self) -> bool:
        """Whether images are decoded when they are asked for."""
        return isinstance(self.images, Files)

    def check_side(self, side: int, model: str) -> None:
        """`CmpError` if the images are of one size, and that is another than the model takes."""
        if not self.in_files and side not in self.images.shape[2:]:
            raise CmpError(
                f"model.name: {model!r} takes images of {side} pixels, the data have "
                f"{self.images.shape[-1]}"
            )

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


def of(config: RunConfig) -> Corpus:
    """What a run of this config sees: `config.data`."""
    return named(config.data)


def named(source: str) -> Corpus:
    """A collection by name or path, see `filesets.folders`; read once, until a manifest changes.

    `CmpError` if anything of it cannot be used, see `collection.load`.
    """
    if source == "embedded":
        return load()
    found = [path for places in folders(source) for path in sorted(places[0].glob("*.yaml"))]
    return _collected(source, tuple((path, path.stat().st_mtime_ns) for path in found))


@functools.lru_cache(maxsize=4)
def _collected(source: str, manifests: tuple[tuple[Path, int], ...]) -> Corpus:
    indexes, beside = collection.load(source)
    return from_files(indexes, beside)


def from_files(indexes: list[Index], beside: bool = False) -> Corpus:
    """A corpus of image files; beside: with the embedded pool and retention sets, and then with
    all images in memory, as those are."""
    tables = [collection.table(each) for each in indexes]
    about = [(each.dataset, each.classes, each.data_hash()) for each in indexes]
    if not beside:
        return _joined(files(indexes), tables, about)
    mine = {each.dataset.name for each in indexes}
    others = [d for d in embedded().values() if not d.optional and d.role != "adapt"]
    if both := mine & {dataset.name for dataset in others}:
        raise CmpError(f"{min(both)}: name: an embedded dataset is called so, too; rename this one")
    stored = [packed.read(dataset) for dataset in others]
    tables = [_table(each) for each in stored] + tables
    about = [_about(each) for each in stored] + about
    images = [each.images for each in stored] + [collection.packed(each) for each in indexes]
    return _joined(torch.from_numpy(np.concatenate(images)), tables, about)


def join(chosen: list[packed.Packed]) -> Corpus:
    """Put packed datasets side by side, in the order given."""
    images = torch.from_numpy(np.concatenate([each.images for each in chosen]))
    return _joined(images, [_table(each) for each in chosen], [_about(each) for each in chosen])


def _table(each: packed.Packed) -> pd.DataFrame:
    return each.table.assign(dataset=each.dataset.name)


def _about(each: packed.Packed) -> tuple[Dataset, list[str], str]:
    return each.dataset, each.header.classes, each.data_hash()


def _joined(
    images: Tensor | Files,
    tables: list[pd.DataFrame],
    about: list[tuple[Dataset | FileSet, list[str], str]],
) -> Corpus:
    """images: of all rows of the tables. about: (manifest, classes, hash) of each table."""
    table = pd.concat(tables, ignore_index=True)
    captions = table.pop("captions")
    lengths = captions.map(len).to_numpy()
    ids, texts = pd.factorize(np.concatenate(captions.to_numpy()))
    for column in ("dataset", "split", "label"):
        table[column] = table[column].astype("category")
    names = [dataset.name for dataset, _, _ in about]
    return Corpus(
        images=images,
        table=table[["dataset", "split", "label", "group"]],
        texts=list(texts),
        caption_ids=ids,
        caption_starts=np.concatenate([[0], np.cumsum(lengths)]),
        datasets=dict(zip(names, (dataset for dataset, _, _ in about), strict=True)),
        classes=dict(zip(names, (classes for _, classes, _ in about), strict=True)),
        hashes=dict(zip(names, (digest for _, _, digest in about), strict=True)),
    )
