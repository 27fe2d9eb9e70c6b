"""Images in a folder per class, as torchvision's ImageFolder has them, and images in tables."""

import functools
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cmp.errors import CmpError
from cmp.readers.index import (
    IMAGE_SUFFIXES,
    SPLIT_NAMES,
    Fault,
    ImageIndex,
    ReadImage,
    Row,
    build_index,
    read_file,
)
from cmp.readers.manifest import FileSet


def walk_files(folder: Path | str, prefix: str = "") -> Iterator[tuple[str, int]]:
    """Yield all files below a folder, except hidden ones; links to folders are not followed.

    Args:
        folder: The folder.
        prefix: What the paths start with.

    Yields:
        (path relative to the folder, size in bytes) pairs, sorted.
    """
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name.startswith("."):
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from walk_files(entry.path, f"{prefix}{entry.name}/")
        elif entry.is_file():
            yield f"{prefix}{entry.name}", entry.stat().st_size


def visible_folders(folder: Path) -> list[Path]:
    """Return the folders right inside a folder, sorted, without hidden ones.

    Args:
        folder: The folder.
    """
    return sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")


def split_folders(folder: Path) -> list[Path]:
    """Return the folders right inside a folder if all are called like splits, else none.

    Args:
        folder: The folder.
    """
    inside = visible_folders(folder)
    return inside if all(path.name.lower() in SPLIT_NAMES for path in inside) else []


def read_folder(dataset: FileSet, root: Path) -> ImageIndex:
    """Index the images of a folder.

    An image's class is the name of the top folder that it lies in, with a space for each "_". Where
    all top folders are called like splits, classes are the folders inside those.

    Args:
        dataset: A manifest whose reader is a `FolderReader`.
        root: The folder that its path starts from.

    Returns:
        The index; classes without images are faults.

    Raises:
        CmpError: If there is no such folder.
    """
    folder = root / dataset.reader.path
    if not folder.is_dir():
        raise CmpError(f"{dataset.name}: reader.path: {folder} is no folder")
    rows, classes, used = [], {}, set()
    splits = split_folders(folder)
    for top in splits or [folder]:
        split = top.name if splits else ""
        classes |= dict.fromkeys(class_folder.name for class_folder in visible_folders(top))
        for path, size in walk_files(top):
            label, slash, _ = path.partition("/")
            if slash and path.lower().endswith(IMAGE_SUFFIXES):
                used.add(label)
                source = f"{split}/{path}" if split else path
                rows.append(Row(source, size, split, label.replace("_", " "), None))
    faults = [Fault("class without images", label) for label in classes if label not in used]
    read = functools.partial(read_file, folder, [row.source for row in rows])
    return build_index(dataset, rows, read, faults)


def read_table_files(dataset: FileSet, root: Path) -> ImageIndex:
    """Index the images of a CSV, TSV or Parquet file, or of several.

    Args:
        dataset: A manifest whose reader is a `TableReader`.
        root: The folder that its pattern, and the paths in the table, start from.

    Returns:
        The index.

    Raises:
        CmpError: If no file fits the pattern, or if one cannot be read or lacks a column.
    """
    files = dataset.find_files(root)
    try:
        if dataset.reader.kind == "parquet":
            return _read_parquet(dataset, files, root)
        return read_frame(dataset, pd.concat([read_csv(file) for file in files]), root)
    except (OSError, ValueError, pa.ArrowException, LookupError) as error:
        raise CmpError(f"{dataset.name}: {files[0]}: cannot be read ({error})") from error


def read_csv(file: Path, rows: int | None = None) -> pd.DataFrame:
    """Read a CSV file, or one with tabs if it is called `.tsv`, every cell as text.

    Args:
        file: The file.
        rows: How many rows are read; all by default.
    """
    separator = "\t" if file.suffix == ".tsv" else ","
    return pd.read_csv(file, sep=separator, dtype=str, keep_default_na=False, nrows=rows)


