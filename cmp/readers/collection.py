"""Readers of image files: each turns a manifest and a folder into an `index.Index`."""

import dataclasses
import functools
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from cmp.data import Corpus, build_corpus, load_data
from cmp.errors import CmpError
from cmp.readers import fomo, images, tables, tars
from cmp.readers.fomo import AbsentError
from cmp.readers.images import image_files
from cmp.readers.index import ImageIndex, refuse_faults, summarise_faults
from cmp.readers.manifest import FileSet, manifest_folders, manifests


def load_fomo() -> Corpus:
    """FoMo-in-Flux, from `fomo` in the build folder."""
    return load_folder("fomo")


def load_folder(source: str) -> Corpus:
    """A collection by name or path, see `manifest_folders`; read once, until a manifest changes.

    `CmpError` if anything of it cannot be used, see `load_collection`.
    """
    folders = [manifests for manifests, _ in manifest_folders(source)]
    paths = [path for folder in folders for path in sorted(folder.glob("*.yaml"))]
    return _load_folder(source, tuple((path, path.stat().st_mtime_ns) for path in paths))


@functools.lru_cache(maxsize=4)
def _load_folder(source: str, written: tuple[tuple[Path, int], ...]) -> Corpus:
    return corpus_from_indexes(*load_collection(source))


def corpus_from_indexes(indexes: list[ImageIndex], beside: bool = False) -> Corpus:
    """A corpus of image files; beside: with the embedded pool and retention sets, and then with
    all images in memory, as those are."""
    tables = [corpus_table(each) for each in indexes]
    about = [(each.dataset, each.classes, each.data_hash()) for each in indexes]
    if not beside:
        return build_corpus(image_files(indexes), tables, about)
    embedded = load_data("embedded")
    others = [name for name, each in embedded.datasets.items() if each.role != "adapt"]
    if both := {each.dataset.name for each in indexes} & set(others):
        raise CmpError(f"{min(both)}: name: an embedded dataset is called so, too; rename this one")
    kept = embedded.table["dataset"].isin(others).to_numpy()
    stored = embedded.table[kept].astype({"dataset": str, "split": str, "label": str})
    captions = [embedded.captions(row) for row in np.flatnonzero(kept)]
    stored = stored.assign(captions=pd.Series(captions, stored.index))
    known = [(embedded.datasets[n], embedded.classes[n], embedded.hashes[n]) for n in others]
    own = [torch.from_numpy(pack_images(each)) for each in indexes]
    images = torch.cat([embedded.images[torch.from_numpy(kept)], *own])
    return build_corpus(images, [stored, *tables], known + about)


READERS: dict[str, Callable[[FileSet, Path], ImageIndex]] = {
    "folder": tables.read_folder, "csv": tables.read_table_files, "parquet": tables.read_table_files, "tars": tars.read_tars,
    "fomo": fomo.read_fomo,
}  # fmt: skip
"""By `reader.kind`. A frame in memory is read by `rows.read_frame`."""


@dataclasses.dataclass(frozen=True)
class DatasetState:
    """What there is of a set: "present", "absent", "partial" (files are missing), "wrong counts",
    or "faulty". why: in words; index: what can be used, if anything."""

    dataset: FileSet
    state: str
    why: str = ""
    index: ImageIndex | None = None


def read_index(dataset: FileSet, root: Path) -> ImageIndex:
    """What a set's reader finds; faults are listed in it, and nothing is decoded."""
    if dataset.reader.kind not in READERS:
        raise CmpError(f"{dataset.name}: reader.kind: {dataset.reader.kind!r} reads no files")
    return READERS[dataset.reader.kind](dataset, root)


def check_images(index: ImageIndex) -> ImageIndex:
    """What can be used of a set, every image decoded once. `CmpError` if there are faults and the
    manifest does not say `faults: skip`, or if nothing is left."""
    refuse_faults(index.dataset, index.faults)
    bad = images.damaged_images(index)
    refuse_faults(index.dataset, bad)
    names = {fault.where for fault in bad}
    table = index.table[~index.table["source"].isin(names)].reset_index(drop=True)
    if table.empty:
        raise CmpError(f"{index.dataset.name}: no image is left that could be used")
    classes = [name for name in index.classes if index.targets or name in set(table["label"])]
    return dataclasses.replace(index, table=table, faults=index.faults + bad, classes=classes)


def dataset_state(dataset: FileSet, root: Path, decode: bool = True) -> DatasetState:
    """What there is of a set. decode: whether every image is decoded, too."""
    try:
        index = read_index(dataset, root)
    except AbsentError as error:
        return DatasetState(dataset, "absent", _reason(dataset, error))
    except CmpError as error:
        return DatasetState(dataset, "faulty", _reason(dataset, error))
    faults = index.faults + (images.damaged_images(index) if decode else [])
    index = dataclasses.replace(index, faults=faults)
    missing = [fault for fault in faults if fault.kind == "missing file"]
    if missing:
        total = len(index.table) + len(missing)
        why = f"{len(missing)} of {total} images are missing, such as {missing[0].where}"
        return DatasetState(dataset, "partial", why, index)
    if faults:
        return DatasetState(dataset, "faulty", summarise_faults(faults), index)
    if wrong := count_differences(index):
        return DatasetState(dataset, "wrong counts", wrong, index)
    return DatasetState(dataset, "present", "", index)


def _reason(dataset: FileSet, error: CmpError) -> str:
    return str(error).removeprefix(f"{dataset.name}: ")


def count_differences(index: ImageIndex) -> str:
    """Where what was found is not what the manifest counts, in words."""
    expected, found = index.dataset.counts, index.counts()
    if not expected:
        return ""
    keys = ["classes", *index.dataset.allowed()]
    pairs = {key: (found[key], getattr(expected, key)) for key in keys}
    return ", ".join(f"{key} {a}, not {b}" for key, (a, b) in pairs.items() if a != b)


def load_collection(source: str) -> tuple[list[ImageIndex], bool]:
    """The sets of a collection, checked, and whether the embedded sets are wanted beside them.

    Sets of the benchmark that are absent are left out, with a warning that names them; one whose
    counts are wrong is refused with `CmpError`, as is one with faults.
    """
    places, found, absent = manifests(source), [], []
    for dataset, root in places:
        try:
            index = read_index(dataset, root)
        except AbsentError:
            absent.append(dataset.name)
            continue
        if not index.faults and (wrong := count_differences(index)):
            raise CmpError(f"{dataset.name}: counts: found {wrong}")
        found.append(check_images(index))
    if absent:
        words = f"{', '.join(absent[:5])}{' ...' if len(absent) > 5 else ''}"
        message = f"data: {len(absent)} of {len(places)} sets of {source!r} are absent: {words}"
        if not found:
            raise CmpError(f"{message}; `cmpt data check {source}` says more")
        warnings.warn(f"{message}; scores are of the others alone", stacklevel=2)
    return found, any(dataset.beside for dataset, _ in places)


def pack_images(index: ImageIndex) -> np.ndarray:
    """A set's images as the embedded ones are: uint8 [N, 4, 32, 32], whole, in memory."""
    return np.stack([images.decode_rgba(index.store.read(place)) for place in index.table["place"]])


def corpus_table(index: ImageIndex) -> pd.DataFrame:
    """A set's table as a corpus has it; every image is a group of its own."""
    columns = index.table[["split", "label", "captions"]]
    group = index.dataset.name + "/" + index.table["source"].astype(str)
    return columns.assign(group=group, dataset=index.dataset.name)
