"""Images in a folder per class, as torchvision's ImageFolder has them, and images in tables."""

import functools
import itertools
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from zlib import crc32

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cmp.errors import CmpError, did_you_mean, explain_errors
from cmp.readers.files import (
    NO_FILE,
    OUTSIDE,
    ReadImage,
    Stamp,
    file_stamp,
    is_inside,
    read_file,
)
from cmp.readers.index import IMAGE_SUFFIXES, SPLIT_NAMES, Fault, ImageIndex, Row, build_index
from cmp.readers.manifest import FileSet

COLUMN_KEYS = ("image", "caption", "label", "split", "update")
"""The keys of a `manifest.TableReader` that name columns."""
MAX_COLUMNS = 10_000
"""Columns that a table may have; pandas takes seconds for more, whatever they hold."""
NAMED_COLUMNS = 20
"""Columns that a message names at most."""
LOOKED_AT = 10_000
"""How many files are looked at to see whether a folder outside its manifest's holds pictures."""
BESIDE_PICTURE = "text beside a picture, which `kind: pairs` takes for its caption"
"""The kind of fault that is what img2dataset writes, read as a folder per class."""
OWN_FOLDER = " (write it relative to the table's folder)"
ABOVE_PICTURES = " (the manifest and its table belong into a folder above all pictures)"


def walk_files(folder: Path | str, prefix: str = "") -> Iterator[str]:
    """Yield all that lies below a folder, sorted, except hidden files; links are not followed.

    Args:
        folder: The folder.
        prefix: What the paths start with, beside the folder itself.
    """
    visible = (entry for entry in os.scandir(folder) if not entry.name.startswith("."))
    for entry in sorted(visible, key=lambda entry: entry.name):
        if entry.is_dir(follow_symlinks=False):
            yield from walk_files(entry.path, f"{prefix}{entry.name}/")
        else:
            yield f"{prefix}{entry.name}"


def visible_folders(folder: Path) -> list[Path]:
    """Return the folders right inside a folder, sorted, without hidden ones.

    Args:
        folder: The folder.
    """
    return sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")


def split_folders(folder: Path) -> list[Path]:
    """Return the folders right inside a folder if all, or several, are called like splits.

    One alone among others is a class, such as trains.

    Args:
        folder: The folder.
    """
    inside = visible_folders(folder)
    known = [path for path in inside if path.name.lower() in SPLIT_NAMES]
    return inside if known == inside or len(known) > 1 else []


def is_picture_name(path: str) -> bool:
    """Return whether a file is called as pictures are."""
    return path.lower().endswith(IMAGE_SUFFIXES)


def pictures_folder(
    dataset: FileSet, root: Path, companions: tuple[str, ...] = ()
) -> tuple[Path, bool]:
    """Return the folder that a set's pictures are in, and whether it lies outside its manifest's.

    A manifest may come from anyone, and messages name what is read. So a folder elsewhere is taken
    only if most of its files are pictures, and no other file in it is named.

    Args:
        dataset: The manifest.
        root: The manifest's folder.
        companions: What names of files end in that may lie beside pictures.

    Raises:
        CmpError: There is no such folder, or it lies elsewhere and is none of pictures.
    """
    folder = root / dataset.reader.path
    if not folder.is_dir():
        raise CmpError(f"{dataset.name}: reader.path: {folder} is no folder")
    if is_inside(folder, root):
        return folder, False
    pictures = strangers = 0
    what = f"{dataset.name}: reader.path: {folder} lies outside of the manifest's folder"
    try:
        for path in itertools.islice(walk_files(folder), LOOKED_AT):
            is_picture = is_picture_name(path)
            pictures += is_picture
            strangers += not (is_picture or path.lower().endswith(companions))
    except OSError as error:  # whose text names a file
        raise CmpError(f"{what} and cannot be read ({error.strerror})") from None
    if not pictures or strangers > pictures:
        raise CmpError(
            f"{what}, and is no folder of pictures: of its first {pictures + strangers} files "
            f"{pictures} are pictures, by their names; name a folder of pictures alone"
        )
    return folder, True


def read_folder(dataset: FileSet, root: Path) -> ImageIndex:
    """Index the images of a folder.

    An image's class is the name of the top folder that it lies in, with a space for each "_". Where
    top folders are called like splits, see `split_folders`, classes are the folders inside those.

    Args:
        dataset: A manifest whose reader is a `FolderReader`.
        root: The folder that its path starts from.

    Returns:
        The index; classes without images are faults, and so is all else that lies in a class's
        folder, and a picture that lies in none.

    Raises:
        CmpError: If there is no such folder, or see `pictures_folder`.
    """
    folder, is_foreign = pictures_folder(dataset, root)
    rows, faults, classes, used = [], [], {}, set()
    known: dict[str, bool] = {}
    splits = split_folders(folder)
    for top in splits or [folder]:
        split = top.name if splits else ""
        classes |= dict.fromkeys(class_folder.name for class_folder in visible_folders(top))
        paths = list(walk_files(top))
        stems = {os.path.splitext(path)[0] for path in paths if is_picture_name(path)}
        for path in paths:
            label, slash, _ = path.partition("/")
            source = f"{split}/{path}" if split else path
            is_picture = is_picture_name(path)
            if slash and is_picture:
                used.add(label)
                name = label.replace("_", " ").strip()
                rows.append(Row(source, file_stamp(folder, source, known), split, name, None))
            elif is_picture:
                faults.append(Fault("picture in no class's folder", source))
            elif slash:
                is_text = path.endswith((".txt", ".json")) and os.path.splitext(path)[0] in stems
                kind = BESIDE_PICTURE if is_text else "no picture, by its name"
                faults.append(Fault(kind, "" if is_foreign else source))
    empty = ["" if is_foreign else label for label in classes if label not in used]
    faults += [Fault("class without images", label) for label in empty]
    read = functools.partial(read_file, folder, [row.source for row in rows])
    return build_index(dataset, rows, read, faults)


