"""The learning rate at (task, step): pure functions, in multiples of `schedule.peak`.

A schedule is a curve within a task, `CURVES`, under a peak that a meta schedule gives each task,
`METAS`; any two combine. Symbols as in spec 5: tasks t = 0, 1, ..., N steps a task of which W warm
up and C cool down, steps n = 0 ... N - 1.
"""

import dataclasses
import math
from dataclasses import dataclass

import numpy as np
import torch

from cmp.config import Schedule

FLOOR = 1e-3
"""Of the curves that never reach zero, in peaks: eta_min / eta."""


@dataclass(frozen=True)
class TaskSchedule:
    """One task: its number t, N, W and C, and its peak as a multiple of the schedule's."""

    schedule: Schedule
    t: int
    N: int
    W: int
    C: int
    peak: float = 1.0


def constant(task: TaskSchedule, n: int) -> float:
    """The peak."""
    return task.peak


def linear(task: TaskSchedule, n: int) -> float:
    """A line that would reach zero after the last step."""
    return task.peak * (task.N - n) / max(task.N - task.W, 1)


def cosine(task: TaskSchedule, n: int) -> float:
    """Half a cosine, to the floor at the last step; with meta `cosine-dynamic`, the part in this
    task of one that is stretched over all tasks so far."""
    length = task.N - task.W
    if task.schedule.meta != "cosine-dynamic":
        return _above_floor(task.peak * _half_cosine(n - task.W + 1, length))
    return _above_floor(_half_cosine(task.t * length + n - task.W + 1, (task.t + 1) * length))


def rsqrt(task: TaskSchedule, n: int) -> float:
    """1 / sqrt(steps), W being the unit, and on top of it a line to zero at the last step."""
    cooled = min(1.0, (task.N - 1 - n) / task.C) if task.C else 1.0
    return _rsqrt_decay(task, n) * cooled


def wsd(task: TaskSchedule, n: int) -> float:
    """The peak, then a line that would reach zero after the last step."""
    return task.peak * min(1.0, (task.N - n) / max(task.C, 1))


def wsd_sqrt(task: TaskSchedule, n: int) -> float:
    """The peak, then one minus the square root of the cooldown's share that is over."""
    return task.peak * (1 - math.sqrt(max(n - (task.N - task.C), 0) / max(task.C, 1)))


def infinite(task: TaskSchedule, n: int) -> float:
    """One curve over the stream: from the peak by half a cosine to `level`, which the first task
    ends in, and on at that level. The last C steps of each task are a branch of it, a line that
    would reach zero; see `branch`."""
    trunk = task.N - task.C
    settled = min(task.t * trunk + min(n, trunk - 1) - task.W + 1, trunk - task.W)
    level = task.schedule.level
    value = level + (1 - level) * _half_cosine(settled, trunk - task.W)
    return value * min(1.0, (task.N - n) / max(task.C, 1))


def _half_cosine(step: int, steps: int) -> float:
    return (1 + math.cos(math.pi * step / steps)) / 2 if step < steps else 0.0


def _above_floor(share: float) -> float:
    return FLOOR + (1 - FLOOR) * share


def _rsqrt_decay(task: TaskSchedule, n: int) -> float:
    """`rsqrt` without its cooldown. With meta `rsqrt-recovered` it goes on from task to task, and
    neither warmups nor cooldowns count as its steps."""
    unit, shift = max(task.W, 1), task.schedule.shift
    if task.schedule.meta == "rsqrt-recovered":
        shift += task.t * (task.N - task.C - task.W)
    return _above_floor(task.peak * math.sqrt(unit / (n - task.W + unit + shift)))


def _warmup_target(task: TaskSchedule) -> float:
    """What the warmup rises to."""
    if task.schedule.name == "rsqrt":
        return _rsqrt_decay(task, task.W)
    return _above_floor(task.peak) if task.schedule.name == "cosine" else task.peak


