"""Locate a project's folders: its own, the book's, and the one for downloads and results."""

import contextlib
import importlib.metadata
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


def foreign_owners() -> list[str]:
    """Return other installed distributions with files in `cmp`, such as ["cmp 0.0.1"].

    pip silently overwrites files of one distribution with those of another.
    """
    owners = set(importlib.metadata.packages_distributions().get("cmp", ())) - {DISTRIBUTION}
    return [f"{name} {importlib.metadata.version(name)}" for name in sorted(owners)]


def foreign_sentence(owners: list[str]) -> str:
    """Return an error message for other distributions with files in `cmp`, with the fix."""
    names = ", ".join(owners) or "unknown"
    return (
        f"another distribution has put files into the package cmp ({names}): uninstall it with "
        f"pip, then install {DISTRIBUTION} again"
    )
