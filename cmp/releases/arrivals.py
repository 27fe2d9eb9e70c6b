"""Read the images of arrivals: when they arrive, and again for every later update."""

import dataclasses
import functools
import io
import os
import unicodedata
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from cmp import starts
from cmp.data import Corpus
from cmp.errors import CmpError, check_line, explain_errors
from cmp.parsing import parse_yaml
from cmp.readers import checks, collection, folders, infer
from cmp.readers.files import NoFilesError, ReadImage, exists
from cmp.readers.index import (
    HALF_CHARACTER,
    MEND_FAULTS,
    ImageIndex,
    draw_split,
    summarise_faults,
)
from cmp.readers.manifest import FileSet, find_manifests, init_command, load_manifests
from cmp.releases.ledger import (
    COLUMNS,
    EMBEDDED,
    NAMED,
    OPTIONS,
    Arrival,
    ArrivalReport,
    Ledger,
    Role,
    append,
    joined_set,
    known_sets,
    manifest_of,
    set_names,
    task_of,
    update_label,
)

GONE = -1
"""The position of an image that is gone."""
NO_FACTS = {"position": GONE, "size": 0, "changed": 0, "traits": 0}
"""The columns of an index for an image that is gone."""


def has_manifests(folder: Path) -> bool:
    """Return whether manifests describe a folder of images."""
    return bool(find_manifests(folder, "*.yaml") or find_manifests(folder, "*/*.yaml"))


def _refuse_deep_folders(folder: Path, option: str, how: str) -> None:
    """Raise `CmpError` if images are in folders within class folders: the upper ones are then
    more likely months than classes. `how` says how to write a manifest."""
    parts = 3 if folders.split_folders(folder) else 2
    deep = [
        path for path in folders.walk_files(folder)
        if folders.is_picture_name(path) and len(path.split("/")) > parts
    ]  # fmt: skip
    if deep:
        top = deep[0].split("/")[0]
        other = next((path for path in deep if path.split("/")[0] != top), deep[-1])
        raise CmpError(
            f"{option}: {folder}: images are in folders of folders, such as {deep[0]} and "
            f"{other}, so it is not clear which folders are classes; give one month's folder, such "
            f"as {folder / top}, or if {top} is a class, {how}"
        )


def _refuse_known_folders(ledger: Ledger, folder: Path, role: Role) -> None:
    """Raise `CmpError` if a folder without a manifest contains one with another role."""
    for arrival in ledger.arrivals:
        if Path(arrival.folder).is_relative_to(folder) and arrival.role != role:
            raise CmpError(
                f"{OPTIONS[role]}: {folder} contains {arrival.folder}, which was given by "
                f"{OPTIONS[arrival.role]}; give a folder without it"
            )


def _refuse_other_task(ledger: Ledger, index: ImageIndex, role: Role, folder: Path) -> None:
    """Raise `CmpError` if images that join a set lack what it is scored by: classes, or captions.

    A pool is not scored.
    """
    name, task, table = index.dataset.name, index.dataset.task, index.table
    known = known_sets(ledger).get(name)
    if role == "pool" or known is None:
        return
    before = known["task"]
    if before == "classification":
        lacks = task_of({*table["label"]}, name) != before
    else:
        prompts = [[index.dataset.prompt.format(label)] for label in table["label"]]
        lacks = table["captions"].tolist() == prompts
    if task != before and lacks:
        what = "classes" if before == "classification" else "captions"
        raise CmpError(
            f"{OPTIONS[role]}: {folder}: its images have no {what} (task {task!r}), but the set "
            f"{name!r}, which they would join, is scored by {what} (task {before!r}); name a set "
            f"of their own in a manifest ({init_command(folder)})"
        )


def check_pictures(dataset: FileSet, root: Path, folder: Path) -> ImageIndex:
    """Return the images of a set, each decoded once.

    Args:
        dataset: Its manifest, from a file or made by `read_sets`.
        root: The folder that its paths start from.
        folder: The given folder, which errors name if it has no manifest.

    Raises:
        CmpError: An image cannot be used.
    """
    try:
        return collection.check_images(collection.read_index(dataset, root))
    except CmpError as error:
        if has_manifests(folder):
            raise
        raise CmpError(f"{folder}: {without_manifest(str(error), dataset.name, folder)}") from error


