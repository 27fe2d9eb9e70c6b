"""What is known of classes and of replayable images before a run: what orders and selections go by.

`cmp stream make` measures them once, with one base (see `cmp.evaluation.measuring`), and keeps them
as tables: an order must be the same on every machine and for every base, and accuracies measured
anew would not be. Tables of the embedded benchmark ship in `data_manifests/traits`.
"""

import functools
from pathlib import Path

import numpy as np
import pandas as pd

from cmp.data.corpus import Corpus
from cmp.errors import CmpError
from cmp.files import whole_file
from cmp.paths import MANIFESTS, build_folder, named
from cmp.tables import read_table

CLASSES = {
    "accuracy": float, "loss": float, "alignment": float, "frequency": int, "year": float,
    "position": int, "embedding": list,
}  # fmt: skip
"""Columns that a table of classes may hold beside `entry`; see `cmp.evaluation.measuring`."""
POOL = {"dataset": str, "place": int, "alignment": float, "cluster": int}
"""Columns of a table of pool images; place: the image's number in its dataset."""


def path(name: str, of: str) -> Path:
    """Where a table is, or would be made. of: "classes" or "pool"."""
    shipped = named(MANIFESTS / "traits", f"{name}-{of}", ".parquet")
    return shipped if shipped.exists() else named(made(), f"{name}-{of}", ".parquet")


def made() -> Path:
    """The folder of tables that are made here."""
    return build_folder() / "traits"


def classes(name: str) -> pd.DataFrame:
    """The traits of some classes (index `entry`, sorted: "DATASET+++class"); not to be changed.

    `CmpError` if there is no such table, or it lists a class twice.
    """
    return _classes(*stamp(name))


def stamp(name: str) -> tuple[Path, int]:
    """The file of a table of classes and when it was written, 0 if never: a key for what is kept
    of it in memory."""
    file = path(name, "classes")
    return file, file.stat().st_mtime_ns if file.exists() else 0


@functools.lru_cache(maxsize=8)
def _classes(file: Path, written: int) -> pd.DataFrame:
    table = _read(file, {"entry": str}, "cmp stream make` or `cmp stream import")
    for column in set(table) & CLASSES.keys():
        _read(file, {column: CLASSES[column]}, "cmp stream make")
    if (twice := table["entry"].duplicated()).any():
        raise CmpError(f"{file}: {table['entry'][twice].iloc[0]!r} stands there twice")
    return table.set_index("entry").sort_index()


def _read(file: Path, columns: dict[str, type], command: str) -> pd.DataFrame:
    if not file.exists():
        folders = (MANIFESTS / "traits", made())
        of = file.stem.rpartition("-")[2]
        there = [p.stem.removesuffix(f"-{of}") for f in folders for p in f.glob(f"*-{of}.parquet")]
        known = ", ".join(sorted(set(there))) or "none"
        raise CmpError(f"traits: no table {file.name}; there are {known}; `{command}` makes one")
    try:
        return read_table(file, columns)
    except (OSError, ValueError) as error:
        raise CmpError(f"{file}: cannot be read ({error}); `{command}` makes it anew") from error


def write(table: pd.DataFrame, name: str, of: str) -> Path:
    """Keep a table of traits, whole or not at all."""
    file = named(made(), f"{name}-{of}", ".parquet")
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(file) as partial:
        table.to_parquet(partial, index=False)
    return file


def of_images(corpus: Corpus, rows: np.ndarray) -> pd.DataFrame:
    """`alignment` and `cluster` of pool images of the embedded benchmark, in the order of `rows`.

    `CmpError` for an image that has none.
    """
    table = _read(path("embedded", "pool"), POOL, "cmp stream make")
    datasets = corpus.table["dataset"].astype(str)
    places = datasets.groupby(datasets).cumcount()
    keys = pd.MultiIndex.from_arrays([datasets.iloc[rows], places.iloc[rows]])
    found = table.set_index(["dataset", "place"])[["alignment", "cluster"]].reindex(keys)
    if (lacking := found["alignment"].isna()).any():
        dataset = lacking.index[lacking][0][0]
        raise CmpError(f"traits: images of {dataset!r} have none; `cmp stream make` measures them")
    return found.reset_index(drop=True)
