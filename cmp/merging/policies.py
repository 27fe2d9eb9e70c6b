"""Choose the weights that the next task starts from, and those that are deployed and scored.

A policy is a function of a `TaskEnd` that returns `MergedWeights`. The package's own policies are
pairs of choices: what the next task starts from, and what is deployed. Weights are on the CPU,
except for a per-step average, which is on the network's device. They are merged on that device, one
tensor at a time, beside one whole task vector for a rule that trims.
"""

import math
from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cmp.config import Merging
from cmp.errors import CmpError
from cmp.merging.apply import check_models, iter_merged
from cmp.merging.rules import MergeOptions, Weights, merge_weights
from cmp.registry import Option, get_option, register

Memory = dict[str, Weights]


class MergedWeights(NamedTuple):
    """The weights that a policy chose.

    Attributes:
        memory: What the policy remembers for later tasks.
        start: The weights that the next task starts from.
        deployed: The weights that are scored, possibly the same. Neither may be changed.

    Example:
        >>> @cmp.register("merge_policy", "keep-zero")
        ... def keep_zero(end):
        ...     return cmp.MergedWeights(end.memory, end.trained, end.memory["zero"])
    """

    memory: Memory
    start: Weights
    deployed: Weights


@dataclass(frozen=True)
class TaskEnd:
    """The state of a run at the end of a task.

    Attributes:
        merging: The config section.
        memory: What the policy remembers, including "zero", the weights before the stream.
        trained: The weights at the end of the task.
        done: The number of completed tasks, at least one.
        seed: The seed for rules with random draws, which also depend on `done` and the choice's
            name.
        device: The device to merge models on.

    Example:
        >>> @cmp.register("merge_policy", "halfway", merges=("two",))
        ... def halfway(end):
        ...     middle = end.merge_pair(end.trained, end.memory["zero"], "halfway")
        ...     return cmp.MergedWeights(end.memory, end.trained, middle)
    """

    merging: Merging
    memory: Memory
    trained: Weights
    done: int
    seed: int
    device: torch.device | str = "cpu"

    @property
    def rule(self) -> Option:
        """The merge rule of the config."""
        return get_option("merge_rule", self.merging.rule)

    def merge(self, models: list[Weights], choice: str, **changed: Any) -> Weights:
        """Merge models with the config's rule.

        Args:
            models: The models, newest first.
            choice: The purpose of the merge; different choices have different random draws.
            **changed: Settings of `cmp.merge` that differ from the config's.

        Raises:
            CmpError: The rule cannot merge these models, does not read a setting, or a setting is
                invalid.
        """
        changed = {"draw": (self.seed, self.done, choice)} | changed
        options = MergeOptions.make(self.rule, len(models), self.merging, **changed)
        return _merge_by(self, self.rule, models, options)

    def merge_pair(self, newer: Weights, older: Weights, choice: str) -> Weights:
        """Merge two models, giving `merging.weight` to the newer one."""
        weight = self.merging.weight
        weights = (weight, 1 - weight) if "weight" in self.rule.settings else None
        return self.merge([newer, older], choice, weights=weights)


def _merge_by(end: TaskEnd, rule: Option, models: list[Weights], options: MergeOptions) -> Weights:
    """Merge models on the device one tensor at a time; the models and the result are on the CPU."""
    base = end.memory["zero"] if rule.facts["base"] else None
    check_models(rule, models, base)
    moved = [MovedWeights(model, end.device) for model in models]
    start = MovedWeights(base, end.device) if base else None
    outline = {
        name: torch.empty((), dtype=x.dtype, device=end.device).expand(x.shape)
        for name, x in models[0].items()
    }
    merged = iter_merged(rule, moved, start, options, finite=True, outline=outline)
    return {name: x.cpu() for name, x in merged}


class MovedWeights(UserDict[str, Tensor]):
    """Weights whose tensors are copied to a device when they are accessed."""

    def __init__(self, weights: Weights, device: torch.device | str):
        super().__init__(weights)
        self.device = device

    def __getitem__(self, name: str) -> Tensor:
        return self.data[name].to(self.device)


ChoiceOutput = tuple[Memory, Weights]
"""What a choice adds to the memory, and the chosen weights."""


def patched_weights(end: TaskEnd) -> ChoiceOutput:
    """Choose f(theta_t, theta_0): the task's weights merged with those from before the stream."""
    return {}, end.merge_pair(end.trained, end.memory["zero"], "patched")