CURVES = {
    "constant": constant, "linear": linear, "cosine": cosine, "rsqrt": rsqrt, "wsd": wsd,
    "wsd-sqrt": wsd_sqrt, "infinite": infinite,
}  # fmt: skip
"""By `schedule.name`: what follows the warmup, which is a line up to where the curve starts."""


def meta_cosine(task: TaskSchedule) -> float:
    """A cosine is stretched over all tasks so far; a task starts where that curve is."""
    length = max(task.N - task.W, 1)
    return _half_cosine(task.t * length + 1, (task.t + 1) * length) if task.t else 1.0


def meta_rsqrt(task: TaskSchedule) -> float:
    """The same with 1 / sqrt(steps) and a warmup that is stretched, too."""
    unit = max(task.W, 1)
    return math.sqrt((task.t + 1) * unit / (task.t * task.N + unit))


def meta_rsqrt_continued(task: TaskSchedule) -> float:
    """Where one 1 / sqrt(steps) over the stream is, without warmups and cooldowns."""
    unit = max(task.W, 1)
    return math.sqrt(unit / max(task.t * (task.N - task.C) - (task.t - 1) * unit, unit))


def meta_none(task: TaskSchedule) -> float:
    """The same peak for every task."""
    return 1.0


def meta_rsqrt_recovered(task: TaskSchedule) -> float:
    """The full peak, of a decay that goes on over the stream: see `_decayed`."""
    return 1.0


def meta_geometric(task: TaskSchedule) -> float:
    """`decay` times the peak of the task before."""
    return task.schedule.decay**task.t


def meta_free(task: TaskSchedule) -> float:
    """What `peaks` says."""
    return task.schedule.peaks[task.t]


METAS = {
    "none": meta_none,
    "cosine": meta_cosine,
    "cosine-dynamic": meta_cosine,
    "rsqrt": meta_rsqrt,
    "rsqrt-continued": meta_rsqrt_continued,
    "rsqrt-recovered": meta_rsqrt_recovered,
    "geometric": meta_geometric,
    "free": meta_free,
}
"""By `schedule.meta`: a task's peak, as a multiple of the schedule's."""


def relative_rate(schedule: Schedule, steps: int, task: int, step: int) -> float:
    """The learning rate at 0-based (task, step), in multiples of the peak, from 0 to 1.

    steps: of each task. `ValueError` if warmup and cooldown are longer than that.
    """
    bare = TaskSchedule(schedule, task, steps, *schedule.durations(steps))
    here = dataclasses.replace(bare, peak=METAS[schedule.meta](bare))
    if step < here.W and not (schedule.name == "infinite" and task > 0):
        return _warmup_target(here) * (step + 1) / here.W
    return CURVES[schedule.name](here, step)


def learning_rate(schedule: Schedule, steps: int, task: int, step: int) -> float:
    """The learning rate at 0-based (task, step) of tasks of `steps` steps; see `multiple`."""
    return schedule.peak * relative_rate(schedule, steps, task, step)


def learning_rates(schedule: Schedule, tasks: int, steps: int) -> np.ndarray:
    """The learning rates of a whole stream, [tasks, steps]."""
    every = [[learning_rate(schedule, steps, t, n) for n in range(steps)] for t in range(tasks)]
    return np.array(every)


def branch_step(schedule: Schedule, steps: int) -> int | None:
    """The step of each task at which a branch leaves that is cooled down and deployed, while the
    next task goes on from before it; none for schedules that deploy what they go on from."""
    return steps - schedule.durations(steps)[1] if schedule.name == "infinite" else None


def lr_scheduler(
    optimizer: torch.optim.Optimizer, schedule: Schedule, steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """The schedule for a loop of your own, one `step()` after each of the optimizer's.

    Each parameter group's own learning rate takes the place of `schedule.peak`; tasks of `steps`
    steps follow each other. With `infinite`, whoever calls goes back to before each `branch`.
    """
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda number: relative_rate(schedule, steps, *divmod(number, steps))
    )
