"""The order in which classes arrive, and its cut into tasks (spec 6)."""

import collections
import difflib
import functools
import hashlib
import itertools

import numpy as np
import pandas as pd

from cmp.config import Stream
from cmp.data import traits
from cmp.data.corpus import Corpus
from cmp.errors import CmpError
from cmp.streams.orders import ORDERS


def names(corpus: Corpus, rows: np.ndarray) -> np.ndarray:
    """The class of each image as "DATASET+++class", [len(rows)]."""
    table = corpus.table.iloc[rows]
    return (table["dataset"].astype(str) + "+++" + table["label"].astype(str)).to_numpy()


def adaptation_rows(corpus: Corpus) -> np.ndarray:
    """Positions of all training images of adaptation datasets, sorted."""
    train = corpus.rows("train")
    arriving = corpus.table["dataset"].iloc[train].isin(corpus.by_role("adapt"))
    return train[arriving.to_numpy()]


def entries(corpus: Corpus) -> list[str]:
    """Every adaptation class as "DATASET+++class", sorted."""
    return sorted(set(names(corpus, adaptation_rows(corpus))))


def arrange(corpus: Corpus, stream: Stream, seed: int) -> list[str]:
    """The classes in order of arrival: all of them or, where a list was imported, those of it.

    `CmpError` if a list names a class that the corpus has not, or other traits lack one of its.
    """
    written = () if stream.order == "random" else traits.stamp(stream.traits)
    name, reverse, table = stream.order, stream.reverse, stream.traits
    return list(_arrange(tuple(entries(corpus)), name, reverse, table, written, seed))


@functools.lru_cache(maxsize=512)
def _arrange(
    known: tuple[str, ...], order: str, reverse: bool, table: str, written: tuple, seed: int
) -> tuple[str, ...]:
    if order == "random":
        found = pd.DataFrame(index=pd.Index(known))
    else:
        found = traits.classes(table)
        if order == "listed":
            check_known(list(found.index), known, f"stream.traits: {table!r}")
        elif lacking := set(known) - set(found.index):
            raise CmpError(
                f"stream.traits: {table!r} lacks {len(lacking)} classes, such as {min(lacking)!r}; "
                "`cmp stream make` measures them all"
            )
        else:
            found = found.loc[list(known)]
    positions = ORDERS[order](found, seed)
    return tuple(found.index[positions[::-1] if reverse else positions])


def check_known(order: list[str], known: tuple[str, ...], source: str) -> None:
    """`CmpError` for a class that the corpus does not have, with the nearest one that it has."""
    if unknown := sorted(set(order) - set(known)):
        near = difflib.get_close_matches(unknown[0], known, n=1, cutoff=0.0)[0]
        raise CmpError(f"{source}: no class {unknown[0]!r} in the data; the nearest is {near!r}")


def digest(corpus: Corpus, stream: Stream, seed: int) -> str:
    """sha256 of the order, which stands for all that decided it."""
    return hashlib.sha256("\n".join(arrange(corpus, stream, seed)).encode()).hexdigest()


def cut(order: list[str], tasks: int, images: np.ndarray | None = None) -> list[list[str]]:
    """Consecutive blocks of n // T classes; the first n % T blocks hold one more (spec 6).

    images: of each class, [n]: then blocks of about equal image count instead. Each ends where the
    sum of images is nearest to its share, and holds one class at least.
    """
    if tasks > len(order):
        raise CmpError(f"stream.tasks: {tasks} tasks cannot share {len(order)} classes")
    if images is None:
        size, more = divmod(len(order), tasks)
        bounds = np.cumsum([0] + [size + (task < more) for task in range(tasks)])
    else:
        total = np.cumsum([0, *images])
        wanted = total[-1] * np.arange(tasks + 1) / tasks
        bounds = np.abs(total[:, None] - wanted).argmin(axis=0)
        room = np.arange(tasks + 1)  # one class a task before a bound, and one a task behind it
        bounds = np.maximum.accumulate(bounds - room).clip(0, len(order) - tasks) + room
    return [order[a:b] for a, b in itertools.pairwise(bounds)]


def blocks(corpus: Corpus, stream: Stream, seed: int) -> list[list[str]]:
    """The classes of each task."""
    order = arrange(corpus, stream, seed)
    if stream.equal == "classes":
        return cut(order, stream.tasks)
    counts = collections.Counter(names(corpus, adaptation_rows(corpus)))
    return cut(order, stream.tasks, np.array([counts[entry] for entry in order]))


def class_counts(tasks: list[list[str]]) -> pd.DataFrame:
    """Classes of each dataset (columns) in each task (index `task`, from 1)."""
    rows = [collections.Counter(entry.split("+++")[0] for entry in task) for task in tasks]
    index = pd.RangeIndex(1, len(tasks) + 1, name="task")
    return pd.DataFrame(rows, index=index).fillna(0).astype(int)


def task_rows(corpus: Corpus, stream: Stream, seed: int) -> list[np.ndarray]:
    """The training images of each task, as sorted positions in the corpus."""
    arriving = adaptation_rows(corpus)
    of = {entry: task for task, block in enumerate(blocks(corpus, stream, seed)) for entry in block}
    task = np.array([of.get(name, -1) for name in names(corpus, arriving)])
    return [arriving[task == number] for number in range(stream.tasks)]
