"""What is read from files: text, YAML, JSON, records and tables, and the bytes of images."""

import contextlib
import hashlib
import json
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pandas as pd
import pyarrow
import yaml
from pandas.api.types import is_integer_dtype, is_numeric_dtype, is_string_dtype

from cmp import files
from cmp.errors import CmpError

T = TypeVar("T")

MAX_TEXT_BYTES, MAX_YAML_BYTES = 2**30, 2**24
"""Largest text that is read, such as a list of images, and YAML, which is written by hand."""
_UNQUOTED_DAY = re.compile(r"(?m)^[^#\n]{0,1000}?([\w-]{1,100})['\"]?:\s+(\d{4}-\d\d?-\d\d?)")
"""A key and a day as YAML takes it for a date, which JSON could not hold."""


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
        text = read_text(path, MAX_YAML_BYTES)
    except FileNotFoundError as error:
        raise CmpError(f"{path}: no such file") from error
    except (OSError, ValueError) as error:
        raise CmpError(f"{path}: cannot be read ({error})") from error
    try:
        tree = files.parse_yaml(text)
    except ValueError as error:
        raise CmpError(f"{path}: {_explain_yaml(error, text)}") from error
    if not isinstance(tree, dict):
        raise CmpError(f"{path}: cannot be read as YAML with keys at the top")
    return tree


def _explain_yaml(error: ValueError, text: str) -> str:
    """Say in one line what in a text is not taken, and where."""
    if "date" in str(error) and (found := _UNQUOTED_DAY.search(text)):
        return f'{found[1]}: put it in quotes: "{found[2]}"'
    words, cause = " ".join(str(error).split()), error.__cause__
    if isinstance(cause, yaml.MarkedYAMLError):
        mark = cause.problem_mark or cause.context_mark
        words = cause.problem or cause.context
        words = f"line {mark.line + 1}: {words}" if mark else words
    return f"cannot be read as YAML ({words})"


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


def read_table(
    path: Path, columns: Mapping[str, type], optional: Mapping[str, type] | None = None
) -> pd.DataFrame:
    """Return the table of a parquet file.

    Args:
        path: The file.
        columns: What each column that must be there holds: str, int, float, list for anything, or
            `pd.Categorical` for long texts that repeat, each of which is then held once.
        optional: The same of columns that may be missing.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not a table, or lacks a column.
    """
    checks = {str: is_string_dtype, int: is_integer_dtype, float: is_numeric_dtype}
    checks[pd.Categorical] = pd.CategoricalDtype.is_dtype
    repeated = [name for name, kind in columns.items() if kind is pd.Categorical]
    try:
        table = pd.read_parquet(path, read_dictionary=repeated)
    except (pyarrow.ArrowException, LookupError, MemoryError, TypeError) as error:
        raise ValueError(f"{path.name}: no readable table ({error!r:.200})") from error
    held = {name: kind for name, kind in (optional or {}).items() if name in table}
    for name, kind in {**columns, **held}.items():
        if [*table].count(name) != 1 or (kind in checks and not checks[kind](table[name])):
            raise ValueError(f"{path.name}: {name}: must be one column of {kind.__name__}")
    return table


def keep_value(path: Path, make: Callable[[], Any]) -> Any:
    """Return a value that is kept in a file; make it where there is none, or a damaged one.

    Args:
        path: The file: a sha256, and below it the JSON that it is of.
        make: Makes the value, which is returned as JSON gives it back.

    Raises:
        CmpError: The disk refuses a new file.
    """
    with contextlib.suppress(OSError, ValueError):
        digest, _, text = read_text(path).partition("\n")
        if digest == hashlib.sha256(text.encode()).hexdigest():
            return parse_json(text)
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
