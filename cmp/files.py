"""Files: YAML that is read strictly, files and folders that are written whole or not at all."""

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from cmp.errors import CmpError


class _Loader(yaml.SafeLoader):
    """Safe YAML that also takes 1e-3 for a number, as JSON and YAML 1.2 do."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    "-+0123456789",
)


def parse_yaml(text: str) -> Any:
    """The value that a YAML text stands for; `ValueError` if it is none."""
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(str(error)) from error


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file's tree of keys; `CmpError` names the file if it holds none."""
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CmpError(f"{path}: cannot be read as YAML: {error}") from error
    if not isinstance(tree, dict):
        raise CmpError(f"{path}: cannot be read as YAML with keys at the top")
    return tree


def flush(path: Path) -> None:
    """Ask the system to put a file's or a folder's content on the disk now."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder to fill; it becomes `target` at the end and goes at an error.

    Raises `CmpError` where the disk refuses; `target` is then as it was. A process that is killed
    meanwhile leaves a hidden folder beside `target`, which nothing ever reads.
    """
    folder = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
        yield folder
        for path in [*folder.iterdir(), folder]:
            flush(path)
        if target.exists():
            shutil.rmtree(target)
        os.rename(folder, target)
        flush(target.parent)
    except OSError as error:
        raise CmpError(f"{target}: cannot be written ({error}); nothing was kept") from error
    finally:
        if folder:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """Yield a path beside `target` to write to; it becomes `target` at the end, goes at an error.

    Raises `CmpError` where the disk refuses; `target` is then as it was.
    """
    partial = target.with_name(f".{target.name}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        flush(partial)
        os.replace(partial, target)
        flush(target.parent)
    except OSError as error:
        raise CmpError(f"{target}: cannot be written ({error}); nothing was changed") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")
