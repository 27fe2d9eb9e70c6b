"""Read and check a collection of image files, and join it into a `cmp.data.Corpus`."""

import dataclasses
import functools
import hashlib
import shlex
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from cmp import streams
from cmp.data import Corpus, build_corpus, load_data
from cmp.errors import CmpError, explain_errors
from cmp.readers import checks, folders, fomo, images, notes, pairs, tables, tars
from cmp.readers.files import FileTimes, have_changed, note_files
from cmp.readers.index import MEND_FAULTS, ImageIndex, summarise_faults
from cmp.readers.manifest import FileSet, load_manifests, manifest_files

READERS: dict[str, Callable[[FileSet, Path], ImageIndex]] = {
    "folder": folders.read_folder,
    "csv": tables.read_table_files,
    "jsonl": tables.read_table_files,
    "parquet": tables.read_table_files,
    "tars": tars.read_tars,
    "pairs": pairs.read_pairs,
    "fomo": fomo.read_fomo,
}
"""`reader.kind` -> the function that reads files."""

NOTHING_LEFT = "no usable image is left"


@dataclasses.dataclass(frozen=True)
class DatasetState:
    """The state of a dataset on this machine.

    Attributes:
        dataset: The manifest.
        state: "present", "absent", "partial" (files are missing), "wrong counts", "faulty", "empty"
            (no usable image is left), or "usable, N skipped" if the manifest says to skip faults.
        reason: Why it is not "present".
        index: The images found, if any.
    """

    dataset: FileSet
    state: str
    reason: str = ""
    index: ImageIndex | None = None


def load_fomo() -> Corpus:
    """Return FoMo-in-Flux from `fomo` in the build folder."""
    return load_folder("fomo")


def load_folder(source: str) -> Corpus:
    """Return a collection, cached until one of its files changes.

    Args:
        source: A name or path, see `manifest.manifest_folders`.

    Raises:
        CmpError: The data cannot be used, see `load_collection`.
    """
    stats = [(path, path.stat()) for path, _ in manifest_files(source)]
    stamps = tuple((path, stat.st_size, stat.st_mtime_ns) for path, stat in stats)
    corpus, noted = _load_folder(source, stamps)
    if have_changed(noted):
        _load_folder.cache_clear()
        corpus, _ = _load_folder(source, stamps)
    return corpus


@functools.lru_cache(maxsize=4)
def _load_folder(
    source: str, stamps: tuple[tuple[Path, int, int], ...]
) -> tuple[Corpus, FileTimes]:
    """Return a collection and the other files that were read for it, cached by the sizes and times
    of its manifests."""
    with note_files() as noted:
        indexes, with_embedded = load_collection(source)
    return corpus_from_indexes(split_by_update(indexes), with_embedded), noted


def split_by_update(indexes: list[ImageIndex]) -> list[ImageIndex]:
    """Split datasets by the update in which images arrive, and return the parts in that order.

    Images without an update come first. Later updates therefore have higher positions, and the
    random draws for earlier updates do not change when later ones arrive.

    Args:
        indexes: The datasets.
    """
    names = {name for index in indexes for name in index.table["update"]}
    parts = [
        dataclasses.replace(index, table=index.table[index.table["update"] == name])
        for name in sorted(names, key=streams.update_key)
        for index in indexes
    ]
    return [part for part in parts if len(part.table)]


