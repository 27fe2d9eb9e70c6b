"""Checked reading of YAML, JSON, records and tables, and atomic writing of files and folders."""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import yaml
from safetensors import SafetensorError

from cmp.errors import CmpError, clean_text, explain_errors

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

T = TypeVar("T")
DIGESTS = "SHA256SUMS"
"""The name of a file that lists the sha256 of the files beside it."""
MAX_TEXT_BYTES, MAX_YAML_BYTES = 2**30, 2**24
"""Size limits for text in general, such as a list of images, and for YAML, which is written by
hand."""
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


class _StrictLoader(yaml.SafeLoader):
    """A safe YAML loader that rejects aliases and repeated keys. As in YAML 1.2, whatever JSON
    could not read is text: 1e-3 is a number, but yes, 010, 1:30 and 2026-01-15 are texts."""

    yaml_implicit_resolvers: ClassVar[dict[str, list[tuple[str, re.Pattern[str]]]]] = {}

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):  # it could expand to endless or huge values
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError("aliases are not allowed; write the value out", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        counts = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if repeated := [key for key, count in counts.items() if count > 1]:
            raise yaml.MarkedYAMLError(f"{repeated[0]!r} is given twice", node.start_mark)
        mapping = super().construct_mapping(node, deep)
        if len(mapping) < len(node.value):  # such as 5 and +5
            raise yaml.MarkedYAMLError("two keys are the same number", node.start_mark)
        return mapping

    def construct_scalar(self, node: Any) -> Any:
        # JSON writes a character beyond 16 bits as two escapes, and PyYAML reads each by itself
        return super().construct_scalar(node).encode(*_UTF_16).decode(*_UTF_16)


_UTF_16 = "utf-16-le", "surrogatepass"
_WHOLE = r"(0|[1-9][0-9]*)"
for _tag, _form, _begin in (
    ("null", r"(~|null|Null|NULL|)", "~nN"),
    ("bool", r"(true|True|TRUE|false|False|FALSE)", "tTfF"),
    ("int", rf"[-+]?{_WHOLE}", "-+0123456789"),
    ("float", rf"[-+]?({_WHOLE}(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+."),
):
    _StrictLoader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_form})$"), ["", *_begin]
    )


