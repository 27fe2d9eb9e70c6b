"""What a reader returns: a table of images, where their bytes are, and what is wrong with them."""

import hashlib
import json
import os
from bisect import bisect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, get_args

import numpy as np
import pandas as pd

from cmp.errors import CmpError
from cmp.readers.manifest import SPLIT_SHARES, FileSet, Split
from cmp.seeds import unit_interval

MAX_IMAGE_BYTES = 64 * 2**20
"""Largest size of an image file."""
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
SPLIT_NAMES = {"train": "train", "training": "train", "test": "test"}
SPLIT_NAMES |= dict.fromkeys(("validation", "val", "valid", "dev"), "validation")
"""Name of a folder or value of a column -> split."""


ReadImage = Callable[[int], bytes]
"""Returns the file of an image by its position among those that a reader found, or raises `OSError`
or `ValueError`. Other processes must be able to have it, so it is no function inside another."""


def read_file(root: Path, names: list[str], position: int) -> bytes:
    """Return one of some files.

    Args:
        root: The folder that relative paths start from.
        names: Paths of the images.
        position: Which one.
    """
    return (root / names[position]).read_bytes()


def read_span(files: list[Path], spans: np.ndarray, position: int) -> bytes:
    """Return one of the images that lie uncompressed inside larger files, such as tars.

    Args:
        files: The larger files.
        spans: int64 [N, 3], of each image the number of its file, its offset and size in bytes.
        position: Which one.
    """
    number, offset, size = map(int, spans[position])
    with files[number].open("rb", buffering=0) as file:
        return os.pread(file.fileno(), size, offset)


class Fault(NamedTuple):
    """Something that cannot be used.

    Attributes:
        kind: What is wrong, such as "missing file".
        where: Name of the image, class or member.
    """

    kind: str
    where: str


@dataclass(frozen=True)
class ImageIndex:
    """The images of a set.

    Attributes:
        dataset: The manifest, its task filled in.
        table: One row per image: `source`, its name; `size` in bytes; `split`; `label`;
            `captions`, a list of texts; `position`, by which `read` takes it.
        read: What returns the file of an image.
        faults: What cannot be used.
        classes: Class names in the order of labels, those without images included.
        target_count: Number of classes that have images, where several share a name.
    """

    dataset: FileSet
    table: pd.DataFrame
    read: ReadImage
    faults: list[Fault]
    classes: list[str]
    target_count: int | None = None

    def data_hash(self) -> str:
        """Return a sha256 of what decides a result.

        That is role, task, prompt, classes, and each image's name, size, split, label and captions.
        No pixels are read.
        """
        about = [self.dataset.role, self.dataset.task, self.dataset.prompt, self.classes]
        digest = hashlib.sha256(json.dumps(about).encode())
        columns = [self.table[name] for name in ("source", "size", "split", "label", "captions")]
        for row in zip(*columns, strict=True):
            digest.update(json.dumps(row).encode() + b"\n")
        return digest.hexdigest()

    def counts(self) -> dict[str, int]:
        """Return the numbers of classes and of images per split, keyed as `manifest.Counts`."""
        counts = count_images(self.table)
        return counts | {"classes": self.target_count or counts["classes"]}


def count_images(table: pd.DataFrame) -> dict[str, int]:
    """Count classes, and images per split.

    Args:
        table: One row per image, with the columns `split` and `label`.

    Returns:
        Counts keyed as `manifest.Counts`.
    """
    splits = table["split"].value_counts()
    counts = {split: int(splits.get(split, 0)) for split in get_args(Split)}
    return {"classes": int(table["label"].nunique()), **counts}


class Row(NamedTuple):
    """One image that a reader found.

    Attributes:
        source: Name of the image.
        size: Size in bytes, -1 where there is no file.
        split: Split as the files name it, "" where they do not.
        label: Class name, "" where there is none.
        captions: What was found as caption, None where nothing was.
    """

    source: str
    size: int
    split: str
    label: str
    captions: object


def build_index(
    dataset: FileSet, rows: list[Row], read: ReadImage, faults: list[Fault]
) -> ImageIndex:
    """Make the index of what a reader found.

    A missing split is filled in by a hash of the image's name, so that it stays the same when other
    images come or go. Images of splits that the role does not use are left out.

    Args:
        dataset: The manifest.
        rows: All images, in the order of their positions.
        read: What returns the file of an image.
        faults: What the reader could not use.

    Returns:
        The index, with sorted class names, and with the faults of the rows added.
    """
    labelled = any(row.label for row in rows if 0 < row.size <= MAX_IMAGE_BYTES)
    shares = dataset.splits or SPLIT_SHARES[dataset.role]
    names, ends = list(shares), np.cumsum(list(shares.values())).tolist()[:-1]
    faults, kept = list(faults), []
    for position, (source, size, split, label, captions) in enumerate(rows):
        texts = [dataset.prompt.format(label)] if captions is None else _caption_texts(captions)
        if kind := _row_fault(rows[position], texts, labelled):
            faults.append(Fault(kind, source))
            continue
        split = SPLIT_NAMES.get(split.lower())
        split = split or names[bisect(ends, unit_interval("split", source))]
        if split in SPLIT_SHARES[dataset.role]:
            kept.append((source, size, split, label or dataset.name, texts, position))
    table = pd.DataFrame(kept, columns=[*Row._fields, "position"])
    task = dataset.task or ("classification" if labelled else "retrieval")
    dataset = dataset.model_copy(update={"task": task})
    return ImageIndex(dataset, table, read, faults, sorted(table["label"].unique()))


def _caption_texts(captions: object) -> list[str] | None:
    """A caption or a list of them as a list of texts; None if it is empty or anything else."""
    texts = list(captions) if isinstance(captions, list | tuple | np.ndarray) else [captions]
    good = bool(texts) and all(isinstance(text, str) and text.strip() for text in texts)
    return texts if good else None


def _row_fault(row: Row, texts: list[str] | None, labelled: bool) -> str:
    """What is wrong with an image, or ""; `labelled`: other images of the set have labels."""
    if row.size <= 0:
        return "empty file" if row.size == 0 else "missing file"
    if row.size > MAX_IMAGE_BYTES:
        return "file is too large"
    if labelled and not row.label:
        return "label is missing"
    if row.captions is None and not row.label:
        return "caption is missing"
    if texts is None:
        return "caption is empty" if isinstance(row.captions, str | list) else "caption is no text"
    return ""


def summarise_faults(faults: list[Fault]) -> str:
    """Return one line with the number of faults of each kind, and the first three by name.

    Args:
        faults: The faults.
    """
    parts = []
    for kind in dict.fromkeys(fault.kind for fault in faults):
        names = [fault.where for fault in faults if fault.kind == kind]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        parts.append(f"{kind}: {', '.join(names[:3])}{more}")
    return "; ".join(parts)


def refuse_faults(dataset: FileSet, faults: list[Fault]) -> None:
    """Refuse a set that has faults, unless its manifest says to skip them.

    Args:
        dataset: The manifest.
        faults: What cannot be used.

    Raises:
        CmpError: If there are faults; names the first of each kind.
    """
    if faults and dataset.faults == "refuse":
        raise CmpError(
            f"{dataset.name}: {len(faults)} faults ({summarise_faults(faults)}); mend them, or say "
            "`faults: skip` in its manifest"
        )
