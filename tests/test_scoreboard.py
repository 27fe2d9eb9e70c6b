"""The scoreboard: every claim once, verdicts from what is stored, what is not there is named."""

import numpy as np
import pandas as pd
import pytest

from cmp.errors import CmpError
from cmp.experiments import results, studies
from cmp.experiments.claims import REFUTED, SUPPORTED, UNDECIDED, claims_of
from lab import chapters, figures, scoreboard
from lab.scoreboard import Contrast, Ground, Guideline

CHAPTERS = ("01", "02", "03", "04", "05", "06", "07")
NETWORKS = ("tiny", "tiny-half", "tiny-double", "tiny-quad", "tiny-vit")
SETTINGS = (
    *("full", "lower rate", "LoRA", "locked-image", "BitFit"),
    *("EMA", "zero-all", "meta-rsqrt", "no buffer", "no pool"),
)


@pytest.fixture(scope="module")
def guidelines():
    return scoreboard.load_guidelines()


def transfer(shift, replicates=3):
    """A frame laid out as study 05-transfer: EMA is `shift[network]` above full in A_ZS."""
    rows = []
    for network in NETWORKS:
        for place, setting in enumerate(SETTINGS):
            for replicate in range(replicates):
                zs = 30.0 + (place if setting not in ("EMA", "full") else 0)
                zs += shift.get(network, 0) * (setting == "EMA") * (1 + 0.1 * replicate)
                scores = {"A_KA": 30.0 - place, "A_ZS": zs, "GM": np.sqrt((30.0 - place) * zs)}
                about = {"setting": f"{network}: {setting}", "replicate": replicate}
                rows += [
                    about | {"task": 8, "scope": scope} | scores for scope in ("subset", "full")
                ]
    return pd.DataFrame(rows)


def test_every_claim_of_the_book_is_on_the_scoreboard_once(guidelines):
    made = [
        (chapter, claim.name)
        for chapter in CHAPTERS
        for claim in claims_of(studies.load_study(chapter))
        if claim.kind != "ranks"
    ]
    shown = [(ground.study, ground.claim) for each in guidelines for ground in each.claims]
    assert sorted(shown) == sorted(made)


def test_figures_that_decide_stand_in_their_chapters(guidelines):
    sources = chapters.chapters()
    for each in guidelines:
        if each.chapter in sources:
            text = " ".join(chapters.source_text(sources[each.chapter]).split())
            assert each.figure in text, each.name


def test_contrasts_are_of_settings_that_every_network_has(guidelines):
    there = studies.load_study(scoreboard.TRANSFER).settings
    for each in guidelines:
        for contrast in each.across:
            for network in NETWORKS:
                assert {f"{network}: {contrast.setting}", f"{network}: {contrast.against}"} <= set(
                    there
                )


def test_verdicts_are_those_of_the_chapters(guidelines):
    rows = scoreboard.claims_table(guidelines).set_index(["study", "claim"])
    assert rows.loc[("03", "merging keeps"), "verdict"] == SUPPORTED
    assert rows.loc[("03", "merging keeps"), "estimate"] == pytest.approx(5.06, abs=0.01)
    assert rows.loc[("04", "meta-cosine beats lower"), "embarrassed"] == scoreboard.DID
    assert (
        rows.loc[("03", "merging beats a lower rate, adaptation"), "embarrassed"]
        == scoreboard.DID_NOT
    )
    assert rows.loc[("06", "easy first ends where random does"), "embarrassed"] == scoreboard.OPEN


def test_another_stored_score_is_another_verdict(guidelines, monkeypatch):
    chosen = [each for each in guidelines if each.name == "Merging"]
    before = scoreboard.claims_table(chosen).set_index("claim")
    stored = results.published_metrics

    def changed(chapter):
        frame = stored(chapter).copy()
        frame.loc[(frame["setting"] == "EMA") & (frame["role"] == "eval"), "score"] -= 12
        return frame

    monkeypatch.setattr(results, "published_metrics", changed)
    rows = scoreboard.claims_table(chosen)
    after = rows.set_index("claim")
    assert before.loc["merging keeps", "verdict"] == SUPPORTED
    assert after.loc["merging keeps", "verdict"] == REFUTED
    words = [
        scoreboard.guideline_overview(chosen, each, scoreboard.across_networks(chosen, None)).loc[
            "Merging"
        ]
        for each in (before.reset_index(), rows)
    ]
    assert words[0]["claims here"] != words[1]["claims here"]


