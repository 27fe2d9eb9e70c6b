"""What rules are made of: products of models, and task vectors that are trimmed and joined.

A task vector tau is what training added to the weights that it began with. Those of several models
are the rows of `taus`, [models, entries], newest first; functions may change them in place.
"""

import functools
import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from cmp.merging.cuts import Bounds
from cmp.seeds import torch_generator

BLOCK = 1 << 19


def products(models: Sequence[Tensor], base: Tensor | None = None) -> np.ndarray:
    """Scalar products of models, or of their task vectors, float64 [models, models]."""
    flat, dtype = [x.reshape(-1) for x in models], computed(models)
    total = np.zeros((len(flat), len(flat)))
    pairs = [(i, j) for i in range(len(flat)) for j in range(i + 1)]
    for at in range(0, len(flat[0]), BLOCK):
        blocks = [x[at : at + BLOCK].to(dtype) for x in flat]
        if base is None:
            blocks = [aligned(x) for x in blocks]
        else:
            origin = base.reshape(-1)[at : at + BLOCK].to(dtype)
            blocks = [x - origin for x in blocks]
        for i, j in pairs:
            total[i, j] += torch.dot(blocks[i], blocks[j]).item()
    return np.tril(total) + np.tril(total, -1).T


def aligned(x: Tensor) -> Tensor:
    """The same on a 64-byte boundary, as torch allocates it, but a file may not: the last bits of a
    scalar product depend on that."""
    return x if x.data_ptr() % 64 == 0 else x.clone()


def computed(tensors: Iterable[Tensor]) -> torch.dtype:
    """The type to compute in: fp32, or fp64 where a tensor is."""
    return functools.reduce(torch.promote_types, {x.dtype for x in tensors}, torch.float32)


def cosine(product: np.ndarray, one: int, other: int) -> float:
    """Of the angle between two models, from `products`; 1 where one of them is zero."""
    norms = math.sqrt(product[one, one]) * math.sqrt(product[other, other])
    return min(1.0, max(-1.0, float(product[one, other]) / norms)) if norms else 1.0


def trimmed(taus: Tensor, bounds: Sequence[Bounds]) -> Tensor:
    """Task vectors without the entries that their bounds exclude."""
    for tau, (below, most) in zip(taus, bounds, strict=True):
        tau.copy_(F.hardshrink(tau, below))
        if most < math.inf:
            tau.masked_fill_(tau.abs() > most, 0)
    return taus


def dropped(taus: Tensor, density: float, draw: Sequence[str | int]) -> Tensor:
    """Each entry kept with probability `density` and divided by it, or else dropped.

    draw: seed and counters, see `cmp.seeds`; the same entries go for the same draw.
    """
    for index, tau in enumerate(taus):
        noise = torch_generator("dare", *draw, index)
        tau.mul_(torch.rand(tau.shape, generator=noise) < density).div_(density)
    return taus


def elected(taus: Tensor) -> Tensor:
    """The sign of the sum is elected for each entry, and the mean taken of those that agree."""
    sign = taus.sum(0).sign_()
    agree = torch.mul(taus, sign).gt_(0)  # 1 or 0; a product with a sign never underflows
    count = agree.sum(0).clamp_(min=1)
    return taus.mul_(agree).sum(0).div_(count)


def largest(taus: Tensor) -> Tensor:
    """Of each entry the one of largest magnitude; of equals the newest."""
    best = taus[0]
    for tau in taus[1:]:
        best = torch.where(tau.abs() > best.abs(), tau, best)
    return best


def picked(taus: Tensor, draw: Sequence[str | int]) -> Tensor:
    """Each entry of one of the models, by chance."""
    noise = torch_generator("pick", *draw)
    row = torch.randint(len(taus), (1, taus.shape[1]), generator=noise)
    return taus.gather(0, row)[0]
