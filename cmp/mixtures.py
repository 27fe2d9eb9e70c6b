"""Which samples make the batch at (task, step): pretraining pool P, update pool D, buffer B."""

import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import Dataset

from cmp import streams
from cmp.config import Mixture, RunConfig
from cmp.data import IMAGE_SIZE, WHOLE_BATCH, Batch, Corpus, _prefetch, worker_count
from cmp.errors import CmpError
from cmp.seeds import numpy_generator


class _StepDataset(Dataset):
    """The batches of one task, by step."""

    def __init__(self, *of):
        self.config, self.corpus, self.pools, self.task, self.side, self.own = of

    def __getitem__(self, step: int) -> tuple[np.ndarray, Tensor, Tensor]:
        batch = make_batch(
            self.config, self.corpus, self.pools, self.task, step, self.side, self.own
        )
        return batch.rows, batch.images, batch.texts


@dataclass(frozen=True)
class Pools:
    """Positions in the corpus that a task may draw from; the buffer of the first task is empty.

    groups: of each image of the buffer, by number, where groups are drawn from equally often.
    """

    pretraining: np.ndarray
    update: np.ndarray
    buffer: np.ndarray
    groups: np.ndarray | None = None


class BatchLoader:
    """The batches of a run. Asked for one step after the other, it has made them ahead, if images
    are decoded and there are processes for it."""

    def __init__(self, config: RunConfig, corpus: Corpus, side: int, device: torch.device):
        self.config, self.corpus, self.side, self.device = config, corpus, side, device
        self.processes = worker_count(device) if corpus.in_files else 0
        self.due: tuple[Pools, int, int, slice] | None = None
        self.steps: Iterator = iter(())

    def batch(self, pools: Pools, task: int, step: int, own: slice = WHOLE_BATCH) -> Batch:
        """The batch at (task, step), with the images of `own` of its samples."""
        if not self.processes:
            return make_batch(self.config, self.corpus, pools, task, step, self.side, own)
        if self.due is None or self.due[0] is not pools or self.due[1:] != (task, step, own):
            dataset = _StepDataset(self.config, self.corpus, pools, task, self.side, own)
            order = range(step, max(self.config.training.steps, step + 1))
            self.steps = _prefetch(dataset, order, self.processes, self.device)
        rows, images, texts = next(self.steps)
        self.due = (pools, task, step + 1, own)
        if step + 1 >= self.config.training.steps:
            self.due, self.steps = None, iter(())
        return Batch(rows, images, texts)


def batch_counts(mixture: Mixture, batch: int, empty_buffer: bool) -> tuple[int, int, int]:
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
    p, d, b = batch_counts(mixture, batch, empty_buffer=len(pools.buffer) == 0)
    update = sample(pools.update, d, "update", seed, task, step)
    if pools.groups is None:
        buffer = sample(pools.buffer, b, "buffer", seed, task, step)
    else:
        buffer = sample_evenly(pools.buffer, pools.groups, b, seed, task, step)
    return np.concatenate(
        [update, buffer, sample(pools.pretraining, p, "pretraining", seed, task, step)]
    )


