"""FoMo-in-Flux in its authors' layout (spec 10).

`FOLDER/` holds the images, or `FOLDER.tar` does, with members `FOLDER/...`. They are listed in
`00_info/FOLDER_train.json` and `FOLDER_test.json`, or in `FOLDER_train_224.json` for images made
smaller beforehand, which then lie in `FOLDER/FOLDER_train_224/`. A list maps a path in the folder
to `target`, a number, `default_caption` and, where that is null, `synthetic_merged_caption`.
`00_info/FOLDER_classnames.json` lists the names by target; sets for retrieval have none.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from cmp.errors import CmpError
from cmp.readers import tables, tars
from cmp.readers.files import parse_json
from cmp.readers.index import Fault, FileStore, ImageIndex, Row, SpanStore, build_index
from cmp.readers.manifest import FileSet

INFO_FOLDER = "00_info"


class AbsentError(CmpError):
    """Nothing of a set is there."""


def info_files(dataset: FileSet, root: Path) -> dict[str, Path]:
    """Return where the lists of a set are, or should be.

    Args:
        dataset: A manifest whose reader is a `FomoReader`.
        root: The folder of the collection.

    Returns:
        Split -> path; that of the smaller images if it is there.
    """
    paths = {}
    for split in dataset.allowed_splits():
        name = f"{dataset.reader.folder}_{split}"
        small = root / INFO_FOLDER / f"{name}_224.json"
        use_small = dataset.reader.resized and small.is_file()
        paths[split] = small if use_small else small.with_name(f"{name}.json")
    paths.pop("validation", None)  # the authors have none
    return paths


def read_fomo(dataset: FileSet, root: Path) -> ImageIndex:
    """Index the images that a set's lists name.

    Args:
        dataset: A manifest whose reader is a `FomoReader`.
        root: The folder of the collection.

    Returns:
        The index; listed images that are missing are faults.

    Raises:
        AbsentError: If neither the set's folder nor its tar is there.
        CmpError: If a list or the tar cannot be read.
    """
    folder = dataset.reader.folder
    images, archive = root / folder, root / f"{folder}.tar"
    if not images.is_dir() and not archive.is_file():
        raise AbsentError(
            f"{dataset.name}: neither its folder nor its tar lies in {root}; the authors offer it "
            "as a tar, linked from the README of their code, fomo_in_flux"
        )
    class_names = root / INFO_FOLDER / f"{folder}_classnames.json"
    labelled = dataset.task != "retrieval" or class_names.is_file()
    classes = [str(name) for name in _load_info(class_names, list)] if labelled else []
    rows, faults, targets, spans = [], [], set(), []
    in_folder = images.is_dir()
    if in_folder:
        files = {path: (0, 0, size) for path, size in tables.walk_files(images)}
    else:
        members = (member for member, _ in tars.tar_members(archive, faults))
        files = {m.name.removeprefix(f"{folder}/"): (0, m.offset_data, m.size) for m in members}
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
            spans.append(files.get(name, (0, 0, -1)))
            size, label = spans[-1][2], classes[target] if classes else ""
            rows.append(Row(source, size, split, label, _training_caption(about)))
            targets.add(target if classes else 0)
    store = FileStore(root, [row.source for row in rows])
    if not in_folder:
        store = SpanStore([archive], np.array(spans, np.int64))
    index = build_index(dataset, rows, store, faults)
    names = list(dict.fromkeys(classes)) or index.classes
    return dataclasses.replace(index, classes=names, target_count=len(targets))


def _load_info(path: Path, kind: type) -> Any:
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CmpError(f"{path}: cannot be read ({error})") from error
    if not isinstance(content, kind):
        raise CmpError(f"{path}: must hold a JSON {kind.__name__}")
    return content


def _training_caption(about: dict) -> object:
    """The caption that training reads; None for an image that is only named."""
    caption = about.get("default_caption")
    return about.get("synthetic_merged_caption") if caption is None else caption
