"""Rules applied to whole models: state dicts, or anything that gives tensors by name.

Tensor by tensor, and each in blocks that stay in the cache, so that next to nothing is allocated;
everything happens on the device of the newest model's tensors. Tensors that are no parameters are
recognised by their type and name: integers and booleans are the newest model's; running means and
variances are averaged, whatever the rule, since choosing among them or adding up their differences
may leave the range that they can have. `logit_scale` is merged like any parameter.
"""

import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cmp import config
from cmp.errors import CmpError
from cmp.merging import rules
from cmp.merging.rules import BlockContext, Draw, MagnitudeBounds, MergeOptions, Weights
from cmp.registry import Option, get_option, option_names

StateDict = Mapping[str, Tensor]
BLOCK_SIZES = {"linear": 1 << 20, "entries": 1 << 16}
"""Entries that are merged together: by the bytes that a rule needs of each in the cache."""
THRESHOLD_BLOCK = 1 << 16
"""Entries of a task vector that are looked at together, so that they stay in the cache."""
THRESHOLD_SAMPLE = 1 << 20
"""About how many entries tell where a rank must be."""
KEEP_ALL = MagnitudeBounds(0.0, math.inf)
BlockIterator = Callable[[], Iterator[tuple[int, np.ndarray]]]


class NotFiniteError(CmpError):
    """A tensor of a model holds NaN or infinity.

    Attributes:
        name: The tensor's name.
    """

    def __init__(self, name: str):
        super().__init__(f"{name}: holds NaN or infinite values; mend that model first")
        self.name = name


def merge(
    rule: str,
    models: Sequence[StateDict],
    base: StateDict | None = None,
    out: Weights | None = None,
    **settings: Any,
) -> Weights:
    """Merge state dicts by a rule.

    Args:
        rule: A registered rule, such as "ties".
        models: State dicts with equal names and shapes, newest first, on any one device.
        base: The weights before the stream, for rules on task vectors.
        out: Tensors to write the result into, not shared with the arguments.
        **settings: `weights`, `draw`, and those of `cmp.merging.rules.MERGE_SETTINGS` that the
            rule reads, such as `density`.

    Returns:
        New tensors by name, of the newest model's types; the arguments are not changed.

    Raises:
        CmpError: The rule cannot merge these, see `check_state_dicts` and `check_mergeable`, a
            setting is impossible or of other rules, or an entry is not finite.

    Example:
        >>> zero, a, b = ({"w": torch.tensor([x, 1.0])} for x in (0.0, 4.0, -2.0))
        >>> cmp.merge("ties", [a, b], base=zero, density=0.5)["w"]
        tensor([4., 1.])
    """
    option, options = get_option("merge_rule", rule), parse_options(rule, **settings)
    check_state_dicts(models, base)
    check_mergeable(option, models, base, options)
    return dict(iter_merged(option, models, base, options, out))


def check_state_dicts(models: Sequence[Any], base: Any = None) -> None:
    """Check that what is to be merged are state dicts, with values.

    Raises:
        CmpError: One is something else, such as the path of a file, or has tensors without values.
    """
    for number, model in enumerate([*models, *([] if base is None else [base])], 1):
        label = f"merge: model {number}" if number <= len(models) else "merge: base"
        if not isinstance(model, Mapping):
            words = "give its state_dict(), or use cmp.merge_files for files"
            raise CmpError(f"{label}: a {type(model).__name__} is no state dict; {words}")
        for name, x in model.items():
            if not isinstance(x, Tensor):
                raise CmpError(f"{label}: {name}: a {type(x).__name__} is no tensor; convert it")
            if x.is_meta:
                raise CmpError(f"{label}: {name}: on the meta device it has no values; load them")


