"""`cmpt compare`: what two models do on the same pictures, the gate, the page, the stored index."""

import copy
import dataclasses
import html.parser
import json
import math
import os
import re

import forked
import numpy as np
import open_clip
import pandas as pd
import pytest
import torch
from pictures import classes
from scipy import stats
from typer.testing import CliRunner

import cmp
from cmp import cli, evaluation, models
from cmp.errors import CmpError
from cmp.evaluation import EncodedSets, ScoredSet
from cmp.project import build_folder
from cmp.releases import gate, intervals, report
from cmp.releases.candidates import find_candidate
from cmp.releases.compare import (
    NAMING,
    _image_weights,
    arrived_images,
    common_device,
    compare,
)
from cmp.releases.gate import Gate, Limits, UpdateLimits
from cmp.releases.index import GALLERIES, measure_index
from cmp.runs import launch
from cmp.runs.launch import from_keywords, resolve_run
from cmp.runs.runner import execute

SETS = ("new-solids", "new-digits", "pool-emoji", "pool-shapes", "shapes", "emoji-living",
        "emoji-captions")  # fmt: skip
LOSSES = Gate(
    all=Limits(drop=0.5), A_KA=Limits(drop=0.5, lost=2), A_ZS=Limits(drop=0.5, lost=2),
    each=Limits(drop=1, lost=5, sure=True),
)  # fmt: skip
"""What a model must not lose."""
HEALTHY = Gate(A_ZS=Limits(drop=3, lost=10), each=Limits(drop=5))
"""What the same training with other random numbers keeps."""


def only(corpus, names=SETS):
    """Some of a corpus's sets."""
    return dataclasses.replace(corpus, datasets={name: corpus.datasets[name] for name in names})


@pytest.fixture(scope="module")
def few(corpus):
    return only(corpus)


@pytest.fixture(scope="module")
def two(few):
    """Two bases on a few pictures of each set."""
    return compare("small:annealed:0", "small:annealed:1", few, subset=60, precision="fp32")


@pytest.fixture(scope="module")
def itself(few):
    return compare("small", "small:annealed:0", few, subset=30)


def test_the_t_quantile_is_that_of_the_tables():
    assert intervals.t_quantile(1) == pytest.approx(stats.t.ppf(0.975, 1))
    for freedom in (2, 3, 5, 10, 30, 1000):
        assert intervals.t_quantile(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=0.01)


def test_a_paired_interval_is_that_of_a_bootstrap_over_groups():
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(90), 4)
    ease = rng.random(90)[group]
    was, now = (ease + 0.3 * rng.random(360) > bound for bound in (0.6, 0.7))
    value, weight = now * 1.0 - was, np.full(360, 1 / 360)
    mean, low, high = intervals.mean_interval(value, weight, np.zeros(360, int), group)
    means = value.reshape(90, 4).mean(1)
    draws = means[rng.integers(0, 90, (8000, 90))].mean(1)
    assert mean == pytest.approx(value.mean())
    assert high - mean == pytest.approx(intervals.t_quantile(89) * draws.std(), rel=0.05)
    assert mean - low == pytest.approx(high - mean)
    few = np.array([0.1, 0, -0.04])  # of few groups, it is that of Student's t
    _, low, high = intervals.mean_interval(few, np.full(3, 1 / 3), np.zeros(3, int), np.arange(3))
    known = stats.t.interval(0.95, 2, few.mean(), stats.sem(few))
    assert (low, high) == pytest.approx(known, rel=0.02)


def test_the_interval_of_a_share_is_wilsons_and_wider_where_groups_agree():
    hit, among = np.repeat([True, False], [12, 48]), np.ones(60, bool)
    weight, one = np.full(60, 1 / 60), np.zeros(60, int)
    share, low, high = intervals.share_interval(hit, among, weight, one, np.arange(60))
    known = stats.binomtest(12, 60).proportion_ci(method="wilson")
    assert (share, low, high) == pytest.approx((0.2, known.low, known.high))
    wide = intervals.share_interval(hit, among, weight, one, np.repeat(np.arange(15), 4))
    assert wide[1] < low and wide[2] > high


def test_nothing_found_among_few_leaves_a_wide_interval():
    none, weight = np.zeros(20), np.full(20, 0.05)
    _, low, high = intervals.mean_interval(none, weight, np.zeros(20, int), np.arange(20))
    assert low == -high and high == pytest.approx(stats.binomtest(0, 20).proportion_ci(
        method="wilson").high)  # fmt: skip
    two_sets = np.repeat([0, 1], 10)
    alike = intervals.mean_interval(1.0 - two_sets, weight, two_sets, np.arange(20))
    assert alike == pytest.approx((0.5, 0.5 - high, 0.5 + high))  # each set changed as a whole
    one = intervals.mean_interval(none, weight, np.zeros(20, int), np.zeros(20, int))
    assert math.isnan(one[1])
    nothing = intervals.share_interval(none > 0, none > 0, weight, two_sets, np.arange(20))
    assert math.isnan(nothing[0])
    any_of = intervals.share_interval(none > 0, none == 0, weight, two_sets, np.arange(20))
    assert any_of[0] == 0 and any_of[2] == pytest.approx(high, abs=0.03)


