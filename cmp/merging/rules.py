"""How weights are merged: a rule says it of one tensor, or of a block of its entries.

theta_0 is the base, the weights before the stream; tau_i = theta_i - theta_0 is a task vector.
Models and their weights stand newest first, everywhere. `cmp.merging.apply` applies a rule to whole
state dicts.

A rule that is registered with `linear=True` is a function of (models, base, options, depth) that
returns one factor per model: the result is the weighted sum of the models, or, if it is registered
with `base=True`, theta_0 plus that of the task vectors. Any other rule is a function of (entries,
block): `entries` [models, n] are task vectors if it is registered with `base=True`, else the
weights themselves; it may change them and returns the merged entries [n]. Where a rule is
registered with `matrix=True`, the entries are whole tensors in their own shape, [models, *shape],
and so is what it returns. With `keeps_norm=True` the merged task vector of the whole model is then
scaled to the mean norm of the models' task vectors, times `scale`.
"""

import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import ValidationError
from pydantic.dataclasses import dataclass
from torch import Tensor
from torch.nn import functional as F

from cmp.config import STRICT, Merging
from cmp.errors import CmpError
from cmp.files import first_fault
from cmp.registry import Option, get_option, option_names, register
from cmp.seeds import torch_generator

Weights = dict[str, Tensor]
Factors = list[float]
"""What a linear rule returns: one per model, newest first."""
Draw = tuple[Any, ...]
"""Seed and counters of a random draw: a whole number, then numbers and words."""
_PARALLEL_TOLERANCE = 1e-6
"""How near to 1 the magnitude of a cosine is where an arc is no more than a line."""
PRODUCT_BLOCK = 1 << 20


MERGE_SETTINGS = ("scale", "density", "outliers", "alpha", "beta", "protect")
"""Keys of `cmp.config.Merging` that rules read tensor by tensor."""


class NotFiniteError(CmpError):
    """A tensor of a model holds NaN or infinity.

    Attributes:
        name: The tensor's name.
    """

    def __init__(self, name: str):
        super().__init__(f"{name}: holds NaN or infinite values; mend that model first")
        self.name = name


@dataclass(frozen=True, config=STRICT)
class MergeOptions(Merging):
    """The settings of one merge: a config's section, and what is said of this merge alone.

    Attributes:
        weights: One per model, newest first, summing to 1; where None, the section's shares.
        draw: Seed and counters of rules that draw at random.
    """

    weights: tuple[float, ...] | None = None
    draw: Draw = (0,)

    def __post_init__(self) -> None:  # only the rule, as there may be no run and no policy
        if check := get_option("merge_rule", self.rule).facts["check"]:
            check(self)

    def weights_of(self, count: int) -> list[float]:
        """Return the weights of `count` models."""
        return list(self.weights or merge_weights(self, count))

    def sum_scale(self, count: int) -> float:
        """Return the scale of a sum of task vectors.

        The default makes it their mean, so that merging again and again does not let it grow.
        """
        return self.scale or 1 / count


def make_options(
    rule: Option,
    count: int,
    weights: Sequence[float] | None = None,
    draw: Draw = (0,),
    **settings: Any,
) -> MergeOptions:
    """Return the options of a merge, checked.

    Args:
        rule: The rule.
        count: How many models it merges.
        weights: One per model, newest first; equal ones where None.
        draw: Seed and counters of rules that draw at random.
        **settings: Those of `MERGE_SETTINGS` that the rule reads.

    Raises:
        CmpError: The rule does not read a key, or a value is impossible.
    """
    known = [key for key in MERGE_SETTINGS if key in rule.settings]
    if unread := [key for key in settings if key not in known]:
        takes, advice = known, ""
        if "weight" in rule.settings:
            takes = ["weights", *known]
            advice = "; give weights=(0.9, 0.1): one per model, newest first"
        listed = ", ".join(takes) or "no settings"
        raise CmpError(f"merge: {rule.name!r} takes {listed}, not {unread[0]!r}{advice}")
    if weights is not None:
        weights = tuple(float(weight) for weight in weights)
        check_weights(rule, count, weights)
    try:
        return MergeOptions(rule=rule.name, weights=weights, draw=draw, **settings)
    except ValidationError as error:
        key, fault = first_fault(error)
        words = fault["msg"].removeprefix("Value error, ")
        found = f"{key}: {words} (found {fault['input']!r:.80})" if key else words
        raise CmpError(f"merge: {found}") from error


