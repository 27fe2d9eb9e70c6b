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
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
from pydantic import AfterValidator
from pydantic.dataclasses import dataclass as checked_dataclass

from cmp import starts
from cmp.errors import CmpError, check_line
from cmp.parsing import parse_record
from cmp.readers.manifest import LONGEST_NAME, FileSet, PictureReader
from cmp.values import STRICT, Steps

EMBEDDED = "embedded"
"""In place of a folder: the embedded benchmark's pool and retention sets."""
COLUMNS: dict[str, type] = {
    "arrival": int, "set": str, "source": str, "split": str, "label": str, "captions": list,
    "digest": int, "pixels": int, "look": int,
}  # fmt: skip
"""The columns of `Ledger.pictures`, whose order is that of the values in `Ledger.digest`."""
SPLITS = ("", "train", "validation", "test")
"""The values of the column `split`."""
FLAT = 0
"""The look hash of plain images, which all share."""
FLIPS = np.append(0, 1 << np.arange(60))
"""What changes at most one bit of a look hash."""
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


def update_label(arrival: Arrival) -> str:
    """Return the name of an arrival's update in a corpus; "" for a pool or a retention set."""
    return f"{arrival.update} {arrival.name}" if arrival.role == "adapt" else ""


@dataclass(frozen=True, eq=False)
class Ledger:
    """All images that have arrived so far, in the order of arrival.

    Attributes:
        arrivals: The folders of the images.
        pictures: One row per image: `arrival`, the position of its arrival; `set`, which it belongs
            to; `source`, its name in that folder; `split`, or "" if it is no longer used; `label`,
            its class; `captions`, a tuple of texts; and as in `cmp.readers.index.ImageIndex`, the
            hashes `digest`, `pixels` and `look`.
    """

    arrivals: tuple[Arrival, ...] = ()
    pictures: pd.DataFrame = field(
        default_factory=lambda: pd.DataFrame(columns=pd.Index(COLUMNS)).astype(
            {name: object if kind is list else kind for name, kind in COLUMNS.items()}
        )
    )

    @property
    def updates(self) -> int:
        """The number of updates so far."""
        return max((arrival.update for arrival in self.arrivals), default=0)

    @property
    def used(self) -> pd.DataFrame:
        """The images that are still used."""
        return self.pictures[self.pictures["split"] != ""]

    def parts(self) -> Iterator[tuple[int, dict[str, Any], pd.DataFrame]]:
        """Yield the number of an arrival, a set of it, and its images, for each set of which images
        were new."""
        places = self.pictures.groupby(["arrival", "set"]).indices
        for number, arrival in enumerate(self.arrivals):
            for tree in arrival.sets:
                if (number, tree["name"]) in places:
                    yield number, tree, self.pictures.iloc[places[number, tree["name"]]]

    def digest(self, first: int = 0) -> str:
        """Return the sha256 of all images from an arrival on."""
        pictures, digest = self.pictures[self.pictures["arrival"] >= first], hashlib.sha256()
        for row in zip(*(pictures[name].tolist() for name in COLUMNS), strict=True):
            digest.update(json.dumps(row).encode() + b"\n")
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
        for number, tree, pictures in self.parts():
            if number < first:
                continue
            name, dataset = tree["name"], manifest_of(tree)
            keys = {*PictureReader.model_fields}
            reading = dataset.reader.model_dump(include=keys, exclude_defaults=True)
            usual_task = task_of({*pictures["label"]}, name)
            if dataset.task != usual_task:
                reading["task"] = dataset.task
            is_classified = dataset.task == "classification"
            captions = zip(pictures["captions"], pictures["label"], strict=True)
            is_shown = any(shown == (dataset.prompt.format(label),) for shown, label in captions)
            if is_classified and not is_shown and dataset.prompt != starts.USUAL_PROMPT:
                reading["prompt"] = dataset.prompt  # only the classifier uses it
            if reading:
                readings[f"{number} {name}"] = reading
        return readings

    def without(self, gone: np.ndarray | pd.Series) -> "Ledger":
        """Return the ledger with some images no longer used, whose rows are true in `gone`."""
        split = self.pictures["split"].mask(gone, "")
        return Ledger(self.arrivals, self.pictures.assign(split=split))


