"""`cmp data init`: a manifest made by looking at what lies in a folder."""

import itertools
import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from cmp.data.readers.folders import SUFFIXES, split_folders
from cmp.data.readers.index import SPLITS
from cmp.errors import CmpError
from cmp.files import write_whole

ENOUGH = 100_000
"""Files that are looked at."""
COLUMNS = {
    "image": ("filepath", "image", "path", "file_name", "filename", "file", "img"),
    "caption": ("title", "caption", "text", "captions", "description"),
    "label": ("label", "class", "category", "label_name"),
    "split": ("split", "subset"),
}
"""Names of columns that are recognised, by key of the manifest."""


def look(folder: Path) -> tuple[Path, str, str]:
    """(where the manifest belongs, its text, what was found in words) for a folder of tars, of a
    table, or of folders of pictures; `CmpError` if it is none of these."""
    if not folder.is_dir():
        raise CmpError(f"{folder}: no folder lies there")
    reader, words, labelled = (
        _tars(folder) or _table(folder) or _pictures(folder) or _nothing(folder)
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


def write(path: Path, text: str) -> None:
    """Write a manifest where there is none; else `CmpError`."""
    if path.exists():
        raise CmpError(f"{path}: is there already; `--no-write` only prints what would be written")
    write_whole(path, text)


Found = tuple[dict[str, str], str, bool]
"""(the reader's keys, what was found in words, whether there are labels)."""


def _tars(folder: Path) -> Found | None:
    for pattern in ("*.tar", "*/*.tar"):
        if tars := sorted(folder.glob(pattern)):
            words = f"{len(tars)} tars, the first of them {tars[0].name}"
            return {"kind": "tars", "path": pattern}, words, False
    return None


def _table(folder: Path) -> Found | None:
    tables = [path for suffix in ("parquet", "tsv", "csv") for path in folder.glob(f"*.{suffix}")]
    for path in sorted(tables):
        try:
            columns = _columns(path)
        except (OSError, ValueError, pa.ArrowException):
            continue
        lower = {column.lower(): column for column in columns}
        reader = {"kind": "parquet" if path.suffix == ".parquet" else "csv", "path": path.name}
        for key, names in COLUMNS.items():
            known = [lower[name] for name in names if name in lower]
            reader |= {key: known[0]} if known else {}
        if "image" in reader:
            return reader, f"{path.name} with the columns {', '.join(columns)}", "label" in reader
    return None


def _columns(path: Path) -> list[str]:
    if path.suffix == ".parquet":
        return pq.read_schema(path).names
    with path.open(encoding="utf-8") as file:
        return file.readline().rstrip("\n").split("\t" if path.suffix == ".tsv" else ",")


def _pictures(folder: Path) -> Found | None:
    tops = split_folders(folder)
    classes, count = set(), 0
    for top in tops.values() or [folder]:
        for path in itertools.islice(top.glob("*/**/*"), ENOUGH):
            if path.suffix.lower() in SUFFIXES:
                classes.add(path.relative_to(top).parts[0])
                count += 1
    if not count:
        return None
    splits = f", split into {', '.join(SPLITS[name.lower()] for name in tops)}" if tops else ""
    words = f"{count} pictures of {len(classes)} classes{splits}"
    return {"kind": "folder", "path": "."}, words, True


def _nothing(folder: Path) -> Found:
    loose = sum(path.suffix.lower() in SUFFIXES for path in folder.iterdir())
    also = f"; its {loose} pictures lie in no class's folder" if loose else ""
    raise CmpError(
        f"{folder}: no tars, no table with a column of images, and no folders of pictures{also}"
    )
