"""Rules applied to whole models: state dicts, or anything that gives tensors by name.

Tensor by tensor, and each in blocks that stay in the cache, so that next to nothing is allocated.
What is no parameter is told by its kind: whole numbers and truth values are the newest model's;
running means and variances are averaged, whatever the rule, as choosing among them or adding up
their differences may leave the range that they can have. `logit_scale` is a parameter like all
others: it is the log of the scale, and is merged as it stands.
"""

import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from cmp.config import PAIR_RULES, RULE_SETTINGS, TASK_VECTOR_RULES
from cmp.errors import CmpError
from cmp.merging.rules import (
    LINEAR_RULES,
    RULES,
    SELECTING_RULES,
    BlockContext,
    MagnitudeBounds,
    MergeOptions,
    Weights,
    compute_dtype,
    interpolation,
)

StateDict = Mapping[str, Tensor]
ResultCheck = Callable[[str, Tensor, Sequence[Tensor]], None]
BLOCK_SIZES = {"linear": 1 << 20, "selecting": 1 << 16}
"""Entries that are combined together: by the bytes that a rule needs of each in the cache."""
STATISTICS_SUFFIXES = ("running_mean", "running_var")
_WEIGHT_SUM_TOLERANCE = 1e-6  # of a sum of weights


def merge(
    rule: str,
    models: Sequence[StateDict],
    base: StateDict | None = None,
    how: MergeOptions | None = None,
    out: Weights | None = None,
    finite: bool = False,
) -> Weights:
    """New weights from those of some models, newest first, by a rule of `rules.RULES`.

    base: the weights before the stream, for rules on task vectors. out: tensors to write the result
    into, of its own. finite: whether all entries are known to be finite, as after training; else
    a look is taken. The arguments are not changed, and share no tensor with the result, which has
    the newest model's types. Raises `CmpError` as `check` does, and where an entry is not finite.
    """
    check_mergeable(rule, models, base, how)
    return dict(iter_merged(rule, models, base, how, out, finite))


def check_mergeable(
    rule: str,
    models: Sequence[StateDict],
    base: StateDict | None = None,
    how: MergeOptions | None = None,
    labels: Sequence[str] = (),
) -> None:
    """`CmpError` unless a rule can merge these: their number, weights, base, names, and shapes.

    labels: what errors call the models, and the base at last.
    """
    if rule not in RULES:
        raise CmpError(f"no rule is called {rule!r}; there are {', '.join(RULES)}")
    if not models or (rule in PAIR_RULES and len(models) != 2):
        wanted = "exactly 2" if rule in PAIR_RULES else "at least 1"
        raise CmpError(f"{rule}: {len(models)} models given; it merges {wanted}")
    if (base is None) == (rule in TASK_VECTOR_RULES):
        wants = "needs a base, the weights before the stream" if base is None else "takes no base"
        raise CmpError(f"{rule}: {wants}")
    check_merge_weights(rule, len(models), how.weights if how else None)
    everything = [*models, *([] if base is None else [base])]
    names = labels or [f"model {number}" for number in range(1, len(models) + 1)] + ["base"]
    for label, other in zip(names[1:], everything[1:], strict=False):
        check_same_tensors(names[0], models[0], label, other)


def check_merge_weights(rule: str, count: int, weights: Sequence[float] | None) -> None:
    """`CmpError` unless these are weights for so many models."""
    if weights is None:
        return
    text = ", ".join(f"{weight:g}" for weight in weights)
    if rule not in RULE_SETTINGS["weight"]:
        raise CmpError(
            f"weights {text}: {rule!r} has none, only {', '.join(RULE_SETTINGS['weight'])}"
        )
    if len(weights) != count:
        raise CmpError(f"weights {text}: {len(weights)} of them for {count} models")
    if not abs(sum(weights) - 1) <= _WEIGHT_SUM_TOLERANCE:  # also true of NaN
        raise CmpError(f"weights {text}: must sum to 1, not {sum(weights):g}")
    if rule in PAIR_RULES and min(weights) < 0:
        raise CmpError(f"weights {text}: {rule!r} goes from one model to the other, not beyond")


