"""Read images that tables list: CSV, TSV, JSON lines and Parquet files."""

import contextlib
import csv
import dataclasses
import functools
import itertools
import math
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cmp import parsing
from cmp.errors import CmpError, check_line, did_you_mean, explain_errors
from cmp.readers.files import (
    NO_FILE,
    NoFilesError,
    ReadImage,
    Stamp,
    file_stamp,
    read_file,
)
from cmp.readers.index import ImageIndex, Row, build_index, file_splits, named_splits
from cmp.readers.manifest import FileSet

COLUMN_KEYS = ("image", "caption", "label", "split", "update")
"""The keys of a `manifest.TableReader` that name columns."""
MAX_COLUMNS = 10_000
"""Most columns that a table may have; pandas takes seconds to read more."""
MAX_ROWS, MAX_ROWS_OF_IMAGE = 10**6, 1000
"""Most rows that a Parquet file may have, and most of them with the same path."""
NAMED_COLUMNS = 20
"""Most columns that a message names."""


def read_table_files(dataset: FileSet, root: Path) -> ImageIndex:
    """Index the images in one or more CSV, TSV, JSON lines or Parquet files.

    Args:
        dataset: A manifest whose reader is a `TableReader`.
        root: The folder that its pattern starts from, which contains all images. Paths in a table
            are relative to the table's folder.

    Returns:
        The index.

    Raises:
        CmpError: No file matches the pattern, or one cannot be read or lacks a column; or see
            `read_frame`.
    """
    root = Path(os.path.abspath(root))  # a table may give absolute paths
    files, frames, sizes = dataset.find_files(root), [], []
    for file in files:
        what = f"{dataset.name}: {file}: cannot be read"
        with explain_errors(what, "", pa.ArrowException, LookupError):
            inside = None
            if dataset.reader.kind == "parquet":
                frame, inside = _read_parquet(dataset, file)
            elif dataset.reader.kind == "jsonl":
                frame = read_jsonl(file)
            else:
                frame = read_csv(file)
            frames.append(_join_folder(dataset, frame, file, root))
            sizes.append(inside)
    splits = np.repeat(file_splits(files, root), list(map(len, frames))).tolist()
    if None in sizes:
        if any(inside is not None and any(map(len, inside)) for inside in sizes):
            raise CmpError(
                f"{dataset.name}: reader.image: the column {dataset.reader.image!r} has paths in "
                "some files and images in others; write a manifest for each"
            )
        return read_frame(dataset, pd.concat(frames), root, splits)
    stamps, rows = [], []
    for number, (file, inside) in enumerate(zip(files, sizes, strict=True)):
        changed = file.stat().st_ctime_ns
        for group, found in enumerate(inside):
            stamps += [Stamp(size, changed, "missing file") for size in found]
            rows += [(number, group, row) for row in range(len(found))]
    read = functools.partial(_read_row, files, dataset.reader.image, np.array(rows, np.int64))
    names = [f"{files[number].name} row {row}" for row, (number, _, _) in enumerate(rows)]
    return _index_frame(dataset, pd.concat(frames), names, stamps, read, splits)


def _join_folder(dataset: FileSet, frame: pd.DataFrame, file: Path, root: Path) -> pd.DataFrame:
    """Return a table with its paths made relative to the root instead of the table's folder."""
    folder, column = os.path.relpath(file.parent, root), dataset.reader.image
    if folder == "." or column not in frame:
        return frame
    is_path = [isinstance(name, str) and name != "" for name in frame[column]]
    paths = [
        os.path.normpath(os.path.join(folder, name)) if known else name
        for name, known in zip(frame[column], is_path, strict=True)
    ]
    return frame.assign(**{column: paths})


def read_csv(file: Path, rows: int | None = None) -> pd.DataFrame:
    """Read a CSV file, or a `.tsv` file with tabs, with every cell as text.

    Args:
        file: The file.
        rows: The number of rows to read; all by default.

    Raises:
        CmpError: The file has more than `MAX_COLUMNS` columns, or several of one name.
        OSError: The file cannot be read.
        ValueError: The file is not a table.
    """
    separator = "\t" if file.suffix.lower() == ".tsv" else ","
    header, first = _first_rows(file, separator)
    check_width(file, max(len(header), len(first)))
    if repeated := [name for name, count in Counter(header).items() if name and count > 1]:
        raise CmpError(
            f"{file}: several columns are called {repeated[0]!r:.80}; rename all but one"
        )
    what = "tabs" if separator == "\t" else "commas"
    longer = ValueError(
        f"rows have more cells than the {len(header)} of the header; put texts with {what} into "
        "quotes, and give each column a name"
    )
    if any(first[len(header) :]):
        raise longer
    read = functools.partial(
        pd.read_csv, file, sep=separator, dtype=str, keep_default_na=False, nrows=rows
    )
    table = read()  # the first cells are an index where rows have more of them than the header
    _refuse_open_quotes(file, table, separator)
    extra = 0 if isinstance(table.index, pd.RangeIndex) else table.index.nlevels
    if not extra:
        return table
    if not (table.iloc[:, -extra:] == "").all(axis=None):
        raise longer
    return read(index_col=False, usecols=range(len(table.columns)))  # rows end with a separator