def without_manifest(fault: str, name: str, folder: Path) -> str:
    """Return a fault without the set's name and its manifest's keys, which no user wrote.

    Args:
        fault: The fault.
        name: The name of the set that the images belong to.
        folder: Their folder.
    """
    how = f"fix or remove them, or {_how_to_join(folder, name, 'faults: skip')}"
    return fault.removeprefix(f"{name}: ").replace(MEND_FAULTS, how)


def _how_to_join(folder: Path, name: str, *keys: str) -> str:
    """Return how to write a manifest, with keys, that does not make a folder a set of its own."""
    written = " and ".join(f"`{key}`" for key in (*keys, f"name: {name}"))
    return (
        f"write a manifest ({init_command(folder)}), put {written} into it, and delete its "
        "`prompt`; with another name, the folder is a set of its own"
    )


def read_sets(
    folder: Path, role: Role, prompt: str, ledger: Ledger | None = None
) -> list[tuple[FileSet, Path]]:
    """Return the manifests of a folder of images, or one inferred from them.

    A known set keeps its prompt. A new one has that of its manifest, if any.

    Args:
        folder: The folder.
        role: The role of the images.
        prompt: The prompt for new sets whose manifest has none.
        ledger: The images so far, see `joined_set`.

    Returns:
        (manifest, folder that its paths start from) pairs.

    Raises:
        CmpError: The folder contains no images, a table beside class folders that cannot be used,
            a folder of images without a manifest beside folders with one, datasets with another
            role, or a known set with another role or prompt.
    """
    ledger = ledger or Ledger()
    known, option = known_sets(ledger), OPTIONS[role]
    roles = {tree["name"]: arrival.role for arrival in ledger.arrivals for tree in arrival.sets}
    if not folder.is_dir():
        raise CmpError(f"{option}: {folder} is not a folder")
    if has_manifests(folder):
        located = load_manifests(str(folder))
        for path in folders.undescribed_folders(folder, located):  # nobody would miss its images
            raise CmpError(
                f"{option}: {path}: has images but no manifest, though folders beside it have one; "
                f"write one ({init_command(path)}), or move the folder elsewhere"
            )
        if alien := [each for each, _ in located if each.role not in (role, "adapt")]:
            names = " or ".join(f"{o} ({r})" for r, o in OPTIONS.items() if r != role)
            raise CmpError(
                f"{option}: {folder}: {alien[0].name!r} has role {alien[0].role!r}; use {names}"
            )
    else:
        text, _, passed_over = infer.describe_folder(folder, role)
        tree = parse_yaml(text) | {"licence": "not given"}
        tree["name"] = joined_set(ledger, role, str(folder), tree["name"])
        how = _how_to_join(folder, tree["name"])
        if tree["reader"]["kind"] == "folder":
            _refuse_deep_folders(folder, option, how)
        if passed_over:  # it may have the captions, and the folders may not be classes
            unused = f"to leave it unused, move it elsewhere, or {how}"
            raise CmpError(f"{option}: {'; '.join(passed_over)}; {unused}")
        del tree["prompt"]
        with explain_errors(f"{option}: {folder}: has a name that is not UTF-8", "; rename it"):
            located = [(FileSet.model_validate(tree), folder)]
    for dataset, _ in located:
        if dataset.reader.kind == "fomo":
            raise CmpError(f"{option}: {dataset.name}: reader.kind: fomo is only for the benchmark")
        if (earlier := roles.get(dataset.name, role)) != role:
            how = "choose another in its manifest"
            if not has_manifests(folder):
                how = f"write a manifest with another one ({init_command(folder)})"
            raise CmpError(
                f"{option}: {folder}: name: {dataset.name!r} is the name of a set that was given "
                f"by {OPTIONS[earlier]}; {how}"
            )
    tree: dict[str, Any] = {"role": role, "update": None, "counts": None, "beside": None}
    sets = []
    for dataset, root in located:
        before = prompt
        if dataset.name in known:
            before = known[dataset.name].get("prompt", starts.USUAL_PROMPT)
        own = dataset.prompt if "prompt" in dataset.model_fields_set else before
        if own != before and dataset.name in known:  # it has one classifier
            raise CmpError(
                f"{option}: {folder}: {dataset.name}: prompt: {own!r}, but it was {before!r} "
                "before; leave it out to keep that, or rename the set"
            )
        changes = tree | {"prompt": own}
        if dataset.role != role:  # its splits are those of another role
            changes["splits"] = {}
        sets.append((dataset.model_copy(update=changes), root))
    return sets


