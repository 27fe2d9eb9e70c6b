"""Choose the samples of the batch at (task, step).

A batch mixes the pretraining pool P, the current update D and a buffer B of earlier updates. Every
choice is a function of (config, task, step), so there is no state.
"""

import dataclasses
import functools
import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from cmp import streams
from cmp.buffers import buffer_history, choose_lowest, fill_buffer, rank_within_groups
from cmp.config import Mixture, RunConfig, parse
from cmp.data import IMAGE_SIZE, WHOLE_BATCH, Batch, Corpus, to_device
from cmp.errors import CmpError
from cmp.seeds import numpy_generator, unit_interval

MIN_STEPS = 10
"""Fewest steps of a task when `training.passes` sets its steps."""
MIN_BATCH = 2
"""Fewest samples in a batch, since its loss contrasts samples with each other."""


@dataclass(frozen=True, eq=False)
class Pools:
    """What a task may draw from, as positions in the corpus.

    Attributes:
        pretraining: The kept part of the pretraining pool.
        update: The images that arrive in this task.
        buffer: Images of earlier tasks; empty in the first one.
        groups: The group number of each buffer image, if groups are drawn equally often.
        counts: How many samples of a batch come from the pretraining pool, the update and the
            buffer.
    """

    pretraining: np.ndarray
    update: np.ndarray
    buffer: np.ndarray
    groups: np.ndarray | None = None
    counts: tuple[int, int, int] = (0, 0, 0)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """The number of images in the pretraining pool, the update and the buffer."""
        return len(self.pretraining), len(self.update), len(self.buffer)

    @property
    def rows(self) -> np.ndarray:
        """The positions of all images that the task may draw."""
        return np.concatenate([self.pretraining, self.update, self.buffer])

    @functools.cached_property
    def members(self) -> list[np.ndarray] | None:
        """The buffer's positions by group, if it has groups, computed once instead of at every
        step."""
        if self.groups is None:
            return None
        order = np.argsort(self.groups, kind="stable")
        firsts = np.unique(self.groups[order], return_index=True)[1]
        return np.split(self.buffer[order], firsts[1:])


def batch_counts(mixture: Mixture, batch: int, empty_buffer: bool) -> tuple[int, int, int]:
    """Return how many samples of a batch come from (P, D, B).

    Counts are rounded down, and the remainder goes to the first pools with a share. While the
    buffer is empty, its samples are split between P and D, if these have a share.

    Args:
        mixture: The config section.
        batch: Samples per batch.
        empty_buffer: Whether the buffer is empty, as in the first task.
    """
    shares = np.array(mixture.shares)
    counts = (batch * shares + 1e-9).astype(int)
    counts[np.flatnonzero(shares)[: batch - counts.sum()]] += 1
    p, d, b = counts.tolist()
    if not empty_buffer:
        return p, d, b
    if mixture.pretraining > 0 and mixture.update > 0:
        return p + b // 2, d + b - b // 2, 0
    return (p + b, 0, 0) if mixture.pretraining > 0 else (0, d + b, 0)


def empty_shares(mixture: Mixture, batch: int, empty_buffer: bool) -> list[str]:
    """Return the nonzero shares that give a batch no sample, such as "mixture.update 0.01". While
    the buffer is empty, its share goes to the others.

    Args:
        mixture: The config section.
        batch: Samples per batch.
        empty_buffer: As in `batch_counts`.
    """
    named = zip(("pretraining", "update", "buffer"), mixture.shares, strict=True)
    counts = batch_counts(mixture, batch, empty_buffer)
    return [
        f"mixture.{name} {share:g}"
        for (name, share), count in zip(named, counts, strict=True)
        if share > 0 and count == 0 and not (empty_buffer and name == "buffer")
    ]


def check_shares(batch: int, tasks: Iterable[tuple[Mixture, bool]], label: str) -> None:
    """Check that every nonzero share gives a batch at least one sample.

    Args:
        batch: Samples per batch.
        tasks: Pairs of a task's mixture and whether its buffer is empty.
        label: The name of the batch in error messages.

    Raises:
        CmpError: A share gives no sample; the message names it, and a batch that works, as does
            every larger one.
    """
    distinct = list(dict.fromkeys(tasks))
    empty = [
        name for mixture, is_first in distinct for name in empty_shares(mixture, batch, is_first)
    ]
    if empty:
        least = min(share for mixture, _ in distinct for share in mixture.shares if share)
        raise CmpError(
            f"{label}: {batch} has no sample of {empty[0]}; use a batch of "
            f"{np.ceil(1 / least):.0f}, or set the share, and that in mixture.last if there is "
            f"one, to 0 or to at least {math.ceil(1000 / batch) / 1000:g}"
        )