@pytest.mark.parametrize("sizes", [(1000, 10), (200, 200)])
def test_an_interval_of_sets_of_any_size_misses_the_truth_rarely(sizes):
    """Also where a small set, which weighs as much as a large one, happens to lose nothing."""
    part = np.repeat([0, 1], sizes)
    group, weight = np.arange(len(part)), 0.5 / np.array(sizes)[part]
    rng, draws, missed = np.random.default_rng(0), 200, np.zeros(2)
    for _ in range(draws):
        was, changed = rng.random(len(part)) < 0.8, rng.random(len(part)) < 0.05
        now = was != changed
        _, low, high = intervals.mean_interval(now * 1.0 - was, weight, part, group)
        _, least, most = intervals.share_interval(~now, was, weight, part, group)
        missed += not low <= 0.2 * 0.05 - 0.8 * 0.05 <= high, not least <= 0.05 <= most
    assert (missed / draws <= 0.06).all()


@pytest.mark.numbers
def test_scores_are_those_of_an_evaluation(two, few):
    for column, seed in (("old", 0), ("new", 1)):
        model = models.load_model(cmp.RunConfig().model, seed)
        scores = evaluation.evaluate(model, "small", few, subset=60, precision="fp32")
        pd.testing.assert_series_equal(
            two.sets[column], scores.datasets["score"], check_names=False
        )
        summary = scores.summary()
        for name in ("A_KA", "A_ZS"):
            assert two.summary.loc[name, column] == pytest.approx(summary[name])


def test_flips_concepts_and_sets_count_the_same(two):
    by_set = two.flips.groupby(["dataset", "kind"]).size().unstack(fill_value=0)
    for kind in ("lost", "gained"):
        assert by_set[kind].to_dict() == two.sets.loc[by_set.index, kind].to_dict()
        assert two.summary.loc["all", kind] == two.sets[kind].sum()
    named = two.flips[two.flips["asked"] == NAMING]
    labels = two.corpus.table["label"].iloc[named["row"]].astype(str).tolist()
    assert labels == named["concept"].tolist()
    lost = named[named["kind"] == "lost"]
    assert (lost["said_old"] == lost["concept"]).all() and len(lost)
    assert (lost["said_new"] != lost["concept"]).all()
    assert two.concepts["lost"].sum() == len(lost)
    assert two.concepts["gained"].sum() == len(named) - len(lost)
    digits = two.sets.loc["new-digits"]
    assert digits["change"] == pytest.approx(
        100 * (digits["gained"] - digits["lost"]) / digits["questions"]
    )
    right = digits["old"] * digits["questions"] / 100
    assert digits["lost_share"] == pytest.approx(100 * digits["lost"] / right)


def test_concepts_that_lost_most_come_first_and_of_them_those_of_one_picture_last(two):
    assert two.worst_concepts(2).groupby("dataset").size().max() == 2
    rows = [("a", 1, 1, 0), ("b", 4, 1, 0), ("c", 2, 1, 0), ("d", 9, 3, 2), ("e", 9, 2, 2)]
    table = pd.DataFrame(rows, columns=["concept", "questions", "lost", "gained"])
    table = table.assign(change=100 * (table["gained"] - table["lost"]) / table["questions"])
    worst = dataclasses.replace(two, concepts=table.assign(dataset="x")).worst_concepts(each=False)
    assert worst["concept"].tolist() == ["d", "c", "b", "a"]


def test_the_worst_concept_lost_most_images_less_those_it_gained(two):
    """As the page says first: a large class that lost and gained as many has hardly changed."""
    columns = ["dataset", "concept", "questions", "old", "new", "change", "lost", "gained"]
    rows = [("shapes", "mug", 500, 60.0, 59.8, -0.2, 31, 30)]
    rows.append(("shapes", "vase", 12, 100.0, 8.3, -91.7, 11, 0))
    table = pd.DataFrame(rows, columns=columns).assign(became="lamp")
    page = report.report_page(dataclasses.replace(two, concepts=table))
    words = "is <b>vase</b> (shapes): of its 12 images, 11 lost their right name, and 0 gained it"
    assert words in page


def test_an_update_weighs_the_directions_of_retrieval_as_its_set_does():
    """Also where each image has several captions."""
    asked = ["image to text"] * 2 + ["text to image"] * 6
    table = pd.DataFrame({"dataset": "captions", "asked": asked, "row": [0, 1] + [0] * 3 + [1] * 3})
    assert _image_weights(table) == pytest.approx([0.5] * 2 + [1 / 6] * 6)
    names = table.assign(dataset="names", asked=NAMING, row=range(8))
    assert _image_weights(pd.concat([table, names])).sum() == pytest.approx(10)


@pytest.mark.numbers
def test_retrieval_at_five_is_the_score(two):
    at_five = two.retrieval[two.retrieval["k"] == 5]
    score = two.sets.loc["emoji-captions"]
    assert at_five["old"].mean() == pytest.approx(score["old"])
    assert at_five["new"].mean() == pytest.approx(score["new"])
    at_one = two.retrieval[two.retrieval["k"] == 1]
    assert (at_one["old"].to_numpy() <= at_five["old"].to_numpy()).all()


@pytest.fixture
def encoded_rows(monkeypatch):
    """The rows of all pictures that are encoded from now on, in this order."""
    rows_so_far, encode = [], evaluation.image_features

    def note(model, corpus, rows, precision):
        rows_so_far.extend(rows.tolist())
        return encode(model, corpus, rows, precision)

    monkeypatch.setattr(evaluation, "image_features", note)
    return rows_so_far