def corpus_from_indexes(indexes: list[ImageIndex], with_embedded: bool = False) -> Corpus:
    """Join datasets of image files into a corpus.

    Args:
        indexes: The checked datasets. A dataset may have several parts, such as images that arrived
            later.
        with_embedded: Whether to add the embedded pool and retention sets. All images are then held
            in memory at 32 pixels, like the embedded ones.

    Raises:
        CmpError: A dataset has the same name as an added embedded one.
    """
    groups = _name_groups(indexes)
    tables = [_corpus_table(x).assign(group=y) for x, y in zip(indexes, groups, strict=True)]
    sets = _parts_by_set(indexes)
    descriptions = [_describe(parts) for parts in sets.values()]
    noted = {x.dataset.name: found for x in join_by_set(indexes) if (found := x.noted())}
    pictures = images.image_files(indexes)
    if with_embedded:
        embedded = load_data("embedded")
        names = [name for name, dataset in embedded.datasets.items() if dataset.role != "adapt"]
        if taken := sets.keys() & set(names):
            raise CmpError(
                f"{min(taken)}: name: an embedded dataset has the same name; choose another"
            )
        rows = np.flatnonzero(embedded.table["dataset"].isin(names))
        stored = embedded.table.iloc[rows].astype({"dataset": str, "split": str, "label": str})
        tables.insert(0, stored.assign(captions=[embedded.captions(row) for row in rows]))
        described = [(embedded.datasets[n], embedded.classes[n], embedded.hashes[n]) for n in names]
        descriptions = described + descriptions
        pixels = pictures.decode(range(len(pictures.positions)), images.decode_rgba)
        pictures = torch.cat([embedded.images[torch.from_numpy(rows)], pixels])
    return dataclasses.replace(build_corpus(pictures, tables, descriptions), noted=noted)


def _parts_by_set(indexes: list[ImageIndex]) -> dict[str, list[ImageIndex]]:
    parts: dict[str, list[ImageIndex]] = {}
    for index in indexes:
        parts.setdefault(index.dataset.name, []).append(index)
    return parts


def _describe(parts: list[ImageIndex]) -> tuple[FileSet, list[str], str]:
    """Return the manifest, classes and hash of a dataset from its parts."""
    if len(parts) == 1:
        return parts[0].dataset, parts[0].classes, parts[0].data_hash()
    classes = sorted({name for part in parts for name in part.classes})
    hashes = "".join(part.data_hash() for part in parts)
    return parts[0].dataset, classes, hashlib.sha256(hashes.encode()).hexdigest()


def join_by_set(indexes: list[ImageIndex]) -> list[ImageIndex]:
    """Return an index per dataset, whose table has the images of all of its parts."""
    return [
        dataclasses.replace(parts[0], table=pd.concat([part.table for part in parts]))
        for parts in _parts_by_set(indexes).values()
    ]


def _corpus_table(index: ImageIndex) -> pd.DataFrame:
    """Return a dataset's table in the form of a corpus, except for groups."""
    columns = ["split", "label", "captions", "update"]
    return index.table[columns].assign(dataset=index.dataset.name)


def _name_groups(indexes: list[ImageIndex]) -> list[pd.Series]:
    """Return the group of each image of each dataset: the name of the first image with its pixels,
    since copies are named or missed together. Other images may have that name, such as in another
    month; their pixels are added to it."""
    names: dict[int, str] = {}
    taken: set[str] = set()
    for index in indexes:
        for pixels, source in zip(index.table["pixels"], index.table["source"], strict=True):
            if pixels not in names:
                name = f"{index.dataset.name}/{source}"
                names[pixels] = f"{name} {pixels}" if name in taken else name
                taken.add(names[pixels])
    return [index.table["pixels"].map(names) for index in indexes]


def load_collection(source: str) -> tuple[list[ImageIndex], bool]:
    """Read and check the datasets of a collection, leaving out absent ones with a warning.

    Args:
        source: A name or path, see `manifest.manifest_folders`.

    Returns:
        The datasets, and whether to add the embedded ones.

    Raises:
        CmpError: All datasets are absent, or one has wrong counts or faults.
    """
    located = load_manifests(source)
    indexes, absent = [], []
    for dataset, root in located:
        try:
            index = read_index(dataset, root)
        except fomo.AbsentError:
            absent.append(dataset.name)
            continue
        if not index.faults and (differences := count_differences(index)):
            raise CmpError(f"{dataset.name}: counts: found {differences}")
        indexes.append(check_images(index))
    if absent:
        names = f"{', '.join(absent[:5])}{' ...' if len(absent) > 5 else ''}"
        message = (
            f"data: {len(absent)} of {len(located)} datasets of {source!r} are absent: {names}"
        )
        if not indexes:
            raise CmpError(f"{message}; run `cmpt data check {shlex.quote(source)}` for details")
        warnings.warn(f"{message}; scores cover only the others", stacklevel=2)
    if leaked := notes.leaked_pictures(indexes):
        message = leaked[0]
        if len(leaked) > 1:
            message += f" (`cmpt data check {shlex.quote(source)}` lists {len(leaked) - 1} more)"
        warnings.warn(message, stacklevel=2)
    return indexes, any(dataset.beside for dataset, _ in located)


