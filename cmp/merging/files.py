"""Merge safetensors files tensor by tensor, with only a few tensors in memory."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cmp.errors import CmpError, explain_errors
from cmp.files import atomic_file, check_target, file_digest
from cmp.merging.apply import DTYPE_NAMES, check_models, iter_merged, name_faulty_model
from cmp.merging.rules import MergeOptions, tensor_settings
from cmp.models import PREPROCESSING
from cmp.registry import get_option

DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
MERGE = "merge"
"""The key of a file's metadata that says how it was merged."""
ByteCounter = Callable[[int], object]


class TensorFile(Mapping[str, Tensor]):
    """A safetensors file as a mapping of tensors, each read when it is accessed.

    Attributes:
        path: The file.
        metadata: The text in its header.
        outline: Empty tensors by name, with the shapes and types from the file's header.
    """

    def __init__(self, path: Path, file: Any):
        """Read the header.

        Raises:
            CmpError: A tensor has a type that no rule can merge.
        """
        self.path, self.file = path, file
        self.metadata: dict[str, str] = file.metadata() or {}
        self.outline: dict[str, Tensor] = {}
        for name in sorted(file.keys()):
            header = file.get_slice(name)
            if (kind := header.get_dtype()) not in DTYPES:
                raise CmpError(
                    f"{path}: {name}: {kind} is not supported; convert it to float32 first"
                )
            self.outline[name] = torch.empty((), dtype=DTYPES[kind]).expand(header.get_shape())

    def __getitem__(self, name: str) -> Tensor:
        with explain_errors(f"{self.path}: {name}: cannot be read", "", SafetensorError):
            return self.file.get_tensor(name)

    def __contains__(self, name: object) -> bool:
        return name in self.outline

    def __iter__(self) -> Iterator[str]:
        return iter(self.outline)

    def __len__(self) -> int:
        return len(self.outline)


@contextlib.contextmanager
def open_tensors(path: Path) -> Iterator[TensorFile]:
    """Open a safetensors file; raise `CmpError` if it cannot be read or has tensors of a type that
    no rule can merge."""
    with explain_errors(f"{path}: cannot be read as a safetensors file", "", SafetensorError):
        file = safe_open(path, framework="pt")
    with file:
        yield TensorFile(path, file)


def merge_files(
    rule: str,
    paths: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    base: str | os.PathLike[str] | None = None,
    progress: ByteCounter = lambda count: None,
    **settings: Any,
) -> None:
    """Merge safetensors files into one atomically, recording in its metadata how it was made.

    Args:
        rule: A registered rule.
        paths: The models, newest first.
        out: The file to write. Only an earlier merge is replaced.
        base: The weights before the stream, for rules on task vectors.
        progress: Called with the number of bytes of each read and write.
        **settings: The settings of `cmp.merge`.

    Raises:
        CmpError: See `cmp.merging.apply.merge`; the message names files, and `out` is unchanged.

    Example:
        >>> paths = [folder / "a.safetensors", folder / "b.safetensors"]
        >>> for path in paths:
        ...     save_file({"w": torch.ones(2)}, path)
        >>> cmp.merge_files("interpolation", paths, folder / "merged.safetensors")
    """
    if isinstance(paths, str | os.PathLike):
        raise CmpError(
            f"merge_files: paths: {os.fspath(paths)!r:.200}: give a list of files, newest first"
        )
    parents = [Path(path) for path in (*paths, *([] if base is None else [base]))]
    check_target(out := Path(out))
    if out.exists() and any(path.exists() and out.samefile(path) for path in parents):
        raise CmpError(f"{out}: this is one of the models; write to another file")
    if out.exists() and not _is_merge(out):
        raise CmpError(f"{out}: is not from a merge, and would be lost; write to another file")
    option = get_option("merge_rule", rule)
    options = MergeOptions.make(option, len(paths), **settings)
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(open_tensors(path)) for path in parents]
        start = None if base is None else files[-1]
        models = files[: len(paths)]
        outlines = [file.outline for file in files]
        below = None if base is None else outlines[-1]
        check_models(option, outlines[: len(paths)], below, [str(path) for path in parents])
        hashes = [{"file": p.name, "sha256": file_digest(p, progress)} for p in parents]
        family = {"models": hashes[: len(paths)]} | ({"base": hashes[-1]} if base else {})
        used = {key: getattr(options, key) for key in tensor_settings(option)}
        used |= {"weights": options.weights} if "weight" in option.settings else {}
        used |= {"seed": options.draw[0]} if option.facts["draws"] else {}
        record = {"rule": rule, **family, "settings": used}
        metadata = {"format": "pt", MERGE: json.dumps(record)} | shared_preprocessing(models)
        with (
            name_faulty_model(zip(parents, files, strict=True)),
            atomic_file(out) as partial,
            open(partial, "wb") as file,
        ):
            tensors = iter_merged(option, models, start, options, outline=outlines[0])
            write_safetensors(file, models[0].outline, metadata, tensors, progress)


def _is_merge(path: Path) -> bool:
    """Return whether a file records how it was merged."""
    with contextlib.suppress(CmpError), open_tensors(path) as file:
        return MERGE in file.metadata
    return False


def shared_preprocessing(models: Sequence[TensorFile]) -> dict[str, str]:
    """Return the image preprocessing that the metadata of some models record, if any do.

    Files without this metadata, such as those of open_clip, are compatible with all others.

    Raises:
        CmpError: Two models prepare images differently; the message names both files.
    """
    records = {x.metadata[PREPROCESSING]: x.path for x in models if PREPROCESSING in x.metadata}
    if len(records) > 1:
        (one, first), (other, second), *_ = records.items()
        raise CmpError(
            f"{first} and {second} prepare images differently: {one:.300} and {other:.300}"
        )
    return {PREPROCESSING: next(iter(records))} if records else {}


def write_safetensors(
    file: BinaryIO,
    like: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    tensors: Iterator[tuple[str, Tensor]],
    progress: ByteCounter,
) -> None:
    """Write a safetensors file one tensor at a time.

    Format: the header's length in 8 bytes, the header as JSON padded to a multiple of 8, the data.

    Args:
        file: The file to write to.
        like: Tensors in the same order, with the types and shapes of those to write.
        metadata: Texts for the header.
        tensors: (name, tensor) in that order.
        progress: Called with the number of bytes of each write.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, x in like.items():
        begin, end = end, end + x.nbytes
        header[name] = {
            "dtype": DTYPE_NAMES[x.dtype], "shape": list(x.shape), "data_offsets": [begin, end],
        }  # fmt: skip
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for _, x in tensors:
        file.write(x.cpu().reshape(-1).view(torch.uint8).numpy().data)  # no copy on the CPU
        progress(x.nbytes)