def batch_rows(pools: Pools, seed: int, task: int, step: int) -> np.ndarray:
    """Return the corpus positions of the batch at (task, step), [batch]: D, then B, then P.

    Args:
        pools: What the task may draw from.
        seed: The data seed.
        task: The task's number, from 0.
        step: The step within the task, from 0.
    """
    p, d, b = pools.counts
    update = sample(pools.update, d, "update", seed, task, step)
    if pools.members is None:
        buffer = sample(pools.buffer, b, "buffer", seed, task, step)
    else:
        buffer = sample_evenly(pools.members, b, seed, task, step)
    pretraining = sample(pools.pretraining, p, "pretraining", seed, task, step)
    return np.concatenate([update, buffer, pretraining])


def make_batch(
    config: RunConfig,
    corpus: Corpus,
    pools: Pools,
    task: int,
    step: int,
    side: int = IMAGE_SIZE,
    local: slice = WHOLE_BATCH,
) -> Batch:
    """Return the batch of (task, step), each sample with one of its captions.

    Args:
        config: The run's config.
        corpus: The run's data.
        pools: What the task may draw from.
        task: The task's number, from 0.
        step: The step within the task, from 0.
        side: Pixels per side of random crops of files.
        local: The samples whose images are needed, such as those of one process.
    """
    seed = config.seeds.data
    rows = batch_rows(pools, seed, task, step)
    choice = numpy_generator("data/caption", seed, task, step).random(len(rows))
    starts, stops = corpus.caption_starts[rows], corpus.caption_starts[rows + 1]
    texts = corpus.caption_ids[starts + (choice * (stops - starts)).astype(np.int64)]
    if isinstance(corpus.images, Tensor):
        # index_select copies whole rows, five times as fast as indexing
        places = to_device(torch.from_numpy(rows[local]), corpus.images.device)
        images = corpus.images.index_select(0, places)
    elif config.training.augment:
        generator = numpy_generator("augment/part", config.seeds.augment, task, step)
        numbers = generator.random((len(rows), 4))  # each sample is cropped as in the whole batch
        images = corpus.images.random_crops(rows[local], side, numbers[local])
    else:
        images = corpus.images[rows[local]]
    return Batch(rows, images, torch.from_numpy(texts), replayed=pools.counts[0])


class MixtureSampler(Sampler[list[int]]):
    """A torch batch sampler that mixes three datasets in fixed shares.

    It yields lists of indices into `ConcatDataset([pool, update, buffer])`, for the `batch_sampler`
    of a `DataLoader`. Every item of a dataset is used once before any is used again. Each pass
    repeats the same batches; another `task` gives new ones.

    Example:
        >>> pool, update, buffer = range(100), range(40), range(60)
        >>> sampler = cmp.MixtureSampler(pool, update, buffer, (0.25, 0.25, 0.5), batch=8, steps=2)
        >>> [len(batch) for batch in sampler]
        [8, 8]
    """

    def __init__(
        self,
        pool: Sized,
        update: Sized,
        buffer: Sized,
        shares: tuple[float, float, float],
        batch: int,
        steps: int,
        seed: int = 0,
        task: int = 0,
    ):
        """Prepare the sampler of one task.

        Args:
            pool: The replayed part of the pretraining data.
            update: The new data.
            buffer: Data of earlier updates; may be empty.
            shares: Shares of the three in a batch; they sum to one.
            batch: Samples per batch.
            steps: Batches per task.
            seed: Seed of the draws.
            task: The task's number; different tasks give different draws.

        Raises:
            CmpError: The shares are not three numbers that sum to one, or one gives a batch no
                sample.
        """
        if len(shares) != 3 or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
            raise CmpError(
                f"MixtureSampler: shares {tuple(shares)}: give those of pool, update and buffer, "
                "which must sum to one"
            )
        sizes = np.cumsum([0, len(pool), len(update), len(buffer)])
        pretraining, newest, earlier = map(float, shares)
        mixture, is_empty = Mixture(pretraining, newest, earlier), len(buffer) == 0
        check_shares(batch, [(mixture, is_empty)], "MixtureSampler: batch")
        pools = (np.arange(a, b) for a, b in itertools.pairwise(sizes))
        self.pools = Pools(*pools, counts=batch_counts(mixture, batch, is_empty))
        self.steps, self.seed, self.task = steps, seed, task

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.steps):
            yield batch_rows(self.pools, self.seed, self.task, step).tolist()


