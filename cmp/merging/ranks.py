"""Find exact ranks of the magnitudes of whole task vectors, without sorting or storing them.

Rules that trim keep the largest entries of a whole model, so they need the threshold before merging
the first tensor. On a CPU, a sample gives a range that very likely contains the threshold, and one
pass over all entries then selects it among those within the range.
"""

import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from cmp.merging.rules import KEEP_ALL, MagnitudeBounds, NotFiniteError, compute_dtype

THRESHOLD_BLOCK = 1 << 16
"""Entries of a task vector per block, few enough to stay in the cache."""
SAMPLE = 1 << 17
"""Approximate number of entries in a sample."""
EVERYTHING = (-np.inf, np.inf)
"""The range of all entries."""


def magnitude_thresholds(
    models: Sequence[Mapping[str, Tensor]],
    base: Mapping[str, Tensor],
    outline: Mapping[str, Tensor],
    density: float,
    outliers: float,
) -> list[MagnitudeBounds]:
    """Return bounds on the entries of each task vector to keep, by exact rank of magnitude.

    Args:
        models: The weights after training.
        base: The weights before training.
        outline: The tensors to include, on the models' device; their values are not read.
        density: The fraction of all entries to keep: at least one entry, and all that tie with the
            smallest one kept.
        outliers: The fraction of the largest entries to drop first. Where this would drop all that
            changed, both fractions are of the tensors that a model changed.

    Raises:
        NotFiniteError: An entry is NaN or infinite.
    """
    outline = {name: x for name, x in outline.items() if x.numel()}
    count = sum(x.numel() for x in outline.values())
    top = round(outliers * count)
    if top:  # all that a method like BitFit learns may be less than this
        changed = {
            name: x
            for name, x in outline.items()
            if any(bool((model[name] != base[name]).any()) for model in models)
        }
        if (left := sum(x.numel() for x in changed.values())) <= top:
            outline, count, top = changed, left, round(outliers * left)
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

    Every tensor, including the base's, is read twice, and a third time if a sample misleads.

    Args:
        models: The weights after training.
        base: The weights before training.
        outline: The tensors to include, on the models' device.
        ranks: The ranks, from 0 for the smallest.
        count: The number of entries of a task vector.
    """
    if next(iter(outline.values())).device.type != "cpu":
        return select_on_gpu(models, base, outline, ranks, count)
    # on a CPU, numpy counts and selects several times as fast as torch
    parts: list[list[np.ndarray]] = [[] for _ in models]
    for number, block in iter_magnitudes(models, base, outline, max(1, count // SAMPLE)):
        parts[number].append(block.numpy().copy())
    samples = [np.sort(np.concatenate(each)) for each in parts]
    likely = [[sampled_range(sample, rank / count) for rank in ranks] for sample in samples]
    selected = select_within(iter_magnitudes(models, base, outline), ranks, likely)
    if selected is None:
        everything = [[EVERYTHING] * len(ranks)] * len(models)
        selected = select_within(iter_magnitudes(models, base, outline), ranks, everything)
    assert selected is not None
    return selected


def select_on_gpu(
    models: Sequence[Mapping[str, Tensor]],
    base: Mapping[str, Tensor],
    names: Iterable[str],
    ranks: Sequence[int],
    count: int,
) -> list[list[np.floating]]:
    """Return the result of `entries_at_ranks` by torch, with one whole task vector in memory at a
    time."""
    dtypes = {name: compute_dtype(weights[name] for weights in (*models, base)) for name in names}
    widest = functools.reduce(torch.promote_types, dtypes.values())
    vector, selected = base[next(iter(dtypes))].new_empty(count, dtype=widest), []
    for model in models:
        at = 0
        for name, dtype in dtypes.items():
            for block in tensor_magnitudes(name, model[name], base[name], dtype):
                vector[at : at + len(block)] = block
                at += len(block)
        selected.append([vector.kthvalue(r + 1).values.cpu().view(1).numpy()[0] for r in ranks])
    return selected


def sampled_range(sample: np.ndarray, share: float) -> tuple[float, float]:
    """Return a range that very likely contains a vector's entry at a share of its ranks: four
    standard errors around that of a sorted sample."""
    place = share * len(sample)
    margin = 4 * (len(sample) * share * (1 - share)) ** 0.5 + 2
    first, last = int(place - margin), int(place + margin) + 1
    low = sample[first] if first > 0 else -np.inf
    return low, sample[last] if last < len(sample) else np.inf


def select_within(
    blocks: Iterable[tuple[int, Tensor]],
    ranks: Sequence[int],
    ranges: Sequence[Sequence[tuple[float, float]]],
) -> list[list[np.floating]] | None:
    """Return the entries of each vector at some ranks, or None if one is outside its range.

    Args:
        blocks: (index of the vector, entries) pairs with all entries.
        ranks: The ranks, from 0 for the smallest.
        ranges: For each vector and rank, the range in which to look.
    """
    below = [[0] * len(ranks) for _ in ranges]
    within: list[list[list[np.ndarray]]] = [[[] for _ in ranks] for _ in ranges]
    for number, block in blocks:
        entries = block.numpy()
        for place, (low, high) in enumerate(ranges[number]):
            is_above = entries >= low
            below[number][place] += int((~is_above).sum())
            within[number][place].append(entries[np.flatnonzero(is_above & (entries <= high))])
    selected = []
    for counts, parts in zip(below, within, strict=True):
        places = [rank - count for rank, count in zip(ranks, counts, strict=True)]
        pairs = [*zip(places, map(np.concatenate, parts), strict=True)]
        if not all(0 <= place < len(entries) for place, entries in pairs):
            return None
        selected.append([np.partition(entries, place)[place] for place, entries in pairs])
    return selected


def iter_magnitudes(
    models: Sequence[Mapping[str, Tensor]],
    base: Mapping[str, Tensor],
    names: Iterable[str],
    stride: int = 1,
) -> Iterator[tuple[int, Tensor]]:
    """Yield (index of the model, magnitudes of its task vector) in blocks.

    They are computed in the type in which all models are merged, so that they equal those that are
    compared with the thresholds. Each block overwrites the previous one. `stride` is the step
    between the entries of a tensor that are taken.
    """
    for name in names:
        tensors, start = [model[name] for model in models], base[name]
        dtype = compute_dtype([*tensors, start])
        for number, tensor in enumerate(tensors):
            for block in tensor_magnitudes(name, tensor, start, dtype, stride):
                yield number, block


def tensor_magnitudes(
    name: str, end: Tensor, start: Tensor, dtype: torch.dtype, stride: int = 1
) -> Iterator[Tensor]:
    """Yield the magnitudes of `end - start` in blocks, as in `iter_magnitudes`."""
    end, start = (x.reshape(-1)[::stride].contiguous() for x in (end, start))
    out = torch.empty(min(THRESHOLD_BLOCK, end.numel()), dtype=dtype, device=end.device)
    for x, y in zip(end.split(THRESHOLD_BLOCK), start.split(THRESHOLD_BLOCK), strict=True):
        block = torch.sub(x.to(dtype), y.to(dtype), out=out[: len(x)])
        if not math.isfinite(block.abs_().sum().item()) and not block.isfinite().all():
            raise NotFiniteError(name)
        yield block
