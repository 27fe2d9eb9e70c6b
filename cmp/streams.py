"""The order in which classes arrive and how it is split into tasks, or the updates that the data
define."""

import collections
import functools
import itertools
import re
from typing import Any

import numpy as np
import pandas as pd

from cmp.config import Stream
from cmp.data import Corpus
from cmp.errors import CmpError, did_you_mean
from cmp.registry import Option, get_option, load_entry, register
from cmp.seeds import numpy_generator


def class_names(corpus: Corpus, rows: np.ndarray) -> np.ndarray:
    """Return the class of each image as "DATASET+++class", [len(rows)]."""
    table = corpus.table.iloc[rows]
    return (table["dataset"].astype(str) + "+++" + table["label"].astype(str)).to_numpy()


def class_numbers(corpus: Corpus) -> np.ndarray:
    """Return the number of each image's class, by first appearance in the corpus, [N]."""
    return pd.factorize(class_names(corpus, np.arange(len(corpus.table))))[0]


def adaptation_rows(corpus: Corpus, *, gone: bool = False) -> np.ndarray:
    """Return the sorted corpus positions of all training images of adaptation datasets and, if
    `gone`, of their images that are gone, which have no split: an update whose images are all gone
    remains a task."""
    is_adapted = corpus.table["dataset"].isin(corpus.by_role("adapt"))
    splits = ["train", ""] if gone else ["train"]
    return np.flatnonzero(is_adapted & corpus.table["split"].isin(splits))


def update_names(corpus: Corpus, rows: np.ndarray) -> np.ndarray:
    """Return the update of each image, [len(rows)]; raise `CmpError` if an image has none."""
    names = corpus.table["update"].iloc[rows].astype(str).to_numpy()
    if len(unnamed := rows[names == ""]):
        image = corpus.table["group"].iloc[unnamed[0]]
        raise CmpError(
            f"stream.order: this order needs data that name their updates, and {image} names none; "
            "give your own `data`, with `update:` in each manifest or in the `reader` of a table"
        )
    return names


def class_order(corpus: Corpus, stream: Stream, seed: int) -> list[str]:
    """Return the classes, or the updates that the data define, in order of arrival.

    Args:
        corpus: The data.
        stream: The config section.
        seed: The stream seed.

    Raises:
        CmpError: The table of statistics lacks a class, or an imported list names a class that is
            not in the corpus.
    """
    option = get_option("order", stream.order)
    measured = option.facts["statistics"]
    stamp = statistics_tables().statistics_stamp(stream.traits) if measured else ()
    if option.facts["updates"]:
        names = update_names(corpus, adaptation_rows(corpus, gone=True))
    else:
        names = class_names(corpus, adaptation_rows(corpus))
    entries = tuple(sorted({*names}))
    stamp = option.digest, *stamp  # in a notebook, what the option uses may be redefined
    return list(_class_order(entries, option, stream.reverse, stream.traits, stamp, seed))


@functools.lru_cache(maxsize=512)
def _class_order(
    entries: tuple[str, ...], option: Option, reverse: bool, traits: str, stamp: tuple, seed: int
) -> tuple[str, ...]:
    if not entries:
        raise CmpError("stream.order: no classes arrive; add data with `role: adapt`")
    is_measured, is_partial = option.facts["statistics"], option.facts["partial"]
    table = class_statistics(traits) if is_measured else pd.DataFrame(index=pd.Index(entries))
    if is_partial and (unknown := sorted(set(table.index) - set(entries))):
        hint = did_you_mean(unknown[0], entries)
        raise CmpError(f"stream.traits: {traits!r}: no class {unknown[0]!r} in the data{hint}")
    if not is_partial:
        if missing := set(entries) - set(table.index):
            raise CmpError(
                f"stream.traits: {traits!r} lacks {len(missing)} classes, such as "
                f"{min(missing)!r}; measure them with `cmpt stream make`"
            )
        table = table.loc[list(entries)]
    positions = np.asarray(option.value(table, seed))
    if not np.array_equal(np.sort(positions, axis=None), np.arange(len(table))):
        raise CmpError(
            f"stream.order: {option.name!r} returned {positions.size} positions for {len(table)} "
            "classes; it must return each position once"
        )
    return tuple(table.index[positions[::-1] if reverse else positions])