def largest_batch(pools: Pools, mixture: Mixture, batch: int) -> int:
    """Return the largest batch size, at most `batch`, that takes no more from any pool than it
    holds and has a sample of every share; 0 if there is none."""
    sizes = pools.sizes

    def fits(candidate: int) -> bool:
        is_empty = sizes[2] == 0
        counts = batch_counts(mixture, candidate, is_empty)
        is_held = all(count <= size for count, size in zip(counts, sizes, strict=True))
        return is_held and not empty_shares(mixture, candidate, is_empty)

    return next((size for size in range(min(batch, sum(sizes)), 0, -1) if fits(size)), 0)


def fit_mixture(config: RunConfig, corpus: Corpus) -> RunConfig:
    """Return the config with a mixture that its data can fill; warn if it has to change.

    If no dataset has the role pool, or all its images are gone, the update and the buffer take over
    its share, in proportion to their own. A mixture with only the pool, with another pool, or with
    `last` is left as it is and fails later.

    Raises:
        CmpError: The method needs a pool.
    """
    mixture, (pool, update, buffer) = config.mixture, config.mixture.shares
    is_fixed = mixture.pool != "pretraining" or mixture.last is not None or pool in (0, 1)
    names, table = corpus.by_role("pool"), corpus.table
    is_left = table["dataset"].isin(names) & (table["split"] != "")  # "" if an image is gone
    if is_fixed or is_left.to_numpy().any():
        return config
    update, buffer = update / (update + buffer), buffer / (update + buffer)
    tree = config.to_dict()
    tree["mixture"] |= {"pretraining": 0.0, "update": update, "buffer": buffer}
    words = "no pretraining data is replayed; its share goes to the update and the buffer"
    why = "no image of the pool is left" if names else "no dataset has the role pool"
    warnings.warn(f"mixture.pretraining: {why}, so {words}", stacklevel=2)
    return parse(tree, "data without a dataset of role pool")


def counts_for_passes(
    mixture: Mixture, batch: int, sizes: tuple[int, int, int], passes: float
) -> tuple[int, int, int]:
    """Return how many samples of a batch come from (P, D, B) when `training.passes` sets the steps.

    These are the counts of `batch_counts` if the pools hold enough. If an update is so small that
    `MIN_STEPS` would show it too often, a batch takes fewer of its images, and the buffer and the
    pool fill the batch, in proportion to their shares. If they cannot, the batch is smaller.

    Args:
        mixture: The config section for one task.
        batch: Samples per batch.
        sizes: The number of images in the pool, the update and the buffer.
        passes: How often the task shows each image of the update, on average.
    """
    held_p, held_d, held_b = sizes
    p, d, b = batch_counts(mixture, batch, empty_buffer=held_b == 0)
    new = min(d, held_d, math.ceil(passes * held_d / MIN_STEPS))
    if new == d and p <= held_p and b <= held_b:
        return p, d, b
    open_p, open_b = held_p if p else 0, held_b if b else 0
    wanted_p = round((batch - new) * p / max(p + b, 1))
    b = min(batch - new - min(wanted_p, open_p), open_b)
    p = min(batch - new - b, open_p)
    return p, new if p + b else min(batch, held_d), b


def fit_steps(config: RunConfig, corpus: Corpus) -> RunConfig:
    """Return the config with the steps that `training.passes` gives each task.

    A task has enough steps to show each image of its update that often on average, rounded up, and
    at least `MIN_STEPS`. Steps given by `training.task_steps` do not change.
    """
    passes, known = config.training.passes, config.training.task_steps
    if passes is None or len(known) == config.stream.tasks:
        return config
    pools = task_pools(config, corpus, len(known))[len(known) :]
    wanted = (math.ceil(passes * len(each.update) / each.counts[1]) for each in pools)
    tree = config.to_dict()
    tree["training"]["task_steps"] = [*known, *(max(MIN_STEPS, steps) for steps in wanted)]
    return parse(tree, f"training.passes: {passes:g}")


