"""Rules for merging weights, each defined on one tensor or a block of its entries.

theta_0 is the base, the weights before the stream; tau_i = theta_i - theta_0 is a task vector.
Models and their weights are always ordered newest first. `cmp.merging.apply` applies a rule to
whole state dicts.

A rule registered with `linear=True` is a function of (models, base, options, depth) that returns
one factor per model. The result is the weighted sum of the models or, with `base=True`, theta_0
plus the weighted sum of the task vectors. Any other rule is a function of (entries, block). Its
`entries` [models, n] are task vectors with `base=True`, and weights otherwise. It may change them,
and returns the merged entries [n]. With `matrix=True`, the entries are whole tensors in their own
shape, [models, *shape], and the result is a tensor of that shape. With `keeps_norm=True`, the
merged task vector of the whole model is then scaled to the mean norm of the models' task vectors,
times `scale`.
"""

import functools
import math
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from pydantic import Field, ValidationError
from pydantic.dataclasses import dataclass
from torch import Tensor
from torch.nn import functional as F

from cmp.config import Merging
from cmp.errors import CmpError
from cmp.parsing import explain_fault, first_fault
from cmp.registry import Option, get_option, option_names, register
from cmp.seeds import torch_generator
from cmp.values import STRICT

Weights = dict[str, Tensor]
Factors = list[float]
"""The result of a linear rule: one factor per model, newest first."""
Draw = Annotated[tuple[Any, ...], Field(min_length=1)]
"""The seed and counters of a random draw: an integer, followed by numbers and strings."""
_PARALLEL_TOLERANCE = 1e-6
"""How close to 1 the magnitude of a cosine must be to treat an arc as a straight line."""
PRODUCT_BLOCK = 1 << 20


MODEL_SHARES = ("weight", "shares", "power", "reverse")
"""Settings of rules that give the weights of whole models, for which a single merge takes
`weights`."""


class NotFiniteError(CmpError):
    """An error for a tensor with NaN or infinity.

    Attributes:
        name: The tensor's name.
    """

    def __init__(self, name: str):
        super().__init__(name)  # alone, so that processes can send the error
        self.name = name

    def __str__(self) -> str:
        return f"{self.name}: contains NaN or infinite values; fix that model first"


@dataclass(frozen=True, config=STRICT)
class MergeOptions(Merging):
    """The settings of one merge: those of the config section, plus those of this merge. Create them
    with `make`, which checks them.

    Attributes:
        weights: One weight per model, newest first, summing to 1. If None, the section's shares.
        draw: The seed and counters for rules with random draws.
    """

    weights: tuple[float, ...] | None = None
    draw: Draw = (0,)

    def __post_init__(self) -> None:  # only the rule, as there may be no policy
        if check := get_option("merge_rule", self.rule).facts["check"]:
            check(self)

    @classmethod
    def make(
        cls,
        rule: Option,
        count: int,
        section: Merging | None = None,
        weights: Sequence[float] | None = None,
        **settings: Any,
    ) -> "MergeOptions":
        """Return the options of a merge.

        Args:
            rule: The rule.
            count: The number of models.
            section: The config section whose settings apply unless they are given here; if None,
                the defaults.
            weights: One weight per model, newest first; if None, the section's shares.
            **settings: `draw`, and settings that the rule reads, see `tensor_settings`.

        Raises:
            CmpError: The rule does not read a key, or a value is invalid.
        """
        known = tensor_settings(rule)
        if unread := [key for key in settings if key not in (*known, "draw")]:
            takes, advice = known, ""
            if "weight" in rule.settings:
                takes = ["weights", *known]
                advice = "; give weights=(0.9, 0.1), one per model, newest first"
            listed = ", ".join(takes) or "no settings"
            raise CmpError(f"merge: {rule.name!r} takes {listed}, not {unread[0]!r}{advice}")
        if weights is not None:
            weights = check_weights(rule, count, weights)
        base = {} if section is None else vars(section)
        try:
            return cls(**(base | settings | {"rule": rule.name, "weights": weights}))
        except ValidationError as error:
            raise explain_fault("merge", *first_fault(error)) from error

    def weights_of(self, count: int) -> list[float]:
        """Return the weights of `count` models."""
        return list(self.weights or merge_weights(self, count))

    def sum_scale(self, count: int) -> float:
        """Return the scale of a sum of task vectors.

        By default this gives their mean, so that repeated merging does not make it grow.
        """
        return self.scale or 1 / count


