"""The order in which classes arrive, and its cut into tasks (spec 6)."""

import collections
import difflib
import functools
import hashlib
import itertools
from pathlib import Path

import numpy as np
import pandas as pd

from cmp.config import Stream
from cmp.data import Corpus
from cmp.errors import CmpError
from cmp.files import build_folder, child_path, read_table
from cmp.registry import Option, get_option, plugins, register
from cmp.seeds import numpy_generator


def class_names(corpus: Corpus, rows: np.ndarray) -> np.ndarray:
    """Return the class of each image as "DATASET+++class", [len(rows)]."""
    table = corpus.table.iloc[rows]
    return (table["dataset"].astype(str) + "+++" + table["label"].astype(str)).to_numpy()


def adaptation_rows(corpus: Corpus) -> np.ndarray:
    """Return the sorted corpus positions of all training images of adaptation datasets."""
    train = corpus.rows("train")
    arriving = corpus.table["dataset"].iloc[train].isin(corpus.by_role("adapt"))
    return train[arriving.to_numpy()]


def class_entries(corpus: Corpus) -> list[str]:
    """Return every adaptation class as "DATASET+++class", sorted."""
    return sorted(set(class_names(corpus, adaptation_rows(corpus))))


def class_order(corpus: Corpus, stream: Stream, seed: int) -> list[str]:
    """Return the classes in order of arrival.

    Args:
        corpus: The data.
        stream: The config section.
        seed: The stream seed.

    Raises:
        CmpError: The table of statistics lacks a class, or an imported list names one that the
            corpus does not have.
    """
    option = get_option("order", stream.order)
    stamp = statistics_stamp(stream.traits) if option.facts["statistics"] else ()
    entries = tuple(class_entries(corpus))
    return list(_class_order(entries, option, stream.reverse, stream.traits, stamp, seed))


@functools.lru_cache(maxsize=512)
def _class_order(
    entries: tuple[str, ...], option: Option, reverse: bool, traits: str, stamp: tuple, seed: int
) -> tuple[str, ...]:
    if not option.facts["statistics"]:
        table = pd.DataFrame(index=pd.Index(entries))
    elif option.facts["partial"]:
        table = class_statistics(traits)
        check_classes(list(table.index), entries, f"stream.traits: {traits!r}")
    else:
        table = class_statistics(traits)
        if missing := set(entries) - set(table.index):
            raise CmpError(
                f"stream.traits: {traits!r} lacks {len(missing)} classes, such as {min(missing)!r}"
                "; `cmpt stream make` measures them all"
            )
        table = table.loc[list(entries)]
    positions = np.asarray(option.value(table, seed))
    return tuple(table.index[positions[::-1] if reverse else positions])


def check_classes(order: list[str], entries: tuple[str, ...], source: str) -> None:
    """Check that the corpus has every class of an order.

    Raises:
        CmpError: It names the first class that is missing and the nearest that is there.
    """
    if unknown := sorted(set(order) - set(entries)):
        near = difflib.get_close_matches(unknown[0], entries, n=1)
        hint = f"; the nearest is {near[0]!r}" if near else ""
        raise CmpError(f"{source}: no class {unknown[0]!r} in the data{hint}")


def order_digest(corpus: Corpus, stream: Stream, seed: int) -> str:
    """Return the sha256 of the order, which stands for all that decided it."""
    return hashlib.sha256("\n".join(class_order(corpus, stream, seed)).encode()).hexdigest()


