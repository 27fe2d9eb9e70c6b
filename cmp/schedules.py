"""The learning rate at (task, step), as pure functions that return multiples of the peak.

A schedule is a curve within a task, scaled by a peak that a meta schedule gives each task. Any two
can be combined. Tasks are t = 0, ..., T - 1; task t has N steps n = 0, ..., N - 1, where the first
W warm up and the last C cool down.
"""

import bisect
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Annotated

from pydantic import AfterValidator
from pydantic.dataclasses import dataclass

from cmp.errors import CmpError
from cmp.parsing import raise_cmp_errors
from cmp.registry import Option, check_name, check_settings, get_option, register
from cmp.values import STRICT, Positive, Share, Steps

if TYPE_CHECKING:  # `cmpt data list` reads configs, and torch takes a second to import
    import torch

FLOOR = 1e-3
"""The lowest rate of curves that never reach zero, as a multiple of the peak (eta_min / eta)."""
CHECKED_TASKS = 200
"""Number of tasks that `idle_task` checks; its time grows with the square of it."""
WARMUP = ("warmup", "warmup_steps")
COOLDOWN = ("cooldown", "cooldown_steps")

CurveName = Annotated[str, AfterValidator(functools.partial(check_name, "schedule"))]
MetaName = Annotated[str, AfterValidator(functools.partial(check_name, "meta_schedule"))]
DEFAULT_SHARES = {"warmup": 0.1, "cooldown": 0.25}
"""Default fractions of a task for warmup and cooldown."""


@raise_cmp_errors
@dataclass(frozen=True, config=STRICT)
class Schedule:
    """The learning rate at (task, step); see `cmp.schedules` for the formulas.

    Attributes:
        name: The curve within a task, up to `peak`.
        meta: How the peak changes from task to task.
        peak: The highest learning rate.
        warmup: The fraction of a task for warmup; a tenth if neither this nor `warmup_steps` is
            given.
        warmup_steps: Length of the warmup, instead of `warmup`. [steps]
        cooldown: The fraction of a task for cooldown; a quarter if neither this nor
            `cooldown_steps` is given.
        cooldown_steps: Length of the cooldown, instead of `cooldown`. [steps]
        shift: By how many steps the decay of "rsqrt" has begun before the warmup ends: after W
            steps of warmup, the rate reaches sqrt(W / (W + shift)) of the peak. [steps]
        level: The constant phase of "infinite", as a multiple of the peak.
        decay: The factor per task of meta schedule "geometric".
        peaks: The peak of each task in meta schedule "free", as a multiple of `peak`.

    Example:
        >>> cmp.Schedule("wsd", cooldown=0.5).durations(100)  # steps of warmup and cooldown
        (10, 50)
    """

    name: CurveName = "cosine"
    meta: MetaName = "none"
    peak: Positive = 1e-3
    warmup: Share | None = None
    warmup_steps: Steps | None = None
    cooldown: Share | None = None
    cooldown_steps: Steps | None = None
    shift: Steps = 0
    level: Share = 0.5
    decay: Share = 0.5
    peaks: tuple[Share, ...] = ()

    def __post_init__(self) -> None:
        check_settings("schedule", self.name, self)
        check_settings("meta_schedule", self.meta, self)
        for kind in DEFAULT_SHARES:
            share, steps = getattr(self, kind), getattr(self, f"{kind}_steps")
            if share is not None and steps is not None:
                raise ValueError(
                    f"{kind} {share:g} and {kind}_steps {steps}: give only one of them"
                )
        curve = get_option("meta_schedule", self.meta).facts["curve"]
        if curve not in (None, self.name):
            raise ValueError(f"meta {self.meta!r} works with {curve!r}, not with {self.name!r}")
        if self.is_over_stream and self.meta != "none":
            raise ValueError(
                f"meta {self.meta!r}: {self.name!r} is one curve over the whole stream; set "
                "schedule.meta=none"
            )

    @property
    def is_over_stream(self) -> bool:
        """Whether there is one curve for the whole stream, with a branch for each task."""
        return get_option("schedule", self.name).facts["over_stream"]

    def durations(self, steps: int, is_past: bool = False) -> tuple[int, int]:
        """Return the steps of warmup and of cooldown in a task of `steps` steps.

        Fractions of a task are rounded up, but rounding alone never makes them too long.

        Args:
            steps: The steps of the task.
            is_past: Whether a later task asks. What is too long is then cut, since a past update
                may have been trained with other settings.

        Raises:
            ValueError: Together they are longer than a task that is not past.
        """
        settings = get_option("schedule", self.name).settings
        counts = []
        for kind, default in DEFAULT_SHARES.items():
            share, exact = getattr(self, kind), getattr(self, f"{kind}_steps")
            share = 0.0 if kind not in settings else default if share is None else share
            counts.append(math.ceil(share * steps - 1e-9) if exact is None else exact)
        warmup, cooldown = counts
        if is_past:
            warmup = min(warmup, steps)
            return warmup, min(cooldown, steps - warmup)
        rounded = self.warmup_steps is None and self.cooldown_steps is None
        if warmup + cooldown > steps + rounded:
            raise ValueError(f"warmup {warmup} + cooldown {cooldown} steps in a task of {steps}")
        if self.is_over_stream and cooldown >= steps:
            raise ValueError(
                f"cooldown {cooldown} steps of {steps}: {self.name!r} leaves no step for the next "
                "task to start from"
            )
        return warmup, min(cooldown, steps - warmup)