def running_average(end: TaskEnd) -> ChoiceOutput:
    """Choose m_t = f(theta_t, m_{t-1}), starting from m_0 = theta_0, in constant memory."""
    before = end.memory.get("average", end.memory["zero"])
    average = end.merge_pair(end.trained, before, "average")
    return {"average": average}, average


def unrolled_average(end: TaskEnd) -> ChoiceOutput:
    """Choose m_t = f(theta_t, m_{t-1}), starting from m_1 = theta_1, in constant memory."""
    if end.done == 1:
        return {"unrolled": copy_weights(end.trained)}, end.trained
    average = end.merge_pair(end.trained, end.memory["unrolled"], "unrolled")
    return {"unrolled": average}, average


RUNNING = {"task-arithmetic": "sum", "lines": "sum", "magmax": "maximum"}
"""Rules with which a single model can replace those of earlier tasks: their mean, as in theta_0 +
`scale` * sum_i tau_i, or their merge at scale 1."""


def merge_everything(end: TaskEnd) -> ChoiceOutput:
    """Choose f(theta_t, ..., theta_1), including theta_0 with `merging.zero`.

    Memory is constant if a running mean or maximum can replace all earlier models. For other rules
    and weights, the final weights of every task are kept.
    """
    count, merging = end.done + end.merging.zero, end.merging
    # if the shares of older models shrink in proportion, their mean can replace them
    if merging.rule == "interpolation" and merging.shares != "newest" and not merging.reverse:
        return running_mean(end, merge_weights(merging, count)[0])
    running = RUNNING.get(merging.rule)
    if running == "sum":
        memory, mean = running_mean(end, 1 / count)
        scale = (merging.scale or 1 / count) * count
        return memory, end.merge([mean], "all", scale=scale)
    if running == "maximum":
        before = end.memory.get("all", end.memory["zero"])
        options = MergeOptions.make(end.rule, 2, merging, scale=1.0)
        # the rule takes no weights, but statistics of batch norm are a mean over all tasks
        options = replace(options, weights=(1 / count, 1 - 1 / count))
        largest = _merge_by(end, end.rule, [end.trained, before], options)
        return {"all": largest}, end.merge([largest], "all")
    memory = {f"task-{end.done}": copy_weights(end.trained)}
    past = [end.memory[f"task-{task}"] for task in range(end.done - 1, 0, -1)]
    models = [end.trained, *past, *([end.memory["zero"]] if merging.zero else [])]
    return memory, end.merge(models, "all")


def running_mean(end: TaskEnd, share: float) -> ChoiceOutput:
    """Choose the mean of all models so far, computed from the previous mean.

    Args:
        end: The state at the end of the task.
        share: The newest model's share of the mean.
    """
    if end.done == 1 and not end.merging.zero:
        return {"all": copy_weights(end.trained)}, end.trained
    before = end.memory.get("all", end.memory["zero"])
    rule = get_option("merge_rule", "interpolation")
    options = MergeOptions.make(rule, 2, weights=(share, 1 - share))
    mean = _merge_by(end, rule, [end.trained, before], options)
    return {"all": mean}, mean


def copy_weights(weights: Weights) -> Weights:
    """Return a copy of weights without shared storage, so that a memory can be saved."""
    return {name: x.clone() for name, x in weights.items()}


CHOICES: dict[str, Callable[[TaskEnd], ChoiceOutput]] = {
    "zero": lambda end: ({}, end.memory["zero"]),
    "last": lambda end: ({}, end.trained),
    "patched": patched_weights,
    "average": running_average,
    "unrolled": unrolled_average,
    "all": merge_everything,
    "steps": lambda end: ({}, end.memory["average"]),
}
"""What a policy may choose: theta_0, the weights before the stream; theta_t, those at the end of
the task; a merge; or the average over steps that `update_step_average` keeps."""


class MergePolicy(NamedTuple):
    """What the next task starts from and what is deployed, as names in `CHOICES`."""

    start: str
    deploy: str

    def __call__(self, end: TaskEnd) -> MergedWeights:
        memory, chosen = end.memory, {}
        for choice in dict.fromkeys(self):
            kept, chosen[choice] = CHOICES[choice](end)
            memory = memory | kept
        return MergedWeights(memory, chosen[self.start], chosen[self.deploy])


