"""Samples of a pool for one step, as a function of (seed, task, step)."""

import functools

import numpy as np

from cmp.errors import CmpError
from cmp.seeds import numpy_generator


@functools.lru_cache(maxsize=32)
def _permutation(size: int, name: str, seed: int, task: int, epoch: int) -> np.ndarray:
    return numpy_generator(f"data/{name}", seed, task, epoch).permutation(size)


def draw(pool: np.ndarray, count: int, name: str, seed: int, task: int, step: int) -> np.ndarray:
    """`count` samples of a pool for one step, without replacement within each pass over the pool.

    The steps of a task read an endless sequence of permutations, each from its own random stream,
    so any step is computed without those before it.
    """
    if count == 0:
        return pool[:0]
    if len(pool) == 0:
        raise CmpError(f"mixture.{name}: the batch wants {count} samples of an empty pool")
    places = np.arange(step * count, (step + 1) * count)
    chosen = [
        _permutation(len(pool), name, seed, task, int(epoch))[
            places[places // len(pool) == epoch] % len(pool)
        ]
        for epoch in np.unique(places // len(pool))
    ]
    return pool[np.concatenate(chosen)]


def draw_evenly(
    pool: np.ndarray, groups: np.ndarray, count: int, seed: int, task: int, step: int
) -> np.ndarray:
    """As `draw`, from the buffer: each group has its turn, and within a group each image has.

    groups: the number of each image's group, [len(pool)].
    """
    if count == 0:
        return pool[:0]
    order, sizes = np.argsort(groups, kind="stable"), np.unique(groups, return_counts=True)[1]
    members = np.split(order, np.cumsum(sizes)[:-1])
    turns = draw(np.arange(len(sizes)), count, "groups", seed, task, step)
    rounds = np.arange(step * count, (step + 1) * count) // len(sizes)
    chosen = [
        members[group][_member(int(sizes[group]), int(group), seed, task, int(turn))]
        for group, turn in zip(turns, rounds, strict=True)
    ]
    return pool[chosen]


def _member(size: int, group: int, seed: int, task: int, turn: int) -> int:
    """Which image of a group is drawn in a turn: another one until all have been."""
    epoch, place = divmod(turn, size)
    return int(numpy_generator("data/member", seed, task, group, epoch).permutation(size)[place])