@pytest.mark.parametrize("split", ["test", "validation"])
def test_every_scored_picture_is_encoded_once_for_each_model_and_no_other(few, encoded_rows, split):
    compare("small", "small:annealed:1", few, split=split, subset=10)
    assert len(encoded_rows) == 2 * 5 * 10
    assert set(np.unique(encoded_rows, return_counts=True)[1]) == {2}
    assert {*few.table["split"].iloc[encoded_rows]} == {split}


def test_each_model_is_created_once(few, monkeypatch):
    created, create = [], models.create_fused_model
    monkeypatch.setattr(
        models, "create_fused_model", lambda *given: created.append(given[0]) or create(*given)
    )
    compare("small", "small:unannealed", few, subset=4)
    assert created == ["small", "small"]


def test_a_model_that_cannot_be_compared_is_refused_before_any_is_encoded(
    few, tmp_path, monkeypatch
):
    monkeypatch.setattr(evaluation, "image_features", None)
    path = tmp_path / "other.safetensors"
    models.export_weights(base()[1], path)
    for pair in (("small", f"tiny:{path}"), (f"tiny:{path}", "small")):
        with pytest.raises(CmpError, match="the weights belong to another architecture"):
            compare(*pair, few)
    larger = str(forked.clip_folder(tmp_path / "larger", 0, side=64))
    for pair in (("small", larger), (larger, "small")):
        with pytest.raises(CmpError, match="takes images of 64 pixels, but the data have 32"):
            compare(*pair, few, device="cpu")


# the index


def brute_force(corpus, old, new, is_new, kind, k):
    """Recall@k of words on the index of another model, written without a shortcut."""
    labels = [
        (test_set.dataset.name, label)
        for test_set in new.test_sets
        for label in corpus.table["label"].iloc[test_set.rows]
    ]
    prompts = [corpus.datasets[name].prompt.format(label) for name, label in labels]
    hits = []
    for place, text in enumerate(new.texts):
        wanted = [
            n for n, prompt in enumerate(prompts) if prompt == text and is_new[n] == (kind == "new")
        ]
        if wanted:
            order = np.argsort(-(old.image @ new.text[place]).numpy(), kind="stable")
            hits.append(any(n in wanted for n in order[:k]))
    return 100 * np.mean(hits), len(hits)


@pytest.fixture(scope="module")
def encoded(corpus):
    """A few pictures with their features by two models."""
    some = only(corpus, ("new-solids", "new-digits", "shapes", "emoji-living"))
    return some, [
        evaluation.encode(
            models.load_model(cmp.RunConfig().model, seed), "small", some, "test", 50, "fp32"
        )
        for seed in (0, 1)
    ]


@pytest.mark.numbers
def test_recall_across_versions_is_that_of_a_brute_force(encoded):
    some, (old, new) = encoded
    is_new = np.random.default_rng(0).random(len(old.image)) < 0.4
    galleries = {
        "before": (old, old), "reencoded": (new, new), "as_is": (old, new),
        "new_first": (partly_new(old, new, is_new), new),
    }  # fmt: skip
    assert [*galleries] == [*GALLERIES]
    table = measure_index(some, old, new, is_new)
    for row in table[table["query"] == "text"].itertuples():
        for name, (gallery, queries) in galleries.items():
            score, count = brute_force(some, gallery, queries, is_new, row.content, row.k)
            assert (getattr(row, name), row.queries) == (pytest.approx(score), count), name
        assert row.loses == pytest.approx(row.reencoded - row.as_is)
        assert row.low <= row.loses <= row.high


def partly_new(old, new, is_new):
    """An index in which only new images have been encoded again."""
    image = old.image.clone()
    image[torch.from_numpy(is_new)] = new.image[torch.from_numpy(is_new)]
    return dataclasses.replace(old, image=image)


@pytest.mark.numbers
@pytest.mark.parametrize("share", [0, 0.4])
def test_a_picture_finds_others_of_its_class_and_never_itself(encoded, share):
    """And of its part of the index, known or new."""
    some, (old, new) = encoded
    is_new = np.random.default_rng(0).random(len(old.image)) < share
    table = measure_index(some, old, new, is_new)
    labels = np.concatenate(
        [[f"{s.dataset.name}/{x}" for x in some.table["label"].iloc[s.rows]] for s in new.test_sets]
    )
    similarity = (new.image @ old.image.T).numpy()
    np.fill_diagonal(similarity, -2)
    rows = table[(table["query"] == "picture") & (table["k"] == 5)].set_index("content")
    assert [*rows.index] == (["known", "new"] if share else ["known"])
    for content, row in rows.iterrows():
        part = is_new == (content == "new")
        alike = (labels[:, None] == labels) & part & part[:, None]
        asked = np.flatnonzero(alike.sum(1) > 1)
        hits = [alike[n, np.argsort(-similarity[n])[:5]].any() for n in asked]
        assert row["queries"] == len(asked) and row["as_is"] == pytest.approx(100 * np.mean(hits))
    assert share or table["new_first"].isna().all()


@pytest.mark.numbers
def test_an_index_of_another_size_is_not_searched(encoded):
    some, (old, _) = encoded
    new = dataclasses.replace(old, image=old.image[:, :64], text=old.text[:, :64])
    table = measure_index(some, old, new, np.zeros(len(old.image), bool))
    assert table["as_is"].isna().all() and table["new_first"].isna().all()
    assert table["loses"].isna().all() and table["reencoded"].notna().all()


