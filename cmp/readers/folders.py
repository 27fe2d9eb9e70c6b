"""Read images in one folder per class, as in torchvision's ImageFolder."""

import contextlib
import functools
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from cmp.errors import CmpError
from cmp.readers.files import (
    NoFilesError,
    exists,
    file_stamp,
    is_inside,
    note_folder,
    read_file,
)
from cmp.readers.index import (
    IMAGE_SUFFIXES,
    NO_IMAGE_NAME,
    SPLIT_NAMES,
    Fault,
    ImageIndex,
    Row,
    build_index,
)
from cmp.readers.manifest import FileSet

LOOKED_AT = 10_000
"""Files to inspect to see whether a folder outside the manifest's contains images."""
SYSTEM_FILES = ("thumbs.db", "desktop.ini")
"""Files that Windows puts into folders of images, in lower case. Those of macOS are hidden."""
BESIDE_PICTURE = "text beside an image; use `kind: pairs` to read it as a caption"
"""The kind of fault for img2dataset's format read as one folder per class."""
NO_CLASS = "image outside a class folder"


def walk_files(folder: Path | str) -> Iterator[str]:
    """Yield the paths in a folder of all files below it, sorted, without hidden ones or those of
    `SYSTEM_FILES`, and without following links."""
    waiting = [(os.fspath(folder), "", True)]  # the next one last; folders may be deep
    while waiting:
        path, name, is_folder = waiting.pop()
        if not is_folder:
            yield name
            continue
        note_folder(path)
        visible = [
            entry for entry in os.scandir(path)
            if not entry.name.startswith(".") and entry.name.lower() not in SYSTEM_FILES
        ]  # fmt: skip
        for entry in sorted(visible, key=lambda entry: entry.name, reverse=True):
            is_inner = entry.is_dir(follow_symlinks=False)
            waiting.append((entry.path, f"{name}{entry.name}{'/' * is_inner}", is_inner))


def visible_folders(folder: Path) -> list[Path]:
    """Return the folders directly inside a folder, sorted, without hidden ones."""
    note_folder(folder)
    return sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")


def split_folders(folder: Path) -> list[Path]:
    """Return the folders directly inside a folder if all, or several, have names of splits.

    A single one among others is a class, such as trains.
    """
    inside = visible_folders(folder)
    known = [path for path in inside if path.name.lower() in SPLIT_NAMES]
    return inside if known == inside or len(known) > 1 else []


def is_picture_name(path: str) -> bool:
    """Return whether a file has the ending of an image."""
    return path.lower().endswith(IMAGE_SUFFIXES)


def undescribed_folders(folder: Path, located: Sequence[tuple[FileSet, Path]]) -> list[Path]:
    """Return the folders of images that no manifest describes, though others beside them have one:
    their images are not read.

    Args:
        folder: The folder of a collection.
        located: Its manifests, each with the folder that its paths start from.
    """
    used = [Path(os.path.normpath(root / dataset.reader.path)) for dataset, root in located]
    used += [root for _, root in located]
    unread = []
    for path in visible_folders(folder) if folder not in used else ():
        if any(path.is_relative_to(each) or each.is_relative_to(path) for each in used):
            continue
        with contextlib.suppress(PermissionError):  # such as lost+found
            if any(is_picture_name(name) for name in walk_files(path)):
                unread.append(path)
    return unread


def pictures_folder(
    dataset: FileSet, root: Path, companions: tuple[str, ...] = ()
) -> tuple[Path, bool]:
    """Return the folder of a dataset's images, and whether it is outside its manifest's folder.

    A manifest may come from anyone, and messages reveal file names. So a folder elsewhere is
    accepted only if most of its files are images, and no other file in it is named.

    Args:
        dataset: The manifest.
        root: The manifest's folder.
        companions: Endings of files that may be beside images.

    Raises:
        NoFilesError: There is no such folder, or it is elsewhere and contains no images.
        CmpError: It is elsewhere and does not contain mostly images.
    """
    folder = root / dataset.reader.path
    if not exists(folder) or not folder.is_dir():
        raise NoFilesError(f"{dataset.name}: reader.path: {folder} is not a folder")
    if is_inside(folder, root):
        return folder, False
    pictures = strangers = 0
    what = f"{dataset.name}: reader.path: {folder} is outside the manifest's folder"
    try:
        for path in itertools.islice(walk_files(folder), LOOKED_AT):
            is_picture = is_picture_name(path)
            pictures += is_picture
            strangers += not (is_picture or path.lower().endswith(companions))
    except OSError as error:  # its message would name a file
        raise CmpError(f"{what} and cannot be read ({error.strerror})") from None
    if not pictures or strangers > pictures:
        kind = CmpError if pictures else NoFilesError
        raise kind(
            f"{what}, and only {pictures} of its first {pictures + strangers} files have names of "
            "images; give a folder that contains only images"
        )
    return folder, True


def read_folder(dataset: FileSet, root: Path) -> ImageIndex:
    """Index the images of a folder.

    The class of an image is the name of its top folder, with a space for "_" and for any row of
    spaces. If top folders have names of splits, see `split_folders`, classes are the folders inside
    them.

    Args:
        dataset: A manifest whose reader is a `FolderReader`.
        root: The folder that its path starts from.

    Returns:
        The index. Faults are classes without images, other files in a class folder, and images
        outside class folders.

    Raises:
        CmpError: There is no such folder; see also `pictures_folder`.
    """
    folder, is_foreign = pictures_folder(dataset, root)
    rows, faults, classes, used = [], [], {}, set()
    known: dict[str, bool] = {}
    splits = split_folders(folder)
    for top in splits or [folder]:
        split = top.name if splits else ""
        for class_folder in visible_folders(top):
            if class_folder.is_symlink():
                name = "" if is_foreign else class_folder.name
                faults.append(Fault("link to a folder, which is not followed; copy it here", name))
            else:
                classes[class_folder.name] = None
        paths = list(walk_files(top))
        stems = {os.path.splitext(path)[0] for path in paths if is_picture_name(path)}
        for path in paths:
            label, slash, _ = path.partition("/")
            source = f"{split}/{path}" if split else path
            is_picture = is_picture_name(path)
            if slash and is_picture:
                used.add(label)
                name = " ".join(label.replace("_", " ").split())
                rows.append(Row(source, file_stamp(folder, source, known), split, name, None))
            elif is_picture:
                faults.append(Fault(NO_CLASS, source))
            elif slash:
                is_text = path.endswith((".txt", ".json")) and os.path.splitext(path)[0] in stems
                kind = BESIDE_PICTURE if is_text else NO_IMAGE_NAME
                faults.append(Fault(kind, "" if is_foreign else source))
    empty = ["" if is_foreign else label for label in classes if label not in used]
    faults += [Fault("class without images", label) for label in empty]
    read = functools.partial(read_file, folder, [row.source for row in rows])
    return build_index(dataset, rows, read, faults)
