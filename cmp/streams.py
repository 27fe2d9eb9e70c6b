"""The order in which classes arrive, and its cut into tasks (spec 6)."""

import collections
import difflib
import functools
import hashlib
import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from cmp.config import Stream
from cmp.data import Corpus
from cmp.errors import CmpError
from cmp.files import atomic_file, build_folder, child_path, parse_json, read_table
from cmp.registry import plugins
from cmp.seeds import numpy_generator


def class_names(corpus: Corpus, rows: np.ndarray) -> np.ndarray:
    """The class of each image as "DATASET+++class", [len(rows)]."""
    table = corpus.table.iloc[rows]
    return (table["dataset"].astype(str) + "+++" + table["label"].astype(str)).to_numpy()


def adaptation_rows(corpus: Corpus) -> np.ndarray:
    """Positions of all training images of adaptation datasets, sorted."""
    train = corpus.rows("train")
    arriving = corpus.table["dataset"].iloc[train].isin(corpus.by_role("adapt"))
    return train[arriving.to_numpy()]


def class_entries(corpus: Corpus) -> list[str]:
    """Every adaptation class as "DATASET+++class", sorted."""
    return sorted(set(class_names(corpus, adaptation_rows(corpus))))


def class_order(corpus: Corpus, stream: Stream, seed: int) -> list[str]:
    """The classes in order of arrival: all of them or, where a list was imported, those of it.

    `CmpError` if a list names a class that the corpus has not, or other traits lack one of its.
    """
    written = () if stream.order == "random" else statistics_stamp(stream.traits)
    name, reverse, table = stream.order, stream.reverse, stream.traits
    return list(_class_order(tuple(class_entries(corpus)), name, reverse, table, written, seed))


@functools.lru_cache(maxsize=512)
def _class_order(
    known: tuple[str, ...], order: str, reverse: bool, table: str, written: tuple, seed: int
) -> tuple[str, ...]:
    if order == "random":
        found = pd.DataFrame(index=pd.Index(known))
    else:
        found = class_statistics(table)
        if order == "listed":
            check_classes(list(found.index), known, f"stream.traits: {table!r}")
        elif lacking := set(known) - set(found.index):
            raise CmpError(
                f"stream.traits: {table!r} lacks {len(lacking)} classes, such as {min(lacking)!r}; "
                "`cmpt stream make` measures them all"
            )
        else:
            found = found.loc[list(known)]
    positions = ORDERS[order](found, seed)
    return tuple(found.index[positions[::-1] if reverse else positions])


def check_classes(order: list[str], known: tuple[str, ...], source: str) -> None:
    """`CmpError` for a class that the corpus does not have, with the nearest one that it has."""
    if unknown := sorted(set(order) - set(known)):
        near = difflib.get_close_matches(unknown[0], known, n=1, cutoff=0.0)[0]
        raise CmpError(f"{source}: no class {unknown[0]!r} in the data; the nearest is {near!r}")


def order_digest(corpus: Corpus, stream: Stream, seed: int) -> str:
    """sha256 of the order, which stands for all that decided it."""
    return hashlib.sha256("\n".join(class_order(corpus, stream, seed)).encode()).hexdigest()


def cut_into_tasks(
    order: list[str], tasks: int, images: np.ndarray | None = None
) -> list[list[str]]:
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


def task_classes(corpus: Corpus, stream: Stream, seed: int) -> list[list[str]]:
    """The classes of each task."""
    order = class_order(corpus, stream, seed)
    if stream.equal == "classes":
        return cut_into_tasks(order, stream.tasks)
    counts = collections.Counter(class_names(corpus, adaptation_rows(corpus)))
    return cut_into_tasks(order, stream.tasks, np.array([counts[entry] for entry in order]))


def class_counts(tasks: list[list[str]]) -> pd.DataFrame:
    """Classes of each dataset (columns) in each task (index `task`, from 1)."""
    rows = [collections.Counter(entry.split("+++")[0] for entry in task) for task in tasks]
    index = pd.RangeIndex(1, len(tasks) + 1, name="task")
    return pd.DataFrame(rows, index=index).fillna(0).astype(int)


