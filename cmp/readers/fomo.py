"""Read FoMo-in-Flux in its original layout.

The images are in `FOLDER/`, or in `FOLDER.tar` with members `FOLDER/...`. They are listed in
`00_info/FOLDER_train.json` and `FOLDER_test.json`, or in `FOLDER_train_224.json` for images resized
in advance, which are in `FOLDER/FOLDER_train_224/`. A list maps a path in the folder to `target`, a
number, `default_caption` and, if that is null, `synthetic_merged_caption`.
`00_info/FOLDER_classnames.json` lists the names by target; retrieval datasets have none.
"""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cmp.errors import CmpError, explain_errors
from cmp.parsing import MAX_TEXT_BYTES, read_json
from cmp.readers import files, tars
from cmp.readers.files import Stamp, file_stamp
from cmp.readers.index import Fault, ImageIndex, Row, build_index
from cmp.readers.manifest import FileSet


class AbsentError(CmpError):
    """An error for a dataset that is completely missing."""


def _listed_images(dataset: FileSet, info: Path) -> Iterator[tuple[str, str, dict]]:
    """Yield (split, path, entry) for each image, preferring the resized images if they exist."""
    for split in dataset.allowed_splits():
        if split != "validation":  # the dataset has none
            name = f"{dataset.reader.folder}_{split}"
            small = info / f"{name}_224.json"
            use_small = dataset.reader.resized and small.is_file()
            listed = _load_info(small if use_small else info / f"{name}.json", dict)
            for path, about in listed.items():
                yield split, path, about if isinstance(about, dict) else {}


def read_fomo(dataset: FileSet, root: Path) -> ImageIndex:
    """Index the images in a dataset's lists.

    Args:
        dataset: A manifest whose reader is a `FomoReader`.
        root: The folder of the collection.

    Returns:
        The index. Listed images that are missing are faults.

    Raises:
        AbsentError: Neither the dataset's folder nor its tar exists.
        CmpError: A list or the tar cannot be read.
    """
    folder = dataset.reader.folder
    images, archive = root / folder, root / f"{folder}.tar"
    if not images.is_dir() and not archive.is_file():
        if root.is_dir():
            files.note_folder(root)  # it may be downloaded later
        raise AbsentError(
            f"{dataset.name}: neither its folder nor its tar is in {root}; get the tar from the "
            "link in the README of fomo_in_flux"
        )
    info = root / "00_info"
    class_names = info / f"{folder}_classnames.json"
    labelled = dataset.task != "retrieval" or class_names.is_file()
    classes = [str(name).strip() for name in _load_info(class_names, list)] if labelled else []
    rows, faults, targets, spans = [], [], set(), []
    in_folder, known = images.is_dir(), {}
    members = () if in_folder else (member for member, _ in tars.tar_members(archive, faults))
    changed = 0 if in_folder else archive.stat().st_ctime_ns
    if not in_folder:
        files.note_path(archive)
    span_of = {m.name.removeprefix(f"{folder}/"): (0, m.offset_data, m.size) for m in members}
    for split, name, about in _listed_images(dataset, info):
        target, source = about.get("target"), f"{folder}/{name}"
        if classes and not (type(target) is int and 0 <= target < len(classes)):
            faults.append(Fault("target is not a class", source))
        else:
            spans.append(span_of.get(name, (0, 0, -1)))
            stamp = Stamp(spans[-1][2], changed, "missing file")
            stamp = file_stamp(images, name, known) if in_folder else stamp
            label = classes[target] if classes else None
            caption = about.get("default_caption")
            if caption is None:  # if both are null, the image has only its class name
                caption = about.get("synthetic_merged_caption")
            rows.append(Row(source, stamp, split, label, caption))
            targets.add(target if classes else 0)
    read = functools.partial(files.read_file, root, [row.source for row in rows])
    if not in_folder:
        read = functools.partial(files.read_span, [archive], np.array(spans, np.int64))
    index = build_index(dataset, rows, read, faults)
    names = list(dict.fromkeys(classes)) or index.classes
    return dataclasses.replace(index, classes=names, target_count=len(targets))


def _load_info(path: Path, kind: type) -> Any:
    with explain_errors(f"{path}: cannot be read"):
        content = read_json(path, MAX_TEXT_BYTES)
        files.note_path(path)
        files.note_folder(path.parent)  # a list of resized images may arrive
    if not isinstance(content, kind):
        raise CmpError(f"{path}: must contain a JSON {kind.__name__}")
    return content
