"""Read folders of images with texts of the same name beside them, as written by img2dataset.

The texts are the same as in `tars`: `.txt`, `.cls` and `.json`.
"""

import functools
import os
from collections.abc import Collection
from pathlib import Path

from cmp.readers.files import Stamp, file_stamp, read_file
from cmp.readers.folders import is_picture_name, pictures_folder, split_folders, walk_files
from cmp.readers.index import NO_IMAGE_NAME, Fault, ImageIndex, Row, build_index
from cmp.readers.manifest import FileSet
from cmp.readers.tars import MAX_CAPTION_BYTES, TEXT_SUFFIXES, decode_text, label_and_caption


def read_pairs(dataset: FileSet, root: Path) -> ImageIndex:
    """Index the images of a folder, at any depth, with the texts beside them.

    Top folders with the names of splits are splits, see `folders.split_folders`.

    Args:
        dataset: A manifest whose reader is a `PairReader`.
        root: The folder that its path starts from.

    Returns:
        The index. Faults are images without a caption, and files that are neither images nor texts.
        At the top level, where the tables of img2dataset are, these must have a text beside them.

    Raises:
        CmpError: There is no such folder; see also `folders.pictures_folder`.
    """
    folder, is_foreign = pictures_folder(dataset, root, TEXT_SUFFIXES)
    splits = {path.name for path in split_folders(folder)}
    paths, rows, faults = dict.fromkeys(walk_files(folder)), [], []
    known: dict[str, bool] = {}
    texts = {path for path in paths if path.lower().endswith(TEXT_SUFFIXES)}
    described = {os.path.splitext(path)[0] for path in texts}
    for path in paths:
        top, slash, _ = path.partition("/")
        if is_picture_name(path):
            stamp, (label, caption) = read_texts(folder, path, paths, known)
            split = top if top in splits and slash else ""
            rows.append(Row(path, stamp, split, label, caption))
        elif path not in texts and (slash or os.path.splitext(path)[0] in described):
            faults.append(Fault(NO_IMAGE_NAME, "" if is_foreign else path))
    read = functools.partial(read_file, folder, [row.source for row in rows])
    return build_index(dataset, rows, read, faults)


def read_texts(
    folder: Path, image: str, paths: Collection[str], known: dict[str, bool]
) -> tuple[Stamp, tuple[str | None, object]]:
    """Return what is known about an image's file, and the content of the texts beside it.

    Args:
        folder: The folder.
        image: The image's path in the folder.
        paths: All paths in the folder.
        known: See `files.file_stamp`.

    Returns:
        The stamp, which is that of a text if one must not be read; and label and caption, see
        `tars.label_and_caption`.
    """
    stamp, texts = file_stamp(folder, image, known), {}
    for name in text_names(image, paths):
        about = file_stamp(folder, name, known)
        stamp = about if about.problem else stamp
        is_short = not about.problem and about.size <= MAX_CAPTION_BYTES
        content = (folder / name).read_bytes() if is_short else b""
        texts[os.path.splitext(name)[1]] = decode_text(content)
    return stamp, label_and_caption(texts)


def text_names(image: str, paths: Collection[str]) -> list[str]:
    """Return the names of the texts beside an image.

    Args:
        image: The image's path.
        paths: All paths of the folder.
    """
    names = [os.path.splitext(image)[0] + suffix for suffix in TEXT_SUFFIXES]
    return [name for name in names if name in paths]
