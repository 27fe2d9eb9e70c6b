"""What a reader returns: a table of images, where their bytes are, and what is wrong with them."""

import hashlib
import json
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import pandas as pd

from cmp.errors import CmpError
from cmp.readers.manifest import FileSet
from cmp.seeds import unit_interval

MAX_IMAGE_BYTES = 64 * 2**20
"""Bytes of an image file."""
SPLIT_NAMES = {"train": "train", "training": "train", "validation": "validation", "val": "validation",
          "valid": "validation", "dev": "validation", "test": "test"}  # fmt: skip
"""Names of splits in folders and columns."""


class ImageStore(Protocol):
    """Where the bytes of images are."""

    def read(self, place: int) -> bytes:
        """The file of one image; `OSError` or `ValueError` if it cannot be had."""


@dataclass(frozen=True)
class FileStore:
    """Images that are files. names: paths, relative to `root` unless absolute."""

    root: Path
    names: list[str]

    def read(self, place: int) -> bytes:
        """See `Store`."""
        path = self.root / self.names[place]
        with path.open("rb") as file:
            content = file.read(MAX_IMAGE_BYTES + 1)
        if len(content) > MAX_IMAGE_BYTES:
            raise ValueError(f"larger than {MAX_IMAGE_BYTES} bytes")
        return content


@dataclass(frozen=True)
class SpanStore:
    """Images that lie uncompressed within other files, such as tars: `size` bytes at `offset`."""

    files: list[Path]
    file: np.ndarray
    offset: np.ndarray
    size: np.ndarray

    def read(self, place: int) -> bytes:
        """See `Store`."""
        with self.files[self.file[place]].open("rb", buffering=0) as file:
            return os.pread(file.fileno(), int(self.size[place]), int(self.offset[place]))


@dataclass(frozen=True)
class MemoryStore:
    """Images whose files are in memory."""

    contents: list[bytes]

    def read(self, place: int) -> bytes:
        """See `Store`."""
        return self.contents[place]


@dataclass(frozen=True)
class Fault:
    """Something that cannot be used: its kind, such as "missing file", and which it is."""

    kind: str
    where: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.where}"


@dataclass(frozen=True)
class ImageIndex:
    """The images of a set.

    table: a row an image: `source`, its name; `size` in bytes; `split`, `label`; `captions`, a list
    of texts; `place`, its number in `store`. classes: all names in the order of labels, also those
    without images. targets: how many classes have images, where names stand for several.
    """

    dataset: FileSet
    table: pd.DataFrame
    store: ImageStore
    faults: list[Fault]
    classes: list[str]
    targets: int | None = None

    def data_hash(self) -> str:
        """sha256 of what decides a result: role, task, prompt, classes, and the table: name, size,
        split, label and captions of every image. Pixels are not read."""
        about = [self.dataset.role, self.dataset.task, self.dataset.prompt, self.classes]
        found = hashlib.sha256(json.dumps(about).encode())
        columns = [self.table[name] for name in ("source", "size", "split", "label", "captions")]
        for row in zip(*columns, strict=True):
            found.update(json.dumps(row).encode() + b"\n")
        return found.hexdigest()

    def counts(self) -> dict[str, int]:
        """Images a split, and classes, in the form of a manifest's `counts`."""
        splits = self.table["split"].value_counts()
        found = {"classes": self.targets or int(self.table["label"].nunique())}
        return found | {each: int(splits.get(each, 0)) for each in ("train", "validation", "test")}


@dataclass
class RowCollector:
    """What a reader has found so far: lists of equal length. split, label: "" if nothing tells;
    captions: None if there is none, else anything that was found in its place."""

    source: list[str] = field(default_factory=list)
    size: list[int] = field(default_factory=list)
    split: list[str] = field(default_factory=list)
    label: list[str] = field(default_factory=list)
    captions: list[object] = field(default_factory=list)

    def add(self, source: str, size: int, split: str, label: str, captions: object) -> None:
        """One image more."""
        values = (source, size, split, label, captions)
        for column, value in zip(vars(self).values(), values, strict=True):
            column.append(value)


