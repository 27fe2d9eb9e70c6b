"""The ledger of a release: every image that ever arrived, in order of arrival.

An image keeps its row forever. An image that is gone keeps its row without a split, so earlier
updates still draw the same samples.
"""

import collections
import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator
from pydantic.dataclasses import dataclass as checked_dataclass

from cmp import starts
from cmp.errors import CmpError, check_line
from cmp.parsing import parse_record
from cmp.readers.manifest import LONGEST_NAME, FileSet, PictureReader
from cmp.values import STRICT, Steps

EMBEDDED = "embedded"
"""In place of a folder: the embedded benchmark's pool and retention sets."""
SPLITS = ("", "train", "validation", "test")
"""The values of `Picture.split`."""
FLAT = {0}
"""The look hash of plain images, which all share."""
NAMED = 3
"""How many images a message names."""

Role = Literal["adapt", "pool", "eval"]
SET_NAMES: dict[Role, str] = {"adapt": "catalogue", "pool": "pool"}
"""The names of sets without a manifest. Everything that arrives joins one catalogue; each retention
set is called like its folder, see `joined_set`."""
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

    update: Steps
    name: Annotated[str, AfterValidator(check_line)]
    role: Role
    folder: str
    sets: tuple[dict[str, Any], ...] = ()

    def __post_init__(self) -> None:
        for tree in self.sets:
            if not {"root", "name"} <= tree.keys():
                raise ValueError("sets: root or name is missing")
            manifest_of(tree)
        for path in (self.folder, *(tree["root"] for tree in self.sets)):
            if not _is_path(path):
                raise ValueError(f"{path!r:.80} must be the path of a folder")


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
    """All images that have arrived so far, in the order of arrival.

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

    def parts(self) -> Iterator[tuple[int, dict[str, Any], list[int]]]:
        """Yield the number of an arrival, a set of it, and the positions of its images, for each
        set of which images were new."""
        places = collections.defaultdict(list)
        for place, picture in enumerate(self.pictures):
            places[picture.arrival, picture.set].append(place)
        for number, arrival in enumerate(self.arrivals):
            for tree in arrival.sets:
                if positions := places[number, tree["name"]]:
                    yield number, tree, positions

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
        readings = {}
        for number, tree, places in self.parts():
            if number < first:
                continue
            name, dataset = tree["name"], manifest_of(tree)
            pictures = [self.pictures[place] for place in places]
            keys = {*PictureReader.model_fields}
            reading = dataset.reader.model_dump(include=keys, exclude_defaults=True)
            usual_task = task_of({x.label for x in pictures}, name)
            if dataset.task != usual_task:
                reading["task"] = dataset.task
            is_classified = dataset.task == "classification"
            is_shown = any(x.captions == (dataset.prompt.format(x.label),) for x in pictures)
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
        similar: How many new images look like one on the other side: a training image like a
            held-out one, or the reverse.
        similar_names: Names of some of them.
        twice: How many new images are in the set under another class, too.
        twice_names: One of them, and the image that it equals, each with its class.
        copies: How many new images have the pixels, set, class and captions of a known image, in
            another file.
        new_names: Class names that were not known before.
        old_names: Class names that were known.
        untested_names: Its class names without a test image so far.
        skipped: How many things that cannot be used were left out, as the manifest says.
        skipped_faults: Their kinds, and names of some of them.
        reading: What a folder without a manifest was read as, or "".
    """

    new: dict[str, int] = dataclasses.field(default_factory=dict)
    again: int = 0
    held_out: int = 0
    held_from: tuple[str, ...] = ()
    similar: int = 0
    similar_names: tuple[str, ...] = ()
    twice: int = 0
    twice_names: tuple[str, ...] = ()
    copies: int = 0
    new_names: tuple[str, ...] = ()
    old_names: tuple[str, ...] = ()
    untested_names: tuple[str, ...] = ()
    skipped: int = 0
    skipped_faults: str = ""
    reading: str = ""


def manifest_of(tree: Mapping[str, Any]) -> FileSet:
    """Return the manifest of an arrival's set."""
    manifest = {key: value for key, value in tree.items() if key != "root"}
    return parse_record(json.dumps(manifest), FileSet)


def checked_ledger(arrivals: tuple[Arrival, ...], pictures: Sequence[Picture]) -> Ledger:
    """Return the ledger that a release was read from.

    Raises:
        ValueError: An image names an arrival, set or split that does not exist, or its source,
            label or captions are not what an arrival gives.
    """
    sets = {(n, tree["name"]) for n, x in enumerate(arrivals) for tree in x.sets}
    for place, picture in enumerate(pictures):
        is_known = (picture.arrival, picture.set) in sets and picture.split in SPLITS
        if not is_known:
            raise ValueError(f"row {place}: arrival, set or split is not in the release")
        captions = picture.captions if isinstance(picture.captions, tuple) else (None,)
        are_texts = all(isinstance(text, str) for text in (picture.label, *captions))
        if not (are_texts and _is_path(picture.source)):
            raise ValueError(f"row {place}: source, label and each caption must be texts")
    return Ledger(arrivals, tuple(pictures))


