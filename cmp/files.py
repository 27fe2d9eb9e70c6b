"""Atomic writing, locks and hashes of files and folders."""

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from safetensors import SafetensorError

from cmp.errors import CmpError, explain_errors
from cmp.parsing import parse_json, read_text

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
P = ParamSpec("P")

DIGESTS = "SHA256SUMS"
"""The name of a file that lists the sha256 of the files beside it."""
READ_BYTES = 1 << 24
"""Bytes of a file that are hashed at a time."""
PARTIAL_PREFIX = ".cmp-partial-"
"""Prefix of folders in which something is being written."""
SHORT_ID = 12
"""Characters of a run's id that name its folder and are shown to users."""
WEIGHTS = "weights.safetensors"
"""The file of a stored run's final weights, if they were kept."""


def child_path(folder: Path, name: str, suffix: str = "") -> Path:
    """Return the path of a file or folder directly in a folder.

    Args:
        folder: The folder.
        name: Letters, digits, hyphens and underscores.
        suffix: What follows the name, such as ".parquet".

    Raises:
        CmpError: The name has other characters, so the path could lie elsewhere.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}", name):
        raise CmpError(f"{name!r:.60}: not a valid name in {folder}; use letters, digits, - and _")
    return folder / f"{name}{suffix}"


def sync_to_disk(path: Path) -> None:
    """Wait until the content of a file or folder is on the disk, if its file system can do so for
    folders."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(handle)


def make_folder(folder: Path) -> None:
    """Create a folder and its parents if they are missing.

    Raises:
        CmpError: The folder cannot be created.
    """
    with explain_errors(f"{folder}: cannot be created as a folder"):
        folder.mkdir(parents=True, exist_ok=True)


def check_target(target: Path, is_kind: Callable[[int], bool] = stat.S_ISREG) -> None:
    """Raise an error if a target exists and is not of the kind to be written.

    Links are never accepted: replacing one would leave the file behind it unchanged, and following
    it would change a file that nobody named.

    Args:
        target: The file or folder, which may be missing.
        is_kind: Returns whether something with this mode may be replaced.

    Raises:
        CmpError: Something else exists there, or the name is not valid on this disk.
    """
    try:
        mode = os.lstat(target).st_mode
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:  # the name is too long; a NUL in it is a ValueError
        raise CmpError(f"{str(target)!r:.200}: cannot be written ({error})") from error
    if not is_kind(mode):
        raise CmpError(
            f"{target}: already exists as a link, a folder, a device or the like, and is not "
            "replaced; give another name"
        )


def check_new(folder: Path) -> None:
    """Raise `CmpError` if a folder to be written already exists, even as a link to nothing."""
    if os.path.lexists(folder):
        raise CmpError(f"{folder}: already exists; move it away or name a new folder")


def cached_by_file(read: Callable[Concatenate[Path, P], T]) -> Callable[Concatenate[Path, P], T]:
    """Cache what a function reads from a file, its first argument, until the file changes."""

    @functools.lru_cache(maxsize=64)
    def cached(stamp: tuple[int, int] | None, path: Path, *args: P.args, **kwargs: P.kwargs) -> T:
        return read(path, *args, **kwargs)

    @functools.wraps(read)
    def look(path: Path, *args: P.args, **kwargs: P.kwargs) -> T:
        status = path.stat() if path.exists() else None
        stamp = (status.st_mtime_ns, status.st_size) if status else None
        return cached(stamp, path, *args, **kwargs)

    return look


def file_digest(path: Path, progress: Callable[[int], object] = lambda count: None) -> str:
    """Return the sha256 of a file, calling `progress` with the number of bytes of each read."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(READ_BYTES):
            digest.update(piece)
            progress(len(piece))
    return digest.hexdigest()


@contextlib.contextmanager
def report_disk_errors(what: str, kept: str = "nothing was changed") -> Iterator[None]:
    """Turn disk errors, including those of safetensors, into a `CmpError` that says what was
    kept."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CmpError(f"{what} cannot be written ({error}); {kept}") from error


