"""Files of images: what is known of them without reading, and their bytes."""

import contextlib
import hashlib
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from cmp import files

T = TypeVar("T")


def keep_value(path: Path, make: Callable[[], Any]) -> Any:
    """Return a value that is kept in a file; make it where there is none, or a damaged one.

    Args:
        path: The file: a sha256, and below it the JSON that it is of.
        make: Makes the value, which is returned as JSON gives it back.

    Raises:
        CmpError: The disk refuses a new file.
    """
    with contextlib.suppress(OSError, ValueError):
        digest, _, text = files.read_text(path).partition("\n")
        if digest == hashlib.sha256(text.encode()).hexdigest():
            return files.parse_json(text)
    text = json.dumps(make())
    files.write_atomic(path, f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}")
    return json.loads(text)


class Stamp(NamedTuple):
    """What is known of a file without reading it.

    Attributes:
        size: Size in bytes, -1 where there is no file.
        changed: When it changed, or another number that does not stay the same then.
        problem: Why it must not be read, as the kind of a fault.
    """

    size: int
    changed: int = 0
    problem: str = ""


NO_FILE = Stamp(-1, problem="missing file")
OUTSIDE = Stamp(-1, problem="path lies outside")
LINK = Stamp(-1, problem="link to a file outside of the set's folder; copy the file into it")


def is_inside(path: Path | str, folder: Path | str) -> bool:
    """Return whether a path lies in a folder, or is it, once all links are followed."""
    real = os.path.realpath(folder)
    return os.path.commonpath([real, os.path.realpath(path)]) == real


def file_stamp(root: Path, name: str, known: dict[str, bool]) -> Stamp:
    """Return what is known of a file in a folder.

    One that is written over at the same size, its time set back, has changed as well.

    Args:
        root: The folder, which nothing outside is looked at for, through links neither.
        name: The file's path, relative to the folder or with it.
        known: Whether folders in it lie there once links are followed, filled in for the next file.
    """
    inside = name.removeprefix(f"{root}/")
    if inside.startswith("/") or ".." in inside.split("/"):
        return OUTSIDE
    try:
        path = os.path.join(root, inside or ".")
        folder, status = os.path.dirname(path), os.lstat(path)
        if folder not in known:
            known[folder] = is_inside(folder, root)
        is_link = stat.S_ISLNK(status.st_mode)
        if not known[folder] or (is_link and not is_inside(path, root)):
            return LINK
        status = os.stat(path) if is_link else status
    except (OSError, ValueError):  # a NUL in the name, or half a character
        return NO_FILE
    if not stat.S_ISREG(status.st_mode):
        return NO_FILE._replace(problem="no regular file")
    return Stamp(status.st_size, status.st_ctime_ns)


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