@dataclass(frozen=True)
class ArrivalReport:
    """The images and names that an arrival brought.

    Attributes:
        new: Its new images by split.
        again: How many images were known already, with the same class and captions.
        held_out: How many images were held out by an earlier arrival, and stay so.
        held_from: Names of some of them.
        similar: How many new images of each class look like one on the other side: a training
            image like a held-out one, or the reverse. The class with most comes first.
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
    similar: dict[str, int] = dataclasses.field(default_factory=dict)
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


def checked_ledger(arrivals: tuple[Arrival, ...], table: pd.DataFrame) -> Ledger:
    """Return the ledger that a release was read from.

    Args:
        arrivals: The folders of the images.
        table: The images, with an array per list of captions.

    Raises:
        ValueError: An image names an arrival, set or split that does not exist, or its source,
            label or captions are not what an arrival gives; or there are other columns.
    """
    if {*table} != {*COLUMNS}:
        raise ValueError(f"has the columns {', '.join(table)}, not {', '.join(COLUMNS)}")
    sets = [(n, tree["name"]) for n, x in enumerate(arrivals) for tree in x.sets]
    is_known = pd.MultiIndex.from_frame(table[["arrival", "set"]]).isin(sets)
    is_known &= table["split"].isin(SPLITS)
    are_texts = table["label"].notna() & ~table["source"].str.contains("\0", regex=False, na=True)
    are_texts &= table["captions"].map(
        lambda captions: isinstance(captions, np.ndarray) and {*map(type, captions)} <= {str}
    )
    for is_right, fault in (
        (is_known, "arrival, set or split is not in the release"),
        (are_texts, "source, label and each caption must be texts"),
    ):
        if not np.all(is_right):
            raise ValueError(f"row {np.argmin(is_right)}: {fault}")
    return Ledger(arrivals, table.assign(captions=[*map(tuple, table["captions"])])[[*COLUMNS]])


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
    first = roles.index("adapt") if "adapt" in roles else len(roles)
    pictures = ledger.pictures
    is_kept = pictures["arrival"].isin([n for n, role in enumerate(roles) if role == "eval"])
    is_changed = (pictures["arrival"] > first) | (pictures["split"] == "")
    return {*pictures["set"][is_kept & is_changed]}


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
    ledger: Ledger, arrival: Arrival, arriving: pd.DataFrame
) -> tuple[Ledger, ArrivalReport]:
    """Return the ledger with the new images of an arrival appended, see `arrive`.

    Args:
        ledger: The ledger.
        arrival: The arrival.
        arriving: Its images as in `Ledger.pictures`, and whether a file gave the split of each, in
            the column `given`.
    """
    used = ledger.used
    is_known = is_among(arriving, used)
    if is_known.all() and arrival.role == "adapt":
        numbers = used["arrival"][is_among(used, arriving)].unique()
        where = ", ".join(update_label(ledger.arrivals[n]) for n in numbers)
        raise CmpError(
            f"--data: {arrival.folder}: all images have arrived before, in update {where}; give a "
            "folder with new ones"
        )
    if is_known.all():
        raise CmpError(
            f"{OPTIONS[arrival.role]}: {arrival.folder} contains no new image; leave it out"
        )
    new, is_held = _share_splits(ledger, arriving[~is_known].reset_index(drop=True))
    if arrival.role == "adapt" and not (new["split"] == "train").any():
        fixed = new[new["given"] | is_held]
        is_taken = new["digest"].isin(fixed["digest"]) | new["pixels"].isin(fixed["pixels"])
        new["split"] = new["split"].where(is_taken, "train")
    every = pd.concat([used, new], ignore_index=True)
    # images with captions have no names: their label is that of the set
    captioned = [tree["name"] for tree in arrival.sets if tree["task"] == "retrieval"]
    labels, old_labels = _names_in(new[~new["set"].isin(captioned)]), _names_in(used)
    tested = _names_in(every[every["split"] == "test"])
    held, similar = new["source"][is_held], every.loc[_find_lookalikes(every, len(used))]
    pairs = _in_two_classes(every, len(used))
    shown = every.loc[[place for pair in pairs[:1] for place in pair], ["source", "label"]]
    report = ArrivalReport(
        dict(collections.Counter(new["split"])), int(is_known.sum()),
        len(held), (*held[:NAMED],),
        similar["label"].value_counts().to_dict(), (*similar["source"][:NAMED],),
        len(pairs), tuple(f"{source} ({label})" for source, label in shown.to_numpy()),
        int(is_among(new, used, "pixels").sum()),
        tuple(sorted(name for _, name in labels - old_labels)),
        tuple(sorted(name for _, name in labels & old_labels)),
        tuple(sorted(name for _, name in labels - tested)),
    )  # fmt: skip
    pictures = pd.concat([ledger.pictures, new[[*COLUMNS]]], ignore_index=True)
    return Ledger((*ledger.arrivals, arrival), pictures), report


def is_among(pictures: pd.DataFrame, others: pd.DataFrame, content: str = "digest") -> np.ndarray:
    """Return whether each image is also among others: in the same set, with the same class and
    captions, and an equal file or, if `content` is "pixels", equal pixels."""
    key = ["set", "label", "captions", content]
    found = pictures[key].merge(others[key].drop_duplicates(), "left", indicator="found")
    return (found["found"] == "both").to_numpy()


def _names_in(pictures: pd.DataFrame) -> set[tuple[str, str]]:
    """Return the names of classes with images, each with its set."""
    return {*pictures[["set", "label"]].drop_duplicates().itertuples(index=False, name=None)}


def _share_splits(ledger: Ledger, new: pd.DataFrame) -> tuple[pd.DataFrame, pd.Series]:
    """Return new images with the split of the first image that has their file or their pixels, and
    whether an earlier arrival holds each out.

    An image that is no longer used may have been trained on, so its split is "train", unless it
    was for retention or is also used elsewhere.
    """
    retention = [n for n, arrival in enumerate(ledger.arrivals) if arrival.role == "eval"]
    gone = ledger.pictures[ledger.pictures["split"] == ""]
    gone = gone[~gone["arrival"].isin(retention)].assign(split="train")
    known = pd.concat([ledger.used, gone])[::-1]  # the first image counts
    by_file, by_pixels = (
        dict(zip(known[name], known["split"], strict=True)) for name in ("digest", "pixels")
    )
    contents = [*zip(new["digest"], new["pixels"], strict=True)]
    earlier = [by_file.get(file) or by_pixels.get(pixels) for file, pixels in contents]
    splits = []
    for (file, pixels), own in zip(contents, new["split"], strict=True):
        splits.append(by_file.get(file) or by_pixels.get(pixels) or own)
        by_file.setdefault(file, splits[-1])
        by_pixels.setdefault(pixels, splits[-1])
    return new.assign(split=splits), pd.Series(earlier).isin(["validation", "test"])


def _find_lookalikes(pictures: pd.DataFrame, first: int) -> np.ndarray:
    """Return which images, from one on, look like an image on the other side of the split between
    training and tests; plain images do not count."""
    looks = pictures["look"].to_numpy(np.int64)
    trained, places = (pictures["split"] == "train").to_numpy(), np.arange(len(looks))
    old_trained, new_trained, held, new_held = (
        places[(looks != FLAT) & side & since]
        for side, since in (
            (trained, places < first), (trained, places >= first),
            (~trained, places >= 0), (~trained, places >= first),
        )
    )  # fmt: skip
    found = np.zeros(len(looks), bool)
    found[held], found[new_trained] = look_alike(looks[held], looks[new_trained])
    found[new_held] |= look_alike(looks[new_held], looks[old_trained])[0]
    return places[found & (places >= first)]


def look_alike(some: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return for each look hash on either side whether one on the other side differs in at most two
    bits. Such a pair has a number in common that differs from each in at most one bit.

    Args:
        some: Look hashes, int64; fewer than on the other side, for speed.
        others: Look hashes, int64.
    """
    near, places = np.unique(some[:, None] ^ FLIPS, return_inverse=True)
    others, positions = np.unique(others, return_inverse=True)  # in order, they are found faster
    is_shared, found = np.zeros(len(near) + 1, bool), np.zeros(len(others), bool)
    near = np.append(near, -1)  # no look hash, for those above all others
    for flip in FLIPS:
        flipped = others ^ flip
        at = np.searchsorted(near[:-1], flipped)
        is_equal = near[at] == flipped
        found |= is_equal
        is_shared[at[is_equal]] = True
    return is_shared[places.reshape(-1, len(FLIPS))].any(axis=1), found[positions]


def _in_two_classes(pictures: pd.DataFrame, first: int) -> list[tuple[int, int]]:
    """Return the images, from one on, that equal an image of another class in their set, each with
    the first such image."""
    places = pictures.index.to_series()
    twins = pd.Series(-1, places)
    for name in ("pixels", "digest"):  # an equal file is named rather than equal pixels
        twin = places.groupby([pictures["set"], pictures[name]]).transform("min")
        is_other = pictures["label"][twin].to_numpy() != pictures["label"]
        twins = twins.mask(is_other, twin)
    return [(place, twin) for place, twin in twins[first:].items() if twin >= 0]


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
