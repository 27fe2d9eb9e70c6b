"""Fronts: they fall, settings on them gain nothing, and intervals cover what they say."""

import intervals
import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scipy import stats

from cmp.errors import CmpError
from lab.evidence import fronts
from lab.evidence.fronts import fit_front, measure_gain

PEAKS = 1e-4 * 1.6 ** np.arange(7)
A_KA = np.array([30.0, 36, 42, 46, 49, 51, 50])
A_ZS = np.array([52.0, 51.6, 51, 50.3, 49.2, 47.3, 44])
BASES = np.tile(np.arange(2, 12), 2)
NAMES = [f"peak {peak:.2g}" for peak in PEAKS]


def runs(accumulation, retention, noise=None, shared=(0.0, 0.0)):
    """Twenty replicates around a mean; `shared` moves what replicates have in common."""
    own = np.zeros((2, 20)) if noise is None else noise.normal(0, 0.8, (2, 20))
    gained, kept = accumulation + own[0] + shared[0], retention + own[1] + shared[1]
    return pd.DataFrame({"A_KA": gained, "A_ZS": kept, "base": BASES})


def front_runs(**more):
    return {name: runs(a, z, **more) for name, a, z in zip(NAMES, A_KA, A_ZS, strict=True)}


def gain(own, front=None):
    return measure_gain(own, front or front_runs(), dict(zip(NAMES, PEAKS, strict=True)), "mine")


def test_a_front_goes_through_its_peaks_up_to_the_highest_accumulation():
    front = fit_front(PEAKS, A_KA, A_ZS)
    assert [front.retention_at(a) for a in A_KA[:6]] == pytest.approx(A_ZS[:6])
    assert len(front.accumulation) == 6  # what descends is cut
    assert front.retention_at(60) == pytest.approx(A_ZS[5])
    assert front.slope_at(60) == 0
    assert front.slope_at(47) < 0
    assert front.accumulation_at(50.3) == pytest.approx(46)
    assert np.isnan(front.accumulation_at(53))


def test_a_front_ends_where_higher_peaks_gain_hardly_more():
    """So that a bound does not hang on which of two nearly equal peaks gains most."""
    gained, kept = np.array([30.0, 36, 42, 46, 49, 49.5, 49.6]), A_ZS.copy()
    found = []
    for lead in (0.1, -0.1):  # of the last peak over the one before
        gained[6] = gained[5] + lead
        front = fit_front(PEAKS, gained, kept)
        assert front.accumulation[-1] == 49
        runs_of = {n: runs(a, z) for n, a, z in zip(NAMES, gained, kept, strict=True)}
        found.append(gain(runs(52, 49), runs_of))
    assert all(each.is_bound for each in found)
    assert [each.values.mean() for each in found] == pytest.approx([49 - 49.2] * 2)


scores = st.integers(100, 600).map(lambda tenths: tenths / 10)


@given(st.lists(st.tuples(scores, scores), min_size=6, max_size=9))
@example([(10.0, 25.2), (10.0, 10.0), (10.1, 10.0), (10.0, 10.0), (10.0, 48.0), (10.2, 47.6)])
def test_a_front_falls_whatever_the_scores(points):
    peaks = 1e-4 * 1.5 ** np.arange(len(points))
    try:
        front = fit_front(peaks, *np.array(points).T)
    except CmpError as error:
        assert "does not increase" in str(error)
        return
    grid = np.linspace(front.accumulation[0], front.accumulation[-1], 50)
    retention = np.array([front.retention_at(x) for x in grid])
    assert (np.diff(retention) <= 1e-9).all()
    assert all(front.slope_at(x) <= 1e-9 for x in grid)
    middle = retention[25]
    assert front.retention_at(front.accumulation_at(middle)) == pytest.approx(middle, abs=1e-3)


def test_fronts_that_cannot_be_trusted_are_refused():
    with pytest.raises(CmpError, match="at least 6"):
        fit_front(PEAKS[:5], A_KA[:5], A_ZS[:5])
    with pytest.raises(CmpError, match=r"1\.6 apart"):
        fit_front(np.delete(PEAKS, 3), np.delete(A_KA, 3), np.delete(A_ZS, 3))
    with pytest.raises(CmpError, match="add lower peaks"):
        fit_front(PEAKS, -np.arange(7.0), A_ZS)


@pytest.mark.parametrize("place", [0, 2, 5])
def test_a_setting_on_the_front_gains_nothing_and_one_above_it_what_it_is_above(place):
    on = gain(runs(A_KA[place], A_ZS[place]))
    assert on.values.to_numpy() == pytest.approx(np.zeros(20))
    assert on.nearest == NAMES[place]
    above = gain(runs(A_KA[place], A_ZS[place] + 1.5))
    assert above.values.mean() == pytest.approx(1.5)
    assert above.pseudo.to_numpy() == pytest.approx(np.full(10, 1.5))
    assert not above.is_bound


def test_a_mirror_is_the_accumulation_beyond_the_front():
    assert gain(runs(46, 50.3)).mirror == pytest.approx(0)
    assert gain(runs(48, 50.3)).mirror == pytest.approx(2)
    assert np.isnan(gain(runs(48, 58)).mirror)


