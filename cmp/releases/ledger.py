"""The ledger of a release: every image that ever arrived, in order of arrival.

An image keeps its row forever. An image that is gone keeps its row without a split, so earlier
updates still draw the same samples.
"""

import collections
import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pandas as pd
from PIL import Image
from pydantic.dataclasses import dataclass as checked_dataclass

from cmp import starts
from cmp.data import Corpus
from cmp.errors import CmpError, check_line, explain_errors
from cmp.files import parse_record, parse_yaml
from cmp.readers import collection, images, infer, tables
from cmp.readers.files import ReadImage
from cmp.readers.index import HALF_CHARACTER, MEND_FAULTS, ImageIndex
from cmp.readers.manifest import FileSet, PictureReader, find_manifests, load_manifests
from cmp.values import STRICT

EMBEDDED = "embedded"
"""In place of a folder: the embedded benchmark's pool and retention sets."""
GONE = -1
"""The position of an image that is gone."""
NO_FACTS = {"position": GONE, "size": 0, "changed": 0, "traits": 0}
"""The columns of an index for an image that is gone."""
SPLITS = ("", "train", "validation", "test")
"""The values of `Picture.split`."""
FLAT = {0}
"""The look hash of plain images, which all share."""
NAMED = 3
"""How many images a message names."""

Role = Literal["adapt", "pool", "eval"]
SET_NAMES: dict[Role, str] = {"adapt": "catalogue", "pool": "pool", "eval": "kept"}
"""The names of sets without a manifest. Everything that arrives joins one catalogue."""
OPTIONS: dict[Role, str] = {"adapt": "--data", "pool": "--pool", "eval": "--retain"}


@checked_dataclass(frozen=True, config=STRICT)
class Arrival:
    """A folder of images that was given once.

    Attributes:
        update: The number of the update, from 1; 0 for a pool or retention sets.
        name: The name of the update.
        role: "adapt", "pool" or "eval".
        folder: The folder of the images, or `EMBEDDED`.
        sets: The manifests of its sets, as JSON.
    """

    update: int
    name: str
    role: Role
    folder: str
    sets: tuple[dict[str, Any], ...] = ()

    def __post_init__(self) -> None:
        for tree in self.sets:
            if not {"root", "name"} <= tree.keys():
                raise ValueError("sets: root or name is missing")
            _manifest_of(tree)


class Picture(NamedTuple):
    """A row of the ledger.

    Attributes:
        arrival: The position of its arrival.
        set: The set that it belongs to.
        source: Its name in that folder.
        split: "train", "validation" or "test"; "" if it is no longer used.
        label: Its class.
        captions: Its captions.
        digest: A hash of its file.
        pixels: A hash of its pixels.
        look: A hash that similar images share.
    """

    arrival: int
    set: str
    source: str
    split: str
    label: str
    captions: tuple[str, ...]
    digest: int
    pixels: int
    look: int

    @property
    def key(self) -> tuple:
        """The key that an image keeps when it is sent again."""
        return self.set, self.label, self.captions, self.digest


def update_label(arrival: Arrival) -> str:
    """Return the name of an arrival's update in a corpus; "" for a pool or a retention set."""
    return f"{arrival.update} {arrival.name}" if arrival.role == "adapt" else ""


