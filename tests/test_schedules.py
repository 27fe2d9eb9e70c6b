"""Learning rates: what each schedule promises, for any lengths; and the reference's own numbers."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cmp import config, registry, schedules
from cmp.config import Schedule
from cmp.errors import CmpError
from lab import analyses

CURVES = registry.option_names("schedule")
OVER_STREAM = registry.option_names("schedule", over_stream=True)


def settings_of(kind, name):
    return registry.get_option(kind, name).settings


def is_pair(curve, meta):
    """Whether a config may name both."""
    goes_with = registry.get_option("meta_schedule", meta).facts["curve"]
    return goes_with in (None, curve) and (curve not in OVER_STREAM or meta == "none")


PAIRS = [
    pair
    for pair in itertools.product(CURVES, registry.option_names("meta_schedule"))
    if is_pair(*pair)
]
TASKS = 4
lengths = st.integers(1, 120)
shares = st.floats(0, 1)


@st.composite
def any_schedule(draw, pairs=tuple(PAIRS)):
    """A valid schedule and the steps of a task."""
    name, meta = draw(st.sampled_from(pairs))
    steps, values = draw(lengths), {}
    if "warmup" in settings_of("schedule", name):
        values["warmup"] = draw(shares)
    if "cooldown" in settings_of("schedule", name):
        values["cooldown"] = draw(st.floats(0, 1 - values["warmup"]))
    if "shift" in settings_of("schedule", name):
        values["shift"] = draw(st.integers(0, 50))
    if "level" in settings_of("schedule", name):
        values["level"] = draw(shares)
    if name in OVER_STREAM and math.ceil(values["cooldown"] * steps - 1e-9) >= steps:
        values["cooldown"] = 0.0
    if "decay" in settings_of("meta_schedule", meta):
        values["decay"] = draw(shares)
    if "peaks" in settings_of("meta_schedule", meta):
        values["peaks"] = tuple(draw(st.lists(shares, min_size=TASKS, max_size=TASKS)))
    return Schedule(name, meta, **values), steps


def reached_rates(schedule, steps, count):
    """The rates of `count` steps of an optimizer that a scheduler drives."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=schedule.peak)
    scheduler, rates = schedules.lr_scheduler(optimizer, schedule, steps), []
    assert isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler)
    for _ in range(count):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_the_package_has_the_schedules_of_the_specification():
    assert set(CURVES) >= set(LAST)
    assert set(registry.option_names("meta_schedule")) >= {
        "none", "cosine", "cosine-dynamic", "rsqrt", "rsqrt-continued", "rsqrt-recovered",
        "geometric", "free",
    }  # fmt: skip
    assert OVER_STREAM == ["infinite"]


@given(any_schedule())
def test_finite_never_negative_never_above_the_peak(case):
    schedule, steps = case
    rates = analyses.learning_rates(schedule, TASKS, steps)
    assert rates.shape == (TASKS, steps)
    assert np.isfinite(rates).all()
    assert (rates >= 0).all()
    assert (rates <= schedule.peak * (1 + 1e-9)).all()


@given(any_schedule(), st.integers(0, TASKS - 1))
def test_the_warmup_is_a_line_and_nothing_rises_after_it(case, task):
    schedule, steps = case
    rates = analyses.learning_rates(schedule, TASKS, steps)[task]
    warmup, _ = schedule.durations(steps)
    if schedule.name in OVER_STREAM and task:
        warmup = 0
    line = rates[max(warmup - 1, 0)] * np.arange(1, warmup + 1) / max(warmup, 1)
    assert rates[:warmup] == pytest.approx(line, abs=1e-12)
    if registry.get_option("schedule", schedule.name).facts["continuous"]:
        assert (np.diff(rates[max(warmup - 1, 0) :]) <= 1e-12).all()


LAST = {
    "constant": lambda n, w, c: 1.0,
    "linear": lambda n, w, c: 1 / (n - w),
    "cosine": lambda n, w, c: schedules.FLOOR,
    "rsqrt": lambda n, w, c: 0.0,
    "wsd": lambda n, w, c: 1 / c,
    "wsd-sqrt": lambda n, w, c: 1 - math.sqrt((c - 1) / c),
    "infinite": lambda n, w, c: 0.5 / c,
}


