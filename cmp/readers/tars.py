"""Read tars of images in the format of webdataset, as streams without unpacking.

The members of a sample are adjacent and share the part of their name before the first dot. A tar is
scanned once, and again when it changes, to find where its images are. Each image is then read from
its offset.
"""

import functools
import hashlib
import itertools
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from cmp.errors import CmpError, explain_errors
from cmp.files import keep_value
from cmp.parsing import parse_json
from cmp.project import build_folder
from cmp.readers.files import Stamp, read_span
from cmp.readers.index import (
    IMAGE_SUFFIXES,
    NO_IMAGE_NAME,
    Fault,
    ImageIndex,
    Row,
    build_index,
    file_splits,
)
from cmp.readers.manifest import FileSet

PICKLE_SUFFIXES = (".pkl", ".pickle", ".pyd", ".pth", ".pt", ".npy", ".npz", ".joblib")
"""Suffixes of files that could run code when other programs decode them."""
TEXT_SUFFIXES = (".txt", ".cls", ".json")
"""Suffixes of texts about an image: its caption, its label, or both as JSON."""
ABOUT_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".md", ".html", ".yaml", ".yml")
"""Suffixes of files about a whole tar."""
MAX_CAPTION_BYTES = 2**20
"""Largest size in bytes of a caption, a label or a JSON member."""
SAMPLES = 5
"""The version of `_read_samples`; what an earlier one cached is read again."""


def unsafe_reason(member: tarfile.TarInfo) -> str | None:
    """Return why a member of a tar must not be read.

    Returns:
        The kind of fault, or None for a safe regular file or folder.
    """
    if member.isdir():
        return None
    if not member.isreg():
        return "member is a link or a device"
    if member.sparse is not None:
        return "member is sparse"
    if member.name.startswith(("/", "\\\\")) or ".." in member.name.split("/"):
        return "member outside the tar"
    if member.name.lower().endswith(PICKLE_SUFFIXES):
        return "member is a pickle"
    return None


def tar_members(path: Path, faults: list[Fault]) -> Iterator[tuple[tarfile.TarInfo, BinaryIO]]:
    """Yield the regular files of a tar.

    Args:
        path: An uncompressed tar, since a compressed one has no random access.
        faults: Members that must not be read are appended here.

    Yields:
        (member, the tar as an open file) pairs, in the order of the tar.

    Raises:
        CmpError: The file is missing, damaged or compressed.
    """
    if not path.is_file():
        raise CmpError(f"{path}: no such tar; pipes and URLs are not supported")
    what = f"{path}: cannot be read as an uncompressed tar"
    remedy = "; images are already compressed, so pack them without compression"
    with (
        explain_errors(what, remedy, tarfile.TarError, EOFError, RecursionError),
        path.open("rb") as file,
        tarfile.open(fileobj=file, mode="r:") as archive,
    ):
        for member in archive:
            archive.members = []  # tarfile keeps all members
            if member.size < 0:  # the next member would be one that was read before
                raise tarfile.ReadError(f"{member.name}: its size is below zero")
            if reason := unsafe_reason(member):
                faults.append(Fault(reason, f"{path.name}: {member.name}"))
            elif member.isreg():
                yield member, file
        _check_end(path, file, archive.offset)


def _check_end(path: Path, file: BinaryIO, place: int) -> None:
    """Raise `CmpError` if a tar has no end where tarfile stopped reading, or more after it.

    For tarfile, a damaged header and the end of the file are ends of a tar, too.
    """
    file.seek(place)
    block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        raise CmpError(
            f"{path}: has no end marker, so it may be truncated; copy it or pack it again"
        )
    if any(block):
        raise CmpError(f"{path}: the header at byte {place} is damaged; copy it or pack it again")
    while block := file.read(2**20):
        if any(block):
            raise CmpError(f"{path}: another tar follows its end; write it to a file of its own")


def member_bytes(member: tarfile.TarInfo, file: BinaryIO) -> bytes:
    """Return the content of a member.

    Args:
        member: The member.
        file: The tar, open.
    """
    file.seek(member.offset_data)
    return file.read(member.size)


def sample_key(name: str) -> str:
    """Return the part of the name that the members of a sample share.

    Args:
        name: A member's name, such as "shard/12.seg.png".

    Returns:
        The name up to the first dot of its last part, such as "shard/12".
    """
    folder, slash, base = name.rpartition("/")
    return f"{folder}{slash}{base.partition('.')[0]}"