def cut_into_tasks(
    order: list[str], tasks: int, images: np.ndarray | None = None
) -> list[list[str]]:
    """Cut an order into consecutive tasks.

    Args:
        order: n classes.
        tasks: T, the number of tasks.
        images: Images per class, [n]. If given, tasks hold about equally many images: each ends
            where the sum of images is nearest to its share, and holds at least one class.
            Otherwise they hold n // T classes, the first n % T of them one more (spec 6).

    Raises:
        CmpError: There are fewer classes than tasks.
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
        room = np.arange(tasks + 1)  # at least one class for each task before and after a bound
        bounds = np.maximum.accumulate(bounds - room).clip(0, len(order) - tasks) + room
    return [order[a:b] for a, b in itertools.pairwise(bounds)]


def task_classes(corpus: Corpus, stream: Stream, seed: int) -> list[list[str]]:
    """Return the classes of each task."""
    order = class_order(corpus, stream, seed)
    if stream.equal == "classes":
        return cut_into_tasks(order, stream.tasks)
    counts = collections.Counter(class_names(corpus, adaptation_rows(corpus)))
    return cut_into_tasks(order, stream.tasks, np.array([counts[entry] for entry in order]))


def task_rows(corpus: Corpus, stream: Stream, seed: int) -> list[np.ndarray]:
    """Return the training images of each task, as sorted corpus positions."""
    arriving = adaptation_rows(corpus)
    tasks = enumerate(task_classes(corpus, stream, seed))
    task_of = {entry: task for task, entries in tasks for entry in entries}
    task = np.array([task_of.get(name, -1) for name in class_names(corpus, arriving)])
    return [arriving[task == number] for number in range(stream.tasks)]


# Orders: (statistics of n classes by entry, stream seed) -> positions in order of arrival, [n].
# Where the statistics leave a choice, the seed decides, so that every order has replicates.


def statistic(table: pd.DataFrame, name: str) -> np.ndarray:
    """Return a column of class statistics as an array, [n].

    Raises:
        CmpError: The table does not hold it for every class.
    """
    if name not in table:
        columns = ", ".join(table.columns) or "no statistics at all"
        raise CmpError(f"stream.traits: no {name!r} in this table, only {columns}")
    column = table.loc[:, name]
    if name != "year" and column.isna().any():
        raise CmpError(f"stream.traits: {table.index[column.isna()][0]!r} has no {name!r}")
    return np.stack(column.to_numpy())


def sort_positions(scores: np.ndarray, seed: int) -> np.ndarray:
    """Return positions by rising score, [n]; ties in random order, NaN last."""
    ties = numpy_generator("stream/ties", seed).permutation(len(scores))
    return np.lexsort((ties, scores))


@register("order", "random")
def random_order(table: pd.DataFrame, seed: int) -> np.ndarray:
    """Shuffle the classes uniformly."""
    return numpy_generator("stream", seed).permutation(len(table))


@register("order", "easy-accuracy", statistics=True)
def easy_accuracy_order(table: pd.DataFrame, seed: int) -> np.ndarray:
    """Sort by falling zero-shot accuracy of the base."""
    return sort_positions(-statistic(table, "accuracy"), seed)


@register("order", "easy-loss", statistics=True)
def easy_loss_order(table: pd.DataFrame, seed: int) -> np.ndarray:
    """Sort by rising zero-shot cross-entropy of the base."""
    return sort_positions(statistic(table, "loss"), seed)


@register("order", "easy-alignment", statistics=True)
def easy_alignment_order(table: pd.DataFrame, seed: int) -> np.ndarray:
    """Sort by falling cosine between the base's features of images and of their prompt."""
    return sort_positions(-statistic(table, "alignment"), seed)


@register("order", "frequency", statistics=True)
def frequency_order(table: pd.DataFrame, seed: int) -> np.ndarray:
    """Sort by how often a corpus of texts names a class, the rarest first."""
    return sort_positions(statistic(table, "frequency"), seed)


@register("order", "similarity", statistics=True)
def similarity_order(table: pd.DataFrame, seed: int) -> np.ndarray:
    """Follow each class by the most similar one that is left, by the embedding of its name."""
    return nearest_path(statistic(table, "embedding"), numpy_generator("stream/path", seed))


@register("order", "dataset", statistics=True)
def dataset_order(table: pd.DataFrame, seed: int) -> np.ndarray:
    """Let one dataset follow the other, by year; the classes of each are shuffled."""
    dataset = table.index.str.partition("+++").get_level_values(0)
    names, place = np.unique(dataset, return_inverse=True)
    year = np.full(len(names), np.nan)
    year[place] = statistic(table, "year")
    rank = np.argsort(sort_positions(year, seed))
    return sort_positions(rank[place], seed)


