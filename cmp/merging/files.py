"""Merges of safetensors files: tensor by tensor, in the memory of a few of them."""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cmp.errors import CmpError
from cmp.files import atomic_file
from cmp.merging.apply import NotFiniteError, check_mergeable, iter_merged
from cmp.merging.rules import MergeOptions

READ_BYTES = 1 << 24
"""Bytes of a file that are hashed at once."""
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
Progress = Callable[[int], object]


class TensorFile(Mapping[str, Tensor]):
    """A safetensors file as tensors by name, each read when it is asked for; `CmpError` names the
    file if it cannot be. Metadata of its own are not read."""

    def __init__(self, path: Path, file: Any):
        self.path, self.file = path, file
        self.names = sorted(file.keys())

    def __getitem__(self, name: str) -> Tensor:
        try:
            return self.file.get_tensor(name)
        except SafetensorError as error:
            raise CmpError(f"{self.path}: {name}: cannot be read ({error})") from error

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


@contextlib.contextmanager
def open_tensors(path: Path) -> Iterator[TensorFile]:
    """Open a safetensors file; `CmpError` if it is none."""
    try:
        file = safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise CmpError(f"{path}: no readable safetensors file ({error})") from error
    with file:
        yield TensorFile(path, file)


def merge_files(
    rule: str,
    paths: Sequence[Path],
    out: Path,
    base: Path | None = None,
    how: MergeOptions | None = None,
    settings: Mapping[str, Any] | None = None,
    progress: Progress = lambda count: None,
) -> None:
    """Write the merge of some files, newest first, to `out`, whole or not at all.

    settings: what the metadata say of the rule, beside it and the parents' names and hashes.
    progress: told of bytes as they are hashed and then as they are written, see `work`.
    Raises `CmpError` as `combining.merge` does, naming files; `out` is then as it was.
    """
    everything = [*paths, *([] if base is None else [base])]
    if any(_is_same_file(out, path) for path in everything):
        raise CmpError(f"{out}: is one of the models; write to another file")
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(open_tensors(path)) for path in everything]
        start = None if base is None else files[-1]
        models = files[: len(paths)]
        with _name_faulty_file(models, start):
            check_mergeable(rule, models, start, how, [str(path) for path in everything])
            parents = [{"file": p.name, "sha256": file_digest(p, progress)} for p in everything]
            family = {"models": parents[: len(paths)]} | ({"base": parents[-1]} if base else {})
            record = {"rule": rule, **family, "settings": dict(settings or {})}
            tensors = iter_merged(rule, models, start, how)
            with atomic_file(out) as partial, open(partial, "wb") as file:
                write_safetensors(file, models[0], {"format": "pt", "merge": json.dumps(record)}, tensors,
                      progress)  # fmt: skip


def total_bytes(paths: Sequence[Path]) -> int:
    """How many bytes `progress` will be told of in a merge of these; `CmpError` if one is not
    there."""
    try:
        sizes = [path.stat().st_size for path in paths]
    except OSError as error:
        raise CmpError(f"{error.filename}: cannot be read ({error.strerror})") from error
    return sum(sizes) + sizes[0]


def file_digest(path: Path, progress: Progress = lambda count: None) -> str:
    """sha256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(READ_BYTES):
            digest.update(piece)
            progress(len(piece))
    return digest.hexdigest()


def write_safetensors(
    file: BinaryIO,
    like: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    tensors: Iterator[tuple[str, Tensor]],
    progress: Progress = lambda count: None,
) -> None:
    """Write a safetensors file as its tensors come, in the order, types and shapes of `like`.

    The format: the header's length in 8 bytes, the header as JSON that is padded to 8, the data.
    `CmpError` names a tensor of a type that is not taken.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in like:
        x = like[name]
        if x.dtype not in DTYPE_NAMES:
            raise CmpError(f"{name}: {x.dtype} is not taken; convert it to float32 first")
        begin, end = end, end + x.numel() * x.element_size()
        header[name] = {
            "dtype": DTYPE_NAMES[x.dtype], "shape": list(x.shape), "data_offsets": [begin, end],
        }  # fmt: skip
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for _, x in tensors:
        file.write(x.reshape(-1).view(torch.uint8).numpy().data)
        progress(x.numel() * x.element_size())


def _is_same_file(one: Path, other: Path) -> bool:
    """Whether two paths lead to one file."""
    return one.exists() and other.exists() and one.samefile(other)


@contextlib.contextmanager
def _name_faulty_file(models: Sequence[TensorFile], base: TensorFile | None) -> Iterator[None]:
    """Say which file it is that holds what is not finite."""
    try:
        yield
    except NotFiniteError as error:
        for file in [*models, *([base] if base else [])]:
            if not file[error.name].isfinite().all():
                raise CmpError(f"{file.path}: {error}") from error
        raise
