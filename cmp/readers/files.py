"""What data and records need beside `cmp.files`: YAML, JSON and tables from files, and folders that
are written whole or not at all."""

import contextlib
import json
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pandas as pd
import pyarrow
from pandas.api.types import is_integer_dtype, is_numeric_dtype, is_string_dtype

from cmp import files
from cmp.errors import CmpError

T = TypeVar("T")
DIGESTS = "SHA256SUMS"
"""The name of the list of sha256 of the files beside it."""

MAX_TEXT_BYTES, MAX_YAML_BYTES = 2**30, 2**24
"""Largest text that is read, such as a list of images, and YAML, which is written by hand."""


@contextlib.contextmanager
def explain_errors(what: str, then: str = "", *errors: type[Exception]) -> Iterator[None]:
    """Turn what reading raises at a bad file into a `CmpError`.

    Args:
        what: What is wrong, in words; the error's own follow in brackets.
        then: What follows those.
        *errors: What may be raised beside `OSError` and `ValueError`.
    """
    try:
        yield
    except (OSError, ValueError, *errors) as error:
        raise CmpError(f"{what} ({error}){then}") from error


def check_record(tree: Any, kind: type[T], source: str, remedy: str = "") -> T:
    """Return a tree of keys as an instance of a pydantic dataclass, or a tuple or dict of them.

    Args:
        tree: The tree.
        kind: What it must fit.
        source: What errors begin with, before the key.
        remedy: What they end with.

    Raises:
        CmpError: It does not fit.
    """
    try:
        return files.parse_record(json.dumps(tree), kind)
    except (TypeError, ValueError) as error:
        raise CmpError(f"{source}{error}{remedy}") from error


def read_text(path: Path, limit: int = MAX_TEXT_BYTES) -> str:
    """Return the text of a file.

    Args:
        path: A regular file; a pipe might never end, and a device never does.
        limit: Its largest size in bytes.

    Raises:
        OSError: It cannot be read.
        ValueError: It is no regular file, too large, or not in UTF-8.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode) or status.st_size > limit:
        raise ValueError(f"it is no regular file of at most {limit:,} bytes")
    return path.read_text(encoding="utf-8")


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the tree of keys in a YAML file.

    Raises:
        CmpError: The file cannot be read or holds no keys.
    """
    try:
        tree = files.parse_yaml(read_text(path, MAX_YAML_BYTES))
    except (OSError, ValueError) as error:
        raise CmpError(f"{path}: cannot be read as YAML: {error}") from error
    if not isinstance(tree, dict):
        raise CmpError(f"{path}: cannot be read as YAML with keys at the top")
    return tree


def parse_json(text: str) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: It is no JSON, nested too deeply, or an object has a key twice.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique_keys)
    except RecursionError as error:
        raise ValueError(str(error)) from error


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; Python would take the last of several values of a key."""
    counts = Counter(key for key, _ in pairs)
    if len(counts) < len(pairs):
        raise ValueError(f"{max(counts, key=counts.__getitem__)!r} stands there twice")
    return dict(pairs)


@contextlib.contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Write a folder, whole or not at all.

    Args:
        target: The folder; one that is there is replaced, anything else refused.

    Yields:
        An empty folder to fill; it becomes the target at the end, and is deleted after an error.

    Raises:
        CmpError: The disk refuses, and the target is as before; or see `cmp.files.check_target`.
    """
    files.check_target(target, stat.S_ISDIR)
    with files.report_disk_errors(f"{target}:"), files.partial_folder(target.parent) as partial:
        folder, previous = partial / "new", partial / "previous"
        folder.mkdir()
        yield folder
        for path in [*folder.iterdir(), folder]:
            files.sync_to_disk(path)
        if target.exists():  # stands aside until the new one is there
            os.rename(target, previous)
        try:
            os.rename(folder, target)
        except OSError:
            if previous.exists():
                os.rename(previous, target)
            raise
        files.sync_to_disk(target.parent)


@contextlib.contextmanager
def listed_file(target: Path) -> Iterator[Path]:
    """Write a file as `atomic_file` does, and its sha256 into the list beside it.

    For a moment the list has both the old sha256 and the new one, so that the file is never taken
    for damaged. `sha256sum --check` reads the list, too.
    """
    place = target.with_name(DIGESTS)
    with contextlib.ExitStack() as stack:
        with files.atomic_file(target) as partial:
            yield partial
            stack.enter_context(files.lock_folder(target.parent))  # others may write there
            lines = place.read_text(encoding="utf-8").splitlines() if place.exists() else []
            new, name = f"{files.file_digest(partial)}  {target.name}", f"  {target.name}"
            files.write_atomic(place, "\n".join(dict.fromkeys([*lines, new])) + "\n")
        lines = [new, *(line for line in lines if not line.endswith(name))]
        files.write_atomic(place, "\n".join(sorted(lines, key=lambda line: line[64:])) + "\n")


def check_digest(path: Path, remedy: str) -> None:
    """Raise `CmpError` unless a file is what the list beside it says.

    Args:
        path: The file.
        remedy: What to do about it.
    """
    with explain_errors(f"{path}: cannot be checked", f"; {remedy}"):
        lines = path.with_name(DIGESTS).read_text(encoding="utf-8").splitlines()
        is_known = f"{files.file_digest(path)}  {path.name}" in lines
    if not is_known:
        raise CmpError(f"{path}: damaged: not the file that is in {DIGESTS} beside it; {remedy}")


def read_table(path: Path, columns: Mapping[str, type]) -> pd.DataFrame:
    """Return the table of a parquet file.

    Args:
        path: The file.
        columns: What each column that must be there holds: str, int, float, or list for anything.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not a table, or lacks a column.
    """
    checks = {str: is_string_dtype, int: is_integer_dtype, float: is_numeric_dtype}
    try:
        table = pd.read_parquet(path)
    except (pyarrow.ArrowException, LookupError, MemoryError, TypeError) as error:
        raise ValueError(f"{path.name}: no readable table ({error!r:.200})") from error
    for name, kind in columns.items():
        unique = list(table.columns).count(name) == 1
        if not unique or (kind in checks and not checks[kind](table[name])):
            raise ValueError(f"{path.name}: {name}: must be one column of {kind.__name__}")
    return table


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


def file_stamp(root: Path, name: str) -> Stamp:
    """Return what is known of a file in a folder.

    One that is written over at the same size, its time set back, has changed as well.

    Args:
        root: The folder, which nothing outside is looked at for.
        name: The file's path, relative to the folder or with it.
    """
    inside = name.removeprefix(f"{root}/")
    if inside.startswith("/") or ".." in inside.split("/"):
        return OUTSIDE
    try:
        status = os.stat(os.path.join(root, inside or "."))
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
