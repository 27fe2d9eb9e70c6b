"""The order in which classes arrive, and its cut into tasks."""

import collections
import itertools

import numpy as np
import pandas as pd

from cmp.config import Stream
from cmp.data.corpus import Corpus
from cmp.errors import CmpError
from cmp.seeds import numpy_generator


def entries(corpus: Corpus) -> list[str]:
    """Every adaptation class as "DATASET+++class", sorted."""
    table = corpus.table[corpus.table["split"] == "train"]
    table = table[table["dataset"].isin(corpus.by_role("adapt"))]
    return sorted(set(table["dataset"].astype(str) + "+++" + table["label"].astype(str)))


def random(classes: list[str], seed: int) -> list[str]:
    """A uniform shuffle."""
    order = numpy_generator("stream", seed).permutation(len(classes))
    return [classes[index] for index in order]


ORDERS = {"random": random}


def cut(order: list[str], tasks: int) -> list[list[str]]:
    """Consecutive blocks of n // T classes; the first n % T blocks hold one more (spec 6)."""
    if tasks > len(order):
        raise CmpError(f"stream.tasks: {tasks} tasks cannot share {len(order)} classes")
    size, more = divmod(len(order), tasks)
    bounds = np.cumsum([0] + [size + (task < more) for task in range(tasks)])
    return [order[a:b] for a, b in itertools.pairwise(bounds)]


def class_counts(tasks: list[list[str]]) -> pd.DataFrame:
    """Classes of each dataset (columns) in each task (index `task`, from 1)."""
    rows = [collections.Counter(entry.split("+++")[0] for entry in task) for task in tasks]
    index = pd.RangeIndex(1, len(tasks) + 1, name="task")
    return pd.DataFrame(rows, index=index).fillna(0).astype(int)


def task_rows(corpus: Corpus, stream: Stream, seed: int) -> list[np.ndarray]:
    """The training images of each task, as sorted positions in the corpus."""
    tasks = cut(ORDERS[stream.order](entries(corpus), seed), stream.tasks)
    train = corpus.rows("train")
    table = corpus.table.iloc[train]
    names = table["dataset"].astype(str) + "+++" + table["label"].astype(str)
    return [train[names.isin(task).to_numpy()] for task in tasks]
