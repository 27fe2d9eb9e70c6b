"""Tars of images as webdataset writes them, read as streams and never unpacked.

The members of one sample follow each other and share what stands before the first dot of their
name. A tar is read once to learn where its images lie; each image is then read from its place.
"""

import functools
import itertools
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from cmp.errors import CmpError
from cmp.readers.files import Stamp, explain_errors, parse_json, read_span
from cmp.readers.index import IMAGE_SUFFIXES, Fault, ImageIndex, Row, build_index
from cmp.readers.manifest import FileSet

PICKLE_SUFFIXES = (".pkl", ".pickle", ".pyd", ".pth", ".pt", ".npy", ".npz", ".joblib")
"""Suffixes of files that could run code when they are read; other programs would decode them."""
MAX_TEXT_BYTES = 2**20
"""Largest size of a caption, a label or a JSON member."""


def unsafe_reason(member: tarfile.TarInfo) -> str | None:
    """Say why a member of a tar must not be read.

    Args:
        member: The member.

    Returns:
        A fault's kind, or None for a regular file or a folder that is safe.
    """
    if member.isdir():
        return None
    if not member.isreg():
        return "member is a link or a device"
    if member.sparse is not None:
        return "member is sparse"
    if member.name.startswith(("/", "\\\\")) or ".." in member.name.split("/"):
        return "member lies outside"
    if member.name.lower().endswith(PICKLE_SUFFIXES):
        return "member is a pickle"
    return None


def tar_members(path: Path, faults: list[Fault]) -> Iterator[tuple[tarfile.TarInfo, BinaryIO]]:
    """Yield the regular files of a tar.

    Args:
        path: An uncompressed tar; in a compressed one, no place could be gone to.
        faults: Members that must not be read are appended here.

    Yields:
        (member, the tar as an open file) pairs, in the order of the tar.

    Raises:
        CmpError: If the file is missing, damaged or compressed.
    """
    if not path.is_file():
        raise CmpError(f"{path}: there is no such tar; pipes and addresses are not taken")
    what = f"{path}: cannot be read as an uncompressed tar"
    remedy = "; images are compressed already, so pack them as they are"
    with (
        explain_errors(what, remedy, tarfile.TarError, EOFError),
        path.open("rb") as file,
        tarfile.open(fileobj=file, mode="r:") as archive,
    ):
        end = path.stat().st_size
        for member in archive:
            archive.members = []  # or it keeps them all
            if reason := unsafe_reason(member):
                faults.append(Fault(reason, f"{path.name}: {member.name}"))
            elif member.isreg():
                if member.offset_data + member.size > end:
                    raise tarfile.ReadError(f"{member.name}: it ends too early")
                yield member, file


def member_bytes(member: tarfile.TarInfo, file: BinaryIO) -> bytes:
    """Return the content of a member.

    Args:
        member: The member.
        file: The tar, open.
    """
    file.seek(member.offset_data)
    return file.read(member.size)


def sample_key(name: str) -> str:
    """Return what the members of one sample share.

    Args:
        name: A member's name, such as "shard/12.seg.png".

    Returns:
        The name up to the first dot of its last part, such as "shard/12".
    """
    folder, slash, base = name.rpartition("/")
    return f"{folder}{slash}{base.partition('.')[0]}"


def read_tars(dataset: FileSet, root: Path) -> ImageIndex:
    """Index the images of some tars.

    Captions are the members `.txt`, or the key "caption" of `.json`; labels are the members `.cls`,
    or the key "label". Samples without an image are passed over.

    Args:
        dataset: A manifest whose reader is a `TarReader`.
        root: The folder that its pattern starts from.

    Returns:
        The index.

    Raises:
        CmpError: If no tar fits the pattern, or if one cannot be read.
    """
    files = dataset.find_files(root)
    rows, faults, spans = [], [], []
    for number, path in enumerate(files):
        changed = path.stat().st_ctime_ns if path.exists() else 0
        members = tar_members(path, faults)
        for key, sample in itertools.groupby(members, lambda pair: sample_key(pair[0].name)):
            image, texts = None, {}
            for member, file in sample:
                suffix = member.name[len(key) :].lower()
                if suffix.endswith(IMAGE_SUFFIXES):
                    image = member
                elif suffix in (".txt", ".cls", ".json"):
                    short = member.size <= MAX_TEXT_BYTES
                    texts[suffix] = _decode_text(member_bytes(member, file)) if short else ""
            if image:
                about = _parse_object(texts[".json"]) if ".json" in texts else {}
                label = texts.get(".cls", about.get("label"))
                label = label.strip() if isinstance(label, str) else label and ""
                caption = texts.get(".txt", about.get("caption"))
                stamp = Stamp(image.size, changed)
                rows.append(Row(f"{path.name}/{key}", stamp, "", label, caption))
                spans.append((number, image.offset_data, image.size))
    read = functools.partial(read_span, files, np.array(spans, np.int64))
    return build_index(dataset, rows, read, faults)


def _decode_text(content: bytes) -> str:
    """A text; "", which is a fault, if it is none."""
    try:
        return content.decode("utf-8").strip()
    except UnicodeDecodeError:
        return ""


def _parse_object(text: str) -> dict[str, Any]:
    """A JSON object; one with an empty caption, which is a fault, if it is none."""
    try:
        value = parse_json(text)
    except ValueError:
        value = None
    return value if isinstance(value, dict) else {"caption": ""}
