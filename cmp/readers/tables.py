"""A folder a class, as torchvision's ImageFolder; with or without a folder a split above."""

import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cmp.errors import CmpError
from cmp.readers.index import (
    SPLIT_NAMES,
    Fault,
    FileStore,
    ImageIndex,
    ImageStore,
    MemoryStore,
    RowCollector,
    build_index,
)
from cmp.readers.manifest import FileSet

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")


def walk_files(folder: Path, prefix: str = "") -> Iterator[tuple[str, int]]:
    """(path relative to `folder`, bytes) of all files below it, sorted; hidden ones are left out,
    and links to folders are not followed."""
    with os.scandir(folder) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    for entry in found:
        if entry.name.startswith("."):
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from walk_files(Path(entry.path), f"{prefix}{entry.name}/")
        elif entry.is_file():
            yield f"{prefix}{entry.name}", entry.stat().st_size


def split_folders(folder: Path) -> dict[str, Path]:
    """The folders of splits, if all folders in this one are such; else none."""
    inside = sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")
    all_splits = bool(inside) and all(path.name.lower() in SPLIT_NAMES for path in inside)
    return {path.name: path for path in inside} if all_splits else {}


def read_folder(dataset: FileSet, root: Path) -> ImageIndex:
    """The images of a folder; the class is the name of the folder right above the split's or the
    set's, with "_" for a space."""
    folder = root / dataset.reader.path
    if not folder.is_dir():
        raise CmpError(f"{dataset.name}: reader.path: {folder} is no folder")
    rows, faults = RowCollector(), []
    tops = split_folders(folder) or {"": folder}
    seen: dict[str, int] = {}
    for name, top in tops.items():
        for each in sorted(path.name for path in top.iterdir() if path.is_dir()):
            if each[0] != ".":
                seen.setdefault(each, 0)
        for path, size in walk_files(top):
            label, slash, _ = path.partition("/")
            if slash and path.lower().endswith(IMAGE_SUFFIXES):
                seen[label] = seen.get(label, 0) + 1
                source = f"{name}/{path}" if name else path
                rows.add(source, size, name, label.replace("_", " "), None)
    faults += [Fault("class without images", label) for label, count in seen.items() if not count]
    return build_index(dataset, rows, FileStore(folder, rows.source), faults)


def file_sizes(root: Path, names: list[str]) -> list[int]:
    """Bytes of each file, -1 where there is none."""

    @functools.cache
    def size(name: str) -> int:
        try:
            return os.stat(root / name).st_size if name else -1
        except (OSError, ValueError):
            return -1

    return [size(name) for name in names]


def read_table_files(dataset: FileSet, root: Path) -> ImageIndex:
    """The images of a CSV, TSV or Parquet file, or of several by a pattern."""
    files = sorted(root.glob(dataset.reader.path))
    if not files:
        raise CmpError(f"{dataset.name}: reader.path: there is no {root / dataset.reader.path}")
    try:
        if dataset.reader.kind == "csv":
            return read_frame(dataset, pd.concat([_csv(file) for file in files]), root)
        return _parquet(dataset, files, root)
    except (OSError, ValueError, pa.ArrowException, LookupError) as error:
        raise CmpError(f"{dataset.name}: {files[0]}: cannot be read ({error})") from error


def _csv(file: Path) -> pd.DataFrame:
    separator = "\t" if file.suffix == ".tsv" else ","
    return pd.read_csv(file, sep=separator, dtype=str, keep_default_na=False)


def read_frame(dataset: FileSet, frame: pd.DataFrame, root: Path = Path()) -> ImageIndex:
    """The images of a frame whose columns the manifest names; the image is a path, or the bytes of
    a file."""
    image = read_column(dataset, frame, "image")
    if len(image) and isinstance(image[0], bytes):
        names = [f"row {place}" for place in range(len(image))]
        store, size = MemoryStore(image), [len(x) if isinstance(x, bytes) else -1 for x in image]
    else:
        names = [name if isinstance(name, str) else "" for name in image]
        store, size = FileStore(root, names), file_sizes(root, names)
    return _index_frame(dataset, frame, names, size, store)