def describe_reading(index: ImageIndex, folder: Path) -> str:
    """Return what a folder without a manifest was read as, and how many of its images its table
    does not list."""
    words = index.dataset.title
    if index.dataset.reader.kind in ("folder", "tars", "pairs"):
        return words
    listed = {*index.table["source"], *(fault.where for fault in index.faults)}
    listed = {*map(os.path.normpath, listed)}
    images = filter(folders.is_picture_name, folders.walk_files(folder))
    count = sum(path not in listed for path in images)
    return words + f"; images in the folder that are not in the table: {count:,}" * bool(count)


def check_utf8(text: str, named: str) -> None:
    """Raise `CmpError` if a path or a name is not UTF-8, and so can be neither stored nor printed.

    Args:
        text: The path or name.
        named: What a user calls it, for the message.
    """
    if HALF_CHARACTER.search(text):
        raise CmpError(f"{named}: {text!r}: name is not UTF-8; choose another")


def arrive(
    ledger: Ledger, folder: str, role: Role, name: str = "", prompt: str = starts.USUAL_PROMPT
) -> tuple[Ledger, ArrivalReport]:
    """Return the ledger with the images of a folder appended.

    An image with the same pixels as an earlier one gets the split of the earlier one, so that a
    held-out image is never trained on.

    Args:
        ledger: The images so far.
        folder: A folder of images, or `EMBEDDED`.
        role: Their role.
        name: The name of the update.
        prompt: The prompt for new sets, see `read_sets`.

    Returns:
        The new ledger, and a report on the arrival.

    Raises:
        CmpError: An image cannot be used, the folder brings nothing new, or it has classes where
            the set that it joins has captions, or the reverse.
    """
    number = ledger.updates + 1 if role == "adapt" else 0
    if folder == EMBEDDED:
        arrival = Arrival(number, name, role, EMBEDDED)
        return Ledger((*ledger.arrivals, arrival), ledger.pictures), ArrivalReport()
    path = Path(os.path.abspath(os.path.expanduser(folder)))
    if role == "adapt" and path.is_symlink():  # such as "latest", which soon leads elsewhere
        path = path.resolve()
    for option, text in ((OPTIONS[role], str(path)), ("--name", name)):
        check_utf8(text, option)
    try:
        name = check_line(name or path.name)
    except ValueError as error:
        raise CmpError(f"--name: {error}; choose another") from error
    if path.is_dir() and not has_manifests(path):
        _refuse_known_folders(ledger, path, role)
    located = read_sets(path, role, prompt, ledger)
    indexes = [check_pictures(*each, path) for each in located]
    for index in indexes:
        _refuse_other_task(ledger, index, role, path)
    named = {update for index in indexes for update in index.table["update"]}
    if role == "adapt" and len(named) > 1:
        some = ", ".join(sorted(named)[:NAMED])
        raise CmpError(
            f"{OPTIONS[role]}: {path} contains several updates ({some}); give one update at a time"
        )
    sets = tuple(
        {"root": os.path.relpath(root, path)}
        | dataset.model_dump(mode="json", exclude_unset=True)
        | {"task": index.dataset.task}  # its files may be gone later
        for (dataset, root), index in zip(located, indexes, strict=True)
    )
    arrival = Arrival(number, name, role, str(path), sets)
    ledger, report = append(ledger, arrival, pd.concat([_arriving(ledger, x) for x in indexes]))
    faults = [fault for index in indexes for fault in index.faults]
    facts = {"skipped": len(faults), "skipped_faults": summarise_faults(faults)}
    if role == "adapt" and not has_manifests(path):
        facts["reading"] = describe_reading(indexes[0], path)
    return ledger, dataclasses.replace(report, **facts)