def task_pools(config: RunConfig, corpus: Corpus, first: int = 0) -> list[Pools]:
    """Return the pools that each task may draw from; see also `fit_mixture`.

    Args:
        config: The config.
        corpus: The data.
        first: The first task that is still to be trained. Earlier ones only fill the buffer, so
            they need no batches, even if most of their images are gone.

    Raises:
        CmpError: A batch would take more samples from a pool than it holds, or none from a pool
            that has a share.

    Example:
        >>> pools = cmp.task_pools(cmp.RunConfig(), cmp.load_data("embedded"))
        >>> len(pools), len(pools[0].buffer)
        (8, 0)
    """
    config = fit_mixture(config, corpus)
    mixture, seed = config.mixture, config.seeds.data
    replayed = replay_pool(corpus, mixture, seed)
    if mixture.update + mixture.buffer == 0 and mixture.last is None:
        updates = [replayed[:0]] * config.stream.tasks
    else:
        updates = streams.task_rows(corpus, config.stream, config.seeds.stream)
    labels = streams.class_numbers(corpus)
    pools = []
    for task, update in enumerate(updates):
        history = buffer_history(updates[:task], labels)
        kept, groups = fill_buffer(mixture.policy, history, mixture.capacity, seed)
        pools.append(Pools(replayed, update, history.rows[kept], groups))
    shares = [mixture.at(task, len(pools)) for task in range(len(pools))]
    # an update whose images are all gone cannot be trained again, so it needs no batches
    kept = [
        task for task, each in enumerate(pools)
        if task >= first and (len(each.update) or not shares[task].update)
    ]  # fmt: skip
    counts = _task_counts(config, kept, [pools[n] for n in kept], [shares[n] for n in kept])
    for task, each in zip(kept, counts, strict=True):
        pools[task] = dataclasses.replace(pools[task], counts=each)
    return pools


def _task_counts(
    config: RunConfig, tasks: list[int], pools: list[Pools], shares: list[Mixture]
) -> list[tuple[int, int, int]]:
    """Return the samples per batch from (P, D, B) in some tasks; raise `CmpError` if their pools
    are too small."""
    batch, passes = config.training.batch, config.training.passes
    has_none = [len(each.buffer) == 0 for each in pools]
    check_shares(batch, zip(shares, has_none, strict=True), "training.batch")
    if passes is not None:
        counts = [
            counts_for_passes(mixture, batch, each.sizes, passes)
            for mixture, each in zip(shares, pools, strict=True)
        ]
        if (least := min(map(sum, counts), default=MIN_BATCH)) < MIN_BATCH:
            task = tasks[[*map(sum, counts)].index(least)]
            raise CmpError(
                f"training.passes: task {task} has {least} images to train on, and a contrastive "
                f"loss needs {MIN_BATCH}; add images, or a pool to replay"
            )
        return counts
    counts = [*map(batch_counts, shares, [batch] * len(pools), has_none)]
    if all((np.array(pool.sizes) >= own).all() for pool, own in zip(pools, counts, strict=True)):
        return counts
    largest = batch
    while (fitting := min(map(largest_batch, pools, shares, [largest] * len(pools)))) < largest:
        largest = fitting  # until it fits all tasks
    fix = "use fewer tasks, training.passes, or other shares"
    if largest >= MIN_BATCH:
        fix = f"training.batch={largest} fits this stream and mixture"
    raise CmpError(f"training.batch: {batch} takes more samples from a pool than it holds; {fix}")


@functools.lru_cache(maxsize=32)
def _permutation(size: int, name: str, seed: int, task: int, epoch: int) -> np.ndarray:
    return numpy_generator(f"data/{name}", seed, task, epoch).permutation(size)


def sample(pool: np.ndarray, count: int, name: str, seed: int, task: int, step: int) -> np.ndarray:
    """Return `count` samples of a pool for one step, [count].

    The steps of a task read an endless sequence of permutations of the pool. Each permutation has
    its own random stream, so any step can be computed without the earlier ones.

    Args:
        pool: Positions to draw from.
        count: The number of samples.
        name: Name of the random stream.
        seed: The data seed.
        task: The task's number.
        step: The step within the task.
    """
    if count == 0:
        return pool[:0]
    if len(pool) == 0:
        raise CmpError(f"mixture.{name}: a batch needs {count} samples from an empty pool")
    drawn, (epoch, first) = [], divmod(step * count, len(pool))
    while count > 0:
        places = _permutation(len(pool), name, seed, task, epoch)[first : first + count]
        drawn.append(places)
        count, epoch, first = count - len(places), epoch + 1, 0
    return pool[np.concatenate(drawn)]


