"""FoMo-in-Flux as its authors lay it out on disk (spec 10).

`FOLDER/` holds the images, or `FOLDER.tar` does, with members `FOLDER/...`. What they are stands in
`00_info/FOLDER_train.json` and `FOLDER_test.json`, or in `FOLDER_train_224.json` for images made
smaller beforehand, which then lie in `FOLDER/FOLDER_train_224/`: path within the folder ->
`target`, a number, `default_caption` and, where that is null, `synthetic_merged_caption`.
`00_info/FOLDER_classnames.json` lists the names by target; sets for retrieval have none.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from cmp.errors import CmpError
from cmp.files import parse_json
from cmp.readers import tables, tars
from cmp.readers.index import Fault, FileStore, ImageIndex, RowCollector, SpanStore, build_index
from cmp.readers.manifest import FileSet

INFO_FOLDER = "00_info"
MAX_INFO_BYTES = 2**30
"""Bytes of an info file."""


_WHERE_OFFERED = "the authors offer it as a tar, linked from the README of their code, fomo_in_flux"


class AbsentError(CmpError):
    """Nothing of a set lies there."""


def info_files(dataset: FileSet, root: Path) -> dict[str, Path]:
    """Split -> the info file that is looked for: that of smaller images, if it is there."""
    found = {}
    for split in (each for each in dataset.allowed() if each != "validation"):
        name = f"{dataset.reader.folder}_{split}"
        small = root / INFO_FOLDER / f"{name}_224.json"
        plain = small.with_name(f"{name}.json")
        found[split] = small if dataset.reader.resized and small.is_file() else plain
    return found


def _load_info(path: Path, kind: type) -> Any:
    try:
        if path.stat().st_size > MAX_INFO_BYTES:
            raise ValueError(f"larger than {MAX_INFO_BYTES} bytes")
        found = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CmpError(f"{path}: cannot be read ({error})") from error
    if not isinstance(found, kind):
        raise CmpError(f"{path}: must hold a JSON {kind.__name__}")
    return found


def _file_places(dataset: FileSet, root: Path, faults: list[Fault]) -> dict[str, tuple[int, int]]:
    """(size, offset) of every image by its path within the folder, or within the tar."""
    folder = dataset.reader.folder
    if (root / folder).is_dir():
        return {path: (size, 0) for path, size in tables.walk_files(root / folder)}
    found = tars.tar_members(root / f"{folder}.tar", faults)
    return {each.name.removeprefix(f"{folder}/"): (each.size, each.offset) for each, _ in found}


def read_fomo(dataset: FileSet, root: Path) -> ImageIndex:
    """The images that the info files list. `Absent` if there is nothing; listed images that are
    missing are faults."""
    folder = dataset.reader.folder
    if not (root / folder).is_dir() and not (root / f"{folder}.tar").is_file():
        raise AbsentError(
            f"{dataset.name}: neither its folder nor its tar lies in {root}; {_WHERE_OFFERED}"
        )
    names = root / INFO_FOLDER / f"{folder}_classnames.json"
    classes = [str(name) for name in _load_info(names, list)] if _has_labels(dataset, names) else []
    rows, faults, targets, places = RowCollector(), [], set(), []
    files = _file_places(dataset, root, faults)
    for split, path in info_files(dataset, root).items():
        for name, about in _load_info(path, dict).items():
            about = about if isinstance(about, dict) else {}
            target, source = about.get("target"), f"{folder}/{name}"
            if name.startswith("/") or ".." in name.split("/"):
                faults.append(Fault("path lies outside", source))
                continue
            if classes and not (type(target) is int and 0 <= target < len(classes)):
                faults.append(Fault("target is no class", source))
                continue
            size, offset = files.get(name, (-1, 0))
            rows.add(
                source, size, split, classes[target] if classes else "", _training_caption(about)
            )
            places.append((0, offset, size))
            targets.add(target if classes else 0)
    store = FileStore(root, rows.source)
    if not (root / folder).is_dir():
        spans = np.array(places, np.int64).reshape(-1, 3)
        store = SpanStore([root / f"{folder}.tar"], spans[:, 0], spans[:, 1], spans[:, 2])
    found = build_index(dataset, rows, store, faults, list(dict.fromkeys(classes)) or None)
    return dataclasses.replace(found, targets=len(targets))


def _has_labels(dataset: FileSet, names: Path) -> bool:
    return dataset.task != "retrieval" or names.is_file()


def _training_caption(about: dict) -> object:
    """The caption that training reads; none for an image that is only named."""
    caption = about.get("default_caption")
    return about.get("synthetic_merged_caption") if caption is None else caption
