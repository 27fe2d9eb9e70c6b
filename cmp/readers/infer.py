"""Write a manifest from the content of a folder (`cmpt data init`)."""

import glob
import itertools
import json
import os
import re
import warnings
from collections.abc import Collection
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from cmp.errors import CmpError, clean_text, explain_limit, first_line
from cmp.files import write_atomic
from cmp.parsing import parse_yaml, read_yaml
from cmp.readers import pairs
from cmp.readers.files import APPLE_DOUBLE, file_stamp
from cmp.readers.folders import is_picture_name, split_folders, walk_files
from cmp.readers.index import SPLIT_NAMES
from cmp.readers.manifest import (
    FILE_ENDINGS,
    LONGEST_NAME,
    SPLIT_SHARES,
    Role,
    find_manifests,
    refuse_two_levels,
)
from cmp.readers.tables import check_width, list_columns, read_csv, read_jsonl

MAX_FILES = 100_000
"""Most files to inspect."""
LOOKED_AT = 20
"""Texts beside images that are read to see whether they are captions."""
_WORDS = read_yaml(Path(__file__).with_name("infer.yaml"))
COLUMN_NAMES: dict[str, list[str]] = _WORDS["columns"]
"""Key of the manifest -> recognised column names."""
TABLE_KINDS = {
    ending: kind for kind, endings in FILE_ENDINGS.items() if kind != "tars" for ending in endings
}
"""Ending of a table -> `reader.kind`."""
ROLES: dict[str, str] = _WORDS["roles"]
"""Role -> the purpose of a dataset with this role."""

Inference = tuple[dict[str, str], str, list[str]]
"""(the reader's keys, a description of what was found, unused columns of a table)."""


def infer_manifest(folder: Path, role: Role = "adapt") -> tuple[Path, str, str]:
    """Compose the manifest of a folder with tars, a table or images.

    Args:
        folder: The folder.
        role: The purpose of its images. A manifest for data that arrive in the stream also shows
            which data can be scored and replayed with them.

    Returns:
        The path for the manifest, its text, and a description of what was found. A warning names
        each table that cannot be used.

    Raises:
        CmpError: The folder contains none of these, or manifests would be at two levels.
    """
    if not folder.is_dir():
        raise CmpError(f"{folder}: no such folder")
    path = folder / "manifest.yaml"
    refuse_two_levels(find_manifests(Path(os.path.abspath(folder)).parent, "*.yaml"), [path])
    refuse_two_levels([path], find_manifests(folder, "*/*.yaml"))
    text, words, passed_over = describe_folder(folder, role)
    for sentence in passed_over:
        warnings.warn(sentence, stacklevel=2)
    return path, text, words


def describe_folder(folder: Path, role: Role) -> tuple[str, str, list[str]]:
    """Return the text of a manifest for a folder, a description of what was found, and a sentence
    on each table beside class folders that cannot be used; see `infer_manifest`."""
    passed_over: list[str] = []
    inference = (
        _infer_tars(folder)
        or _infer_pairs(folder)
        or _infer_table(folder, passed_over)
        or _infer_folder(folder, passed_over)
    )
    if not inference:
        loose = sum(is_picture_name(path.name) for path in folder.iterdir())
        also = [f"{loose} images are not in a class folder"] if loose else []
        raise CmpError(
            f"{folder}: contains no tars, no table with a column of images, and no folders of "
            f"{'; '.join(['images', *also, *passed_over])}"
        )
    reader, words, unused = inference
    labelled = reader["kind"] == "folder" or "label" in reader
    name = re.sub(r"[^a-z0-9]+", "-", folder.resolve().name.lower()).strip("-")[:LONGEST_NAME]
    name = name or "pictures"
    if parse_yaml(name) != name:  # such as 2026, which is a number
        name = json.dumps(name)
    prompt = "a photo of a {}" if labelled else "{}"
    title = " ".join(clean_text(words).split())
    parts = {"title": title, "prompt": prompt, "reader": reader, "splits": SPLIT_SHARES[role]}
    cells = {key: json.dumps(part) for key, part in parts.items()}
    text = _WORDS["template"].format(name=name, role=role, meaning=ROLES[role], **cells)
    text += _WORDS["beside"] if role == "adapt" else ""
    found = f"found: {words}{_describe_unused(reader, unused)}"
    return text, found, passed_over if reader["kind"] == "folder" else []


def _describe_unused(reader: dict[str, str], unused: list[str]) -> str:
    """Return a line about unused columns and the keys that could name them, or ""."""
    keys = {"label": "classes", "caption": "captions"}
    missing = [f"the column of {keys[key]} as `{key}:`" for key in keys if key not in reader]
    hint = f"; name {' or '.join(missing)} in `reader`" if missing else ""
    return f"\nnot used: {list_columns(unused)}{hint}" if unused else ""


def write_manifest(path: Path, text: str) -> None:
    """Write a manifest unless the file exists.

    Args:
        path: The file.
        text: Its content.

    Raises:
        CmpError: The file exists, or cannot be written.
    """
    if path.exists():
        raise CmpError(f"{path}: already exists; move it away to have a manifest written")
    write_atomic(path, text)


