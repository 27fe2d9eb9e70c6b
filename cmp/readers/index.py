"""The result of a reader: a table of images, a function that reads them, and faults."""

import hashlib
import json
import re
from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import pandas as pd

from cmp.errors import clean_text
from cmp.readers.files import ReadImage, Stamp
from cmp.readers.manifest import SPLIT_SHARES, FileSet, PictureReader, Split
from cmp.seeds import unit_interval

MAX_IMAGE_BYTES = 64 * 2**20
"""Largest size of an image file in bytes."""
MAX_TEXT = 2**16
"""Most characters of a caption or a label."""
MAX_KINDS = 8
"""Most kinds of faults that are reported for a dataset."""
MEND_FAULTS = "fix them, or set `faults: skip` in its manifest"
IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"
)  # fmt: skip
NO_IMAGE_NAME = "not an image file name"
TRAITS = ("grey16", "colour16", "values32", "transparent", "rotated", "palette", "colours")
"""Traits of images that programs read differently. Bit i of the column `traits` says whether an
image has the i-th."""
SPLIT_NAMES = {"train": "train", "training": "train", "test": "test"}
SPLIT_NAMES |= dict.fromkeys(("validation", "val", "valid", "dev"), "validation")
"""Name of a folder or value of a column -> split."""
HALF_CHARACTER = re.compile("[\ud800-\udfff]")
"""Surrogates, which Python uses for undecodable bytes in a name and for some escapes in JSON."""


class Fault(NamedTuple):
    """Something that cannot be used.

    Attributes:
        kind: What is wrong, such as "missing file".
        where: The name of the image, class or member, or "" for files outside the manifest's folder
            that are not images, which are not named.
    """

    kind: str
    where: str


@dataclass(frozen=True)
class ImageIndex:
    """The images of a dataset.

    Attributes:
        dataset: The manifest, with its task filled in.
        table: One row per image: `source`, its name; `size` in bytes and `changed`, see
            `files.Stamp`; `split`, and whether it was `given`; `label`; `captions`, a list of
            texts; `update`, or ""; `position`, the argument of `read`. After checking, also
            `digest`, `pixels` and `look`, numbers that identify equal files, equal pixels and
            similar images, and `traits`, see `TRAITS`.
        read: Returns the file of an image.
        faults: What cannot be used.
        classes: The class names in the order of labels, including those without images.
        target_count: The number of classes with images, if several share a name.
        content: The sha256 of all images, after checking.
        joined: The number of images with several rows in a table, whose captions were joined.
    """

    dataset: FileSet
    table: pd.DataFrame
    read: ReadImage
    faults: list[Fault]
    classes: list[str]
    target_count: int | None = None
    content: str = ""
    joined: int = 0

    def data_hash(self, *more: str) -> str:
        """Return a sha256 of everything that affects a result.

        This includes role, task, prompt, classes, how images are read if not by default, the
        content of the images after checking, and the name, size, split, label, captions and update
        of each. No pixels are read here.

        Args:
            *more: Further columns of the table to include.
        """
        about = [self.dataset.role, self.dataset.task, self.dataset.prompt, self.classes]
        keys = {*PictureReader.model_fields}
        if unusual := self.dataset.reader.model_dump(include=keys, exclude_defaults=True):
            about.append(unusual)
        digest = hashlib.sha256(json.dumps([*about, self.content]).encode())
        names = ["source", "size", "split", "label", "captions", *more]
        if (self.table["update"] != "").any():  # datasets without updates keep their hash
            names.append("update")
        for row in zip(*(self.table[name].tolist() for name in names), strict=True):
            digest.update(json.dumps(row).encode() + b"\n")
        return digest.hexdigest()

    def noted(self) -> dict[str, Any]:
        """Return how many images have each of `TRAITS`, and how the manifest says to read them.

        Returns:
            Counts by trait and the keys of `manifest.PictureReader`; empty if no image has a trait
            or was checked.
        """
        traits = self.table["traits"].to_numpy() if "traits" in self.table else np.zeros(0, int)
        counts = {name: int((traits >> i & 1).sum()) for i, name in enumerate(TRAITS)}
        found = {name: count for name, count in counts.items() if count}
        keys = {*PictureReader.model_fields}
        return found and found | self.dataset.reader.model_dump(include=keys)

    def counts(self) -> dict[str, int]:
        """Return the numbers of classes and of images per split, with the keys of
        `manifest.Counts`."""
        counts = count_images(self.table)
        return counts | {"classes": self.target_count or counts["classes"]}