def read_frame(dataset: FileSet, frame: pd.DataFrame, root: Path = Path()) -> ImageIndex:
    """Index the images of a table in memory.

    Args:
        dataset: A manifest whose reader is a `TableReader`.
        frame: One row per image; the image is a path, or the bytes of a file.
        root: The folder that paths start from.

    Returns:
        The index.

    Raises:
        CmpError: If a column is missing.
    """
    images = _column(dataset, frame, "image")
    if images and isinstance(images[0], bytes):
        sizes = [len(image) if isinstance(image, bytes) else -1 for image in images]
        return _index_frame(dataset, frame, [""] * len(images), sizes, images.__getitem__)
    names = [name if isinstance(name, str) else "" for name in images]
    paths = [os.path.join(root, name) if name else "" for name in names]
    sizes = [os.path.getsize(path) if os.path.exists(path) else -1 for path in paths]
    return _index_frame(dataset, frame, names, sizes, functools.partial(read_file, root, names))


def _column(dataset: FileSet, frame: pd.DataFrame, key: str) -> list:
    """The values of the column that the manifest names by `key`.

    All are None where it names none, or where a column that it does not name is missing.
    """
    name = getattr(dataset.reader, key)
    if name in frame:
        return frame[name].tolist()
    if key == "image" or (name is not None and key in dataset.reader.model_fields_set):
        columns = ", ".join(map(str, frame))
        raise CmpError(f"{dataset.name}: reader.{key}: no column {name!r}; there are {columns}")
    return [None] * len(frame)


def _index_frame(
    dataset: FileSet, frame: pd.DataFrame, names: list[str], sizes: list[int], read: ReadImage
) -> ImageIndex:
    """The index of a table; an image without a name is called by its row."""
    splits, labels = (map(_text, _column(dataset, frame, key)) for key in ("split", "label"))
    captions = _column(dataset, frame, "caption")
    if dataset.reader.caption in frame:  # what pandas has for a missing one is no caption, either
        good = (str, list, tuple, np.ndarray)
        captions = [value if isinstance(value, good) else 0 for value in captions]
    if not {dataset.reader.label, dataset.reader.caption} & set(frame):
        raise CmpError(f"{dataset.name}: reader: name a column of captions or of labels")
    sources = [name or f"row {row}" for row, name in enumerate(names)]
    rows = list(map(Row, sources, sizes, splits, labels, captions))
    return build_index(dataset, rows, read, [])


def _text(value: object) -> str:
    """A label or a split: a text, or a whole number as text; "" for anything else."""
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    return value.strip() if isinstance(value, str) else str(value) if whole else ""


def _read_row(files: list[Path], column: str, rows: np.ndarray, position: int) -> bytes:
    """One image of a column; `rows` [N, 3]: the numbers of its file, its row group, its row."""
    number, group, row = map(int, rows[position])
    return _cached_row_group(files[number], group, column)[row].as_py()


@functools.lru_cache(maxsize=4)
def _cached_row_group(path: Path, group: int, name: str) -> pa.ChunkedArray:
    return _read_row_group(pq.ParquetFile(path), group, name)


def _read_row_group(file: pq.ParquetFile, group: int, name: str) -> pa.ChunkedArray:
    """A column of bytes, also from one of structs that hold them, as `datasets` writes them."""
    column = file.read_row_group(group, columns=[name])[name]
    return pc.struct_field(column, "bytes") if pa.types.is_struct(column.type) else column


def _read_parquet(dataset: FileSet, paths: list[Path], root: Path) -> ImageIndex:
    image = dataset.reader.image
    wanted = {getattr(dataset.reader, key) for key in ("image", "caption", "label", "split")}
    files = [pq.ParquetFile(path) for path in paths]
    schema = files[0].schema_arrow
    at = schema.get_field_index(image)
    as_bytes = at >= 0 and schema.types[at] not in (pa.string(), pa.large_string())
    columns = [name for name in schema.names if name in wanted and not (as_bytes and name == image)]
    frame = pd.concat([file.read(columns=columns).to_pandas() for file in files])
    if not as_bytes:
        return read_frame(dataset, frame, root)
    sizes, rows = [], []
    for number, file in enumerate(files):
        for group in range(file.num_row_groups):  # bytes are looked at group by group, not kept
            lengths = pc.binary_length(_read_row_group(file, group, image))
            sizes += lengths.fill_null(-1).to_pylist()
            rows += [(number, group, row) for row in range(len(lengths))]
    read = functools.partial(_read_row, paths, image, np.array(rows, np.int64))
    names = [f"{paths[number].name} row {row}" for row, (number, _, _) in enumerate(rows)]
    return _index_frame(dataset, frame, names, sizes, read)
