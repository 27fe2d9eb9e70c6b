"""A folder a class, as torchvision's ImageFolder; with or without a folder a split above."""

import os
from collections.abc import Iterator
from pathlib import Path

from cmp.data.filesets import FileSet
from cmp.data.readers.index import SPLITS, Fault, Index, Paths, Rows, index
from cmp.errors import CmpError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")


def walk(folder: Path, prefix: str = "") -> Iterator[tuple[str, int]]:
    """(path relative to `folder`, bytes) of all files below it, sorted; hidden ones are left out,
    and links to folders are not followed."""
    with os.scandir(folder) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    for entry in found:
        if entry.name.startswith("."):
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from walk(Path(entry.path), f"{prefix}{entry.name}/")
        elif entry.is_file():
            yield f"{prefix}{entry.name}", entry.stat().st_size


def split_folders(folder: Path) -> dict[str, Path]:
    """The folders of splits, if all folders in this one are such; else none."""
    inside = sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")
    all_splits = bool(inside) and all(path.name.lower() in SPLITS for path in inside)
    return {path.name: path for path in inside} if all_splits else {}


def read(dataset: FileSet, root: Path) -> Index:
    """The images of a folder; the class is the name of the folder right above the split's or the
    set's, with "_" for a space."""
    folder = root / dataset.reader.path
    if not folder.is_dir():
        raise CmpError(f"{dataset.name}: reader.path: {folder} is no folder")
    rows, faults = Rows(), []
    tops = split_folders(folder) or {"": folder}
    seen: dict[str, int] = {}
    for name, top in tops.items():
        for each in sorted(path.name for path in top.iterdir() if path.is_dir()):
            if each[0] != ".":
                seen.setdefault(each, 0)
        for path, size in walk(top):
            label, slash, _ = path.partition("/")
            if slash and path.lower().endswith(SUFFIXES):
                seen[label] = seen.get(label, 0) + 1
                source = f"{name}/{path}" if name else path
                rows.add(source, size, name, label.replace("_", " "), None)
    faults += [Fault("class without images", label) for label, count in seen.items() if not count]
    return index(dataset, rows, Paths(folder, rows.source), faults)