def check_weights(rule: Option, count: int, weights: Sequence[float]) -> None:
    """Check the weights of `count` models.

    Raises:
        CmpError: The rule takes none, or they do not match the models or sum to 1.
    """
    listed = f"weights {', '.join(f'{weight:g}' for weight in weights)}"
    if "weight" not in rule.settings:
        users = ", ".join(option_names("merge_rule", "weight"))
        raise CmpError(f"{listed}: {rule.name!r} has none, only {users}")
    if len(weights) != count:
        raise CmpError(f"{listed}: {len(weights)} of them for {count} models")
    if not abs(sum(weights) - 1) <= 1e-6:  # also true of NaN
        raise CmpError(f"{listed}: must sum to 1, not {sum(weights):g}")
    if rule.facts["count"] == 2 and min(weights) < 0:
        raise CmpError(f"{listed}: {rule.name!r} goes from one model to the other, not beyond")


def options_of(section: Merging, **others: Any) -> MergeOptions:
    """Return the options that a config section sets; `others` are further fields."""
    return MergeOptions(**(vars(section) | others))


class MagnitudeBounds(NamedTuple):
    """Which entries are kept: those whose magnitude is above `below` and at most `most`."""

    below: float
    most: float


KEEP_ALL = MagnitudeBounds(0.0, math.inf)


class BlockContext(NamedTuple):
    """Where a rule works.

    Attributes:
        options: The rule's settings.
        bounds: What to keep of each task vector, for rules that trim.
        name: The tensor's name.
        number: The number of the block within the tensor.
    """

    options: MergeOptions
    bounds: Sequence[MagnitudeBounds]
    name: str
    number: int

    def draw(self) -> Draw:
        """Return the seed and counters of this block's random draws."""
        return (*self.options.draw, self.name, self.number)


@register("merge_rule", "interpolation", ("weight", "shares", "power", "reverse"), linear=True)
def interpolation(models: list[Tensor], base: None, options: MergeOptions, depth: float) -> Factors:
    """Return the factors of sum_i w_i theta_i."""
    return options.weights_of(len(models))


@register("merge_rule", "slerp", ("weight",), linear=True, count=2)
def slerp(models: list[Tensor], base: None, options: MergeOptions, depth: float) -> Factors:
    """Return the factors of a point on the arc between two models, per tensor.

    Where the two are parallel, as an arc and a line are then one in fp32, or opposite, where there
    is no arc, the point lies on the straight line.
    """
    newer, older = options.weights_of(2)
    cosine = cosine_similarity(inner_products(models), 0, 1)
    if abs(cosine) > 1 - _PARALLEL_TOLERANCE:
        return [newer, older]
    angle = math.acos(cosine)
    return [math.sin(w * angle) / math.sin(angle) for w in (newer, older)]


@register("merge_rule", "task-arithmetic", ("scale",), linear=True, base=True, running="sum")
def task_arithmetic(
    models: list[Tensor], base: Tensor, options: MergeOptions, depth: float
) -> Factors:
    """Return the factors of theta_0 + s sum_i tau_i."""
    return [options.sum_scale(len(models))] * len(models)


@register("merge_rule", "lines", ("scale", "alpha", "beta"), linear=True, base=True, running="sum")
def lines(models: list[Tensor], base: Tensor, options: MergeOptions, depth: float) -> Factors:
    """Return the factors of LiNeS: task arithmetic whose scale grows with the block's depth.

    The factor is alpha + beta l / (L - 1) in block l of L, and alpha outside of blocks.
    """
    scale = options.sum_scale(len(models)) * (options.alpha + options.beta * depth)
    return [scale] * len(models)


@register("merge_rule", "model-stock", linear=True, base=True)
def model_stock(models: list[Tensor], base: Tensor, options: MergeOptions, depth: float) -> Factors:
    """Return the factors of theta_0 + t mean(tau_i) (Jang et al. 2024).

    t = k cos / ((k - 1) cos + 1) with cos the mean cosine between two of the k task vectors of a
    tensor, at least 0. Models that equal the base in a tensor are no samples of fine-tuning and are
    left out, so that the first merge with theta_0 itself keeps what was learned.
    """
    product = inner_products(models, base)
    moved = [index for index in range(len(models)) if product[index, index] > 0]
    pairs = [(i, j) for i in moved for j in moved if i < j]
    share = min(1.0, float(len(moved)))
    if pairs:
        cosines = [cosine_similarity(product, i, j) for i, j in pairs]
        mean = max(0.0, sum(cosines) / len(pairs))
        share = len(moved) * mean / ((len(moved) - 1) * mean + 1)
    return [share / len(moved) if index in moved else 0.0 for index in range(len(models))]