_POLICIES = {
    "ema": ("average", "average"),
    "zs": ("zero", "average"),
    "ft": ("patched", "patched"),
    "ft-last": ("last", "patched"),
} | {
    name: tuple(name.split("-"))
    for name in ("zero-all", "zero-unrolled", "last-all", "last-unrolled", "all-all", "all-last",
                 "all-unrolled", "unrolled-all", "unrolled-last")
}  # fmt: skip
"""First the paper's EMA-, ZS- and FT-Merge. In "ft", the next task starts from the merged weights,
as in the paper's published code; in "ft-last", it starts from the weights at the end of the task,
as the paper's text can be read.

Then points of the grid in "How to merge your models over time", named START-DEPLOY; "zero-all" is
its offline merging."""
_MERGES = {"average": "two", "patched": "two", "unrolled": "two", "all": "all"}
"""Whether a choice merges two models or the models of all tasks."""

register("merge_policy", "none", merges=())(None)
for _name, _choices in _POLICIES.items():
    _merges = tuple(dict.fromkeys(_MERGES[choice] for choice in _choices if choice in _MERGES))
    _settings = ("shares", "power", "reverse", "zero") if "all" in _choices else ()
    register("merge_policy", _name, _settings, merges=_merges)(MergePolicy(*_choices))


def ema_share(merging: Merging, step: int, steps: int) -> float:
    """Return a step's share in E <- decay E + (1 - decay) theta, starting from theta_0."""
    return 1 - merging.decay


def window_share(merging: Merging, step: int, steps: int) -> float:
    """Return a step's share in the mean over the last steps of a task so far (WSM).

    At a constant rate, the mean of the weights after each of the last C steps is theta_{N-C} +
    sum_j (C - j + 1) / C Delta_j. Each of the C updates gets the weight that it would have under a
    rate that decays linearly to zero, as in schedule "wsd" with a cooldown of C steps. With a rate
    that is constant after the warmup (`schedule.name=wsd schedule.cooldown=0`), the merge therefore
    replaces the decay. Cost: one pass over the weights in each of those steps. Memory: one copy of
    the weights.

    Source: "WSM: Decay-Free Learning Rate Schedule via Checkpoint Merging for LLM Pre-training"
    (arXiv 2507.17634), section 3, with the mean as the merge and a checkpoint at every step.
    """
    first = steps - max(1, math.ceil(merging.window * steps - 1e-9))
    return 1 / (step - first + 1) if step >= first else 0.0


for _name, _start, _key, _share in (
    ("step-ema", "steps", "decay", ema_share),
    ("wsm", "steps", "window", window_share),
    ("wsm-last", "last", "window", window_share),
):
    register("merge_policy", _name, (_key,), merges=(), step_share=_share)(
        MergePolicy(_start, "steps")
    )


def apply_policy(end: TaskEnd) -> MergedWeights:
    """Apply a config's policy, other than "none", at the end of a task.

    Args:
        end: The state at the end of the task. The initial memory is {"zero": the weights before the
            stream}.

    Raises:
        CmpError: A policy from outside the package does not return what it should.
    """
    policy = end.merging.policy
    merged = get_option("merge_policy", policy).value(end)
    is_merged = isinstance(merged, MergedWeights)
    if not is_merged or not merged.start.keys() == merged.deployed.keys() == end.trained.keys():
        raise CmpError(
            f"merge_policy {policy!r}: must return MergedWeights(memory, start, deployed) with the "
            "tensors of the model"
        )
    return merged


@torch.no_grad()
def update_step_average(
    merging: Merging, memory: Memory, weights: Callable[[], Weights], step: int, steps: int
) -> None:
    """Update a policy's average over steps in place.

    E <- (1 - share) E + share theta, starting from theta_0. Integers are copied from the network.

    Args:
        merging: The config section. If its policy gives the step no share, nothing happens.
        memory: What the policy remembers.
        weights: Returns the network's weights; called only if they are needed.
        step: The completed step within the task, from 0.
        steps: The number of steps of the task.
    """
    share_of = get_option("merge_policy", merging.policy).facts["step_share"]
    if not share_of or not (share := share_of(merging, step, steps)):
        return
    current = {name: x.detach() for name, x in weights().items()}
    before = memory.get("average") or copy_weights(memory["zero"])
    averages = memory["average"] = {n: before[n].to(x.device) for n, x in current.items()}
    floats = [name for name, x in current.items() if x.is_floating_point()]
    torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]  # it has no public name
        [averages[name] for name in floats], [current[name] for name in floats], share
    )
    for name in current.keys() - set(floats):
        averages[name].copy_(current[name])