def _is_path(path: object) -> bool:
    """Return whether a value can be a path."""
    return isinstance(path, str) and "\0" not in path


def task_of(labels: Collection[str], name: str) -> str:
    """Return the task of a set by the labels of its images, which are its name without classes."""
    return "classification" if {*labels} - {name} else "retrieval"


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


def joined_set(ledger: Ledger, role: Role, folder: str, own: str) -> str:
    """Return the name of the set that a folder without a manifest belongs to.

    An update joins the only set of the earlier updates, so that a repeated name is one class. If
    there are several sets or none, it is the one in `SET_NAMES`.

    A retention folder is a set of its own, since A_ZS is the mean over sets. Given again with more
    images, it stays in its set, which streams from before that rule share among all folders.

    Args:
        ledger: The images so far.
        role: The role of the folder.
        folder: Its path.
        own: A name made from the folder's; a number follows if another set is called so.
    """
    if role != "eval":
        names = [*set_names(ledger, role)]
        return names[0] if role == "adapt" and len(names) == 1 else SET_NAMES[role]
    for arrival in ledger.arrivals:
        if (arrival.role, arrival.folder) == (role, folder) and len(arrival.sets) == 1:
            return arrival.sets[0]["name"]
    taken = {*known_sets(ledger), *SET_NAMES.values()}
    short = own[: LONGEST_NAME - len("-99999999")]
    numbered = (f"{short}-{number}" for number in itertools.count(2))
    return next(name for name in itertools.chain([own], numbered) if name not in taken)


def append(
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
        numbers = dict.fromkeys(x.arrival for x in used if x.key in keys)
        where = ", ".join(update_label(ledger.arrivals[n]) for n in numbers)
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
    # images with captions have no names: their label is that of the set
    captioned = {tree["name"] for tree in arrival.sets if tree["task"] == "retrieval"}
    labels = {(x.set, x.label) for x in new if x.set not in captioned}
    old_labels = {(x.set, x.label) for x in used}
    tested = {(x.set, x.label) for x in (*used, *new) if x.split == "test"}
    seen = {(x.key[:-1], x.pixels) for x in used}
    looks = {
        trains: {x.look for x in (*used, *new) if (x.split == "train") == trains} - FLAT
        for trains in (True, False)
    }
    similar = [x.source for x in new if x.look in looks[x.split != "train"]]
    pairs = _in_two_classes(used, new)
    shown = [f"{x.source} ({x.label})" for pair in pairs[:1] for x in pair]
    report = ArrivalReport(
        dict(collections.Counter(picture.split for picture in new)), len(arriving) - len(new),
        len(held), tuple(x.source for x in held[:NAMED]), len(similar), tuple(similar[:NAMED]),
        len(pairs), tuple(shown), sum((x.key[:-1], x.pixels) in seen for x in new),
        tuple(sorted(name for _, name in labels - old_labels)),
        tuple(sorted(name for _, name in labels & old_labels)),
        tuple(sorted(name for _, name in labels - tested)),
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
        CmpError: No images came from an old folder, nor from its new place.
    """
    arrivals = list(ledger.arrivals)
    places = [[os.path.abspath(os.path.expanduser(x)) for x in pair] for pair in moved.items()]
    known = [place for arrival in ledger.arrivals for place in _places_of(arrival)]
    for old, new in sorted(places, key=lambda pair: len(pair[0])):  # the closest folder counts
        if not any(came_from(place, old) for place in known):
            if any(came_from(place, new) for place in known) and all(map(os.path.exists, known)):
                continue  # a later release knows the new place already
            listed = ", ".join(dict.fromkeys(known)) or "no folder yet"
            raise CmpError(f"--moved: no images came from {old}; they came from {listed}")
        for n, arrival in enumerate(ledger.arrivals):
            folder, sets = arrivals[n].folder, arrivals[n].sets
            if came_from(arrival.folder, old):
                folder = _moved_place(arrival.folder, old, new)
            for place, tree in enumerate(arrival.sets):
                path = _outside_path(tree)
                if path and came_from(path, old):
                    reader = tree["reader"] | {"path": _moved_place(path, old, new)}
                    sets = (*sets[:place], sets[place] | {"reader": reader}, *sets[place + 1 :])
            arrivals[n] = dataclasses.replace(arrivals[n], folder=folder, sets=sets)
    return Ledger(tuple(arrivals), ledger.pictures)


def _places_of(arrival: Arrival) -> list[str]:
    """Return the folder of an arrival, and the paths outside it that its manifests name."""
    if arrival.folder == EMBEDDED:
        return []
    return [arrival.folder, *filter(None, map(_outside_path, arrival.sets))]


def _outside_path(tree: Mapping[str, Any]) -> str:
    """Return the absolute path that a manifest's reader has, or ""."""
    path = tree.get("reader", {}).get("path", "")
    return path if os.path.isabs(path) else ""


def _moved_place(place: str, old: str, new: str) -> str:
    return os.path.normpath(os.path.join(new, os.path.relpath(place, old)))