def test_captions_are_queries_too(two, few):
    rows = two.index
    assert set(rows["content"]) == {"known", "new"} and list(rows.columns)[4:8] == list(GALLERIES)
    captions = {text for row in evaluation.evaluation_rows(few, "emoji-captions", "test", 60)
                for text in few.captions(row)}  # fmt: skip
    [queries] = rows[(rows["query"] == "text") & (rows["content"] == "known")]["queries"].unique()
    assert queries > len(captions)


def test_what_is_new_is_named_by_set_or_update(few):
    is_new = arrived_images(few, None)
    assert set(few.table["dataset"][is_new]) == {"new-solids", "new-digits"}
    assert not arrived_images(only(few, ("new-solids",)), None).any()
    assert set(few.table["dataset"][arrived_images(few, ["shapes"])]) == {"shapes"}
    table = few.table.assign(update=np.where(few.table["label"] == "three", "2 may", "1 april"))
    table["update"] = table["update"].astype("category")
    months = dataclasses.replace(few, table=table)
    for name in ("may", "2 may"):  # as tables print it, and as a release stores it
        assert set(table["label"][arrived_images(months, [name])]) == {"three"}
    with pytest.raises(CmpError, match=r"--new: .*'shape'; did you mean 'shapes'"):
        arrived_images(few, ["shape"])


# the gate


def test_a_model_passes_every_limit_on_losses_against_itself(itself):
    assert itself.is_same and itself.flips.empty
    assert gate.check_gate(LOSSES, itself) == []
    sure = {name: dataclasses.replace(each, sure=True) for name, each in
            (("A_KA", LOSSES.A_KA), ("A_ZS", LOSSES.A_ZS), ("all", LOSSES.all))}  # fmt: skip
    assert gate.check_gate(Gate(**sure, each=Limits(drop=0, lost=0, sure=True)), itself) == []
    assert (itself.index["loses"] == 0).all() and (itself.index["high"] == 0).all()


def test_a_gate_that_asks_for_a_gain_fails_a_model_against_itself_and_says_so(itself):
    [words] = gate.check_gate(Gate(A_KA=Limits(gain=1, drop=1)), itself)
    assert words.startswith("A_KA.gain: ") and "a gain of at least 1 is required" in words


def line(row, **limits):
    [found] = gate._apply(Limits(**limits), "each", "x", pd.Series(row))
    return found


ROW = {"old": 60.0, "new": 57.0, "change": -3.0, "low": -5.0, "high": -1.0, "lost": 9,
       "lost_share": 12.0, "lost_low": 8.0, "lost_high": 17.0}  # fmt: skip


RISE = {"change": 3.0, "low": 1.0, "high": 5.0}
NOTHING_RIGHT = {"old": 0.0, "lost_share": np.nan, "lost_high": np.nan}


@pytest.mark.parametrize(
    ("limits", "changes", "value", "passed"),
    [
        ({"drop": 3}, {}, "(−3.0", True), ({"drop": 2.9}, {}, "(−3.0", False),
        ({"drop": 3, "sure": True}, {}, "(−5.0", False),
        ({"drop": 5, "sure": True}, {}, "(−5.0", True),
        ({"lost": 12}, {}, " 12.0%", True), ({"lost": 11}, {}, " 12.0%", False),
        ({"lost": 16, "sure": True}, {}, " 17.0%", False),
        ({"lost": 0}, NOTHING_RIGHT, " 0.0%", True),
        ({"gain": 0}, {}, "(−3.0", False), ({"gain": 2}, RISE, "(+3.0", True),
        ({"gain": 2, "sure": True}, RISE, "(+1.0", False),
        # of ten images, each with a weight of 1/10, one is a little more than 10%
        ({"lost": 10}, {"lost_share": 10.000000000000002}, " 10.0%", True),
        ({"drop": 15}, {"change": -15.000000000000002}, "(−15.0", True),
        ({"gain": 100}, {"change": 99.99999999999999}, "(+100.0", True),
        # what breaks a limit does not look as if it kept it
        ({"drop": 3}, {"change": -3.04}, "(−3.04", False),
        ({"lost": 12}, {"lost_share": 12.004}, " 12.004%", False),
        ({"gain": 2}, {"change": 1.96}, "(+1.96", False),
    ],
)  # fmt: skip
def test_a_limit_is_compared_with_the_estimate_or_the_worse_end(limits, changes, value, passed):
    found = line(ROW | changes, **limits)
    assert value in found.sentence and found.passed == passed
    assert ("worse end" in found.sentence) == limits.get("sure", False)


def test_where_no_interval_can_be_formed_nothing_is_sure():
    unknown = line(ROW | {"low": np.nan}, drop=50, sure=True)
    assert not unknown.passed and "too few for an interval" in unknown.sentence


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("eahc: {drop: 1}\neach: {drop: 1}", "eahc: unknown key; a gate"),
        ("each: {drop: 1, los: 2}", "each.los: unknown key; a gate"),
        ("sets: {shapes: {sur: true}}", "sets.shapes.sur: unknown key; a gate"),
        ("A_ZS: {drop: -1}", "A_ZS.drop"),
        ("A_ZS: {lost: 101}", "A_ZS.lost"),
        ("A_ZS: {drop: much}", "A_ZS.drop"),
        ("A_ZS: {drop: 1, sure: maybe}", "A_ZS.sure"),
        ("sets: {shapes: 3}", "sets.shapes"),
        ("each: {drop: 1}\neach: {drop: 2}", "each"),
        ("each: {sure: true}", "limits nothing"),
        ("last_update: {images: 9}", "limits nothing"),
        ("A_KA: {gain: 1, images: 9}", "A_KA.images: unknown key"),
        ("each_update: {drop: 1, images: 0}", "each_update.images"),
        ("{}", "limits nothing"),
        ("[1, 2]", "YAML with keys"),
    ],
)
def test_a_gate_that_cannot_be_followed_is_refused_by_key(tmp_path, text, words):
    path = tmp_path / "gate.yaml"
    path.write_text(text)
    with pytest.raises(CmpError) as refused:
        gate.read_gate(path)
    assert str(path) in str(refused.value) and words in str(refused.value)