@dataclasses.dataclass(frozen=True)
class TaskSchedule:
    """A task of a stream, as a schedule function receives it.

    Attributes:
        schedule: The config section.
        t: The task's number, from 0.
        steps: Optimiser steps of every task of the stream, or of the tasks known so far.
        relative_peak: The task's peak as a multiple of `schedule.peak`.

    Example:
        >>> task = cmp.TaskSchedule(cmp.Schedule(), t=1, steps=(200, 50, 120))
        >>> task.N, task.T, task.warmup
        (50, 3, 5)
    """

    schedule: Schedule
    t: int
    steps: tuple[int, ...]
    relative_peak: float = 1.0

    @property
    def N(self) -> int:
        """Steps of this task."""
        return self.steps[self.t]

    @property
    def T(self) -> int:
        """Tasks of the stream, or `t + 1` in an endless stream, where `steps` is one number."""
        return len(self.steps)

    @functools.cached_property
    def warmup(self) -> int:
        """Steps of this task that warm up."""
        return self.durations(self.t)[0]

    @functools.cached_property
    def cooldown(self) -> int:
        """Steps of this task that cool down."""
        return self.durations(self.t)[1]

    def durations(self, t: int) -> tuple[int, int]:
        """Return the steps of warmup and cooldown of a task."""
        curve = get_option("schedule", self.schedule.name)
        return _durations(self.schedule, self.steps[t], t < self.t, curve)

    def sum_before(self, steps_of: Callable[[int, int, int], int]) -> int:
        """Return the sum over earlier tasks of a function of (N, warmup, cooldown)."""
        return sum(steps_of(self.steps[t], *self.durations(t)) for t in range(self.t))


@functools.lru_cache(maxsize=4096)
def _durations(schedule: Schedule, steps: int, is_past: bool, curve: Option) -> tuple[int, int]:
    return schedule.durations(steps, is_past)  # also depends on the curve's settings


@register("schedule", "constant")
def constant(task: TaskSchedule, n: int) -> float:
    """Return the peak at every step."""
    return task.relative_peak


@register("schedule", "linear", settings=WARMUP)
def linear(task: TaskSchedule, n: int) -> float:
    """Decay linearly from the peak, reaching zero after the last step."""
    return task.relative_peak * (task.N - n) / max(task.N - task.warmup, 1)


@register(
    "schedule",
    "cosine",
    settings=WARMUP,
    warmup_target=lambda task: _above_floor(task.relative_peak),
)
def cosine(task: TaskSchedule, n: int) -> float:
    """Decay along half a cosine from the peak to the floor at the last step.

    With meta schedule "cosine-dynamic", one half cosine is stretched over all tasks so far, which
    count equally, and this task follows its part of it.
    """
    length, step = task.N - task.warmup, n - task.warmup + 1
    if task.schedule.meta != "cosine-dynamic":
        return _above_floor(task.relative_peak * _half_cosine(step, length))
    before = task.t * length
    return _above_floor(_half_cosine(before + step, before + length))