def test_what_all_settings_of_a_replicate_share_moves_nothing():
    noise = np.random.default_rng(0).normal(0, 2, 20)
    quiet = gain(runs(46, 51.3))
    moved = gain(runs(46, 51.3, shared=(0, noise)), front_runs(shared=(0, noise)))
    assert moved.values.to_numpy() == pytest.approx(quiet.values.to_numpy())


def test_beyond_the_front_a_gain_is_a_bound_and_below_it_there_is_none():
    beyond = gain(runs(55, 49))
    assert beyond.is_bound
    assert beyond.values.mean() == pytest.approx(49 - 47.3)
    with pytest.raises(CmpError, match=r"'mine': its A_KA of 20\.0 is below the front"):
        gain(runs(20, 53))


def test_a_local_front_says_nothing_beyond_its_ends():
    few = {name: table for name, table in front_runs().items() if name in NAMES[1:5]}
    peaks = dict(zip(NAMES, PEAKS, strict=True))
    inside = measure_gain(runs(42, 52), few, peaks, "mine", is_local=True)
    assert inside.values.mean() == pytest.approx(1.0)
    for accumulation, words in ((35, "below the front"), (50, "beyond the front, which is local")):
        with pytest.raises(CmpError, match=words):
            measure_gain(runs(accumulation, 50), few, peaks, "mine", is_local=True)
    with pytest.raises(CmpError, match="at least 6"):
        measure_gain(runs(44, 50), few, peaks, "mine")
    del few[NAMES[1]]
    with pytest.raises(CmpError, match="at least 4"):
        measure_gain(runs(44, 50), few, peaks, "mine", is_local=True)
    assert measure_gain(runs(44, 51.65), few, peaks, "mine", True, 3).values.mean() > 0


def test_a_local_front_that_has_seen_its_maximum_bounds_what_is_beyond():
    few = {name: table for name, table in front_runs().items() if name in NAMES[3:7]}
    peaks = dict(zip(NAMES, PEAKS, strict=True))
    beyond = measure_gain(runs(53, 50), few, peaks, "mine", is_local=True)
    assert beyond.is_bound
    assert beyond.values.mean() == pytest.approx(50 - 47.3)


def test_a_front_without_the_setting_s_replicates_is_refused():
    front = front_runs() | {NAMES[2]: runs(A_KA[2], A_ZS[2])[:10]}
    with pytest.raises(CmpError, match=r"'peak 0\.00026' lacks some of the setting's replicates"):
        gain(runs(46, 50), front)


@pytest.mark.parametrize("place", intervals.PLACES)
def test_intervals_at_the_level_of_the_claims_cover_the_true_gain(place):
    draws = 60
    for level, row in intervals.count_misses(place, draws).iterrows():
        assert row[["above", "below"]].sum() <= stats.binom.isf(0.001, draws, 1 - level), level


def test_a_part_a_little_beyond_the_front_is_measured_along_the_tangent():
    own = runs(30.05, 53.0)
    own.loc[own["base"] == 2, "A_KA"] += 1.8  # without it the mean lies 0.15 below the front
    own["A_KA"] -= 0.18
    found = gain(own)
    curve = fit_front(PEAKS, A_KA, A_ZS)
    without = 53.0 - curve.extended_to(29.87)
    assert curve.extended_to(29.87) > A_ZS[0]
    estimate = found.values.mean()
    assert found.pseudo[2] == pytest.approx(10 * estimate - 9 * without)
    own.loc[own["base"] == 2, "A_KA"] += 7
    own["A_KA"] -= 0.7
    with pytest.raises(CmpError, match="without one of the bases"):
        gain(own)


def test_the_error_of_accumulation_counts_where_a_setting_is_beyond_the_front_by_chance(
    monkeypatch,
):
    noise = np.random.default_rng(1)
    front, own = front_runs(noise=noise), runs(51.3, 49, noise)
    far = own.assign(A_KA=own["A_KA"] + 5)
    found = [gain(each, front) for each in (own, far)]
    monkeypatch.setattr(fronts, "DOUBT", 0.0)
    flat = [gain(each, front) for each in (own, far)]
    assert all(each.is_bound for each in found)
    assert found[0].pseudo.std() > 1.2 * flat[0].pseudo.std()
    assert found[0].pseudo.mean() == pytest.approx(flat[0].pseudo.mean(), abs=0.3)
    assert found[1].pseudo.std() == flat[1].pseudo.std()


def test_a_part_whose_highest_peak_is_another_keeps_the_whole_sample_s():
    front = front_runs()
    top = front[NAMES[5]]
    top.loc[top["base"] == 4, "A_KA"] += 12  # only with that base is it the highest
    top["A_KA"] -= 2.0
    found = gain(runs(47, 51), front)
    assert found.pseudo.notna().all()
    assert not found.is_bound


def test_the_jackknife_leaves_out_one_base_at_a_time():
    own = runs(46, 50.3)
    own.loc[own["base"] == 4, "A_ZS"] += 10
    found = gain(own)
    assert found.values.mean() == pytest.approx(1.0)
    assert found.pseudo.idxmax() == 4
    assert found.pseudo.drop(4).to_numpy() == pytest.approx(np.zeros(9))
    assert fronts.MIN_PEAKS == 6