def test_a_study_that_is_not_published_is_named(guidelines, monkeypatch, tmp_path):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    assert scoreboard.transfer_trajectory() is None
    rows = scoreboard.claims_table(guidelines)
    assert set(rows["verdict"]) == {scoreboard.UNPUBLISHED}
    assert set(rows.loc[rows["rival"] != "", "embarrassed"]) == {scoreboard.OPEN}
    networks = scoreboard.across_networks(guidelines, scoreboard.transfer_trajectory())
    words = scoreboard.guideline_overview(guidelines, rows, networks)
    assert words.loc["Methods", "claims here"] == "6 not published yet"
    assert words.loc["Methods", "across sizes and architectures"] == (
        "study 05-transfer is not published yet"
    )
    assert words.loc["Order", "across sizes and architectures"] == "not repeated on other networks"
    assert set(words["where we differ, most likely because"]) == {""}
    figures.plot_scoreboard(rows)
    assert "Study 05-transfer is not published yet." in (
        figures.plot_networks(networks).get_supxlabel()
    )


def test_a_damaged_study_is_no_unpublished_one(guidelines, monkeypatch, tmp_path):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    (tmp_path / "03.parquet").write_bytes(b"?")
    with pytest.raises(CmpError, match=r"03\.parquet: cannot be checked"):
        scoreboard.claims_table(guidelines)


def test_contrasts_hold_on_each_network_by_its_interval_else_by_its_sign(guidelines):
    shift = {"tiny": 4.0, "tiny-half": -4.0}
    networks = scoreboard.across_networks(guidelines, transfer(shift))
    rows = networks[networks["contrast"] == "EMA − full, A_ZS higher"].set_index("network")
    assert rows.loc["tiny", "held"] == "clearly"
    assert rows.loc["tiny-half", "held"] == "clearly against"
    assert rows.loc["tiny", "difference"] == pytest.approx(4.4)
    lower = networks[networks["contrast"] == "LoRA − full, A_KA lower"]
    assert set(lower["held"]) == {"clearly"}
    assert (lower["difference"] == -2).all()
    one = scoreboard.across_networks(guidelines, transfer(shift, replicates=1))
    one = one[one["contrast"] == "EMA − full, A_ZS higher"].set_index("network")["held"]
    assert list(one[["tiny", "tiny-half"]]) == ["by sign", "against by sign"]
    table = scoreboard.claims_table(guidelines)
    words = scoreboard.guideline_overview(guidelines, table, networks)
    column = words["across sizes and architectures"]
    assert "EMA − full, A_ZS higher: 1 of 5, 1 clearly" in column["Merging"]
    assert "LoRA − full, A_KA lower: 5 of 5, 5 clearly" in column["Methods"]


def test_a_rival_embarrasses_by_the_verdict_that_it_names():
    ground = Ground("s", "c", "rival", wins=SUPPORTED)
    found = [ground.embarrassed(each) for each in (SUPPORTED, REFUTED, UNDECIDED)]
    assert found == ["yes", "no", "open"]
    assert Ground("s", "c", "rival").embarrassed(REFUTED) == "yes"
    assert Ground("s", "c").embarrassed(REFUTED) == ""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("guidlines: []", "one key is expected"),
        ("guidelines: [{name: n}]", "guidelines.0"),
        ("guidelines: 3", "guidelines"),
        (
            "guidelines: [{name: n, chapter: '01', paper: p, figure: f, claims: ["
            "{study: '01', claim: c}, {study: '01', claim: c}]}]",
            "stands there twice",
        ),
    ],
)
def test_guidelines_are_read_strictly(tmp_path, text, words):
    path = tmp_path / "guidelines.yaml"
    path.write_text(text)
    with pytest.raises(CmpError, match=words):
        scoreboard.load_guidelines(path)


def test_a_claim_that_no_study_makes_is_refused():
    guideline = Guideline("n", "01", "p", "f", (Ground("01", "no such claim"),))
    with pytest.raises(
        CmpError, match=r"study 01 claims no 'no such claim'; it claims replay keeps"
    ):
        scoreboard.claims_table([guideline])


@pytest.mark.usefixtures("clean_drawing")
def test_the_figures_show_every_claim_and_every_network(guidelines):
    rows = scoreboard.claims_table(guidelines)
    axes = figures.plot_scoreboard(rows).axes[0]
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert set(rows["claim"]) | {each.name for each in guidelines} == set(labels)
    said = [text.get_text() for text in axes.texts]
    assert [said.count(each) for each in (SUPPORTED, REFUTED)] == [
        (rows["verdict"] == each).sum() for each in (SUPPORTED, REFUTED)
    ]
    networks = scoreboard.across_networks(guidelines, transfer({"tiny": 4.0}))
    axes = figures.plot_networks(networks).axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == list(NETWORKS)
    assert len(axes.texts) == len(networks)


def test_a_contrast_says_what_is_expected():
    assert str(Contrast("a", "b", "GM", "lower")) == "a − b, GM lower"
