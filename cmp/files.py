"""Files: YAML that is read strictly, files and folders that are written whole or not at all."""

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
import pyarrow
import yaml
from pandas.api.types import is_integer_dtype, is_numeric_dtype, is_string_dtype
from pydantic import TypeAdapter, ValidationError

from cmp.errors import CmpError

T = TypeVar("T")


class _Loader(yaml.SafeLoader):
    """Safe YAML that also takes 1e-3 for a number, as JSON and YAML 1.2 do.

    Without aliases: what they stand for can be endless, or grow beyond any memory. Without keys
    that stand there twice.
    """

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError("an alias is not taken; write the value out", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """A key that stands there twice would silently lose its first value."""
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.MarkedYAMLError(f"{twice[0]!r} stands there twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    "-+0123456789",
)


def parse_yaml(text: str) -> Any:
    """The value that a YAML text stands for; `ValueError` if it is none that JSON could hold."""
    try:
        value = yaml.load(text, _Loader)  # a SafeLoader
        json.dumps(value)  # refuses dates, bytes, sets, and whole numbers that nobody can print
    except (yaml.YAMLError, RecursionError, TypeError) as error:
        raise ValueError(str(error)) from error
    except (ArithmeticError, AttributeError, LookupError) as error:  # PyYAML at `!!bool maybe`
        raise ValueError(f"a value is not what its tag or form says ({error!r})") from error
    return value


def parse_json(text: str) -> Any:
    """The value that a JSON text stands for; `ValueError` if it is none, or nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError(str(error)) from error


def parse_record(text: str, kind: type[T]) -> T:
    """A JSON text as an instance of a pydantic dataclass; `ValueError` names the key at fault."""
    try:
        return TypeAdapter(kind).validate_json(text)
    except ValidationError as error:
        fault = error.errors()[0]
        key = ".".join(map(str, fault["loc"])) or "(whole file)"
        raise ValueError(f"{key}: {fault['msg']}") from error


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file's tree of keys; `CmpError` names the file if it holds none."""
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CmpError(f"{path}: cannot be read as YAML: {error}") from error
    if not isinstance(tree, dict):
        raise CmpError(f"{path}: cannot be read as YAML with keys at the top")
    return tree


def sync_to_disk(path: Path) -> None:
    """Ask the system to put a file's or a folder's content on the disk now."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, where they are missing; `CmpError` if that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # a NUL in the path is a ValueError
        raise CmpError(f"{folder}: cannot be made a folder ({error})") from error


def _make_parent(target: Path) -> None:
    if "\0" in target.name:
        raise CmpError(f"{target.name!r:.60}: no name of a file")
    make_folder(target.parent)


@contextlib.contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder to fill; it becomes `target` at the end and goes at an error.

    Raises `CmpError` where the disk refuses; `target` is then as it was. A process that is killed
    meanwhile leaves a hidden folder beside `target`, which nothing ever reads.
    """
    folder = None
    _make_parent(target)
    try:
        folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
        yield folder
        for path in [*folder.iterdir(), folder]:
            sync_to_disk(path)
        if target.exists():
            shutil.rmtree(target)
        os.rename(folder, target)
        sync_to_disk(target.parent)
    except OSError as error:
        raise CmpError(f"{target}: cannot be written ({error}); nothing was kept") from error
    finally:
        if folder:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Yield a path beside `target` to write to; it becomes `target` at the end, goes at an error.

    Raises `CmpError` where the disk refuses; `target` is then as it was.
    """
    partial = target.parent / f".{target.name}.partial"
    _make_parent(target)
    try:
        yield partial
        sync_to_disk(partial)
        os.replace(partial, target)
        sync_to_disk(target.parent)
    except OSError as error:
        raise CmpError(f"{target}: cannot be written ({error}); nothing was changed") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def write_atomic(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


_COLUMN_KINDS = {
    str: is_string_dtype,
    int: is_integer_dtype,
    float: is_numeric_dtype,
    list: lambda _: True,
}


def read_table(path: Path, columns: Mapping[str, type]) -> pd.DataFrame:
    """The table of a parquet file; `OSError` or `ValueError` if it is none or lacks a column.

    columns: name -> str, int, float, or list for anything else.
    """
    try:
        table = pd.read_parquet(path)
    except (pyarrow.ArrowException, LookupError, MemoryError, TypeError) as error:
        raise ValueError(f"{path.name}: no readable table ({error!r:.200})") from error
    for name, kind in columns.items():
        if list(table.columns).count(name) != 1 or not _COLUMN_KINDS[kind](table[name]):
            raise ValueError(f"{path.name}: {name}: must be one column of {kind.__name__}")
    return table


PROJECT_MARKERS = ("_build", "data_manifests")
"""Folders by which a project is recognised."""

SHORT_ID = 12
"""Characters of a run's id that name its folder and are shown to people."""


def child_path(folder: Path, name: str, suffix: str = "") -> Path:
    """The file or folder of this name right in `folder`; `CmpError` if it could lie elsewhere."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9-]{0,99}", name):
        raise CmpError(f"{name!r:.60}: not the name of anything in {folder}")
    return folder / f"{name}{suffix}"


def project_folder() -> Path:
    """The nearest folder from the current one upwards that holds one of `PROJECT_MARKERS`; the
    current folder where none does."""
    here = Path.cwd()
    for folder in (here, *here.parents):
        if any((folder / name).is_dir() for name in PROJECT_MARKERS):
            return folder
    return here


def build_folder() -> Path:
    """Downloads, stores and results: `$CMP_BUILD`, else `_build` in the project's folder."""
    return Path(os.environ.get("CMP_BUILD") or project_folder() / "_build").expanduser()
