"""Apply merge rules to whole models: state dicts, or any mapping from names to tensors.

Every merge takes the same path: `merge` looks up the rule, checks its settings
(`MergeOptions.make`) and the models (`check_models`), and `iter_merged` merges one tensor at a
time on the device of the newest model. A tensor is merged in blocks that fit the cache, which
allocates almost no memory.

Rules apply to parameters. Other tensors are recognised by type and name. Integers and booleans are
taken from the newest model. Running means and variances are averaged under every rule, with the
models' weights if the rule has some, since selecting entries or adding differences could give
invalid values. `logit_scale` is merged like any parameter.
"""

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cmp.errors import CmpError
from cmp.merging.ranks import magnitude_thresholds
from cmp.merging.rules import (
    KEEP_ALL,
    BlockContext,
    MagnitudeBounds,
    MergeOptions,
    NotFiniteError,
    Weights,
    compute_dtype,
)
from cmp.registry import Option, get_option
from cmp.towers import layer_depth

StateDict = Mapping[str, Tensor]
DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.bool: "BOOL",
}  # fmt: skip
"""Tensor types that can be merged, with their names in files. Integers of 8 and 16 bits are
quantised weights, which a rule would mistake for counters."""
RUNNING_STATISTICS = ("running_mean", "running_var")
"""Name endings of tensors that every rule averages."""
BLOCK_SIZES = {"linear": 1 << 20, "entries": 1 << 16}
"""Entries per block: for "linear" rules, whose sums need little cache per entry, and for rules that
compute with the entries of all models at once."""


@torch.no_grad()
def merge(
    rule: str,
    models: Sequence[StateDict],
    base: StateDict | None = None,
    **settings: Any,
) -> Weights:
    """Merge state dicts with a rule.

    Args:
        rule: A registered rule, such as "ties".
        models: State dicts with the same names and shapes, newest first, all on one device.
        base: The weights before the stream, for rules on task vectors.
        **settings: `weights`, `draw`, and settings of `cmp.Merging` that the rule reads for each
            tensor, such as `density`.

    Returns:
        New tensors by name, with the newest model's types. The arguments are not changed.

    Raises:
        CmpError: The rule cannot merge these models (see `check_models`), a setting is invalid or
            not read by the rule, or an entry is not finite.

    Example:
        >>> zero, a, b = ({"w": torch.tensor([x, 1.0])} for x in (0.0, 4.0, -2.0))
        >>> cmp.merge("ties", [a, b], base=zero, density=0.5)["w"]
        tensor([4., 1.])
    """
    option = get_option("merge_rule", rule)
    options = MergeOptions.make(option, len(models), **settings)
    check_models(option, models, base)
    everything = [*models, *([] if base is None else [base])]
    with name_faulty_model(zip(_labels(models), everything, strict=False)):
        return dict(iter_merged(option, models, base, options))


def _labels(models: Sequence[Any]) -> list[str]:
    """Return what errors call the models and, last, the base."""
    return [f"model {number}" for number in range(1, len(models) + 1)] + ["base"]


@contextlib.contextmanager
def name_faulty_model(models: Iterable[tuple[object, StateDict]]) -> Iterator[None]:
    """Begin an error about a tensor that is not finite with the label of its model.

    Args:
        models: (label, model) of all models and the base.
    """
    try:
        yield
    except NotFiniteError as error:
        for label, model in models:
            if not model[error.name].isfinite().all():
                raise CmpError(f"{label}: {error}") from error
        raise


