"""Which weights the next task starts from, and which are deployed and scored.

A policy is a function of a `TaskEnd` that returns `MergedWeights`. The package's own are pairs of
choices: where training goes on, and what is deployed. Weights live on the CPU, except for a
per-step average, which lives where the network does; they are merged there, too, one tensor at a
time.
"""

import math
from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cmp.config import Merging
from cmp.errors import CmpError
from cmp.merging.apply import check_models, iter_merged
from cmp.merging.rules import MergeOptions, Weights, merge_weights, options_of
from cmp.registry import Option, get_option, register

Memory = dict[str, Weights]


class MergedWeights(NamedTuple):
    """What a policy chose.

    Attributes:
        memory: What it remembers from now on.
        start: The weights that the next task starts from.
        deployed: The weights that are scored; may be the same. Neither is to be changed.

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
    """What has happened after a task.

    Attributes:
        merging: The config section.
        memory: What the policy remembers, with "zero", the weights before the stream.
        trained: The weights that the task ended in.
        done: How many tasks are done, at least one.
        seed: Seed of rules that draw at random; `done` and the choice's name enter, too.
        device: Where models are merged.

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
        """Merge models, newest first, by the config's rule.

        Args:
            models: The models.
            choice: What the merge is for; two choices draw differently.
            **changed: Settings that differ from the config's, as `cmp.merge` takes them.
        """
        options = options_of(self.merging, **{"draw": (self.seed, self.done, choice), **changed})
        return _merge_by(self, self.rule, models, options)

    def merge_pair(self, newer: Weights, older: Weights, choice: str) -> Weights:
        """Merge two models; `merging.weight` is the newer one's."""
        weight = self.merging.weight
        weights = (weight, 1 - weight) if "weight" in self.rule.settings else None
        return self.merge([newer, older], choice, weights=weights)


def _merge_by(end: TaskEnd, rule: Option, models: list[Weights], options: MergeOptions) -> Weights:
    """Merge models on the device, one tensor at a time; they and the result are on the CPU."""
    base = end.memory["zero"] if rule.facts["base"] else None
    check_models(rule, models, base)
    moved = [MovedWeights(model, end.device) for model in models]
    start = MovedWeights(base, end.device) if base else None
    merged = iter_merged(rule, moved, start, options, finite=True)
    return {name: x.cpu() for name, x in merged}


class MovedWeights(UserDict[str, Tensor]):
    """Weights whose tensors are copied to a device when they are asked for."""

    def __init__(self, weights: Weights, device: torch.device | str):
        super().__init__(weights)
        self.device = device

    def __getitem__(self, name: str) -> Tensor:
        return self.data[name].to(self.device)


ChoiceOutput = tuple[Memory, Weights]
"""What a choice adds to the memory, and the weights that it chose."""


def patched_weights(end: TaskEnd) -> ChoiceOutput:
    """Choose f(theta_t, theta_0): the task's weights merged with those before the stream."""
    return {}, end.merge_pair(end.trained, end.memory["zero"], "patched")


def running_average(end: TaskEnd) -> ChoiceOutput:
    """Choose m_t = f(theta_t, m_{t-1}) from m_0 = theta_0, in constant memory."""
    before = end.memory.get("average", end.memory["zero"])
    average = end.merge_pair(end.trained, before, "average")
    return {"average": average}, average


def unrolled_average(end: TaskEnd) -> ChoiceOutput:
    """Choose m_t = f(theta_t, m_{t-1}) from m_1 = theta_1, in constant memory."""
    if end.done == 1:
        return {"unrolled": copy_weights(end.trained)}, end.trained
    average = end.merge_pair(end.trained, end.memory["unrolled"], "unrolled")
    return {"unrolled": average}, average


def merge_everything(end: TaskEnd) -> ChoiceOutput:
    """Choose f(theta_t, ..., theta_1), with `merging.zero` also of theta_0.

    It needs constant memory where a running mean or maximum stands for all models before; for
    other rules and weights the end of each task is remembered.
    """
    count, merging = end.done + end.merging.zero, end.merging
    # where older models' weights shrink in proportion, their mean stands for all of them
    if merging.rule == "interpolation" and merging.shares != "newest" and not merging.reverse:
        return running_mean(end, merge_weights(merging, count)[0])
    if end.rule.facts["running"] == "sum":
        memory, mean = running_mean(end, 1 / count)
        scale = (merging.scale or 1 / count) * count
        return memory, end.merge([mean], "all", scale=scale)
    if end.rule.facts["running"] == "maximum":
        before = end.memory.get("all", end.memory["zero"])
        largest = end.merge([end.trained, before], "all", scale=1.0)
        return {"all": largest}, end.merge([largest], "all")
    memory = {f"task-{end.done}": copy_weights(end.trained)}
    past = [end.memory[f"task-{task}"] for task in range(end.done - 1, 0, -1)]
    models = [end.trained, *past, *([end.memory["zero"]] if merging.zero else [])]
    return memory, end.merge(models, "all")


