"""A packed dataset on disk: memory-mapped images and a table, written whole or not at all."""

import functools
import hashlib
import io
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from tokenize import TokenError

import numpy as np
import pandas as pd
import resvg_py
import torch
from PIL import Image
from pydantic.dataclasses import dataclass as checked_dataclass

from cmp.config import STRICT
from cmp.data import IMAGE_SIZE, Corpus, build_corpus
from cmp.embedded.manifest import Dataset, embedded_manifests, load_packages
from cmp.errors import CmpError
from cmp.files import atomic_folder, build_folder, parse_json, parse_record, read_table
from cmp.readers.images import fit_square


@functools.cache
def load_embedded(*roles: str) -> Corpus:
    """The embedded benchmark's datasets of the given roles (all roles where none is named)."""
    chosen = [
        d
        for d in embedded_manifests().values()
        if not d.optional and (not roles or d.role in roles)
    ]
    return join_packed([read_packed(dataset) for dataset in chosen])


SAMPLE_COLUMNS = ["split", "label", "group", "source", "captions"]


@dataclass(frozen=True)
class Samples:
    """Images and their rows, in one order.

    images: uint8 [N, 4, 32, 32], RGBA with straight alpha.
    table: a row an image: `split`; `label`, a class name; `group`, what the image shows (an emoji's
        codepoint, shared by all its drawings), by which standard errors are clustered; `source`,
        the image's identity in its package; `captions`, the texts that training draws from.
    """

    images: np.ndarray
    table: pd.DataFrame


def samples_from_rows(images: list[np.ndarray], rows: list[tuple]) -> Samples:
    """Stack images [4, 32, 32] with rows in the order of `COLUMNS`."""
    return Samples(np.stack(images), pd.DataFrame(rows, columns=SAMPLE_COLUMNS))


STORE_FORMAT = 4
"""Bumped when the layout changes, or when a recipe makes other samples from the same manifest."""
SPLITS = ("train", "validation", "test")
STORE_COLUMNS = {"split": str, "label": str, "group": str, "source": str, "captions": list}


@checked_dataclass(frozen=True, config=STRICT)
class StoreHeader:
    """What `store.json` says of the files beside it."""

    format: int
    fingerprint: str
    images_sha256: str
    table_sha256: str
    classes: list[str]


@dataclass(frozen=True)
class PackedDataset:
    """An opened dataset. images: uint8 [N, 4, 32, 32], memory-mapped; table: a row an image."""

    dataset: Dataset
    header: StoreHeader
    images: np.ndarray
    table: pd.DataFrame

    def data_hash(self) -> str:
        """sha256 that stands for the pixels and the table, for provenance."""
        content = self.header.images_sha256 + self.header.table_sha256
        return hashlib.sha256(content.encode()).hexdigest()


def join_packed(chosen: list[PackedDataset]) -> Corpus:
    """Put packed datasets side by side, in the order given."""
    images = torch.from_numpy(np.concatenate([each.images for each in chosen]))
    return build_corpus(
        images, [_table_of(each) for each in chosen], [_description_of(each) for each in chosen]
    )


def _table_of(each: PackedDataset) -> pd.DataFrame:
    return each.table.assign(dataset=each.dataset.name)


def _description_of(each: PackedDataset) -> tuple[Dataset, list[str], str]:
    return each.dataset, each.header.classes, each.data_hash()


def store_path(name: str) -> Path:
    """The folder of a packed dataset."""
    return build_folder() / "data" / name


def store_fingerprint(dataset: Dataset) -> str:
    """What a store must have been made from to be used for this manifest."""
    return f"{STORE_FORMAT}:{dataset.fingerprint(load_packages())}"


def count_samples(samples: Samples) -> dict[str, int]:
    """Images a split, and classes, in the form of a manifest's `counts`."""
    splits = samples.table["split"].value_counts()
    found = {"classes": int(samples.table["label"].nunique())}
    return found | {split: int(splits.get(split, 0)) for split in SPLITS}


def write_packed(dataset: Dataset, samples: Samples) -> None:
    """Pack `samples` atomically; refuses, with `CmpError`, other counts than the manifest's."""
    if (found := count_samples(samples)) != (expected := dataset.counts.model_dump()):
        raise CmpError(
            f"{dataset.name}.yaml: counts: the recipe made {found}, the manifest says {expected}"
        )
    with atomic_folder(store_path(dataset.name)) as folder:
        images = np.ascontiguousarray(samples.images)
        np.save(folder / "images.npy", images)
        samples.table.to_parquet(folder / "samples.parquet", index=False)
        header = StoreHeader(
            format=STORE_FORMAT,
            fingerprint=store_fingerprint(dataset),
            images_sha256=hashlib.sha256(images).hexdigest(),
            table_sha256=hashlib.sha256(samples.table.to_json().encode()).hexdigest(),
            classes=sorted(samples.table["label"].unique()),
        )
        (folder / "store.json").write_text(json.dumps(asdict(header), indent=1))


def is_built(dataset: Dataset) -> bool:
    """Whether a store made from exactly this manifest lies on disk."""
    try:
        content = parse_json((store_path(dataset.name) / "store.json").read_text())
        return content["fingerprint"] == store_fingerprint(dataset)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def is_intact(dataset: Dataset) -> bool:
    """Whether it can be read, too: every byte of the images is looked at."""
    try:
        return bool(read_packed(dataset))
    except CmpError:
        return False


def read_packed(dataset: Dataset) -> PackedDataset:
    """Open a packed dataset; `CmpError` if it is missing, stale, incomplete or damaged."""
    folder, again = store_path(dataset.name), f"run `cmpt data build {dataset.name}`"
    if not is_built(dataset):
        raise CmpError(
            f"{folder}: the dataset {dataset.name!r} is not built, or from another manifest; "
            f"run `cmpt data build`, or `cmpt data build {dataset.name}` for it alone"
        )
    try:
        header = parse_record((folder / "store.json").read_text(), StoreHeader)
        images = np.lib.format.open_memmap(folder / "images.npy", mode="r")  # refuses pickles
        table = read_table(folder / "samples.parquet", STORE_COLUMNS)
    except (OSError, ValueError, TypeError, MemoryError, OverflowError, TokenError) as error:
        raise CmpError(f"{folder}: damaged ({error}); {again}") from error
    if images.shape != (len(table), 4, IMAGE_SIZE, IMAGE_SIZE) or images.dtype != np.uint8:
        raise CmpError(f"{folder}: images.npy and samples.parquet disagree; {again}")
    if hashlib.sha256(images).hexdigest() != header.images_sha256:
        raise CmpError(f"{folder}: images.npy is not what was written; {again}")
    return PackedDataset(dataset, header, images, table)


RENDER_SIZE = 4 * IMAGE_SIZE
"""Vector drawings are rendered larger and reduced, which keeps thin strokes visible."""


def render_svg(svg: str) -> np.ndarray:
    """Render an SVG document: uint8 [4, 32, 32]."""
    return fit_square(
        Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=RENDER_SIZE))))
    )


def from_grey(grey: np.ndarray) -> np.ndarray:
    """Put opaque grey images, uint8 [N, 28, 28], onto black: uint8 [N, 4, 32, 32]."""
    edge = (IMAGE_SIZE - grey.shape[-1]) // 2
    padded = np.pad(grey, ((0, 0), (edge, edge), (edge, edge)))
    return np.stack([padded, padded, padded, np.full_like(padded, 255)], axis=1)


def is_visible(image: np.ndarray) -> bool:
    """Whether at least 2% of the pixels are drawn: a few sources hold empty icons."""
    return bool((image[3] > 8).mean() >= 0.02)