def check_models(
    rule: Option, models: Sequence[Any], base: Any = None, labels: Sequence[str] = ()
) -> None:
    """Check that a rule can merge the given models.

    Args:
        rule: The rule.
        models: The models, newest first; for files, their outlines.
        base: The weights before the stream.
        labels: The names of the models and, last, the base in error messages.

    Raises:
        CmpError: The rule does not take this number of models, the base is missing or not needed, a
            model is not a state dict with values of a supported type, or tensors differ in name,
            shape or kind of number.
    """
    wanted = rule.facts["count"]
    if not models or (wanted and len(models) != wanted):
        expected = f"exactly {wanted}" if wanted else "at least 1"
        raise CmpError(f"{rule.name}: merges {expected}, but got {len(models)} models")
    if (base is None) == rule.facts["base"]:
        wants = "needs a base, the weights before the stream: --base FILE, or base= in Python"
        raise CmpError(f"{rule.name}: {wants if base is None else 'takes no base; leave it out'}")
    everything = [*models, *([] if base is None else [base])]
    names = labels or _labels(models)
    for label, model in zip(names, everything, strict=False):
        if not isinstance(model, Mapping):
            raise CmpError(
                f"merge: {label}: a {type(model).__name__} is not a state dict; give its "
                "state_dict(), or use cmp.merge_files for files"
            )
        for name, x in model.items():
            if not isinstance(x, Tensor):
                raise CmpError(
                    f"merge: {label}: {name}: a {type(x).__name__} is not a tensor; convert it"
                )
            if x.dtype not in DTYPE_NAMES:
                raise CmpError(
                    f"merge: {label}: {name}: {x.dtype} is not supported; convert it to float32"
                )
        if model is not everything[0]:
            check_same_tensors(names[0], everything[0], label, model)


def check_same_tensors(first: str, one: StateDict, second: str, other: StateDict) -> None:
    """Check that two models have tensors with the same names, shapes and kinds of number.

    Raises:
        CmpError: They differ; the message names the tensor and both models.
    """
    if different := sorted(one.keys() ^ other.keys()):
        for label, fused, split in ((first, one, other), (second, other, one)):
            if any(name.replace("in_proj_", "q_proj.") in split for name in fused.keys() - split):
                raise CmpError(
                    f"the attention of {label} is fused, so it has in_proj_weight where the other "
                    "model has q_proj.weight, k_proj.weight and v_proj.weight; apply "
                    "cmp.models.split_attention to its network first"
                )
        name = different[0]
        has, lacks = (first, second) if name in one else (second, first)
        raise CmpError(
            f"{name}: in {has} but not in {lacks}; {len(different)} tensors differ, so these are "
            "different kinds of model"
        )
    for name, x in one.items():
        y = other[name]
        if x.shape != y.shape:
            raise CmpError(
                f"{name}: shape {list(x.shape)} in {first}, but {list(y.shape)} in {second}"
            )
        if x.is_floating_point() != y.is_floating_point():
            raise CmpError(f"{name}: {x.dtype} in {first}, but {y.dtype} in {second}")


