"""How weights are combined (spec 4): a rule says it of one tensor, or of a block of its entries.

theta_0 is the base, the weights before the stream, tau_i = theta_i - theta_0 a task vector. Models
and their weights stand newest first, everywhere. `cmp.merging.combining` applies a rule to whole
state dicts.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from cmp.config.merging import SUMS, VECTORS
from cmp.merging import parts
from cmp.merging.cuts import Bounds

Weights = dict[str, Tensor]
STRAIGHT = 1e-6
"""How near to 1 the magnitude of a cosine is where an arc is no more than a line."""


@dataclass(frozen=True)
class How:
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


class Block(NamedTuple):
    """Where a rule is: its settings, what to keep of each task vector, the tensor and the number of
    the block in it, which chance counts by."""

    how: How
    bounds: Sequence[Bounds]
    name: str
    number: int

    def draw(self) -> tuple[int | str, ...]:
        """Seed and counters of this block."""
        return (*self.how.draw, self.name, self.number)


def interpolation(models: list[Tensor], base: Tensor | None, how: How, depth: float) -> list[float]:
    """sum w_i theta_i. Takes weights; needs no base."""
    return [*how.shares(len(models)), 0.0]


def slerp(models: list[Tensor], base: Tensor | None, how: How, depth: float) -> list[float]:
    """Along the arc between the raw tensors of two models, by w times their angle; a straight line
    where they point the same way, as an arc and a line are then one in fp32, or opposite ways,
    between which there is no arc. Takes weights; needs no base."""
    newer, older = how.shares(2)
    cosine = parts.cosine(parts.products(models), 0, 1)
    if abs(cosine) > 1 - STRAIGHT:
        return [newer, older, 0.0]
    angle = math.acos(cosine)
    return [math.sin(w * angle) / math.sin(angle) for w in (newer, older)] + [0.0]


def task_arithmetic(models: list[Tensor], base: Tensor, how: How, depth: float) -> list[float]:
    """theta_0 + s sum tau_i. Takes a scale s, 1 / the number of models by default."""
    scale = how.added(len(models))
    return [scale] * len(models) + [1 - scale * len(models)]


def lines(models: list[Tensor], base: Tensor, how: How, depth: float) -> list[float]:
    """LiNeS: task arithmetic whose task vectors are scaled by alpha + beta l / (L - 1) in block l
    of L, by alpha outside of blocks. Takes a scale as task arithmetic does, alpha, and beta."""
    scale = how.added(len(models)) * (how.alpha + how.beta * depth)
    return [scale] * len(models) + [1 - scale * len(models)]


def model_stock(models: list[Tensor], base: Tensor, how: How, depth: float) -> list[float]:
    """t mean(theta_i) + (1 - t) theta_0 with t = k cos / ((k - 1) cos + 1), cos the mean cosine
    between two of the k task vectors of a tensor (spec 12.3).

    Models that equal the base there are no samples of fine-tuning and are left out: so the first
    merge with theta_0 itself keeps what was learned, where cos = 0 would undo it. A negative cos
    counts as 0; t never leaves [0, 1].
    """
    product = parts.products(models, base)
    moved = [index for index in range(len(models)) if product[index, index] > 0]
    pairs = [(i, j) for i in moved for j in moved if i < j]
    share = min(1.0, float(len(moved)))
    if pairs:
        mean = max(0.0, sum(parts.cosine(product, i, j) for i, j in pairs) / len(pairs))
        share = len(moved) * mean / ((len(moved) - 1) * mean + 1)
    each = [share / len(moved) if index in moved else 0.0 for index in range(len(models))]
    return [*each, 1 - share]


def magmax(taus: Tensor, block: Block) -> Tensor:
    """Of each entry the task vector of largest magnitude. Takes a scale, by default 1."""
    return parts.largest(taus).mul(block.how.scale or 1)


def random(taus: Tensor, block: Block) -> Tensor:
    """Of each entry the task vector of a model by chance: what a rule has to beat. Takes a scale,
    by default 1."""
    return parts.picked(taus, block.draw()).mul_(block.how.scale or 1)


def ties(taus: Tensor, block: Block) -> Tensor:
    """Of each task vector the largest entries of the whole model are kept; signs are elected, and
    the mean taken of those that agree. Takes density, and a scale, by default 1."""
    return parts.elected(parts.trimmed(taus, block.bounds)).mul_(block.how.scale or 1)


def dare(taus: Tensor, block: Block) -> Tensor:
    """Entries are dropped by chance, the others rescaled, and added up. Takes density, and a scale
    as task arithmetic does."""
    kept = parts.dropped(taus, block.how.density, block.draw())
    return kept.sum(0).mul_(block.how.added(len(taus)))


def dare_ties(taus: Tensor, block: Block) -> Tensor:
    """Entries are dropped by chance, the others rescaled; then signs are elected as in TIES. Takes
    density, and a scale, by default 1."""
    kept = parts.dropped(taus, block.how.density, block.draw())
    return parts.elected(kept).mul_(block.how.scale or 1)


def breadcrumbs(taus: Tensor, block: Block) -> Tensor:
    """The largest entries are dropped, and the small ones; what is between is added up. Takes
    density and outliers, and a scale as task arithmetic does."""
    return parts.trimmed(taus, block.bounds).sum(0).mul_(block.how.added(len(taus)))


def breadcrumbs_ties(taus: Tensor, block: Block) -> Tensor:
    """The largest entries are dropped, and the small ones; then signs are elected as in TIES. Takes
    density and outliers, and a scale, by default 1."""
    return ties(taus, block)


LINEAR: dict[str, Callable[[list[Tensor], Tensor | None, How, float], list[float]]] = {
    "interpolation": interpolation,
    "slerp": slerp,
    "task-arithmetic": task_arithmetic,
    "lines": lines,
    "model-stock": model_stock,
}
"""Rules that are a weighted sum of one tensor's versions: (models, base, settings, depth of its
block from 0 to 1) -> one factor a model and the base's at last."""

SELECTING: dict[str, Callable[[Tensor, Block], Tensor]] = {
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

RULES = LINEAR | SELECTING
"""By `merging.rule`."""

assert set(VECTORS) < set(RULES) and set(SUMS) < set(LINEAR)
