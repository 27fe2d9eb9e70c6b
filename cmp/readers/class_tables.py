"""Tables of class statistics, by which classes are ordered and pool images selected.

They are measured once, with one base, and kept: an order must be the same on every machine and for
every base, and accuracies that are measured again would not be.
"""

import functools
from pathlib import Path

import numpy as np
import pandas as pd

from cmp.data import Corpus
from cmp.errors import CmpError, explain_errors
from cmp.files import check_digest, child_path, read_table
from cmp.project import build_folder
from cmp.readers.manifest import STATISTICS

ENDING = "-classes.parquet"
"""What follows the name of a table of classes in that of its file."""
CLASS_COLUMNS = {
    "accuracy": float, "loss": float, "alignment": float, "frequency": int, "year": float,
    "position": int, "embedding": list,
}  # fmt: skip
"""Columns that a table of classes may hold beside `entry`."""
POOL_COLUMNS = {"dataset": str, "place": int, "alignment": float, "cluster": int}
"""Columns of the table of the embedded pools; place is an image's number in its dataset."""


def _folders() -> tuple[Path, Path]:
    """Return the folders of tables: of those of this package, and of those made on this machine."""
    return STATISTICS, build_folder() / "traits"


def statistics_path(name: str) -> Path:
    """Return where a table of classes is, or would be made.

    Args:
        name: The table's name, as in `stream.traits`.
    """
    paths = [child_path(folder, name, ENDING) for folder in _folders()]
    return next((path for path in paths if path.exists()), paths[-1])


def statistics_stamp(name: str) -> tuple[Path, int]:
    """Return the file of a table of classes and when it was written (0 if never), for caches."""
    path = statistics_path(name)
    return path, path.stat().st_mtime_ns if path.exists() else 0


def class_statistics(name: str) -> pd.DataFrame:
    """Return the statistics of some classes, indexed by entry and sorted; not to be changed.

    Raises:
        CmpError: There is no such table, it is not what was written, or it lists a class twice.
    """
    return _class_statistics(*statistics_stamp(name))


@functools.lru_cache(maxsize=8)
def _class_statistics(path: Path, written: int) -> pd.DataFrame:
    remedy = "`cmpt stream make` or `cmpt stream import` makes"
    if not path.exists():
        tables = [path.name for folder in _folders() for path in folder.glob(f"*{ENDING}")]
        names = ", ".join(sorted({name.removesuffix(ENDING) for name in tables})) or "none"
        raise CmpError(f"traits: no table {path.name}; there are {names}; {remedy} one")
    again = "install this package again" if path.parent == STATISTICS else f"{remedy} it again"
    check_digest(path, again)
    with explain_errors(f"{path}: cannot be read", f"; {again}"):
        table = read_table(path, {"entry": str}, CLASS_COLUMNS)
    if (repeated := table["entry"].duplicated()).any():
        raise CmpError(f"{path}: {table.loc[repeated, 'entry'].iloc[0]!r} is listed twice")
    return table.set_index("entry").sort_index()


def pool_statistics(corpus: Corpus, rows: np.ndarray) -> pd.DataFrame:
    """Return `alignment` and `cluster` of images of the embedded pools, in the order of `rows`.

    Raises:
        CmpError: An image is of another pool, or the table is not what was written.
    """
    path, again = STATISTICS / "embedded-pool.parquet", "install this package again"
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
            f"mixture.select: images of {dataset!r} have no measured alignment or cluster, only "
            "those of the embedded pools; choose 'random' or 'concepts'"
        )
    return statistics.reset_index(drop=True)