def read_table_files(dataset: FileSet, root: Path) -> ImageIndex:
    """Index the images of a CSV, TSV or Parquet file, or of several.

    Args:
        dataset: A manifest whose reader is a `TableReader`.
        root: The folder that its pattern starts from, and that all images lie in. The paths in a
            table start from the table's own folder.

    Returns:
        The index.

    Raises:
        CmpError: If no file fits the pattern, or if one cannot be read or lacks a column; or see
            `read_frame`.
    """
    files = dataset.find_files(root)
    what = f"{dataset.name}: {files[0]}: cannot be read"
    with explain_errors(what, "", pa.ArrowException, LookupError):
        if dataset.reader.kind == "parquet":
            return _read_parquet(dataset, files, root)
        frames = [_join_folder(dataset, read_csv(file), file, root) for file in files]
        return read_frame(dataset, pd.concat(frames), root)


def _join_folder(dataset: FileSet, frame: pd.DataFrame, file: Path, root: Path) -> pd.DataFrame:
    """A table whose paths start from its own folder, with paths that start from the root."""
    folder, column = os.path.relpath(file.parent, root), dataset.reader.image
    if folder == "." or column not in frame:
        return frame
    is_path = [isinstance(name, str) and name[:1] not in ("", "~") for name in frame[column]]
    paths = [
        os.path.normpath(os.path.join(folder, name)) if known else name
        for name, known in zip(frame[column], is_path, strict=True)
    ]
    return frame.assign(**{column: paths})


def read_csv(file: Path, rows: int | None = None) -> pd.DataFrame:
    """Read a CSV file, or one with tabs if it is called `.tsv`, every cell as text.

    Args:
        file: The file.
        rows: How many rows are read; all by default.

    Raises:
        CmpError: It has more than `MAX_COLUMNS` columns.
        OSError: It cannot be read.
        ValueError: It is no table.
    """
    separator = "\t" if file.suffix == ".tsv" else ","
    with file.open(encoding="utf-8") as lines:
        check_width(file, next(filter(str.strip, lines), "").count(separator) + 1)
    return pd.read_csv(file, sep=separator, dtype=str, keep_default_na=False, nrows=rows)


def check_width(file: Path, count: int) -> None:
    """Raise `CmpError` if a table has more columns than are taken."""
    if count > MAX_COLUMNS:
        raise CmpError(
            f"{file}: has {count:,} columns, at most {MAX_COLUMNS:,} are taken; keep those of the "
            "images, captions and labels"
        )


def list_columns(names: Sequence[str]) -> str:
    """Return the names of some columns, of many the first alone, in words."""
    more = f" and {len(names) - NAMED_COLUMNS} more" if len(names) > NAMED_COLUMNS else ""
    return f"{', '.join(names[:NAMED_COLUMNS])}{more}"


def read_frame(dataset: FileSet, frame: pd.DataFrame, root: Path = Path()) -> ImageIndex:
    """Index the images of a table in memory.

    Args:
        dataset: A manifest whose reader is a `TableReader`.
        frame: One row per image; the image is a path, or the bytes of a file.
        root: The folder that paths start from, and that all images lie in.

    Returns:
        The index.

    Raises:
        CmpError: If a column is missing, or every file that the table names.
    """
    _check_columns(dataset, list(map(str, frame)))
    images = _column(dataset, frame, "image")
    if images and isinstance(images[0], bytes):
        held = [image if isinstance(image, bytes) else None for image in images]
        stamps = [NO_FILE if image is None else Stamp(len(image), crc32(image)) for image in held]
        return _index_frame(dataset, frame, [""] * len(images), stamps, images.__getitem__)
    names = [name if isinstance(name, str) else "" for name in images]
    known: dict[str, bool] = {}
    stamps = [_path_stamp(root, name, known) for name in names]
    if names and all(stamp == NO_FILE for stamp in stamps):
        raise CmpError(
            f"{dataset.name}: reader.image: none of the {len(names)} files of the column "
            f"{dataset.reader.image!r} is there, such as {', '.join(names[:3])}; paths start from "
            f"the table's folder, and all files lie in {root}"
        )
    return _index_frame(dataset, frame, names, stamps, functools.partial(read_file, root, names))