def check_same_tensors(first: str, one: StateDict, second: str, other: StateDict) -> None:
    """`CmpError` unless two models have the same tensors: names, shapes, and kinds of number."""
    if different := sorted(one.keys() ^ other.keys()):
        name = different[0]
        has, lacks = (first, second) if name in one else (second, first)
        raise CmpError(
            f"{name}: {has} has it, {lacks} has not; {len(different)} tensors differ, so these are "
            "no models of one kind"
        )
    for name in one:
        x, y = one[name], other[name]
        if x.shape != y.shape:
            raise CmpError(f"{name}: shape {list(x.shape)} in {first}, {list(y.shape)} in {second}")
        if x.is_floating_point() != y.is_floating_point():
            raise CmpError(f"{name}: {x.dtype} in {first}, {y.dtype} in {second}")


def is_mergeable(name: str, x: Tensor) -> bool:
    """Whether a rule applies to a tensor; see this module for the others."""
    return x.is_floating_point() and not name.endswith(STATISTICS_SUFFIXES)


def iter_merged(
    rule: str,
    models: Sequence[StateDict],
    base: StateDict | None = None,
    how: MergeOptions | None = None,
    out: Weights | None = None,
    finite: bool = False,
) -> Iterator[tuple[str, Tensor]]:
    """What `merge` returns, tensor by tensor; nothing is kept. For models that were checked."""
    how, names = how or MergeOptions(), list(models[0])
    look = (lambda name, result, sources: None) if finite else require_finite
    entries = {name: None for name in names if is_mergeable(name, models[0][name])}
    bounds = [KEEP_ALL] * len(models)
    if rule in RULE_SETTINGS["density"] and not rule.startswith("dare"):
        top = how.outliers if rule in RULE_SETTINGS["outliers"] else 0.0
        bounds = [
            magnitude_thresholds(model, base, [*entries], how.density, top) for model in models
        ]
    depth = layer_depth(entries) if rule == "lines" else {}
    for name in names:
        tensors = [model[name] for model in models]
        start = None if base is None else base[name]
        target = torch.empty(tensors[0].shape, dtype=tensors[0].dtype) if out is None else out[name]
        if not tensors[0].is_floating_point():
            target.copy_(tensors[0])
        elif name not in entries:
            write_weighted_sum(
                name, tensors, interpolation(tensors, None, MergeOptions(), 0.0)[:-1], target, look
            )
        elif rule in LINEAR_RULES:
            factors = LINEAR_RULES[rule](tensors, start, how, depth.get(name, 0.0))
            versions = tensors if start is None else [*tensors, start]
            write_weighted_sum(name, versions, factors[: len(versions)], target, look)
        else:
            write_selected(rule, name, tensors, start, how, bounds, target, look)
        yield name, target


def write_weighted_sum(
    name: str, tensors: list[Tensor], factors: Sequence[float], out: Tensor, look: ResultCheck
) -> None:
    """Write sum factor_i tensor_i; each product is rounded, then each sum, in the order given.

    look: called with each result and what it was made of, see `require_finite`.
    """
    flat, target, dtype = [x.reshape(-1) for x in tensors], out.view(-1), compute_dtype(tensors)
    used = [(x, factor) for x, factor in zip(flat, factors, strict=True) if factor]
    one, size = _unit_tensor(dtype), BLOCK_SIZES["linear"]
    for at in range(0, len(target), size):
        into = target[at : at + size]
        sums = into if into.dtype == dtype else torch.empty(into.shape, dtype=dtype)
        if not used:
            sums.zero_()
        for index, (x, factor) in enumerate(used):
            block = x[at : at + size].to(dtype)
            if index == 0:
                torch.mul(block, factor, out=sums)
            else:  # one pass, and no fused product that would round but once
                sums.addcmul_(block, one, value=factor)
        if sums is not into:
            into.copy_(sums)
        look(name, into, flat)
    for x, factor in zip(flat, factors, strict=True):
        if not factor:
            look(name, x, [x])


