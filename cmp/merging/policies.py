"""Which weights the next task starts from, and which are deployed and scored (spec 4).

A policy is two answers, each the name of one of `CHOICES`. They are called after each task with
what has happened: the weights that the task ended in, and what the policy remembers, sets of
weights by name and among them "zero", those before the stream. Weights live on the CPU, except for
a per-step average, which lives where the network does.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from cmp.config import SUM_RULES, TASK_VECTOR_RULES, Merging
from cmp.merging.apply import merge
from cmp.merging.rules import MergeOptions, Weights, has_running_mean, merge_weights

Memory = dict[str, Weights]


class MergedWeights(NamedTuple):
    """What a policy remembers from now on, and the two sets of weights that it chose, which may be
    the same and are not to be changed."""

    memory: Memory
    start: Weights
    deployed: Weights


class MergePolicy(NamedTuple):
    """Where training of the next task starts, and what is deployed: names of `CHOICES`."""

    start: str
    deploy: str


@dataclass(frozen=True)
class TaskEnd:
    """What has happened after `done` tasks: the weights that the last one ended in, and what is
    remembered. seed: of rules that draw by chance, which count by `done` and by the choice."""

    merging: Merging
    memory: Memory
    trained: Weights
    done: int
    seed: int

    def merge(self, models: list[Weights], choice: str, **changed: object) -> Weights:
        """Models, newest first, merged by the rule of the config; `changed`: other settings."""
        config, rule = self.merging, self.merging.rule
        how = MergeOptions(
            scale=config.scale, density=config.density, outliers=config.outliers,
            alpha=config.alpha, beta=config.beta, draw=(self.seed, self.done, choice),
        )  # fmt: skip
        base = self.memory["zero"] if rule in TASK_VECTOR_RULES else None
        return merge(rule, models, base, dataclasses.replace(how, **changed), finite=True)

    def pair(self, newer: Weights, older: Weights, choice: str) -> Weights:
        """Two models merged; `merging.weight` is the newer one's."""
        has_weights = self.merging.rule not in TASK_VECTOR_RULES
        weights = (self.merging.weight, 1 - self.merging.weight) if has_weights else None
        return self.merge([newer, older], choice, weights=weights)


PolicyOutput = tuple[Memory, Weights]


def zero_weights(ends: TaskEnd) -> PolicyOutput:
    """theta_0, the weights before the stream."""
    return {}, ends.memory["zero"]


def last_weights(ends: TaskEnd) -> PolicyOutput:
    """theta_t, the weights that the task ended in."""
    return {}, ends.trained


def patched_weights(ends: TaskEnd) -> PolicyOutput:
    """f(theta_t, theta_0): what the task ended in, merged with the weights before the stream."""
    return {}, ends.pair(ends.trained, ends.memory["zero"], "patched")


def running_average(ends: TaskEnd) -> PolicyOutput:
    """A running average m_t = f(theta_t, m_{t-1}) from m_0 = theta_0, in constant memory."""
    found = ends.pair(ends.trained, ends.memory.get("average", ends.memory["zero"]), "average")
    return {"average": found}, found


def unrolled_average(ends: TaskEnd) -> PolicyOutput:
    """A running average m_t = f(theta_t, m_{t-1}) from m_1 = theta_1, in constant memory."""
    if ends.done == 1:
        return {"unrolled": copy_weights(ends.trained)}, ends.trained
    found = ends.pair(ends.trained, ends.memory["unrolled"], "unrolled")
    return {"unrolled": found}, found


def merge_everything(ends: TaskEnd) -> PolicyOutput:
    """f(theta_t, ..., theta_1), with `merging.zero` also of theta_0.

    In constant memory where a running mean or maximum stands for all before; for other rules and
    shares the end of each task is remembered.
    """
    count = ends.done + ends.merging.zero
    if ends.merging.rule == "interpolation" and has_running_mean(ends.merging):
        return running_mean(ends, merge_weights(ends.merging, count)[0])
    if ends.merging.rule in SUM_RULES:
        memory, mean = running_mean(ends, 1 / count)
        scale = (ends.merging.scale or 1 / count) * count
        return memory, ends.merge([mean], "all", scale=scale)
    if ends.merging.rule == "magmax":
        before = ends.memory.get("all", ends.memory["zero"])
        found = ends.merge([ends.trained, before], "all", scale=1.0)
        return {"all": found}, ends.merge([found], "all")
    memory = {f"task-{ends.done}": copy_weights(ends.trained)}
    past = [ends.memory[f"task-{task}"] for task in range(ends.done - 1, 0, -1)]
    models = [ends.trained, *past, *([ends.memory["zero"]] if ends.merging.zero else [])]
    weighs = ends.merging.rule == "interpolation"
    weights = tuple(merge_weights(ends.merging, count)) if weighs else None
    return memory, ends.merge(models, "all", weights=weights)


