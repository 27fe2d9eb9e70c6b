"""Tars of images as webdataset lays them out, read as streams and never unpacked.

The members of one sample follow each other and share what stands before the first dot of their
name. A tar is read once for where its images lie; each image is then read from its place.
"""

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from cmp.errors import CmpError
from cmp.files import parse_json
from cmp.readers.index import (
    MAX_IMAGE_BYTES,
    Fault,
    ImageIndex,
    RowCollector,
    SpanStore,
    build_index,
)
from cmp.readers.manifest import FileSet
from cmp.readers.tables import IMAGE_SUFFIXES

PICKLE_SUFFIXES = (".pkl", ".pickle", ".pyd", ".pth", ".pt", ".npy", ".npz", ".joblib")
"""Suffixes of what could run code when it is read, or is decoded so by other programs."""
MAX_TEXT_BYTES = 2**20
"""Bytes of a caption, a label or a JSON member."""


@dataclass(frozen=True)
class Member:
    """A file within a tar: its bytes are `size` at `offset`."""

    name: str
    size: int
    offset: int


def unsafe_reason(info: tarfile.TarInfo) -> str | None:
    """Why a member is not touched, if it is not."""
    if info.isdir():
        return None
    if not info.isreg():
        return "member is a link or a device"
    if info.sparse is not None:
        return "member is sparse"
    if info.name.startswith(("/", "\\\\")) or ".." in info.name.split("/"):
        return "member lies outside"
    if info.name.lower().endswith(PICKLE_SUFFIXES):
        return "member is a pickle"
    return "member is too large" if info.size > MAX_IMAGE_BYTES else None


def tar_members(path: Path, faults: list[Fault]) -> Iterator[tuple[Member, BinaryIO]]:
    """Every regular file of a tar that is safe, with the open tar; the others become faults.

    `CmpError` if it is damaged or compressed, since a place in it could not be gone to then.
    """
    if not path.is_file():
        raise CmpError(f"{path}: there is no such tar; pipes and addresses are not taken")
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            end = path.stat().st_size
            for info in archive:
                archive.members = []  # or it keeps them all
                if why := unsafe_reason(info):
                    faults.append(Fault(why, f"{path.name}: {info.name}"))
                elif info.isreg():
                    if info.offset_data + info.size > end:
                        raise tarfile.ReadError(f"{info.name}: it ends too early")
                    yield Member(info.name, info.size, info.offset_data), file
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        raise CmpError(
            f"{path}: cannot be read as an uncompressed tar ({error}); images are compressed "
            "already, so pack them as they are"
        ) from error


def member_bytes(member: Member, file: BinaryIO) -> bytes:
    """The bytes of a member."""
    file.seek(member.offset)
    return file.read(member.size)


def stream(path: Path, faults: list[Fault]) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, suffix -> content) of each sample of a tar, in its order."""
    key, parts = None, {}
    for member, file in tar_members(path, faults):
        here, suffix = _sample_key(member.name)
        if here != key and parts:
            yield key, parts
            parts = {}
        key, parts[suffix] = here, member_bytes(member, file)
    if parts:
        yield key, parts


def _sample_key(name: str) -> tuple[str, str]:
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return f"{folder}{slash}{stem}", f".{suffix.lower()}"


def read_tars(dataset: FileSet, root: Path) -> ImageIndex:
    """The images of all tars of the pattern: captions from `.txt` or the key "caption" of `.json`,
    labels from `.cls` or the key "label"."""
    pattern = dataset.reader.path
    files = [] if pattern.startswith("pipe:") else sorted(root.glob(pattern))
    if not files:
        raise CmpError(f"{dataset.name}: reader.path: there is no {root / pattern}")
    rows, faults, spans = RowCollector(), [], []
    for number, path in enumerate(files):
        key, parts = None, {}
        for member, file in tar_members(path, faults):
            here, suffix = _sample_key(member.name)
            if here != key:
                _add_sample(rows, spans, number, f"{path.name}/{key}", parts)
                key, parts = here, {}
            if suffix.endswith(IMAGE_SUFFIXES):
                parts["image"] = member
            elif suffix in (".txt", ".cls", ".json"):
                parts[suffix] = (
                    member_bytes(member, file) if member.size <= MAX_TEXT_BYTES else b"\xff"
                )
        _add_sample(rows, spans, number, f"{path.name}/{key}", parts)
    places = np.array(spans, np.int64).reshape(-1, 3)
    store = SpanStore(files, places[:, 0], places[:, 1], places[:, 2])
    return build_index(dataset, rows, store, faults)


def _add_sample(
    rows: RowCollector, spans: list[tuple], number: int, source: str, parts: dict
) -> None:
    """One sample; one without an image is none."""
    if "image" not in parts:
        return
    member = parts["image"]
    about = _parse_sample_json(parts[".json"]) if ".json" in parts else {}
    caption = _decode_text(parts[".txt"]) if ".txt" in parts else about.get("caption")
    label = _decode_text(parts[".cls"]) if ".cls" in parts else about.get("label", "")
    rows.add(source, member.size, "", label.strip() if isinstance(label, str) else "", caption)
    spans.append((number, member.offset, member.size))


def _decode_text(content: bytes) -> str:
    """A text; empty, and so a fault, if it is none."""
    try:
        return content.decode("utf-8").strip()
    except UnicodeDecodeError:
        return ""


def _parse_sample_json(content: bytes) -> dict:
    try:
        found = parse_json(content.decode("utf-8"))
    except (ValueError, json.JSONDecodeError):
        return {"caption": ""}
    return found if isinstance(found, dict) else {"caption": ""}
