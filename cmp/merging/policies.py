"""Which weights the next task starts from, and which are deployed and scored (spec 4).

A policy is called after each task with what it remembers, sets of weights by name and among them
"zero", those before the stream; with the weights that the task ended in; and with the rule.
"""

from collections.abc import Callable
from typing import NamedTuple

from cmp.config import Merging
from cmp.merging.rules import RULES, Weights

Memory = dict[str, Weights]
Merge = Callable[[list[Weights]], Weights]


class Merged(NamedTuple):
    """What a policy remembers from now on, and the two sets of weights that it chose."""

    memory: Memory
    start: Weights
    deployed: Weights


def ema(memory: Memory, trained: Weights, merge: Merge) -> Merged:
    """EMA-Merge: a running average is deployed and trained on, m_t = f(theta_t, m_{t-1})."""
    average = merge([trained, memory.get("average", memory["zero"])])
    return Merged(memory | {"average": average}, average, average)


POLICIES: dict[str, Callable[[Memory, Weights, Merge], Merged]] = {"ema": ema}
"""By `merging.policy`; "none" trains on from what it deploys and remembers nothing."""


def after_task(merging: Merging, memory: Memory, trained: Weights) -> Merged:
    """Apply the policy and the rule that a config names."""
    rule = RULES[merging.rule]
    return POLICIES[merging.policy](
        memory, trained, lambda models: rule(models, memory["zero"], merging)
    )
