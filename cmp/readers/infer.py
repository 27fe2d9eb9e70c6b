"""`cmpt data init`: a manifest made by looking at what lies in a folder."""

import itertools
import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from cmp.errors import CmpError
from cmp.files import write_atomic
from cmp.readers.index import SPLIT_NAMES
from cmp.readers.tables import IMAGE_SUFFIXES, split_folders

MAX_FILES = 100_000
"""Files that are looked at."""
COLUMN_NAMES = {
    "image": ("filepath", "image", "path", "file_name", "filename", "file", "img"),
    "caption": ("title", "caption", "text", "captions", "description"),
    "label": ("label", "class", "category", "label_name"),
    "split": ("split", "subset"),
}
"""Names of columns that are recognised, by key of the manifest."""


def infer_manifest(folder: Path) -> tuple[Path, str, str]:
    """(where the manifest belongs, its text, what was found in words) for a folder of tars, of a
    table, or of folders of pictures; `CmpError` if it is none of these."""
    if not folder.is_dir():
        raise CmpError(f"{folder}: no folder lies there")
    reader, words, labelled = (
        _infer_tars(folder)
        or _infer_table(folder)
        or _infer_folder(folder)
        or _refuse_folder(folder)
    )
    name = re.sub(r"[^a-z0-9]+", "-", folder.resolve().name.lower()).strip("-") or "pictures"
    prompt = "a photo of a {}" if labelled else "{}"
    text = "\n".join(
        [
            f"name: {name}",
            f"title: {json.dumps(words)}  # say what it is",
            "role: adapt  # what arrives in the stream; pool, eval and transfer are the others",
            f"prompt: {json.dumps(prompt)}  # how a caption would name one of the classes",
            "licence: unknown  # whose pictures are these?",
            f"reader: {json.dumps(reader)}",
            "splits: {train: 0.7, validation: 0.1, test: 0.2}  # for images that have none",
            "faults: refuse  # or skip: leave out what cannot be used",
            "beside: embedded  # replay for the embedded models; leave out with a pool of your own",
            "",
        ]
    )
    return folder / "manifest.yaml", text, f"found: {words}"


def write_manifest(path: Path, text: str) -> None:
    """Write a manifest where there is none; else `CmpError`."""
    if path.exists():
        raise CmpError(f"{path}: is there already; `--no-write` only prints what would be written")
    write_atomic(path, text)


Inference = tuple[dict[str, str], str, bool]
"""(the reader's keys, what was found in words, whether there are labels)."""


def _infer_tars(folder: Path) -> Inference | None:
    for pattern in ("*.tar", "*/*.tar"):
        if tars := sorted(folder.glob(pattern)):
            words = f"{len(tars)} tars, the first of them {tars[0].name}"
            return {"kind": "tars", "path": pattern}, words, False
    return None


def _infer_table(folder: Path) -> Inference | None:
    tables = [path for suffix in ("parquet", "tsv", "csv") for path in folder.glob(f"*.{suffix}")]
    for path in sorted(tables):
        try:
            columns = _column_names(path)
        except (OSError, ValueError, pa.ArrowException):
            continue
        lower = {column.lower(): column for column in columns}
        reader = {"kind": "parquet" if path.suffix == ".parquet" else "csv", "path": path.name}
        for key, names in COLUMN_NAMES.items():
            known = [lower[name] for name in names if name in lower]
            reader |= {key: known[0]} if known else {}
        if "image" in reader:
            return reader, f"{path.name} with the columns {', '.join(columns)}", "label" in reader
    return None


def _column_names(path: Path) -> list[str]:
    if path.suffix == ".parquet":
        return pq.read_schema(path).names
    with path.open(encoding="utf-8") as file:
        return file.readline().rstrip("\n").split("\t" if path.suffix == ".tsv" else ",")


def _infer_folder(folder: Path) -> Inference | None:
    tops = split_folders(folder)
    classes, count = set(), 0
    for top in tops.values() or [folder]:
        for path in itertools.islice(top.glob("*/**/*"), MAX_FILES):
            if path.suffix.lower() in IMAGE_SUFFIXES:
                classes.add(path.relative_to(top).parts[0])
                count += 1
    if not count:
        return None
    splits = f", split into {', '.join(SPLIT_NAMES[name.lower()] for name in tops)}" if tops else ""
    words = f"{count} pictures of {len(classes)} classes{splits}"
    return {"kind": "folder", "path": "."}, words, True


def _refuse_folder(folder: Path) -> Inference:
    loose = sum(path.suffix.lower() in IMAGE_SUFFIXES for path in folder.iterdir())
    also = f"; its {loose} pictures lie in no class's folder" if loose else ""
    raise CmpError(
        f"{folder}: no tars, no table with a column of images, and no folders of pictures{also}"
    )