def read_index(dataset: FileSet, root: Path) -> ImageIndex:
    """Return the images of a dataset and its faults, without decoding.

    Args:
        dataset: The manifest.
        root: The folder that its paths start from.

    Raises:
        CmpError: The dataset cannot be read at all.
    """
    with explain_errors(f"{dataset.name}: cannot be read"):
        return READERS[dataset.reader.kind](dataset, root)


def check_images(index: ImageIndex) -> ImageIndex:
    """Decode every image of a dataset once, and leave out unusable ones.

    Args:
        index: The dataset.

    Returns:
        The dataset without unusable images.

    Raises:
        CmpError: There are faults and the manifest does not say `faults: skip`, or no image
            is left.
    """
    usable, damaged = checks.usable_images(index)
    faults = index.faults + damaged
    if faults and index.dataset.faults == "refuse":  # all at once, as they are mended by hand
        count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        raise CmpError(f"{index.dataset.name}: {count} ({summarise_faults(faults)}); {MEND_FAULTS}")
    if usable.table.empty:
        raise CmpError(f"{index.dataset.name}: {NOTHING_LEFT}")
    labels = set(usable.table["label"])
    classes = [name for name in index.classes if index.target_count or name in labels]
    return dataclasses.replace(usable, faults=faults, classes=classes)


def dataset_state(dataset: FileSet, root: Path, decode: bool = True) -> DatasetState:
    """Determine the state of a dataset from its files, ignoring caches.

    Args:
        dataset: The manifest.
        root: The folder that its paths start from.
        decode: Whether to decode every image.
    """
    try:
        index = read_index(dataset, root)
    except CmpError as error:
        state = "absent" if isinstance(error, fomo.AbsentError) else "faulty"
        return DatasetState(dataset, state, str(error).removeprefix(f"{dataset.name}: "))
    usable, damaged = checks.usable_images(index, decode_again=True) if decode else (index, [])
    faults = index.faults + damaged
    index = dataclasses.replace(usable, faults=faults)
    state, reason = "present", ""
    if index.table.empty:
        state, reason = "empty", "; ".join(filter(None, [NOTHING_LEFT, summarise_faults(faults)]))
    elif missing := [fault.where for fault in faults if fault.kind == "missing file"]:
        total = len(index.table) + len(missing)
        state = "partial"
        reason = f"{len(missing)} of {total} images are missing, such as {', '.join(missing[:3])}"
        others = [fault for fault in faults if fault.kind != "missing file"]
        reason = "; ".join(filter(None, (reason, summarise_faults(others))))
    elif faults:
        state, reason = "faulty", summarise_faults(faults)
    elif reason := count_differences(index):
        state = "wrong counts"
    if faults and dataset.faults == "skip" and state != "empty":
        state = f"usable, {len(faults)} skipped"
    return DatasetState(dataset, state, reason, index)


def count_differences(index: ImageIndex) -> str:
    """Return how a dataset's counts differ from its manifest's, or "".

    Args:
        index: The dataset.
    """
    expected, counts = index.dataset.counts, index.counts()
    if not expected:
        return ""
    keys = ["classes", *index.dataset.allowed_splits()]
    triples = [(key, counts[key], getattr(expected, key)) for key in keys]
    return ", ".join(f"{key} {n}, not {wanted}" for key, n, wanted in triples if n != wanted)