def iter_merged(
    rule: Option,
    models: Sequence[StateDict],
    base: StateDict | None,
    options: MergeOptions,
    finite: bool = False,
    outline: StateDict | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, merged tensor) one at a time, without keeping them.

    A rule that keeps the norm must merge the task vectors of all tensors before it can scale the
    first one, so these stay in memory until then.

    Args:
        rule: The rule.
        models: The models, already checked, newest first.
        base: The weights before the stream, for rules on task vectors.
        options: The rule's settings.
        finite: Whether all entries are known to be finite. If not, they are checked.
        outline: Tensors with the models' names, shapes and types, whose values are not read, for
            models whose own tensors are slow to load.
    """
    shapes = models[0] if outline is None else outline
    parameters = {
        name: x
        for name, x in shapes.items()
        if x.is_floating_point() and not name.endswith(RUNNING_STATISTICS)
    }
    bounds: Sequence[MagnitudeBounds] = [KEEP_ALL] * len(models)
    if rule.facts["trims"] and base is not None:
        top = options.outliers if "outliers" in rule.settings else 0.0
        bounds = magnitude_thresholds(models, base, parameters, options.density, top)
    depth = layer_depth(tuple(parameters)) if rule.facts["linear"] else {}
    shares = statistics_shares(rule, options, len(models))
    task_vectors: Weights = {}
    if rule.facts["keeps_norm"] and base is not None:
        task_vectors = merge_task_vectors(rule, models, base, parameters, options, finite)
    for name in shapes:
        tensors = [model[name] for model in models]
        newest, start = tensors[0], base[name] if base is not None and name in parameters else None
        target = newest.new_empty(newest.shape)
        dtype = compute_dtype(tensors if start is None else [*tensors, start])
        versions = Versions(name, tensors, start, target, dtype, finite)
        if not newest.is_floating_point():
            target.copy_(newest)
        elif name not in parameters:
            write_weighted_sum(versions, shares)
        elif rule.facts["linear"]:
            factors = rule.value(tensors, start, options, depth.get(name, 0.0))
            _check_result(rule, f"{len(tensors)} factors", f"{len(factors)} factors")
            write_weighted_sum(versions, factors)
        elif rule.facts["keeps_norm"]:
            versions.write(task_vectors.pop(name))
        elif rule.facts["matrix"]:
            block = BlockContext(options, bounds, name, 0)
            versions.write(_merge_block(rule, versions.stack(), block))
        else:
            write_entries(rule, versions, options, bounds)
        yield name, target


def statistics_shares(rule: Option, options: MergeOptions, count: int) -> list[float]:
    """Return each model's share of the merged statistics of batch norm.

    They are the models' weights if the rule has some. Otherwise, and where a negative weight could
    make a variance negative, the statistics are a plain mean.
    """
    has_weights = options.weights is not None or "weight" in rule.settings
    weights = options.weights_of(count) if has_weights else []
    return weights if weights and min(weights) >= 0 else [1 / count] * count


@dataclass(frozen=True)
class Versions:
    """One tensor in all of its versions.

    Attributes:
        name: The tensor's name.
        models: The versions in the models, newest first.
        base: The version before the stream, if task vectors are merged.
        out: The tensor to write the result into.
        dtype: The type to merge in.
        finite: Whether all entries are known to be finite.
    """

    name: str
    models: list[Tensor]
    base: Tensor | None
    out: Tensor
    dtype: torch.dtype
    finite: bool

    def stack(self) -> Tensor:
        """Return the models' tensors, or their task vectors if there is a base, [models, *shape].

        Raises:
            NotFiniteError: A source contains NaN or infinity.
        """
        entries = torch.stack([x.to(self.dtype) for x in self.models])
        if self.base is not None:
            entries -= self.base.to(self.dtype)
        self.check(entries)
        return entries

    def write(self, merged: Tensor) -> None:
        """Write a merged tensor, added to theta_0 if there is one."""
        self.out.copy_(merged if self.base is None else merged.add_(self.base))
        self.check(self.out)

    def check(self, result: Tensor) -> None:
        """Check that all entries of a result and of its sources are finite.

        Raises:
            NotFiniteError: A source contains NaN or infinity.
            CmpError: The sources are finite, but the result overflows.
        """
        if self.finite or math.isfinite(result.sum().item()) or bool(result.isfinite().all()):
            return
        sources = self.models if self.base is None else [*self.models, self.base]
        if all(bool(x.isfinite().all()) for x in sources):
            raise CmpError(
                f"{self.name}: the merged weights overflow {result.dtype}; lower the scale"
            )
        raise NotFiniteError(self.name)


def write_weighted_sum(versions: Versions, factors: Sequence[float]) -> None:
    """Write sum_i factor_i tensor_i, or base + sum_i factor_i (tensor_i - base).

    Differences are summed before the base is added, since they are small compared with it.

    Args:
        versions: The tensor.
        factors: One per model.
    """
    target, start = versions.out.view(-1), versions.base
    start = None if start is None else start.reshape(-1)
    pairs = [(x.reshape(-1), factor) for x, factor in zip(versions.models, factors, strict=True)]
    used = [(x, factor) for x, factor in pairs if factor]
    one, size = target.new_ones(1, dtype=versions.dtype), BLOCK_SIZES["linear"]
    space = target.new_empty(0 if start is None else size, dtype=versions.dtype)
    for at in range(0, len(target), size):
        into = target[at : at + size]
        sums = into if into.dtype == one.dtype else torch.empty_like(into, dtype=one.dtype)
        blocks = [(x[at : at + size].to(one.dtype), factor) for x, factor in used]
        if start is not None:
            origin, moved = start[at : at + size].to(one.dtype), space[: len(into)]
            sums.zero_()
            for block, factor in blocks:
                sums.add_(torch.sub(block, origin, out=moved), alpha=factor)
            sums.add_(origin)
        elif len(blocks) > 1:  # two at once, since memory bandwidth is the bottleneck
            (x, beta), (y, alpha), *others = blocks
            torch.addr(x[None], one, y, beta=beta, alpha=alpha, out=sums[None])
            for block, factor in others:
                sums.add_(block, alpha=factor)
        else:
            torch.mul(*blocks[0], out=sums) if blocks else sums.zero_()
        if sums is not into:
            into.copy_(sums)
        versions.check(into)
    for x, factor in pairs:
        if not factor:
            versions.check(x)


def write_entries(
    rule: Option, versions: Versions, options: MergeOptions, bounds: Sequence[MagnitudeBounds]
) -> None:
    """Merge one tensor entry by entry and write it, added to theta_0 if there is one."""
    target, start, size = versions.out.view(-1), versions.base, BLOCK_SIZES["entries"]
    start = None if start is None else start.reshape(-1)
    models = [x.reshape(-1) for x in versions.models]
    shape = len(models), min(size, len(target))
    space = target.new_empty(shape, dtype=versions.dtype)
    for number, at in enumerate(range(0, len(target), size)):
        into = target[at : at + size]
        entries = space[:, : len(into)]
        origin = None if start is None else start[at : at + size].to(space.dtype)
        for row, x in zip(entries, models, strict=True):
            block = x[at : at + size].to(space.dtype)
            row.copy_(block) if origin is None else torch.sub(block, origin, out=row)
        versions.check(entries)
        block = BlockContext(options, bounds, versions.name, number)
        merged = _merge_block(rule, entries, block)
        into.copy_(merged if origin is None else torch.add(origin, merged, out=merged))
        versions.check(into)


def _merge_block(rule: Option, entries: Tensor, block: BlockContext) -> Tensor:
    merged = rule.value(entries, block)
    _check_result(rule, f"shape {[*entries.shape[1:]]}", f"shape {[*merged.shape]}")
    return merged


def _check_result(rule: Option, expected: str, returned: str) -> None:
    if returned != expected:
        raise CmpError(f"merge_rule {rule.name!r}: returned {returned}, but must return {expected}")


def merge_task_vectors(
    rule: Option,
    models: Sequence[StateDict],
    base: StateDict,
    parameters: StateDict,
    options: MergeOptions,
    finite: bool,
) -> Weights:
    """Return the merged task vectors of all parameters, scaled as one.

    Args:
        rule: A rule that keeps the norm.
        models: The models, newest first.
        base: The weights before the stream.
        parameters: Tensors with the names and shapes of those to merge.
        options: The rule's settings.
        finite: Whether all entries are known to be finite.

    Returns:
        By name. Their norm is `scale` times the mean norm of the models' task vectors.
    """
    squares, merged_square, merged = [0.0] * len(models), 0.0, {}
    for name in parameters:
        tensors = [model[name] for model in models]
        dtype = compute_dtype([*tensors, base[name]])
        entries = Versions(name, tensors, base[name], tensors[0], dtype, finite).stack()
        for number, tau in enumerate(entries):
            squares[number] += square_norm(tau)
        block = BlockContext(options, [KEEP_ALL] * len(models), name, 0)
        merged[name] = _merge_block(rule, entries, block)
        merged_square += square_norm(merged[name])
    mean = sum(math.sqrt(square) for square in squares) / len(models)
    factor = (options.scale or 1.0) * mean / math.sqrt(merged_square) if merged_square else 1.0
    return {name: x.mul_(factor) for name, x in merged.items()}


def square_norm(x: Tensor) -> float:
    """Return the sum of squares, in fp64."""
    return torch.linalg.vector_norm(x, dtype=torch.float64).item() ** 2