def cut_into_tasks(
    order: list[str], tasks: int, images: np.ndarray | None = None
) -> list[list[str]]:
    """Split an order into consecutive tasks.

    Args:
        order: n classes.
        tasks: T, the number of tasks.
        images: Images per class, [n]. If given, tasks have about the same number of images: each
            has at least one class and ends where the sum of images is closest to its share.
            Otherwise tasks have n // T classes, and the first n % T tasks have one more.

    Raises:
        CmpError: There are fewer classes than tasks.
    """
    if tasks > len(order):
        raise CmpError(
            f"stream.tasks: {tasks} tasks need as many classes, but there are {len(order)}; "
            f"set stream.tasks={len(order)} or less"
        )
    if images is None:
        return [part.tolist() for part in np.array_split(np.array(order, object), tasks)]
    total = np.cumsum([0, *images])
    wanted = total[-1] * np.arange(tasks + 1) / tasks
    bounds = np.abs(total[:, None] - wanted).argmin(axis=0)
    room = np.arange(tasks + 1)  # at least one class for each task before and after a boundary
    bounds = np.maximum.accumulate(bounds - room).clip(0, len(order) - tasks) + room
    return [order[a:b] for a, b in itertools.pairwise(bounds)]


def task_classes(corpus: Corpus, stream: Stream, seed: int) -> list[list[str]]:
    """Return the classes of each task. In updates that the data define, a class may occur again."""
    if get_option("order", stream.order).facts["updates"]:
        return [sorted({*class_names(corpus, rows)}) for rows in task_rows(corpus, stream, seed)]
    order = class_order(corpus, stream, seed)
    if stream.equal == "classes":
        return cut_into_tasks(order, stream.tasks)
    counts = collections.Counter(class_names(corpus, adaptation_rows(corpus)))
    return cut_into_tasks(order, stream.tasks, np.array([counts[entry] for entry in order]))


def task_rows(corpus: Corpus, stream: Stream, seed: int) -> list[np.ndarray]:
    """Return the training images of each task, as sorted corpus positions."""
    arriving = adaptation_rows(corpus)
    if get_option("order", stream.order).facts["updates"]:
        updates, order = update_names(corpus, arriving), class_order(corpus, stream, seed)
        if len(order) != stream.tasks:
            raise CmpError(f"stream.tasks: must be {len(order)}, for {order[0]} to {order[-1]}")
        return [arriving[updates == name] for name in order]
    tasks = enumerate(task_classes(corpus, stream, seed))
    task_of = {entry: task for task, entries in tasks for entry in entries}
    task = np.array([task_of.get(name, -1) for name in class_names(corpus, arriving)])
    return [arriving[task == number] for number in range(stream.tasks)]


# Orders: (statistics of n classes by entry, stream seed) -> positions in order of arrival, [n]. The
# seed breaks ties in the statistics, so that every order has replicates.


def statistics_tables() -> Any:
    """Return the module with tables of class statistics, see `cmp.readers.class_tables`."""
    return load_entry("cmp.statistics", "tables")


def class_statistics(name: str) -> pd.DataFrame:
    """Return a named table of class statistics, indexed by entry. Callers must not change it."""
    return statistics_tables().class_statistics(name)


def statistic(table: pd.DataFrame, name: str) -> np.ndarray:
    """Return a column of class statistics as an array, [n].

    Raises:
        CmpError: The table does not have a value for every class.
    """
    if name not in table:
        columns = ", ".join(table.columns) or "no statistics"
        raise CmpError(f"stream.traits: no {name!r} in this table, only {columns}")
    column = table.loc[:, name]
    if name != "year" and column.isna().any():
        raise CmpError(f"stream.traits: {table.index[column.isna()][0]!r} has no {name!r}")
    return np.stack(column.to_numpy())


def sort_positions(scores: np.ndarray, seed: int) -> np.ndarray:
    """Return positions by increasing score, [n], with ties in random order and NaN last."""
    ties = numpy_generator("stream/ties", seed).permutation(len(scores))
    return np.lexsort((ties, scores))


@register("order", "random")
def random_order(table: pd.DataFrame, seed: int) -> np.ndarray:
    """Shuffle the classes uniformly."""
    return numpy_generator("stream", seed).permutation(len(table))


@register("order", "easy-accuracy", statistics=True)
def easy_accuracy_order(table: pd.DataFrame, seed: int) -> np.ndarray:
    """Sort by the base's zero-shot accuracy, highest first."""
    return sort_positions(-statistic(table, "accuracy"), seed)


@register("order", "easy-loss", statistics=True)
def easy_loss_order(table: pd.DataFrame, seed: int) -> np.ndarray:
    """Sort by the base's zero-shot cross-entropy, lowest first."""
    return sort_positions(statistic(table, "loss"), seed)


@register("order", "easy-alignment", statistics=True)
def easy_alignment_order(table: pd.DataFrame, seed: int) -> np.ndarray:
    """Sort by the cosine between the base's features of images and of their prompt, highest
    first."""
    return sort_positions(-statistic(table, "alignment"), seed)


@register("order", "frequency", statistics=True)
def frequency_order(table: pd.DataFrame, seed: int) -> np.ndarray:
    """Sort by how often a text corpus names a class, rarest first."""
    return sort_positions(statistic(table, "frequency"), seed)


