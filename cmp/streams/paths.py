"""A path through embeddings that always goes to the nearest point left (spec 6, "similarity").

It never holds all pairs: each point keeps a list of its nearest, and only a path that has used up
such a list looks at everything that is left. 18,381 points of 512 dimensions take seconds.
"""

import numpy as np

STARTS, NEAREST, BLOCK = 16, 128, 256
SCALE = 4000
"""Unit vectors are rounded to whole multiples of 1/SCALE. Products of such vectors are whole
numbers below 2^24, which float32 holds exactly, so a path is the same on every machine."""


def nearest_path(embeddings: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Positions [n] along the best of `STARTS` greedy paths, from starting points drawn at random.

    embeddings: [n, width], of any length but zero. The best path has the largest sum of cosines
    between neighbours. Ties go to the lower position.
    """
    points = _rounded(np.asarray(embeddings, np.float32))
    near = _neighbours(points, min(NEAREST, len(points) - 1))
    starts = random.permutation(len(points))[:STARTS]
    paths = [_walk(points, near, int(start)) for start in starts]
    return max(paths, key=lambda pair: pair[1])[0]


def _rounded(x: np.ndarray) -> np.ndarray:
    return np.rint(SCALE * x / np.linalg.norm(x, axis=1, keepdims=True))


def _neighbours(points: np.ndarray, count: int) -> np.ndarray:
    """The `count` nearest others of each point, nearest first, [n, count]."""
    found = np.empty((len(points), count), np.int32)
    own = np.arange(len(points))
    for start in range(0, len(points), BLOCK):
        block = slice(start, start + BLOCK)
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
