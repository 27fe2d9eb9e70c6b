"""Claims: hand-computed cases, pairing, what intervals and verdicts keep in simulated studies."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from cmp.errors import CmpError
from cmp.experiments import results, store, studies
from cmp.experiments.claims import (
    ALPHA,
    Claim,
    claims_of,
    end_table,
    final_scores,
    holm,
    judge,
    paired_difference,
    score_change,
    t_interval,
    verdicts,
)
from lab import scoreboard

SIMULATED = 20_000


def trajectory(**settings):
    rows = [
        {"setting": name, "replicate": r, "task": task, "scope": scope, "A_KA": x, "A_ZS": 2 * x,
         "GM": 2**0.5 * x}
        for name, values in settings.items()
        for r, value in enumerate(values)
        for task, scope, x in ((0, "full", 0.0), (1, "subset", -1.0), (2, "full", value))
    ]  # fmt: skip
    return pd.DataFrame(rows)


def claim(name="c", setting="a", against="b", aggregate="A_KA", **more):
    return Claim(name, "It is so.", setting, against, aggregate, **more)


def same(**more):
    return claim(kind="equivalence", **more)


def judged(differences, family):
    """`judge` over simulated families: differences [simulation, claim, replicate]."""
    count = differences.shape[-1]
    error = differences.std(axis=-1, ddof=1) / np.sqrt(count)
    return judge(differences.mean(axis=-1), error, np.array(count), family)


def simulated(truths, replicates=5, noise=1.0, seed=0):
    """Paired differences [simulation, claim, replicate], all against one and the same setting, so
    that claims are correlated as those of a chapter are."""
    rng = np.random.default_rng(seed)
    runs = rng.normal(0, noise, (SIMULATED, len(truths) + 1, replicates))
    return runs[:, 1:] - runs[:, :1] + np.asarray(truths)[:, None]


def rate(found, *which):
    return np.isin(found["verdict"], which).any(axis=-1).mean()


def test_t_interval_by_hand():
    """Five values with mean 3 and deviation sqrt(2.5); t(0.975, 4) = 2.776."""
    mean, error, half = t_interval(np.array([1.0, 2, 3, 4, 5]))
    assert mean == 3
    assert error == pytest.approx(np.sqrt(2.5 / 5))
    assert half == pytest.approx(2.7764 * np.sqrt(0.5), rel=1e-4)


def test_one_value_has_no_spread():
    assert t_interval(np.array([4.0]))[0] == 4
    assert np.isnan(t_interval(np.array([4.0]))[1:]).all()
    assert np.isnan(t_interval(np.array([]))).all()


def test_the_end_is_the_last_task_on_the_full_test():
    frame = trajectory(a=[1.0, 3.0])
    assert final_scores(frame)["A_KA"].tolist() == [1.0, 3.0]
    assert final_scores(frame[frame["scope"] == "subset"])["A_KA"].tolist() == [-1.0, -1.0]
    assert end_table(frame).loc["a", "A_KA"] == "2.0 ± 12.7"
    assert end_table(frame).loc["a", "replicates"] == 2


def test_differences_are_paired_whatever_the_order_of_rows():
    frame = trajectory(a=[11.0, 22.0, 33.0], b=[10.0, 20.0, 30.0])
    expected = paired_difference(frame, "a", "b")
    assert expected.loc["A_KA", "difference"] == pytest.approx(2)
    assert expected.loc["A_KA", "standard_error"] == pytest.approx(1 / np.sqrt(3))
    assert expected.loc["A_KA", "errors"] == pytest.approx(2 * np.sqrt(3))
    assert expected.loc["A_ZS", "difference"] == pytest.approx(4)
    shuffled = frame.sample(frac=1, random_state=0)
    pd.testing.assert_frame_equal(paired_difference(shuffled, "a", "b"), expected)
    assert np.isnan(paired_difference(frame, "a", "a").loc["GM", "errors"])


@pytest.mark.parametrize(
    ("more", "region"),
    [
        ({}, (2, np.inf)),
        ({"direction": "lower", "margin": 0.5}, (-np.inf, -0.5)),
        ({"kind": "equivalence", "margin": 1}, (-1, 1)),
    ],
)
def test_the_region_of_which_a_claim_is_true(more, region):
    assert claim(**more).region == region


def test_a_verdict_by_hand():
    """Differences 3, 4, 5, 6, 7: mean 5, standard error 0.7071; t = 3 / 0.7071 from the margin."""
    frame = trajectory(a=[13.0, 24, 35, 46, 57], b=[10.0, 20, 30, 40, 50])
    row = verdicts(frame, [claim()]).loc["c"]
    assert (row["estimate"], row["n"], row["level"]) == (5, 5, 0.95)
    assert row["low"] == pytest.approx(5 - 2.7764 * np.sqrt(0.5), rel=1e-4)
    assert row["p"] == pytest.approx(2 * stats.t.sf(3 / np.sqrt(0.5), 4))
    assert row["p_adjusted"] == row["p"]
    assert row["sentence"] == (
        "Supported: on A_KA, 'a − b' is 5.0 points (95% interval 3.0 to 7.0); claimed is "
        "above 2 (adjusted p = 0.013, n = 5)."
    )
    row = verdicts(frame, [same(margin=6.75)]).loc["c"]
    assert row["high"] == pytest.approx(5 + 2.1318 * np.sqrt(0.5), rel=1e-4)
    assert (row["level"], row["verdict"]) == (pytest.approx(0.9), "supported")
    assert "claimed is above -6.75 and below 6.75" in row["sentence"]


@pytest.mark.parametrize(
    ("shift", "more", "verdict"),
    [
        (6, {}, "supported"),
        (2, {}, "undecided"),
        (-2, {}, "not supported"),
        (-6, {"direction": "lower"}, "supported"),
        (-2, {"direction": "lower"}, "undecided"),
        (2, {"direction": "lower"}, "not supported"),
        (0, {"kind": "equivalence"}, "supported"),
        (2, {"kind": "equivalence"}, "undecided"),
        (-2, {"kind": "equivalence"}, "undecided"),
        (6, {"kind": "equivalence"}, "not supported"),
        (-6, {"kind": "equivalence"}, "not supported"),
    ],
)
def test_verdicts_on_either_side_of_the_margin(shift, more, verdict):
    frame = trajectory(a=np.array([9.0, 10, 11, 10, 10]) + shift, b=[10.0] * 5)
    assert verdicts(frame, [claim(**more)]).loc["c", "verdict"] == verdict


def test_without_any_spread_only_the_margin_itself_is_undecided():
    frame = trajectory(a=[12.0] * 3, b=[10.0] * 3)
    family = [claim("at"), claim("over", margin=1.0), claim("under", margin=3.0)]
    found = verdicts(frame, family)
    assert found["verdict"].tolist() == ["undecided", "supported", "not supported"]
    assert found["p"].tolist() == [1, 0, 0]


def test_intervals_cover():
    for family, level in (([claim()], 0.95), ([same()], 0.9)):
        found = judged(simulated([1.0]), family)
        covered = (found["low"] < 1) & (found["high"] > 1)
        assert covered.mean() == pytest.approx(level, abs=0.008)


def test_a_superiority_claim_at_its_margin_is_wrongly_decided_at_a_fortieth_a_side():
    found = judged(simulated([2.0]), [claim()])
    assert rate(found, "supported") == pytest.approx(0.025, abs=0.005)
    assert rate(found, "not supported") == pytest.approx(0.025, abs=0.005)


@pytest.mark.parametrize("edge", [-2.0, 2.0])
def test_equivalence_at_the_edge_of_its_margin_has_its_nominal_size(edge):
    precise = rate(judged(simulated([edge], noise=0.2), [same()]), "supported")
    assert precise == pytest.approx(0.05, abs=0.006)
    assert rate(judged(simulated([edge], noise=2.0), [same()]), "supported") < 0.05
    assert rate(judged(simulated([0.0], noise=0.2), [same()]), "supported") > 0.95


def test_holm_by_hand():
    adjusted, divisor = holm(np.array([0.04, 0.01, np.nan, 0.03]))
    np.testing.assert_allclose(adjusted, [0.09, 0.04, 1, 0.09])
    assert divisor.tolist() == [3, 4, 3, 3]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_is_the_step_down_procedure(p):
    """Against the procedure as it is told: reject the smallest while it holds, then stop."""
    rejected, left = set(), sorted(range(len(p)), key=lambda index: p[index])
    while left and p[left[0]] * len(left) < ALPHA:
        rejected.add(left.pop(0))
    adjusted, divisor = holm(np.array(p))
    assert set(np.flatnonzero(adjusted < ALPHA)) == rejected
    assert set(np.flatnonzero(np.array(p) * divisor < ALPHA)) == rejected
    assert (adjusted >= p).all()
    assert set(divisor[list(left)]) <= {len(left)}


@given(st.lists(st.tuples(st.floats(-9, 9), st.floats(0.1, 3)), min_size=4, max_size=4))
def test_the_interval_and_the_adjusted_p_say_the_same(pairs):
    estimate, error = np.array(pairs).T
    family = [claim("1"), claim("2", direction="lower"), same(name="3"), same(name="4", margin=5)]
    found = judge(estimate, error, np.array([2, 3, 5, 9]), family)
    decided = found["verdict"] != "undecided"
    assert decided.tolist() == (found["p_adjusted"] < ALPHA).tolist()
    for here, each, verdict in zip(estimate, family, found["verdict"], strict=True):
        inside = each.region[0] < here < each.region[1]
        assert verdict in ("undecided", "supported" if inside else "not supported")


def test_holm_keeps_the_error_of_a_chapter():
    """Five nulls that hold, correlated as in a chapter: one verdict too many in twenty chapters;
    judged one by one it would be more than one in seven."""
    family = [claim(str(number)) for number in range(5)]
    differences = simulated([2.0] * 5)
    assert rate(judged(differences, family), "supported", "not supported") <= 0.052
    alone = [judged(differences[:, [i]], [family[i]])["verdict"] != "undecided" for i in range(5)]
    assert np.any(alone, axis=0).mean() > 0.14


@pytest.mark.parametrize("kind", ["superiority", "equivalence"])
@pytest.mark.parametrize("other", [1.99, 1.5, 0.0, -6.0])
def test_wrong_verdicts_are_rare_where_some_claims_are_true(kind, other):
    """Two claims just inside a margin and two elsewhere, some decided rightly, which loosens what
    Holm asks of the rest: wrong verdicts stay within the error of the chapter."""
    truths = [2.01, 2.01, other, other]
    family = [claim(str(number), kind=kind) for number in range(4)]
    verdict = judged(simulated(truths, noise=0.5), family)["verdict"]
    true = [
        each.region[0] < truth < each.region[1] for each, truth in zip(family, truths, strict=True)
    ]
    wrong = np.where(true, verdict == "not supported", verdict == "supported")
    assert 0.001 < wrong.any(axis=-1).mean() < 0.055


@given(st.permutations(range(24)), st.lists(st.floats(0, 90), min_size=8, max_size=8))
def test_verdicts_do_not_depend_on_the_order_of_rows(order, values):
    frame = trajectory(a=values[:4], b=values[4:])
    family = [claim("1"), same(name="2", margin=10), claim("3", aggregate="GM", direction="lower")]
    expected = verdicts(frame, family)
    pd.testing.assert_frame_equal(verdicts(frame.iloc[order], family), expected, check_exact=True)


def test_tasks_and_datasets_are_not_replicates():
    """Twice the datasets and tasks, the same means: nothing changes."""
    rng = np.random.default_rng(0)
    score = pd.Series(rng.uniform(20, 60, 12))
    metrics = pd.DataFrame(
        [(s, r, 1, "full", role) for s in "ab" for r in range(3) for role in ("adapt", "eval")],
        columns=["setting", "replicate", "task", "scope", "role"],
    ).assign(score=score)
    once = verdicts(store.trajectory(metrics), [claim()])
    more = pd.concat([metrics, metrics, metrics.assign(task=0)])
    pd.testing.assert_frame_equal(verdicts(store.trajectory(more), [claim()]), once)
    assert once.loc["c", "n"] == 3


def test_a_stored_row_that_changes_changes_the_verdict():
    frame = results.published_metrics("01")
    (first, *_) = family = claims_of(studies.load_study("01"))
    before = verdicts(store.trajectory(frame), family)
    row = (frame["setting"] == first.setting) & (frame["role"] == "eval")
    row &= (frame["scope"] == "full") & (frame["replicate"] == 0) & (frame["task"] > 0)
    changed = frame.copy()
    changed.loc[frame.index[row][0], "score"] += 1000
    after = verdicts(store.trajectory(changed), family)
    assert before.loc[first.name, "verdict"] != "undecided"
    assert after.loc[first.name, "verdict"] == "undecided"


def test_missing_replicates_are_dropped_in_pairs_and_named():
    a, b = [13.0, 24, 35, 46, 57, 68], [10.0, 20, 30, 40, 50, 60]
    frame = trajectory(a=a, b=b, c=[1.0] * 7)  # of which the last is no replicate of the claim
    frame = frame[(frame["replicate"] != 5) | (frame["scope"] == "subset")]  # not yet at its end
    gone = (frame["setting"] == "b") & (frame["replicate"] == 2)
    row = verdicts(frame[~gone], [claim()]).loc["c"]
    assert (row["n"], row["estimate"]) == (4, np.mean([3, 4, 6, 7]))
    assert row["sentence"].endswith("n = 4). Left out, as runs are missing: replicates 2, 5.")
    unscored = frame.assign(A_KA=frame["A_KA"].mask(gone))
    assert verdicts(unscored, [claim()]).loc["c", "n"] == 4
    assert verdicts(unscored, [claim(aggregate="A_ZS")]).loc["c", "n"] == 5


def test_fewer_than_two_replicates_are_undecided_and_stay_in_the_family():
    frame = trajectory(a=[13.0, 24, 35], b=[10.0], c=[1.0, 12.2, 23.1], d=[7.0])
    frame = frame[(frame["setting"] != "d") | (frame["scope"] == "subset")]
    family = [claim("1"), claim("2", against="c"), claim("3", against="d")]
    found = verdicts(frame, family)
    assert found["verdict"].tolist() == ["undecided", "supported", "undecided"]
    assert found["n"].tolist() == [1, 3, 0]
    assert found.loc["2", "p_adjusted"] == pytest.approx(3 * found.loc["2", "p"])
    assert found.loc[["1", "3"], ["low", "high", "p", "p_adjusted"]].isna().all(axis=None)
    assert found["sentence"]["1"] == (
        "Undecided: only one replicate holds 'a − b', and an interval takes two or more. "
        "Left out, as runs are missing: replicates 1, 2."
    )
    assert "no replicate holds 'a − d'" in found["sentence"]["3"]


def test_an_unknown_setting_and_a_run_twice_are_refused():
    frame = trajectory(a=[1.0, 2], b=[1.0, 2])
    with pytest.raises(CmpError, match=r"claim 'mine': no setting 'z'; there are a, b"):
        verdicts(frame, [claim("mine", against="z")])
    with pytest.raises(CmpError, match=r"no setting 'z'; there are a, b"):
        paired_difference(frame, "z", "a")
    with pytest.raises(CmpError, match=r"replicate 1 of 'b' is there twice"):
        verdicts(pd.concat([frame, frame[-1:]]), [claim()])


GOOD = {"name": "n", "sentence": "s", "setting": "a", "against": "b", "aggregate": "GM"}


def study(*trees):
    return studies.Study("?", 2, (), {"a": {}, "b": {}}, claims=list(trees), chapter="77")


def test_claims_are_read_from_the_study():
    assert claims_of(study()) == ()
    (found,) = claims_of(study(GOOD | {"margin": 1}))
    assert found == Claim("n", "s", "a", "b", "GM", "higher", 1.0, "superiority")


@pytest.mark.parametrize(
    ("trees", "words"),
    [
        ([GOOD | {"margn": 1}], r"claims\.0\.margn: .*the keys of a claim are name, .*margin"),
        ([GOOD | {"margin": -1}], r"claims\.0\.margin"),
        ([GOOD | {"margin": "2"}], r"claims\.0\.margin"),
        ([GOOD | {"aggregate": "KA"}], r"claims\.0\.aggregate: .*'A_KA'"),
        ([GOOD, {"name": "m"}], r"claims\.1\.sentence"),
        ([GOOD, GOOD], "two are named 'n'"),
        ([GOOD | {"against": "a"}], "'n' holds 'a' against itself"),
        ([GOOD | {"against": "z"}], "'n': no setting 'z'; there are a, b"),
        ([GOOD | {"kind": "equivalence", "margin": 0}], "margin above 0"),
        ([GOOD | {"kind": "equivalence", "direction": "lower"}], "no direction"),
        ([GOOD | {"name": {1}}], "not JSON serializable"),
    ],
)
def test_a_bad_claim_is_refused_with_study_and_key(trees, words):
    with pytest.raises(CmpError, match=rf"study 77: .*{words}"):
        claims_of(study(*trees))


@pytest.mark.parametrize(
    "path", sorted(studies.STUDIES.glob("0*.yaml")), ids=lambda path: path.stem
)
def test_the_claims_of_the_book_are_well_formed(path):
    bears_none = path.stem.endswith("-tuning")
    assert bool(claims_of(studies.load_study(path.stem))) != bears_none


def test_a_change_is_against_the_score_before():
    frame = trajectory(a=[13.0, 24, 35], b=[10.0, 20, 30])
    frame.loc[(frame["setting"] == "a") & (frame["task"] == 0), ["A_KA", "A_ZS", "GM"]] = 4.0
    assert score_change(frame).set_index("setting").loc["a", "A_KA"].tolist() == [9, 20, 31]
    row = verdicts(frame, [claim(at="change")]).loc["c"]
    assert row["estimate"] == 0
    assert "as the stream changed it" in row["sentence"]


def test_a_difference_beyond_another():
    frame = trajectory(a=[5.0, 9, 7], b=[1.0, 2, 3], c=[4.0, 4, 4], d=[2.0, 2, 1])
    row = verdicts(frame, [claim(beyond=("c", "d"))]).loc["c"]
    assert row["estimate"] == pytest.approx(np.mean([4 - 2, 7 - 2, 4 - 3]))
    assert "'(a − b) − (c − d)' is" in row["sentence"]
    with pytest.raises(CmpError, match="no setting 'e'"):
        verdicts(frame, [claim(beyond=("c", "e"))])


def test_ranks_are_compared_between_families():
    values = {"p": 1.0, "q": 2.0, "r": 3.0, "s": 4.0}
    one = {f"one: {name}": [value] * 3 for name, value in values.items()}
    other = {f"other: {name}": [2 * value, -value, value] for name, value in values.items()}
    frame = trajectory(**one, **other)
    ranks = claim(setting="one", against="other", kind="ranks", margin=0.5)
    row = verdicts(frame, [ranks]).loc["c"]
    assert row["estimate"] == pytest.approx((1 - 1 + 1) / 3)
    assert (row["unit"], row["above"], row["below"]) == ("rank correlation", 0.5, np.inf)
    assert "0.33 rank correlation" in row["sentence"]
    with pytest.raises(CmpError, match="share 0 settings"):
        verdicts(frame, [claim(setting="one", against="two", kind="ranks", margin=0.5)])


def test_the_interval_of_a_correlation_stays_a_correlation():
    """On three replicates, as study 05-transfer has them; one of them is a perfect agreement."""
    letters = "abcdefghij"
    one = {f"one: {x}": [float(n)] * 3 for n, x in enumerate(letters)}
    swapped = {f"other: {x}": [float(n), float(n ^ 1), float((n + 2) % 10)] for n, x in
               enumerate(letters)}  # fmt: skip
    row = verdicts(
        trajectory(**one, **swapped),
        [claim(setting="one", against="other", kind="ranks", margin=0.5)],
    ).loc["c"]
    assert -1 < row["low"] < row["estimate"] < row["high"] < 1
    assert row["high"] - row["estimate"] < row["estimate"] - row["low"]
    assert row["verdict"] == "undecided" and row["low"] < 0.5
    assert row["p_adjusted"] > 0.05


def test_a_published_claim_has_one_interval_wherever_it_is_judged():
    for name in ("05", "05-transfer"):
        made = claims_of(studies.load_study(name))
        frames = [
            store.trajectory(results.published_metrics(each)) for each in ("05", "05-transfer")
        ]
        alone = verdicts(frames[name != "05"], made)
        both = verdicts(pd.concat(frames), made)
        judged = scoreboard.study_table(name).set_index("claim")
        for column in ("low", "high", "level"):
            np.testing.assert_allclose(alone[column], both[column])
            np.testing.assert_allclose(alone[column], judged[column].astype(float))


def test_chapter_05_corrects_each_study_s_claims_apart():
    source = (Path(studies.STUDIES).parent / "05_scaling.md").read_text()
    judged = re.findall(r"claims\.verdicts\(full, claims\.claims_of\((\w+)\)\)", source)
    assert judged == ["study", "transfer"]


@pytest.mark.parametrize(
    "more",
    [{"margin": 1.0}, {"margin": 0.5, "direction": "lower"}, {"margin": 0.5, "beyond": ("a", "b")}],
)
def test_impossible_claims_of_ranks_are_refused(more):
    with pytest.raises(ValueError, match="ranks have"):
        claim(kind="ranks", **more)
