"""Find exact ranks of the magnitudes of whole task vectors, without sorting or storing them.

Rules that trim keep the largest entries of a whole model, so they need the threshold before merging
the first tensor. On a CPU, a sample brackets each threshold, and one pass over all entries then
selects it exactly.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from cmp.merging.rules import KEEP_ALL, MagnitudeBounds, NotFiniteError, compute_dtype

THRESHOLD_BLOCK = 1 << 16
"""Entries of a task vector per block, few enough to stay in the cache."""
THRESHOLD_SAMPLE = 1 << 20
"""Approximate number of entries in a sample."""
BlockIterator = Callable[[], Iterable[tuple[int, np.ndarray]]]


def magnitude_thresholds(
    models: Sequence[Mapping[str, Tensor]],
    base: Mapping[str, Tensor],
    outline: Mapping[str, Tensor],
    density: float,
    outliers: float = 0.0,
) -> list[MagnitudeBounds]:
    """Return bounds on the entries of each task vector to keep, by exact rank of magnitude.

    Args:
        models: The weights after training.
        base: The weights before training.
        outline: The tensors to include, on the models' device; their values are not read.
        density: The fraction of all entries to keep: at least one entry, and all that tie with the
            smallest one kept.
        outliers: The fraction of the largest entries to drop first.

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
        own = {name: float(entry) for name, entry in zip(ranks, entries, strict=True)}
        bounds.append(KEEP_ALL._replace(**own))
    return bounds


def entries_at_ranks(
    models: Sequence[Mapping[str, Tensor]],
    base: Mapping[str, Tensor],
    outline: Mapping[str, Tensor],
    ranks: Sequence[int],
    count: int,
) -> list[list[np.floating]]:
    """Return the magnitudes at some ranks of each task vector.

    Every tensor, including the base's, is read at most twice.

    Args:
        models: The weights after training.
        base: The weights before training.
        outline: The tensors to include, on the models' device.
        ranks: The ranks, from 0 for the smallest.
        count: The number of entries of a task vector.
    """
    if next(iter(outline.values())).device.type != "cpu":
        whole: list[list[Tensor]] = [[] for _ in models]
        for number, block in iter_magnitudes(models, base, outline):
            whole[number].append(block.clone())
        vectors = [torch.cat(each) for each in whole]
        return [[x.kthvalue(r + 1).values.cpu().view(1).numpy()[0] for r in ranks] for x in vectors]
    # on a CPU, numpy compares, counts and sorts several times as fast as torch
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
    """Yield (index of the model, magnitudes of its task vector) in blocks.

    They are computed in the type in which all models are merged, so that they equal those that are
    compared with the thresholds. Each block overwrites the previous one. `stride` is the step
    between entries taken from a tensor.
    """
    for name in names:
        tensors, start = [model[name] for model in models], base[name]
        dtype, size = compute_dtype([*tensors, start]), THRESHOLD_BLOCK
        start = start.reshape(-1)[::stride].contiguous()
        for number, tensor in enumerate(tensors):
            end = tensor.reshape(-1)[::stride].contiguous()
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
    """Return the exact entries of each vector at some ranks in ascending order.

    Args:
        blocks: Iterates over all entries of all vectors, as (index of the vector, entries).
        ranks: The ranks, from 0.
        count: The number of entries of each vector.
        samples: A sorted sample of each vector's entries, which brackets a rank by eight standard
            errors. The entry is selected from those within the bracket, or from all entries if the
            bracket misses it.
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
    """Return bounds that very likely contain a vector's entry at a share of its ranks, estimated
    from a sorted sample."""
    place = share * len(sample)
    margin = 4 * (len(sample) * share * (1 - share)) ** 0.5 + 2
    first, last = int(place - margin), int(place + margin) + 1
    low = sample[first] if first > 0 else -np.inf
    return low, sample[last] if last < len(sample) else np.inf


@dataclass
class Bracket:
    """A search for the entry at one rank among those between two bounds.

    Attributes:
        rank: The rank, from 0.
        low: The lower bound of the entry, unless the bracket misses it.
        high: The upper bound of the entry.
        before: The number of entries so far that are below the bracket.
        within: The entries so far that are within the bracket.
    """

    rank: int
    low: float
    high: float
    before: int = 0
    within: list[np.ndarray] = field(default_factory=list)

    def add(self, block: np.ndarray) -> None:
        """Add further entries to the search."""
        above = block >= self.low
        self.before += int(block.size - np.count_nonzero(above))
        self.within.append(block[np.flatnonzero(above & (block <= self.high))])

    def has_missed(self) -> bool:
        """Return whether the entry is outside the bracket, once all entries were added."""
        return not self.before <= self.rank < self.before + sum(map(len, self.within))

    def reset(self) -> "Bracket":
        """Widen the bracket to all entries, and forget those added so far."""
        self.low, self.high, self.before, self.within = -np.inf, np.inf, 0, []
        return self

    def entry(self) -> np.floating:
        """Return the entry at the rank."""
        place = self.rank - self.before
        return np.partition(np.concatenate(self.within), place)[place]