def _construct_number(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int | float:
    """Return a number; PyYAML's own functions also read the forms of YAML 1.1 where a tag is
    given."""
    text = loader.construct_scalar(node).lower()
    return int(text) if node.tag.endswith("int") else float(re.sub(r"\.(?=inf|nan)", "", text))


for _tag in ("int", "float"):
    _StrictLoader.add_constructor(f"tag:yaml.org,2002:{_tag}", _construct_number)


def parse_yaml(text: str) -> Any:
    """Return the value of a YAML text.

    Raises:
        ValueError: The text is not valid, or its value cannot be represented in JSON.
    """
    try:
        value = yaml.load(text, _StrictLoader)
        json.dumps(value)  # rejects dates, bytes, sets and integers too long to print
    except (yaml.YAMLError, RecursionError, TypeError) as error:
        raise ValueError(str(error)) from error
    except (ArithmeticError, AttributeError, LookupError) as error:  # from `!!bool maybe`
        raise ValueError(f"a value does not match its tag or form ({error!r})") from error
    return value


def parse_record(text: str, kind: type[T]) -> T:
    """Return a JSON text as an instance of a pydantic dataclass.

    Raises:
        ValueError: The text does not fit the class; the message names the key.
    """
    from pydantic import TypeAdapter, ValidationError  # slow to import

    try:
        return TypeAdapter(kind).validate_json(text)
    except ValidationError as error:
        key, fault = first_fault(error)
        raise ValueError(f"{key or '(whole file)'}: {fault['msg']}") from error


def refuse_later(tree: Any, key: str, known: int, path: Path) -> None:
    """Raise `CmpError` if a later version of this package wrote a record, which may then have keys
    that are unknown here.

    Args:
        tree: The record, with the machine that wrote it as "provenance" or "machine".
        key: Its key with the version of its format.
        known: The latest such version that this package reads.
        path: Its file.
    """
    number = tree.get(key) if isinstance(tree, dict) else None
    if type(number) is not int or number <= known:
        return
    machine = tree.get("provenance", tree.get("machine"))
    version = machine.get("cmp") if isinstance(machine, dict) else None
    wanted = f"cmp {clean_text(version):.40}" if isinstance(version, str) else "the latest cmp"
    raise CmpError(
        f"{path}: {key}: {number}: a newer version of cmp wrote this file; yours reads {key} "
        f"{known} at most; install {wanted}"
    )


def first_fault(error: Any) -> tuple[str, dict[str, Any]]:
    """Return the dotted key ("" for the whole record) and the entry of a fault that pydantic found.
    A misspelt key comes first, since it can also cause a "missing" fault."""
    fault = min(error.errors(), key=lambda fault: fault["type"] != "extra_forbidden")
    return ".".join(map(str, fault["loc"])), fault


def sync_to_disk(path: Path) -> None:
    """Wait until the content of a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
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


def check_held_files(folder: Path, names: Collection[str]) -> None:
    """Raise an error if replacing a folder would delete other files.

    Args:
        folder: The folder, which may be missing.
        names: The names of the files that may be replaced; folders and links may not.

    Raises:
        CmpError: The folder contains something else, which would be lost.
    """
    held = folder.iterdir() if folder.is_dir() else ()
    others = [
        path.name for path in held
        if path.name not in names or path.is_symlink() or not path.is_file()
    ]  # fmt: skip
    if others:
        raise CmpError(
            f"{folder}: contains {min(others)!r}, which would be lost; name a new folder"
        )


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


def delete_folder(folder: Path, own: Iterable[Path]) -> None:
    """Delete a folder and its own files; if it contains other files, keep them and warn.

    Args:
        folder: The folder.
        own: The files in it that may be deleted.
    """
    own = [*own]
    with contextlib.suppress(OSError):
        delete_leftovers(folder)
        for path in own:
            path.unlink(missing_ok=True)
        folder.rmdir()
    others = sorted(path.name for path in folder.glob("*") if path not in own)
    if others:
        names = ", ".join(others[:3] if len(others) <= 3 else [*others[:3], "..."])
        message = (
            f"{folder}: kept, since it contains files that cmpt did not write ({names}); move or "
            "delete it"
        )
        warnings.warn(message, stacklevel=3)


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
def _name_other_files(target: Path, partial: Path) -> Iterator[None]:
    """Turn the error of a file that is elsewhere, such as one to be copied that is missing, into a
    `CmpError` that names it, since the target could be written.

    Args:
        target: The file or folder to be written.
        partial: The folder in which it is written.
    """
    try:
        yield
    except OSError as error:
        given = (error.filename, error.filename2)
        names = [os.fsdecode(x) for x in given if isinstance(x, str | bytes | os.PathLike)]
        places = [Path(os.path.realpath(name)) for name in names]
        ends = [Path(os.path.realpath(path)) for path in (target, target.parent)]
        inside = os.path.realpath(partial)
        # of a full disk, the error has both names of a copy, or none
        if not names or any(x in ends or x.is_relative_to(inside) for x in places):
            raise
        raise CmpError(
            f"{names[0]}: {error.strerror}, so {target} was not written; nothing was changed"
        ) from error


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
        with _name_other_files(target, folder):
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
        with _name_other_files(target, partial):
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
                lines = place.read_text(encoding="utf-8").splitlines() if place.exists() else []
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


def write_tensors(tensors: "dict[str, Tensor]", header: dict, folder: Path, name: str) -> Path:
    """Write NAME-HASH.safetensors, where HASH is that of its content, and return its path.

    The file gets its name only once it is complete and on the disk.

    Args:
        tensors: The tensors.
        header: Texts for its header.
        folder: The folder of the file, created if it is missing.
        name: The first part of the file's name.
    """
    from safetensors.torch import save_file  # imports torch, which most commands do not need

    places, own = set(), {}
    for key, x in tensors.items():
        x = x.detach().contiguous()
        # one tensor may have two names, but safetensors refuses tensors that share memory
        own[key] = x.clone() if x.data_ptr() in places else x
        places.add(x.data_ptr())
    with partial_folder(folder) as place:
        partial = place / "tensors"
        save_file(own, partial, header)
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
        lines = path.with_name(DIGESTS).read_text(encoding="utf-8").splitlines()
        is_known = f"{file_digest(path)}  {path.name}" in lines
    if not is_known:
        raise CmpError(f"{path}: damaged: does not match its hash in {DIGESTS}; {remedy}")


def check_record(tree: Any, kind: type[T], source: str, remedy: str = "") -> T:
    """Return a tree of keys as a pydantic dataclass, or as a tuple or dict of them.

    Args:
        tree: The tree.
        kind: The class that it must fit.
        source: The beginning of error messages, before the key.
        remedy: The end of error messages.

    Raises:
        CmpError: The tree does not fit.
    """
    try:
        return parse_record(json.dumps(tree), kind)
    except (TypeError, ValueError) as error:
        raise CmpError(f"{source}{error}{remedy}") from error


def read_text(path: Path, limit: int = MAX_TEXT_BYTES) -> str:
    """Return the text of a file.

    Args:
        path: A regular file, since a pipe or a device may never end.
        limit: The largest size allowed, in bytes.

    Raises:
        OSError: The file cannot be read.
        ValueError: The file is not a regular file, is too large, or is not UTF-8.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode) or status.st_size > limit:
        raise ValueError(f"not a regular file of at most {limit:,} bytes")
    return path.read_text(encoding="utf-8")


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the tree of keys in a YAML file.

    Raises:
        CmpError: The file cannot be read, or has no keys at the top level.
    """
    try:
        text = read_text(path, MAX_YAML_BYTES)
    except FileNotFoundError as error:
        raise CmpError(f"{path}: no such file") from error
    except (OSError, ValueError) as error:
        raise CmpError(f"{path}: cannot be read ({error})") from error
    try:
        tree = parse_yaml(text)
    except ValueError as error:
        raise CmpError(f"{path}: {_explain_yaml(error)}") from error
    if not isinstance(tree, dict):
        raise CmpError(f"{path}: expected YAML with keys at the top level")
    return tree


def _explain_yaml(error: ValueError) -> str:
    """Return a line that says what in a YAML text is invalid, and where."""
    words, cause = " ".join(str(error).split()), error.__cause__
    if isinstance(cause, yaml.MarkedYAMLError):
        mark = cause.problem_mark or cause.context_mark
        words = cause.problem or cause.context
        words = f"line {mark.line + 1}: {words}" if mark else words
    return f"cannot be read as YAML ({words})"


def parse_json(text: str) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: The text is not JSON or is nested too deeply, or an object has a key twice.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique_keys)
    except RecursionError as error:
        raise ValueError(str(error)) from error


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object as a dict; Python itself would silently keep the last value of a
    repeated key."""
    counts = Counter(key for key, _ in pairs)
    if len(counts) < len(pairs):
        raise ValueError(f"{max(counts, key=counts.__getitem__)!r} is given twice")
    return dict(pairs)


