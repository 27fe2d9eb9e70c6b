"""Guidelines: what their boxes say follows from what is published."""

import dataclasses

import pandas as pd
import pytest
import synthetic

from cmp.parsing import check_record
from lab import boxes
from lab.evidence import claims, guidelines
from lab.evidence.claims import ClaimsFile, FrontOf
from lab.evidence.guidelines import Guideline, measure_guideline

LOCAL = {f"plain, peak {peak}": {"schedule.peak": peak} for peak in (0.0004, 0.0006, 0.0009)}
ENDS = {"plain, peak 0.0004": (40, 52), "plain, peak 0.0006": (46, 50),
        "plain, peak 0.0009": (50, 48), "up": (45, 53), "down": (45, 46), "flat": (46, 49.6),
        "beyond": (58, 46)}  # fmt: skip
TRIED = ("up", "down", "flat", "beyond")


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    folder = tmp_path_factory.mktemp("book")
    settings = LOCAL | {name: {"schedule.peak": 0.001 + i / 1e4} for i, name in enumerate(ENDS)}
    with pytest.MonkeyPatch.context() as patch:
        synthetic.place(patch, folder)
        synthetic.write_study("more", LOCAL | {n: settings[n] for n in TRIED})
        synthetic.publish("more", ENDS)
    return folder


@pytest.fixture
def published(book, monkeypatch):
    synthetic.place(monkeypatch, book)


def guideline(*settings, **more):
    networks = [
        {"network": f"net-{place}", "technique": "merging", "study": "more", "setting": name,
         "front": list(LOCAL)} | more
        for place, name in enumerate(settings)
    ]  # fmt: skip
    tree = {
        "name": "merging", "paper": "It helps.", "scale": "large",
        "advice": "Do it.", "follows": "both", "open": "all else.", "networks": networks,
    }  # fmt: skip
    return check_record(tree, Guideline, "test: ")


def judged(agrees):
    row = {
        "guideline": "merging",
        "source": "paper",
        "claimed": "It keeps.",
        "sentence": "Helps.",
        "agrees": agrees,
    }
    return pd.DataFrame([row, row | {"guideline": "another", "agrees": "no"}])


def test_networks_of_one_sign_agree_and_of_two_do_not(published):
    same = measure_guideline(guideline("up", "up"), judged("yes"))
    assert same.sentences == ('Claim: "It keeps." Helps.',)
    assert not same.disagrees
    *words, about = same.networks
    for place, each in enumerate(words):
        assert each.startswith(f"merging on `net-{place}`: +")
        assert "(n = 20)" in each
    assert about == guidelines.UNTUNED
    assert measure_guideline(guideline("up", "down"), judged("yes")).disagrees
    assert measure_guideline(guideline("up"), judged("no")).disagrees


def test_signs_count_above_a_point_and_the_book_s_network_has_one(published, monkeypatch):
    assert "`net-0`: −" in measure_guideline(guideline("flat"), judged("yes")).networks[0]
    assert not measure_guideline(guideline("up", "flat"), judged("yes")).disagrees
    front = FrontOf("more", tuple(LOCAL), local=True, least=3)
    known = ClaimsFile((), {"plain": front})
    monkeypatch.setattr(claims, "load_claims", lambda *_: known)
    own = guideline("down", network=guidelines.OWN, front="plain")
    others = guideline("up").networks
    measured = measure_guideline(
        dataclasses.replace(own, networks=own.networks + others), judged("yes")
    )
    assert measured.networks[0].startswith("merging on `small` (the book's network): −")
    assert measured.disagrees


def test_a_claim_of_ours_does_not_contradict_the_paper(published):
    rows = judged("no").assign(source="ours")
    assert not measure_guideline(guideline("up"), rows).disagrees


def test_what_cannot_be_measured_is_said(published):
    words, _ = measure_guideline(guideline("beyond"), judged("")).networks
    reason = "it learned more than plain fine-tuning at any peak that we tried"
    assert words == f"merging on `net-0`: cannot be compared, because {reason}."
    lone = guideline("up", front=["plain, peak 0.0004"])
    words, _ = measure_guideline(lone, judged("")).networks
    assert "its gain cannot be formed: " in words and "cannot be compared" not in words
    synthetic.write_study("later", {"up": {}} | LOCAL)
    words, _ = measure_guideline(guideline("up", study="later"), judged("")).networks
    assert words == "merging on `net-0`: not computed yet."


def test_every_guideline_of_the_book_has_a_claim_and_a_true_advice():
    names = guidelines.load_guidelines()
    known = [claim for path in claims.FAMILIES for claim in claims.load_claims(path).claims]
    assert {claim.guideline for claim in known} == set(names)
    verdict_rows = guidelines.judged_claims(*claims.FAMILIES)
    for name, each in names.items():
        box = boxes.guideline_box(name)
        assert tuple(box) == guidelines.ROWS
        assert all(box.values())
        if measure_guideline(each, verdict_rows).disagrees:
            assert each.follows == "paper", name


def test_a_box_has_a_paragraph_for_each_sentence_and_printers_signs(monkeypatch):
    texts = ("Claim: \"It's <b>.\" No 'EMA'.", "LoRA on `tiny`: \N{MINUS SIGN}1.0 points.")
    monkeypatch.setattr(boxes, "guideline_box", lambda name: {"We measured": texts})
    box = boxes.beside_paper("order").data
    assert ">Claim: “It’s &lt;b&gt;.” No ‘EMA’.</p><p" in box
    assert ">LoRA on <code>tiny</code>: −1.0 points.</p></td>" in box
