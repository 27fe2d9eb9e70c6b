"""Find exact ranks of the magnitudes of whole task vectors, without sorting or storing them.

Rules that trim keep the largest entries of a whole model, so they need the threshold before merging
the first tensor. On a CPU, one pass counts entries by their leading bits, and a second one selects
among those with the leading bits of the threshold.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from cmp.merging.rules import KEEP_ALL, MagnitudeBounds, NotFiniteError, compute_dtype

THRESHOLD_BLOCK = 1 << 16
"""Entries of a task vector per block, few enough to stay in the cache."""
BINS = 1 << 16
"""How many values the leading 16 bits of a number have."""


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
    for entries in entries_at_ranks(models, base, outline, [*ranks.values()]):
        own = {name: float(entry) for name, entry in zip(ranks, entries, strict=True)}
        bounds.append(KEEP_ALL._replace(**own))
    return bounds


def entries_at_ranks(
    models: Sequence[Mapping[str, Tensor]],
    base: Mapping[str, Tensor],
    outline: Mapping[str, Tensor],
    ranks: Sequence[int],
) -> list[list[np.floating]]:
    """Return the magnitudes at some ranks of each task vector.

    Every tensor, including the base's, is read at most twice.

    Args:
        models: The weights after training.
        base: The weights before training.
        outline: The tensors to include, on the models' device.
        ranks: The ranks, from 0 for the smallest.
    """
    if next(iter(outline.values())).device.type != "cpu":
        whole: list[list[Tensor]] = [[] for _ in models]
        for number, block in iter_magnitudes(models, base, outline):
            whole[number].append(block.clone())
        vectors = [torch.cat(each) for each in whole]
        return [[x.kthvalue(r + 1).values.cpu().view(1).numpy()[0] for r in ranks] for x in vectors]
    # on a CPU, numpy counts and selects several times as fast as torch
    counts = np.zeros((len(models), BINS), np.int64)
    for number, block in iter_magnitudes(models, base, outline):
        counts[number] += np.bincount(leading_bits(block), minlength=BINS)
    ends = counts.cumsum(1)
    bins = [np.searchsorted(own, ranks, "right") for own in ends]  # that contain the ranks
    within: list[list[list[np.ndarray]]] = [[[] for _ in ranks] for _ in models]
    for number, block in iter_magnitudes(models, base, outline):
        bits, entries = leading_bits(block), block.numpy()
        for found, chosen in zip(within[number], bins[number], strict=True):
            found.append(entries[bits == chosen])
    selected = []
    for found, chosen, before in zip(within, bins, ends - counts, strict=True):
        places = ranks - before[chosen]
        pairs = zip(map(np.concatenate, found), places, strict=True)
        selected.append([np.partition(entries, place)[place] for entries, place in pairs])
    return selected


def leading_bits(magnitudes: Tensor) -> np.ndarray:
    """Return the leading bits of magnitudes in fp32, which grow with them."""
    return (magnitudes.float().numpy().view(np.uint32) >> 16).astype(np.intp)


def iter_magnitudes(
    models: Sequence[Mapping[str, Tensor]],
    base: Mapping[str, Tensor],
    names: Iterable[str],
) -> Iterator[tuple[int, Tensor]]:
    """Yield (index of the model, magnitudes of its task vector) in blocks.

    They are computed in the type in which all models are merged, so that they equal those that are
    compared with the thresholds. Each block overwrites the previous one.
    """
    for name in names:
        tensors, start = [model[name] for model in models], base[name]
        dtype, size = compute_dtype([*tensors, start]), THRESHOLD_BLOCK
        start = start.reshape(-1)
        for number, tensor in enumerate(tensors):
            end = tensor.reshape(-1)
            out = torch.empty(min(size, end.numel()), dtype=dtype, device=end.device)
            for at in range(0, end.numel(), size):
                block = out[: min(size, end.numel() - at)]
                torch.sub(end[at : at + size].to(dtype), start[at : at + size].to(dtype), out=block)
                if not math.isfinite(block.abs_().sum().item()) and not block.isfinite().all():
                    raise NotFiniteError(name)
                yield number, block