@register(
    "schedule",
    "rsqrt",
    settings=(*WARMUP, *COOLDOWN, "shift"),
    warmup_target=lambda task: _rsqrt_decay(task, task.warmup),
)
def rsqrt(task: TaskSchedule, n: int) -> float:
    """Decay as 1 / sqrt(steps), in units of the warmup, and linearly to zero in the cooldown."""
    cooled = min(1.0, (task.N - 1 - n) / task.cooldown) if task.cooldown else 1.0
    return _rsqrt_decay(task, n) * cooled


def _rsqrt_decay(task: TaskSchedule, n: int) -> float:
    """Return `rsqrt` without its cooldown. With meta schedule "rsqrt-recovered", the decay
    continues from task to task, warmup and cooldown steps do not count, and the unit is the first
    task's warmup."""
    unit, shift = max(task.warmup, 1), task.schedule.shift
    if task.schedule.meta == "rsqrt-recovered":
        unit = max(task.durations(0)[0], 1)
        shift += task.sum_before(lambda N, W, C: N - C - W)
    return _above_floor(task.relative_peak * math.sqrt(unit / (n - task.warmup + unit + shift)))


@register("schedule", "wsd", settings=(*WARMUP, *COOLDOWN))
def wsd(task: TaskSchedule, n: int) -> float:
    """Stay at the peak, then decay linearly, reaching zero after the last step."""
    return task.relative_peak * min(1.0, (task.N - n) / max(task.cooldown, 1))


@register("schedule", "wsd-sqrt", settings=(*WARMUP, *COOLDOWN))
def wsd_sqrt(task: TaskSchedule, n: int) -> float:
    """Stay at the peak, then decay as 1 - sqrt(the completed fraction of the cooldown)."""
    passed = max(n - (task.N - task.cooldown), 0)
    return task.relative_peak * (1 - math.sqrt(passed / max(task.cooldown, 1)))


@register("schedule", "infinite", settings=(*WARMUP, *COOLDOWN, "level"), over_stream=True)
def infinite(task: TaskSchedule, n: int) -> float:
    """Follow one curve over the stream: half a cosine from the peak to `level` in the first task,
    then constant at `level`.

    The last steps of each task form a branch that cools down to zero; see `branch_step`.
    """
    first = task.steps[0] - sum(task.durations(0))
    trunk = task.N - task.cooldown
    before = task.sum_before(lambda N, W, C: N - C)
    settled = min(before + min(n, trunk - 1) - task.durations(0)[0] + 1, first)
    level = task.schedule.level
    value = level + (1 - level) * _half_cosine(settled, first)
    return value * min(1.0, (task.N - n) / max(task.cooldown, 1))


def _half_cosine(step: int, steps: int) -> float:
    return (1 + math.cos(math.pi * step / steps)) / 2 if step < steps else 0.0


def _above_floor(share: float) -> float:
    return FLOOR + (1 - FLOOR) * share


@register("meta_schedule", "none")
def meta_none(task: TaskSchedule) -> float:
    """Use the same peak for every task."""
    return 1.0


@register("meta_schedule", "cosine")
def meta_cosine(task: TaskSchedule) -> float:
    """Return the value at the task's start of a half cosine stretched over all tasks so far. Tasks
    count equally, as if each had the steps of the first one."""
    return _peak_of_cosine(task, task.steps[0] - task.durations(0)[0])


@register("meta_schedule", "cosine-dynamic", curve="cosine")
def meta_cosine_dynamic(task: TaskSchedule) -> float:
    """Return the value at the task's start of the half cosine that "cosine" then follows."""
    return _peak_of_cosine(task, task.N - task.warmup)


def _peak_of_cosine(task: TaskSchedule, length: int) -> float:
    if task.t == 0:
        return 1.0
    return _half_cosine(task.t * max(length, 1) + 1, (task.t + 1) * max(length, 1))


