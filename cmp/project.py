"""Where a project keeps things: its folder, the book's, and the one for downloads and results."""

import importlib.metadata
import os
from pathlib import Path

DISTRIBUTION = "continual-multimodal-pretraining"
"""What this package is called where it is installed."""
PROJECT_MARKERS = ("_build", "data_manifests")
"""Folders by which a project is recognised."""
_IN_WHEEL = Path(__file__).resolve().parent / "book"
SHIPPED_BOOK = _IN_WHEEL if _IN_WHEEL.is_dir() else _IN_WHEEL.parents[1] / "book"
"""The studies and results that come with this package, in a wheel or beside it in its checkout."""


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


def book_folder() -> Path:
    """Return the folder of the book's studies and results.

    Returns:
        The folder `book` of the project; where there is none, the installed package's own.
    """
    folder = project_folder() / "book"
    return folder if (folder / "studies").is_dir() else SHIPPED_BOOK


def build_folder() -> Path:
    """Return where downloads and results are kept: `$CMP_BUILD`, else `_build` in the project."""
    return Path(os.environ.get("CMP_BUILD") or project_folder() / "_build").expanduser()


def foreign_owners() -> list[str]:
    """Return the other installed distributions that have files in `cmp`, such as ["cmp 0.0.1"].

    pip overwrites a file of one distribution by that of another without a word.
    """
    owners = set(importlib.metadata.packages_distributions().get("cmp", ())) - {DISTRIBUTION}
    return [f"{name} {importlib.metadata.version(name)}" for name in sorted(owners)]


def foreign_sentence(owners: list[str]) -> str:
    """Return what is wrong where others have files in `cmp`, and how to mend it."""
    names = ", ".join(owners) or "unknown"
    return (
        f"another distribution has put files into the package cmp ({names}): uninstall it by pip, "
        f"and then install {DISTRIBUTION} again"
    )
