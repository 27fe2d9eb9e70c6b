"""Paths of a project, YAML and JSON that are read strictly, files that are written whole or not at
all, and tables."""

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import yaml

from cmp.errors import CmpError

T = TypeVar("T")
PROJECT_MARKERS = ("_build", "data_manifests")
"""Folders by which a project is recognised."""
SHORT_ID = 12
"""Characters of a run's id that name its folder and are shown to people."""


def project_folder() -> Path:
    """Return the nearest folder, from the current one upwards, that holds one of `PROJECT_MARKERS`.

    Returns:
        The folder; the current one where none above it does.
    """
    current = Path.cwd()
    for folder in (current, *current.parents):
        if any((folder / name).is_dir() for name in PROJECT_MARKERS):
            return folder
    return current


def build_folder() -> Path:
    """Return where downloads and results are kept: `$CMP_BUILD`, else `_build` in the project."""
    return Path(os.environ.get("CMP_BUILD") or project_folder() / "_build").expanduser()


def child_path(folder: Path, name: str, suffix: str = "") -> Path:
    """Return the path of a file or folder directly in a folder.

    Args:
        folder: The folder.
        name: Letters, digits, hyphens and underscores.
        suffix: What follows the name, such as ".parquet".

    Raises:
        CmpError: The name is of another form, so that the path could lie elsewhere.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}", name):
        words = "it may hold letters, digits, - and _"
        raise CmpError(f"{name!r:.60}: not the name of anything in {folder}; {words}")
    return folder / f"{name}{suffix}"


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML without aliases and repeated keys; 1e-3 is a number, as in JSON and YAML 1.2."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):  # it can stand for endless or immense values
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError("an alias is not taken; write the value out", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if repeated := [key for key in keys if keys.count(key) > 1]:
            raise yaml.MarkedYAMLError(f"{repeated[0]!r} stands there twice", node.start_mark)
        return super().construct_mapping(node, deep)


_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def parse_yaml(text: str) -> Any:
    """Return the value of a YAML text.

    Raises:
        ValueError: It has none, or one that JSON could not hold.
    """
    try:
        value = yaml.load(text, _StrictLoader)
        json.dumps(value)  # refuses dates, bytes, sets and whole numbers too long to print
    except (yaml.YAMLError, RecursionError, TypeError) as error:
        raise ValueError(str(error)) from error
    except (ArithmeticError, AttributeError, LookupError) as error:  # PyYAML at `!!bool maybe`
        raise ValueError(f"a value is not what its tag or form says ({error!r})") from error
    return value


def parse_record(text: str, kind: type[T]) -> T:
    """Return a JSON text as an instance of a pydantic dataclass.

    Raises:
        ValueError: It does not fit; the message names the key.
    """
    from pydantic import TypeAdapter, ValidationError  # takes as long as all else in this module

    try:
        return TypeAdapter(kind).validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "(whole file)"
        raise ValueError(f"{key}: {first['msg']}") from error


def sync_to_disk(path: Path) -> None:
    """Wait until a file's or a folder's content is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, where they are missing.

    Raises:
        CmpError: The disk refuses.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # a NUL in the path is a ValueError
        raise CmpError(f"{folder}: cannot be made a folder ({error})") from error


def make_parent(target: Path) -> None:
    """Make the folder of a file that is to be written; raise `CmpError` for a name with a NUL."""
    if "\0" in target.name:
        raise CmpError(f"{target.name!r:.60}: not a file name")
    make_folder(target.parent)


@contextlib.contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Write a file, whole or not at all.

    Args:
        target: The file, which may exist.

    Yields:
        A path beside the target to write to; it becomes the target at the end, and is deleted
        after an error.

    Raises:
        CmpError: The disk refuses; the target is as before.
    """
    partial = target.parent / f".{target.name}.partial"
    make_parent(target)
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
