"""Scores on hand-made cases, where the right answer is known."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn import functional as F

from cmp import evaluation, models
from cmp.errors import CmpError
from cmp.evaluation import evaluation_rows, retrieval_hits

pytestmark = pytest.mark.numbers


def features(count, seed=0, dim=64):
    return F.normalize(
        torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)), dim=1
    )


def test_any_of_an_images_captions_counts():
    """Four of the five captions are far away; the fifth is enough for image to text only."""
    x = features(50)
    owner = torch.arange(50).repeat_interleave(5)
    text = -x[owner]
    text[4::5] = x
    to_text, to_image = retrieval_hits(x, text, owner, k=1)
    assert to_text.all()
    assert to_image.mean() == pytest.approx(1 / 5)


def test_captions_in_any_order():
    """Owners that do not start at 0 in the list of captions, and are not sorted."""
    x = features(40)
    owner = torch.randperm(40, generator=torch.Generator().manual_seed(3)).repeat(2)
    to_text, to_image = retrieval_hits(x, x[owner], owner, k=2)
    assert to_text.all()
    assert to_image.all()


def test_recall_counts_the_k_nearest():
    similarity = torch.tensor([[0.9, 0.8, 0.1], [0.5, 0.4, 0.3], [0.2, 0.1, 0.3]])
    image, text = similarity, torch.eye(3)
    to_text, _ = retrieval_hits(image, text, torch.arange(3), k=1)
    assert to_text.tolist() == [True, False, True]
    to_text, _ = retrieval_hits(image, text, torch.arange(3), k=2)
    assert to_text.tolist() == [True, True, True]


def test_few_texts_than_k():
    x = features(3)
    assert all(hits.all() for hits in retrieval_hits(x, x, torch.arange(3), k=5))


@pytest.mark.parametrize("captions", [[1] * 40, [5] * 40, [1, 3] * 20, [2, 1]])
def test_chance_of_retrieval_is_what_random_features_score(captions):
    owner = torch.arange(len(captions)).repeat_interleave(torch.tensor(captions))
    rounds = []
    for seed in range(400):
        to_text, to_image = evaluation.retrieval_hits(
            features(len(captions), 2 * seed), features(len(owner), 2 * seed + 1), owner
        )
        rounds.append((to_text.mean() + to_image.mean()) / 2)
    chance = evaluation.chance_of_recall(owner.numpy())
    assert chance == pytest.approx(np.mean(rounds), abs=4 * np.std(rounds) / 20 + 1e-9)


def test_blocks_do_not_change_hits(monkeypatch):
    x, text = features(333, 1), features(999, 2)
    owner = torch.arange(333).repeat(3)
    hits = retrieval_hits(x, text, owner)
    monkeypatch.setattr(evaluation, "ENCODE_BLOCK", 50)
    for a, b in zip(hits, retrieval_hits(x, text, owner), strict=True):
        np.testing.assert_array_equal(a, b)


def test_blocks_do_not_change_the_names_that_images_are_given(corpus, monkeypatch):
    encoded = evaluation.encode(models.create_model("tiny", 0), "tiny", corpus, "test", 50, "fp32")
    whole = evaluation.score(corpus, encoded).hits
    monkeypatch.setattr(evaluation, "SIMILARITIES", 1000)
    pd.testing.assert_frame_equal(whole, evaluation.score(corpus, encoded).hits)


def hits(dataset, group, hit):
    weight = np.full(len(hit), 1 / len(hit))
    return pd.DataFrame({"dataset": dataset, "group": group, "hit": hit, "weight": weight})


def test_standard_error_of_independent_hits_is_binomial():
    hit = np.repeat([1.0, 0.0], [30, 70])
    value, error = evaluation.aggregate(hits("a", np.arange(100), hit), ["a"])
    assert value == pytest.approx(30)
    assert error == pytest.approx(100 * np.sqrt(0.3 * 0.7 / 100))


def test_copies_of_an_observation_add_nothing():
    hit = np.repeat([1.0, 0.0], [30, 70])
    once = evaluation.aggregate(hits("a", np.arange(100), hit), ["a"])
    copies = hits("a", np.tile(np.arange(100), 4), np.tile(hit, 4))
    assert evaluation.aggregate(copies, ["a"]) == pytest.approx(once)


def test_datasets_count_equally_and_shared_groups_are_not_independent():
    hit = np.repeat([1.0, 0.0], [30, 70])
    apart = pd.concat([hits("a", np.arange(100), hit), hits("b", 100 + np.arange(100), hit)])
    shared = pd.concat([hits("a", np.arange(100), hit), hits("b", np.arange(100), hit)])
    single = evaluation.aggregate(hits("a", np.arange(100), hit), ["a"])[1]
    assert evaluation.aggregate(apart, ["a", "b"])[1] == pytest.approx(single / np.sqrt(2))
    assert evaluation.aggregate(shared, ["a", "b"])[1] == pytest.approx(single)
    small = hits("b", np.arange(10), np.ones(10))
    mixed = pd.concat([hits("a", np.arange(100), hit), small])
    assert evaluation.aggregate(mixed, ["a", "b"])[0] == pytest.approx((30 + 100) / 2)


def test_clustered_error_equals_a_bootstrap_over_groups():
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(80), 3)
    hit = (rng.random(80)[group] + 0.3 * rng.random(240) > 0.6).astype(float)
    error = evaluation.aggregate(hits("a", group, hit), ["a"])[1]
    means = hit.reshape(80, 3).mean(axis=1)
    draws = means[rng.integers(0, 80, (4000, 80))].mean(axis=1)
    assert error == pytest.approx(100 * draws.std(), rel=0.06)


def test_fixed_subsets(corpus):
    before = corpus.table.copy()
    for name, dataset in corpus.datasets.items():
        rows = evaluation_rows(corpus, name)
        subset = evaluation_rows(corpus, name, size=64)
        assert len(subset) == min(64, len(rows))
        assert set(subset) <= set(rows)
        for again in (corpus, dataclasses.replace(corpus, table=corpus.table.astype(str))):
            np.testing.assert_array_equal(subset, evaluation_rows(again, name, size=64))
        if dataset.role != "pool":
            labels = corpus.table["label"].iloc[subset]
            assert labels.nunique() == min(len(subset), corpus.table["label"].iloc[rows].nunique())
        np.testing.assert_array_equal(evaluation_rows(corpus, name), rows)
    pd.testing.assert_frame_equal(corpus.table, before)


@pytest.mark.parametrize("subset", [0, -1])
def test_a_subset_without_images_is_refused(corpus, subset):
    with pytest.raises(CmpError, match=f"subset: {subset}: give a positive number, or None"):
        evaluation.make_test_sets(corpus, "test", subset)


def test_a_network_that_does_not_fit_images_or_precision_is_refused(corpus):
    model = models.create_model("tiny", 0)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        with pytest.raises(CmpError, match=rf"in {str(dtype)[6:]}; call \.float\(\) first"):
            evaluation.evaluate(model.to(dtype), "tiny", corpus, subset=1, precision="fp32")
    assert evaluation.evaluate(model.bfloat16(), "tiny", corpus, subset=1).summary()
    large = models.create_on_meta("ViT-B-32")
    with pytest.raises(CmpError, match="takes images of 224 pixels, but the data have 32"):
        evaluation.evaluate(large, "ViT-B-32", corpus, subset=1)


def test_both_towers_are_in_evaluation_mode_while_they_are_scored(corpus):
    model, seen = models.create_model("small", seed=0).train(), []
    for tower in (model.visual, model.transformer):
        tower.register_forward_hook(lambda layer, *_: seen.append((layer, layer.training)))
    evaluation.evaluate(model, "small", corpus, subset=2)
    assert {layer for layer, _ in seen} == {model.visual, model.transformer}
    assert not any(training for _, training in seen) and model.training


def test_evaluation_moves_no_randomness_and_no_mode(corpus):
    model = models.create_model("tiny", 0)
    state = torch.random.get_rng_state(), np.random.get_state()[1].tolist()
    assert model.training
    first = evaluation.evaluate(model, "tiny", corpus, subset=16)
    assert model.training
    assert torch.equal(state[0], torch.random.get_rng_state())
    assert state[1] == np.random.get_state()[1].tolist()
    second = evaluation.evaluate(model, "tiny", corpus, subset=16)
    pd.testing.assert_frame_equal(first.datasets, second.datasets)


def test_an_evaluation_that_breaks_off_moves_no_mode_either(corpus, monkeypatch):
    model = models.create_model("tiny", 0)
    monkeypatch.setattr(evaluation, "text_features", lambda *_: {}["no such text"])
    with pytest.raises(KeyError):
        evaluation.evaluate(model, "tiny", corpus, subset=1)
    assert model.training and model.visual.training


def test_a_random_model_scores_about_chance(corpus):
    model = models.create_model("tiny", 1)
    scores = evaluation.evaluate(model, "tiny", corpus, subset=64, precision="fp32")
    assert set(scores.datasets["role"]) == {"adapt", "eval", "transfer"}
    excess = scores.datasets["score"] - scores.datasets["chance"]
    assert (excess.abs() < np.maximum(10, 6 * scores.datasets["standard_error"])).all()
    assert scores.summary()["GM"] < 10
    np.testing.assert_allclose(scores.hits.groupby("dataset")["weight"].sum(), 1)


def test_geometric_mean():
    table = pd.DataFrame({"role": ["adapt", "eval"]}, index=["a", "b"])
    table_of_hits = pd.concat([hits("a", [1, 2], [1, 0]), hits("b", [1, 2, 3, 4], [1, 0, 0, 0])])
    summary = evaluation.Scores(table_of_hits, table).summary()
    assert summary == pytest.approx({"A_KA": 50, "A_ZS": 25, "GM": np.sqrt(50 * 25)})
