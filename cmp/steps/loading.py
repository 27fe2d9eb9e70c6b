"""Batches and images made ahead of time, for data that do not fit into memory.

A batch is a function of (config, task, step), so a loader has no state to save: its sampler is the
range of steps from the current one on, and whatever process makes a batch makes the same one.
"""

import multiprocessing
import os
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from cmp.config import RunConfig
from cmp.data.corpus import Corpus
from cmp.data.samples import ALL
from cmp.errors import CmpError
from cmp.mixtures import Batch, Pools, make_batch
from cmp.steps import distributed

AHEAD = 2
"""Batches that each process makes ahead."""


def processes(device: torch.device) -> int:
    """How many processes decode: `$CMP_WORKERS`; by default none beside training on a CPU, and for
    a GPU all cores but one, or of its share of them where several processes train on a machine.
    None in a study's workers, which may have no children."""
    if multiprocessing.current_process().daemon:
        return 0
    asked = os.environ.get("CMP_WORKERS")
    if asked is None:
        cores = (os.cpu_count() or 1) // distributed.beside()
        return max(1, cores - 1) if device.type == "cuda" else 0
    if not asked.isdecimal() or int(asked) > 1024:
        raise CmpError(f"CMP_WORKERS: {asked!r}: expected a number of processes, 0 to 1024")
    return int(asked)


def side(model: nn.Module) -> int:
    """The side of the square images that a network takes; `CmpError` if they are not square."""
    sides = np.broadcast_to(model.visual.image_size, 2)
    if sides[0] != sides[1]:
        raise CmpError(f"model.name: takes images of {sides[0]} x {sides[1]}, which are not square")
    return int(sides[0])


class _Steps(Dataset):
    """The batches of one task, by step."""

    def __init__(self, *of):
        self.config, self.corpus, self.pools, self.task, self.side, self.own = of

    def __getitem__(self, step: int) -> tuple[np.ndarray, Tensor, Tensor]:
        batch = make_batch(
            self.config, self.corpus, self.pools, self.task, step, self.side, self.own
        )
        return batch.rows, batch.images, batch.texts


class _Blocks(Dataset):
    """Images in blocks, whole."""

    def __init__(self, corpus: Corpus, blocks: tuple[Tensor, ...], side: int):
        self.files, self.blocks = corpus.images.at(side), blocks

    def __getitem__(self, number: int) -> Tensor:
        return self.files[self.blocks[number]]


def _ahead(dataset: Dataset, order: range, count: int, device: torch.device) -> Iterator:
    """The items of a dataset in the given order, made by `count` other processes. They are forked
    where that is possible, so that what is in memory is shared."""
    return iter(
        DataLoader(
            dataset,
            batch_size=None,
            sampler=order,
            num_workers=count,
            collate_fn=_same,
            pin_memory=device.type == "cuda",
            prefetch_factor=AHEAD,
        )
    )


def _same(item):
    return item


class Loader:
    """The batches of a run. Asked for one step after the other, it has made them ahead, if images
    are decoded and there are processes for it."""

    def __init__(self, config: RunConfig, corpus: Corpus, side: int, device: torch.device):
        self.config, self.corpus, self.side, self.device = config, corpus, side, device
        self.processes = processes(device) if corpus.in_files else 0
        self.due: tuple[Pools, int, int, slice] | None = None
        self.steps: Iterator = iter(())

    def batch(self, pools: Pools, task: int, step: int, own: slice = ALL) -> Batch:
        """The batch at (task, step), with the images of `own` of its samples."""
        if not self.processes:
            return make_batch(self.config, self.corpus, pools, task, step, self.side, own)
        if self.due is None or self.due[0] is not pools or self.due[1:] != (task, step, own):
            dataset = _Steps(self.config, self.corpus, pools, task, self.side, own)
            order = range(step, max(self.config.training.steps, step + 1))
            self.steps = _ahead(dataset, order, self.processes, self.device)
        rows, images, texts = next(self.steps)
        self.due = (pools, task, step + 1, own)
        if step + 1 >= self.config.training.steps:
            self.due, self.steps = None, iter(())
        return Batch(rows, images, texts)


def stored(
    corpus: Corpus, rows: np.ndarray, size: int, side: int, device: torch.device
) -> Iterator[Tensor]:
    """Images as they are stored, or the middles of those in files, in blocks of `size`: uint8
    [size, 4, H, W] or [size, 3, side, side]."""
    blocks = torch.from_numpy(rows).split(size)
    if not corpus.in_files:
        return (corpus.images[block] for block in blocks)
    dataset, count = _Blocks(corpus, blocks, side), processes(device)
    if not count:
        return (dataset[number] for number in range(len(blocks)))
    return _ahead(dataset, range(len(blocks)), count, device)
