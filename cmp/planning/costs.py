"""What a run would cost: FLOPs, hours, memory, disk. Counted on shapes; nothing is computed."""

import functools
from dataclasses import dataclass

from cmp import budgets, models
from cmp.budgets import Budget, counting
from cmp.config import Method, RunConfig
from cmp.planning.devices import DEVICES, GIGA
from cmp.planning.wishes import Wish

COPIES = {"none": 0, "ema": 2, "last-unrolled": 2}
"""Networks that a merging policy keeps beside the one that trains; see `cmp.merging.policies`."""
SAVES = 3
"""Checkpoints on the disk at once: the last two, and the next while it is written."""


@dataclass(frozen=True)
class Forecast:
    """Of training alone: scoring comes on top. flops: of all updates; gmafs: memory-adjusted
    GFLOPs; hours: on the device; memory: bytes at the peak of a step; disk: bytes of checkpoints;
    allowed: what of `flops` or `gmafs` the wish allowed, in that unit."""

    flops: float
    gmafs: float
    hours: float
    memory: float
    disk: float
    allowed: float


@functools.cache
def memory(name: str, batch: int, method: Method, half: bool) -> tuple[float, float, float]:
    """Bytes at the peak of a step, of the weights, and of the optimizer. half: in bf16, where what
    is kept for the backward pass takes half; ViT-B-16 at batch 512 then comes to 46.9 GB, and
    Table 4 has 46.6."""
    found = counting.learner(name, method, models.blank(name))
    parts = counting.account(found, functools.partial(counting.empty_look, found, batch))
    total = sum(parts.values()) - half * parts["activations"] / 2
    return total, parts["weights"], parts["optimizer"]


def of_run(run: RunConfig) -> float:
    """Bytes at the peak of one of a run's steps."""
    half = run.training.precision == "bf16"
    return memory(run.model.name, run.training.batch, run.method, half)[0]


def allowance(wish: Wish, run: RunConfig) -> Budget:
    """What an update may cost, in the wish's own unit: of hours FLOPs, else memory-adjusted
    ones."""
    cost = counting.cost(run)
    if wish.gmafs is not None:
        return budgets.budget(wish.gmafs * GIGA / wish.updates, cost, budgets.full_cost(run))
    allowed = wish.gpu_hours * 3600 * DEVICES[wish.device].speed
    return Budget(allowed / wish.updates, cost.step, cost.end, 1.0)


def forecast(wish: Wish, run: RunConfig) -> Forecast:
    """What a run costs."""
    cost, tasks = counting.cost(run), run.stream.tasks
    flops = tasks * (run.training.steps * cost.step + cost.end)
    half = run.training.precision == "bf16"
    peak, weights, moments = memory(run.model.name, run.training.batch, run.method, half)
    copies = 1 + COPIES[run.merging.policy]
    allowed = tasks * allowance(wish, run).allowed
    return Forecast(
        flops=flops,
        gmafs=flops / GIGA * cost.memory / budgets.full_cost(run).memory,
        hours=flops / DEVICES[wish.device].speed / 3600,
        memory=peak,
        disk=SAVES * (copies * weights + moments),
        allowed=allowed / GIGA if wish.gmafs is not None else allowed,
    )
