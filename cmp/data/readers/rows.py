"""A row an image: CSV and TSV as open_clip takes them, Parquet, and a pandas frame in memory."""

import functools
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cmp.data.filesets import FileSet
from cmp.data.readers.index import Index, Memory, Paths, Rows, Store, index
from cmp.errors import CmpError


def sizes(root: Path, names: list[str]) -> list[int]:
    """Bytes of each file, -1 where there is none."""

    @functools.cache
    def size(name: str) -> int:
        try:
            return os.stat(root / name).st_size if name else -1
        except (OSError, ValueError):
            return -1

    return [size(name) for name in names]


def read(dataset: FileSet, root: Path) -> Index:
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


def read_frame(dataset: FileSet, frame: pd.DataFrame, root: Path = Path()) -> Index:
    """The images of a frame whose columns the manifest names; the image is a path, or the bytes of
    a file."""
    image = column(dataset, frame, "image")
    if len(image) and isinstance(image[0], bytes):
        names = [f"row {place}" for place in range(len(image))]
        store, size = Memory(image), [len(x) if isinstance(x, bytes) else -1 for x in image]
    else:
        names = [name if isinstance(name, str) else "" for name in image]
        store, size = Paths(root, names), sizes(root, names)
    return _index(dataset, frame, names, size, store)


def column(dataset: FileSet, frame: pd.DataFrame, key: str) -> list | None:
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


def _index(
    dataset: FileSet, frame: pd.DataFrame, names: list[str], size: list[int], store: Store
) -> Index:
    label, split = (column(dataset, frame, key) for key in ("label", "split"))
    captions = column(dataset, frame, "caption")
    if captions is None and label is None:
        raise CmpError(f"{dataset.name}: reader: name a column of captions or of labels")
    nothing = [""] * len(names)
    rows = Rows(
        [name or f"row {place}" for place, name in enumerate(names)],
        size,
        nothing if split is None else [_text(each) for each in split],
        nothing if label is None else [_text(each) for each in label],
        [None] * len(names) if captions is None else [_given(each) for each in captions],
    )
    return index(dataset, rows, store, [])


def _text(value: object) -> str:
    """A label or a split: texts and whole numbers have one."""
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    return value.strip() if isinstance(value, str) else str(value) if whole else ""


def _given(value: object) -> object:
    """A value of a column of captions; one that pandas has for nothing is no caption, either."""
    return value if isinstance(value, str | list | tuple | np.ndarray) else 0


@dataclass(frozen=True)
class Groups:
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
        column = _group(self.files[self.file[place]], int(self.group[place]), self.field)
        found = column[int(self.row[place])].as_py()
        if not isinstance(found, bytes):
            raise ValueError("holds no bytes")
        return found


@functools.lru_cache(maxsize=4)
def _group(file: Path, group: int, name: str) -> pa.ChunkedArray:
    return _contents(pq.ParquetFile(file).read_row_group(group, columns=[name])[name])


def _contents(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column of bytes, from one of bytes or of structs that hold them, as of `datasets`."""
    if pa.types.is_struct(column.type):
        field = column.type.get_field_index("bytes")
        column = pa.chunked_array([chunk.field(field) for chunk in column.chunks])
    return column


def _parquet(dataset: FileSet, files: list[Path], root: Path) -> Index:
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
            contents = _contents(file.read_row_group(group, columns=[name])[name])
            lengths = pc.binary_length(contents).fill_null(-1).to_pylist()
            size += lengths
            where += [(number, group, row) for row in range(len(lengths))]
    places = np.array(where, np.int64).reshape(-1, 3)
    store = Groups(files, name, places[:, 0], places[:, 1], places[:, 2])
    names = [f"{files[number].name} row {row}" for row, (number, _, _) in enumerate(where)]
    return _index(dataset, pd.concat(others), names, size, store)
