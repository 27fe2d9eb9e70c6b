"""Read tables of class statistics, used to order classes and select pool images.

They are measured once, with one base, and stored. An order must be the same on every machine and
for every base, but accuracies measured again would differ.
"""

import functools
from pathlib import Path

import numpy as np
import pandas as pd

from cmp.data import Corpus
from cmp.errors import CmpError, explain_errors
from cmp.files import check_digest, child_path
from cmp.parsing import read_table
from cmp.project import build_folder
from cmp.readers.manifest import STATISTICS

ENDING = "-classes.parquet"
"""Suffix of the file of a class table, after the table's name."""
CLASS_COLUMNS = {
    "accuracy": float, "loss": float, "alignment": float, "frequency": int, "year": float,
    "position": int, "embedding": list,
}  # fmt: skip
"""Columns that a class table may have besides `entry`."""
POOL_COLUMNS = {"dataset": str, "place": int, "alignment": float, "cluster": int}
"""Columns of the table of the embedded pools; `place` is the index of an image in its dataset."""


def _folders() -> tuple[Path, Path]:
    """Return two folders of tables: the package's own, and those made on this machine."""
    return STATISTICS, build_folder() / "traits"


def statistics_path(name: str) -> Path:
    """Return the path of a class table, which may not exist yet.

    Args:
        name: The table's name, as in `stream.traits`.
    """
    paths = [child_path(folder, name, ENDING) for folder in _folders()]
    return next((path for path in paths if path.exists()), paths[-1])


def statistics_stamp(name: str) -> tuple[Path, int]:
    """Return the file of a class table and when it was written (0 if never), as a cache key."""
    path = statistics_path(name)
    return path, path.stat().st_mtime_ns if path.exists() else 0


def class_statistics(name: str) -> pd.DataFrame:
    """Return a class table, indexed by entry and sorted. Callers must not change it.

    Raises:
        CmpError: There is no such table, it is damaged, or it lists a class twice.
    """
    return _class_statistics(*statistics_stamp(name))


@functools.lru_cache(maxsize=8)
def _class_statistics(path: Path, written: int) -> pd.DataFrame:
    remedy = "use `cmpt stream make` or `cmpt stream import` to make"
    if not path.exists():
        tables = [path.name for folder in _folders() for path in folder.glob(f"*{ENDING}")]
        names = ", ".join(sorted({name.removesuffix(ENDING) for name in tables})) or "none"
        raise CmpError(f"traits: no table {path.name}; the tables are {names}; {remedy} one")
    again = "reinstall this package" if path.parent == STATISTICS else f"{remedy} it again"
    check_digest(path, again)
    with explain_errors(f"{path}: cannot be read", f"; {again}"):
        table = read_table(path, {"entry": str}, CLASS_COLUMNS)
    if (repeated := table["entry"].duplicated()).any():
        raise CmpError(f"{path}: {table.loc[repeated, 'entry'].iloc[0]!r} is listed twice")
    return table.set_index("entry").sort_index()


def pool_statistics(corpus: Corpus, rows: np.ndarray) -> pd.DataFrame:
    """Return `alignment` and `cluster` of embedded pool images, in the order of `rows`.

    Raises:
        CmpError: An image belongs to another pool, or the table is damaged.
    """
    path, again = STATISTICS / "embedded-pool.parquet", "reinstall this package"
    check_digest(path, again)
    with explain_errors(f"{path}: cannot be read", f"; {again}"):
        table = read_table(path, POOL_COLUMNS)
    datasets = corpus.table["dataset"].astype(str)
    places = datasets.groupby(datasets).cumcount()
    keys = pd.MultiIndex.from_arrays([datasets.iloc[rows], places.iloc[rows]])
    measured = table.set_index(["dataset", "place"])
    statistics = measured.loc[:, ["alignment", "cluster"]].reindex(keys)
    if (missing := statistics["alignment"].isna()).any():
        dataset = missing.index[missing][0][0]
        raise CmpError(
            "mixture.select: alignment and cluster are only measured for the embedded pools, not "
            f"for {dataset!r}; choose 'random' or 'concepts'"
        )
    return statistics.reset_index(drop=True)