@given(st.sampled_from(list(LAST)), st.integers(8, 200), st.integers(0, TASKS - 1))
def test_the_last_step_is_what_the_definition_says(name, steps, task):
    schedule = Schedule(name, peak=1.0)
    last = schedules.learning_rate(schedule, steps, task, steps - 1)
    assert last == pytest.approx(LAST[name](steps, *schedule.durations(steps)), abs=1e-12)


@given(any_schedule(), st.integers(0, TASKS - 1))
def test_a_step_is_the_same_asked_directly_or_reached_by_running(case, task):
    schedule, steps = case
    reached = reached_rates(schedule, steps, (task + 1) * steps)
    direct = [schedules.learning_rate(schedule, steps, task, n) for n in range(steps)]
    assert reached[task * steps :] == direct


@pytest.mark.parametrize(("name", "meta"), PAIRS)
@given(st.integers(8, 120), st.integers(0, TASKS - 1))
@settings(max_examples=10)
def test_equal_tasks_may_be_listed(name, meta, steps, task):
    schedule = usual(name, meta)
    for step in (0, 1, steps // 2, steps - 2, steps - 1):
        rates = [
            schedules.learning_rate(schedule, lengths, task, step)
            for lengths in (steps, (steps,) * TASKS, [steps] * (task + 1))
        ]
        assert rates[0] == rates[1] == rates[2]


UNEQUAL = (200, 50, 120, 80)


@pytest.mark.parametrize(("name", "meta"), PAIRS)
def test_a_scheduler_walks_through_unequal_tasks_and_stays_at_the_last_rate(name, meta):
    schedule = usual(name, meta)
    expected = [
        schedules.learning_rate(schedule, UNEQUAL, task, step)
        for task, steps in enumerate(UNEQUAL)
        for step in range(steps)
    ]
    reached = reached_rates(schedule, list(UNEQUAL), len(expected) + 10)
    assert reached == expected + [expected[-1]] * 10
    assert 0 <= min(expected) <= max(expected) <= 1


def test_unequal_tasks_by_hand():
    """Each task warms up and cools down by its own length; to the stretched cosine tasks count
    alike, whatever their steps."""
    wsd = Schedule("wsd", peak=1.0, warmup=0.5, cooldown=0.25)
    rates = [[schedules.learning_rate(wsd, (4, 8), t, n) for n in range((4, 8)[t])] for t in (0, 1)]
    assert rates == [[0.5, 1, 1, 1], [0.25, 0.5, 0.75, 1, 1, 1, 1, 0.5]]
    steps, schedule = (200, 50, 120), Schedule("cosine", "cosine-dynamic", 1.0, warmup=0.1)
    for task in range(3):
        length = 0.9 * steps[task]
        passed = (task + np.arange(1, length + 1) / length) / (task + 1)
        curve = (1 + np.cos(np.pi * passed)) / 2
        rates = [
            schedules.learning_rate(schedule, steps, task, n)
            for n in range(steps[task] // 10, steps[task])
        ]
        assert rates == pytest.approx(1e-3 + (1 - 1e-3) * curve)
    infinite = Schedule("infinite", peak=1.0, warmup=0.1, cooldown=0.1, level=0.4)
    for task, count in enumerate(steps):
        trunk = [schedules.learning_rate(infinite, steps, task, n) for n in range(count)]
        assert trunk[int(0.9 * count) - 1] == pytest.approx(0.4)
        assert trunk[-1] == pytest.approx(0.4 / (0.1 * count))
    assert schedules.learning_rate(infinite, steps, 1, 0) == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("steps", "task", "step"),
    [(40, 0, 40), (40, 0, 41), (40, 0, -1), ([40, 8], 1, 8), ([40, 8], 2, 0), ([40, 8], -1, 0)],
)
def test_no_rate_beside_the_tasks(steps, task, step):
    """One step past the end, the rate was negative: a step of gradient ascent."""
    with pytest.raises(ValueError, match=f"step {step} of task {task} does not exist"):
        schedules.learning_rate(Schedule("wsd"), steps, task, step)


TENS = st.lists(st.integers(1, 30).map(lambda tens: 10 * tens), min_size=2, max_size=12)


@pytest.mark.parametrize("meta", ["cosine", "rsqrt", "rsqrt-continued", "geometric"])
@given(steps=TENS)
def test_no_update_is_large_enough_to_raise_the_peak(meta, steps):
    """A long update after short ones once got a higher peak than they had."""
    curve = Schedule("cosine", meta, 1.0, warmup=0.1)
    tasks = [schedules.TaskSchedule(curve, t, tuple(steps)) for t in range(len(steps))]
    peaks = [registry.get_option("meta_schedule", meta).value(task) for task in tasks]
    assert all(b <= a + 1e-12 for a, b in itertools.pairwise(peaks))
    assert peaks[0] == 1


@given(case=any_schedule(), steps=TENS)
def test_what_comes_later_moves_no_rate(case, steps):
    schedule, _ = case
    if "peaks" in registry.get_option("meta_schedule", schedule.meta).settings:
        return
    try:
        known = schedules.task_rates(schedule, steps[:-1], len(steps) - 2)
    except ValueError:  # a task is too short for what this schedule warms up
        return
    assert known == schedules.task_rates(schedule, steps, len(steps) - 2)


def test_a_stream_of_one_number_has_no_end():
    rates = reached_rates(Schedule("constant", "geometric", 1.0), 2, 40)
    assert rates == [0.5 ** (number // 2) for number in range(40)]


def usual(name, meta, **more):
    """A schedule of tenths where it has durations."""
    tenths = {key: 0.1 for key in ("warmup", "cooldown") if key in settings_of("schedule", name)}
    peaks = {"peaks": (1.0, 0.5, 0.25, 0.125)} if meta == "free" else {}
    return Schedule(name, meta, 1.0, **tenths, **peaks, **more)


@pytest.mark.parametrize(
    ("name", "meta"),
    [pair for pair in PAIRS if registry.get_option("schedule", pair[0]).facts["continuous"]],
)
def test_continuous_inside_a_task(name, meta):
    rates = analyses.learning_rates(usual(name, meta), TASKS, 2000)
    steepest = math.sqrt(1 / 200) if name == "wsd-sqrt" else 1 / 199  # the first step of a cooldown
    assert np.abs(np.diff(rates, axis=1)).max() <= steepest + 1e-9


def test_infinite_is_continuous_across_tasks_and_ends_each_in_a_branch():
    schedule = usual("infinite", "none", level=0.4)
    steps, kept = 2000, schedules.branch_step(schedule, 2000)
    assert kept == 1800
    rates = analyses.learning_rates(schedule, TASKS, steps)
    trunk = rates[:, :kept].ravel()
    assert np.abs(np.diff(trunk)).max() <= 1 / 199
    assert trunk[199] == 1
    assert trunk[kept:] == pytest.approx(0.4)
    assert (rates[:, kept] == pytest.approx(0.4)) and (np.diff(rates[:, kept:]) < 0).all()
    assert rates[:, -1] == pytest.approx(0.4 / 200)
    assert {
        schedules.branch_step(usual(*pair), steps) for pair in PAIRS if pair[0] != "infinite"
    } == {None}


N, W = 1420, 142
PUBLISHED = [
    (("cosine", "none"), (1, 1, 1)),
    (("rsqrt", "none"), (1, 1, 1)),
    (("cosine", "cosine"), (1, 0.500, 0.250)),
    (("cosine", "cosine-dynamic"), (1, 0.500, 0.250)),
    (("rsqrt", "rsqrt"), (1, 0.427, 0.379)),
    (("rsqrt", "rsqrt-continued"), (1, 0.334, 0.243)),
    (("rsqrt", "rsqrt-recovered"), (1, 0.334, 0.243)),
]


@pytest.mark.parametrize(("pair", "peaks"), PUBLISHED)
def test_peaks_as_published(pair, peaks):
    rates = analyses.learning_rates(usual(*pair), 3, N)
    assert rates.max(axis=1) == pytest.approx(peaks, abs=1.5e-3)
    assert rates[:, W - 1] == pytest.approx(rates.max(axis=1))


def reference_cosine(t, n):
    """The published code's recurrence with autoregressive recovery."""
    low = 1e-3
    v = (1 + math.cos(math.pi * (t * (N - W) + 1) / ((t + 1) * (N - W)))) / 2 if t else 1
    peak = low + (1 - low) * v
    if n < W:
        return peak * (n + 1) / W
    return low + (peak - low) * (1 + math.cos(math.pi * (n - W + 1) / (N - W))) / 2


def reference_rsqrt(t, n):
    """The published code's recurrence with autoregressive recovery and a cooldown."""
    low, cooldown = 1e-3, W
    peak = low + (1 - low) * math.sqrt((t + 1) * W / (t * N + W))
    if n < W:
        return peak * (n + 1) / W
    q = low + (peak - low) * math.sqrt(W / n)
    c = n - (N - cooldown)
    return q if c < 0 else q * (cooldown - c - 1) / cooldown


@pytest.mark.parametrize(
    ("name", "reference"), [("cosine", reference_cosine), ("rsqrt", reference_rsqrt)]
)
def test_the_reference_recurrences(name, reference):
    rates = analyses.learning_rates(usual(name, name), TASKS, N)
    assert rates == pytest.approx(np.array([[reference(t, n) for n in range(N)] for t in range(4)]))


def test_recovered_is_one_decay_over_the_stream():
    rates = analyses.learning_rates(usual("rsqrt", "rsqrt-recovered"), TASKS, N)[:, W : N - W]
    assert (np.diff(rates.ravel()) <= 0).all()
    counted = np.arange(TASKS * (N - 2 * W)) + W
    assert rates.ravel() == pytest.approx(1e-3 + (1 - 1e-3) * np.sqrt(W / counted))


def test_a_shift_goes_on_where_so_many_steps_of_decay_end():
    whole = analyses.learning_rates(
        Schedule("rsqrt", peak=1.0, warmup_steps=10, cooldown=0.0), 1, 300
    )[0]
    later = Schedule("rsqrt", peak=1.0, warmup_steps=10, cooldown=0.0, shift=200)
    assert analyses.learning_rates(later, 1, 100)[0, 10:] == pytest.approx(whole[210:300])


def test_tables_by_hand():
    third = math.sqrt(1 / 3)
    for schedule, expected in (
        (Schedule("linear", peak=2.0, warmup_steps=1), [2, 2, 1.5, 1, 0.5]),
        (Schedule("wsd", peak=1.0, warmup_steps=2, cooldown_steps=2), [0.5, 1, 1, 1, 0.5]),
        (
            Schedule("wsd-sqrt", peak=1.0, warmup_steps=1, cooldown_steps=3),
            [1, 1, 1, 1 - third, 1 - math.sqrt(2 / 3)],
        ),
        (Schedule("cosine", peak=1.0, warmup_steps=3), [1 / 3, 2 / 3, 1, 0.5005, 0.001]),
        (Schedule("constant", "geometric", 0.5), [0.5] * 5),
    ):
        assert analyses.learning_rates(schedule, 1, 5)[0] == pytest.approx(expected)
    geometric = analyses.learning_rates(Schedule("constant", "geometric", 1.0, decay=0.5), 4, 2)
    assert geometric.tolist() == [[1, 1], [0.5, 0.5], [0.25, 0.25], [0.125, 0.125]]
    free = analyses.learning_rates(Schedule("constant", "free", 2.0, peaks=(1.0, 0.0, 0.5)), 3, 1)
    assert free.ravel().tolist() == [2, 0, 1]


def test_the_adapter_keeps_the_rates_of_groups():
    groups = [{"params": [torch.zeros(1, requires_grad=True)], "lr": lr} for lr in (1.0, 0.1)]
    optimizer = torch.optim.SGD(groups)
    scheduler = schedules.lr_scheduler(optimizer, Schedule("wsd", cooldown_steps=4), 8)
    for _ in range(7):
        optimizer.step()
        scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.25, 0.025])


@given(st.sampled_from(registry.option_names("schedule", "cooldown")), lengths, shares, shares)
def test_durations_fit_into_the_task_or_are_refused(name, steps, warmup, cooldown):
    schedule = Schedule(name, warmup=warmup, cooldown=cooldown)
    try:
        rising, falling = schedule.durations(steps)
    except ValueError as error:
        if "no step for the next task" in str(error):
            assert name in OVER_STREAM and math.ceil(cooldown * steps - 1e-9) >= steps
            return
        assert "in a task of" in str(error)
        assert warmup + cooldown > 1 - 1e-9
    else:
        assert math.ceil(warmup * steps - 1e-9) == rising
        assert 0 <= falling <= steps - rising


@pytest.mark.parametrize(
    ("assignments", "words"),
    [
        (["schedule.name=wsd", "schedule.warmup_steps=30", "schedule.cooldown_steps=11"],
         "warmup 30 + cooldown 11 steps in a task of 40"),
        (["schedule.name=wsd", "schedule.warmup=0.7", "schedule.cooldown=0.6"],
         "warmup 28 + cooldown 24 steps in a task of 40"),
        (["schedule.warmup_steps=41"], "warmup 41 + cooldown 0 steps in a task of 40"),
        (["schedule.warmup=0.1", "schedule.warmup_steps=8"], "warmup 0.1 and warmup_steps 8"),
        (["schedule.warmup_steps=-1"], "schedule.warmup_steps"),
        (["schedule.meta=rsqrt-recovered"],
         "meta 'rsqrt-recovered' works with 'rsqrt', not with 'cosine'"),
        (["schedule.name=infinite", "schedule.meta=cosine"], "one curve over the whole stream"),
        (["schedule.cooldown=0.2"], "cooldown: not used by 'cosine', only by rsqrt, wsd"),
        (["schedule.name=constant", "schedule.warmup=0.2"], "warmup: not used by 'constant'"),
        (["schedule.name=infinite", "schedule.cooldown_steps=40", "schedule.warmup=0.0"],
         "leaves no step for the next task"),
        (["schedule.shift=3"], "shift: not used by 'cosine'"),
        (["schedule.peaks=[1.0]"], "peaks: not used by 'none', only by free"),
        (["schedule.meta=free", "schedule.peaks=[1.0, 0.5]"], "schedule.peaks: 2 peaks for 8"),
        (["schedule.meta=free", "schedule.peaks=[1.0, 1.5]"], "schedule.peaks.1"),
        (["schedule.name=constant", "schedule.meta=cosine", "training.steps=1"],
         "the learning rate is zero at every step of task 1, of 1 steps"),
        (["schedule.name=rsqrt", "schedule.warmup_steps=0", "training.steps=1"], "of task 0"),
        (["schedule.name=wsd", "schedule.meta=free", "stream.tasks=3",
          "schedule.peaks=[1.0, 0.5, 0.0]"], "zero at every step of task 2"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_with_the_numbers(assignments, words):
    with pytest.raises(CmpError) as error:
        config.parse(config.override({}, assignments))
    assert words in str(error.value)


@example((Schedule("constant", meta="geometric", decay=5e-324), 1))  # times the peak it is zero
@given(any_schedule())
def test_a_task_is_called_idle_where_it_learns_nothing(case):
    schedule, steps = case
    rates = analyses.learning_rates(schedule, TASKS, steps)
    idle = [task for task in range(TASKS) if not rates[task].any()]
    assert schedules.idle_task(schedule, (steps,) * TASKS, 0) == (idle[0] if idle else None)


@pytest.mark.defect
@pytest.mark.parametrize(
    ("schedule", "steps", "words"),
    [
        (Schedule(), [], ["steps", "[]", "whole number"]),
        (Schedule(), 0, ["steps", "0", "whole number"]),
        (Schedule(), -2, ["steps", "-2", "whole number"]),
        (Schedule(), 2.5, ["steps", "2.5", "whole number"]),
        (Schedule(), [5, 0], ["steps", "[5, 0]", "whole number"]),
        (Schedule(), None, ["steps", "None", "whole number"]),
        (Schedule("wsd", warmup_steps=9), [20, 9], ["steps", "in a task of 9", "more steps"]),
        (Schedule("constant", "free", peaks=(1.0, 0.5)), [2, 2, 2], ["peaks", "2", "3"]),
        (Schedule("constant", "free"), 2, ["schedule.peaks: is empty; give one per task"]),
    ],
)
def test_steps_that_no_task_can_have_are_refused(schedule, steps, words):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    with pytest.raises(CmpError) as error:
        schedules.lr_scheduler(optimizer, schedule, steps)
    assert all(word in str(error.value) for word in words)


def test_an_optimizer_that_would_never_learn_is_refused():
    groups = [{"params": [torch.zeros(1, requires_grad=True)], "lr": rate} for rate in (0.0, 0.1)]
    schedules.lr_scheduler(torch.optim.SGD(groups), Schedule(), 10)  # one part stays as it is
    with pytest.raises(CmpError, match="learning rates are 0; give it the peaks"):
        schedules.lr_scheduler(torch.optim.SGD(groups[:1]), Schedule(), 10)


@pytest.mark.defect
def test_past_the_last_of_free_peaks_the_rate_stays():
    free = Schedule("constant", "free", 1.0, peaks=(1.0, 0.25))
    assert reached_rates(free, 3, 9) == [1.0] * 3 + [0.25] * 6
