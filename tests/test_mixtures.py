"""Batches: the ratios are met, every sample has its turn, any step stands alone."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmp.config import Mixture
from cmp.errors import CmpError
from cmp.mixtures import Pools, batch_rows, draw, largest_batch, parts, replay_pool


@st.composite
def mixtures(draw):
    weights = draw(st.lists(st.integers(0, 10), min_size=3, max_size=3).filter(any))
    p, d, b = (weight / sum(weights) for weight in weights)
    return Mixture(p, d, b)


@given(mixtures(), st.integers(2, 600))
def test_parts_fill_the_batch_and_follow_the_ratios(mixture, batch):
    sizes = parts(mixture, batch, empty_buffer=False)
    ratios = (mixture.pretraining, mixture.update, mixture.buffer)
    assert sum(sizes) == batch
    for size, ratio in zip(sizes, ratios, strict=True):
        assert size == 0 if ratio == 0 else abs(size - batch * ratio) < 1 + 1e-6


@given(mixtures(), st.integers(2, 600))
def test_an_empty_buffer_leaves_its_samples_to_the_others(mixture, batch):
    full, empty = (parts(mixture, batch, flag) for flag in (False, True))
    assert sum(empty) == batch
    assert empty[2] == 0
    gained = [new - old for new, old in zip(empty[:2], full[:2], strict=True)]
    assert min(gained) >= 0
    if mixture.pretraining > 0 and mixture.update > 0:
        assert abs(gained[0] - gained[1]) <= 1
    else:
        assert max(gained) == full[2]


def test_parts_of_the_reference():
    """512 by .33/.34/.33: 169/175/168, and 253/259 in the first task (spec 7; order P, D, B)."""
    mixture = Mixture(0.33, 0.34, 0.33)
    assert parts(mixture, 512, empty_buffer=False) == (169, 175, 168)
    assert parts(mixture, 512, empty_buffer=True) == (253, 259, 0)


@given(st.integers(1, 50), st.integers(1, 40), st.integers(0, 5))
def test_every_sample_has_its_turn(size, count, task):
    pool = np.arange(100, 100 + size)
    steps = -(-3 * size // count)
    drawn = np.concatenate([draw(pool, count, "x", 0, task, step) for step in range(steps)])
    for epoch in range(3):
        assert sorted(drawn[epoch * size : (epoch + 1) * size]) == pool.tolist()


@given(st.integers(0, 30), st.integers(0, 1000))
def test_a_step_needs_no_other_step(step, seed):
    pool = np.arange(37)
    alone = draw(pool, 8, "x", seed, 2, step)
    for before in range(step):
        draw(pool, 8, "x", seed, 2, before)
    np.testing.assert_array_equal(alone, draw(pool, 8, "x", seed, 2, step))


def test_seeds_tasks_and_pools_differ():
    pool = np.arange(1000)
    draws = {
        tuple(draw(pool, 8, name, seed, task, 0))
        for name in ("update", "buffer")
        for seed in range(3)
        for task in range(3)
    }
    assert len(draws) == 18


def test_batch_rows_come_from_their_pools():
    pools = Pools(np.arange(100), 1000 + np.arange(50), 2000 + np.arange(30))
    rows = batch_rows(pools, Mixture(0.25, 0.5, 0.25), 16, seed=0, task=1, step=4)
    assert [int((rows // 1000 == block).sum()) for block in range(3)] == [4, 8, 4]


def test_an_empty_pool_is_refused_by_name():
    pools = Pools(np.arange(0), np.arange(5), np.arange(5))
    with pytest.raises(CmpError, match=r"mixture\.pretraining"):
        batch_rows(pools, Mixture(), 8, 0, 1, 0)


@given(mixtures(), st.integers(2, 300), st.lists(st.integers(0, 60), min_size=3, max_size=3))
def test_the_largest_batch_takes_no_sample_twice(mixture, batch, sizes):
    pools = Pools(*(1000 * i + np.arange(size) for i, size in enumerate(sizes)))
    largest = largest_batch(pools, mixture, batch)
    assert largest <= batch
    if largest:
        rows = batch_rows(pools, mixture, largest, 0, 0, 0)
        assert len(set(rows)) == len(rows) == largest
    if largest < batch:
        taken = parts(mixture, largest + 1, empty_buffer=sizes[2] == 0)
        assert any(part > size for part, size in zip(taken, sizes, strict=True))


def test_replay_pool():
    pool = np.arange(500, 1500)
    part = replay_pool(pool, 0.1, seed=3)
    assert len(part) == 100
    assert set(part) <= set(pool)
    assert len(set(part)) == 100
    assert set(part) != set(replay_pool(pool, 0.1, seed=4))
    np.testing.assert_array_equal(replay_pool(pool, 1.0, seed=3), pool)