def _path_stamp(root: Path, name: str, known: dict[str, bool]) -> Stamp:
    """What is known of a file that a table names; `known`: see `file_stamp`."""
    stamp = file_stamp(root, name, known) if name else NO_FILE
    if stamp.size < 0 and name.startswith("~"):  # for another folder on each machine
        return NO_FILE._replace(problem=f"path starts with ~{OWN_FOLDER}")
    if stamp == OUTSIDE and name.startswith("/"):
        return NO_FILE._replace(problem=f"absolute path to another folder{OWN_FOLDER}")
    if stamp == OUTSIDE:
        return NO_FILE._replace(problem=f"path lies outside of {root}{ABOVE_PICTURES}")
    return stamp


def _check_columns(dataset: FileSet, columns: list[str]) -> None:
    """Raise `CmpError` if a column that the manifest names is missing, or all of a kind."""
    reader = dataset.reader
    for key in COLUMN_KEYS:
        name, is_named = getattr(reader, key), key == "image" or key in reader.model_fields_set
        if is_named and name is not None and name not in columns:
            near, known = did_you_mean(name, columns), list_columns(columns)
            choices = f"{near} There are {known}" if near else f"; there are {known}"
            raise CmpError(f"{dataset.name}: reader.{key}: no column {name!r}{choices}")
    if not {reader.label, reader.caption} & set(columns):
        what = "name a column of captions or of labels, by `caption` or `label`"
        raise CmpError(f"{dataset.name}: reader: {what}; there are {list_columns(columns)}")


def _column(dataset: FileSet, frame: pd.DataFrame, key: str) -> list:
    """The values of the column that the manifest names by `key`; all None if it is not there."""
    name = getattr(dataset.reader, key)
    return frame[name].tolist() if name in frame else [None] * len(frame)


def _index_frame(
    dataset: FileSet, frame: pd.DataFrame, names: list[str], stamps: list[Stamp], read: ReadImage
) -> ImageIndex:
    """The index of a table; an image without a name is called by its row."""
    keys = ("split", "label", "update")
    splits, labels, updates = (_column(dataset, frame, key) for key in keys)
    if dataset.reader.label in frame:
        labels = map(_label_text, labels)
    captions = _column(dataset, frame, "caption")
    if dataset.reader.caption in frame:  # what pandas has for a missing one is no caption, either
        good = (str, list, tuple, np.ndarray)
        captions = [value if isinstance(value, good) else 0 for value in captions]
    sources = [name or f"row {row}" for row, name in enumerate(names)]
    splits, updates = map(_cell_text, splits), map(_cell_text, updates)
    rows = list(map(Row, sources, stamps, splits, labels, captions, updates))
    return build_index(dataset, rows, read, [])


def _cell_text(value: object) -> str:
    """A cell as a text, whatever was found; "" for a missing one."""
    is_missing = value is None or (isinstance(value, float) and math.isnan(value))
    return "" if is_missing else str(value).strip()


def _label_text(value: object) -> str:
    """A label: a text, or a whole number as text; "" for anything else."""
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
    if not pa.types.is_struct(column.type):
        return column
    if column.type.get_field_index("bytes") < 0:  # pyarrow would take the last field
        raise ValueError(f"the structs of {name!r} have no field 'bytes'")
    return pc.struct_field(column, "bytes")


def _read_parquet(dataset: FileSet, paths: list[Path], root: Path) -> ImageIndex:
    image = dataset.reader.image
    wanted = {getattr(dataset.reader, key) for key in COLUMN_KEYS}
    files = [pq.ParquetFile(path) for path in paths]
    schema = files[0].schema_arrow
    check_width(paths[0], len(schema))
    _check_columns(dataset, schema.names)
    if repeated := [name for name in wanted if schema.names.count(name) > 1]:
        raise ValueError(f"several columns are called {repeated[0]!r}")
    at = schema.get_field_index(image)
    as_bytes = at >= 0 and schema.types[at] not in (pa.string(), pa.large_string())
    columns = [name for name in schema.names if name in wanted and not (as_bytes and name == image)]
    frames = [file.read(columns=columns).to_pandas() for file in files]
    if not as_bytes:
        placed = zip(frames, paths, strict=True)
        frames = [_join_folder(dataset, frame, path, root) for frame, path in placed]
        return read_frame(dataset, pd.concat(frames), root)
    stamps, rows = [], []
    for number, file in enumerate(files):
        changed = paths[number].stat().st_ctime_ns
        for group in range(file.num_row_groups):  # bytes are looked at group by group, not kept
            lengths = pc.binary_length(_read_row_group(file, group, image))
            sizes = lengths.fill_null(-1).to_pylist()
            stamps += [Stamp(size, changed, "missing file") for size in sizes]
            rows += [(number, group, row) for row in range(len(lengths))]
    read = functools.partial(_read_row, paths, image, np.array(rows, np.int64))
    names = [f"{paths[number].name} row {row}" for row, (number, _, _) in enumerate(rows)]
    return _index_frame(dataset, pd.concat(frames), names, stamps, read)