def running_mean(end: TaskEnd, share: float) -> ChoiceOutput:
    """Choose the mean of all models so far, from that of all before.

    Args:
        end: What has happened.
        share: The newest model's part of the mean.
    """
    if end.done == 1 and not end.merging.zero:
        return {"all": copy_weights(end.trained)}, end.trained
    before = end.memory.get("all", end.memory["zero"])
    options = MergeOptions(weights=(share, 1 - share))
    rule = get_option("merge_rule", "interpolation")
    mean = _merge_by(end, rule, [end.trained, before], options)
    return {"all": mean}, mean


def copy_weights(weights: Weights) -> Weights:
    """Return the same weights in tensors of their own, as a memory is saved."""
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
"""What a policy may choose: theta_0, the weights before the stream; theta_t, those that the task
ended in; a merge; or the average over steps that `update_step_average` keeps."""


class MergePolicy(NamedTuple):
    """Where training goes on and what is deployed, as names of `CHOICES`."""

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
"""First the paper's EMA-, ZS- and FT-Merge. In "ft" training goes on from the merged weights, as in
the paper's published code, in "ft-last" from those that the task ended in, as its text can be read.

Then points of the grid of "How to merge your models over time", as START-DEPLOY; "zero-all" is what
is called offline merging."""
_MERGES = {"average": "two", "patched": "two", "unrolled": "two", "all": "all"}
"""Whether a choice merges two models or those of all tasks."""

register("merge_policy", "none", merges=())(None)
for _name, _choices in _POLICIES.items():
    _merges = tuple(dict.fromkeys(_MERGES[choice] for choice in _choices if choice in _MERGES))
    _settings = ("shares", "power", "reverse", "zero") if "all" in _choices else ()
    register("merge_policy", _name, _settings, merges=_merges)(MergePolicy(*_choices))


def ema_share(merging: Merging, step: int, steps: int) -> float:
    """Return the share of a step's weights in E <- decay E + (1 - decay) theta, from theta_0."""
    return 1 - merging.decay


def window_share(merging: Merging, step: int, steps: int) -> float:
    """Return the share of a step's weights in the mean of a task's last steps so far (WSM).

    The mean of the weights after each of the last C steps at a constant rate is theta_{N-C} +
    sum_j (C - j + 1) / C Delta_j: each of the C updates enters as far as under a rate that falls
    along a line to zero, as in schedule "wsd" with a cooldown of C steps. With a rate that is
    constant after its warm-up (`schedule.name=wsd schedule.cooldown=0`) the merge stands in for the
    decay. Cost: a pass over the weights in each of those steps. Memory: one copy of the weights.

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
    """Apply the policy that a config names, one other than "none", after a task.

    Args:
        end: What has happened; at first the memory is {"zero": the weights before the stream}.
    """
    return get_option("merge_policy", end.merging.policy).value(end)


@torch.no_grad()
def update_step_average(
    merging: Merging, memory: Memory, weights: Callable[[], Weights], step: int, steps: int
) -> None:
    """Update the average of a policy over steps, in place.

    E <- (1 - share) E + share theta, from theta_0; integers are the network's.

    Args:
        merging: The config section; nothing happens where its policy gives the step no share.
        memory: What the policy remembers.
        weights: Returns the network's weights, called only where they are needed.
        step: The step of the task that was made, from 0.
        steps: How many steps the task has.
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


def check_option(option: Option) -> None:
    """Check a merge policy after one task of a small model.

    Raises:
        CmpError: It does not return `MergedWeights` with the model's tensors.
    """
    zero = {"x": torch.zeros(3)}
    end = TaskEnd(Merging(option.name), {"zero": zero}, {"x": torch.ones(3)}, 1, 0)
    output = option.value(end)
    is_merged = isinstance(output, MergedWeights)
    if not is_merged or not output.start.keys() == output.deployed.keys() == zero.keys():
        raise CmpError(
            f"merge_policy {option.name!r}: must return MergedWeights(memory, start, deployed) "
            "with the tensors of the model"
        )