def read_tars(dataset: FileSet, root: Path) -> ImageIndex:
    """Index the images of one or more tars.

    Captions come from members `.txt` or the key "caption" of `.json`, and labels from members
    `.cls` or the key "label". Hidden members are skipped. A sample without an image is a fault,
    unless it is about the whole tar, see `ABOUT_SUFFIXES`. Of several images of a sample, such as
    `1.jpg` and its mask `1.seg.png`, the one whose suffix has the fewest dots is used; a sample
    with two of those is a fault. Splits are those of `index.file_splits`.

    Args:
        dataset: A manifest whose reader is a `TarReader`.
        root: The folder that its pattern starts from.

    Returns:
        The index.

    Raises:
        CmpError: No tar matches the pattern, or one cannot be read.
    """
    files = dataset.find_files(root)
    rows, faults, spans, splits = [], [], [], file_splits(files, root)
    for number, path in enumerate(files):
        samples, bad = tar_samples(path)
        faults += [Fault(*fault) for fault in bad]
        changed = path.stat().st_ctime_ns
        for key, offset, size, label, caption in samples:
            rows.append(
                Row(f"{path.name}/{key}", Stamp(size, changed), splits[number], label, caption)
            )
            spans.append((number, offset, size))
    read = functools.partial(read_span, files, np.array(spans, np.int64).reshape(-1, 3))
    return build_index(dataset, rows, read, faults)


def tar_samples(path: Path) -> tuple[list[list[Any]], list[list[str]]]:
    """Return the samples of a tar, cached in the build folder until the tar changes.

    Returns:
        For each sample with an image, [key, offset, size, label, caption], see `read_tars`; for
        each fault, [kind, where].

    Raises:
        CmpError: The tar cannot be read.
    """
    status = path.stat() if path.is_file() else None
    version = [SAMPLES, str(path.resolve()), status and (status.st_size, status.st_ctime_ns)]
    name = hashlib.sha256(json.dumps(version).encode()).hexdigest()
    kept = build_folder() / "checked" / f"tar-{name}.json"
    return tuple(keep_value(kept, functools.partial(_read_samples, path)))


def _read_samples(path: Path) -> tuple[list[list[Any]], list[Fault]]:
    samples, faults = [], []
    # macOS puts a hidden file "._NAME" beside a file, in the middle of its sample
    members = (pair for pair in tar_members(path, faults) if not _is_hidden(pair[0].name))
    for key, sample in itertools.groupby(members, lambda pair: sample_key(pair[0].name)):
        images, texts, unknown = {}, {}, []  # images by the number of dots in their suffix
        for member, file in sample:
            suffix = member.name[len(key) :].lower()
            if suffix.endswith(IMAGE_SUFFIXES):
                images.setdefault(suffix.count("."), []).append(member)
            elif suffix in TEXT_SUFFIXES:
                short = member.size <= MAX_CAPTION_BYTES
                texts[suffix] = decode_text(member_bytes(member, file)) if short else ""
            elif suffix and not suffix.endswith(ABOUT_SUFFIXES):
                unknown.append(member.name)
        if not images:
            if unknown:
                faults.append(Fault(NO_IMAGE_NAME, f"{path.name}: {unknown[0]}"))
            elif texts.keys() - {".json"}:
                faults.append(Fault("text without an image", f"{path.name}/{key}"))
            continue
        first, *others = images[min(images)]
        if others:
            faults.append(Fault("sample has several images", f"{path.name}/{key}"))
        else:
            label, caption = label_and_caption(texts)
            samples.append([key, first.offset_data, first.size, label, caption])
    return samples, faults


def _is_hidden(name: str) -> bool:
    return name.rpartition("/")[2].startswith(".")


def label_and_caption(texts: dict[str, str]) -> tuple[str | None, object]:
    """Return the label and caption in the texts of a sample.

    Args:
        texts: The texts by suffix, see `TEXT_SUFFIXES`.

    Returns:
        The label, from `.cls` or the key "label" of `.json`, which may be an integer, or None; and
        the caption, from `.txt` or the key "caption", of any type.
    """
    about = _parse_object(texts[".json"]) if ".json" in texts else {}
    label = texts.get(".cls", about.get("label"))
    if isinstance(label, int) and not isinstance(label, bool):  # as in `.cls`, where 3 is "3"
        label = str(label)
    label = label.strip() if isinstance(label, str) else label and ""
    return label, texts.get(".txt", about.get("caption"))


def decode_text(content: bytes) -> str:
    """Return bytes as text, or "", which is a fault, if they are not text."""
    try:
        return content.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        return ""


def _parse_object(text: str) -> dict[str, Any]:
    """Return a JSON object, or one with an empty caption, which is a fault, if the text is not
    one."""
    try:
        value = parse_json(text)
    except ValueError:
        value = None
    return value if isinstance(value, dict) else {"caption": ""}
