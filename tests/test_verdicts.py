"""Primary claims: what may confirm them, how intervals are read, and the same by another hand."""

import functools
import json

import independent
import numpy as np
import pandas as pd
import pytest
import synthetic
from hypothesis import given
from hypothesis import strategies as st

from cmp import evaluation
from cmp.errors import CmpError
from cmp.parsing import read_yaml
from lab import analyses, figures
from lab.evidence import claims, fronts, guidelines, results, scores, studies, verdicts
from lab.evidence.claims import FrontOf
from lab.evidence.scores import claims_level, level_in_words

ORDERS = ["order a", "order b", "order c"]
PEAK = next(iter(synthetic.FRONT))
SETTINGS = {
    "above": {"schedule.peak": 0.001}, "on": {"schedule.peak": 0.0011},
    "beyond": {"schedule.peak": 0.0012}, "low": {"schedule.peak": 0.0013},
    "edge": {"schedule.peak": 0.0014}, "end": {"schedule.peak": 0.0015},
    "no pool": {"mixture.pretraining": 0.0, "mixture.update": 0.5, "mixture.buffer": 0.5},
    **{name: {"schedule.peak": 0.002 + i / 1000} for i, name in enumerate(ORDERS)},
}  # fmt: skip
ENDS = {
    "above": (45, 54), "on": (45, 50.2), "beyond": (58, 50), "low": (20, 52),
    "edge": (30.05, 54), "end": (51.025, 50),
    "no pool": (45, 50.2, 44), "order a": (40, 50), "order b": (45, 50), "order c": (50, 50),
}  # fmt: skip
CLAIM = {
    "name": "above", "guideline": "methods", "study": "methods", "source": "paper",
    "sentence": "It is above.",
    "measure": "gain", "terms": [{"of": "above"}], "expected": "above 0", "half_width": 0.8,
}  # fmt: skip
CLAIMS = [
    CLAIM,
    CLAIM | {"name": "on", "terms": [{"of": "on"}], "expected": "no difference"},
    CLAIM | {"name": "beyond", "terms": [{"of": "beyond"}]},
    CLAIM | {"name": "low", "terms": [{"of": "low"}]},
    CLAIM | {"name": "both", "terms": [{"of": "above"}, {"of": "on", "times": -1.0}]},
    CLAIM | {"name": "lacking", "terms": [{"of": "no pool"}], "names": "lacking"},
    CLAIM | {"name": "A_KA", "measure": "A_KA",
             "terms": [{"of": "order a"}, {"of": "order c", "times": -1.0}], "expected": "below 0"},
    CLAIM | {"name": "A_ZS kept", "measure": "A_ZS", "names": "kept",
             "terms": [{"of": "above"}, {"of": "no pool", "times": -1.0}]},
    CLAIM | {"name": "GM", "measure": "GM",
             "terms": [{"of": "above"}, {"of": "order a", "times": -1.0}]},
    CLAIM | {"name": "spread", "measure": "spread", "terms": [{"of": ORDERS}]},
    CLAIM | {"name": "edge", "terms": [{"of": "edge"}]},
    CLAIM | {"name": "end", "terms": [{"of": "end"}]},
    CLAIM | {"name": "minus a bound",
             "terms": [{"of": "above"}, {"of": "beyond", "times": -1.0}]},
    CLAIM | {"name": "two bounds",
             "terms": [{"of": "end"}, {"of": "beyond", "times": -1.0}]},
    CLAIM | {"name": "two studies", "measure": "A_ZS",
             "terms": [{"of": "above"}, {"of": PEAK, "study": "front", "times": -1.0}]},
    CLAIM | {"name": "partial", "study": "partial"},
    CLAIM | {"name": "later", "study": "later"},
    CLAIM | {"name": "another start", "study": "size", "measure": "gain from the start",
             "terms": [{"of": "other network"}]},
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Studies and results of a made-up book."""
    folder = tmp_path_factory.mktemp("book")
    with pytest.MonkeyPatch.context() as patch:
        synthetic.place(patch, folder)
        synthetic.write_study("front", synthetic.FRONT)
        synthetic.write_study("methods", SETTINGS)
        synthetic.write_study("later", {"above": {}})
        synthetic.write_study("partial", {"above": {}}, replicates=19)
        synthetic.publish("partial", {"above": ENDS["above"]})
        synthetic.write_study("partial", {"above": {}})
        synthetic.publish("front", synthetic.ENDS, start=(11, 54))
        synthetic.publish("methods", ENDS)
        synthetic.write_study("size", {"other network": {}})
        synthetic.publish("size", {"other network": (35, 44)}, start=(1, 46))
    return folder


@pytest.fixture(scope="module")
def published():
    """The studies that the book publishes, read by another hand."""
    return independent.read_studies(results.RESULTS)


@pytest.fixture
def load(folder, monkeypatch):
    """Write claims to a file and read them."""
    synthetic.place(monkeypatch, folder)

    def loaded(*given, **more):
        front = {"study": "front", "settings": list(synthetic.FRONT)} | more
        tree = {"fronts": {"plain": front}, "claims": list(given)}
        (folder / "claims.yaml").write_text(json.dumps(tree))
        return claims.load_claims(folder / "claims.yaml")

    return loaded


def test_intervals_are_read_in_one_order():
    cases = {
        (1.2, 3.0): "helps", (-3.0, -1.2): "hurts", (-0.5, 0.6): "no difference that matters",
        (0.2, 0.8): "no difference that matters", (0.2, 1.8): "helps, size open",
        (-1.8, -0.2): "hurts, size open", (-0.5, 1.5): "open", (-2.0, 2.0): "open",
        (0.5, np.inf): "helps, size open", (1.5, np.inf): "helps", (-0.5, np.inf): "open",
    }  # fmt: skip
    assert {case: verdicts.read_interval(*case) for case in cases} == cases


def test_a_small_effect_of_the_sign_that_was_claimed_contradicts_nothing():
    same = verdicts.SAME
    assert verdicts._agrees(same, "above 0", 0.1, 0.9) == ""
    assert verdicts._agrees(same, "below 0", 0.1, 0.9) == "no"
    assert verdicts._agrees(same, "no difference", 0.1, 0.9) == "yes"
    assert verdicts._agrees(same, "above 0", -0.3, 0.9) == "no"


@given(st.floats(-5, 5), st.floats(0, 5))
def test_another_hand_reads_them_alike_and_signs_mirror(centre, half):
    low, high = centre - half, centre + half
    said = verdicts.read_interval(low, high)
    assert independent.reading(low, high) == said
    mirrored = {"helps": "hurts", "hurts": "helps", "helps, size open": "hurts, size open",
                "hurts, size open": "helps, size open"}  # fmt: skip
    assert verdicts.read_interval(-high, -low) == mirrored.get(said, said)


def test_verdicts_of_a_book_and_the_same_by_another_hand(load, folder):
    found = verdicts.judge_claims(load(*CLAIMS))
    readings = found["reading"].to_dict()
    assert readings["above"] == "helps"
    assert readings["low"] == verdicts.NOT_COVERED
    assert readings["A_KA"] == "hurts"
    assert readings["spread"] == "helps"
    assert readings["lacking"] == "hurts"
    assert found.loc["on", "estimate"] == pytest.approx(0, abs=0.6)
    assert found.loc["beyond", "bound"] == 1
    assert "at least" in found.loc["beyond", "sentence"]
    assert "below the front" in found.loc["low", "sentence"]
    assert found.loc["spread", "estimate"] == pytest.approx(5, abs=0.7)
    assert found.loc["above", "agrees"] == "yes"
    assert found.loc["end", "bound"] == 1
    assert found.loc["minus a bound", "bound"] == -1
    assert "at most" in found.loc["minus a bound", "sentence"]
    assert readings["two bounds"] == verdicts.NOT_COVERED
    assert "subtracts another" in found.loc["two bounds", "sentence"]
    assert readings["partial"] == readings["later"] == verdicts.NOT_COMPUTED
    own = verdicts.setting_scores("methods", "above")["A_ZS"]
    other = verdicts.setting_scores("front", PEAK)["A_ZS"]
    assert found.loc["two studies", "estimate"] == pytest.approx((own - other).mean())
    since = found.loc["another start"]  # 34 points learnt and 2 lost; plain fine-tuning lost 3.7
    assert since["estimate"] == pytest.approx(1.7, abs=0.7)
    assert "at an equal increase of A_KA" in since["sentence"]
    assert since["low crossed"] < since["low"]
    again = independent.verdicts(
        folder / "claims.yaml", independent.read_studies(folder / "results")
    )
    assert again.keys() == set(found.index)
    for name, numbers in again.items():
        own = found.loc[name, ["estimate", "low", "high"]].astype(float)
        assert own.to_numpy() == pytest.approx(numbers[:3], abs=1e-8, nan_ok=True), name
        assert found.loc[name, "reading"] == numbers[3]


@given(st.lists(st.floats(1e-9, 1.0), min_size=1, max_size=9), st.integers(0, 3))
def test_holm_never_lowers_a_p_value_and_is_bonferroni_for_the_smallest(values, missing):
    p = pd.Series(values + [np.nan] * missing)
    adjusted, count = verdicts.adjust_by_holm(p, len(p)), len(p)
    assert adjusted.isna().equals(p.isna())
    known = adjusted.dropna()
    assert (known >= p.dropna()).all() and (known <= 1).all()
    assert known.min() == pytest.approx(min(1.0, count * min(values)))
    assert known[p.dropna().sort_values().index].is_monotonic_increasing
    assert (verdicts.adjust_by_holm(p, count + 1).dropna() >= known).all()


def test_all_families_of_the_book_are_well_formed():
    known = [*map(claims.load_claims, claims.FAMILIES)]
    names = [claim.name for family in known for claim in family.claims]
    assert all(family.claims for family in known) and len({*names}) == len(names)
    used = {
        (front.study, setting)
        for family in known
        for front in family.fronts.values()
        for setting in (*front.settings, front.check)
        if setting
    }
    for family in known:
        assert len(family.claims) <= scores.FAMILY
        for claim in family.claims:
            assert claim.half_width <= claims.MATTERS or claim.why, claim.name
            for term in claim.terms:
                assert (len(term.of) >= 3) == (claim.measure == "spread"), claim.name
                assert term.at == "end" or claim.measure == "spread", claim.name
                assert claim.measure not in claims.GAINS or term.front in family.fronts, claim.name
                used |= {(claim.study_of(term), setting) for setting in term.of}
    for study, setting in used:
        assert not studies.load_study(study).explores, study
        assert scores.planned_streams(study, setting) >= claims.REPLICATES, (study, setting)


def test_a_family_that_uses_the_fronts_of_another_is_judged_like_it(load, folder):
    first = verdicts.judge_claims(load(*CLAIMS))
    later = folder / "later.yaml"
    later.write_text(json.dumps({"fronts_of": "claims", "claims": CLAIMS}))
    pd.testing.assert_frame_equal(verdicts.judge_claims(claims.load_claims(later)), first)
    made_up = independent.read_studies(folder / "results")
    again, others = (
        pd.DataFrame(independent.verdicts(path, made_up))
        for path in (later, folder / "claims.yaml")
    )
    pd.testing.assert_frame_equal(again, others)
    later.write_text(json.dumps({"fronts_of": "../claims", "claims": CLAIMS}))
    with pytest.raises(CmpError, match=r"\.\./claims"):
        claims.load_claims(later)


@pytest.mark.parametrize("family", claims.FAMILIES, ids=lambda path: path.stem)
def test_another_hand_finds_the_same_in_the_published_results(family, published):
    known = claims.load_claims(family)
    found = verdicts.judge_claims(known)
    again = independent.verdicts(family, published)
    assert again.keys() == set(found.index)
    for name, numbers in again.items():
        own = found.loc[name].reindex(["estimate", "low", "high"]).astype(float)
        assert own.to_numpy() == pytest.approx(numbers[:3], abs=1e-8, nan_ok=True), name
        assert found.loc[name, "reading"] == numbers[3]
    values = {name: numbers[4] for name, numbers in again.items() if not np.isnan(numbers[4])}
    ours = found.reindex(columns=["p", "p holm"])
    assert ours["p"].dropna().to_dict() == pytest.approx(values)
    adjusted = independent.holm(values, 12)
    assert ours["p holm"].dropna().to_dict() == pytest.approx(adjusted)


@pytest.mark.parametrize("family", claims.FAMILIES[1:], ids=lambda path: path.stem)
def test_no_peak_of_a_later_family_was_tuned_at_the_edge_of_its_grid(family, published):
    faults = independent.faults_of_tuning(family, published)
    assert faults
    assert {*faults.values()} <= {"", "not published"}, faults


def test_verdicts_of_the_first_family_are_those_that_a2_gives():
    found = guidelines.judged_claims()
    assert found["estimate"].notna().sum() > len(found) / 2
    assert found["p holm"]["merging gains from frequent updates"] == pytest.approx(0.024, abs=0.001)
    assert (found["estimate later"] != found["estimate"]).all()
    assert (found["seen"] == 9).all()  # as A2 says
    later = verdicts.setting_scores("mixtures", "no buffer").drop(range(9))
    thirds = verdicts.setting_scores("mixtures", "thirds").drop(range(9))
    expected = (later["A_KA"] - thirds["A_KA"]).mean()
    assert found.loc["less A_KA without the buffer", "estimate later"] == pytest.approx(expected)


@pytest.mark.parametrize("study", ["merging", "orders"])
def test_published_scores_are_the_shares_of_their_hits(study):
    assert independent.hits_disagree(results.results_file(study)) == []


def test_what_lies_beyond_the_front_by_chance_perhaps_has_the_errors_of_its_tangent(
    load, monkeypatch
):
    front = load(*CLAIMS).fronts["plain"]
    errors = {}
    for doubt in (0.0, fronts.DOUBT):
        monkeypatch.setattr(fronts, "DOUBT", doubt)
        for name in ("end", "beyond"):
            errors[name, doubt] = verdicts.gain_of("methods", name, front).pseudo.std()
    assert errors["end", fronts.DOUBT] != errors["end", 0.0]
    assert errors["beyond", fronts.DOUBT] == errors["beyond", 0.0]


def test_a_base_without_which_a_setting_leaves_the_front_is_measured_along_the_tangent(load):
    front = load(*CLAIMS).fronts["plain"]
    own = verdicts.setting_scores("methods", "edge")
    lowest = verdicts.setting_scores("front", front.settings[0])
    apart = (own["A_KA"] - lowest["A_KA"]).groupby(own["base"]).mean()
    assert apart.mean() > 0
    assert min(apart.drop(base).mean() for base in apart.index) < 0
    assert len(verdicts.gain_of("methods", "edge", front).pseudo) == len(apart)


def test_every_front_of_the_book_has_peaks_that_make_one():
    """So that no claim turns out to be off its front once everything is computed."""
    declared = [*claims.load_claims().fronts.values()]
    for guideline in guidelines.load_guidelines().values():
        for each in guideline.networks:
            if not isinstance(each.front, str):  # by name, it is among those above
                declared.append(FrontOf(each.study, each.front, local=True, least=3))
    assert len(declared) >= 8
    for front in declared:
        configs = studies.load_study(front.study).configs("cpu", 1)
        peaks = np.array([configs[name, 0].schedule.peak for name in front.settings])
        least = fronts.MIN_LOCAL if front.local else fronts.MIN_PEAKS
        fronts.check_peaks(peaks, front.least or least)


def test_what_each_setting_buys_is_tabulated_and_drawn(load):
    known = load(*CLAIMS)
    table = analyses.gains_table(known.fronts["plain"], {"methods": list(SETTINGS)})
    gains = table.set_index("setting")
    assert list(gains.index) == list(SETTINGS)  # as given, since a sorted list reads as a ranking
    assert gains.loc["above", "low"] < gains.loc["above", "gain"] < gains.loc["above", "high"]
    assert (gains["preliminary"] == "").all()
    assert gains.loc["beyond", "is_bound"]
    assert "below the front" in gains.loc["low", "reason"]
    assert np.isnan(gains.loc["low", "gain"])
    drawn = figures.plot_technique_gains(table)
    [axes] = drawn.axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == list(table.dropna(subset="gain")["setting"])
    assert "Learned too little to compare: low." in drawn.get_supxlabel().replace("\n", " ")
    note = drawn.get_supxlabel().replace("\n", " ")
    assert f"{level_in_words()} t-intervals over bases." in note
    scores = verdicts.published_scores("front")[1].groupby("setting")[["peak", "A_KA", "A_ZS"]]
    plane = figures.plot_front(table, scores.mean().sort_values("peak"))
    assert {"above", "low", "0.001"} <= {text.get_text() for text in plane.axes[0].texts}
    later = CLAIM | {"name": "later one", "study": "later", "guideline": "rates"}
    rows = verdicts.judge_claims(load(*CLAIMS, later))
    [axes] = figures.plot_verdicts(rows).axes
    assert (axes.get_xlabel(), axes.spines["bottom"].get_visible()) == ("Points", True)
    labels = [label.get_text() for label in axes.get_yticklabels()]
    named = [figures.style.with_subscripts(name) for name in rows.index[:-1]]
    assert labels == ["methods", *named, "rates", "later one"]
    is_size = rows["measure"].isin(["spread", "GM", "gain from the start"])
    said = rows["reading"].mask(is_size, rows["reading"].str.replace("helps", "larger"))
    words = [text.get_text() for text in axes.texts if text.get_text()]
    assert words == list(said)
    assert len(axes.texts) - len(words) == (rows["bound"].fillna(0) != 0).sum()  # arrows
    nothing = figures.plot_verdicts(rows[rows["reading"] == verdicts.NOT_COMPUTED])
    assert (nothing.get_supxlabel(), nothing.axes[0].xaxis.get_visible()) == ("", False)


def test_kinds_of_settings_stand_under_heads_in_the_given_order():
    names = ["EMA", "average deployed", "LoRA", "EWC", "no buffer"]
    rows = pd.DataFrame({"setting": names, "gain": [1.0, 4, np.nan, -2, -1], "n": 4})
    rows = rows.assign(low=np.nan, high=np.nan, is_bound=False, reason="", preliminary="")
    [axes] = figures.plot_technique_gains(rows).axes
    labels = [(label.get_text(), label.get_fontweight()) for label in axes.get_yticklabels()]
    assert labels == [
        ("Ways to merge", "bold"), ("EMA", "normal"), ("average deployed", "normal"),
        ("Methods", "bold"), ("EWC", "normal"), ("Mixtures", "bold"), ("no buffer", "normal"),
    ]  # fmt: skip


def test_a_gain_far_from_all_others_lies_off_the_scale():
    rows = pd.DataFrame({"setting": list("abcd"), "gain": [4.0, 3, 2, -20.7], "n": 4})
    rows = rows.assign(low=np.nan, high=np.nan, is_bound=False, reason="", preliminary="")
    drawn = figures.plot_technique_gains(rows)
    [axes] = drawn.axes
    assert axes.get_xlim()[0] > -5
    assert "off the scale" in drawn.get_supxlabel()
    assert "Arrow" not in drawn.get_supxlabel()
    assert axes.texts[-1].get_text() == "−20.7 (n = 4)"
    assert "off the scale" not in figures.plot_technique_gains(rows[:3]).get_supxlabel()


def test_what_lacks_streams_has_no_interval_and_says_so(load):
    known = load(*CLAIMS)
    table = analyses.gains_table(known.fronts["plain"], {"partial": ["above"], "later": ["above"]})
    first, later = table.to_dict("records")
    assert (first["preliminary"], first["n"]) == ("19 of 20 streams", 19)
    assert np.isfinite(first["gain"])
    assert np.isnan([first["low"], first["high"]]).all()
    assert later["reason"] == verdicts.NOT_COMPUTED
    note = figures.plot_technique_gains(table).get_supxlabel().replace("\n", " ")
    assert "Preliminary: 19 of 20 streams. Not computed yet: above." in note
    assert "t-intervals" not in note


def test_every_interval_has_the_level_of_the_claims(load):
    known = load(CLAIM)
    verdict = verdicts.judge_claims(known).loc["above"]
    assert claims_level() == 1 - 0.05 / len(read_yaml(claims.CLAIMS)["claims"])
    gain = verdicts.gain_of("methods", "above", known.fronts["plain"])
    found = verdicts.estimate_gain("methods", "above", gain)
    assert found.half == pytest.approx(verdict["half"])
    assert f"({level_in_words()} interval" in verdict["sentence"]


def test_claims_on_one_front_err_together(load):
    known = load(CLAIM, CLAIM | {"name": "on", "terms": [{"of": "on"}]})
    table = analyses.claim_correlations(known)
    assert table.shape == (2, 2)
    assert table.index.tolist() == ["1 above", "2 on"]
    assert -1 <= table.loc["1 above", 2] <= 1


def test_a_class_is_one_concept_in_however_many_drawings(corpus):
    questions = evaluation.list_questions(corpus).assign(concept=verdicts.concepts_of(corpus))
    by_dataset = questions.groupby("dataset")["concept"].nunique()
    assert (by_dataset["new-digits"], by_dataset["new-counts"], by_dataset["icons"]) == (10, 8, 30)
    assert (questions.groupby("group")["concept"].nunique() == 1).all()


def test_the_error_over_concepts_is_that_of_one_evaluation_where_replicates_agree(
    load, monkeypatch, corpus
):
    load(CLAIM)
    _, hits, seeds = verdicts._hits_at(verdicts.Part("methods", "above", 1.0, 0.0))
    one = np.repeat(hits[:1], len(hits), axis=0)
    monkeypatch.setattr(verdicts, "_hits_at", lambda _: (corpus, one, seeds))
    part = functools.partial(verdicts.Part, "s")
    questions = evaluation.list_questions(corpus).assign(group=verdicts.concepts_of(corpus))
    expected = [
        evaluation.aggregate(
            questions.assign(hit=one[0].astype(float)), corpus.by_role(evaluation.ROLES[name])
        )[1]
        for name in ("A_KA", "A_ZS")
    ]
    assert verdicts.concept_error([part("a", 0.0, 1.0)]) == pytest.approx(expected[0])
    assert verdicts.concept_error([part("a", 1.0, 0.0)]) == pytest.approx(expected[1])
    assert verdicts.concept_error([part("a", 1.0, 0.0), part("b", -1.0, 0.0)]) == 0
    assert verdicts.concept_error([part("a", 1.0, 0.0)], "kept") > expected[1]


def test_a_crossed_interval_is_wider(load):
    row = verdicts.judge_claims(load(CLAIM)).loc["above"]
    assert row["low crossed"] < row["low"]
    assert row["high"] < row["high crossed"]


def test_settings_that_coincide_do_not_cost_the_other_claims(load):
    """An interval without any width once divided by zero."""
    same = CLAIM | {"name": "same", "measure": "A_ZS", "expected": "no difference"}
    same |= {"terms": [{"of": "above"}, {"of": "above", "times": -1.0}]}
    table = verdicts.judge_claims(load(CLAIM, same))
    assert table.loc["same", ["estimate", "half", "p"]].tolist() == [0, 0, 1]
    assert table.loc["same", "reading"] == verdicts.SAME and table.loc["above", "p"] < 0.01


def test_what_is_not_published_is_said(load):
    row = verdicts.judge_claims(load(CLAIM | {"study": "later"})).loc["above"]
    assert row["reading"] == verdicts.NOT_COMPUTED
    assert row["sentence"] == "Not computed yet: study later is not published."


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"source": "theirs"}, "source"),
        ({"measure": "A_KA", "names": "kept"}, "A_KA is not measured by name"),
        ({"expected": "higher"}, "expected"),
        ({"colour": "red"}, "colour: unknown key"),
    ],
)
def test_claims_that_could_not_be_confirmed_are_refused(load, change, words):
    with pytest.raises(CmpError, match=words):
        load(CLAIM | change)


def test_a_misspelt_key_is_named_and_not_the_one_that_it_leaves_out(load):
    claim = {("sentense" if key == "sentence" else key): value for key, value in CLAIM.items()}
    with pytest.raises(CmpError, match="sentense: unknown key"):
        load(claim)


def test_two_claims_of_one_name_are_refused(load):
    with pytest.raises(CmpError, match="two have the name 'above'"):
        load(CLAIM, CLAIM)


def test_published_runs_that_tuned_or_are_too_few_confirm_nothing(load, monkeypatch):
    known, real = load(CLAIM), verdicts.published_scores
    published, scores = real("methods")

    def change(changed):
        answer = {"methods": (published, changed)}
        monkeypatch.setattr(verdicts, "published_scores", lambda s: answer.get(s) or real(s))

    change(scores.assign(base=0))
    with pytest.raises(CmpError, match="bases that tuned"):
        verdicts.judge_claims(known)
    for dropped, count in ((("above", 3), 19), ("above", 0)):
        change(scores.sort_index().drop(index=dropped))
        [row] = verdicts.judge_claims(known).to_dict("records")
        assert row["reading"] == verdicts.NOT_COMPUTED
        assert f"{count} of 20 replicates of 'above' are published" in row["sentence"]