def count_images(table: pd.DataFrame) -> dict[str, int]:
    """Count classes, and images per split.

    Args:
        table: One row per image, with the columns `split` and `label`.

    Returns:
        Counts with the keys of `manifest.Counts`.
    """
    counts = table["split"].value_counts().reindex(get_args(Split), fill_value=0)
    return {"classes": int(table["label"].nunique()), **counts.to_dict()}


class Row(NamedTuple):
    """One image that a reader found.

    Attributes:
        source: The name of the image.
        stamp: What is known about its file.
        split: The split named by the files, or "".
        label: The class name; None if there is none, and "" if it is empty.
        captions: What was found as a caption, or None.
        update: The update in which the image arrives, or "".
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
    """Build an index from what a reader found.

    A missing split is chosen by a hash of the image's name, so that it does not change when other
    images are added or removed. An image inside a table is named by its row over all files, so its
    split stays only if further rows come after all others. Images of splits that the role does not
    use are left out.

    Args:
        dataset: The manifest.
        rows: All images, in the order of their positions.
        read: Returns the file of an image.
        faults: What the reader could not use.

    Returns:
        The index, with sorted class names and with the faults of the rows added.
    """
    labelled = any(row.label is not None for row in rows)
    faults, kept = list(faults), []
    for position, (source, (size, changed, _), split, label, captions, update) in enumerate(rows):
        texts = [dataset.prompt.format(label)] if captions is None else _caption_texts(captions)
        if kind := _row_fault(rows[position], texts, labelled):
            faults.append(Fault(kind, source))
            continue
        given = SPLIT_NAMES.get(split.lower())
        split = given or draw_split(dataset, source)
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


def draw_split(dataset: FileSet, name: str) -> str:
    """Return the split of an image that no file gives, by a hash of a name of the image."""
    shares = dataset.splits or SPLIT_SHARES[dataset.role]
    ends = np.cumsum(list(shares.values())).tolist()[:-1]
    return list(shares)[bisect(ends, unit_interval("split", name))]


def _caption_texts(captions: object) -> list[str] | None:
    """Return a caption or a list of captions as a list of texts, or None if it is empty or
    something else."""
    texts = list(captions) if isinstance(captions, list | tuple | np.ndarray) else [captions]
    good = bool(texts) and all(isinstance(text, str) and text.strip() for text in texts)
    return texts if good else None


def _row_fault(row: Row, texts: list[str] | None, labelled: bool) -> str:
    """Return an image's fault, or ""; `labelled` says whether other images of the dataset have
    labels."""
    if row.stamp.size <= 0:
        return row.stamp.problem or "empty file"
    if row.stamp.size > MAX_IMAGE_BYTES:
        return "file is too large"
    words = row.label or "", *(texts or ())
    if max(map(len, words)) > MAX_TEXT:
        return f"caption or label of more than {MAX_TEXT:,} characters"
    if HALF_CHARACTER.search("".join((row.source, *words))):
        return "name is not UTF-8"
    if row.split and row.split.lower() not in SPLIT_NAMES:
        return f"unknown split {row.split:.40}"
    if labelled and not row.label:
        return "label is missing"
    if row.captions is None and not row.label:
        return "caption is missing"
    if texts is None:
        return "caption is empty" if isinstance(row.captions, str | list) else "caption is not text"
    return ""


def named_splits(names: Sequence[str]) -> list[str]:
    """Return those of some names of folders or files that are splits', and "" for each other one.

    If they name fewer than two splits, none counts: a single one is a class, such as trains, or
    there is nothing to keep apart.
    """
    known = [SPLIT_NAMES.get(name.lower(), "") for name in names]
    return known if len({*known} - {""}) > 1 else [""] * len(known)


def file_splits(files: Sequence[Path], root: Path) -> list[str]:
    """Return the splits of files with several images: that of its folder below the root, as
    `train/0.tar`, or that with which its name begins, as `test-00000.parquet`; or "" for none."""
    starts = named_splits([re.split("[^A-Za-z]", path.name, maxsplit=1)[0] for path in files])
    tops = ["" if path.parent == root else path.parent.name for path in files]
    return [SPLIT_NAMES.get(top.lower(), start) for top, start in zip(tops, starts, strict=True)]


def summarise_faults(faults: list[Fault]) -> str:
    """Return a line that lists faults by kind, naming the first three of each."""
    parts, kinds = [], list(dict.fromkeys(fault.kind for fault in faults))
    for kind in kinds[:MAX_KINDS]:
        found = [fault.where for fault in faults if fault.kind == kind]
        names = [name for name in found if name]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        unnamed = f"{len(found)}, not named, as they are outside the manifest's folder"
        parts.append(f"{kind}: {', '.join(names[:3]) or unnamed}{more}")
    if len(kinds) > MAX_KINDS:
        parts.append("...")
    return clean_text("; ".join(parts)).encode(errors="replace").decode()
