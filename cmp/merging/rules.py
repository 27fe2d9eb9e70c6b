"""How weights are combined (spec 4): a rule says it of one tensor, or of a block of its entries.

theta_0 is the base, the weights before the stream, tau_i = theta_i - theta_0 a task vector. Models
and their weights stand newest first, everywhere. `cmp.merging.combining` applies a rule to whole
state dicts.
"""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from cmp.config import SUM_RULES, TASK_VECTOR_RULES, Merging
from cmp.seeds import torch_generator

Weights = dict[str, Tensor]
_PARALLEL_TOLERANCE = 1e-6
"""How near to 1 the magnitude of a cosine is where an arc is no more than a line."""


@dataclass(frozen=True)
class MergeOptions:
    """Settings of a rule; each rule's docstring says which it takes, `config.Merging` what they
    are. weights: one a model, newest first, sum 1; equal ones where left out. draw: seed and
    counters of the rules that draw by chance."""

    weights: tuple[float, ...] | None = None
    scale: float | None = None
    density: float = 0.3
    outliers: float = 0.01
    alpha: float = 0.5
    beta: float = 0.5
    draw: tuple[int | str, ...] = (0,)

    def shares(self, count: int) -> list[float]:
        """The weights of so many models."""
        return list(self.weights or [1 / count] * count)

    def added(self, count: int) -> float:
        """The scale of a sum of task vectors; by default it makes their mean of it, so that merging
        again and again does not let them grow."""
        return self.scale or 1 / count


def interpolation(
    models: list[Tensor], base: Tensor | None, how: MergeOptions, depth: float
) -> list[float]:
    """sum w_i theta_i. Takes weights; needs no base."""
    return [*how.shares(len(models)), 0.0]


def slerp(
    models: list[Tensor], base: Tensor | None, how: MergeOptions, depth: float
) -> list[float]:
    """Along the arc between the raw tensors of two models, by w times their angle; a straight line
    where they point the same way, as an arc and a line are then one in fp32, or opposite ways,
    between which there is no arc. Takes weights; needs no base."""
    newer, older = how.shares(2)
    cosine = cosine_similarity(inner_products(models), 0, 1)
    if abs(cosine) > 1 - _PARALLEL_TOLERANCE:
        return [newer, older, 0.0]
    angle = math.acos(cosine)
    return [math.sin(w * angle) / math.sin(angle) for w in (newer, older)] + [0.0]


def task_arithmetic(
    models: list[Tensor], base: Tensor, how: MergeOptions, depth: float
) -> list[float]:
    """theta_0 + s sum tau_i. Takes a scale s, 1 / the number of models by default."""
    scale = how.added(len(models))
    return [scale] * len(models) + [1 - scale * len(models)]


def lines(models: list[Tensor], base: Tensor, how: MergeOptions, depth: float) -> list[float]:
    """LiNeS: task arithmetic whose task vectors are scaled by alpha + beta l / (L - 1) in block l
    of L, by alpha outside of blocks. Takes a scale as task arithmetic does, alpha, and beta."""
    scale = how.added(len(models)) * (how.alpha + how.beta * depth)
    return [scale] * len(models) + [1 - scale * len(models)]


def model_stock(models: list[Tensor], base: Tensor, how: MergeOptions, depth: float) -> list[float]:
    """t mean(theta_i) + (1 - t) theta_0 with t = k cos / ((k - 1) cos + 1), cos the mean cosine
    between two of the k task vectors of a tensor (spec 12.3).

    Models that equal the base there are no samples of fine-tuning and are left out: so the first
    merge with theta_0 itself keeps what was learned, where cos = 0 would undo it. A negative cos
    counts as 0; t never leaves [0, 1].
    """
    product = inner_products(models, base)
    moved = [index for index in range(len(models)) if product[index, index] > 0]
    pairs = [(i, j) for i in moved for j in moved if i < j]
    share = min(1.0, float(len(moved)))
    if pairs:
        mean = max(0.0, sum(cosine_similarity(product, i, j) for i, j in pairs) / len(pairs))
        share = len(moved) * mean / ((len(moved) - 1) * mean + 1)
    each = [share / len(moved) if index in moved else 0.0 for index in range(len(models))]
    return [*each, 1 - share]


