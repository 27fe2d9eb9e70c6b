"""Locate a project's folders: its own, the book's, and the one for downloads and results."""

import contextlib
import os
from pathlib import Path

from cmp.errors import CmpError

DISTRIBUTION = "continual-multimodal-pretraining"
"""The name of this package's distribution."""


def shipped_folder(name: str) -> Path:
    """Return a folder shipped with this package, inside a wheel or beside it in a checkout."""
    in_wheel = Path(__file__).resolve().parent / name
    return in_wheel if in_wheel.is_dir() else in_wheel.parents[1] / name


def project_folder() -> Path:
    """Return the nearest checkout of this project, from the current folder upwards.

    Returns:
        The folder whose `pyproject.toml` names `DISTRIBUTION`; outside a checkout, the current one.

    Raises:
        CmpError: The current folder has been deleted.
    """
    try:
        current = Path.cwd()
    except FileNotFoundError as error:
        raise CmpError("the current folder has been deleted; change to another one") from error
    for folder in (current, *current.parents):
        with contextlib.suppress(OSError):
            if f'name = "{DISTRIBUTION}"'.encode() in (folder / "pyproject.toml").read_bytes():
                return folder
    return current


def build_folder() -> Path:
    """Return the folder for downloads and results: `$CMP_BUILD`, or else `_build` in the
    project."""
    return Path(os.environ.get("CMP_BUILD") or project_folder() / "_build").expanduser()
