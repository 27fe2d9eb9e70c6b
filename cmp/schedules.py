"""The learning rate at a step of a task: pure functions, in multiples of the peak."""

import math

from cmp.config import Schedule


def durations(schedule: Schedule, steps: int) -> tuple[int, int]:
    """Steps of warmup and of cooldown in a task of `steps` steps, rounded up, within the task."""
    warmup = min(math.ceil(schedule.warmup * steps), steps)
    return warmup, min(math.ceil(schedule.cooldown * steps), steps - warmup)


def constant(step: int, steps: int, warmup: int, cooldown: int) -> float:
    """The peak at every step."""
    return 1.0


def warmup_cosine(step: int, steps: int, warmup: int, cooldown: int) -> float:
    """Linear warmup, then half a cosine to a thousandth of the peak at the last step (spec 5)."""
    if step < warmup:
        return (step + 1) / warmup
    floor, progress = 1e-3, (step - warmup + 1) / (steps - warmup)
    return floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2


def warmup_constant_cooldown(step: int, steps: int, warmup: int, cooldown: int) -> float:
    """Linear warmup, the peak, then a linear cooldown that would reach zero after the last step."""
    if step < warmup:
        return (step + 1) / warmup
    return min(1.0, (steps - step) / cooldown) if cooldown else 1.0


SCHEDULES = {
    "constant": constant,
    "warmup-cosine": warmup_cosine,
    "warmup-constant-cooldown": warmup_constant_cooldown,
}


def learning_rate(schedule: Schedule, steps: int, step: int) -> float:
    """The learning rate at 0-based `step` of a task of `steps` steps."""
    return schedule.peak * SCHEDULES[schedule.name](step, steps, *durations(schedule, steps))