@register("merge_rule", "magmax", ("scale",), base=True, running="maximum")
def magmax(taus: Tensor, block: BlockContext) -> Tensor:
    """Take each entry from the task vector of largest magnitude; scale 1 by default."""
    best = taus[0]  # among equals the newest
    for tau in taus[1:]:
        best = torch.where(tau.abs() > best.abs(), tau, best)
    return best.mul(block.options.scale or 1)


@register("merge_rule", "random", ("scale",), base=True, draws=True)
def random(taus: Tensor, block: BlockContext) -> Tensor:
    """Take each entry from a task vector at random, as a baseline; scale 1 by default."""
    noise = torch_generator("pick", *block.draw())
    row = torch.randint(len(taus), (1, taus.shape[1]), generator=noise)
    return taus.gather(0, row.to(taus.device))[0].mul_(block.options.scale or 1)


@register("merge_rule", "ties", ("scale", "density"), base=True, trims=True)
def ties(taus: Tensor, block: BlockContext) -> Tensor:
    """Keep each task vector's largest entries over the whole model, elect signs, and average the
    entries that agree; scale 1 by default."""
    return elect_signs(trim(taus, block.bounds)).mul_(block.options.scale or 1)


@register("merge_rule", "dare", ("scale", "density"), base=True, draws=True)
def dare(taus: Tensor, block: BlockContext) -> Tensor:
    """Drop entries at random, rescale the others and add them up."""
    kept = drop_randomly(taus, block.options.density, block.draw())
    return kept.sum(0).mul_(block.options.sum_scale(len(taus)))


@register("merge_rule", "dare-ties", ("scale", "density"), base=True, draws=True)
def dare_ties(taus: Tensor, block: BlockContext) -> Tensor:
    """Drop entries at random, rescale the others and elect signs as in TIES; scale 1 by default."""
    kept = drop_randomly(taus, block.options.density, block.draw())
    return elect_signs(kept).mul_(block.options.scale or 1)


def check_kept(settings: Merging) -> None:
    """Check that a rule does not keep and drop more than all entries together.

    Raises:
        ValueError: It does.
    """
    density, outliers = settings.density, settings.outliers
    if outliers + density > 1:
        raise ValueError(f"density {density:g} + outliers {outliers:g} are more than all entries")


@register(
    "merge_rule",
    "breadcrumbs",
    ("scale", "density", "outliers"),
    base=True,
    trims=True,
    check=check_kept,
)
def breadcrumbs(taus: Tensor, block: BlockContext) -> Tensor:
    """Drop the largest entries and the small ones, and add up what is between."""
    return trim(taus, block.bounds).sum(0).mul_(block.options.sum_scale(len(taus)))


@register(
    "merge_rule",
    "breadcrumbs-ties",
    ("scale", "density", "outliers"),
    base=True,
    trims=True,
    check=check_kept,
)
def breadcrumbs_ties(taus: Tensor, block: BlockContext) -> Tensor:
    """Drop the largest entries and the small ones, then elect signs as in TIES; scale 1 by
    default."""
    return ties(taus, block)


@register("merge_rule", "opcm", ("scale", "protect"), base=True, matrix=True, keeps_norm=True)
def opcm(taus: Tensor, block: BlockContext) -> Tensor:
    """Add each model's task vector without what lies along the models before it (OPCM).

    From the oldest model to the newest, D_1 = tau_1 and D_t = D_{t-1} + P(tau_t). For a matrix with
    D_{t-1} = U S V^T, P takes u_i (u_i^T tau_t v_j) v_j^T out of tau_t where i = j, and where i and
    j are both among the first singular values whose sum is at most `protect` times the sum of all.
    The result is theta_0 + s D_T with one s for the whole model, which gives it the mean norm of
    the tau_t, times `scale`.

    A tensor that `is_matrix` does not call a matrix is added as it is, P(tau) = tau, as upstream
    does with all but the weights of linear layers. So is one whose D_{t-1} is zero. The order of
    the models matters.

    Cost: one singular value decomposition per matrix and model but the oldest, about 10 m n
    min(m, n) operations for m x n entries. Memory: the task vectors of one tensor, and the merged
    task vector of the whole model, which waits for s (from files, on the disk).

    Source: Tang et al. 2025, "Merging Models on the Fly Without Retraining: A Sequential Approach
    to Scalable Continual Model Merging", section 4; fusion_bench has it as `opcm`.
    """
    merged = taus[-1].clone()
    for tau in taus[:-1].flip(0):
        merged += remove_known(tau, merged, block) if is_matrix(block.name, tau) else tau
    return merged