def _first_rows(file: Path, separator: str) -> tuple[list[str], list[str]]:
    """Return the header of a CSV file and its first row; pandas takes minutes for rows of very many
    cells, and gives repeated names a number."""
    with file.open(encoding="utf-8-sig", newline="") as lines, contextlib.suppress(csv.Error):
        filled = filter("".join, csv.reader(lines, delimiter=separator))
        return next(filled, []), next(filled, [])
    return [], []  # a cell has very much text


def _refuse_open_quotes(file: Path, table: pd.DataFrame, separator: str) -> None:
    """Raise `ValueError` if a cell contains rows, since a quotation mark at its start is closed
    only after them: it has a tab and a line break in a file with tabs, or a line names a file."""
    cells = (cell for name in table for cell in table[name] if isinstance(cell, str))
    for cell in (cell for cell in cells if "\n" in cell):
        has_tab = separator == "\t" and separator in cell
        parts = (part for line in cell.splitlines()[1:] for part in line.split(separator))
        if has_tab or any(file_stamp(file.parent, part, {}).size >= 0 for part in parts):
            raise ValueError(
                f"the cell {cell.splitlines()[0]!r:.60} also contains the rows after it, since a "
                "quotation mark begins it; double every mark in it, and put one more at each end"
            )


def read_jsonl(file: Path, rows: int | None = None) -> pd.DataFrame:
    """Read a file of JSON lines, such as `metadata.jsonl` of Hugging Face's image folders: on each
    line an object, whose keys are the columns.

    Args:
        file: The file.
        rows: The number of rows to read; all by default.

    Raises:
        CmpError: The file has more than `MAX_COLUMNS` columns.
        OSError: The file cannot be read.
        ValueError: A line is not an object, or has other keys than the first.
    """
    with file.open(encoding="utf-8-sig") as lines:
        filled = ((n, line) for n, line in enumerate(lines, 1) if line.strip())
        items = [(n, parsing.parse_json(line)) for n, line in itertools.islice(filled, rows)]
    keys = items[0][1].keys() if items and isinstance(items[0][1], dict) else ()
    check_width(file, len(keys))
    for n, item in items:
        if not isinstance(item, dict) or item.keys() != keys:
            raise ValueError(
                f"line {n}: must be a JSON object with the keys of the first line, which may be "
                "null"
            )
    return pd.DataFrame({key: [item[key] for _, item in items] for key in keys}, dtype=object)


def check_width(file: Path, count: int) -> None:
    """Raise `CmpError` if a table has too many columns."""
    if count > MAX_COLUMNS:
        raise CmpError(
            f"{file}: has {count:,} columns, but at most {MAX_COLUMNS:,} are allowed; keep those "
            "with images, captions and labels"
        )


def list_columns(names: Sequence[str]) -> str:
    """Return a list of column names as text, shortened if there are many."""
    more = f" and {len(names) - NAMED_COLUMNS} more" if len(names) > NAMED_COLUMNS else ""
    return f"{', '.join(names[:NAMED_COLUMNS])}{more}"