def parse_options(
    rule: str, weights: Sequence[float] | None = None, draw: Draw = (0,), **settings: Any
) -> MergeOptions:
    """Return the options of a merge, checked as a run's config is.

    Args:
        rule: A registered rule.
        weights: One per model, newest first; equal ones where None.
        draw: Seed and counters of rules that draw at random.
        **settings: Those of `cmp.merging.rules.MERGE_SETTINGS` that the rule reads.

    Raises:
        CmpError: A value is impossible, or the rule does not read the key.
    """
    own = {"weights": weights and tuple(weights), "draw": draw}
    if not settings:  # a merge in a loop needs no parsing
        return MergeOptions(**own)
    read = get_option("merge_rule", rule).settings
    known = [*["weights"] * ("weight" in read), *filter(read.__contains__, rules.MERGE_SETTINGS)]
    if unread := [key for key in settings if key not in known]:
        advice = "; give weights=(0.9, 0.1): one per model, newest first" * ("weight" in read)
        takes = ", ".join(known) or "no settings"
        raise CmpError(f"merge: {rule!r} takes {takes}, not {unread[0]!r}{advice}")
    section = config.parse({"merging": {"policy": "ema", "rule": rule} | settings}, "merge").merging
    return rules.options_of(section, **own)


def check_mergeable(
    rule: Option,
    models: Sequence[StateDict],
    base: StateDict | None,
    options: MergeOptions,
    labels: Sequence[str] = (),
) -> None:
    """Check that a rule can merge some models.

    Args:
        rule: The rule.
        models: The models, newest first.
        base: The weights before the stream.
        options: The rule's settings.
        labels: What errors call the models and, last, the base.

    Raises:
        CmpError: Their number, weights, base, tensor names or shapes do not fit.
    """
    wanted = rule.facts["count"]
    if not models or (wanted and len(models) != wanted):
        expected = f"exactly {wanted}" if wanted else "at least 1"
        raise CmpError(f"{rule.name}: {len(models)} models given; it merges {expected}")
    if (base is None) == rule.facts["base"]:
        wants = "needs a base, the weights before the stream: --base FILE, or base= in Python"
        raise CmpError(f"{rule.name}: {wants if base is None else 'takes no base'}")
    check_merge_weights(rule, len(models), options.weights)
    everything = [outline(each) for each in (*models, *([] if base is None else [base]))]
    names = labels or [f"model {number}" for number in range(1, len(models) + 1)] + ["base"]
    for label, other in zip(names[1:], everything[1:], strict=False):
        check_same_tensors(names[0], everything[0], label, other)


def check_merge_weights(rule: Option, count: int, weights: Sequence[float] | None) -> None:
    """Check the weights of `count` models.

    Raises:
        CmpError: The rule takes none, or they do not match the models or sum to 1.
    """
    if weights is None:
        return
    text = ", ".join(f"{weight:g}" for weight in weights)
    if "weight" not in rule.settings:
        users = ", ".join(option_names("merge_rule", "weight"))
        raise CmpError(f"weights {text}: {rule.name!r} has none, only {users}")
    if len(weights) != count:
        raise CmpError(f"weights {text}: {len(weights)} of them for {count} models")
    if not abs(sum(weights) - 1) <= 1e-6:  # also true of NaN
        raise CmpError(f"weights {text}: must sum to 1, not {sum(weights):g}")
    if rule.facts["count"] == 2 and min(weights) < 0:
        raise CmpError(
            f"weights {text}: {rule.name!r} goes from one model to the other, not beyond"
        )


def check_same_tensors(first: str, one: StateDict, second: str, other: StateDict) -> None:
    """Check that two models have tensors of the same names, shapes and kinds of number.

    Raises:
        CmpError: It names the tensor and both models.
    """
    if different := sorted(one.keys() ^ other.keys()):
        name = different[0]
        has, lacks = (first, second) if name in one else (second, first)
        raise CmpError(
            f"{name}: {has} has it, {lacks} has not; {len(different)} tensors differ, so these are "
            "not models of one kind"
        )
    for name, x in one.items():
        y = other[name]
        if x.shape != y.shape:
            raise CmpError(f"{name}: shape {list(x.shape)} in {first}, {list(y.shape)} in {second}")
        if x.is_floating_point() != y.is_floating_point():
            raise CmpError(f"{name}: {x.dtype} in {first}, {y.dtype} in {second}")


def outline(model: StateDict) -> StateDict:
    """Return a model of which names, shapes and types count: of a file, tensors without values, as
    each look at a value reads it."""
    return getattr(model, "outline", model)


def is_mergeable(name: str, x: Tensor) -> bool:
    """Return whether a rule applies to a tensor, which it does to parameters."""
    return x.is_floating_point() and not name.endswith(("running_mean", "running_var"))