def _arriving(ledger: Ledger, index: ImageIndex) -> pd.DataFrame:
    """Return the images of a set as `append` takes them. A file that recurs under its name gets
    another split, if no file gives it one: otherwise each month would test the same classes."""
    name, table = index.dataset.name, index.table
    known = ledger.pictures["source"][ledger.pictures["set"] == name]
    recurs = table["source"].isin(known) & ~table["given"]
    again = [
        draw_split(index.dataset, f"{ledger.updates + 1}/{x}") for x in table["source"][recurs]
    ]
    table = table.assign(arrival=len(ledger.arrivals), set=name)
    table["captions"] = [*map(tuple, table["captions"])]
    table.loc[recurs, "split"] = again
    return table[[*COLUMNS, "given"]]


def locate(ledger: Ledger, skip_gone: bool = False) -> tuple[Ledger, list[ImageIndex], int]:
    """Return the images of a ledger with their files, each checked by its hash.

    Args:
        ledger: The ledger.
        skip_gone: Whether to continue without images that are gone or have changed.

    Returns:
        The ledger, with no split for images that are gone; its sets as they arrived; and how many
        images are gone.

    Raises:
        CmpError: Images are gone, and `skip_gone` is not set; or images cannot be looked for, since
            the disk fails or a table is broken.
    """
    parts, gone = [], []
    for number, tree, pictures in ledger.parts():
        part, lost = _locate_set(ledger.arrivals[number], tree, pictures)
        gone += lost
        parts.append(part)
    if gone and not skip_gone:
        some = ledger.pictures.loc[sorted(gone)[:NAMED]]
        places = zip(some["arrival"], some["source"], strict=True)
        names = ", ".join(f"{ledger.arrivals[n].folder}/{source}" for n, source in places)
        raise CmpError(
            f"images of earlier updates that are gone or changed: {len(gone):,}, such as {names}; "
            "put them back (a renamed class folder counts as gone: rename it back), or pass "
            "--moved OLD=NEW, or --gone skip to continue without them"
        )
    return ledger.without(ledger.pictures.index.isin(gone)), parts, len(gone)


def count_present(ledger: Ledger) -> dict[str, tuple[int, int, str]]:
    """Return how many images of each folder the next update needs, and how many are there.

    Only names are compared, so a file that has changed counts as there.

    Returns:
        Folder -> (needed, there, why they cannot be looked for or ""), in the order of arrival.
    """
    counts: dict[str, tuple[int, int, str]] = {}
    for number, tree, pictures in ledger.parts():
        arrival = ledger.arrivals[number]
        sources = pictures["source"][pictures["split"] != ""]
        if len(sources):
            index, reason = _read_again(arrival, tree, sources)
            there = 0 if index is None else int(sources.isin(index.table["source"]).sum())
            before = counts.get(arrival.folder, (0, 0, ""))
            counts[arrival.folder] = (
                before[0] + len(sources), before[1] + there, before[2] or reason
            )  # fmt: skip
    return counts


def _read_again(
    arrival: Arrival, tree: Mapping[str, Any], sources: Collection[str]
) -> tuple[ImageIndex | None, str]:
    """Return the images of an arrival's set as they are now, or None if all of its files are gone
    or cannot be looked for; and in that case why, or "".

    Args:
        arrival: The arrival.
        tree: The set.
        sources: The names of the images that are needed.
    """
    dataset, root = manifest_of(tree), Path(arrival.folder, tree["root"])
    try:
        index = collection.read_index(dataset, root)
        if dataset.reader.kind == "folder":
            place, read = root / dataset.reader.path, {*index.table["source"]}
            read |= {fault.where for fault in index.faults if fault.kind != folders.NO_CLASS}
            unread = [x for x in sources if x not in read and exists(place / x)]
            if unread:  # a disk that ignores case has a renamed folder under both names
                known = {*map(_fold, read)}
                unread = [x for x in unread if _fold(x) not in known]
            if unread:
                raise CmpError(  # folders called train and test change which ones are classes
                    f"{unread[0]} is there, but in no folder that is now read as a class; undo "
                    "what has changed, such as new folders with names of splits, or links to "
                    "folders"
                )
    except NoFilesError:
        return None, ""
    except (CmpError, OSError) as error:
        reason = str(error).removeprefix(f"{dataset.name}: ")
        return None, f"{arrival.folder}: cannot look for its images: {reason}"
    return index, ""