@register("order", "similarity", statistics=True)
def similarity_order(table: pd.DataFrame, seed: int) -> np.ndarray:
    """Follow each class with the most similar remaining one, by the embedding of its name."""
    return nearest_path(statistic(table, "embedding"), numpy_generator("stream/path", seed))


@register("order", "dataset", statistics=True)
def dataset_order(table: pd.DataFrame, seed: int) -> np.ndarray:
    """Order datasets by year, and shuffle the classes of each."""
    dataset = table.index.str.partition("+++").get_level_values(0)
    names, place = np.unique(dataset, return_inverse=True)
    year = np.full(len(names), np.nan)
    year[place] = statistic(table, "year")
    rank = np.argsort(sort_positions(year, seed))
    return sort_positions(rank[place], seed)


@register("order", "time", statistics=True)
def time_order(table: pd.DataFrame, seed: int) -> np.ndarray:
    """Sort by the year of the dataset, and shuffle all classes of a year together."""
    return sort_positions(statistic(table, "year"), seed)


@register("order", "listed", statistics=True, partial=True, seeded=False)
def listed_order(table: pd.DataFrame, seed: int) -> np.ndarray:
    """Follow an imported list, independently of the seed."""
    return np.argsort(statistic(table, "position"), kind="stable")


@register("order", "given", updates=True, seeded=False)
def given_order(table: pd.DataFrame, seed: int) -> np.ndarray:
    """Sort the updates that the data define by name, comparing numbers in names by value."""
    keys = [*map(update_key, table.index)]
    return np.array(sorted(range(len(keys)), key=keys.__getitem__), dtype=int)


def update_key(name: str) -> tuple[str, str]:
    """Return the sort key of an update's name, in which numbers compare by value. No two names have
    the same key, or their order would depend on where they were found first."""
    return re.sub(r"\d+", lambda number: number[0].zfill(20), name), name


# The path of "similarity" never stores all pairs. Each point keeps a list of its nearest
# neighbours, and a path searches all remaining points only when a list is used up. 18,381 points in
# 512 dimensions take seconds.

PATH_STARTS, PATH_NEIGHBOURS, PATH_BLOCK = 16, 128, 256
PATH_SCALE = 4000
"""Unit vectors are rounded to multiples of 1 / PATH_SCALE. Products of such vectors are integers
below 2^24, which float32 represents exactly, so paths are the same on every machine."""


def nearest_path(embeddings: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Return the best of `PATH_STARTS` greedy nearest-neighbour paths, as positions [n].

    The best path has the largest sum of cosines between neighbours. Ties are broken by the lower
    position.

    Args:
        embeddings: [n, width], with nonzero rows of any length.
        random: Draws the starting points.
    """
    points = np.asarray(embeddings, np.float32)
    points = np.rint(PATH_SCALE * points / np.linalg.norm(points, axis=1, keepdims=True))
    near = _neighbours(points, min(PATH_NEIGHBOURS, len(points) - 1))
    starts = random.permutation(len(points))[:PATH_STARTS]
    paths = [_walk(points, near, int(start)) for start in starts]
    return max(paths, key=lambda pair: pair[1])[0]


def _neighbours(points: np.ndarray, count: int) -> np.ndarray:
    """Return the `count` nearest neighbours of each point, nearest first, [n, count]."""
    nearest = np.empty((len(points), count), np.int32)
    positions = np.arange(len(points))
    for start in range(0, len(points), PATH_BLOCK):
        block = slice(start, start + PATH_BLOCK)
        cosine = points[block] @ points.T
        cosine[np.arange(len(cosine)), positions[block]] = -np.inf
        # one key from the cosine and, in lower digits, the position, so that ties always break the
        # same way
        key = cosine.astype(np.float64) * len(points) - positions
        chosen = np.argpartition(-key, count - 1, axis=1)[:, :count] if count else nearest[block]
        order = np.argsort(-np.take_along_axis(key, chosen, 1), axis=1)
        nearest[block] = np.take_along_axis(chosen, order, 1)
    return nearest


def _walk(points: np.ndarray, near: np.ndarray, start: int) -> tuple[np.ndarray, int]:
    """Return the greedy path from a start, and the sum of its scaled cosines."""
    unvisited = np.ones(len(points), bool)
    path, total = [start], 0
    for _ in range(len(points) - 1):
        current = path[-1]
        unvisited[current] = False
        nearest = near[current]
        first = nearest[unvisited[nearest]][:1]
        others = first if len(first) else np.flatnonzero(unvisited)
        cosine = points[others] @ points[current]
        path.append(int(others[cosine.argmax()]))
        total += int(cosine.max())
    return np.array(path), total