def test_a_limit_on_what_is_not_compared_is_refused(two):
    with pytest.raises(CmpError, match=r"sets\.shape: .*did you mean 'shapes'"):
        gate.apply_gate(Gate(sets={"shape": Limits(drop=1)}), two)
    old_only = dataclasses.replace(
        two, sets=two.sets[two.sets["role"] == "eval"], summary=two.summary.drop("A_KA")
    )
    with pytest.raises(CmpError, match="A_KA: no set of role adapt"):
        gate.apply_gate(Gate(A_KA=Limits(gain=1)), old_only)
    for key in ("each_update", "last_update"):
        with pytest.raises(CmpError, match=f"{key}: no images of updates are compared"):
            gate.apply_gate(Gate(**{key: UpdateLimits(drop=1)}), two)


@pytest.mark.parametrize(
    ("key", "begin"),
    [("A_ZS", "A_ZS.drop: 60.0"), ("updates.v1.2", "updates.v1.2.drop: 60.0"),
     ("each_update", "each_update.drop: v1.2: 60.0")],
)  # fmt: skip
def test_a_line_of_the_gate_names_what_it_limits_once(key, begin):
    scope = "A_ZS" if key == "A_ZS" else "v1.2"
    [found] = gate._apply(Limits(drop=1), key, scope, pd.Series(ROW))
    assert found.sentence.startswith(begin)


def test_a_set_s_own_limits_replace_those_of_each(two):
    lines = gate.apply_gate(Gate(each=Limits(drop=5), sets={"shapes": Limits(lost=1)}), two)
    keys = {(found.scope, found.key) for found in lines}
    assert ("shapes", "sets.shapes.lost") in keys and ("shapes", "each.drop") not in keys
    assert ("new-digits", "each.drop") in keys and len(lines) == len(two.sets)


# planted regressions


def train(corpus, steps=60, seed=0, **settings):
    """An embedded model after one update."""
    settings |= {"stream": {"tasks": 1}, "steps": steps, "precision": "fp32"}
    settings |= {"evaluation": {"subset": 1, "full": False}, "seeds": {"data": seed}}
    return "small", execute(from_keywords("quick", settings), corpus).model


@pytest.fixture(scope="module")
def good(few):
    return train(few)


def look(good, bad, corpus, limits=HEALTHY):
    tables = compare(good, bad, corpus, subset=160, precision="fp32")
    return tables, gate.check_gate(limits, tables)


def base(seed=0):
    return "small", models.load_model(cmp.RunConfig().model, seed)


@pytest.mark.long
def test_the_same_training_with_other_random_numbers_passes(good, few):
    tables, broken = look(good, train(few, seed=1), few)
    assert broken == [] and len(tables.flips)


@pytest.mark.long
def test_a_class_relabelled_in_training_is_named(good, few):
    """Pictures of a three arrive as "handwritten digit eight"."""
    rows = few.rows("train", dataset="new-digits", label="three")
    eight = few.rows("train", dataset="new-digits", label="eight")[0]
    ids = few.caption_ids.copy()
    ids[few.caption_starts[rows]] = ids[few.caption_starts[eight]]
    tables, broken = look(good, train(dataclasses.replace(few, caption_ids=ids)), few)
    assert any("new-digits" in words for words in broken)
    assert tables.sets["change"].idxmin() == "new-digits"
    worst = tables.worst_concepts(2, each=False).set_index("concept")
    assert worst.loc["three", "became"] == "eight"


@pytest.mark.long
def test_a_set_dropped_from_replay_is_named(good, few):
    lacking = only(few, [name for name in SETS if name != "pool-shapes"])
    tables, broken = look(good, train(lacking), few)
    assert any("shapes" in words for words in broken)
    assert tables.sets["change"].idxmin() == "shapes"


@pytest.mark.long
def test_a_peak_ten_times_too_high_loses_what_is_old(few):
    pair = [train(few, steps=12, schedule={"peak": peak}) for peak in (6.3e-4, 6.3e-3)]
    tables, broken = look(*pair, few)
    assert any(words.startswith("A_ZS.drop") for words in broken)
    old = tables.sets[tables.sets["role"] == "eval"]
    assert (old["high"] < 0).all()


def test_the_weights_of_another_seed_are_seen_though_no_score_falls(corpus):
    """Names are lost behind an unchanged mean, and the index is worthless."""
    names = ("emoji-line", "emoji-living", "emoji-signs", "emoji-things", "emoji-captions")
    limits = Gate(A_ZS=Limits(drop=3, lost=10))
    tables, broken = look(base(0), base(1), only(corpus, (*names, "pool-emoji")), limits)
    assert [words.partition(":")[0] for words in broken] == ["A_ZS.lost"]
    assert (tables.sets["lost_share"] > 2).all() and tables.sets["lost_share"].idxmax() in names[:4]
    words = tables.index[(tables.index["query"] == "text") & (tables.index["k"] == 5)]
    assert (words["as_is"] < 10).all()


