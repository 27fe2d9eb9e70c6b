"""Fronts: who dominates whom, and shares that agree with the paired t-distribution."""

import itertools

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from cmp.errors import CmpError
from lab.analyses import pareto_front


def trajectory(**settings):
    """setting -> (A_KA, A_ZS) a replicate."""
    return pd.DataFrame(
        [
            {"setting": name, "replicate": r, "task": 1, "scope": "full", "A_KA": ka, "A_ZS": zs,
             "GM": np.sqrt(ka * zs)}
            for name, points in settings.items()
            for r, (ka, zs) in enumerate(points)
        ]
    )  # fmt: skip


def around(ka, zs):
    return [(ka + x, zs - x) for x in (-0.2, -0.1, 0.0, 0.1, 0.2)]


def test_the_front_of_what_is_clear():
    frame = trajectory(worst=around(20, 15), learns=around(36, 20), keeps=around(20, 33))
    found = pareto_front(frame)
    assert found.index.tolist() == ["learns", "keeps", "worst"]
    assert found["on_front"].tolist() == [True, True, False]
    assert found["share"].to_list() == pytest.approx([1, 1, 0], abs=0.005)
    assert found.loc["keeps", ["A_KA", "A_ZS", "n"]].tolist() == pytest.approx([20, 33, 5])


def test_equal_settings_are_both_on_the_front():
    found = pareto_front(trajectory(a=around(20, 30), b=around(20, 30), c=[(20.0, 29.0)] * 5))
    assert found["on_front"].to_dict() == {"a": True, "b": True, "c": False}
    assert found.loc[["a", "b"], "share"].tolist() == [1, 1]


@pytest.mark.parametrize("count", [3, 5])
def test_a_share_is_that_of_the_paired_t_distribution(count):
    """`b` keeps less for certain, so it is on the front exactly where it learns more than `a`.
    Base and stream move both by 10 points, which pairing takes away."""
    shared, own = np.array([-10.0, 0, 10, 5, -5])[:count], np.array([1.0, -1, 2, 0, 1])[:count]
    a = [(40 + x, 30.0) for x in shared]
    b = [(40 + x + d, 10.0) for x, d in zip(shared, own, strict=True)]
    error = own.std(ddof=1) / np.sqrt(count)
    expected = stats.t.cdf(own.mean() / error, count - 1)
    assert 0.6 < expected < 0.95
    assert pareto_front(trajectory(a=a, b=b)).loc["b", "share"] == pytest.approx(
        expected, abs=0.015
    )


@given(st.permutations(range(15)))
def test_the_front_does_not_depend_on_the_order_of_rows(order):
    random = np.random.default_rng(0)
    frame = trajectory(**{name: random.normal(30, 1, (5, 2)) for name in "abc"})
    pd.testing.assert_frame_equal(
        pareto_front(frame.iloc[order]), pareto_front(frame), check_exact=True
    )


def test_only_replicates_that_hold_every_setting_count():
    frame = trajectory(a=around(20, 30), b=around(30, 20)[:4])
    assert pareto_front(frame)["n"].tolist() == [4, 4]
    assert pareto_front(frame).loc["a", "A_KA"] == pytest.approx(np.mean([19.8, 19.9, 20, 20.1]))
    alone = pareto_front(frame[frame["replicate"] == 0])
    assert alone["on_front"].all() and alone["share"].isna().all()
    apart = frame[(frame["setting"] == "a") == (frame["replicate"] > 1)]
    with pytest.raises(CmpError, match="no replicate holds every setting"):
        pareto_front(apart)


def test_no_setting_of_the_front_is_dominated():
    random = np.random.default_rng(1)
    frame = trajectory(**{name: random.normal(30, 5, (5, 2)) for name in "abcdefgh"})
    found = pareto_front(frame)
    best = found[found["on_front"]]
    for (_, one), (_, other) in itertools.permutations(best.iterrows(), 2):
        assert one["A_KA"] > other["A_KA"] or one["A_ZS"] > other["A_ZS"]
    for _, one in found[~found["on_front"]].iterrows():
        assert ((best["A_KA"] > one["A_KA"]) & (best["A_ZS"] > one["A_ZS"])).any()