def sample_evenly(
    members: list[np.ndarray], count: int, seed: int, task: int, step: int
) -> np.ndarray:
    """Return samples of the buffer, taking groups in turn, and in turn the images of each group;
    `seed`, `task` and `step` are as in `sample`.

    Args:
        members: The positions of each group, see `Pools.members`.
        count: The number of samples.
    """
    groups = sample(np.arange(len(members)), count, "groups", seed, task, step)
    rounds = np.arange(step * count, (step + 1) * count) // len(members)
    permutation, drawn = _group_permutations(seed, task), np.empty(count, np.int64)
    for index, (group, turn) in enumerate(zip(groups.tolist(), rounds.tolist(), strict=True)):
        epoch, place = divmod(turn, len(members[group]))  # a new image until all have been used
        drawn[index] = members[group][permutation(len(members[group]), group, epoch)[place]]
    return drawn


@functools.lru_cache(maxsize=1)
def _group_permutations(seed: int, task: int) -> Callable[[int, int, int], np.ndarray]:
    """Return a function of (size, group, epoch) that caches the permutations of one task's groups.

    Together they are about as long as the buffer plus all draws from it, whatever the group sizes.
    A limit on their number would be too low for many small groups or too high for large ones.
    """

    @functools.cache
    def permutation(size: int, group: int, epoch: int) -> np.ndarray:
        return numpy_generator("data/member", seed, task, group, epoch).permutation(size)

    return permutation


ROLE_OF_POOL = {"pretraining": "pool", "fresh": "pool", "substitute": "substitute"}
"""For each value of `mixture.pool`, the role of the datasets that are replayed."""


def is_kept_concept(labels: Iterable[str], seed: int) -> np.ndarray:
    """Return whether each class name is in the half of all names that "concepts" may replay.

    This depends only on the name and the seed, so every pool is split in the same way.
    """
    return np.array([_is_kept(name, seed) for name in labels], bool)


@functools.lru_cache(maxsize=2**16)
def _is_kept(name: str, seed: int) -> bool:
    return unit_interval("kept concept", seed, name) < 0.5


def replay_pool(corpus: Corpus, mixture: Mixture, seed: int) -> np.ndarray:
    """Return the sorted corpus positions of the part of the pool that is kept for replay.

    Raises:
        CmpError: The mixture needs a pool that these data do not have.
    """
    pool, kept = choose_replay(corpus, mixture, seed)
    return pool[kept]


def choose_replay(corpus: Corpus, mixture: Mixture, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the corpus positions of the whole pool, and which positions in it are kept.

    Selection "random" keeps every image with the same probability. "concepts" excludes half of the
    class names, see `is_kept_concept`, and keeps all remaining images if they are fewer than
    `mixture.replay` asks for. "clustered" keeps the same number from each cluster of image
    features, as far as possible. "aligned" keeps the images closest to their captions according to
    a base.
    """
    rows = corpus.rows("fresh" if mixture.pool == "fresh" else "train")
    replayed = corpus.by_role(ROLE_OF_POOL[mixture.pool])
    pool = rows[corpus.table["dataset"].iloc[rows].isin(replayed).to_numpy()]
    if len(pool) == 0:
        if mixture.pretraining > 0 or (mixture.last and mixture.last[0] > 0):
            raise CmpError(
                f"mixture.pool: {mixture.pool!r}: these data have no such pool; choose another, "
                "or set mixture.pretraining=0"
            )
        return pool, pool
    size = max(1, round(mixture.replay * len(pool)))
    priority = np.argsort(numpy_generator("replay", seed).permutation(len(pool)))
    keys = [priority]
    if mixture.select == "concepts":
        is_kept = is_kept_concept(corpus.table["label"].array[pool], seed)
        keys, size = [priority, ~is_kept], min(size, int(is_kept.sum()))
    elif mixture.select != "random":
        statistics = streams.statistics_tables().pool_statistics(corpus, pool)
        if mixture.select == "clustered":
            keys.append(rank_within_groups(statistics["cluster"].to_numpy(), priority))
        else:
            keys.append(-statistics["alignment"].to_numpy())
    if size == 0:
        raise CmpError(
            "mixture.select: 'concepts': no class name of the pool is in the half that may be "
            "replayed; choose another selection or seeds.data"
        )
    return pool, choose_lowest(keys, size)
