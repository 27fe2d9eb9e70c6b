"""Choose which images of earlier updates stay in the buffer, and how often each is drawn.

A buffer is a function of the whole history of earlier updates, so there is no state.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from cmp.errors import CmpError
from cmp.registry import get_option, register
from cmp.seeds import numpy_generator


def choose_lowest(keys: Sequence[np.ndarray], count: int | None) -> np.ndarray:
    """Return the sorted positions of the `count` items that come first by the last key, with ties
    broken by the key before it, and so on.

    An item chosen from a set is also chosen from any subset that contains it, so a buffer that uses
    this never brings back an item that it dropped.

    Args:
        keys: Arrays of equal length; the last one is the primary key.
        count: The number of items; None for all.
    """
    return np.sort(np.lexsort(keys)[:count])


def rank_within_groups(groups: np.ndarray, priority: np.ndarray) -> np.ndarray:
    """Return each item's rank within its group by increasing priority, from 0, [n]."""
    return pd.Series(priority).groupby(groups).rank("first").to_numpy(np.int64) - 1


@dataclass(frozen=True)
class BufferHistory:
    """All n images of earlier updates.

    Attributes:
        rows: Their positions in the corpus, sorted, [n].
        task: The number of the update that each arrived in, [n].
        label: The number of each image's class, [n].
    """

    rows: np.ndarray
    task: np.ndarray
    label: np.ndarray


def buffer_history(updates: list[np.ndarray], labels: np.ndarray) -> BufferHistory:
    """Return the history of a list of updates.

    Args:
        updates: Corpus positions per update.
        labels: The class number of every image of the corpus.
    """
    rows = np.concatenate(updates) if updates else np.empty(0, np.int64)
    task = np.repeat(np.arange(len(updates)), [len(update) for update in updates])
    order = np.argsort(rows)
    return BufferHistory(rows[order], task[order], labels[rows[order]])


BufferContent = tuple[np.ndarray, np.ndarray | None]
"""The images of a `BufferHistory` that are kept, as sorted positions in it, and the group number of
each if groups are drawn equally often."""


def fill_buffer(
    policy: str, history: BufferHistory, capacity: int | None, seed: int
) -> BufferContent:
    """Return the images that a buffer keeps.

    Raises:
        CmpError: A user's buffer keeps images that never arrived or too many, or returns groups
            that do not match.
    """
    content = get_option("buffer", policy).value(history, capacity, seed)
    if not (isinstance(content, tuple) and len(content) == 2):
        raise CmpError(f"buffer {policy!r}: must return a pair: positions, and groups or None")
    kept, groups = np.asarray(content[0], np.int64), content[1]  # may be lists
    images = len(history.rows)
    if len(np.intersect1d(kept, np.arange(images))) < len(kept):
        wanted = f"different positions below {images}"
        raise CmpError(f"buffer {policy!r}: keeps {kept[:5]}: expected {wanted}")
    if capacity is not None and len(kept) > capacity:
        raise CmpError(f"buffer {policy!r}: keeps {len(kept)} images, more than {capacity}")
    if groups is not None and len(groups) != len(kept):
        raise CmpError(f"buffer {policy!r}: {len(groups)} groups for {len(kept)} images")
    return kept, None if groups is None else np.asarray(groups)


@register("buffer", "unlimited")
def unlimited_buffer(history: BufferHistory, capacity: int | None, seed: int) -> BufferContent:
    """Keep every image; all images are drawn equally often."""
    return np.arange(len(history.rows)), None


@register("buffer", "reservoir", capacity="required")
def reservoir_buffer(history: BufferHistory, capacity: int | None, seed: int) -> BufferContent:
    """Keep a uniform sample of fixed size; all images are drawn equally often."""
    return choose_lowest([_random_keys("buffer", seed, history.rows)], capacity), None


@register("buffer", "class-balanced", capacity="optional")
def class_balanced_buffer(history: BufferHistory, capacity: int | None, seed: int) -> BufferContent:
    """Keep the same number of images of each class; all classes are drawn equally often."""
    return _balanced_buffer(history, history.label, capacity, seed)


@register("buffer", "task-balanced", capacity="optional")
def task_balanced_buffer(history: BufferHistory, capacity: int | None, seed: int) -> BufferContent:
    """Keep the same number of images of each update; all updates are drawn equally often."""
    return _balanced_buffer(history, history.task, capacity, seed)


def _balanced_buffer(
    history: BufferHistory, groups: np.ndarray, capacity: int | None, seed: int
) -> BufferContent:
    """Keep every group's first image, then every group's second, and so on."""
    rank = rank_within_groups(groups, _random_keys("buffer", seed, history.rows))
    kept = choose_lowest([_random_keys("buffer/groups", seed, groups), rank], capacity)
    return kept, groups[kept]


def _random_keys(name: str, seed: int, items: np.ndarray) -> np.ndarray:
    """Return a random number per item that depends only on the item, the name and the seed."""
    return numpy_generator(name, seed).random(int(items.max(initial=0)) + 1)[items]