def read_frame(
    dataset: FileSet, frame: pd.DataFrame, root: Path, splits: Sequence[str] = ()
) -> ImageIndex:
    """Index the images whose paths are in a table.

    Without a column of splits and `splits`, the top folders of the paths may name splits.

    Args:
        dataset: A manifest whose reader is a `TableReader`.
        frame: One row per image.
        root: The folder that paths start from, which contains all images, as an absolute path.
        splits: For each row, the split of the file that it is from, or "".

    Returns:
        The index.

    Raises:
        CmpError: A column is missing, or all files in the table are missing.
    """
    _check_columns(dataset, list(map(str, frame)))
    images = _column(dataset, frame, "image")
    names = [name.removeprefix(f"{root}/") if isinstance(name, str) else "" for name in images]
    for name, count in Counter(filter(None, names)).most_common(1):
        if count > MAX_ROWS_OF_IMAGE:
            raise CmpError(
                f"{dataset.name}: {root / dataset.reader.path}: {count:,} rows have the image "
                f"{name!r:.80}, but at most {MAX_ROWS_OF_IMAGE:,} may have the same; leave out the "
                "others"
            )
    known: dict[str, bool] = {}
    stamps = [file_stamp(root, name, known) if name else NO_FILE for name in names]
    if names and all(stamp == NO_FILE for stamp in stamps):
        raise NoFilesError(
            f"{dataset.name}: reader.image: none of the {len(names)} files in the column "
            f"{dataset.reader.image!r} exists, such as {', '.join(names[:3])}; paths must be "
            f"relative to the table's folder, and all files inside {root}"
        )
    tops = [name.removeprefix("./").rpartition("/")[0].partition("/")[0] for name in names]
    splits = [a or b for a, b in zip(splits or [""] * len(tops), named_splits(tops), strict=True)]
    read = functools.partial(read_file, root, names)
    return _index_frame(dataset, frame, names, stamps, read, splits)


def _check_columns(dataset: FileSet, columns: list[str]) -> None:
    """Raise `CmpError` if a column in the manifest is missing or there twice, or it names neither
    captions nor labels."""
    reader = dataset.reader
    for key in COLUMN_KEYS:
        name, is_named = getattr(reader, key), key == "image" or key in reader.model_fields_set
        if columns.count(name) > 1:
            raise CmpError(
                f"{dataset.name}: reader.{key}: several columns are called {name!r}; rename all "
                "but one"
            )
        if is_named and name is not None and name not in columns:
            near, known = did_you_mean(name, columns), list_columns(columns)
            choices = f"{near} The columns are {known}" if near else f"; the columns are {known}"
            raise CmpError(f"{dataset.name}: reader.{key}: no column {name!r}{choices}")
    if not {reader.label, reader.caption} & set(columns):
        what = "give a column of captions as `caption` or of labels as `label`"
        raise CmpError(f"{dataset.name}: reader: {what}; the columns are {list_columns(columns)}")


def _column(dataset: FileSet, frame: pd.DataFrame, key: str) -> list:
    """Return the column that the manifest names as `key`, or only None if there is none."""
    name = getattr(dataset.reader, key)
    return frame[name].tolist() if name in frame else [None] * len(frame)


def _index_frame(
    dataset: FileSet,
    frame: pd.DataFrame,
    names: list[str],
    stamps: list[Stamp],
    read: ReadImage,
    splits: list[str],
) -> ImageIndex:
    """Return the index of a table; images without a name are named by their row over all files.
    `splits` are those of files and folders, for a table without a column of splits."""
    labels, updates = (_column(dataset, frame, key) for key in ("label", "update"))
    splits = _column(dataset, frame, "split") if dataset.reader.split else splits
    if dataset.reader.label in frame:
        labels = map(_label_text, labels)
    captions = _column(dataset, frame, "caption")
    if dataset.reader.caption in frame:  # pandas' missing values are not captions
        good = (str, list, tuple, np.ndarray)
        captions = [value if isinstance(value, good) else 0 for value in captions]
    for value in updates:
        if isinstance(value, bytes | list | tuple | dict | np.ndarray):
            raise CmpError(
                f"{dataset.name}: reader.update: {value!r:.80} in the column "
                f"{dataset.reader.update!r} must be a text or a number"
            )
    sources = [name or f"row {row}" for row, name in enumerate(names)]
    splits, updates = map(_cell_text, splits), list(map(_cell_text, updates))
    with explain_errors(f"{dataset.name}: reader.update"):
        for name in set(updates):
            check_line(name)
    rows = list(map(Row, sources, stamps, splits, labels, captions, updates))
    return _join_captions(build_index(dataset, rows, read, []))


def _join_captions(index: ImageIndex) -> ImageIndex:
    """Return an index with one row per image, where a table has a row for each caption of it.

    Otherwise the rows would be equal test images, of which retrieval finds only one.
    """
    keys = ["source", "split", "given", "label", "update"]
    again = index.table.duplicated(keys)
    if not again.any():
        return index
    captions = [
        list(dict.fromkeys(itertools.chain.from_iterable(lists)))
        for _, lists in index.table.groupby(keys, sort=False)["captions"]
    ]
    table = index.table[~again].reset_index(drop=True).assign(captions=captions)
    joined = int((index.table.duplicated(keys, keep=False) & ~again).sum())
    return dataclasses.replace(index, table=table, joined=joined)


