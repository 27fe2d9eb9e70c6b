"""Which entries of a task vector are large: exact ranks of their magnitudes, without sorting."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cmp.errors import CmpError

BLOCK = 1 << 16
"""Entries that are looked at together, so that what is made of them stays in the cache."""
SAMPLE = 1 << 20
"""About how many entries tell where a rank must be."""
Blocks = Callable[[], Iterator[np.ndarray]]


class NotFinite(CmpError):
    """A tensor of a model, by its name, holds what is no number."""

    def __init__(self, name: str):
        super().__init__(f"{name}: holds NaN or infinite values; mend that model first")
        self.name = name


class Bounds(NamedTuple):
    """Entries are kept whose magnitude is above `below` and at most `most`."""

    below: float
    most: float


EVERYTHING = Bounds(0.0, float("inf"))


def bounds(
    model: Mapping[str, Tensor],
    base: Mapping[str, Tensor],
    names: Sequence[str],
    density: float,
    outliers: float = 0.0,
) -> Bounds:
    """What to keep of a task vector as a whole, over all of `names`: of its entries by magnitude
    `outliers`, a share, is dropped at the top, then `density`, a share, is kept, at least one
    entry, and others that are as large as the smallest of them.

    `CmpError` where an entry is NaN or infinite.
    """
    names = [name for name in names if model[name].numel()]
    count = sum(model[name].numel() for name in names)
    top = round(outliers * count)
    bottom = count - top - max(1, round(density * count))
    if count == 0 or (bottom <= 0 and top == 0):
        return EVERYTHING

    def blocks() -> Iterator[np.ndarray]:
        for name in names:
            yield from magnitudes(name, model[name], base[name])

    sample = np.sort(np.concatenate([
        _sampled(name, model[name], base[name], max(1, count // SAMPLE)) for name in names
    ]))  # fmt: skip
    most = float(ranked(blocks, count - top - 1, count, sample)) if top else EVERYTHING.most
    if bottom <= 0:
        return Bounds(0.0, most)
    least = ranked(blocks, bottom, count, sample)
    return Bounds(float(np.nextafter(least, least.dtype.type(0))), most)


def magnitudes(name: str, one: Tensor, other: Tensor) -> Iterator[np.ndarray]:
    """|one - other| block by block, [up to BLOCK] each, fp32 at least; a block is overwritten by
    the next."""
    one, other = one.reshape(-1), other.reshape(-1)
    dtype = torch.promote_types(torch.promote_types(one.dtype, other.dtype), torch.float32)
    out = torch.empty(min(BLOCK, one.numel()), dtype=dtype)
    for at in range(0, one.numel(), BLOCK):
        block = out[: min(BLOCK, one.numel() - at)]
        torch.sub(one[at : at + BLOCK].to(dtype), other[at : at + BLOCK].to(dtype), out=block)
        if not math.isfinite(block.abs_().sum().item()) and not block.isfinite().all():
            raise NotFinite(name)
        yield block.numpy()


def _sampled(name: str, one: Tensor, other: Tensor, stride: int) -> np.ndarray:
    """Every so manieth magnitude, always the first."""
    a, b = (x.reshape(-1)[::stride].contiguous() for x in (one, other))
    return np.concatenate([block.copy() for block in magnitudes(name, a, b)] or [np.empty(0)])


def ranked(blocks: Blocks, rank: int, count: int, sample: np.ndarray) -> np.floating:
    """The entry that `rank` of all `count` entries come before in ascending order, exactly.

    blocks: goes through all entries. sample: some of them, sorted; they bracket the rank by eight
    standard errors, and what lies within the bracket is selected from. A bracket that missed is
    opened on that side.
    """
    place, share = rank / count * len(sample), rank / count
    margin = 4 * (len(sample) * share * (1 - share)) ** 0.5 + 2
    low, high = int(place - margin), int(place + margin) + 1
    low = sample[low] if low > 0 else -np.inf
    high = sample[high] if high < len(sample) else np.inf
    before, within = _split(blocks, low, high)
    if before <= rank < before + len(within):
        return np.partition(within, rank - before)[rank - before]
    edge = low if rank < before else high
    before, equal = _count(blocks, edge)
    if before <= rank < before + equal:
        return sample.dtype.type(edge)
    low, high = (-np.inf, low) if rank < before else (high, np.inf)
    before, within = _split(blocks, low, high)
    return np.partition(within, rank - before)[rank - before]


def _split(blocks: Blocks, low: float, high: float) -> tuple[int, np.ndarray]:
    """How many entries are at most `low`, and those between the two."""
    before, within = 0, []
    for block in blocks():
        above = block > low
        before += block.size - np.count_nonzero(above)
        within.append(block[np.flatnonzero(above & (block < high))])
    return before, np.concatenate(within)


def _count(blocks: Blocks, edge: float) -> tuple[int, int]:
    """How many entries are less than `edge`, and how many are equal to it."""
    before = equal = 0
    for block in blocks():
        before += np.count_nonzero(block < edge)
        equal += np.count_nonzero(block == edge)
    return before, equal