@register("order", "time", statistics=True)
def time_order(table: pd.DataFrame, seed: int) -> np.ndarray:
    """Sort by the year of the dataset; the classes of one year are shuffled together."""
    return sort_positions(statistic(table, "year"), seed)


@register("order", "listed", statistics=True, partial=True, seeded=False)
def listed_order(table: pd.DataFrame, seed: int) -> np.ndarray:
    """Follow an imported list, whatever the seed."""
    return np.argsort(statistic(table, "position"), kind="stable")


def check_option(option: Option) -> None:
    """Check an order on a small table.

    Raises:
        CmpError: It is no permutation, or the seed makes no difference although it should.
    """
    if option.facts["statistics"]:
        return  # which columns it reads is known only once it sees a real table
    table = pd.DataFrame(index=pd.Index([f"digits+++{number}" for number in range(12)]))
    orders = [np.asarray(option.value(table, seed)) for seed in range(3)]
    for order in orders:
        if sorted(order.ravel().tolist()) != list(range(12)):
            raise CmpError(f"order {option.name!r}: returns {order}, no permutation of 0 to 11")
    if option.facts["seeded"] and all((order == orders[0]).all() for order in orders):
        raise CmpError(
            f"order {option.name!r}: the seed makes no difference; declare seeded=False if it is "
            "meant not to"
        )


# The path of "similarity" never holds all pairs: each point keeps a list of its nearest, and only
# a path that has used up such a list looks at everything that is left. 18,381 points of 512
# dimensions take seconds.

PATH_STARTS, PATH_NEIGHBOURS, PATH_BLOCK = 16, 128, 256
PATH_SCALE = 4000
"""Unit vectors are rounded to whole multiples of 1 / PATH_SCALE. Products of such vectors are whole
numbers below 2^24, which float32 holds exactly, so a path is the same on every machine."""