def task_rows(corpus: Corpus, stream: Stream, seed: int) -> list[np.ndarray]:
    """The training images of each task, as sorted positions in the corpus."""
    arriving = adaptation_rows(corpus)
    of = {
        entry: task
        for task, block in enumerate(task_classes(corpus, stream, seed))
        for entry in block
    }
    task = np.array([of.get(name, -1) for name in class_names(corpus, arriving)])
    return [arriving[task == number] for number in range(stream.tasks)]


Order = Callable[[pd.DataFrame, int], np.ndarray]
"""(traits of n classes, stream seed) -> their positions in order of arrival, [n]."""


def statistic(table: pd.DataFrame, name: str) -> np.ndarray:
    """A trait as an array, [n]; `CmpError` if the table does not hold it for every class."""
    if name not in table:
        held = ", ".join(table.columns) or "no traits at all"
        raise CmpError(f"stream.traits: no {name!r} in this table, only {held}")
    if name != "year" and table[name].isna().any():
        entry = table.index[table[name].isna()][0]
        raise CmpError(f"stream.traits: {entry!r} has no {name!r}")
    return np.stack(table[name].to_numpy())


def sort_positions(scores: np.ndarray, seed: int) -> np.ndarray:
    """Positions by rising score, [n]; equal ones in random order, unknown ones (NaN) last."""
    ties = numpy_generator("stream/ties", seed).permutation(len(scores))
    return np.lexsort((ties, scores))


def random_order(table: pd.DataFrame, seed: int) -> np.ndarray:
    """A uniform shuffle."""
    return numpy_generator("stream", seed).permutation(len(table))


def easy_accuracy_order(table: pd.DataFrame, seed: int) -> np.ndarray:
    """First what the base already gets right: falling zero-shot accuracy."""
    return sort_positions(-statistic(table, "accuracy"), seed)


def easy_loss_order(table: pd.DataFrame, seed: int) -> np.ndarray:
    """First what costs the base least: rising zero-shot cross-entropy."""
    return sort_positions(statistic(table, "loss"), seed)


def easy_alignment_order(table: pd.DataFrame, seed: int) -> np.ndarray:
    """First the classes whose images the base puts near their prompt: falling cosine."""
    return sort_positions(-statistic(table, "alignment"), seed)


def frequency_order(table: pd.DataFrame, seed: int) -> np.ndarray:
    """First what a corpus of texts hardly mentions, as in the reference's files."""
    return sort_positions(statistic(table, "frequency"), seed)


def similarity_order(table: pd.DataFrame, seed: int) -> np.ndarray:
    """Each class is followed by the most similar one that is left, by its name's embedding."""
    return nearest_path(statistic(table, "embedding"), numpy_generator("stream/path", seed))


def dataset_order(table: pd.DataFrame, seed: int) -> np.ndarray:
    """One dataset after the other, by year; the classes of each are shuffled."""
    names, place = np.unique(table.index.str.partition("+++").get_level_values(0), return_inverse=1)
    year = np.full(len(names), np.nan)
    year[place] = statistic(table, "year")
    rank = np.argsort(sort_positions(year, seed))
    return sort_positions(rank[place], seed)


def time_order(table: pd.DataFrame, seed: int) -> np.ndarray:
    """By the year of the dataset; the classes of one year are shuffled together."""
    return sort_positions(statistic(table, "year"), seed)


def listed_order(table: pd.DataFrame, seed: int) -> np.ndarray:
    """As a list says that was imported, whatever the seed."""
    return np.argsort(statistic(table, "position"), kind="stable")


ORDERS: dict[str, Order] = {
    "random": random_order, "easy-accuracy": easy_accuracy_order, "easy-loss": easy_loss_order,
    "easy-alignment": easy_alignment_order, "frequency": frequency_order, "similarity": similarity_order,
    "dataset": dataset_order, "time": time_order, "listed": listed_order,
}  # fmt: skip
"""By `stream.order`; `stream.reverse` reads one from its end."""

