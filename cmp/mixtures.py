"""Which samples make the batch at (task, step): pretraining pool P, update pool D, buffer B."""

import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cmp.config import Mixture, RunConfig
from cmp.data.corpus import Corpus
from cmp.errors import CmpError
from cmp.seeds import numpy_generator


@dataclass(frozen=True)
class Pools:
    """Positions in the corpus that a task may draw from; the buffer of the first task is empty."""

    pretraining: np.ndarray
    update: np.ndarray
    buffer: np.ndarray


def parts(mixture: Mixture, batch: int, empty_buffer: bool) -> tuple[int, int, int]:
    """Samples from (P, D, B) in a batch: floors, with the remainder given to the first that take
    part. While the buffer is empty its samples are split between P and D, as far as they take part
    at all (spec 7)."""
    ratios = (mixture.pretraining, mixture.update, mixture.buffer)
    sizes = [int(batch * ratio + 1e-9) for ratio in ratios]
    taking_part = [index for index, ratio in enumerate(ratios) if ratio > 0]
    for index in taking_part[: batch - sum(sizes)]:
        sizes[index] += 1
    p, d, b = sizes
    if not empty_buffer:
        return p, d, b
    if mixture.pretraining > 0 and mixture.update > 0:
        return p + b // 2, d + b - b // 2, 0
    return (p + b, 0, 0) if mixture.pretraining > 0 else (0, d + b, 0)


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


def batch_rows(
    pools: Pools, mixture: Mixture, batch: int, seed: int, task: int, step: int
) -> np.ndarray:
    """Positions in the corpus of the batch at (task, step): update, buffer, pretraining."""
    p, d, b = parts(mixture, batch, empty_buffer=len(pools.buffer) == 0)
    chosen = [("update", pools.update, d), ("buffer", pools.buffer, b)]
    chosen.append(("pretraining", pools.pretraining, p))
    return np.concatenate([draw(pool, n, name, seed, task, step) for name, pool, n in chosen])


@dataclass(frozen=True)
class Batch:
    """rows: [B], the samples' positions in the corpus; images: uint8 [B, 4, H, W]; texts: [B], each
    sample's caption as a position in the corpus."""

    rows: np.ndarray
    images: Tensor
    texts: Tensor


def make_batch(config: RunConfig, corpus: Corpus, pools: Pools, task: int, step: int) -> Batch:
    """The samples of 0-based (task, step), each with one of its captions."""
    seed, size = config.seeds.data, config.training.batch
    rows = batch_rows(pools, config.mixture, size, seed, task, step)
    choice = numpy_generator("data/caption", seed, task, step).random(size)
    starts, stops = corpus.caption_starts[rows], corpus.caption_starts[rows + 1]
    texts = corpus.caption_ids[starts + (choice * (stops - starts)).astype(np.int64)]
    images = corpus.images.index_select(0, torch.from_numpy(rows))  # whole rows: 5x indexing
    return Batch(rows, images, torch.from_numpy(texts))


def largest_batch(pools: Pools, mixture: Mixture, batch: int) -> int:
    """The largest batch up to `batch` that takes no sample of these pools twice."""
    sizes = (len(pools.pretraining), len(pools.update), len(pools.buffer))

    def fits(size: int) -> bool:
        taken = parts(mixture, size, empty_buffer=sizes[2] == 0)
        return all(part <= there for part, there in zip(taken, sizes, strict=True))

    return next((size for size in range(batch, 0, -1) if fits(size)), 0)


def replay_pool(pool: np.ndarray, share: float, seed: int) -> np.ndarray:
    """The fixed part of the pretraining set that is kept for replay."""
    size = max(1, round(share * len(pool)))
    if size == len(pool):
        return pool
    return np.sort(numpy_generator("replay", seed).permutation(pool)[:size])


def unlimited(updates: list[np.ndarray], mixture: Mixture, seed: int) -> np.ndarray:
    """All that arrived."""
    return np.sort(np.concatenate(updates))


BUFFERS = {"unlimited": unlimited}
"""By `mixture.policy`: what the buffer holds after some updates, as a function of (the training
images of each, mixture, data seed). It never holds again what it once dropped."""


def buffer_pool(updates: list[np.ndarray], mixture: Mixture, seed: int) -> np.ndarray:
    """The buffer after these updates; empty after none."""
    if not updates:
        return np.empty(0, dtype=np.int64)
    return BUFFERS[mixture.policy](updates, mixture, seed)