LINEAR_RULES: dict[
    str, Callable[[list[Tensor], Tensor | None, MergeOptions, float], list[float]]
] = {
    "interpolation": interpolation,
    "slerp": slerp,
    "task-arithmetic": task_arithmetic,
    "lines": lines,
    "model-stock": model_stock,
}
"""Rules that are a weighted sum of one tensor's versions: (models, base, settings, depth of its
block from 0 to 1) -> one factor a model and the base's at last."""

PRODUCT_BLOCK = 1 << 19


def inner_products(models: Sequence[Tensor], base: Tensor | None = None) -> np.ndarray:
    """Scalar products of models, or of their task vectors, float64 [models, models]."""
    flat, dtype = [x.reshape(-1) for x in models], compute_dtype(models)
    total = np.zeros((len(flat), len(flat)))
    pairs = [(i, j) for i in range(len(flat)) for j in range(i + 1)]
    for at in range(0, len(flat[0]), PRODUCT_BLOCK):
        blocks = [x[at : at + PRODUCT_BLOCK].to(dtype) for x in flat]
        if base is None:
            blocks = [align_memory(x) for x in blocks]
        else:
            origin = base.reshape(-1)[at : at + PRODUCT_BLOCK].to(dtype)
            blocks = [x - origin for x in blocks]
        for i, j in pairs:
            total[i, j] += torch.dot(blocks[i], blocks[j]).item()
    return np.tril(total) + np.tril(total, -1).T


def align_memory(x: Tensor) -> Tensor:
    """The same on a 64-byte boundary, as torch allocates it, but a file may not: the last bits of a
    scalar product depend on that."""
    return x if x.data_ptr() % 64 == 0 else x.clone()


def compute_dtype(tensors: Iterable[Tensor]) -> torch.dtype:
    """The type to compute in: fp32, or fp64 where a tensor is."""
    return functools.reduce(torch.promote_types, {x.dtype for x in tensors}, torch.float32)


def cosine_similarity(product: np.ndarray, one: int, other: int) -> float:
    """Of the angle between two models, from `products`; 1 where one of them is zero."""
    norms = math.sqrt(product[one, one]) * math.sqrt(product[other, other])
    return min(1.0, max(-1.0, float(product[one, other]) / norms)) if norms else 1.0


def drop_randomly(taus: Tensor, density: float, draw: Sequence[str | int]) -> Tensor:
    """Each entry kept with probability `density` and divided by it, or else dropped.

    draw: seed and counters, see `cmp.seeds`; the same entries go for the same draw.
    """
    for index, tau in enumerate(taus):
        noise = torch_generator("dare", *draw, index)
        tau.mul_(torch.rand(tau.shape, generator=noise) < density).div_(density)
    return taus


def elect_signs(taus: Tensor) -> Tensor:
    """The sign of the sum is elected for each entry, and the mean taken of those that agree."""
    sign = taus.sum(0).sign_()
    agree = torch.mul(taus, sign).gt_(0)  # 1 or 0; a product with a sign never underflows
    count = agree.sum(0).clamp_(min=1)
    return taus.mul_(agree).sum(0).div_(count)


def keep_largest(taus: Tensor) -> Tensor:
    """Of each entry the one of largest magnitude; of equals the newest."""
    best = taus[0]
    for tau in taus[1:]:
        best = torch.where(tau.abs() > best.abs(), tau, best)
    return best


def pick_randomly(taus: Tensor, draw: Sequence[str | int]) -> Tensor:
    """Each entry of one of the models, by chance."""
    noise = torch_generator("pick", *draw)
    row = torch.randint(len(taus), (1, taus.shape[1]), generator=noise)
    return taus.gather(0, row)[0]


def equal_weights(count: int, merging: Merging) -> list[float]:
    """All the same: their mean."""
    return [1.0] * count


def newest_weights(count: int, merging: Merging) -> list[float]:
    """`weight` for the newest, and what is left in equal shares for the others."""
    rest = (1 - merging.weight) / max(count - 1, 1)
    return [merging.weight, *[rest] * (count - 1)] if count > 1 else [1.0]


def power_weights(count: int, merging: Merging) -> list[float]:
    """i to the `power`, i from 1 for the oldest."""
    return [float(number) ** merging.power for number in range(count, 0, -1)]


def exponential_weights(count: int, merging: Merging) -> list[float]:
    """Each twice as much as the one before it."""
    return [0.5**age for age in range(count)]


def log_weights(count: int, merging: Merging) -> list[float]:
    """log(i + 1), i from 1 for the oldest."""
    return [math.log(number + 1) for number in range(count, 0, -1)]