def remove_known(tau: Tensor, merged: Tensor, block: BlockContext) -> Tensor:
    """Return a task vector without what lies along the leading directions of another, see `opcm`.

    Only the directions that the other has, [m, n], can be taken out, so that thin matrices do.
    """
    u, s, vh = decompose(merged)
    first = s.cumsum(0) <= block.options.protect * s.sum()
    known = torch.outer(first, first) | torch.eye(len(s), dtype=torch.bool, device=s.device)
    exists = is_present(s, merged.shape)
    known &= torch.outer(exists, exists)
    return tau - u @ torch.where(known, u.T @ tau @ vh.T, 0) @ vh


@register("merge_rule", "tsv", ("scale",), base=True, matrix=True)
def tsv(taus: Tensor, block: BlockContext) -> Tensor:
    """Add up the leading singular vectors of each task vector, made orthogonal (TSV-Merge).

    Of a matrix [m, n] in each of k models, tau_i = U_i S_i V_i^T, the first r = min(m, n) // k
    singular vectors and values are kept. With U and V those of all models side by side, and S their
    values, the result is theta_0 + `scale` O(U) S O(V)^T. O(U) is the matrix with orthonormal
    columns that is nearest to U: A B^T for U = A Sigma B^T.

    A tensor that `is_matrix` does not call a matrix, or with r = 0, becomes the mean of the task
    vectors, as upstream does with all that have not two dimensions. Directions whose singular value
    is zero, up to rounding, are left out, since they are any: k equal models give the best
    approximation of rank r. The order of the models does not matter; scale 1 by default.

    Cost: k + 2 singular value decompositions per matrix, about 10 m n min(m, n) operations each.
    Memory: the task vectors of one tensor, and as much again.

    Source: Gargiulo et al. 2025, "Task Singular Vectors: Reducing Task Interference in Model
    Merging" (CVPR), section 4.2; fusion_bench has it as `TaskSingularVectorMerging`.
    """
    scale, rank = block.options.scale or 1, min(taus[0].shape, default=0) // len(taus)
    if not is_matrix(block.name, taus[0]) or not rank:
        return taus.mean(0).mul_(scale)
    lefts, values, rights = [], [], []
    for tau in taus:
        u, s, vh = decompose(tau)
        kept = is_present(s, tau.shape).nonzero()[:rank, 0]
        lefts.append(u[:, kept])
        values.append(s[kept])
        rights.append(vh[kept])
    left, right = nearest_orthonormal(torch.cat(lefts, 1)), nearest_orthonormal(torch.cat(rights))
    return left * torch.cat(values).mul_(scale) @ right


