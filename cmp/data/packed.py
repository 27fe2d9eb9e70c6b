"""A packed dataset on disk: memory-mapped images and a table, written whole or not at all."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from tokenize import TokenError

import numpy as np
import pandas as pd
from pydantic.dataclasses import dataclass as checked_dataclass

from cmp.config import STRICT
from cmp.data.manifest import Dataset, load_packages
from cmp.data.samples import SIZE, Samples
from cmp.errors import CmpError
from cmp.files import parse_json, parse_record, whole_folder
from cmp.paths import build_folder
from cmp.tables import read_table

FORMAT = 4
"""Bumped when the layout changes, or when a recipe makes other samples from the same manifest."""
SPLITS = ("train", "validation", "test")
COLUMNS = {"split": str, "label": str, "group": str, "source": str, "captions": list}


@checked_dataclass(frozen=True, config=STRICT)
class Header:
    """What `store.json` says of the files beside it."""

    format: int
    fingerprint: str
    images_sha256: str
    table_sha256: str
    classes: list[str]


@dataclass(frozen=True)
class Packed:
    """An opened dataset. images: uint8 [N, 4, 32, 32], memory-mapped; table: a row an image."""

    dataset: Dataset
    header: Header
    images: np.ndarray
    table: pd.DataFrame

    def data_hash(self) -> str:
        """sha256 that stands for the pixels and the table, for provenance."""
        content = self.header.images_sha256 + self.header.table_sha256
        return hashlib.sha256(content.encode()).hexdigest()


def store_path(name: str) -> Path:
    """The folder of a packed dataset."""
    return build_folder() / "data" / name


def fingerprint(dataset: Dataset) -> str:
    """What a store must have been made from to be used for this manifest."""
    return f"{FORMAT}:{dataset.fingerprint(load_packages())}"


def counts(samples: Samples) -> dict[str, int]:
    """Images a split, and classes, in the form of a manifest's `counts`."""
    splits = samples.table["split"].value_counts()
    found = {"classes": int(samples.table["label"].nunique())}
    return found | {split: int(splits.get(split, 0)) for split in SPLITS}


def write(dataset: Dataset, samples: Samples) -> None:
    """Pack `samples` atomically; refuses, with `CmpError`, other counts than the manifest's."""
    if (found := counts(samples)) != (expected := dataset.counts.model_dump()):
        raise CmpError(
            f"{dataset.name}.yaml: counts: the recipe made {found}, the manifest says {expected}"
        )
    with whole_folder(store_path(dataset.name)) as folder:
        images = np.ascontiguousarray(samples.images)
        np.save(folder / "images.npy", images)
        samples.table.to_parquet(folder / "samples.parquet", index=False)
        header = Header(
            format=FORMAT,
            fingerprint=fingerprint(dataset),
            images_sha256=hashlib.sha256(images).hexdigest(),
            table_sha256=hashlib.sha256(samples.table.to_json().encode()).hexdigest(),
            classes=sorted(samples.table["label"].unique()),
        )
        (folder / "store.json").write_text(json.dumps(asdict(header), indent=1))


def is_built(dataset: Dataset) -> bool:
    """Whether a store made from exactly this manifest lies on disk."""
    try:
        content = parse_json((store_path(dataset.name) / "store.json").read_text())
        return content["fingerprint"] == fingerprint(dataset)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def is_intact(dataset: Dataset) -> bool:
    """Whether it can be read, too: every byte of the images is looked at."""
    try:
        return bool(read(dataset))
    except CmpError:
        return False


def read(dataset: Dataset) -> Packed:
    """Open a packed dataset; `CmpError` if it is missing, stale, incomplete or damaged."""
    folder, again = store_path(dataset.name), f"run `cmp data build {dataset.name}`"
    if not is_built(dataset):
        raise CmpError(
            f"{folder}: the dataset {dataset.name!r} is not built, or from another manifest; "
            f"run `cmp data build`, or `cmp data build {dataset.name}` for it alone"
        )
    try:
        header = parse_record((folder / "store.json").read_text(), Header)
        images = np.lib.format.open_memmap(folder / "images.npy", mode="r")  # refuses pickles
        table = read_table(folder / "samples.parquet", COLUMNS)
    except (OSError, ValueError, TypeError, MemoryError, OverflowError, TokenError) as error:
        raise CmpError(f"{folder}: damaged ({error}); {again}") from error
    if images.shape != (len(table), 4, SIZE, SIZE) or images.dtype != np.uint8:
        raise CmpError(f"{folder}: images.npy and samples.parquet disagree; {again}")
    if hashlib.sha256(images).hexdigest() != header.images_sha256:
        raise CmpError(f"{folder}: images.npy is not what was written; {again}")
    return Packed(dataset, header, images, table)