@functools.cache
def _unit_tensor(dtype: torch.dtype) -> Tensor:
    return torch.ones(1, dtype=dtype)


def write_selected(
    rule: str,
    name: str,
    tensors: list[Tensor],
    base: Tensor,
    how: MergeOptions,
    bounds: Sequence[MagnitudeBounds],
    out: Tensor,
    look: ResultCheck,
) -> None:
    """Write theta_0 + the task vector that a rule of `SELECTING` makes of the models'."""
    flat, start, target = [x.reshape(-1) for x in tensors], base.reshape(-1), out.view(-1)
    dtype, size = compute_dtype([*tensors, base]), BLOCK_SIZES["selecting"]
    space = torch.empty(len(flat), min(size, len(target)), dtype=dtype)
    for number, at in enumerate(range(0, len(target), size)):
        origin = start[at : at + size].to(dtype)
        taus = space[:, : len(origin)]
        for tau, x in zip(taus, flat, strict=True):
            torch.sub(x[at : at + size].to(dtype), origin, out=tau)
        look(name, taus, [*flat, start])
        tau = SELECTING_RULES[rule](taus, BlockContext(how, bounds, name, number))
        into = target[at : at + size]
        into.copy_(torch.add(origin, tau, out=tau))
        look(name, into, [])


def require_finite(name: str, result: Tensor, sources: Sequence[Tensor]) -> None:
    """`CmpError` unless all entries of a result are finite; sources: what it was made of."""
    if math.isfinite(result.sum().item()) or bool(result.isfinite().all()):
        return
    if all(bool(x.isfinite().all()) for x in sources):
        raise CmpError(f"{name}: the merged weights overflow {result.dtype}; lower the scale")
    raise NotFiniteError(name)


THRESHOLD_BLOCK = 1 << 16
"""Entries that are looked at together, so that what is made of them stays in the cache."""
THRESHOLD_SAMPLE = 1 << 20
"""About how many entries tell where a rank must be."""
BlockIterator = Callable[[], Iterator[np.ndarray]]


class NotFiniteError(CmpError):
    """A tensor of a model, by its name, holds what is no number."""

    def __init__(self, name: str):
        super().__init__(f"{name}: holds NaN or infinite values; mend that model first")
        self.name = name


KEEP_ALL = MagnitudeBounds(0.0, float("inf"))


