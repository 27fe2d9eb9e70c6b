"""Which samples make the batch at (task, step): pretraining pool P, update pool D, buffer B."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from cmp import streams
from cmp.config import Mixture, RunConfig
from cmp.data.corpus import Corpus
from cmp.data.samples import ALL, SIZE
from cmp.errors import CmpError
from cmp.mixtures.buffers import BUFFERS, Past
from cmp.mixtures.drawing import draw, draw_evenly
from cmp.mixtures.replay import replay_pool
from cmp.seeds import numpy_generator


@dataclass(frozen=True)
class Pools:
    """Positions in the corpus that a task may draw from; the buffer of the first task is empty.

    groups: of each image of the buffer, by number, where groups are drawn from equally often.
    """

    pretraining: np.ndarray
    update: np.ndarray
    buffer: np.ndarray
    groups: np.ndarray | None = None


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


def batch_rows(
    pools: Pools, mixture: Mixture, batch: int, seed: int, task: int, step: int
) -> np.ndarray:
    """Positions in the corpus of the batch at (task, step): update, buffer, pretraining."""
    p, d, b = parts(mixture, batch, empty_buffer=len(pools.buffer) == 0)
    update = draw(pools.update, d, "update", seed, task, step)
    if pools.groups is None:
        buffer = draw(pools.buffer, b, "buffer", seed, task, step)
    else:
        buffer = draw_evenly(pools.buffer, pools.groups, b, seed, task, step)
    return np.concatenate(
        [update, buffer, draw(pools.pretraining, p, "pretraining", seed, task, step)]
    )


@dataclass(frozen=True)
class Batch:
    """rows: [B], the samples' positions in the corpus; images: uint8 [B, 4, H, W], or [B, 3, H, W],
    random parts of files, or of some of the samples only; texts: [B], each sample's caption as a
    position in the corpus."""

    rows: np.ndarray
    images: Tensor
    texts: Tensor


def make_batch(
    config: RunConfig,
    corpus: Corpus,
    pools: Pools,
    task: int,
    step: int,
    side: int = SIZE,
    own: slice = ALL,
) -> Batch:
    """The samples of 0-based (task, step), each with one of its captions. side: of images that are
    decoded from files; own: the samples whose images are wanted."""
    seed, size = config.seeds.data, config.training.batch
    rows = batch_rows(pools, config.mixture, size, seed, task, step)
    choice = numpy_generator("data/caption", seed, task, step).random(size)
    starts, stops = corpus.caption_starts[rows], corpus.caption_starts[rows + 1]
    texts = corpus.caption_ids[starts + (choice * (stops - starts)).astype(np.int64)]
    if corpus.in_files:
        generator = numpy_generator("augment/part", config.seeds.augment, task, step)
        images = corpus.images.parts(rows, side, generator, own)
    else:
        own_rows = torch.from_numpy(rows[own])
        images = corpus.images.index_select(0, own_rows)  # whole rows: 5x indexing
    return Batch(rows, images, torch.from_numpy(texts))


def largest_batch(pools: Pools, mixture: Mixture, batch: int) -> int:
    """The largest batch up to `batch` that takes no sample of these pools twice."""
    sizes = (len(pools.pretraining), len(pools.update), len(pools.buffer))

    def fits(size: int) -> bool:
        taken = parts(mixture, size, empty_buffer=sizes[2] == 0)
        return all(part <= there for part, there in zip(taken, sizes, strict=True))

    return next((size for size in range(batch, 0, -1) if fits(size)), 0)


def past(updates: list[np.ndarray], labels: np.ndarray) -> Past:
    """What arrived in some updates. labels: the class number of every image of the corpus."""
    rows = np.concatenate(updates) if updates else np.empty(0, np.int64)
    task = np.repeat(np.arange(len(updates)), [len(update) for update in updates])
    order = np.argsort(rows)
    return Past(rows[order], task[order], labels[rows[order]])


def task_pools(config: RunConfig, corpus: Corpus) -> list[Pools]:
    """What each task may draw from; `CmpError` if a batch would take a sample of a pool twice."""
    mixture, seed = config.mixture, config.seeds.data
    replay = replay_pool(corpus, mixture, seed)
    if mixture.update + mixture.buffer == 0:
        updates = [replay[:0]] * config.stream.tasks
    else:
        updates = streams.task_rows(corpus, config.stream, config.seeds.stream)
    labels = pd.factorize(streams.names(corpus, np.arange(len(corpus.table))))[0]
    keep, pools = BUFFERS[mixture.policy], []
    for task, update in enumerate(updates):
        before = past(updates[:task], labels)
        held, groups = keep(before, mixture.capacity, seed)
        pools.append(Pools(replay, update, before.rows[held], groups))
    batch = config.training.batch
    largest = min(largest_batch(each, mixture, batch) for each in pools)
    if largest < batch:
        raise CmpError(
            f"training.batch: {batch} takes more samples of a pool than it holds; the largest that "
            f"fits this stream and mixture is {largest}"
        )
    return pools