def tensor_settings(rule: Option) -> list[str]:
    """Return the keys of `cmp.config.Merging` that a rule reads for each tensor."""
    return [key for key in rule.settings if key not in MODEL_SHARES]


def check_weights(rule: Option, count: int, weights: Sequence[float]) -> tuple[float, ...]:
    """Return the weights of `count` models as floats.

    Raises:
        CmpError: The rule takes no weights, or they are not numbers that match the models and sum
            to 1.
    """
    try:
        weights = tuple(float(weight) for weight in weights)
    except (TypeError, ValueError) as error:
        raise CmpError(
            f"weights {weights!r:.80}: give one number per model, newest first, such as (0.9, 0.1)"
        ) from error
    listed = f"weights {', '.join(f'{weight:g}' for weight in weights)}"
    if "weight" not in rule.settings:
        users = ", ".join(option_names("merge_rule", "weight"))
        raise CmpError(f"{listed}: not used by {rule.name!r}, only by {users}")
    if len(weights) != count:
        raise CmpError(f"{listed}: {len(weights)} weights for {count} models")
    if not abs(sum(weights) - 1) <= 1e-6:  # also true of NaN
        raise CmpError(f"{listed}: must sum to 1, not {sum(weights):g}")
    if rule.facts["count"] == 2 and min(weights) < 0:
        raise CmpError(
            f"{listed}: {rule.name!r} only interpolates between the two models; give weights from "
            "0 to 1"
        )
    return weights


class MagnitudeBounds(NamedTuple):
    """Bounds on the entries to keep: magnitudes of at least `least` and at most `most`."""

    least: float
    most: float


KEEP_ALL = MagnitudeBounds(0.0, math.inf)


class BlockContext(NamedTuple):
    """The context of the block that a rule merges.

    Attributes:
        options: The rule's settings.
        bounds: The entries to keep of each task vector, for rules that trim.
        name: The tensor's name.
        number: The index of the block within the tensor.
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

    The point is on the straight line if the two are parallel, where arc and line coincide in fp32,
    or opposite, where there is no arc.
    """
    newer, older = options.weights_of(2)
    cosine = cosine_similarity(inner_products(models), 0, 1)
    if abs(cosine) > 1 - _PARALLEL_TOLERANCE:
        return [newer, older]
    angle = math.acos(cosine)
    return [math.sin(w * angle) / math.sin(angle) for w in (newer, older)]


@register("merge_rule", "task-arithmetic", ("scale",), linear=True, base=True)
def task_arithmetic(
    models: list[Tensor], base: Tensor, options: MergeOptions, depth: float
) -> Factors:
    """Return the factors of theta_0 + s sum_i tau_i."""
    return [options.sum_scale(len(models))] * len(models)


@register("merge_rule", "lines", ("scale", "alpha", "beta"), linear=True, base=True)
def lines(models: list[Tensor], base: Tensor, options: MergeOptions, depth: float) -> Factors:
    """Return the factors of LiNeS: task arithmetic whose scale grows with the block's depth.

    The factor is alpha + beta l / (L - 1) in block l of L, and alpha outside the blocks.
    """
    scale = options.sum_scale(len(models)) * (options.alpha + options.beta * depth)
    return [scale] * len(models)