def running_mean(ends: TaskEnd, share: float) -> PolicyOutput:
    """The mean of all so far, from that of all before; share: of the newest in it."""
    if ends.done == 1 and not ends.merging.zero:
        return {"all": copy_weights(ends.trained)}, ends.trained
    before = ends.memory.get("all", ends.memory["zero"])
    how = MergeOptions(weights=(share, 1 - share))
    found = merge("interpolation", [ends.trained, before], how=how, finite=True)
    return {"all": found}, found


def step_average(ends: TaskEnd) -> PolicyOutput:
    """The average over steps that `after_step` kept."""
    return {}, ends.memory["average"]


def copy_weights(weights: Weights) -> Weights:
    """The same in tensors of its own, as a memory is saved."""
    return {name: x.clone() for name, x in weights.items()}


CHOICES: dict[str, Callable[[TaskEnd], PolicyOutput]] = {
    "zero": zero_weights,
    "last": last_weights,
    "patched": patched_weights,
    "average": running_average,
    "unrolled": unrolled_average,
    "all": merge_everything,
    "steps": step_average,
}
"""What an answer does: what has happened -> (what to remember beside the rest, weights)."""

_GRID_POLICIES = (
    "zero-all", "zero-unrolled", "last-all", "last-unrolled", "all-all", "all-last",
    "all-unrolled", "unrolled-all", "unrolled-last",
)  # fmt: skip
"""Points of the grid of "How to merge your models over time", as START-DEPLOY; zero-all is what is
called offline merging."""

POLICIES = {
    "ema": MergePolicy("average", "average"),
    "zs": MergePolicy("zero", "average"),
    "ft": MergePolicy("patched", "patched"),
    "ft-last": MergePolicy("last", "patched"),
    **{name: MergePolicy(*name.split("-")) for name in _GRID_POLICIES},
    "step-ema": MergePolicy("steps", "steps"),
}
"""By `merging.policy`; "none" trains on from what it deploys and remembers nothing. EMA-, ZS- and
FT-Merge bear the paper's names; in "ft" training goes on from the merged weights, as in its
published code, in "ft-last" from those that the task ended in, as its text can be read."""


def apply_policy(
    merging: Merging, memory: Memory, trained: Weights, done: int, seed: int = 0
) -> MergedWeights:
    """Apply the policy and the rule that a config names, after `done` tasks, at least one."""
    ends, found, policy = (
        TaskEnd(merging, memory, trained, done, seed),
        {},
        POLICIES[merging.policy],
    )
    for choice in dict.fromkeys(policy):
        kept, found[choice] = CHOICES[choice](ends)
        memory = memory | kept
    return MergedWeights(memory, found[policy.start], found[policy.deploy])


@torch.no_grad()
def update_step_average(merging: Merging, memory: Memory, weights: Callable[[], Weights]) -> None:
    """Under "step-ema", move the remembered average towards the network's weights, in place:
    E <- decay E + (1 - decay) theta, from theta_0 (spec 3). Whole numbers are the network's.

    weights: the network's as they stand, asked for only where they are needed.
    """
    if merging.policy != "step-ema":
        return
    now = {name: x.detach() for name, x in weights().items()}
    averages = memory.get("average") or copy_weights(memory["zero"])
    memory["average"] = averages = {name: averages[name].to(x.device) for name, x in now.items()}
    floats = [name for name, x in now.items() if x.is_floating_point()]
    torch._foreach_lerp_(
        [averages[name] for name in floats], [now[name] for name in floats], 1 - merging.decay
    )
    for name in now.keys() - set(floats):
        averages[name].copy_(now[name])