PATH_STARTS, PATH_NEIGHBOURS, PATH_BLOCK = 16, 128, 256
PATH_SCALE = 4000
"""Unit vectors are rounded to whole multiples of 1/SCALE. Products of such vectors are whole
numbers below 2^24, which float32 holds exactly, so a path is the same on every machine."""


def nearest_path(embeddings: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Positions [n] along the best of `STARTS` greedy paths, from starting points drawn at random.

    embeddings: [n, width], of any length but zero. The best path has the largest sum of cosines
    between neighbours. Ties go to the lower position.
    """
    points = _round_to_integers(np.asarray(embeddings, np.float32))
    near = _neighbours(points, min(PATH_NEIGHBOURS, len(points) - 1))
    starts = random.permutation(len(points))[:PATH_STARTS]
    paths = [_walk(points, near, int(start)) for start in starts]
    return max(paths, key=lambda pair: pair[1])[0]


def _round_to_integers(x: np.ndarray) -> np.ndarray:
    return np.rint(PATH_SCALE * x / np.linalg.norm(x, axis=1, keepdims=True))


def _neighbours(points: np.ndarray, count: int) -> np.ndarray:
    """The `count` nearest others of each point, nearest first, [n, count]."""
    found = np.empty((len(points), count), np.int32)
    own = np.arange(len(points))
    for start in range(0, len(points), PATH_BLOCK):
        block = slice(start, start + PATH_BLOCK)
        cosine = points[block] @ points.T
        cosine[np.arange(len(cosine)), own[block]] = -np.inf
        # a whole number and, below it, the position: one key that breaks ties the same way always
        key = cosine.astype(np.float64) * len(points) - own
        chosen = np.argpartition(-key, count - 1, axis=1)[:, :count] if count else found[block]
        order = np.argsort(-np.take_along_axis(key, chosen, 1), axis=1)
        found[block] = np.take_along_axis(chosen, order, 1)
    return found


def _walk(points: np.ndarray, near: np.ndarray, start: int) -> tuple[np.ndarray, int]:
    """(the greedy path from a start, the sum of its scaled cosines)."""
    left = np.ones(len(points), bool)
    path, total, here = np.empty(len(points), np.int64), 0, start
    for step in range(len(points)):
        if step:
            free = left[near[here]]
            first = int(free.argmax()) if len(free) else 0
            if len(free) and free[first]:
                there = int(near[here, first])
                total += int(points[here] @ points[there])
            else:
                others = np.flatnonzero(left)
                cosine = points[others] @ points[here]
                there, total = int(others[cosine.argmax()]), total + int(cosine.max())
            here = there
        path[step], left[here] = here, False
    return path, total


MAX_STREAM_BYTES = 64 * 2**20
"""Bytes of a stream file; the reference's are below one million."""


def read_stream_file(path: Path) -> list[str]:
    """The classes of a stream file in order of arrival.

    `CmpError` with the entry for anything but a list of distinct "DATASET+++class".
    """
    try:
        if path.stat().st_size > MAX_STREAM_BYTES:
            raise ValueError(f"larger than {MAX_STREAM_BYTES} bytes")
        found = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CmpError(f"{path}: cannot be read as a stream ({error})") from error
    if not isinstance(found, list) or not found:
        raise CmpError(f'{path}: a stream is a JSON list of "DATASET+++class", not {found!r:.60}')
    for place, entry in enumerate(found, start=1):
        parts = entry.split("+++") if isinstance(entry, str) else []
        if len(parts) != 2 or not all(parts):
            raise CmpError(f'{path}: entry {place}: {entry!r:.60} is no "DATASET+++class"')
    if len(set(found)) < len(found):
        seen: dict[str, int] = {}
        for place, entry in enumerate(found, start=1):
            if seen.setdefault(entry, place) != place:
                raise CmpError(
                    f"{path}: entry {place}: {entry!r} stands there already, as entry {seen[entry]}"
                )
    return found


def stream_table(order: list[str]) -> pd.DataFrame:
    """The table of traits of an imported list: each entry's position in it."""
    return pd.DataFrame({"entry": order, "position": range(len(order))})


CLASS_COLUMNS = {
    "accuracy": float, "loss": float, "alignment": float, "frequency": int, "year": float,
    "position": int, "embedding": list,
}  # fmt: skip
"""Columns that a table of classes may hold beside `entry`; see `cmp.evaluation.measuring`."""
POOL_COLUMNS = {"dataset": str, "place": int, "alignment": float, "cluster": int}
"""Columns of a table of pool images; place: the image's number in its dataset."""


def statistics_path(name: str, of: str) -> Path:
    """Where a table is, or would be made. of: "classes" or "pool"."""
    paths = [child_path(folder, f"{name}-{of}", ".parquet") for folder in _statistics_folders()]
    return next((path for path in paths if path.exists()), paths[-1])


def _statistics_folders() -> list[Path]:
    """Where tables may be: those of installed packages, then those that are made here."""
    return [*plugins("cmp.statistics").values(), statistics_folder()]


def statistics_folder() -> Path:
    """The folder of tables that are made here."""
    return build_folder() / "traits"


def class_statistics(name: str) -> pd.DataFrame:
    """The traits of some classes (index `entry`, sorted: "DATASET+++class"); not to be changed.

    `CmpError` if there is no such table, or it lists a class twice.
    """
    return _class_statistics(*statistics_stamp(name))


def statistics_stamp(name: str) -> tuple[Path, int]:
    """The file of a table of classes and when it was written, 0 if never: a key for what is kept
    of it in memory."""
    file = statistics_path(name, "classes")
    return file, file.stat().st_mtime_ns if file.exists() else 0


@functools.lru_cache(maxsize=8)
def _class_statistics(file: Path, written: int) -> pd.DataFrame:
    table = _read_statistics(file, {"entry": str}, "cmpt stream make` or `cmpt stream import")
    for column in set(table) & CLASS_COLUMNS.keys():
        _read_statistics(file, {column: CLASS_COLUMNS[column]}, "cmpt stream make")
    if (twice := table["entry"].duplicated()).any():
        raise CmpError(f"{file}: {table['entry'][twice].iloc[0]!r} stands there twice")
    return table.set_index("entry").sort_index()


def _read_statistics(file: Path, columns: dict[str, type], command: str) -> pd.DataFrame:
    if not file.exists():
        of = file.stem.rpartition("-")[2]
        there = [
            p.stem.removesuffix(f"-{of}")
            for f in _statistics_folders()
            for p in f.glob(f"*-{of}.parquet")
        ]
        known = ", ".join(sorted(set(there))) or "none"
        raise CmpError(f"traits: no table {file.name}; there are {known}; `{command}` makes one")
    try:
        return read_table(file, columns)
    except (OSError, ValueError) as error:
        raise CmpError(f"{file}: cannot be read ({error}); `{command}` makes it anew") from error


def write_statistics(table: pd.DataFrame, name: str, of: str) -> Path:
    """Keep a table of traits, whole or not at all."""
    file = child_path(statistics_folder(), f"{name}-{of}", ".parquet")
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(file) as partial:
        table.to_parquet(partial, index=False)
    return file


def pool_statistics(corpus: Corpus, rows: np.ndarray) -> pd.DataFrame:
    """`alignment` and `cluster` of pool images of the embedded benchmark, in the order of `rows`.

    `CmpError` for an image that has none.
    """
    table = _read_statistics(statistics_path("embedded", "pool"), POOL_COLUMNS, "cmpt stream make")
    datasets = corpus.table["dataset"].astype(str)
    places = datasets.groupby(datasets).cumcount()
    keys = pd.MultiIndex.from_arrays([datasets.iloc[rows], places.iloc[rows]])
    found = table.set_index(["dataset", "place"])[["alignment", "cluster"]].reindex(keys)
    if (lacking := found["alignment"].isna()).any():
        dataset = lacking.index[lacking][0][0]
        raise CmpError(f"traits: images of {dataset!r} have none; `cmpt stream make` measures them")
    return found.reset_index(drop=True)