def test_a_shifted_preprocessing_is_seen(few):
    _, network = base()
    shifted = copy.deepcopy(network)
    shifted.visual.image_mean = tuple(x + 0.8 for x in network.visual.image_mean)
    tables, broken = look(("small", network), ("small", shifted), few)
    assert any("shapes" in words for words in broken)
    assert tables.sets.loc["shapes", "high"] < -20
    assert len(tables.worst_concepts(20).query("dataset == 'shapes'")) > 10


# the page


class Page(html.parser.HTMLParser):
    """What a page has: attributes by tag, and its text."""

    def __init__(self, text):
        super().__init__()
        self.found, self.words = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.words.append(data)

    def all(self, tag):
        return [about for name, about in self.found if name == tag]


def test_the_page_needs_no_network_and_every_picture_has_words(two):
    lines = gate.apply_gate(Gate(each=Limits(drop=1)), two)
    text = report.report_page(two, gate=lines)
    page = Page(text)
    assert len(text.encode()) < report.LARGEST
    assert all(x["src"].startswith("data:image/png;base64,") for x in page.all("img"))
    assert all(x["alt"] for x in page.all("img")) and len(page.all("img")) > 40
    links = [x.get("href") for tag in ("a", "link") for x in page.all(tag)]
    assert all(link.startswith("#") for link in links)
    assert "http" not in text and "@import" not in text and "url(" not in text
    ids = [about["id"] for _, about in page.found if "id" in about]
    assert len(ids) == len(set(ids)) and {"lost", "gained", "scores", "index", "gate"} <= {*ids}
    words = " ".join(page.words)
    for name in two.sets.index:
        assert name in words
    assert "What this does not show" in words


def test_the_page_shows_what_changed_with_both_names(two):
    chosen = report.choose_flips(two, "lost")
    assert len(chosen) == len(chosen.drop_duplicates(["dataset", "row"])) > 10
    assert chosen.groupby(["dataset", "concept"]).size().max() <= report.PER_CONCEPT
    assert (chosen["kind"] == "lost").all()
    alts = {x["alt"] for x in Page(report.report_page(two)).all("img")}
    for row in chosen.itertuples():
        assert f"{row.concept}; before: {row.said_old}; now: {row.said_new}" in alts


def test_the_page_calls_clear_what_an_interval_shows(two):
    named = two.sets[two.sets["metric"] == "top-1"]
    lost, right = named["lost"].sum(), (named["old"] * named["questions"]).sum() / 100
    words = f"named right, the new one gets {lost:,} wrong ({100 * lost / right:.0f}%)"
    assert words in report.report_page(two)
    sets = two.sets.assign(change=-1.0, low=-3.0, high=1.0)  # lower, but it could be either
    sets.loc["shapes", ["change", "low", "high"]] = (-3.0, -5.0, -1.0)
    sets.loc[["new-digits", "new-solids"], ["change", "low", "high"]] = (3.0, 1.0, 5.0)
    page = report.report_page(dataclasses.replace(two, sets=sets))
    assert f"<h2>1 set of {len(sets)} clearly worse, 2 clearly better</h2>" in page
    for name, state in (("shapes", "down"), ("new-digits", "up"), ("emoji-living", "open")):
        [line] = re.findall(rf'<li class=""><span>{name} .*', page)
        assert line.count(f'class="{state}"') == 2  # the mark and its interval


HOSTILE = "<img src=x onerror=alert(1)>\"'&\x00\u202e</style><script>"


def test_whatever_a_user_names_is_text(two):
    flips = two.flips.assign(said_new=HOSTILE, concept=HOSTILE)
    concepts = two.concepts.assign(concept=HOSTILE, became=HOSTILE)
    sets = two.sets.rename(index={"shapes": HOSTILE})
    hostile = dataclasses.replace(
        two, old=HOSTILE, new=HOSTILE, split=HOSTILE, flips=flips, concepts=concepts, sets=sets
    )
    broken = gate.GateLine("each", HOSTILE, False, HOSTILE)
    text = report.report_page(hostile, HOSTILE, [broken], [HOSTILE])
    page = Page(text)
    assert not any("onerror" in about for about in page.all("img"))
    assert len(page.all("script")) == 1 and "\x00" not in text and "\u202e" not in text
    assert "alert(1)" in " ".join(page.words)


def test_the_page_says_first_what_to_do_with_the_index(two):
    found = two.index.assign(new_first=80.0, as_is=27.0, reencoded=82.0, queries=50)
    found["content"] = np.where(found["content"] == "known", "known", "new")

    def heading(table):
        page = report.report_page(dataclasses.replace(two, index=table))
        return re.findall(r'<section id="index">\n<h2>(.*)</h2>', page)[0]

    of_new, known = found.assign(content="new"), found["content"] == "known"
    words = "by words, new content is found in 80.0% of queries instead of 27.0%"
    assert heading(of_new) == f"Let the new model encode only the new images: {words}"
    old = "The old model may encode the new images, too: by words"
    assert heading(of_new.assign(as_is=80.0)).startswith(old)
    assert "differ in size" in heading(of_new.assign(as_is=np.nan))
    settled = found.assign(as_is=np.where(known, 80.0, 27.0), reencoded=80.5)
    assert heading(settled) == f"Let the new model encode only the new images: {words}"
    again = "Encode every image again, or keep two indexes: by words, known content is found in "
    pushed = settled.assign(as_is=np.where(known, 90.0, 80.0))
    assert heading(pushed).startswith(f"{again}80.0% of queries beside re-encoded new images, 90.0")
    assert heading(settled.assign(reencoded=90.0)) == f"{again}90.0% of queries instead of 80.0%"
    alone = settled[known].assign(new_first=np.nan)
    assert heading(alone).startswith("The old index still serves: by words, known content")
    assert heading(alone.assign(reencoded=90.0)).startswith("Encode every image again: by words")
    of_words = found["query"] == "text"
    few = settled.assign(queries=np.where(of_words & ~known, 4, 50))  # which decide nothing
    few["new_first"] = np.where(of_words, 80.0, 70.0)
    assert heading(few).endswith(
        ": by an image, new content is found in 70.0% of queries instead of 27.0%"
    )
    pushed["queries"] = np.where(known, 1000, 9)
    assert heading(pushed).startswith(f"{again}80.0%")  # of known content, there are enough
    assert "by words (only 9 queries), new" in heading(settled.assign(queries=9))
    page = report.report_page(two)
    assert "may match several images" in page and "image tower is locked" in page