def _fold(name: str) -> str:
    """Return a name as disks compare it that ignore the case of letters and how accents are
    encoded."""
    return unicodedata.normalize("NFC", name).casefold()


def _locate_set(
    arrival: Arrival, tree: Mapping[str, Any], pictures: pd.DataFrame
) -> tuple[ImageIndex, list[int]]:
    """Return the images of an arrival's set, and the rows in the ledger of those that are gone.

    Raises:
        CmpError: They cannot be looked for.
    """
    is_used = pictures["split"] != ""
    wanted = pictures["source"][is_used]
    index, reason = _read_again(arrival, tree, wanted) if len(wanted) else (None, "")
    if reason:
        raise CmpError(f"{reason}; nothing was left out")
    facts, rows = pd.DataFrame([NO_FACTS]), np.full(len(pictures), GONE)
    if index is not None:
        # this raises if the disk fails, as nothing is gone then
        examined, _ = checks.examine_images(index)
        # a copy in another split, added since, changes nothing: the ledger has the splits
        examined = examined[examined["fault"].isin(["", checks.REPEATED])]
        # tars of the same name in two folders may have images of the same name
        key = ["source", "digest"]
        examined = examined.drop_duplicates(key, keep="last")
        found, sought = (pd.MultiIndex.from_frame(x[key]) for x in (examined, pictures))
        rows = np.where(is_used, found.get_indexer(sought), GONE)
        facts = pd.concat([examined[[*NO_FACTS]], facts])  # the last row is that of `GONE`
    is_there = rows != GONE
    table = pictures.assign(
        split=pictures["split"].where(is_there, ""), captions=pictures["captions"].map(list),
        given=True, update=update_label(arrival), **facts.iloc[rows].set_index(pictures.index),
    ).reset_index(drop=True)  # fmt: skip
    classes = sorted(table["label"].unique())
    read = functools.partial(read_or_blank, None if index is None else index.read)
    part = ImageIndex(manifest_of(tree), table, read, [], classes)
    return part, [*pictures.index[is_used & ~is_there]]


@functools.cache
def _blank_file() -> bytes:
    """Return the file of a black pixel, in place of an image that is gone."""
    file = io.BytesIO()
    Image.new("RGB", (1, 1)).save(file, "png")
    return file.getvalue()


def read_or_blank(read: ReadImage | None, position: int) -> bytes:
    """Return the file of an image, or of one pixel if it is gone, as all are without `read`."""
    return _blank_file() if position == GONE or read is None else read(position)


def corpus_of(ledger: Ledger, parts: list[ImageIndex]) -> Corpus:
    """Return the data of a ledger, whose rows follow the order of arrival.

    An embedded pool that was replaced keeps its rows without a split, as any other pool does.

    Args:
        ledger: The ledger.
        parts: Its sets, see `locate`.
    """
    pools = [arrival.folder for arrival in ledger.arrivals if arrival.role == "pool"]
    corpus = collection.corpus_from_indexes(parts, EMBEDDED in pools)
    if EMBEDDED not in pools or pools[-1] == EMBEDDED:
        return corpus
    own = set_names(ledger, "pool")
    replaced = [name for name in corpus.by_role("pool") if name not in own]
    split = corpus.table["split"].astype(str)
    split = split.mask(corpus.table["dataset"].isin(replaced), "").astype("category")
    return dataclasses.replace(corpus, table=corpus.table.assign(split=split))