@contextlib.contextmanager
def partial_folder(parent: Path) -> Iterator[Path]:
    """Create a hidden folder to write in, on the same disk as the result, and delete it at the end.

    It is locked while in use. A folder without a lock was left by a killed process; such folders
    are deleted first.

    Args:
        parent: The folder of the result, created if it is missing.
    """
    make_folder(parent)
    delete_leftovers(parent)
    with contextlib.ExitStack() as stack:
        while True:
            folder = Path(tempfile.mkdtemp(dir=parent, prefix=PARTIAL_PREFIX))
            stack.enter_context(lock_folder(folder))
            if folder.exists():  # else another process deleted it before it was locked
                break
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        yield folder


def delete_files(folder: Path, own: Iterable[Path]) -> None:
    """Delete files in a folder, and the folder if nothing else is in it.

    Args:
        folder: The folder.
        own: The files, in the order in which they are deleted.
    """
    with contextlib.suppress(OSError):
        delete_leftovers(folder)
        for path in own:
            path.unlink(missing_ok=True)
        folder.rmdir()


def delete_leftovers(parent: Path) -> None:
    """Delete the partial folders that killed processes left in a folder.

    A folder that `atomic_folder` was about to replace is restored.
    """
    for folder in parent.glob(f"{PARTIAL_PREFIX}*"):
        with lock_folder(folder, wait=False) as is_locked, contextlib.suppress(OSError):
            if is_locked:
                for previous in folder.glob("previous/*"):
                    if (folder / "new").exists() and not (parent / previous.name).exists():
                        os.rename(previous, parent / previous.name)
                shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def lock_folder(folder: Path, wait: bool = True) -> Iterator[bool]:
    """Lock a folder and yield whether that worked; another process may hold the lock, or locks may
    not be supported."""
    handle, is_locked = None, False
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        is_locked = True
    try:
        yield is_locked
    finally:
        if handle is not None:
            os.close(handle)