WEIGHTINGS: dict[str, Callable[[int, Merging], list[float]]] = {
    "equal": equal_weights,
    "newest": newest_weights,
    "power": power_weights,
    "exponential": exponential_weights,
    "log": log_weights,
}
"""By `merging.shares`."""


def merge_weights(merging: Merging, count: int) -> list[float]:
    """The shares of so many models, newest first, sum 1; with `reverse` the oldest has the
    newest's."""
    shares = WEIGHTINGS[merging.shares](count, merging)
    shares = shares[::-1] if merging.reverse else shares
    return [share / sum(shares) for share in shares]


def has_running_mean(merging: Merging) -> bool:
    """Whether the shares of older models only shrink in proportion as one is added, so that a
    running mean is all that has to be kept."""
    return merging.shares != "newest" and not merging.reverse


class MagnitudeBounds(NamedTuple):
    """Entries are kept whose magnitude is above `below` and at most `most`."""

    below: float
    most: float


class BlockContext(NamedTuple):
    """Where a rule is: its settings, what to keep of each task vector, the tensor and the number of
    the block in it, which chance counts by."""

    how: MergeOptions
    bounds: Sequence[MagnitudeBounds]
    name: str
    number: int

    def draw(self) -> tuple[int | str, ...]:
        """Seed and counters of this block."""
        return (*self.how.draw, self.name, self.number)


def magmax(taus: Tensor, block: BlockContext) -> Tensor:
    """Of each entry the task vector of largest magnitude. Takes a scale, by default 1."""
    return keep_largest(taus).mul(block.how.scale or 1)


def random(taus: Tensor, block: BlockContext) -> Tensor:
    """Of each entry the task vector of a model by chance: what a rule has to beat. Takes a scale,
    by default 1."""
    return pick_randomly(taus, block.draw()).mul_(block.how.scale or 1)


def ties(taus: Tensor, block: BlockContext) -> Tensor:
    """Of each task vector the largest entries of the whole model are kept; signs are elected, and
    the mean taken of those that agree. Takes density, and a scale, by default 1."""
    return elect_signs(trim(taus, block.bounds)).mul_(block.how.scale or 1)


def dare(taus: Tensor, block: BlockContext) -> Tensor:
    """Entries are dropped by chance, the others rescaled, and added up. Takes density, and a scale
    as task arithmetic does."""
    kept = drop_randomly(taus, block.how.density, block.draw())
    return kept.sum(0).mul_(block.how.added(len(taus)))


def dare_ties(taus: Tensor, block: BlockContext) -> Tensor:
    """Entries are dropped by chance, the others rescaled; then signs are elected as in TIES. Takes
    density, and a scale, by default 1."""
    kept = drop_randomly(taus, block.how.density, block.draw())
    return elect_signs(kept).mul_(block.how.scale or 1)


def breadcrumbs(taus: Tensor, block: BlockContext) -> Tensor:
    """The largest entries are dropped, and the small ones; what is between is added up. Takes
    density and outliers, and a scale as task arithmetic does."""
    return trim(taus, block.bounds).sum(0).mul_(block.how.added(len(taus)))


def breadcrumbs_ties(taus: Tensor, block: BlockContext) -> Tensor:
    """The largest entries are dropped, and the small ones; then signs are elected as in TIES. Takes
    density and outliers, and a scale, by default 1."""
    return ties(taus, block)


SELECTING_RULES: dict[str, Callable[[Tensor, BlockContext], Tensor]] = {
    "magmax": magmax,
    "random": random,
    "ties": ties,
    "dare": dare,
    "dare-ties": dare_ties,
    "breadcrumbs": breadcrumbs,
    "breadcrumbs-ties": breadcrumbs_ties,
}
"""Rules that treat entries differently: (task vectors [models, entries], which are theirs to
change, place) -> the merged task vector [entries]."""

RULES = LINEAR_RULES | SELECTING_RULES
"""By `merging.rule`."""

assert set(TASK_VECTOR_RULES) < set(RULES) and set(SUM_RULES) < set(LINEAR_RULES)


def trim(taus: Tensor, bounds: Sequence[MagnitudeBounds]) -> Tensor:
    """Task vectors without the entries that their bounds exclude."""
    for tau, (below, most) in zip(taus, bounds, strict=True):
        tau.copy_(F.hardshrink(tau, below))
        if most < math.inf:
            tau.masked_fill_(tau.abs() > most, 0)
    return taus
