"""Learning rates: what each schedule promises, for any lengths."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmp.config import Schedule
from cmp.schedules import SCHEDULES, durations, learning_rate

steps = st.integers(1, 400)
shares = st.floats(0, 1)
names = st.sampled_from(sorted(SCHEDULES))


@given(names, steps, shares, shares, st.floats(1e-6, 1))
def test_positive_and_never_above_the_peak(name, n, warmup, cooldown, peak):
    schedule = Schedule(name, peak, warmup, cooldown)
    rates = [learning_rate(schedule, n, step) for step in range(n)]
    assert all(0 < rate <= peak * (1 + 1e-9) for rate in rates)


@given(steps, shares, shares)
def test_durations_fit_into_the_task(n, warmup, cooldown):
    rising, falling = durations(Schedule(warmup=warmup, cooldown=cooldown), n)
    assert rising >= 0
    assert falling >= 0
    assert rising + falling <= n


@given(st.sampled_from(["warmup-cosine", "warmup-constant-cooldown"]), steps, shares, shares)
def test_rises_through_the_warmup_then_never_rises(name, n, warmup, cooldown):
    schedule = Schedule(name, 1.0, warmup, cooldown)
    rising, _ = durations(schedule, n)
    rates = [learning_rate(schedule, n, step) for step in range(n)]
    assert rates[:rising] == pytest.approx([(step + 1) / rising for step in range(rising)])
    after = rates[max(rising - 1, 0) :]
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(after))


def test_cosine_as_the_specification_has_it():
    """Last step at a thousandth of the peak; a mean rate of half the peak (spec 5)."""
    schedule = Schedule("warmup-cosine", 1.0, 0.1)
    rates = [learning_rate(schedule, 1420, step) for step in range(1420)]
    assert rates[-1] == pytest.approx(1e-3)
    assert sum(rates) / 1420 == pytest.approx(0.5, abs=0.005)


def test_cooldown_starts_where_the_constant_phase_ends():
    schedule = Schedule("warmup-constant-cooldown", 2.0, 0.1, 0.25)
    rates = [learning_rate(schedule, 40, step) for step in range(40)]
    assert rates[4:31] == [2.0] * 27
    assert rates[-1] == pytest.approx(2.0 / 10)


def test_constant():
    assert {learning_rate(Schedule("constant", 0.5), 7, step) for step in range(7)} == {0.5}