@contextlib.contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Write a file atomically: whole or not at all.

    Args:
        target: The file. An existing file is replaced; anything else is an error.

    Yields:
        A path to write to. It becomes the target at the end, or is deleted after an error.

    Raises:
        CmpError: Writing failed, or reading what is to be written, and the target is unchanged; or
            see `check_target`.
    """
    check_target(target)
    with report_disk_errors(f"{target}:"), partial_folder(target.parent) as folder:
        partial = folder / target.name
        yield partial
        sync_to_disk(partial)
        os.replace(partial, target)
        sync_to_disk(target.parent)


def write_atomic(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def warn_of_cache() -> Iterator[None]:
    """Warn, but do not fail, if a value cannot be written to the cache."""
    try:
        yield
    except (CmpError, OSError, SafetensorError) as error:
        warnings.warn(f"not cached: {error}", stacklevel=4)


def read_kept(path: Path) -> Any:
    """Return a value that `write_kept` wrote; None if the file is missing or damaged."""
    with contextlib.suppress(OSError, ValueError):
        digest, _, text = read_text(path).partition("\n")
        if digest == hashlib.sha256(text.encode()).hexdigest():
            return parse_json(text)
    return None


def keep_value(path: Path, make: Callable[[], Any]) -> Any:
    """Return a value cached in a file, computing it if the file is missing or damaged.

    If the file cannot be written, a warning says so.

    Args:
        path: The file, see `write_kept`.
        make: Computes the value, which is returned as it comes back from JSON.
    """
    if (kept := read_kept(path)) is not None:
        return kept
    value = make()
    with warn_of_cache():
        write_kept(path, value)
    return json.loads(json.dumps(value))


def write_kept(path: Path, value: Any) -> None:
    """Write a value to a file, as a sha256 followed by the JSON that it belongs to.

    Raises:
        CmpError: The file cannot be written.
    """
    text = json.dumps(value)
    write_atomic(path, f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}")


@contextlib.contextmanager
def atomic_folder(target: Path, replace: bool = True) -> Iterator[Path]:
    """Write a folder atomically: whole or not at all.

    A kill at the very end may leave no folder; `delete_leftovers` then restores the previous one.

    Args:
        target: The folder. An existing folder is replaced; anything else is an error.
        replace: Whether an existing folder is replaced; otherwise it is an error, too.

    Yields:
        An empty folder to fill. It becomes the target at the end, or is deleted after an error.

    Raises:
        CmpError: Writing failed, or reading what is to be written, and the target is unchanged; or
            see `check_target`.
    """
    check_target(target, stat.S_ISDIR)
    if not replace:
        check_new(target)
    with report_disk_errors(f"{target}:"), partial_folder(target.parent) as partial:
        folder, previous = partial / "new", partial / "previous" / target.name
        folder.mkdir()
        previous.parent.mkdir()
        yield folder
        for path in [*folder.rglob("*"), folder]:
            if not path.is_symlink():
                sync_to_disk(path)
        if not replace:
            check_new(target)
        elif target.exists():  # kept aside until the new one is in place
            os.rename(target, previous)
        try:
            os.rename(folder, target)
        except OSError:
            if previous.exists():
                os.rename(previous, target)
            raise
        sync_to_disk(target.parent)


@contextlib.contextmanager
def listed_file(target: Path) -> Iterator[Path]:
    """Write a file as `atomic_file` does, and add its sha256 to the list beside it.

    For a moment the list contains both the old and the new sha256, so that the file never looks
    damaged. `sha256sum --check` can also read the list.
    """
    place = target.with_name(DIGESTS)
    with contextlib.ExitStack() as stack:
        with atomic_file(target) as partial:
            yield partial
            stack.enter_context(lock_folder(target.parent))  # others may write there
            with explain_errors(f"{place}: cannot be read", "; restore or delete it"):
                lines = read_text(place).splitlines() if place.exists() else []
            new, name = f"{file_digest(partial)}  {target.name}", f"  {target.name}"
            write_atomic(place, "\n".join(dict.fromkeys([*lines, new])) + "\n")
        lines = [new, *(line for line in lines if not line.endswith(name))]
        write_atomic(place, "\n".join(sorted(lines, key=lambda line: line[64:])) + "\n")


def tensors_digest(tensors: "Mapping[str, Tensor]") -> str:
    """Return the sha256 of tensors with their names, types and shapes, sorted by name."""
    import torch  # which most commands do not need

    digest = hashlib.sha256()
    for name, x in sorted(tensors.items()):
        digest.update(f"{name} {x.dtype} {list(x.shape)}\n".encode())
        digest.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_tensors(
    tensors: "dict[str, Tensor]", path: Path, header: dict[str, str] | None = None
) -> None:
    """Write a safetensors file with the permissions of any other new file; the library's own keep
    it from other users, whatever the umask.

    Args:
        tensors: The tensors, none of which share memory.
        path: The file.
        header: Texts for its header.
    """
    from safetensors.torch import save_file  # imports torch, which most commands do not need

    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    save_file(tensors, path, header)
    path.chmod(mode)


def write_tensors(tensors: "dict[str, Tensor]", header: dict, folder: Path, name: str) -> Path:
    """Write NAME-HASH.safetensors, where HASH is that of its content, and return its path.

    The file gets its name only once it is complete and on the disk.

    Args:
        tensors: The tensors.
        header: Texts for its header.
        folder: The folder of the file, created if it is missing.
        name: The first part of the file's name.
    """
    places, own = set(), {}
    for key, x in tensors.items():
        x = x.detach().contiguous()
        # one tensor may have two names, but safetensors refuses tensors that share memory
        own[key] = x.clone() if x.data_ptr() in places else x
        places.add(x.data_ptr())
    with partial_folder(folder) as place:
        partial = place / "tensors"
        save_tensors(own, partial, header)
        path = folder / f"{name}-{file_digest(partial)}.safetensors"
        sync_to_disk(partial)
        os.replace(partial, path)
        sync_to_disk(folder)
    return path


def check_digest(path: Path, remedy: str) -> None:
    """Raise `CmpError` unless a file matches its sha256 in the list beside it.

    Args:
        path: The file.
        remedy: What to do about it.
    """
    with explain_errors(f"{path}: cannot be checked", f"; {remedy}"):
        lines = read_text(path.with_name(DIGESTS)).splitlines()
        is_known = f"{file_digest(path)}  {path.name}" in lines
    if not is_known:
        raise CmpError(f"{path}: damaged: does not match its hash in {DIGESTS}; {remedy}")