def test_a_page_of_many_pictures_stays_small(two, monkeypatch):
    monkeypatch.setattr(report, "LARGEST", 0)
    bare = len(report.report_page(two).encode())
    monkeypatch.setattr(report, "LARGEST", bare + 20_000)
    text = report.report_page(two)
    cards = [x for x in Page(text).all("li") if x.get("class") == "card"]
    assert len(text.encode()) <= report.LARGEST and cards
    assert 0 < len(Page(text).all("img")) < len(cards)


def test_a_page_of_captions_alone_says_nothing_of_names(two):
    captions = dataclasses.replace(two, sets=two.sets[two.sets["metric"] != "top-1"])
    page = report.report_page(captions)
    assert "only searches by caption are compared" in page and "named none of them" not in page
    for word in ("lost a name", "gained a name", "Names lost", "The upper name", "a name counts"):
        assert word.lower() not in page.lower()
    asked = two.flips[two.flips["asked"] == "text to image"]
    assert len(asked)
    for kind, words in (("lost", "no longer finds"), ("gained", "finds only now")):
        images = asked.loc[asked["kind"] == kind, "row"].nunique()
        assert f">{images:,}</b><span>images that a caption {words}</span>" in page


def test_a_model_against_itself_has_a_page(itself, tmp_path):
    report.write_report(itself, tmp_path / "x.html", title="Twins", notes=["Nothing arrived."])
    words = " ".join(Page((tmp_path / "x.html").read_text()).words)
    assert "nothing was lost or gained" in words and "Nothing arrived." in words


# pictures in files, and other ways to name a model


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """Manifests of two small sets in files."""
    monkeypatch.setenv("CMP_BUILD", str(tmp_path / "build"))
    for name, role in (("arrivals", "adapt"), ("kept", "eval")):
        classes(tmp_path / "shop" / name, ("red fox", "oak", "<b>snow<b>"), each=10)
        text = {
            "name": name, "title": "Mine", "role": role, "licence": "own",
            "prompt": "a photo of a {}", "reader": {"kind": "folder", "path": name},
        }  # fmt: skip
        (tmp_path / "shop" / f"{name}.yaml").write_text(json.dumps(text))
    return tmp_path / "shop"


@pytest.mark.filterwarnings("ignore")
def test_folders_of_another_size_on_pictures_in_files(shop, tmp_path):
    old = forked.clip_folder(tmp_path / "old", 0)
    new = forked.clip_folder(tmp_path / "new", 1, width=48)
    tables = compare(str(old), f"local-dir:{new}", cmp.load_data(str(shop)), device="cpu")
    assert list(tables.sets.index) == ["arrivals", "kept"]
    assert tables.index["as_is"].isna().all()
    text = report.report_page(tables)
    page = Page(text)
    sources = {x["src"][:22] for x in page.all("img")}
    assert sources == {"data:image/jpeg;base64"} and not page.all("b snow")
    assert "differ in size" in " ".join(page.words)


def test_a_folder_without_test_pictures_is_refused(shop):
    for path in shop.glob("*.yaml"):
        text = json.loads(path.read_text()) | {"role": "pool", "name": path.stem}
        path.write_text(json.dumps(text))
    with pytest.raises(CmpError, match="no dataset of this corpus has images in 'test'; name"):
        compare("small", "small", cmp.load_data(str(shop)))


def test_an_embedded_model_in_a_folder_keeps_its_own_tokens(few, tmp_path):
    """A release of an embedded model, as `cmpt export --to hf` writes it."""
    folder = tmp_path / "hub"
    folder.mkdir()
    _, network = base(1)
    about = {"model_cfg": open_clip.get_model_config("small"), "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(about))
    models.export_weights(network, folder / "open_clip_model.safetensors")
    tables = compare(str(folder), "small:annealed:1", few, subset=10, precision="fp32")
    assert find_candidate(str(folder)).name == "small" and tables.flips.empty
    in_file = f"small:{folder / 'open_clip_model.safetensors'}"
    assert compare(in_file, folder, few, subset=10).is_same


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("smal", "did you mean 'small'"),
        ("nothing/there", "no folder or model"),
        ("ViT-B-32", "ViT-B-32:START"),
        ("small:annealed:99", "no annealed base 99"),
        ("small:nothing", "model.start: 'nothing'"),
        ("small:a\nb", "model.start: "),
        ("run:0000000000", "no stored run with this id"),
        ("deadbeef", "no stored run with this id"),
        ("local-dir:/nowhere", "no open_clip_config.json"),
        ("", "no folder or model"),
    ],
)
def test_what_names_no_model_is_refused(what, words):
    with pytest.raises(CmpError, match=re.escape(words)):
        find_candidate(what)


