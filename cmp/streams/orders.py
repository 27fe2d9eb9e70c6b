"""The order in which classes arrive: functions of what is known of them, and of a seed (spec 6).

Where arrays leave no choice, a seed decides between equals and where a path begins; so every order
has replicates.
"""

from collections.abc import Callable

import numpy as np
import pandas as pd

from cmp.errors import CmpError
from cmp.seeds import numpy_generator
from cmp.streams.paths import nearest_path

Order = Callable[[pd.DataFrame, int], np.ndarray]
"""(traits of n classes, stream seed) -> their positions in order of arrival, [n]."""


def column(table: pd.DataFrame, name: str) -> np.ndarray:
    """A trait as an array, [n]; `CmpError` if the table does not hold it for every class."""
    if name not in table:
        held = ", ".join(table.columns) or "no traits at all"
        raise CmpError(f"stream.traits: no {name!r} in this table, only {held}")
    if name != "year" and table[name].isna().any():
        entry = table.index[table[name].isna()][0]
        raise CmpError(f"stream.traits: {entry!r} has no {name!r}")
    return np.stack(table[name].to_numpy())


def ascending(scores: np.ndarray, seed: int) -> np.ndarray:
    """Positions by rising score, [n]; equal ones in random order, unknown ones (NaN) last."""
    ties = numpy_generator("stream/ties", seed).permutation(len(scores))
    return np.lexsort((ties, scores))


def random(table: pd.DataFrame, seed: int) -> np.ndarray:
    """A uniform shuffle."""
    return numpy_generator("stream", seed).permutation(len(table))


def easy_accuracy(table: pd.DataFrame, seed: int) -> np.ndarray:
    """First what the base already gets right: falling zero-shot accuracy."""
    return ascending(-column(table, "accuracy"), seed)


def easy_loss(table: pd.DataFrame, seed: int) -> np.ndarray:
    """First what costs the base least: rising zero-shot cross-entropy."""
    return ascending(column(table, "loss"), seed)


def easy_alignment(table: pd.DataFrame, seed: int) -> np.ndarray:
    """First the classes whose images the base puts near their prompt: falling cosine."""
    return ascending(-column(table, "alignment"), seed)


def frequency(table: pd.DataFrame, seed: int) -> np.ndarray:
    """First what a corpus of texts hardly mentions, as in the reference's files."""
    return ascending(column(table, "frequency"), seed)


def similarity(table: pd.DataFrame, seed: int) -> np.ndarray:
    """Each class is followed by the most similar one that is left, by its name's embedding."""
    return nearest_path(column(table, "embedding"), numpy_generator("stream/path", seed))


def dataset(table: pd.DataFrame, seed: int) -> np.ndarray:
    """One dataset after the other, by year; the classes of each are shuffled."""
    names, place = np.unique(table.index.str.partition("+++").get_level_values(0), return_inverse=1)
    year = np.full(len(names), np.nan)
    year[place] = column(table, "year")
    rank = np.argsort(ascending(year, seed))
    return ascending(rank[place], seed)


def time(table: pd.DataFrame, seed: int) -> np.ndarray:
    """By the year of the dataset; the classes of one year are shuffled together."""
    return ascending(column(table, "year"), seed)


def listed(table: pd.DataFrame, seed: int) -> np.ndarray:
    """As a list says that was imported, whatever the seed."""
    return np.argsort(column(table, "position"), kind="stable")


ORDERS: dict[str, Order] = {
    "random": random, "easy-accuracy": easy_accuracy, "easy-loss": easy_loss,
    "easy-alignment": easy_alignment, "frequency": frequency, "similarity": similarity,
    "dataset": dataset, "time": time, "listed": listed,
}  # fmt: skip
"""By `stream.order`; `stream.reverse` reads one from its end."""