@register("merge_rule", "model-stock", linear=True, base=True)
def model_stock(models: list[Tensor], base: Tensor, options: MergeOptions, depth: float) -> Factors:
    """Return the factors of theta_0 + t mean(tau_i) (Jang et al. 2024).

    t = k cos / ((k - 1) cos + 1), where cos is the mean cosine between pairs of the k task vectors
    of a tensor, at least 0. Models that equal the base in a tensor are not samples of fine-tuning
    and are ignored, so that the first merge with theta_0 itself keeps what was learned.
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


@register("merge_rule", "magmax", ("scale",), base=True)
def magmax(taus: Tensor, block: BlockContext) -> Tensor:
    """Take each entry from the task vector with the largest magnitude; scale 1 by default."""
    best = taus[0]  # the newest wins ties
    for tau in taus[1:]:
        best = torch.where(tau.abs() > best.abs(), tau, best)
    return best.mul(block.options.scale or 1)


@register("merge_rule", "random", ("scale",), base=True, draws=True)
def random(taus: Tensor, block: BlockContext) -> Tensor:
    """Take each entry from a random task vector, as a baseline; scale 1 by default."""
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
    """Drop entries at random, rescale the others and sum them."""
    kept = drop_randomly(taus, block.options.density, block.draw())
    return kept.sum(0).mul_(block.options.sum_scale(len(taus)))


@register("merge_rule", "dare-ties", ("scale", "density"), base=True, draws=True)
def dare_ties(taus: Tensor, block: BlockContext) -> Tensor:
    """Drop entries at random, rescale the others and elect signs as in TIES; scale 1 by default."""
    kept = drop_randomly(taus, block.options.density, block.draw())
    return elect_signs(kept).mul_(block.options.scale or 1)


def check_kept(settings: Merging) -> None:
    """Check that the kept and dropped fractions sum to at most 1.

    Raises:
        ValueError: They do not.
    """
    density, outliers = settings.density, settings.outliers
    if outliers + density > 1:
        raise ValueError(f"density {density:g} + outliers {outliers:g} exceed 1")


@register(
    "merge_rule",
    "breadcrumbs",
    ("scale", "density", "outliers"),
    base=True,
    trims=True,
    check=check_kept,
)
def breadcrumbs(taus: Tensor, block: BlockContext) -> Tensor:
    """Drop the largest and the small entries, and sum the rest."""
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
    """Drop the largest and the small entries, then elect signs as in TIES; scale 1 by default."""
    return ties(taus, block)


@register("merge_rule", "opcm", ("scale", "protect"), base=True, matrix=True, keeps_norm=True)
def opcm(taus: Tensor, block: BlockContext) -> Tensor:
    """Add each model's task vector after projecting out the earlier models (OPCM).

    From the oldest model to the newest, D_1 = tau_1 and D_t = D_{t-1} + P(tau_t). For a matrix with
    D_{t-1} = U S V^T, P removes u_i (u_i^T tau_t v_j) v_j^T from tau_t if i = j, or if i and j are
    both among the first singular values whose sum is at most `protect` times the total. The result
    is theta_0 + s D_T, with one s for the whole model that scales D_T to the mean norm of the
    tau_t, times `scale`.

    A tensor that is not a matrix according to `is_matrix` is added unchanged, P(tau) = tau, as
    upstream does for everything except weights of linear layers. So is one if D_{t-1} is zero.
    The order of the models matters.

    Cost: one singular value decomposition per matrix and model except the oldest, about 10 m n
    min(m, n) operations for m x n entries. Memory: the task vectors of one tensor, and the merged
    task vector of the whole model until s is known.

    Source: Tang et al. 2025, "Merging Models on the Fly Without Retraining: A Sequential Approach
    to Scalable Continual Model Merging", section 4; fusion_bench has it as `opcm`.
    """
    merged = taus[-1].clone()
    for tau in taus[:-1].flip(0):
        merged += remove_known(tau, merged, block) if is_matrix(block.name, tau) else tau
    return merged


def remove_known(tau: Tensor, merged: Tensor, block: BlockContext) -> Tensor:
    """Return a task vector with the leading directions of another projected out, see `opcm`.

    Thin matrices suffice, since only directions of the other, [m, n], can be removed.
    """
    u, s, vh = decompose(merged)
    sums = s.cumsum(0)
    first = sums <= block.options.protect * sums[-1:]
    known = torch.outer(first, first) | torch.eye(len(s), dtype=torch.bool, device=s.device)
    exists = is_present(s, merged.shape)
    known &= torch.outer(exists, exists)
    return tau - u @ torch.where(known, u.T @ tau @ vh.T, 0) @ vh


@register("merge_rule", "tsv", ("scale",), base=True, matrix=True)
def tsv(taus: Tensor, block: BlockContext) -> Tensor:
    """Sum the leading singular vectors of all task vectors, made orthogonal (TSV-Merge).

    For a matrix [m, n] in each of k models, tau_i = U_i S_i V_i^T, the first r = min(m, n) // k
    singular vectors and values are kept. With those of all models concatenated into U, S and V, the
    result is theta_0 + `scale` O(U) S O(V)^T. O(U) is the nearest matrix to U with orthonormal
    columns: A B^T for U = A Sigma B^T.

    For a tensor that is not a matrix according to `is_matrix`, or with r = 0, the result is the
    mean of the task vectors, as upstream does for all tensors without exactly two dimensions.
    Directions with a singular value of zero, up to rounding, are arbitrary and ignored, so k equal
    models give the best approximation of rank r. The order of the models does not matter; scale 1
    by default.

    Cost: k + 2 singular value decompositions per matrix, about 10 m n min(m, n) operations each.
    Memory: twice the task vectors of one tensor.

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

    A matrix with more columns than rows is transposed first, which on a CPU takes two thirds of the
    time. Where LAPACK does not converge, which happens with many equal singular values, fp64 does.
    """
    if x.shape[0] < x.shape[1]:
        v, s, uh = decompose(x.T.contiguous())
        return uh.T, s, v.T
    try:
        return torch.linalg.svd(x, full_matrices=False)
    except RuntimeError:  # "failed to converge"
        u, s, vh = torch.linalg.svd(x.double(), full_matrices=False)
        return u.to(x.dtype), s.to(x.dtype), vh.to(x.dtype)


def nearest_orthonormal(x: Tensor) -> Tensor:
    """Return the nearest matrix with orthonormal rows, or columns if those are fewer. Linearly
    dependent rows keep only the directions that they span."""
    u, s, vh = decompose(x)
    kept = is_present(s, x.shape)
    return u[:, kept] @ vh[kept]


def is_present(s: Tensor, shape: Sequence[int]) -> Tensor:
    """Return which singular values of a matrix are nonzero, up to rounding."""
    return s > s[:1] * max(shape) * torch.finfo(s.dtype).eps if len(s) else s > 0


def is_matrix(name: str, x: Tensor) -> bool:
    """Return whether a tensor is a linear map: it has two dimensions and is not an embedding table,
    which is indexed by row."""
    return x.ndim == 2 and "embed" not in name


def inner_products(models: Sequence[Tensor], base: Tensor | None = None) -> np.ndarray:
    """Return the inner products of models, or of their task vectors, float64 [models, models]."""
    flat = [x.reshape(-1) for x in models]
    dtype = compute_dtype(models if base is None else [*models, base])
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
    """Return the tensor aligned to 64 bytes, as torch allocates it but a file may not: the last
    bits of an inner product depend on the alignment."""
    return x if x.data_ptr() % 64 == 0 else x.clone()


def compute_dtype(tensors: Iterable[Tensor]) -> torch.dtype:
    """Return the type to compute in: fp64 if a tensor has it, else fp32."""
    return functools.reduce(torch.promote_types, {x.dtype for x in tensors}, torch.float32)


def cosine_similarity(product: np.ndarray, one: int, other: int) -> float:
    """Return the cosine between two models from `inner_products`, or 1 if one of them is zero."""
    norms = math.sqrt(product[one, one]) * math.sqrt(product[other, other])
    return min(1.0, max(-1.0, float(product[one, other]) / norms)) if norms else 1.0


def trim(taus: Tensor, bounds: Sequence[MagnitudeBounds]) -> Tensor:
    """Set entries outside the bounds to zero in place."""
    for tau, (least, most) in zip(taus, bounds, strict=True):
        bound = torch.tensor(least, dtype=tau.dtype)
        below = torch.nextafter(bound, torch.zeros_like(bound)).item()  # hardshrink drops its bound
        tau.copy_(F.hardshrink(tau, below))
        if most < math.inf:
            tau.masked_fill_(tau.abs() > most, 0)
    return taus


def drop_randomly(taus: Tensor, density: float, draw: Draw) -> Tensor:
    """Keep each entry with probability `density` and divide it by that, or else set it to zero, in
    place.

    Args:
        taus: Task vectors, [models, n].
        density: The probability.
        draw: The seed and counters; the same draw drops the same entries.
    """
    for index, tau in enumerate(taus):
        noise = torch.rand(tau.shape, generator=torch_generator("dare", *draw, index))
        tau.mul_((noise < density).to(tau.device)).div_(density)
    return taus


def elect_signs(taus: Tensor) -> Tensor:
    """Return the mean of the entries that agree with the sign of their sum, [n]."""
    sign = taus.sum(0).sign_()
    agree = torch.mul(taus, sign).gt_(0)  # 1 or 0; multiplying by a sign never underflows
    count = agree.sum(0).clamp_(min=1)
    return taus.mul_(agree).sum(0).div_(count)


def merge_weights(merging: Merging, count: int) -> list[float]:
    """Return the weights of models in an interpolation, newest first.

    These are the offline weightings of "How to merge your models over time" (Dziadzio et al. 2024).

    Args:
        merging: The config section. With `reverse`, the oldest model gets the newest one's weight.
        count: The number of models.

    Returns:
        The weights, summing to 1.
    """
    numbers = range(count, 0, -1)  # numbers of the models, 1 for the oldest
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