def test_a_stored_run_is_named_by_its_id(few, tmp_path, monkeypatch):
    monkeypatch.setenv("CMP_BUILD", str(tmp_path))
    settings = {"stream": {"tasks": 1}, "steps": 1, "evaluation": {"subset": 1, "full": False}}
    run = launch.compute(resolve_run(from_keywords("quick", settings)), keep=True)
    tables = compare(f"run:{run.id}", run.id[:8], few, subset=5)
    assert tables.is_same and tables.old == f"run {run.id[:12]}"
    (tmp_path / "runs" / run.id[:12] / "weights.safetensors").unlink()
    with pytest.raises(CmpError, match="weights were not kept"):
        find_candidate(run.id)


def test_both_models_are_computed_on_one_device(monkeypatch):
    monkeypatch.setattr("cmp.releases.compare.check_device", lambda device: None)
    pair = ["small", "ViT-B-32"]
    usual = [common_device(each, None) for each in (pair, pair[:1], pair[1:])]
    assert usual == ["cuda", "cpu", "cuda"] and common_device(pair, "cpu") == "cpu"


def test_a_file_and_a_half_folder_are_refused_with_the_fix(tmp_path):
    file = tmp_path / "w.safetensors"
    file.write_bytes(b"")
    with pytest.raises(CmpError, match=f"write NAME:{re.escape(str(file))}"):
        find_candidate(str(file))
    with pytest.raises(CmpError, match=r"contains no open_clip_config\.json"):
        find_candidate(str(tmp_path))
    (tmp_path / "open_clip_config.json").write_text("{")
    (tmp_path / "open_clip_model.safetensors").write_bytes(b"")
    with pytest.raises(CmpError, match="its config cannot be read"):
        find_candidate(str(tmp_path))


# the command


def call(*arguments):
    return CliRunner().invoke(cli.app, ["compare", *map(str, arguments)])


def test_the_command_prints_writes_and_exits_by_the_gate(tmp_path, monkeypatch):
    page, path = tmp_path / "report.html", tmp_path / "gate.yaml"
    path.write_text("each: {drop: 0, lost: 0, sure: true}")
    common = ("small", "small:annealed:1", "--subset", 8, "--threads", 1, "--report", page)
    common += ("--new", "shapes,icons")
    result = call("small", "small:annealed:0", "--subset", 4, "--gate", path, "--threads", 1)
    assert result.exit_code == 0 and "limits kept" in result.output
    assert "passed: each.drop" in result.output
    result = call(*common, "--gate", path)
    assert result.exit_code == 1 and "broken: each.drop" in result.output
    assert page.stat().st_size > 10_000 and f"written: {page}" in result.output
    for words in ("A_ZS", "by what is in the index", "new-digits", "as_is: new model, old index"):
        assert words in result.output
    assert "-%" not in result.output
    assert re.search(r"count answers, of which there are \d+ for \d+ images: ", result.output)
    assert "has more answers than images" in page.read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--gate", "gone.yaml"), "gone.yaml: no such file"),
        (("--gate", "gate.yaml"), "did you mean 'shapes'"),  # a set that is not compared
        (("--report", "gone/r.html"), "--report gone/r.html: the folder gone does not exist"),
        (("--report", "gate.yaml"), "--report gate.yaml: use a name that ends in .html"),
        (("--report", "folder.html"), "is not replaced"),
        (("--new", "nothing"), "--new: no dataset and no update is called 'nothing'"),
        (("--data", "gone"), "gone"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_encoded(
    arguments, words, monkeypatch, tmp_path
):
    monkeypatch.setenv("CMP_BUILD", str(build_folder().resolve()))  # whichever test runs first
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gate.yaml").write_text("sets: {shape: {drop: 1}}")
    (tmp_path / "folder.html").mkdir()
    monkeypatch.setattr(evaluation, "encode", None)
    result = call("small", "small", *arguments)
    assert words in str(result.exception) and isinstance(result.exception, CmpError)


def test_the_gate_is_judged_before_the_page_is_written(tmp_path, monkeypatch):
    (tmp_path / "gate.yaml").write_text("each: {drop: 0}")
    common = ("small", "small", "--subset", 2, "--gate", tmp_path / "gate.yaml", "--threads", 1)
    common += ("--report", tmp_path / "report.html")

    def fail(*_, **__):
        raise CmpError("report.html: no space left")

    monkeypatch.setattr("cmp.releases.report.write_report", fail)
    result = call(*common)
    assert "limits kept" in result.output and "no space" in str(result.exception)
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    assert f"nothing can be written to the folder {tmp_path}" in str(call(*common).exception)


def test_features_are_kept_by_set():
    """Texts that several sets share are encoded once and found by each."""
    sets = [ScoredSet(None, np.arange(2), ["a", "b"]), ScoredSet(None, np.arange(3), ["b", "c"])]
    features = EncodedSets(sets, torch.arange(5.0)[:, None], ["a", "b", "c"], torch.eye(3))
    (_, first, _), (_, second, texts) = features.by_set()
    assert first.flatten().tolist() == [0, 1] and second.flatten().tolist() == [2, 3, 4]
    assert torch.equal(texts, torch.eye(3)[1:])