@register("meta_schedule", "rsqrt")
def meta_rsqrt(task: TaskSchedule) -> float:
    """Return the value at the task's start of 1 / sqrt(steps), with its warmup stretched too. The
    unit is the warmup of the first task."""
    unit = max(task.durations(0)[0], 1)
    units = task.sum_before(lambda N, W, C: max(W, 1)) + unit
    return math.sqrt(units / (task.sum_before(lambda N, W, C: N) + unit))


@register("meta_schedule", "rsqrt-continued")
def meta_rsqrt_continued(task: TaskSchedule) -> float:
    """Return the value of one 1 / sqrt(steps) over the stream, not counting warmups and cooldowns.
    The unit is the warmup of the first task."""
    unit = max(task.durations(0)[0], 1)
    passed = task.sum_before(lambda N, W, C: N - C - max(W, 1)) + unit
    return math.sqrt(unit / max(passed, unit))


@register("meta_schedule", "rsqrt-recovered", curve="rsqrt")
def meta_rsqrt_recovered(task: TaskSchedule) -> float:
    """Return the full peak; `rsqrt` itself continues its decay over the stream."""
    return 1.0


@register("meta_schedule", "geometric", settings=("decay",))
def meta_geometric(task: TaskSchedule) -> float:
    """Return `decay` times the previous task's peak."""
    return task.schedule.decay**task.t


@register("meta_schedule", "free", settings=("peaks",))
def meta_free(task: TaskSchedule) -> float:
    """Return the task's entry of `peaks`; raise `ValueError` if there are fewer."""
    peaks = task.schedule.peaks
    if task.t >= len(peaks):
        raise ValueError(
            f"schedule.peaks: {len(peaks)} peaks for {task.t + 1} tasks; give one each"
        )
    return peaks[task.t]


def task_curve(schedule: Schedule, steps: Sequence[int], task: int) -> Callable[[int], float]:
    """Return a function of the step that gives a task's learning rate as a multiple of the peak.

    Args:
        schedule: The config section.
        steps: Steps of each task.
        task: The task's number, from 0.

    Raises:
        ValueError: Warmup and cooldown together are longer than a task.
        CmpError: A rate of a user's schedule is not a number from 0 to 1.
    """
    curve, meta = get_option("schedule", schedule.name), get_option("meta_schedule", schedule.meta)
    info = TaskSchedule(schedule, task, tuple(steps))
    info = dataclasses.replace(info, relative_peak=_checked_rate(meta, task, meta.value(info)))
    target = curve.facts["warmup_target"]
    top = target(info) if target else info.relative_peak
    warmup = 0 if curve.facts["over_stream"] and task > 0 else info.warmup

    def rate(step: int) -> float:
        if step < warmup:
            return top * (step + 1) / warmup
        return _checked_rate(curve, task, curve.value(info, step))

    return rate


def _checked_rate(option: Option, task: int, rate: float) -> float:
    if not isinstance(rate, int | float) or not 0 <= rate <= 1:
        raise CmpError(
            f"{option.kind} {option.name!r}: {rate!r} in task {task}: return a multiple of the "
            "peak, from 0 to 1"
        )
    return rate


def task_rates(schedule: Schedule, steps: Sequence[int], task: int) -> list[float]:
    """Return the learning rate of each step of a task; see `task_curve` for the arguments."""
    rate = task_curve(schedule, steps, task)
    return [schedule.peak * rate(step) for step in range(steps[task])]


def learning_rate(schedule: Schedule, steps: int | Sequence[int], task: int, step: int) -> float:
    """Return the learning rate at (task, step).

    Args:
        schedule: The config section.
        steps: Steps of each task, or one number if all are equal.
        task: The task's number, from 0.
        step: The step within the task, from 0.

    Raises:
        ValueError: There is no such step or task, warmup and cooldown together are longer than a
            task, or the schedule lists fewer peaks than there are tasks.

    Example:
        >>> schedule = cmp.Schedule("constant", meta="geometric", peak=1e-3, decay=0.5)
        >>> cmp.learning_rate(schedule, steps=40, task=2, step=0)
        0.00025
    """
    tasks = (int(steps),) * (task + 1) if isinstance(steps, int | Integral) else steps
    if not (0 <= task < len(tasks) and 0 <= step < tasks[task]):
        raise ValueError(
            f"step {step} of task {task} does not exist with steps={steps}; tasks and steps count "
            "from 0"
        )
    return schedule.peak * task_curve(schedule, tasks, task)(step)