def magnitude_thresholds(
    model: Mapping[str, Tensor],
    base: Mapping[str, Tensor],
    names: Sequence[str],
    density: float,
    outliers: float = 0.0,
) -> MagnitudeBounds:
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
        return KEEP_ALL

    def blocks() -> Iterator[np.ndarray]:
        for name in names:
            yield from magnitudes(name, model[name], base[name])

    sample = np.sort(np.concatenate([
        _sample_magnitudes(name, model[name], base[name], max(1, count // THRESHOLD_SAMPLE)) for name in names
    ]))  # fmt: skip
    most = float(select_rank(blocks, count - top - 1, count, sample)) if top else KEEP_ALL.most
    if bottom <= 0:
        return MagnitudeBounds(0.0, most)
    least = select_rank(blocks, bottom, count, sample)
    return MagnitudeBounds(float(np.nextafter(least, least.dtype.type(0))), most)


def magnitudes(name: str, one: Tensor, other: Tensor) -> Iterator[np.ndarray]:
    """|one - other| block by block, [up to BLOCK] each, fp32 at least; a block is overwritten by
    the next."""
    one, other = one.reshape(-1), other.reshape(-1)
    dtype = torch.promote_types(torch.promote_types(one.dtype, other.dtype), torch.float32)
    out = torch.empty(min(THRESHOLD_BLOCK, one.numel()), dtype=dtype)
    for at in range(0, one.numel(), THRESHOLD_BLOCK):
        block = out[: min(THRESHOLD_BLOCK, one.numel() - at)]
        torch.sub(
            one[at : at + THRESHOLD_BLOCK].to(dtype),
            other[at : at + THRESHOLD_BLOCK].to(dtype),
            out=block,
        )
        if not math.isfinite(block.abs_().sum().item()) and not block.isfinite().all():
            raise NotFiniteError(name)
        yield block.numpy()


def _sample_magnitudes(name: str, one: Tensor, other: Tensor, stride: int) -> np.ndarray:
    """Every so manieth magnitude, always the first."""
    a, b = (x.reshape(-1)[::stride].contiguous() for x in (one, other))
    return np.concatenate([block.copy() for block in magnitudes(name, a, b)] or [np.empty(0)])


def select_rank(blocks: BlockIterator, rank: int, count: int, sample: np.ndarray) -> np.floating:
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
    before, within = _split_at(blocks, low, high)
    if before <= rank < before + len(within):
        return np.partition(within, rank - before)[rank - before]
    edge = low if rank < before else high
    before, equal = _count_at(blocks, edge)
    if before <= rank < before + equal:
        return sample.dtype.type(edge)
    low, high = (-np.inf, low) if rank < before else (high, np.inf)
    before, within = _split_at(blocks, low, high)
    return np.partition(within, rank - before)[rank - before]


def _split_at(blocks: BlockIterator, low: float, high: float) -> tuple[int, np.ndarray]:
    """How many entries are at most `low`, and those between the two."""
    before, within = 0, []
    for block in blocks():
        above = block > low
        before += block.size - np.count_nonzero(above)
        within.append(block[np.flatnonzero(above & (block < high))])
    return before, np.concatenate(within)


def _count_at(blocks: BlockIterator, edge: float) -> tuple[int, int]:
    """How many entries are less than `edge`, and how many are equal to it."""
    before = equal = 0
    for block in blocks():
        before += np.count_nonzero(block < edge)
        equal += np.count_nonzero(block == edge)
    return before, equal


_BLOCK_NUMBER = re.compile(r"(.*?)\.(\d+(?:\.\d+)*)\.")
"""The first run of numbers in a name: what is numbered, and which one of it."""


def block_number(name: str) -> tuple[str, str, tuple[int, ...]] | None:
    """(tower, what is numbered, number) of a parameter; none if nothing in its name is numbered.

    "visual.trunk.stages.1.0.weight" -> ("visual", "visual.trunk.stages", (1, 0)). ResNets' "layer1"
    counts as number 1 of "layer".
    """
    match = _BLOCK_NUMBER.match(re.sub(r"\blayer(?=\d)", "layer.", name))
    if not match:
        return None
    tower = "visual" if name.startswith("visual.") else "text"
    return tower, match[1], tuple(map(int, match[2].split(".")))


def layer_depth(names: Iterable[str]) -> dict[str, float]:
    """Each parameter's place among the L blocks of its tower, from 0 to 1: l / (L - 1), l from 0.

    The blocks of a tower are what it has the most of, in the order of their numbers. All else, such
    as stem, embeddings, and projections, has depth 0, as have all where nothing is numbered.
    """
    found = {name: block_number(name) for name in names}
    stacks: dict[str, dict[str, set]] = {}
    for block in filter(None, found.values()):
        stacks.setdefault(block[0], {}).setdefault(block[1], set()).add(block[2])
    blocks = {tower: max(sorted(kinds.items()), key=lambda x: len(x[1])) for tower, kinds in
              stacks.items()}  # fmt: skip
    result = {}
    for name, block in found.items():
        stack, numbers = blocks[block[0]] if block else ("", ())
        inside = block and block[1] == stack and len(numbers) > 1
        result[name] = sorted(numbers).index(block[2]) / (len(numbers) - 1) if inside else 0.0
    return result