@dataclass(frozen=True, eq=False)
class Ledger:
    """All images that arrived so far, in the order of arrival.

    Attributes:
        arrivals: The folders of the images.
        pictures: The images.
    """

    arrivals: tuple[Arrival, ...] = ()
    pictures: tuple[Picture, ...] = ()

    @property
    def updates(self) -> int:
        """The number of updates so far."""
        return max((arrival.update for arrival in self.arrivals), default=0)

    def digest(self, first: int = 0) -> str:
        """Return the sha256 of all images from an arrival on."""
        digest = hashlib.sha256()
        for picture in self.pictures:
            if picture.arrival >= first:
                digest.update(json.dumps(picture).encode() + b"\n")
        return digest.hexdigest()

    def unusual_readings(self, first: int) -> dict[str, dict[str, Any]]:
        """Return how the sets from an arrival on are read, where that differs from the default.

        Args:
            first: The position of the first arrival.

        Returns:
            "ARRIVAL SET" -> the keys of `PictureReader` that differ from their defaults; the task,
            if it does not follow from the images; and the prompt of classes, if no caption shows
            it.
        """
        pictures = collections.defaultdict(list)
        for picture in self.pictures:
            pictures[picture.arrival, picture.set].append(picture)
        readings = {}
        for number, arrival in enumerate(self.arrivals[first:], first):
            for tree in arrival.sets:
                name, dataset = tree["name"], _manifest_of(tree)
                if not (found := pictures[number, name]):  # none of its images was new
                    continue
                keys = {*PictureReader.model_fields}
                reading = dataset.reader.model_dump(include=keys, exclude_defaults=True)
                usual_task = _task_of({x.label for x in found}, name)
                if dataset.task != usual_task:
                    reading["task"] = dataset.task
                is_classified = dataset.task == "classification"
                is_shown = any(x.captions == (dataset.prompt.format(x.label),) for x in found)
                if is_classified and not is_shown and dataset.prompt != starts.USUAL_PROMPT:
                    reading["prompt"] = dataset.prompt  # only the classifier uses it
                if reading:
                    readings[f"{number} {name}"] = reading
        return readings

    def without(self, arrivals: Collection[int]) -> "Ledger":
        """Return the ledger with the images of some arrivals no longer used."""
        kept = [x._replace(split="") if x.arrival in arrivals else x for x in self.pictures]
        return Ledger(self.arrivals, tuple(kept))


@dataclass(frozen=True)
class ArrivalReport:
    """The images and names that an arrival brought.

    Attributes:
        new: Its new images by split.
        again: How many images were known already, with the same class and captions.
        held_out: How many images were held out by an earlier arrival, and stay so.
        held_from: Names of some of them.
        similar: How many new training images look like a held-out one.
        similar_names: Names of some of them.
        twice: How many new images are in the set under another class, too.
        twice_names: One of them, and the image that it equals, each with its class.
        new_names: Class names that were not known before.
        old_names: Class names that were known.
        untested_names: Those of `new_names` without a test image.
    """

    new: dict[str, int] = dataclasses.field(default_factory=dict)
    again: int = 0
    held_out: int = 0
    held_from: tuple[str, ...] = ()
    similar: int = 0
    similar_names: tuple[str, ...] = ()
    twice: int = 0
    twice_names: tuple[str, ...] = ()
    new_names: tuple[str, ...] = ()
    old_names: tuple[str, ...] = ()
    untested_names: tuple[str, ...] = ()


def _manifest_of(tree: Mapping[str, Any]) -> FileSet:
    """Return the manifest of an arrival's set."""
    manifest = {key: value for key, value in tree.items() if key != "root"}
    return parse_record(json.dumps(manifest), FileSet)


def checked_ledger(arrivals: tuple[Arrival, ...], pictures: Sequence[Picture]) -> Ledger:
    """Return the ledger that a release was read from.

    Raises:
        ValueError: An image names an arrival, set or split that does not exist.
    """
    sets = {(n, tree["name"]) for n, x in enumerate(arrivals) for tree in x.sets}
    for place, picture in enumerate(pictures):
        is_known = (picture.arrival, picture.set) in sets and picture.split in SPLITS
        if not (is_known and isinstance(picture.source, str) and isinstance(picture.label, str)):
            raise ValueError(f"row {place}: arrival, set or split is not in the release")
    return Ledger(arrivals, tuple(pictures))


def known_sets(ledger: Ledger) -> dict[str, dict[str, Any]]:
    """Return the sets of a ledger by name, each as it arrived first."""
    known: dict[str, dict[str, Any]] = {}
    for tree in (tree for arrival in ledger.arrivals for tree in arrival.sets):
        known.setdefault(tree["name"], tree)
    return known


def set_names(ledger: Ledger, role: Role) -> dict[str, None]:
    """Return the names of a role's sets in the order of their arrival."""
    arrived = (arrival.sets for arrival in ledger.arrivals if arrival.role == role)
    return dict.fromkeys(tree["name"] for sets in arrived for tree in sets)