def make_batch(
    config: RunConfig,
    corpus: Corpus,
    pools: Pools,
    task: int,
    step: int,
    side: int = IMAGE_SIZE,
    own: slice = WHOLE_BATCH,
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
        taken = batch_counts(mixture, size, empty_buffer=sizes[2] == 0)
        return all(part <= there for part, there in zip(taken, sizes, strict=True))

    return next((size for size in range(batch, 0, -1) if fits(size)), 0)


def task_pools(config: RunConfig, corpus: Corpus) -> list[Pools]:
    """What each task may draw from; `CmpError` if a batch would take a sample of a pool twice."""
    mixture, seed = config.mixture, config.seeds.data
    replay = replay_pool(corpus, mixture, seed)
    if mixture.update + mixture.buffer == 0:
        updates = [replay[:0]] * config.stream.tasks
    else:
        updates = streams.task_rows(corpus, config.stream, config.seeds.stream)
    labels = pd.factorize(streams.class_names(corpus, np.arange(len(corpus.table))))[0]
    keep, pools = BUFFERS[mixture.policy], []
    for task, update in enumerate(updates):
        before = buffer_history(updates[:task], labels)
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


@functools.lru_cache(maxsize=32)
def _permutation(size: int, name: str, seed: int, task: int, epoch: int) -> np.ndarray:
    return numpy_generator(f"data/{name}", seed, task, epoch).permutation(size)


def sample(pool: np.ndarray, count: int, name: str, seed: int, task: int, step: int) -> np.ndarray:
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


def sample_evenly(
    pool: np.ndarray, groups: np.ndarray, count: int, seed: int, task: int, step: int
) -> np.ndarray:
    """As `draw`, from the buffer: each group has its turn, and within a group each image has.

    groups: the number of each image's group, [len(pool)].
    """
    if count == 0:
        return pool[:0]
    order, sizes = np.argsort(groups, kind="stable"), np.unique(groups, return_counts=True)[1]
    members = np.split(order, np.cumsum(sizes)[:-1])
    turns = sample(np.arange(len(sizes)), count, "groups", seed, task, step)
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


def choose_lowest(keys: Sequence[np.ndarray], count: int | None) -> np.ndarray:
    """The `count` items that come first by the last key, then by the one before it, ...: sorted
    positions. `None` for all.

    What is chosen from all items is, as far as it lies in a part of them, chosen from that part as
    well: a buffer that chooses so never takes back what it dropped.
    """
    return np.sort(np.lexsort(keys)[:count])


def rank_within_groups(groups: np.ndarray, priority: np.ndarray) -> np.ndarray:
    """Each item's place within its group by rising priority, from 0, [n]."""
    order = np.lexsort((priority, groups))
    starts = np.flatnonzero(np.diff(groups[order], prepend=-1))
    place = np.arange(len(order)) - np.repeat(starts, np.diff(starts, append=len(order)))
    return place[np.argsort(order)]


@dataclass(frozen=True)
class BufferHistory:
    """All n images of earlier updates: their positions in the corpus, sorted, and the numbers of
    their updates and of their classes, [n] each."""

    rows: np.ndarray
    task: np.ndarray
    label: np.ndarray


def buffer_history(updates: list[np.ndarray], labels: np.ndarray) -> BufferHistory:
    """What arrived in some updates. labels: the class number of every image of the corpus."""
    rows = np.concatenate(updates) if updates else np.empty(0, np.int64)
    task = np.repeat(np.arange(len(updates)), [len(update) for update in updates])
    order = np.argsort(rows)
    return BufferHistory(rows[order], task[order], labels[rows[order]])


BufferContent = tuple[np.ndarray, np.ndarray | None]
"""Which of the past's images are kept, as sorted positions in it; and of each the number of its
group, where groups are drawn from equally often."""


def unlimited_buffer(past: BufferHistory, capacity: int | None, seed: int) -> BufferContent:
    """All that arrived; every image is drawn equally often."""
    return np.arange(len(past.rows)), None


def reservoir_buffer(past: BufferHistory, capacity: int | None, seed: int) -> BufferContent:
    """A uniform sample of all that arrived, of a fixed size; every image is drawn equally often."""
    return choose_lowest([_random_keys("buffer", seed, past.rows)], capacity), None


def class_balanced_buffer(past: BufferHistory, capacity: int | None, seed: int) -> BufferContent:
    """As many of each class as fit, or all; every class is drawn equally often."""
    return _balanced_buffer(past, past.label, capacity, seed)


def task_balanced_buffer(past: BufferHistory, capacity: int | None, seed: int) -> BufferContent:
    """As many of each update as fit, or all; every update is drawn equally often."""
    return _balanced_buffer(past, past.task, capacity, seed)


def _balanced_buffer(
    past: BufferHistory, groups: np.ndarray, capacity: int | None, seed: int
) -> BufferContent:
    """Every group's first image, then every group's second, and so on."""
    place = rank_within_groups(groups, _random_keys("buffer", seed, past.rows))
    held = choose_lowest([_random_keys("buffer/groups", seed, groups), place], capacity)
    return held, groups[held]


def _random_keys(name: str, seed: int, items: np.ndarray) -> np.ndarray:
    """A random number for each item that depends on the item, the name and the seed alone."""
    return numpy_generator(name, seed).random(int(items.max(initial=0)) + 1)[items]


BUFFERS: dict[str, Callable[[BufferHistory, int | None, int], BufferContent]] = {
    "unlimited": unlimited_buffer, "reservoir": reservoir_buffer, "class-balanced": class_balanced_buffer,
    "task-balanced": task_balanced_buffer,
}  # fmt: skip
"""By `mixture.policy`, a function of (the past, `mixture.capacity`, data seed). A buffer never
holds again what it once dropped, since it chooses by `choice.lowest`."""

POOL_ROLES = {"pretraining": "pool", "substitute": "substitute"}
"""By `mixture.pool`: the role of the datasets that are replayed."""

Keys = list[np.ndarray]


def random_selection(corpus: Corpus, pool: np.ndarray, priority: np.ndarray) -> Keys:
    """Any image is as likely to be kept as any other."""
    return [priority]


def clustered_selection(corpus: Corpus, pool: np.ndarray, priority: np.ndarray) -> Keys:
    """As many images of each cluster of image features, as far as it has them."""
    return [
        priority,
        rank_within_groups(streams.pool_statistics(corpus, pool)["cluster"].to_numpy(), priority),
    ]


def aligned_selection(corpus: Corpus, pool: np.ndarray, priority: np.ndarray) -> Keys:
    """The images whose captions a base finds nearest to them."""
    return [priority, -streams.pool_statistics(corpus, pool)["alignment"].to_numpy()]


SELECTIONS: dict[str, Callable[[Corpus, np.ndarray, np.ndarray], Keys]] = {
    "random": random_selection, "clustered": clustered_selection, "aligned": aligned_selection,
}  # fmt: skip
"""By `mixture.select`: (corpus, positions of the pool's images in it, their random priorities) ->
keys of `choice.lowest`."""


def replay_pool(corpus: Corpus, mixture: Mixture, seed: int) -> np.ndarray:
    """The fixed part of the pool that is kept for replay, as sorted positions in the corpus.

    `CmpError` if the batch wants a pool that these data do not have.
    """
    pool, kept = _choose_replay(corpus, mixture, seed)
    return pool[kept]


def replay_digest(corpus: Corpus, mixture: Mixture, seed: int) -> str:
    """sha256 of which images of the pool are kept, which stands for all that decided it."""
    _, kept = _choose_replay(corpus, mixture, seed)
    return hashlib.sha256(kept.astype("<i8").tobytes()).hexdigest()


def _choose_replay(corpus: Corpus, mixture: Mixture, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(positions of the whole pool in the corpus, sorted positions in the pool that are kept)."""
    train = corpus.rows("train")
    of_role = corpus.by_role(POOL_ROLES[mixture.pool])
    pool = train[corpus.table["dataset"].iloc[train].isin(of_role).to_numpy()]
    if len(pool) == 0:
        if mixture.pretraining > 0:
            raise CmpError(f"mixture.pool: {mixture.pool!r}: there is no such pool in these data")
        return pool, pool
    size = max(1, round(mixture.replay * len(pool)))
    priority = np.argsort(numpy_generator("replay", seed).permutation(len(pool)))
    return pool, choose_lowest(SELECTIONS[mixture.select](corpus, pool, priority), size)
