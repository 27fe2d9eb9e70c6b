"""Check image files without reading them, note which were looked at, and read their bytes."""

import contextlib
import contextvars
import errno
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cmp.errors import CmpError

FILE_ERRORS = {errno.ENOENT, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG}
"""Errors of the system about the file itself. Errors of the disk or the network may pass, and a
lack of permission may be another user's."""


APPLE_DOUBLE = "._"
"""How the names of files begin that a Mac writes beside others, for their metadata, on file systems
of other kinds."""


class NoFilesError(CmpError):
    """An error for a dataset without any files: its folder, table or tars do not exist, or no image
    that it lists does."""


class Stamp(NamedTuple):
    """What is known about a file without reading it.

    Attributes:
        size: The size in bytes, or -1 if there is no file.
        changed: The time of the last change, or another number that changes with the file.
        problem: Why the file must not be read, as the kind of a fault.
    """

    size: int
    changed: int = 0
    problem: str = ""


FileTimes = dict[str, dict[str, tuple[int, int]]]
"""Folder -> name -> size and time of the last change; "." is the folder itself."""
_noted: contextvars.ContextVar[FileTimes | None] = contextvars.ContextVar("noted", default=None)


@contextlib.contextmanager
def note_files() -> Iterator[FileTimes]:
    """Yield a dict in which readers note the files and folders that they look at within it."""
    noted: FileTimes = {}
    token = _noted.set(noted)
    try:
        yield noted
    finally:
        _noted.reset(token)


def note_file(folder: str, name: str, status: os.stat_result) -> None:
    """Note a file, if `note_files` is in use."""
    if (noted := _noted.get()) is not None:
        noted.setdefault(folder, {})[name] = (status.st_size, status.st_ctime_ns)


def note_path(path: Path) -> None:
    """Note a file by its path, see `note_file`."""
    note_file(str(path.parent), path.name, path.stat())


def note_folder(folder: Path | str) -> None:
    """Note a folder, which changes when something in it is added, renamed or removed."""
    note_file(os.fspath(folder), ".", os.stat(folder))


def have_changed(noted: FileTimes) -> bool:
    """Return whether one of the noted files or folders has changed or is gone.

    Names are relative to an open folder, which is faster: 100,000 files take 0.3 s, a twelfth of
    the time for listing them again.
    """
    try:
        for folder, times in noted.items():
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                for name, known in times.items():
                    status = os.stat(name, dir_fd=handle)
                    if (status.st_size, status.st_ctime_ns) != known:
                        return True
            finally:
                os.close(handle)
    except OSError:
        return True
    return False


def exists(path: Path | str) -> bool:
    """Return whether there is a file or folder at a path. `os.path.exists` also returns False where
    the disk fails.

    Raises:
        OSError: This cannot be known, as where the disk fails.
    """
    try:
        os.stat(path)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            raise
        return False
    return True


NO_FILE = Stamp(-1, problem="missing file")
OUTSIDE = Stamp(
    -1, problem="path outside the dataset's folder; copy the image into it, or put the table and "
    "its manifest into a folder above all images",
)  # fmt: skip
LINK = Stamp(-1, problem="link to a file outside the dataset's folder; copy the file into it")


def is_inside(path: Path | str, folder: Path | str) -> bool:
    """Return whether a path is a folder or inside it, after following all links."""
    real = os.path.realpath(folder)
    return os.path.commonpath([real, os.path.realpath(path)]) == real


def file_stamp(root: Path, name: str, known: dict[str, bool]) -> Stamp:
    """Return what is known about a file in a folder, without reading it.

    A file that is overwritten at the same size and with its old time also counts as changed.

    Args:
        root: The folder. Nothing outside it is accessed, not even through links.
        name: The file's path, relative to the folder or including it.
        known: A cache, filled in here: whether subfolders are inside the folder after following
            links.

    Raises:
        OSError: Nothing is known, as where the disk fails.
    """
    inside = name.removeprefix(f"{root}/") if os.path.isabs(name) else name
    if inside.startswith("/") or ".." in inside.split("/"):
        return OUTSIDE
    path = os.path.join(root, inside or ".")
    try:
        folder, status = os.path.dirname(path), os.lstat(path)
        if folder not in known:
            known[folder] = is_inside(folder, root)
        is_link = stat.S_ISLNK(status.st_mode)
        if not known[folder] or (is_link and not is_inside(path, root)):
            _note_absence(root, path)
            return LINK
        status = os.stat(path) if is_link else status
    except (OSError, ValueError) as error:  # a NUL or a surrogate in the name
        if isinstance(error, OSError) and error.errno not in FILE_ERRORS:
            raise
        _note_absence(root, path)
        return NO_FILE
    if not stat.S_ISREG(status.st_mode):
        _note_absence(root, path)
        return NO_FILE._replace(problem="not a regular file")
    note_file(folder, os.path.basename(path), status)
    return Stamp(status.st_size, status.st_ctime_ns)


def _note_absence(root: Path, path: str) -> None:
    """Note the folder in which a file that cannot be read may arrive: the nearest in the root."""
    for folder in Path(path).parents:
        if os.path.isdir(folder) and is_inside(folder, root):
            note_folder(folder)
            return


ReadImage = Callable[[int], bytes]
"""A function that returns the file of an image, given its position among those that a reader found,
or raises `OSError` or `ValueError`. It must be picklable, so it cannot be a nested function."""


def read_file(root: Path, names: list[str], position: int) -> bytes:
    """Return the content of one of several files.

    Args:
        root: The folder that relative paths start from.
        names: The paths of the files.
        position: The index of the image.
    """
    return (root / names[position]).read_bytes()


def read_span(files: list[Path], spans: np.ndarray, position: int) -> bytes:
    """Return one of the images stored uncompressed inside larger files, such as tars.

    Args:
        files: The larger files.
        spans: int64 [N, 3]: for each image, the index of its file, and its offset and size in
            bytes.
        position: The index of the image.
    """
    number, offset, size = map(int, spans[position])
    with files[number].open("rb", buffering=0) as file:
        return os.pread(file.fileno(), size, offset)