def iter_merged(
    rule: Option,
    models: Sequence[StateDict],
    base: StateDict | None,
    options: MergeOptions,
    out: Weights | None = None,
    finite: bool = False,
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, merged tensor) one by one; nothing is kept.

    Takes the arguments of `merge`, for models that were checked; `finite` says that all entries are
    known to be finite, which is checked otherwise.
    """
    parameters = [name for name, x in outline(models[0]).items() if is_mergeable(name, x)]
    bounds: Sequence[MagnitudeBounds] = [KEEP_ALL] * len(models)
    if rule.facts["trims"] and base is not None:
        top = options.outliers if "outliers" in rule.settings else 0.0
        bounds = magnitude_thresholds(models, base, parameters, options.density, top)
    depth = layer_depth(tuple(parameters)) if rule.facts["linear"] else {}
    for name in models[0]:
        tensors = [model[name] for model in models]
        newest, is_parameter = tensors[0], is_mergeable(name, tensors[0])
        start = base[name] if base is not None and is_parameter else None
        target = out[name] if out else newest.new_empty(newest.shape)
        versions = TensorVersions(name, tensors, start, target, finite)
        if not newest.is_floating_point():
            target.copy_(newest)
        elif not is_parameter:
            write_weighted_sum(versions, MergeOptions().weights_of(len(tensors)))
        elif rule.facts["linear"]:
            factors = rule.value(tensors, start, options, depth.get(name, 0.0))
            write_weighted_sum(versions, factors)
        else:
            write_entries(rule, versions, options, bounds)
        yield name, target


class TensorVersions:
    """One tensor of all models, as vectors.

    Attributes:
        name: Its name.
        models: Its versions in the models.
        base: That before the stream, where task vectors are merged.
        out: Where the result goes.
        sources: What it is made of: `models`, and `base` if there is one.
        kind: The type and device that they are merged in.
        finite: Whether all entries are known to be finite.
    """

    def __init__(
        self, name: str, models: list[Tensor], base: Tensor | None, out: Tensor, finite: bool
    ):
        self.name, self.out, self.finite = name, out.view(-1), finite
        self.models = [x.reshape(-1) for x in models]
        self.base = None if base is None else base.reshape(-1)
        self.sources = self.models if self.base is None else [*self.models, self.base]
        self.kind: Any = {"dtype": rules.compute_dtype(self.sources), "device": out.device}

    def check(self, result: Tensor) -> None:
        """Check that all entries of a result, or of a source, are finite.

        Raises:
            NotFiniteError: A source holds NaN or infinity.
            CmpError: The sources are finite and the result overflows.
        """
        if self.finite or math.isfinite(result.sum().item()) or bool(result.isfinite().all()):
            return
        if all(bool(x.isfinite().all()) for x in self.sources):
            raise CmpError(
                f"{self.name}: the merged weights overflow {result.dtype}; lower the scale"
            )
        raise NotFiniteError(self.name)


def write_weighted_sum(versions: TensorVersions, factors: Sequence[float]) -> None:
    """Write sum_i factor_i tensor_i, or base + sum_i factor_i (tensor_i - base).

    Differences are added up before the base is, since they are small beside it.

    Args:
        versions: The tensor.
        factors: One per model.
    """
    target, start = versions.out, versions.base
    used = [(x, factor) for x, factor in zip(versions.models, factors, strict=True) if factor]
    one, size = torch.ones(1, **versions.kind), BLOCK_SIZES["linear"]
    space = torch.empty(0 if start is None else size, **versions.kind)
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
        elif len(blocks) > 1:  # two at once, since a pass over the memory is what takes time
            (x, beta), (y, alpha), *others = blocks
            torch.addr(x[None], one, y, beta=beta, alpha=alpha, out=sums[None])
            for block, factor in others:
                sums.add_(block, alpha=factor)
        else:
            torch.mul(*blocks[0], out=sums) if blocks else sums.zero_()
        if sums is not into:
            into.copy_(sums)
        versions.check(into)
    for x, factor in zip(versions.models, factors, strict=True):
        if not factor:
            versions.check(x)


def write_entries(
    rule: Option, versions: TensorVersions, options: MergeOptions, bounds: Sequence[MagnitudeBounds]
) -> None:
    """Write what a rule makes of the entries of one tensor, on top of theta_0 if there is one."""
    target, start, size = versions.out, versions.base, BLOCK_SIZES["entries"]
    space = torch.empty(len(versions.models), min(size, len(target)), **versions.kind)
    for number, at in enumerate(range(0, len(target), size)):
        into = target[at : at + size]
        entries = space[:, : len(into)]
        origin = None if start is None else start[at : at + size].to(space.dtype)
        for row, x in zip(entries, versions.models, strict=True):
            block = x[at : at + size].to(space.dtype)
            row.copy_(block) if origin is None else torch.sub(block, origin, out=row)
        versions.check(entries)
        merged = rule.value(entries, BlockContext(options, bounds, versions.name, number))
        into.copy_(merged if origin is None else torch.add(origin, merged, out=merged))
        versions.check(into)


def magnitude_thresholds(
    models: Sequence[StateDict],
    base: StateDict,
    names: Sequence[str],
    density: float,
    outliers: float = 0.0,
) -> list[MagnitudeBounds]:
    """Return what to keep of each task vector as a whole, by the exact rank of its magnitudes.

    Args:
        models: The weights after training.
        base: The weights before.
        names: The tensors that count.
        density: The part of all entries that is kept, at least one entry and those that are as
            large as the smallest of them.
        outliers: The part that is dropped at the top before.

    Raises:
        NotFiniteError: An entry is NaN or infinite.
    """
    sizes = {name: outline(base)[name].numel() for name in names}
    names, count = [name for name in names if sizes[name]], sum(sizes.values())
    top = round(outliers * count)
    bottom = count - top - max(1, round(density * count))
    if count == 0 or (bottom <= 0 and top == 0):
        return [KEEP_ALL] * len(models)
    ranks = {"least": bottom} if bottom > 0 else {}
    ranks |= {"most": count - top - 1} if top else {}
    bounds = []
    for entries in _entries_of_ranks(models, base, names, [*ranks.values()], count):
        found = dict(zip(ranks, entries, strict=True))
        least, most = found.get("least"), found.get("most")
        below = 0.0 if least is None else float(np.nextafter(least, least.dtype.type(0)))
        bounds.append(MagnitudeBounds(below, KEEP_ALL.most if most is None else float(most)))
    return bounds


def _entries_of_ranks(
    models: Sequence[StateDict],
    base: StateDict,
    names: Sequence[str],
    ranks: Sequence[int],
    count: int,
) -> list[list[np.floating]]:
    """Return the entries of some ranks of each task vector's magnitudes, of which there are `count`
    each. Every tensor is read twice at most, the base's too."""

    def blocks(stride: int = 1) -> Iterator[tuple[int, Tensor]]:
        for name in names:
            start = base[name].reshape(-1)[::stride].contiguous()
            for number, model in enumerate(models):
                end = model[name].reshape(-1)[::stride].contiguous()
                yield from ((number, block) for block in _magnitudes(name, end, start))

    if outline(models[0])[names[0]].device.type != "cpu":
        whole: list[list[Tensor]] = [[] for _ in models]
        for number, block in blocks():
            whole[number].append(block.clone())
        vectors = [torch.cat(each) for each in whole]
        return [[x.kthvalue(r + 1).values.cpu().view(1).numpy()[0] for r in ranks] for x in vectors]
    # on a CPU numpy compares, counts and sorts several times as fast as torch
    stride = max(1, count // THRESHOLD_SAMPLE)
    parts: list[list[np.ndarray]] = [[] for _ in models]
    for number, block in blocks(stride):
        parts[number].append(block.numpy().copy())
    samples = [np.sort(np.concatenate(each)) for each in parts]
    if stride == 1:
        return [[sample[rank] for rank in ranks] for sample in samples]
    return select_ranks(lambda: ((n, x.numpy()) for n, x in blocks()), ranks, count, samples)


def _magnitudes(name: str, one: Tensor, other: Tensor) -> Iterator[Tensor]:
    """Yield |one - other| in blocks, in fp32 at least; a block is overwritten by the next."""
    dtype, size = rules.compute_dtype([one, other]), THRESHOLD_BLOCK
    out = torch.empty(min(size, one.numel()), dtype=dtype, device=one.device)
    for at in range(0, one.numel(), size):
        block = out[: min(size, one.numel() - at)]
        torch.sub(one[at : at + size].to(dtype), other[at : at + size].to(dtype), out=block)
        if not math.isfinite(block.abs_().sum().item()) and not block.isfinite().all():
            raise NotFiniteError(name)
        yield block


def select_ranks(
    blocks: BlockIterator, ranks: Sequence[int], count: int, samples: Sequence[np.ndarray]
) -> list[list[np.floating]]:
    """Return, of each vector, the entries that as many come before in ascending order as `ranks`
    say, exactly.

    Args:
        blocks: Goes through all entries of all vectors, as (number of the vector, entries).
        ranks: The ranks, from 0.
        count: How many entries each vector has.
        samples: Some of each vector's, sorted. They bracket a rank by eight standard errors; what
            lies within the bracket is selected from, or everything where the bracket missed.
    """
    brackets = [
        [Bracket(rank, *_sampled_range(x, rank / count)) for rank in ranks] for x in samples
    ]
    for number, block in blocks():
        for bracket in brackets[number]:
            bracket.add(block)
    missed = [[bracket.reset() for bracket in each if bracket.has_missed()] for each in brackets]
    if any(missed):
        for number, block in blocks():
            for bracket in missed[number]:
                bracket.add(block)
    return [[bracket.entry() for bracket in each] for each in brackets]


def _sampled_range(sample: np.ndarray, share: float) -> tuple[float, float]:
    """Return two numbers between which a vector very likely has the entry at a share of its ranks,
    as a sorted sample of it says."""
    place = share * len(sample)
    margin = 4 * (len(sample) * share * (1 - share)) ** 0.5 + 2
    first, last = int(place - margin), int(place + margin) + 1
    low = sample[first] if first > 0 else -np.inf
    return low, sample[last] if last < len(sample) else np.inf


@dataclass
class Bracket:
    """The search for the entry of a rank among those of a vector that lie between two numbers.

    Attributes:
        rank: The rank, from 0.
        low: What the entry is at least, if the bracket does not miss it.
        high: What it is at most.
        before: How many entries of those so far are lower.
        within: Those that are not, and not higher.
    """

    rank: int
    low: float
    high: float
    before: int = 0
    within: list[np.ndarray] = field(default_factory=list)

    def add(self, block: np.ndarray) -> None:
        """Look at further entries."""
        above = block >= self.low
        self.before += int(block.size - np.count_nonzero(above))
        self.within.append(block[np.flatnonzero(above & (block <= self.high))])

    def has_missed(self) -> bool:
        """Return whether the entry lies elsewhere, when all have been looked at."""
        return not self.before <= self.rank < self.before + sum(map(len, self.within))

    def reset(self) -> "Bracket":
        """Look for the entry among all, from the beginning."""
        self.low, self.high, self.before, self.within = -np.inf, np.inf, 0, []
        return self

    def entry(self) -> np.floating:
        """Return the entry."""
        place = self.rank - self.before
        return np.partition(np.concatenate(self.within), place)[place]


_BLOCK_NUMBER = re.compile(r"(.*?)\.(\d+(?:\.\d+)*)\.")
"""The first run of numbers in a name: what is numbered, and which one of it."""


@functools.lru_cache(maxsize=8)
def layer_depth(names: tuple[str, ...]) -> dict[str, float]:
    """Return each parameter's depth l / (L - 1) among the L blocks of its tower, from 0 to 1.

    The blocks of a tower are what it has the most of, in the order of their numbers: of
    "visual.trunk.stages.1.0.weight" the stack is "visual.trunk.stages", the number (1, 0). ResNets'
    "layer1" counts as number 1 of "layer". All else, such as stem, embeddings and projections, has
    depth 0.
    """
    depth = dict.fromkeys(names, 0.0)
    towers: dict[bool, dict[str, dict[str, tuple[int, ...]]]] = {True: {}, False: {}}
    for name in depth:
        if match := _BLOCK_NUMBER.match(re.sub(r"\blayer(?=\d)", "layer.", name)):
            stack = towers[name.startswith("visual.")].setdefault(match[1], {})
            stack[name] = tuple(map(int, match[2].split(".")))
    for stacks in towers.values():
        ordered = [stacks[stack] for stack in sorted(stacks)]
        numbers = max(ordered, key=lambda stack: len(set(stack.values())), default={})
        blocks = sorted(set(numbers.values()))
        for name, number in numbers.items():
            depth[name] = blocks.index(number) / max(len(blocks) - 1, 1)
    return depth