def _infer_tars(folder: Path) -> Inference | None:
    for pattern in ("*.tar", "*/*.tar"):
        found = [path for path in folder.glob(pattern) if not path.name.startswith(APPLE_DOUBLE)]
        if tars := sorted(found):
            if beside := _infer_folder(folder, []):
                raise CmpError(
                    f"{folder}: contains tars, such as {tars[0].name}, and beside them {beside[1]}"
                    "; move either elsewhere, or write a manifest whose reader names what to read"
                )
            words = f"{len(tars)} tars, the first being {tars[0].name}"
            return {"kind": "tars", "path": pattern}, words, []
    return None


def _infer_pairs(folder: Path) -> Inference | None:
    """Recognise images with captions beside most of them, reading a few captions."""
    paths = dict.fromkeys(itertools.islice(walk_files(folder), MAX_FILES))
    pictures = [path for path in paths if is_picture_name(path)]
    paired = [path for path in pictures if pairs.text_names(path, paths)]
    some = paired[:LOOKED_AT]
    captions = [pairs.read_texts(folder, path, paths, {})[1][1] for path in some]
    if 2 * len(paired) <= len(pictures) or 2 * sum(map(bool, captions)) <= len(some):
        return None
    words = f"{len(pictures)} images, with captions beside {len(paired)} of them, as img2dataset"
    return {"kind": "pairs", "path": "."}, f"{words} writes them; folders are not classes", []


def _infer_table(folder: Path, passed_over: list[str]) -> Inference | None:
    """Recognise a table with a column of images; `passed_over` gets a sentence on each other table.

    Raises:
        CmpError: There are several.
    """
    usable: list[Inference] = []
    for path in _visible_files(folder, TABLE_KINDS):
        stamp, kind = file_stamp(folder, path.name, {}), TABLE_KINDS[path.suffix.lower()]
        if stamp.size < 0:  # a pipe or a link elsewhere may not end
            passed_over.append(f"{path}: not used: {stamp.problem}")
            continue
        fix = (
            "; to use it, save it as UTF-8 with commas, and " if kind == "csv" else "; to use it, "
        )
        fix += "name its column of images filepath"
        try:
            if kind == "parquet":
                columns = pq.read_schema(path).names
            elif kind == "jsonl":
                columns = list(read_jsonl(path, rows=1))
            else:
                columns = list(read_csv(path, rows=0))
            check_width(path, len(columns))
        except (OSError, ValueError, pa.ArrowException) as error:
            if explain_limit(error):
                raise
            passed_over.append(f"{path}: not used: cannot be read ({first_line(error):.200}){fix}")
            continue
        lower = {column.lower(): column for column in columns}
        reader = {"kind": kind, "path": glob.escape(path.name)}
        for key, names in COLUMN_NAMES.items():
            matches = [lower[name] for name in names if name in lower]
            reader |= {key: matches[0]} if matches else {}
        if "image" in reader:
            unused = [column for column in columns if column not in reader.values()]
            used = [f"{reader[key]} ({key})" for key in COLUMN_NAMES if key in reader]
            words = f"{path.name} with the columns {list_columns([*used, *unused])}"
            usable.append((reader, words, unused))
            continue
        some = list_columns(columns)
        passed_over.append(f"{path}: not used: none of its columns has images ({some:.200}){fix}")
    if len(usable) > 1:
        names = list_columns([reader["path"] for reader, *_ in usable])
        raise CmpError(
            f"{folder}: several tables list images ({names}); leave one, or write a manifest whose "
            "reader.path matches those to read, such as '*.csv'"
        )
    return usable[0] if usable else None


def _visible_files(folder: Path, endings: Collection[str]) -> list[Path]:
    """Return the files directly inside a folder with one of some endings, in any case, sorted."""
    inside = (path for path in folder.iterdir() if path.suffix.lower() in endings)
    return sorted(path for path in inside if path.name[0] != "." and not path.is_dir())


def _infer_folder(folder: Path, passed_over: list[str]) -> Inference | None:
    """Recognise class folders; `passed_over` gets a sentence on each list beside a single one,
    which is then more likely a folder of captioned images than a class."""
    inside = split_folders(folder)
    splits = [SPLIT_NAMES.get(path.name.lower(), path.name) for path in inside]
    depth = 1 if splits else 0
    paths = itertools.islice(walk_files(folder), MAX_FILES)
    parts = [path.split("/") for path in paths if is_picture_name(path)]
    parts = [names for names in parts if len(names) > depth + 1]
    classes = [names[depth] for names in parts]
    if not classes:
        return None
    if len(set(classes)) == 1:
        lists = _visible_files(folder, [".json"])  # tables have been looked at
        lists += [path for top in inside for path in _visible_files(top, [".json", *TABLE_KINDS])]
        line = {"file_name": "/".join(parts[0]), "text": "a red shoe"}
        line |= {"split": parts[0][0]} if splits else {}
        passed_over += [
            f"{path}: not used: all images would be of one class, {classes[0]!r}; if it lists "
            f"their captions, write them to {folder / 'metadata.jsonl'}, with a line for each "
            f"image, such as {json.dumps(line)}" for path in lists
        ]  # fmt: skip
    words = f"{len(classes)} images of {len(set(classes))} classes"
    words += f", split into {', '.join(splits)}" if splits else ""
    return {"kind": "folder", "path": "."}, words, []