def changed_retention(ledger: Ledger) -> set[str]:
    """Return the retention sets that have gained or lost images since the first update. A subset of
    such a set may have as many images as before, but different ones."""
    roles = [arrival.role for arrival in ledger.arrivals]
    return {
        picture.set for picture in ledger.pictures
        if roles[picture.arrival] == "eval"
        and ("adapt" in roles[: picture.arrival] or not picture.split)
    }  # fmt: skip


def joined_set(ledger: Ledger, role: Role) -> str:
    """Return the name of the set that a folder without a manifest belongs to.

    An update joins the only set of the earlier updates, so that a repeated name is one class. If
    there are several sets or none, it is the one in `SET_NAMES`.
    """
    names = [*set_names(ledger, role)]
    return names[0] if role == "adapt" and len(names) == 1 else SET_NAMES[role]


def has_manifests(folder: Path) -> bool:
    """Return whether manifests describe a folder of images."""
    return bool(find_manifests(folder, "*.yaml") or find_manifests(folder, "*/*.yaml"))


def _refuse_deep_folders(folder: Path, option: str) -> None:
    """Raise `CmpError` if images are in folders within class folders: the upper ones are then
    more likely months than classes."""
    parts = 3 if tables.split_folders(folder) else 2
    deep = [
        path for path in tables.walk_files(folder)
        if tables.is_picture_name(path) and len(path.split("/")) > parts
    ]  # fmt: skip
    if deep:
        top = deep[0].split("/")[0]
        other = next((path for path in deep if path.split("/")[0] != top), deep[-1])
        raise CmpError(
            f"{option}: {folder}: images are in folders of folders, such as {deep[0]} and "
            f"{other}, so it is not clear which folders are classes; give one month's folder, such "
            f"as {folder / top}, or if {top} is a class, write a manifest with `cmpt data init "
            f"{folder}`"
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
        lacks = _task_of({*table["label"]}, name) != before
    else:
        prompts = [[index.dataset.prompt.format(label)] for label in table["label"]]
        lacks = table["captions"].tolist() == prompts
    if task != before and lacks:
        what = "classes" if before == "classification" else "captions"
        raise CmpError(
            f"{OPTIONS[role]}: {folder}: its images have no {what} (task {task!r}), but the set "
            f"{name!r}, which they would join, is scored by {what} (task {before!r}); name a set "
            f"of their own in a manifest (`cmpt data init {folder}`)"
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
    """Return a fault without the set's name and its manifest's keys, which no user wrote."""
    how = f"fix or remove them, or set `faults: skip` in a manifest (`cmpt data init {folder}`)"
    return fault.removeprefix(f"{name}: ").replace(MEND_FAULTS, how)


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
        CmpError: The folder contains no images, datasets with another role, or a known set with
            another role or prompt.
    """
    ledger = ledger or Ledger()
    known, option = known_sets(ledger), OPTIONS[role]
    roles = {tree["name"]: arrival.role for arrival in ledger.arrivals for tree in arrival.sets}
    if not folder.is_dir():
        raise CmpError(f"{option}: {folder} is not a folder")
    if has_manifests(folder):
        located = load_manifests(str(folder))
        if alien := [each for each, _ in located if each.role not in (role, "adapt")]:
            names = " or ".join(f"{o} ({r})" for r, o in OPTIONS.items() if r != role)
            raise CmpError(
                f"{option}: {folder}: {alien[0].name!r} has role {alien[0].role!r}; use {names}"
            )
    else:
        text, _ = infer.describe_folder(folder, role)
        tree = parse_yaml(text)
        if tree["reader"]["kind"] == "folder":
            _refuse_deep_folders(folder, option)
        tree = tree | {"licence": "not given"}
        tree["name"] = joined_set(ledger, role)
        del tree["prompt"]
        with explain_errors(f"{option}: {folder}: has a name that is not UTF-8", "; rename it"):
            located = [(FileSet.model_validate(tree), folder)]
    for dataset, _ in located:
        if dataset.reader.kind == "fomo":
            raise CmpError(f"{option}: {dataset.name}: reader.kind: fomo is only for the benchmark")
        if (earlier := roles.get(dataset.name, role)) != role:
            how = "choose another in its manifest"
            if not has_manifests(folder):
                how = f"write a manifest with another one (`cmpt data init {folder}`)"
            raise CmpError(
                f"{option}: {folder}: name: {dataset.name!r} is the name of a set that was given "
                f"by {OPTIONS[earlier]}; {how}"
            )
    tree: dict[str, Any] = {"role": role, "update": None, "counts": None, "beside": None}
    tree |= {} if role == "adapt" else {"splits": {}}
    sets = []
    for dataset, root in located:
        before = prompt
        if dataset.name in known:
            before = known[dataset.name].get("prompt", starts.USUAL_PROMPT)
        own = dataset.prompt if "prompt" in dataset.model_fields_set else before
        if own != before and dataset.name in known:  # it has one classifier
            raise CmpError(
                f"{option}: {folder}: {dataset.name}: prompt: {own!r}, but it was {before!r} "
                "before; keep that, or rename the set"
            )
        sets.append((dataset.model_copy(update=tree | {"prompt": own}), root))
    return sets


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
    for option, text in ((OPTIONS[role], str(path)), ("--name", name)):
        if HALF_CHARACTER.search(text):
            raise CmpError(f"{option}: {text!r}: name is not UTF-8; choose another")
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
    if len(named) > 1:
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
    arriving, free = [], set()  # splits that no file gives may change
    for index in indexes:
        columns = [index.table[name] for name in ("source", "split", "label", "captions")]
        hashes = [index.table[name].tolist() for name in images.HASHES]
        for (source, split, label, captions), *numbers, is_given in zip(
            zip(*columns, strict=True), *hashes, index.table["given"], strict=True
        ):
            about = (len(ledger.arrivals), index.dataset.name, source, split, label)
            arriving.append(Picture(*about, tuple(captions), *numbers))
            free |= set() if is_given else {(index.dataset.name, source)}
    return _append(ledger, arrival, arriving, free)


def _append(
    ledger: Ledger, arrival: Arrival, arriving: list[Picture], free: Collection[tuple[str, str]]
) -> tuple[Ledger, ArrivalReport]:
    """Return the ledger with the new images of an arrival appended, see `arrive`.

    Args:
        ledger: The ledger.
        arrival: The arrival.
        arriving: Its images.
        free: The sets and names of images whose split no file gives.
    """
    used = [picture for picture in ledger.pictures if picture.split]
    known, splits = {picture.key for picture in used}, _splits_of(ledger)
    before, new, held = dict(splits), [], []
    for picture in arriving:
        if picture.key in known:
            continue
        names = _contents(picture)
        earlier = [split for name in names if (split := before.get(name))]
        if earlier and earlier[0] != "train":
            held.append(picture)
        split = next((splits[name] for name in names if name in splits), picture.split)
        new.append(picture._replace(split=split))
        for name in names:
            splits.setdefault(name, split)
    if not new and arrival.role == "adapt":
        keys = {picture.key for picture in arriving}
        before = dict.fromkeys(x.arrival for x in used if x.key in keys)
        where = ", ".join(update_label(ledger.arrivals[n]) for n in before)
        raise CmpError(
            f"--data: {arrival.folder}: all images have arrived before, in update {where}; give a "
            "folder with new ones"
        )
    if not new:
        raise CmpError(
            f"{OPTIONS[arrival.role]}: {arrival.folder} contains no new image; leave it out"
        )
    if arrival.role == "adapt" and not any(picture.split == "train" for picture in new):
        fixed = [x for x in new if (x.set, x.source) not in free] + held
        taken = {name for picture in fixed for name in _contents(picture)}
        new = [x if taken & {*_contents(x)} else x._replace(split="train") for x in new]
    labels, old_labels = ({(x.set, x.label) for x in some} for some in (new, used))
    tested = {(x.set, x.label) for x in new if x.split == "test"}
    scored = {x.look for x in (*used, *new) if x.split != "train"} - FLAT
    similar = [x.source for x in new if x.split == "train" and x.look in scored]
    pairs = _in_two_classes(used, new)
    shown = [f"{x.source} ({x.label})" for pair in pairs[:1] for x in pair]
    report = ArrivalReport(
        dict(collections.Counter(picture.split for picture in new)), len(arriving) - len(new),
        len(held), tuple(x.source for x in held[:NAMED]), len(similar), tuple(similar[:NAMED]),
        len(pairs), tuple(shown),
        tuple(sorted(name for _, name in labels - old_labels)),
        tuple(sorted(name for _, name in labels & old_labels)),
        tuple(sorted(name for _, name in labels - old_labels - tested)),
    )  # fmt: skip
    return Ledger((*ledger.arrivals, arrival), (*ledger.pictures, *new)), report


def _contents(picture: Picture) -> tuple[tuple[str, int], tuple[str, int]]:
    """Return what images with one split have in common: their file or their pixels."""
    return ("file", picture.digest), ("pixels", picture.pixels)


def _in_two_classes(
    used: Sequence[Picture], new: Sequence[Picture]
) -> list[tuple[Picture, Picture]]:
    """Return the new images that equal an image of another class in their set, each with the first
    such image."""
    first: dict[tuple[str, str, int], Picture] = {}
    pairs = []
    for place, picture in enumerate((*used, *new)):
        names = [(picture.set, *name) for name in _contents(picture)]
        twins = [first.setdefault(name, picture) for name in names]
        others = [twin for twin in twins if twin.label != picture.label]
        if others and place >= len(used):
            pairs.append((picture, others[0]))
    return pairs


def _splits_of(ledger: Ledger) -> dict[tuple[str, int], str]:
    """Return the split of the first image by the hash of its file, and by that of its pixels.

    An image that is no longer used may have been trained on, so its split is "train", unless it
    was for retention or is also used elsewhere.
    """
    splits: dict[tuple[str, int], str] = {}
    for picture in sorted(ledger.pictures, key=lambda picture: not picture.split):
        if picture.split or ledger.arrivals[picture.arrival].role != "eval":
            split = picture.split or "train"
            for name in _contents(picture):
                splits.setdefault(name, split)
    return splits


def came_from(folder: str, old: str) -> bool:
    """Return whether an arrival's folder is `old`, or inside it."""
    old = os.path.abspath(os.path.expanduser(old))
    return f"{folder}/".startswith(f"{old.rstrip('/')}/")


def move(ledger: Ledger, moved: Mapping[str, str]) -> Ledger:
    """Return the ledger with the new places of folders that have moved.

    Args:
        ledger: The ledger.
        moved: Old folder -> new folder, which includes everything below it.

    Raises:
        CmpError: No images came from an old folder.
    """
    arrivals = list(ledger.arrivals)
    places = [[os.path.abspath(os.path.expanduser(x)) for x in pair] for pair in moved.items()]
    for old, new in sorted(places, key=lambda pair: len(pair[0])):  # the closest folder counts
        is_below = [came_from(arrival.folder, old) for arrival in ledger.arrivals]
        if not any(is_below):
            folders = [x.folder for x in ledger.arrivals if x.folder != EMBEDDED]
            known = ", ".join(dict.fromkeys(folders))
            raise CmpError(f"--moved: no images came from {old}; they came from {known}")
        for n, arrival in enumerate(ledger.arrivals):
            if is_below[n]:
                folder = os.path.normpath(os.path.join(new, os.path.relpath(arrival.folder, old)))
                arrivals[n] = dataclasses.replace(arrival, folder=folder)
    return Ledger(tuple(arrivals), ledger.pictures)


def locate(ledger: Ledger, skip_gone: bool = False) -> tuple[Ledger, list[ImageIndex], int]:
    """Return the images of a ledger with their files, each checked by its hash.

    Args:
        ledger: The ledger.
        skip_gone: Whether to continue without images that are gone or have changed.

    Returns:
        The ledger, with no split for images that are gone; its sets as they arrived; and how many
        images are gone.

    Raises:
        CmpError: Images are gone, and `skip_gone` is not set; or the disk fails.
    """
    parts, gone = [], set()
    places_of = collections.defaultdict(list)
    for place, picture in enumerate(ledger.pictures):
        places_of[picture.arrival, picture.set].append(place)
    for number, arrival in enumerate(ledger.arrivals):
        for tree in arrival.sets:
            places = places_of[number, tree["name"]]
            if not places:  # none of the set's images in this folder were new
                continue
            part, lost = _locate_set(arrival, tree, [ledger.pictures[place] for place in places])
            gone |= {places[n] for n in lost}
            parts.append(part)
    if gone and not skip_gone:
        some = [ledger.pictures[place] for place in sorted(gone)[:NAMED]]
        names = ", ".join(f"{ledger.arrivals[x.arrival].folder}/{x.source}" for x in some)
        raise CmpError(
            f"{len(gone)} images from earlier updates are gone or have changed, such as {names}; "
            "put them back, or pass --moved OLD=NEW, or --gone skip to continue without them"
        )
    kept = (x._replace(split="") if n in gone else x for n, x in enumerate(ledger.pictures))
    return Ledger(ledger.arrivals, tuple(kept)), parts, len(gone)


def count_present(ledger: Ledger) -> dict[str, tuple[int, int]]:
    """Return how many images of each folder the next update needs, and how many are there.

    Only names are compared, so a file that has changed counts as there.

    Returns:
        Folder -> (needed, there), in the order of arrival.
    """
    needed = collections.defaultdict(list)
    for picture in ledger.pictures:
        if picture.split:
            needed[picture.arrival, picture.set].append(picture.source)
    counts: dict[str, tuple[int, int]] = {}
    for number, arrival in enumerate(ledger.arrivals):
        for tree in arrival.sets:
            sources, names = needed[number, tree["name"]], frozenset()
            with contextlib.suppress(CmpError):  # the folder itself may be gone
                index = collection.read_index(
                    _manifest_of(tree), Path(arrival.folder, tree["root"])
                )
                names = frozenset(index.table["source"])
            if sources:
                before = counts.get(arrival.folder, (0, 0))
                there = sum(source in names for source in sources)
                counts[arrival.folder] = before[0] + len(sources), before[1] + there
    return counts


def _locate_set(
    arrival: Arrival, tree: Mapping[str, Any], pictures: list[Picture]
) -> tuple[ImageIndex, list[int]]:
    """Return the images of an arrival's set, and the positions of those that are gone."""
    dataset = _manifest_of(tree)
    files: dict[tuple[str, int], dict[str, Any]] = {}
    index = None
    with contextlib.suppress(CmpError):  # the folder itself may be gone
        index = collection.read_index(dataset, Path(arrival.folder, tree["root"]))
    if index is not None:
        found, _ = images.examine_images(index)  # raises if the disk fails, as nothing is gone then
        # a copy in another split, added since, changes nothing: the ledger has the splits
        found = found[found["fault"].isin(["", images.REPEATED])]
        # tars of the same name in two folders may have images of the same name
        keys = zip(found["source"], found["digest"], strict=True)
        files = dict(zip(keys, found[[*NO_FACTS]].to_dict("records"), strict=True))
    update = update_label(arrival)
    rows, lost = [], []
    for place, picture in enumerate(pictures):
        facts = files.get((picture.source, picture.digest)) if picture.split else None
        if picture.split and not facts:
            lost.append(place)
        row = (facts or NO_FACTS) | picture._asdict()
        split = picture.split if facts else ""
        rows.append(row | {"split": split, "captions": list(picture.captions)})
    table = pd.DataFrame(rows).assign(given=True, update=update)
    classes = sorted({picture.label for picture in pictures})
    read = functools.partial(read_or_blank, None if index is None else index.read)
    return ImageIndex(dataset, table, read, [], classes), lost


def _task_of(labels: Collection[str], name: str) -> str:
    """Return the task of a set by the labels of its images, which are its name without classes."""
    return "classification" if {*labels} - {name} else "retrieval"


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
