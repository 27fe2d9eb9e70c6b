"""Rules applied to whole models: state dicts, or anything that gives tensors by name.

Tensor by tensor, and each in blocks that stay in the cache, so that next to nothing is allocated.
What is no parameter is told by its kind: whole numbers and truth values are the newest model's;
running means and variances are averaged, whatever the rule, as choosing among them or adding up
their differences may leave the range that they can have. `logit_scale` is a parameter like all
others: it is the log of the scale, and is merged as it stands.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from cmp.config.merging import OF_RULES, PAIRS, VECTORS
from cmp.errors import CmpError
from cmp.merging import cuts, depths, parts
from cmp.merging.rules import LINEAR, RULES, SELECTING, Block, How, Weights, interpolation

Model = Mapping[str, Tensor]
Look = Callable[[str, Tensor, Sequence[Tensor]], None]
BLOCK = {"linear": 1 << 20, "selecting": 1 << 16}
"""Entries that are combined together: by the bytes that a rule needs of each in the cache."""
STATISTICS = ("running_mean", "running_var")
TOLERANCE = 1e-6  # of a sum of weights


def merge(
    rule: str,
    models: Sequence[Model],
    base: Model | None = None,
    how: How | None = None,
    out: Weights | None = None,
    finite: bool = False,
) -> Weights:
    """New weights from those of some models, newest first, by a rule of `rules.RULES`.

    base: the weights before the stream, for rules on task vectors. out: tensors to write the result
    into, of its own. finite: whether all entries are known to be finite, as after training; else
    a look is taken. The arguments are not changed, and share no tensor with the result, which has
    the newest model's types. Raises `CmpError` as `check` does, and where an entry is not finite.
    """
    check(rule, models, base, how)
    return dict(merged(rule, models, base, how, out, finite))


def check(
    rule: str,
    models: Sequence[Model],
    base: Model | None = None,
    how: How | None = None,
    labels: Sequence[str] = (),
) -> None:
    """`CmpError` unless a rule can merge these: their number, weights, base, names, and shapes.

    labels: what errors call the models, and the base at last.
    """
    if rule not in RULES:
        raise CmpError(f"no rule is called {rule!r}; there are {', '.join(RULES)}")
    if not models or (rule in PAIRS and len(models) != 2):
        wanted = "exactly 2" if rule in PAIRS else "at least 1"
        raise CmpError(f"{rule}: {len(models)} models given; it merges {wanted}")
    if (base is None) == (rule in VECTORS):
        wants = "needs a base, the weights before the stream" if base is None else "takes no base"
        raise CmpError(f"{rule}: {wants}")
    check_weights(rule, len(models), how.weights if how else None)
    everything = [*models, *([] if base is None else [base])]
    names = labels or [f"model {number}" for number in range(1, len(models) + 1)] + ["base"]
    for label, other in zip(names[1:], everything[1:], strict=False):
        check_alike(names[0], models[0], label, other)


def check_weights(rule: str, count: int, weights: Sequence[float] | None) -> None:
    """`CmpError` unless these are weights for so many models."""
    if weights is None:
        return
    text = ", ".join(f"{weight:g}" for weight in weights)
    if rule not in OF_RULES["weight"]:
        raise CmpError(f"weights {text}: {rule!r} has none, only {', '.join(OF_RULES['weight'])}")
    if len(weights) != count:
        raise CmpError(f"weights {text}: {len(weights)} of them for {count} models")
    if not abs(sum(weights) - 1) <= TOLERANCE:  # also true of NaN
        raise CmpError(f"weights {text}: must sum to 1, not {sum(weights):g}")
    if rule in PAIRS and min(weights) < 0:
        raise CmpError(f"weights {text}: {rule!r} goes from one model to the other, not beyond")


def check_alike(first: str, one: Model, second: str, other: Model) -> None:
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


def is_merged(name: str, x: Tensor) -> bool:
    """Whether a rule applies to a tensor; see this module for the others."""
    return x.is_floating_point() and not name.endswith(STATISTICS)


def merged(
    rule: str,
    models: Sequence[Model],
    base: Model | None = None,
    how: How | None = None,
    out: Weights | None = None,
    finite: bool = False,
) -> Iterator[tuple[str, Tensor]]:
    """What `merge` returns, tensor by tensor; nothing is kept. For models that were checked."""
    how, names = how or How(), list(models[0])
    look = (lambda name, result, sources: None) if finite else require_finite
    entries = {name: None for name in names if is_merged(name, models[0][name])}
    bounds = [cuts.EVERYTHING] * len(models)
    if rule in OF_RULES["density"] and not rule.startswith("dare"):
        top = how.outliers if rule in OF_RULES["outliers"] else 0.0
        bounds = [cuts.bounds(model, base, [*entries], how.density, top) for model in models]
    depth = depths.depths(entries) if rule == "lines" else {}
    for name in names:
        tensors = [model[name] for model in models]
        start = None if base is None else base[name]
        target = torch.empty(tensors[0].shape, dtype=tensors[0].dtype) if out is None else out[name]
        if not tensors[0].is_floating_point():
            target.copy_(tensors[0])
        elif name not in entries:
            weighted(name, tensors, interpolation(tensors, None, How(), 0.0)[:-1], target, look)
        elif rule in LINEAR:
            factors = LINEAR[rule](tensors, start, how, depth.get(name, 0.0))
            versions = tensors if start is None else [*tensors, start]
            weighted(name, versions, factors[: len(versions)], target, look)
        else:
            selected(rule, name, tensors, start, how, bounds, target, look)
        yield name, target


def weighted(
    name: str, tensors: list[Tensor], factors: Sequence[float], out: Tensor, look: Look
) -> None:
    """Write sum factor_i tensor_i; each product is rounded, then each sum, in the order given.

    look: called with each result and what it was made of, see `require_finite`.
    """
    flat, target, dtype = [x.reshape(-1) for x in tensors], out.view(-1), parts.computed(tensors)
    used = [(x, factor) for x, factor in zip(flat, factors, strict=True) if factor]
    one, size = _one(dtype), BLOCK["linear"]
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
def _one(dtype: torch.dtype) -> Tensor:
    return torch.ones(1, dtype=dtype)


def selected(
    rule: str,
    name: str,
    tensors: list[Tensor],
    base: Tensor,
    how: How,
    bounds: Sequence[cuts.Bounds],
    out: Tensor,
    look: Look,
) -> None:
    """Write theta_0 + the task vector that a rule of `SELECTING` makes of the models'."""
    flat, start, target = [x.reshape(-1) for x in tensors], base.reshape(-1), out.view(-1)
    dtype, size = parts.computed([*tensors, base]), BLOCK["selecting"]
    space = torch.empty(len(flat), min(size, len(target)), dtype=dtype)
    for number, at in enumerate(range(0, len(target), size)):
        origin = start[at : at + size].to(dtype)
        taus = space[:, : len(origin)]
        for tau, x in zip(taus, flat, strict=True):
            torch.sub(x[at : at + size].to(dtype), origin, out=tau)
        look(name, taus, [*flat, start])
        tau = SELECTING[rule](taus, Block(how, bounds, name, number))
        into = target[at : at + size]
        into.copy_(torch.add(origin, tau, out=tau))
        look(name, into, [])


def require_finite(name: str, result: Tensor, sources: Sequence[Tensor]) -> None:
    """`CmpError` unless all entries of a result are finite; sources: what it was made of."""
    if math.isfinite(result.sum().item()) or bool(result.isfinite().all()):
        return
    if all(bool(x.isfinite().all()) for x in sources):
        raise CmpError(f"{name}: the merged weights overflow {result.dtype}; lower the scale")
    raise cuts.NotFinite(name)
