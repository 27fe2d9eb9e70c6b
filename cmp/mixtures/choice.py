"""Choosing some of many by keys, so that a choice from a part agrees with that from the whole."""

from collections.abc import Sequence

import numpy as np


def lowest(keys: Sequence[np.ndarray], count: int | None) -> np.ndarray:
    """The `count` items that come first by the last key, then by the one before it, ...: sorted
    positions. `None` for all.

    What is chosen from all items is, as far as it lies in a part of them, chosen from that part as
    well: a buffer that chooses so never takes back what it dropped.
    """
    return np.sort(np.lexsort(keys)[:count])


def ranks(groups: np.ndarray, priority: np.ndarray) -> np.ndarray:
    """Each item's place within its group by rising priority, from 0, [n]."""
    order = np.lexsort((priority, groups))
    starts = np.flatnonzero(np.diff(groups[order], prepend=-1))
    place = np.arange(len(order)) - np.repeat(starts, np.diff(starts, append=len(order)))
    return place[np.argsort(order)]