def nearest_path(embeddings: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Return the best of `PATH_STARTS` greedy nearest-neighbour paths, as positions [n].

    The best path has the largest sum of cosines between neighbours. Ties go to the lower position.

    Args:
        embeddings: [n, width], of any length but zero.
        random: Draws the starting points.
    """
    points = np.asarray(embeddings, np.float32)
    points = np.rint(PATH_SCALE * points / np.linalg.norm(points, axis=1, keepdims=True))
    near = _neighbours(points, min(PATH_NEIGHBOURS, len(points) - 1))
    starts = random.permutation(len(points))[:PATH_STARTS]
    paths = [_walk(points, near, int(start)) for start in starts]
    return max(paths, key=lambda pair: pair[1])[0]


def _neighbours(points: np.ndarray, count: int) -> np.ndarray:
    """Return the `count` nearest others of each point, nearest first, [n, count]."""
    nearest = np.empty((len(points), count), np.int32)
    own = np.arange(len(points))
    for start in range(0, len(points), PATH_BLOCK):
        block = slice(start, start + PATH_BLOCK)
        cosine = points[block] @ points.T
        cosine[np.arange(len(cosine)), own[block]] = -np.inf
        # the cosine and, below it, the position: one key that always breaks ties the same way
        key = cosine.astype(np.float64) * len(points) - own
        chosen = np.argpartition(-key, count - 1, axis=1)[:, :count] if count else nearest[block]
        order = np.argsort(-np.take_along_axis(key, chosen, 1), axis=1)
        nearest[block] = np.take_along_axis(chosen, order, 1)
    return nearest


def _walk(points: np.ndarray, near: np.ndarray, start: int) -> tuple[np.ndarray, int]:
    """Return the greedy path from a start, and the sum of its scaled cosines."""
    left = np.ones(len(points), bool)
    path, total, current = np.empty(len(points), np.int64), 0, start
    for step in range(len(points)):
        if step:
            free = left[near[current]]
            first = int(free.argmax()) if len(free) else 0
            if len(free) and free[first]:
                following = int(near[current, first])
                total += int(points[current] @ points[following])
            else:
                others = np.flatnonzero(left)
                cosine = points[others] @ points[current]
                following, total = int(others[cosine.argmax()]), total + int(cosine.max())
            current = following
        path[step], left[current] = current, False
    return path, total


# Class statistics are measured once, with one base, and kept as tables: an order must be the same
# on every machine and for every base, and accuracies that are measured again would not be.

CLASS_COLUMNS = {
    "accuracy": float, "loss": float, "alignment": float, "frequency": int, "year": float,
    "position": int, "embedding": list,
}  # fmt: skip
"""Columns that a table of classes may hold beside `entry`."""
POOL_COLUMNS = {"dataset": str, "place": int, "alignment": float, "cluster": int}
"""Columns of a table of pool images; place is the image's number in its dataset."""


def statistics_folder() -> Path:
    """Return the folder of tables that are made on this machine."""
    return build_folder() / "traits"


def _statistics_folders() -> list[Path]:
    """Return where tables may be: those of installed packages, then those made here."""
    return [*plugins("cmp.statistics").values(), statistics_folder()]


def statistics_path(name: str, kind: str) -> Path:
    """Return where a table is, or would be made.

    Args:
        name: The table's name, as in `stream.traits`.
        kind: "classes" or "pool".
    """
    paths = [child_path(folder, f"{name}-{kind}", ".parquet") for folder in _statistics_folders()]
    return next((path for path in paths if path.exists()), paths[-1])


def statistics_stamp(name: str) -> tuple[Path, int]:
    """Return the file of a table of classes and when it was written (0 if never), for caches."""
    path = statistics_path(name, "classes")
    return path, path.stat().st_mtime_ns if path.exists() else 0


def class_statistics(name: str) -> pd.DataFrame:
    """Return the statistics of some classes, indexed by entry and sorted; not to be changed.

    Raises:
        CmpError: There is no such table, or it lists a class twice.
    """
    return _class_statistics(*statistics_stamp(name))


@functools.lru_cache(maxsize=8)
def _class_statistics(path: Path, written: int) -> pd.DataFrame:
    table = _read_statistics(path, {"entry": str}, "cmpt stream make` or `cmpt stream import")
    columns = {name: kind for name, kind in CLASS_COLUMNS.items() if name in table}
    _read_statistics(path, columns, "cmpt stream make")
    if (repeated := table["entry"].duplicated()).any():
        raise CmpError(f"{path}: {table.loc[repeated, 'entry'].iloc[0]!r} is listed twice")
    return table.set_index("entry").sort_index()


def _read_statistics(path: Path, columns: dict[str, type], command: str) -> pd.DataFrame:
    if not path.exists():
        kind = path.stem.rpartition("-")[2]
        tables = [p for folder in _statistics_folders() for p in folder.glob(f"*-{kind}.parquet")]
        names = ", ".join(sorted({p.stem.removesuffix(f"-{kind}") for p in tables})) or "none"
        raise CmpError(f"traits: no table {path.name}; there are {names}; `{command}` makes one")
    try:
        return read_table(path, columns)
    except (OSError, ValueError) as error:
        raise CmpError(f"{path}: cannot be read ({error}); `{command}` makes it again") from error


def pool_statistics(corpus: Corpus, rows: np.ndarray) -> pd.DataFrame:
    """Return `alignment` and `cluster` of images of the embedded pools, in the order of `rows`.

    Raises:
        CmpError: An image has none.
    """
    path = statistics_path("embedded", "pool")
    table = _read_statistics(path, POOL_COLUMNS, "cmpt stream make")
    datasets = corpus.table["dataset"].astype(str)
    places = datasets.groupby(datasets).cumcount()
    keys = pd.MultiIndex.from_arrays([datasets.iloc[rows], places.iloc[rows]])
    measured = table.set_index(["dataset", "place"])
    statistics = measured.loc[:, ["alignment", "cluster"]].reindex(keys)
    if (missing := statistics["alignment"].isna()).any():
        dataset = missing.index[missing][0][0]
        raise CmpError(f"traits: images of {dataset!r} have none; `cmpt stream make` measures them")
    return statistics.reset_index(drop=True)
