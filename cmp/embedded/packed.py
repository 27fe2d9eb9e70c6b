"""Write and read packed datasets: memory-mapped images and a table, written atomically."""

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from tokenize import TokenError
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from pydantic.dataclasses import dataclass as checked_dataclass

from cmp.data import IMAGE_SIZE, Corpus, build_corpus
from cmp.embedded import manifest
from cmp.errors import CmpError, explain_errors
from cmp.files import atomic_folder, file_digest
from cmp.parsing import parse_record, read_table
from cmp.readers.index import count_images
from cmp.seeds import unit_interval
from cmp.values import STRICT

SAMPLE_COLUMNS = {"split": str, "label": str, "group": str, "source": str, "captions": list}
"""Column of a dataset's table -> type. `group` is what an image shows (an emoji's codepoint, shared
by all its drawings), used to cluster standard errors. `source` identifies an image in its package.
Training draws from the texts in `captions`."""
FRESH_SHARE = 0.2
"""Fraction of the pool that no base was trained on."""


Samples = tuple[Sequence[np.ndarray] | np.ndarray, list[tuple]]
"""The result of a recipe: images, each uint8 [4, 32, 32], RGBA with straight alpha; and in the same
order, tuples with the values of `SAMPLE_COLUMNS`."""


@checked_dataclass(frozen=True, config=STRICT)
class StoreHeader:
    """The content of `store.json`, which describes the files beside it.

    Attributes:
        format: The version of the layout, `STORE_FORMAT`.
        fingerprint: What the store was made from, see `manifest.store_fingerprint`.
        images_sha256: The hex digest of the pixels.
        table_sha256: The hex digest of the table's content, which is part of run ids and computed
            again at each start.
        classes: The class names in the order of labels.
        file_sha256: The hex digest of the table's file. A file with another digest is not parsed,
            since damage can crash the process.
    """

    format: int
    fingerprint: str
    images_sha256: str
    table_sha256: str
    classes: list[str]
    file_sha256: str


class PackedDataset(NamedTuple):
    """An opened dataset.

    Attributes:
        dataset: The manifest.
        header: The content of `store.json`.
        images: uint8 [N, 4, 32, 32], memory-mapped.
        table: One row per image, see `SAMPLE_COLUMNS`.
    """

    dataset: manifest.Dataset
    header: StoreHeader
    images: np.ndarray
    table: pd.DataFrame

    def data_hash(self) -> str:
        """Return a sha256 that covers the pixels and the table."""
        content = self.header.images_sha256 + self.header.table_sha256
        return hashlib.sha256(content.encode()).hexdigest()


@functools.cache
def load_embedded() -> Corpus:
    """Return the embedded benchmark.

    Raises:
        CmpError: A dataset is not built, or damaged.
    """
    return join_packed([read_packed(dataset) for dataset in manifest.embedded_manifests().values()])


def join_packed(datasets: list[PackedDataset]) -> Corpus:
    """Join packed datasets into a corpus.

    Args:
        datasets: The datasets, in the order of the corpus.
    """
    return build_corpus(
        torch.from_numpy(np.concatenate([packed.images for packed in datasets])),
        [
            packed.table.assign(dataset=packed.dataset.name, split=splits_of(packed))
            for packed in datasets
        ],
        [(packed.dataset, packed.header.classes, packed.data_hash()) for packed in datasets],
    )


def splits_of(packed: PackedDataset) -> pd.Series:
    """Return each image's split. A fifth of the pool is "fresh": no base was trained on it, so it
    can be replayed as additional data of the same kind."""
    name, split = packed.dataset.name, packed.table["split"]
    if packed.dataset.role != "pool":
        return split
    fresh = [unit_interval("fresh", name, place) < FRESH_SHARE for place in range(len(split))]
    return split.mask(fresh, "fresh")


def write_packed(dataset: manifest.Dataset, samples: Samples) -> None:
    """Write a dataset to disk atomically.

    Args:
        dataset: The manifest.
        samples: The result of its recipe.

    Raises:
        CmpError: The counts are not the manifest's, or writing fails.
    """
    images = np.ascontiguousarray(samples[0])
    table = pd.DataFrame(samples[1], columns=list(SAMPLE_COLUMNS))
    counts, expected = count_images(table), dataset.counts.model_dump()
    if counts != expected:
        raise CmpError(
            f"{dataset.name}.yaml: counts: the recipe gives {counts}, but the manifest says "
            f"{expected}"
        )
    with atomic_folder(manifest.store_path(dataset.name)) as folder:
        np.save(folder / "images.npy", images)
        table.to_parquet(folder / "samples.parquet", index=False)
        header = StoreHeader(
            format=manifest.STORE_FORMAT,
            fingerprint=manifest.store_fingerprint(dataset),
            images_sha256=hashlib.sha256(images).hexdigest(),
            table_sha256=_table_digest(table),
            classes=sorted(table["label"].unique()),
            file_sha256=file_digest(folder / "samples.parquet"),
        )
        (folder / "store.json").write_text(json.dumps(asdict(header), indent=1))


def _table_digest(table: pd.DataFrame) -> str:
    return hashlib.sha256(table.to_json().encode()).hexdigest()


def is_intact(dataset: manifest.Dataset) -> bool:
    """Return whether a dataset is built and can be read, checking every byte of the images.

    Args:
        dataset: The manifest.
    """
    try:
        return bool(read_packed(dataset))
    except CmpError:
        return False


def read_packed(dataset: manifest.Dataset) -> PackedDataset:
    """Open a packed dataset.

    Raises:
        CmpError: It is missing, made from another manifest, incomplete or damaged.
    """
    folder, remedy = manifest.store_path(dataset.name), f"run `cmpt data build {dataset.name}`"
    if not manifest.is_built(dataset):
        raise CmpError(
            f"{folder}: the dataset {dataset.name!r} is not built, or was built from another "
            "manifest; in a clone of the study book, run `cmpt data build`, or `cmpt data build "
            f"{dataset.name}` for this dataset only; if it is built elsewhere, set CMP_BUILD to "
            "that `_build` folder"
        )
    errors = (TypeError, OverflowError, TokenError)
    with explain_errors(f"{folder}: cannot be read", f"; {remedy}", *errors):
        header = parse_record((folder / "store.json").read_text(), StoreHeader)
        if header.file_sha256 != file_digest(folder / "samples.parquet"):
            raise ValueError("samples.parquet is damaged")
        images = np.lib.format.open_memmap(folder / "images.npy", mode="r")  # never unpickles
        table = read_table(folder / "samples.parquet", SAMPLE_COLUMNS)
    if images.shape != (len(table), 4, IMAGE_SIZE, IMAGE_SIZE) or images.dtype != np.uint8:
        raise CmpError(f"{folder}: images.npy and samples.parquet do not match; {remedy}")
    for name, content, written in (
        ("images.npy", hashlib.sha256(images).hexdigest(), header.images_sha256),
        ("samples.parquet", _table_digest(table), header.table_sha256),
        ("store.json", sorted(table["label"].unique()), header.classes),
    ):
        if content != written:
            raise CmpError(f"{folder}: {name} is damaged; {remedy}")
    return PackedDataset(dataset, header, images, table)