def read_column(dataset: FileSet, frame: pd.DataFrame, key: str) -> list | None:
    """The values of the column that the manifest names by `key`; none where it names none or,
    as nothing is lost, where a default is missing. `CmpError` for another that is missing."""
    name = getattr(dataset.reader, key)
    if name in frame:
        return frame[name].tolist()
    optional = key != "image" and key not in dataset.reader.model_fields_set
    if name is None or optional:
        return None
    raise CmpError(
        f"{dataset.name}: reader.{key}: no column {name!r}; there are {', '.join(map(str, frame))}"
    )


def _index_frame(
    dataset: FileSet, frame: pd.DataFrame, names: list[str], size: list[int], store: ImageStore
) -> ImageIndex:
    label, split = (read_column(dataset, frame, key) for key in ("label", "split"))
    captions = read_column(dataset, frame, "caption")
    if captions is None and label is None:
        raise CmpError(f"{dataset.name}: reader: name a column of captions or of labels")
    nothing = [""] * len(names)
    rows = RowCollector(
        [name or f"row {place}" for place, name in enumerate(names)],
        size,
        nothing if split is None else [_label_text(each) for each in split],
        nothing if label is None else [_label_text(each) for each in label],
        [None] * len(names) if captions is None else [_caption_value(each) for each in captions],
    )
    return build_index(dataset, rows, store, [])


def _label_text(value: object) -> str:
    """A label or a split: texts and whole numbers have one."""
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    return value.strip() if isinstance(value, str) else str(value) if whole else ""


def _caption_value(value: object) -> object:
    """A value of a column of captions; one that pandas has for nothing is no caption, either."""
    return value if isinstance(value, str | list | tuple | np.ndarray) else 0


@dataclass(frozen=True)
class RowGroupStore:
    """Images as bytes in a column of Parquet files, read by row group.

    field: the column; of a struct, its `bytes`. file, group, row: [N], where each image is.
    """

    files: list[Path]
    field: str
    file: np.ndarray
    group: np.ndarray
    row: np.ndarray

    def read(self, place: int) -> bytes:
        """See `Store`."""
        column = _row_group(self.files[self.file[place]], int(self.group[place]), self.field)
        found = column[int(self.row[place])].as_py()
        if not isinstance(found, bytes):
            raise ValueError("holds no bytes")
        return found


@functools.lru_cache(maxsize=4)
def _row_group(file: Path, group: int, name: str) -> pa.ChunkedArray:
    return _byte_column(pq.ParquetFile(file).read_row_group(group, columns=[name])[name])


def _byte_column(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column of bytes, from one of bytes or of structs that hold them, as of `datasets`."""
    if pa.types.is_struct(column.type):
        field = column.type.get_field_index("bytes")
        column = pa.chunked_array([chunk.field(field) for chunk in column.chunks])
    return column


def _parquet(dataset: FileSet, files: list[Path], root: Path) -> ImageIndex:
    name = dataset.reader.image
    wanted = {getattr(dataset.reader, key) for key in ("image", "caption", "label", "split")}
    opened = [pq.ParquetFile(file) for file in files]
    schema = opened[0].schema_arrow
    at = schema.get_field_index(name)
    if at < 0 or pa.types.is_string(schema.types[at]) or pa.types.is_large_string(schema.types[at]):
        columns = [each for each in schema.names if each in wanted]
        parts = [file.read(columns=columns).to_pandas() for file in opened]
        return read_frame(dataset, pd.concat(parts), root)
    others, size, where = [], [], []
    for number, file in enumerate(opened):
        rest = [each for each in schema.names if each in wanted - {name}]
        others.append(file.read(columns=rest).to_pandas())
        for group in range(file.num_row_groups):  # bytes are looked at group by group, not kept
            contents = _byte_column(file.read_row_group(group, columns=[name])[name])
            lengths = pc.binary_length(contents).fill_null(-1).to_pylist()
            size += lengths
            where += [(number, group, row) for row in range(len(lengths))]
    places = np.array(where, np.int64).reshape(-1, 3)
    store = RowGroupStore(files, name, places[:, 0], places[:, 1], places[:, 2])
    names = [f"{files[number].name} row {row}" for row, (number, _, _) in enumerate(where)]
    return _index_frame(dataset, pd.concat(others), names, size, store)