def idle_task(schedule: Schedule, steps: tuple[int, ...], first: int) -> int | None:
    """Return the first task with a learning rate of zero at every step, or None.

    Args:
        schedule: The config section.
        steps: Steps of each task; only the first `CHECKED_TASKS` are checked.
        first: The first task that is still to be trained.
    """
    for task in range(first, min(first + CHECKED_TASKS, len(steps))):
        rate = task_curve(schedule, steps, task)
        if not any(schedule.peak * rate(step) for step in range(steps[task])):
            return task
    return None


def branch_step(schedule: Schedule, steps: int) -> int | None:
    """Return the step at which each task branches off to cool down.

    The cooled branch is deployed, and the next task continues from the branch point. Returns None
    for schedules without branches.

    Args:
        schedule: The config section.
        steps: Steps of a task.
    """
    return steps - schedule.durations(steps)[1] if schedule.is_over_stream else None


def lr_scheduler(
    optimizer: "torch.optim.Optimizer", schedule: Schedule, steps: int | Sequence[int]
) -> "torch.optim.lr_scheduler.LambdaLR":
    """Return a torch scheduler for your own training loop.

    Call its `step()` after each optimiser step. The learning rate of each parameter group replaces
    `schedule.peak`. After the last task, the rate stays at its last value.

    Args:
        optimizer: The optimiser; the learning rates of its groups are the peaks.
        schedule: The schedule. With "infinite", your loop itself must return to the step that
            `cmp.schedules.branch_step` gives, after each task.
        steps: Steps of each task. One number means an endless stream of equal tasks or, with meta
            schedule "free", one task per peak.

    Raises:
        CmpError: A task has no steps, or fewer than its warmup and cooldown; there are more tasks
            than peaks; or the learning rates of all groups are 0.

    Example:
        >>> optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=1e-3)
        >>> schedule = cmp.Schedule("cosine", meta="rsqrt")
        >>> scheduler = cmp.lr_scheduler(optimizer, schedule, steps=[200, 50, 120])
        >>> optimizer.step(), scheduler.step()
        (None, None)
    """
    is_endless = not isinstance(steps, Iterable)
    tasks = [*steps] if isinstance(steps, Iterable) else [steps]
    if not tasks or not all(isinstance(each, int | Integral) and each > 0 for each in tasks):
        raise CmpError(
            f"lr_scheduler: steps: {steps!r}: give the steps of a task, a whole number from 1, or "
            "a list with one number per task"
        )
    if not any(group.get("initial_lr", group["lr"]) for group in optimizer.param_groups):
        raise CmpError(
            "lr_scheduler: optimizer: all of its learning rates are 0; give it the peaks. One from "
            "cmp.create_optimizer needs no scheduler, since cmp.train_step sets its rate"
        )
    tasks, peaks = [int(each) for each in tasks], schedule.peaks
    if "peaks" in get_option("meta_schedule", schedule.meta).settings:
        if not peaks:
            raise CmpError("lr_scheduler: schedule.peaks: is empty; give one per task")
        if is_endless:
            tasks, is_endless = tasks * len(peaks), False
        if len(tasks) > len(peaks):
            raise CmpError(
                f"lr_scheduler: schedule.peaks: {len(peaks)} peaks for {len(tasks)} tasks; give "
                "one per task"
            )
    try:
        for each in {*tasks}:
            schedule.durations(each)
    except ValueError as error:
        raise CmpError(f"lr_scheduler: steps: {error}; give tasks more steps") from error
    starts, unit = [0, *itertools.accumulate(tasks)], dataclasses.replace(schedule, peak=1.0)

    def factor(number: int) -> float:
        if is_endless:
            return learning_rate(unit, tasks[0], *divmod(number, tasks[0]))
        number = min(number, starts[-1] - 1)
        task = bisect.bisect_right(starts, number) - 1
        return learning_rate(unit, tasks, task, number - starts[task])

    from torch.optim.lr_scheduler import LambdaLR

    return LambdaLR(optimizer, factor)
