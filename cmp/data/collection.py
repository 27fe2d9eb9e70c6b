"""A collection of image files, read and checked: what a corpus is made of."""

import dataclasses
import warnings
from pathlib import Path

import numpy as np
import pandas as pd

from cmp.data import backed, filesets, raster
from cmp.data.filesets import FileSet
from cmp.data.readers import READERS
from cmp.data.readers.fomo import Absent
from cmp.data.readers.index import Index, refuse, summary
from cmp.errors import CmpError


@dataclasses.dataclass(frozen=True)
class State:
    """What there is of a set: "present", "absent", "partial" (files are missing), "wrong counts",
    or "faulty". why: in words; index: what can be used, if anything."""

    dataset: FileSet
    state: str
    why: str = ""
    index: Index | None = None


def read(dataset: FileSet, root: Path) -> Index:
    """What a set's reader finds; faults are listed in it, and nothing is decoded."""
    if dataset.reader.kind not in READERS:
        raise CmpError(f"{dataset.name}: reader.kind: {dataset.reader.kind!r} reads no files")
    return READERS[dataset.reader.kind](dataset, root)


def checked(index: Index) -> Index:
    """What can be used of a set, every image decoded once. `CmpError` if there are faults and the
    manifest does not say `faults: skip`, or if nothing is left."""
    refuse(index.dataset, index.faults)
    bad = backed.damaged(index)
    refuse(index.dataset, bad)
    names = {fault.where for fault in bad}
    table = index.table[~index.table["source"].isin(names)].reset_index(drop=True)
    if table.empty:
        raise CmpError(f"{index.dataset.name}: no image is left that could be used")
    classes = [name for name in index.classes if index.targets or name in set(table["label"])]
    return dataclasses.replace(index, table=table, faults=index.faults + bad, classes=classes)


def state(dataset: FileSet, root: Path, decode: bool = True) -> State:
    """What there is of a set. decode: whether every image is decoded, too."""
    try:
        index = read(dataset, root)
    except Absent as error:
        return State(dataset, "absent", _why(dataset, error))
    except CmpError as error:
        return State(dataset, "faulty", _why(dataset, error))
    faults = index.faults + (backed.damaged(index) if decode else [])
    index = dataclasses.replace(index, faults=faults)
    missing = [fault for fault in faults if fault.kind == "missing file"]
    if missing:
        total = len(index.table) + len(missing)
        why = f"{len(missing)} of {total} images are missing, such as {missing[0].where}"
        return State(dataset, "partial", why, index)
    if faults:
        return State(dataset, "faulty", summary(faults), index)
    if wrong := differences(index):
        return State(dataset, "wrong counts", wrong, index)
    return State(dataset, "present", "", index)


def _why(dataset: FileSet, error: CmpError) -> str:
    return str(error).removeprefix(f"{dataset.name}: ")


def differences(index: Index) -> str:
    """Where what was found is not what the manifest counts, in words."""
    expected, found = index.dataset.counts, index.counts()
    if not expected:
        return ""
    keys = ["classes", *index.dataset.allowed()]
    pairs = {key: (found[key], getattr(expected, key)) for key in keys}
    return ", ".join(f"{key} {a}, not {b}" for key, (a, b) in pairs.items() if a != b)


def load(source: str) -> tuple[list[Index], bool]:
    """The sets of a collection, checked, and whether the embedded sets are wanted beside them.

    Sets of the benchmark that are absent are left out, with a warning that names them; one whose
    counts are wrong is refused with `CmpError`, as is one with faults.
    """
    places, found, absent = filesets.read_all(source), [], []
    for dataset, root in places:
        try:
            index = read(dataset, root)
        except Absent:
            absent.append(dataset.name)
            continue
        if not index.faults and (wrong := differences(index)):
            raise CmpError(f"{dataset.name}: counts: found {wrong}")
        found.append(checked(index))
    if absent:
        words = f"{', '.join(absent[:5])}{' ...' if len(absent) > 5 else ''}"
        message = f"data: {len(absent)} of {len(places)} sets of {source!r} are absent: {words}"
        if not found:
            raise CmpError(f"{message}; `cmp data check {source}` says more")
        warnings.warn(f"{message}; scores are of the others alone", stacklevel=2)
    return found, any(dataset.beside for dataset, _ in places)


def packed(index: Index) -> np.ndarray:
    """A set's images as the embedded ones are: uint8 [N, 4, 32, 32], whole, in memory."""
    return np.stack([raster.decode(index.store.read(place)) for place in index.table["place"]])


def table(index: Index) -> pd.DataFrame:
    """A set's table as a corpus has it; every image is a group of its own."""
    columns = index.table[["split", "label", "captions"]]
    group = index.dataset.name + "/" + index.table["source"].astype(str)
    return columns.assign(group=group, dataset=index.dataset.name)
