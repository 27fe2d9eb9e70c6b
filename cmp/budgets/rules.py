"""Budgets as arithmetic on plain numbers: memory-adjusted FLOPs and the steps that they allow.

MAFs of a step = its FLOPs x (its peak memory / full fine-tuning's) (spec 1.2).
"""

import math
from dataclasses import dataclass

from cmp.errors import CmpError

SLACK = 1e-9
"""Relative: what rounding may add to a sum before it counts as overrun."""


@dataclass(frozen=True)
class Cost:
    """What a method costs. step: FLOPs of one step; end: FLOPs after a task, once; memory: bytes at
    the peak."""

    step: float
    end: float
    memory: float


@dataclass(frozen=True)
class Budget:
    """What a task may cost and what a method's steps cost of it, all in memory-adjusted FLOPs.

    allowed: a task; step: each; end: once a task, after its steps. multiplier: that the FLOPs were
    adjusted by.
    """

    allowed: float
    step: float
    end: float
    multiplier: float

    @property
    def steps(self) -> int:
        """Steps a task: the most that fit beside what comes at its end; 0 if none does."""
        return max(0, math.floor((self.allowed * (1 + SLACK) - self.end) / self.step))

    def used(self, tasks: int, steps: int = 0) -> float:
        """What so many whole tasks of `self.steps`, and so many steps of the next, have cost."""
        return tasks * (self.steps * self.step + self.end) + steps * self.step

    def check(self, steps: int) -> None:
        """`CmpError` if so many steps of a task, and its end, overrun what is allowed."""
        if (cost := steps * self.step + self.end) > self.allowed * (1 + SLACK):
            raise CmpError(
                f"training.budget: {steps} steps cost {cost:.4g} memory-adjusted FLOPs a task, "
                f"allowed are {self.allowed:.4g}: at most {self.steps} steps"
            )


def budget(allowed: float, cost: Cost, full: Cost) -> Budget:
    """A task's budget. allowed: in memory-adjusted FLOPs; full: what full fine-tuning costs."""
    multiplier = cost.memory / full.memory
    return Budget(allowed, cost.step * multiplier, cost.end * multiplier, multiplier)


def paper_steps(total: float, tasks: int, flops: float, multiplier: float) -> int:
    """Steps a task by the paper's rule: rounded, and with whatever comes after a task charged to
    each of its steps. total, flops: in the same unit."""
    return round(total / (tasks * flops * multiplier))
