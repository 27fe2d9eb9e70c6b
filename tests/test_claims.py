"""Statistics of studies: hand-computed cases, pairing, coverage."""

import numpy as np
import pandas as pd
import pytest

from cmp.claims import ends, final, paired_difference, t_interval


def trajectory(**settings):
    rows = [
        {"setting": name, "replicate": r, "task": task, "scope": scope, "A_KA": x, "A_ZS": 2 * x,
         "GM": 2**0.5 * x}
        for name, values in settings.items()
        for r, value in enumerate(values)
        for task, scope, x in ((0, "full", 0.0), (1, "subset", -1.0), (2, "full", value))
    ]  # fmt: skip
    return pd.DataFrame(rows)


def test_t_interval_by_hand():
    """Five values with mean 3 and deviation sqrt(2.5); t(0.975, 4) = 2.776."""
    mean, error, half = t_interval(np.array([1.0, 2, 3, 4, 5]))
    assert mean == 3
    assert error == pytest.approx(np.sqrt(2.5 / 5))
    assert half == pytest.approx(2.7764 * np.sqrt(0.5), rel=1e-4)


def test_one_value_has_no_spread():
    assert t_interval(np.array([4.0]))[0] == 4
    assert np.isnan(t_interval(np.array([4.0]))[1:]).all()


def test_the_end_is_the_last_task_on_the_full_test():
    frame = trajectory(a=[1.0, 3.0])
    assert final(frame)["A_KA"].tolist() == [1.0, 3.0]
    assert final(frame[frame["scope"] == "subset"])["A_KA"].tolist() == [-1.0, -1.0]
    assert ends(frame).loc["a", "A_KA"] == "2.0 ± 12.7"
    assert ends(frame).loc["a", "replicates"] == 2


def test_differences_are_paired_whatever_the_order_of_rows():
    frame = trajectory(a=[11.0, 22.0, 33.0], b=[10.0, 20.0, 30.0])
    expected = paired_difference(frame, "a", "b")
    assert expected.loc["A_KA", "difference"] == pytest.approx(2)
    assert expected.loc["A_KA", "standard_error"] == pytest.approx(1 / np.sqrt(3))
    assert expected.loc["A_ZS", "difference"] == pytest.approx(4)
    shuffled = frame.sample(frac=1, random_state=0)
    pd.testing.assert_frame_equal(paired_difference(shuffled, "a", "b"), expected)


def test_intervals_cover():
    rng = np.random.default_rng(0)
    draws = rng.normal(size=(4000, 5))
    covered = [abs(mean) <= half for mean, _, half in map(t_interval, draws)]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.012)