def caption_list(value: object) -> list[str] | None:
    """A caption or a list of them as a list of texts; None if it is anything else, or empty."""
    found = list(value) if isinstance(value, list | tuple | np.ndarray) else [value]
    good = bool(found) and all(isinstance(text, str) and text.strip() for text in found)
    return found if good else None


def build_index(
    dataset: FileSet,
    rows: RowCollector,
    store: ImageStore,
    faults: list[Fault],
    classes: list[str] | None = None,
) -> ImageIndex:
    """The index of what a reader found: captions checked, splits filled in by the hash of the
    image's name, images of splits that the role does not use left out. size: -1 where there is no
    file; 0 where it is empty."""
    table = pd.DataFrame(vars(rows) | {"captions": pd.Series(rows.captions, dtype=object)})
    table["size"] = table["size"].astype("int64")
    table["place"] = np.arange(len(table))
    faults = list(faults)
    for kind, bad in (("missing file", table["size"] < 0), ("empty file", table["size"] == 0),
                      ("file is too large", table["size"] > MAX_IMAGE_BYTES)):  # fmt: skip
        faults += [Fault(kind, source) for source in table.loc[bad, "source"]]
    table = table[table["size"].between(1, MAX_IMAGE_BYTES)]
    labelled = bool((table["label"] != "").any())
    given = table["captions"].tolist()
    captions, bad = [], np.zeros(len(table), bool)
    for place, (source, label, value) in enumerate(
        zip(table["source"], table["label"], given, strict=True)
    ):
        found = [dataset.prompt.format(label)] if value is None else caption_list(value)
        kind = _row_fault(labelled, label, value, found)
        if kind:
            faults.append(Fault(kind, source))
        bad[place] = bool(kind)
        captions.append(found)
    table["captions"] = pd.Series(captions, index=table.index, dtype=object)
    table = table[~bad]
    table["label"] = table["label"].where(table["label"] != "", dataset.name)
    table["split"] = _assign_splits(dataset, table)
    table = table[table["split"].isin(dataset.allowed())].reset_index(drop=True)
    task = dataset.task or ("classification" if labelled else "retrieval")
    dataset = dataset.model_copy(update={"task": task})
    return ImageIndex(dataset, table, store, faults, classes or sorted(table["label"].unique()))


def _row_fault(labelled: bool, label: str, value: object, found: list[str] | None) -> str:
    """What is wrong with an image's label or caption, of which `found` are the texts; "" if
    nothing is. labelled: whether other images of the set have labels."""
    if labelled and not label:
        return "label is missing"
    if value is None and not label:
        return "caption is missing"
    if found is None:
        return "caption is empty" if isinstance(value, str | list) else "caption is no text"
    return ""


def _assign_splits(dataset: FileSet, table: pd.DataFrame) -> pd.Series:
    """Each image's split: what its files say, else by the hash of its name, which stays the same
    when other images come or go."""
    split = table["split"].map(lambda name: SPLIT_NAMES.get(str(name).lower(), ""))
    untold = split == ""
    if untold.any():
        names = list(dataset.shares())
        ends = np.cumsum(list(dataset.shares().values()))[:-1]
        units = [unit_interval("split", source) for source in table.loc[untold, "source"]]
        places = np.searchsorted(ends, units, side="right")
        split[untold] = [names[place] for place in places]
    return split


def summarise_faults(faults: list[Fault], shown: int = 3) -> str:
    """How many faults of each kind, with the first of them by name."""
    parts = []
    for kind, count in Counter(fault.kind for fault in faults).items():
        named = [fault.where for fault in faults if fault.kind == kind]
        more = f" and {count - shown} more" if count > shown else ""
        parts.append(f"{kind}: {', '.join(named[:shown])}{more}")
    return "; ".join(parts)


def refuse_faults(dataset: FileSet, faults: list[Fault]) -> None:
    """`CmpError` that names the faults, unless the manifest says that they are to be skipped."""
    if faults and dataset.faults == "refuse":
        raise CmpError(
            f"{dataset.name}: {len(faults)} faults ({summarise_faults(faults)}); mend them, or say "
            "`faults: skip` in its manifest"
        )
