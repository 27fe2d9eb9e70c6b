"""What a reader returns: a table of images, where their bytes are, and what is wrong with them."""

import hashlib
import json
import re
from bisect import bisect
from dataclasses import dataclass
from typing import Any, NamedTuple, get_args

import numpy as np
import pandas as pd

from cmp.errors import CmpError
from cmp.readers.files import ReadImage, Stamp
from cmp.readers.manifest import SPLIT_SHARES, FileSet, PictureReader, Split
from cmp.seeds import unit_interval

MAX_IMAGE_BYTES = 64 * 2**20
"""Largest size of an image file."""
MAX_KINDS = 8
"""Kinds of faults that are told of a set."""
MEND_FAULTS = "mend them, or say `faults: skip` in its manifest"
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
TRAITS = ("grey16", "colour16", "values32", "transparent", "rotated")
"""What a picture may have that programs see in different ways; bit i of the column `traits` says
whether it has the i-th."""
SPLIT_NAMES = {"train": "train", "training": "train", "test": "test"}
SPLIT_NAMES |= dict.fromkeys(("validation", "val", "valid", "dev"), "validation")
"""Name of a folder or value of a column -> split."""
HALF_CHARACTER = re.compile("[\ud800-\udfff]")
"""What Python makes of bytes in a name that are no text, and of some escapes in JSON."""


class Fault(NamedTuple):
    """Something that cannot be used.

    Attributes:
        kind: What is wrong, such as "missing file".
        where: Name of the image, class or member; "" for what is not named, since it lies outside
            of the manifest's folder and is no picture.
    """

    kind: str
    where: str


@dataclass(frozen=True)
class ImageIndex:
    """The images of a set.

    Attributes:
        dataset: The manifest, its task filled in.
        table: One row per image: `source`, its name; `size` in bytes and `changed`, see
            `files.Stamp`; `split`, and whether it was `given`; `label`; `captions`, a list of
            texts; `update`, "" where none is named; `position`, by which `read` takes it. Once they
            were checked also `digest`, `pixels` and `look`, numbers that equal files, equal pixels
            and similar pictures share, and `traits`, see `TRAITS`.
        read: What returns the file of an image.
        faults: What cannot be used.
        classes: Class names in the order of labels, those without images included.
        target_count: Number of classes that have images, where several share a name.
        content: The sha256 of all images, once they were checked.
    """

    dataset: FileSet
    table: pd.DataFrame
    read: ReadImage
    faults: list[Fault]
    classes: list[str]
    target_count: int | None = None
    content: str = ""

    def data_hash(self, *more: str) -> str:
        """Return a sha256 of what decides a result.

        That is role, task, prompt, classes, how pictures are seen where that is not as usual, the
        content of the images once they were checked, and each one's name, size, split, label,
        captions and update. No pixels are read here.

        Args:
            *more: Further columns of the table that count.
        """
        about = [self.dataset.role, self.dataset.task, self.dataset.prompt, self.classes]
        keys = {*PictureReader.model_fields}
        if unusual := self.dataset.reader.model_dump(include=keys, exclude_defaults=True):
            about.append(unusual)
        digest = hashlib.sha256(json.dumps([*about, self.content]).encode())
        names = ["source", "size", "split", "label", "captions", *more]
        if (self.table["update"] != "").any():  # sets of other streams keep their hash
            names.append("update")
        for row in zip(*(self.table[name].tolist() for name in names), strict=True):
            digest.update(json.dumps(row).encode() + b"\n")
        return digest.hexdigest()

    def noted(self) -> dict[str, Any]:
        """Return how many pictures have each of `TRAITS`, and how the manifest says to see them.

        Returns:
            Counts by trait and the keys of `manifest.PictureReader`; nothing where no picture has
            any trait, or none was checked.
        """
        traits = self.table["traits"].to_numpy() if "traits" in self.table else np.zeros(0, int)
        counts = {name: int((traits >> i & 1).sum()) for i, name in enumerate(TRAITS)}
        found = {name: count for name, count in counts.items() if count}
        keys = {*PictureReader.model_fields}
        return found and found | self.dataset.reader.model_dump(include=keys)

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
    counts = table["split"].value_counts().reindex(get_args(Split), fill_value=0)
    return {"classes": int(table["label"].nunique()), **counts.to_dict()}


class Row(NamedTuple):
    """One image that a reader found.

    Attributes:
        source: Name of the image.
        stamp: What is known of its file.
        split: Split as the files name it, "" where they do not.
        label: Class name, None where files have none, "" where it is empty.
        captions: What was found as caption, None where nothing was.
        update: The update that the image arrives in, "" where none is named.
    """

    source: str
    stamp: Stamp
    split: str
    label: str | None
    captions: object
    update: str = ""


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
    labelled = any(row.label is not None for row in rows)
    shares = dataset.splits or SPLIT_SHARES[dataset.role]
    names, ends = list(shares), np.cumsum(list(shares.values())).tolist()[:-1]
    faults, kept = list(faults), []
    for position, (source, (size, changed, _), split, label, captions, update) in enumerate(rows):
        texts = [dataset.prompt.format(label)] if captions is None else _caption_texts(captions)
        if kind := _row_fault(rows[position], texts, labelled):
            faults.append(Fault(kind, source))
            continue
        given = SPLIT_NAMES.get(split.lower())
        split = given or names[bisect(ends, unit_interval("split", source))]
        if split in SPLIT_SHARES[dataset.role]:
            label = label or dataset.name
            update = update or dataset.update or ""
            kept.append((source, size, changed, split, bool(given), label, texts, update, position))
    columns = ["source", "size", "changed", "split", "given", "label", "captions", "update"]
    columns.append("position")
    table = pd.DataFrame(kept, columns=columns)
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
    if row.stamp.size <= 0:
        return row.stamp.problem or "empty file"
    if row.stamp.size > MAX_IMAGE_BYTES:
        return "file is too large"
    if HALF_CHARACTER.search("".join((row.source, row.label or "", *(texts or ())))):
        return "name is not UTF-8"
    if row.split and row.split.lower() not in SPLIT_NAMES:
        return f"split {row.split:.40} is not known"
    if labelled and not row.label:
        return "label is missing"
    if row.captions is None and not row.label:
        return "caption is missing"
    if texts is None:
        return "caption is empty" if isinstance(row.captions, str | list) else "caption is no text"
    return ""


def summarise_faults(faults: list[Fault]) -> str:
    """Return one line with the faults by kind, the first three of each by name.

    Args:
        faults: The faults.
    """
    parts, kinds = [], list(dict.fromkeys(fault.kind for fault in faults))
    for kind in kinds[:MAX_KINDS]:
        found = [fault.where for fault in faults if fault.kind == kind]
        names = [name for name in found if name]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        words = f"{len(found)}, not named, as they lie outside of the manifest's folder"
        parts.append(f"{kind}: {', '.join(names[:3]) or words}{more}")
    text = "; ".join(parts) + "; ..." * (len(kinds) > MAX_KINDS)
    return text.encode(errors="replace").decode()


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
            f"{dataset.name}: {len(faults)} faults ({summarise_faults(faults)}); {MEND_FAULTS}"
        )