def read_table(
    path: Path, columns: Mapping[str, type], optional: Mapping[str, type] | None = None
) -> "pd.DataFrame":
    """Return the table of a parquet file.

    Args:
        path: The file.
        columns: The type of each required column: str, int, float, list for anything, or
            `pd.Categorical` for long texts that repeat, to store each only once.
        optional: The same for columns that may be missing.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not a table, or lacks a column.
    """
    import pandas as pd  # takes half a second to import, and most commands read no table
    import pyarrow
    from pandas.api import types

    checks: dict[Any, Callable[[Any], bool]] = {
        str: types.is_string_dtype,
        int: types.is_integer_dtype,
        float: types.is_numeric_dtype,
        pd.Categorical: pd.CategoricalDtype.is_dtype,
    }
    repeated = [name for name, kind in columns.items() if kind is pd.Categorical]
    try:
        table = pd.read_parquet(path, read_dictionary=repeated)
    except (pyarrow.ArrowException, LookupError, MemoryError, TypeError) as error:
        raise ValueError(f"{path.name}: cannot be read as a table ({error!r:.200})") from error
    held = {name: kind for name, kind in (optional or {}).items() if name in table}
    for name, kind in {**columns, **held}.items():
        if [*table].count(name) != 1 or (kind in checks and not checks[kind](table[name])):
            raise ValueError(f"{path.name}: {name}: must be one column of {kind.__name__}")
    return table