def decompose(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return U [m, r], S [r] and V^T [r, n] of a matrix, r = min(m, n).

    A matrix with more columns than rows is turned, which on a CPU takes two thirds of the time.
    """
    if x.shape[0] >= x.shape[1]:
        return torch.linalg.svd(x, full_matrices=False)
    v, s, uh = torch.linalg.svd(x.T.contiguous(), full_matrices=False)
    return uh.T, s, v.T


def nearest_orthonormal(x: Tensor) -> Tensor:
    """Return the nearest matrix whose rows, or columns if they are fewer, are orthonormal; of those
    that depend on each other only the directions that they have together."""
    u, s, vh = decompose(x)
    kept = is_present(s, x.shape)
    return u[:, kept] @ vh[kept]


def is_present(s: Tensor, shape: Sequence[int]) -> Tensor:
    """Return which singular values of a matrix are not zero, up to rounding."""
    return s > s[:1] * max(shape) * torch.finfo(s.dtype).eps if len(s) else s > 0


def is_matrix(name: str, x: Tensor) -> bool:
    """Return whether a tensor is a linear map: it has two dimensions and is no table of embeddings,
    whose rows are looked up one by one."""
    return x.ndim == 2 and "embed" not in name


def inner_products(models: Sequence[Tensor], base: Tensor | None = None) -> np.ndarray:
    """Return the inner products of models, or of their task vectors, float64 [models, models]."""
    flat, dtype = [x.reshape(-1) for x in models], compute_dtype(models)
    total = np.zeros((len(flat), len(flat)))
    pairs = [(i, j) for i in range(len(flat)) for j in range(i + 1)]
    for at in range(0, len(flat[0]), PRODUCT_BLOCK):
        blocks = [x[at : at + PRODUCT_BLOCK].to(dtype) for x in flat]
        if base is None:
            blocks = [_align_memory(x) for x in blocks]
        else:
            origin = base.reshape(-1)[at : at + PRODUCT_BLOCK].to(dtype)
            blocks = [x - origin for x in blocks]
        for i, j in pairs:
            total[i, j] += torch.dot(blocks[i], blocks[j]).item()
    return total + np.tril(total, -1).T


def _align_memory(x: Tensor) -> Tensor:
    """Return the tensor on a 64-byte boundary, as torch allocates it but a file may not: the last
    bits of an inner product depend on that."""
    return x if x.data_ptr() % 64 == 0 else x.clone()


def compute_dtype(tensors: Iterable[Tensor]) -> torch.dtype:
    """Return the type to compute in: fp32, or fp64 where a tensor is."""
    return functools.reduce(torch.promote_types, {x.dtype for x in tensors}, torch.float32)


def cosine_similarity(product: np.ndarray, one: int, other: int) -> float:
    """Return the cosine between two models, from `inner_products`; 1 where one of them is zero."""
    norms = math.sqrt(product[one, one]) * math.sqrt(product[other, other])
    return min(1.0, max(-1.0, float(product[one, other]) / norms)) if norms else 1.0


def trim(taus: Tensor, bounds: Sequence[MagnitudeBounds]) -> Tensor:
    """Set the entries that the bounds exclude to zero, in place."""
    for tau, (below, most) in zip(taus, bounds, strict=True):
        tau.copy_(F.hardshrink(tau, below))
        if most < math.inf:
            tau.masked_fill_(tau.abs() > most, 0)
    return taus


def drop_randomly(taus: Tensor, density: float, draw: Draw) -> Tensor:
    """Keep each entry with probability `density` and divide it by that, else drop it, in place.

    Args:
        taus: Task vectors, [models, n].
        density: The probability.
        draw: Seed and counters; the same entries are dropped for the same draw.
    """
    for index, tau in enumerate(taus):
        noise = torch.rand(tau.shape, generator=torch_generator("dare", *draw, index))
        tau.mul_((noise < density).to(tau.device)).div_(density)
    return taus


def elect_signs(taus: Tensor) -> Tensor:
    """Return the mean of the entries that agree with the sign of their sum, [n]."""
    sign = taus.sum(0).sign_()
    agree = torch.mul(taus, sign).gt_(0)  # 1 or 0; a product with a sign never underflows
    count = agree.sum(0).clamp_(min=1)
    return taus.mul_(agree).sum(0).div_(count)


def merge_weights(merging: Merging, count: int) -> list[float]:
    """Return the weights of models in an interpolation, newest first.

    They are the offline weightings of "How to merge your models over time" (Dziadzio et al. 2024).

    Args:
        merging: The config section; with `reverse` the oldest model has the newest one's weight.
        count: How many models.

    Returns:
        Newest first, summing to 1.
    """
    numbers = range(count, 0, -1)  # of the models, from 1 for the oldest
    others = (1 - merging.weight) / max(count - 1, 1)
    weightings: dict[str, list[float]] = {
        "equal": [1.0] * count,
        "newest": [merging.weight if count > 1 else 1.0, *[others] * (count - 1)],
        "power": [float(number) ** merging.power for number in numbers],
        "exponential": [0.5**age for age in range(count)],
        "log": [math.log(number + 1) for number in numbers],
    }
    weights = weightings[merging.shares]
    weights = weights[::-1] if merging.reverse else weights
    return [weight / sum(weights) for weight in weights]
