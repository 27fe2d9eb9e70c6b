"""Exact ranks of the magnitudes of whole task vectors, without sorting or holding them.

Rules that trim keep the largest entries of a whole model, so before the first tensor is merged they
must know how large an entry has to be. On a CPU a sample brackets each threshold, and one pass over
all entries then selects it exactly.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from cmp.merging.rules import KEEP_ALL, MagnitudeBounds, NotFiniteError, compute_dtype

THRESHOLD_BLOCK = 1 << 16
"""Entries of a task vector that are looked at together, so that they stay in the cache."""
THRESHOLD_SAMPLE = 1 << 20
"""About how many entries a sample has."""
BlockIterator = Callable[[], Iterable[tuple[int, np.ndarray]]]


def magnitude_thresholds(
    models: Sequence[Mapping[str, Tensor]],
    base: Mapping[str, Tensor],
    outline: Mapping[str, Tensor],
    density: float,
    outliers: float = 0.0,
) -> list[MagnitudeBounds]:
    """Return which entries of each task vector to keep, by the exact rank of their magnitudes.

    Args:
        models: The weights after training.
        base: The weights before.
        outline: The tensors that count, on the device of the models; their values are not read.
        density: The part of all entries that is kept, at least one entry and those that are as
            large as the smallest of them.
        outliers: The part that is dropped at the top before.

    Raises:
        NotFiniteError: An entry is NaN or infinite.
    """
    outline = {name: x for name, x in outline.items() if x.numel()}
    count = sum(x.numel() for x in outline.values())
    top = round(outliers * count)
    bottom = count - top - max(1, round(density * count))
    if count == 0 or (bottom <= 0 and top == 0):
        return [KEEP_ALL] * len(models)
    ranks = {"least": bottom} if bottom > 0 else {}
    ranks |= {"most": count - top - 1} if top else {}
    bounds = []
    for entries in entries_at_ranks(models, base, outline, [*ranks.values()], count):
        found = dict(zip(ranks, entries, strict=True))
        least, most = found.get("least"), found.get("most")
        below = 0.0 if least is None else float(np.nextafter(least, least.dtype.type(0)))
        bounds.append(MagnitudeBounds(below, KEEP_ALL.most if most is None else float(most)))
    return bounds


def entries_at_ranks(
    models: Sequence[Mapping[str, Tensor]],
    base: Mapping[str, Tensor],
    outline: Mapping[str, Tensor],
    ranks: Sequence[int],
    count: int,
) -> list[list[np.floating]]:
    """Return the entries of some ranks of each task vector's magnitudes.

    Every tensor is read twice at most, the base's too.

    Args:
        models: The weights after training.
        base: The weights before.
        outline: The tensors that count, on the device of the models.
        ranks: The ranks, from 0 for the smallest.
        count: How many entries a task vector has.
    """
    if next(iter(outline.values())).device.type != "cpu":
        whole: list[list[Tensor]] = [[] for _ in models]
        for number, block in iter_magnitudes(models, base, outline):
            whole[number].append(block.clone())
        vectors = [torch.cat(each) for each in whole]
        return [[x.kthvalue(r + 1).values.cpu().view(1).numpy()[0] for r in ranks] for x in vectors]
    # on a CPU numpy compares, counts and sorts several times as fast as torch
    stride = max(1, count // THRESHOLD_SAMPLE)
    parts: list[list[np.ndarray]] = [[] for _ in models]
    for number, block in iter_magnitudes(models, base, outline, stride):
        parts[number].append(block.numpy().copy())
    samples = [np.sort(np.concatenate(each)) for each in parts]
    if stride == 1:
        return [[sample[rank] for rank in ranks] for sample in samples]
    return select_ranks(
        lambda: ((n, x.numpy()) for n, x in iter_magnitudes(models, base, outline)),
        ranks,
        count,
        samples,
    )


def iter_magnitudes(
    models: Sequence[Mapping[str, Tensor]],
    base: Mapping[str, Tensor],
    names: Iterable[str],
    stride: int = 1,
) -> Iterator[tuple[int, Tensor]]:
    """Yield (number of the model, magnitudes of its task vector) in blocks, in fp32 at least.

    A block is overwritten by the next. `stride` takes every so many entries of each tensor only.
    """
    for name in names:
        start = base[name].reshape(-1)[::stride].contiguous()
        for number, model in enumerate(models):
            end = model[name].reshape(-1)[::stride].contiguous()
            dtype, size = compute_dtype([end, start]), THRESHOLD_BLOCK
            out = torch.empty(min(size, end.numel()), dtype=dtype, device=end.device)
            for at in range(0, end.numel(), size):
                block = out[: min(size, end.numel() - at)]
                torch.sub(end[at : at + size].to(dtype), start[at : at + size].to(dtype), out=block)
                if not math.isfinite(block.abs_().sum().item()) and not block.isfinite().all():
                    raise NotFiniteError(name)
                yield number, block


def select_ranks(
    blocks: BlockIterator, ranks: Sequence[int], count: int, samples: Sequence[np.ndarray]
) -> list[list[np.floating]]:
    """Return, of each vector, the entries at some ranks in ascending order, exactly.

    Args:
        blocks: Goes through all entries of all vectors, as (number of the vector, entries).
        ranks: The ranks, from 0.
        count: How many entries each vector has.
        samples: Some of each vector's entries, sorted. They bracket a rank by eight standard
            errors. The entry is selected from what lies within the bracket, or from everything
            where the bracket missed it.
    """
    brackets = [[Bracket(rank, *sampled_range(x, rank / count)) for rank in ranks] for x in samples]
    for number, block in blocks():
        for bracket in brackets[number]:
            bracket.add(block)
    missed = [[bracket.reset() for bracket in each if bracket.has_missed()] for each in brackets]
    if any(missed):
        for number, block in blocks():
            for bracket in missed[number]:
                bracket.add(block)
    return [[bracket.entry() for bracket in each] for each in brackets]


def sampled_range(sample: np.ndarray, share: float) -> tuple[float, float]:
    """Return two numbers between which a vector very likely has the entry at a share of its ranks,
    judged by a sorted sample of it."""
    place = share * len(sample)
    margin = 4 * (len(sample) * share * (1 - share)) ** 0.5 + 2
    first, last = int(place - margin), int(place + margin) + 1
    low = sample[first] if first > 0 else -np.inf
    return low, sample[last] if last < len(sample) else np.inf


@dataclass
class Bracket:
    """The search for the entry of one rank among those that lie between two numbers.

    Attributes:
        rank: The rank, from 0.
        low: The entry is at least this, if the bracket does not miss it.
        high: It is at most this.
        before: How many of the entries seen so far are lower than the bracket.
        within: The entries seen so far that lie in the bracket.
    """

    rank: int
    low: float
    high: float
    before: int = 0
    within: list[np.ndarray] = field(default_factory=list)

    def add(self, block: np.ndarray) -> None:
        """Look at further entries."""
        above = block >= self.low
        self.before += int(block.size - np.count_nonzero(above))
        self.within.append(block[np.flatnonzero(above & (block <= self.high))])

    def has_missed(self) -> bool:
        """Return whether the entry lies outside, once all entries have been looked at."""
        return not self.before <= self.rank < self.before + sum(map(len, self.within))

    def reset(self) -> "Bracket":
        """Widen the bracket to all entries, and forget those seen so far."""
        self.low, self.high, self.before, self.within = -np.inf, np.inf, 0, []
        return self

    def entry(self) -> np.floating:
        """Return the entry of the rank."""
        place = self.rank - self.before
        return np.partition(np.concatenate(self.within), place)[place]