def _cell_text(value: object) -> str:
    """Return a cell as text, or "" for a missing one."""
    is_nan = isinstance(value, float) and math.isnan(value)
    is_missing = is_nan or value is None or value is pd.NA or value is pd.NaT
    return "" if is_missing else str(_whole(value)).strip()


def _whole(value: object) -> object:
    """Return a float without a fraction as the integer that pandas made it from, which it does
    beside a blank."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _label_text(value: object) -> str:
    """Return a label as text if it is text or an integer, and "" otherwise."""
    value = _whole(value)
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    return value.strip() if isinstance(value, str) else str(value) if whole else ""


def _class_names(schema: pa.Schema, column: str | None) -> dict[str, str]:
    """Return the names of classes that a column of integers stands for, by integer.

    Hugging Face's `datasets` writes the names of a `ClassLabel` into the metadata of the file.
    Without such names, the result is empty.
    """
    names: list[str] = []
    if column in schema.names and pa.types.is_integer(schema.field(column).type):
        with contextlib.suppress(LookupError, TypeError, ValueError):  # other metadata
            about = parsing.parse_json((schema.metadata or {})[b"huggingface"].decode())
            names = list(map(str, about["info"]["features"][column]["names"]))
    return {str(number): name for number, name in enumerate(names)}


def _read_row(files: list[Path], column: str, rows: np.ndarray, position: int) -> bytes:
    """Return an image of a column; `rows` [N, 3] has the indices of file, row group and row."""
    number, group, row = map(int, rows[position])
    changed = files[number].stat().st_ctime_ns
    return _cached_row_group(files[number], changed, group, column)[row].as_py()


@functools.lru_cache(maxsize=4)
def _cached_row_group(path: Path, changed: int, group: int, name: str) -> pa.ChunkedArray:
    """Return a column of bytes of a row group, cached until the file changes."""
    [column] = parsing.read_groups(path, name, [group])
    return _bytes_of(column, name)


def _bytes_of(column: pa.Array | pa.ChunkedArray, name: str) -> pa.Array | pa.ChunkedArray:
    """Return a column of bytes, also from structs with bytes, as `datasets` writes them."""
    if not pa.types.is_struct(column.type):
        return column
    if column.type.get_field_index("bytes") < 0:  # pyarrow would use the last field
        raise ValueError(f"the structs of {name!r} have no field 'bytes'")
    return pc.struct_field(column, "bytes")


def _image_sizes(column: pa.ChunkedArray) -> list[int]:
    """Return the sizes of the images in a row group; -1 for a missing one."""
    chunks = [part for part in column.chunks if len(part)]  # an empty one may have no type
    parts = [parsing.value_lengths(part).fill_null(-1).to_pylist() for part in chunks]
    return list(itertools.chain.from_iterable(parts))


def _read_parquet(dataset: FileSet, path: Path) -> tuple[pd.DataFrame, list[list[int]] | None]:
    """Return the columns of a Parquet file that the manifest names; and if it contains the images
    themselves, not their paths, their sizes by row group."""
    file, reader, sizes = pq.ParquetFile(path), dataset.reader, None
    schema = file.schema_arrow
    check_width(path, len(schema))
    _check_columns(dataset, schema.names)
    if file.metadata.num_rows > MAX_ROWS:
        raise CmpError(
            f"{path}: has {file.metadata.num_rows:,} rows, but at most {MAX_ROWS:,} are allowed; "
            "split it into several files"
        )
    columns = {getattr(reader, key) for key in COLUMN_KEYS} & {*schema.names}
    cell = schema.field(reader.image).type
    if pa.types.is_dictionary(cell):  # as pandas writes categories
        cell = cell.value_type
    if cell not in (pa.string(), pa.large_string(), pa.string_view()):
        columns.remove(reader.image)  # bytes are read group by group, not kept
        groups = parsing.read_groups(path, reader.image)
        sizes = [_image_sizes(_bytes_of(group, reader.image)) for group in groups]
    parsing.check_memory(path, columns)
    # by pandas' metadata, columns would go back into its index and be missed here
    frame = file.read(columns=sorted(columns)).to_pandas(ignore_metadata=True)
    if names := _class_names(schema, reader.label):  # -1 is an image without a class
        frame[reader.label] = [names.get(_label_text(x), "") for x in frame[reader.label]]
    return frame, sizes
