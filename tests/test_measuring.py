"""Traits are what they say: measured again here by other means."""

import dataclasses
import re

import forked
import numpy as np
import pandas as pd
import pool_statistics
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from cmp import config, evaluation, models, streams
from cmp.cli.streams import read_counts
from cmp.errors import CmpError
from cmp.readers import class_statistics, class_tables


@pytest.fixture(scope="module")
def base():
    return models.load_model(config.Model(), 0).eval()


@pytest.fixture(scope="module")
def measured(base):
    return class_statistics.measure_classes(base, "small", forked.small_corpus()).set_index("entry")


def test_the_shipped_tables_are_those_of_base_zero(base, measured):
    """To the accuracy of another processor's fp32."""
    shipped = streams.class_statistics("embedded").loc[measured.index]
    for column in ("accuracy", "loss", "alignment"):
        np.testing.assert_allclose(measured[column], shipped[column], atol=0.02, err_msg=column)
    np.testing.assert_allclose(
        np.stack(measured["embedding"]), np.stack(shipped["embedding"]), atol=1e-4
    )
    assert (measured["year"] == 2010).all()
    corpus = forked.small_corpus()
    images = pool_statistics.measure_pool(base, "small", corpus)
    pools = ("pool-shapes", "substitute-icons")
    rows = np.flatnonzero(corpus.table["dataset"].isin(pools))
    assert len(images) == len(rows)
    again = class_tables.pool_statistics(corpus, rows)
    np.testing.assert_allclose(images["alignment"], again["alignment"], atol=1e-3)


@pytest.mark.numbers
def test_accuracy_is_that_of_an_evaluation(base, measured):
    """The mean over classes of equal size is the dataset's accuracy on its training split."""
    corpus = forked.small_corpus()
    scores = evaluation.evaluate(base, "small", corpus, "train", precision="fp32")
    assert scores.datasets.loc["new-flags", "score"] == pytest.approx(measured["accuracy"].mean())


def test_loss_and_alignment_by_hand():
    image = torch.eye(2)[[0, 0, 1]]
    found = class_statistics._image_decisions(image, torch.eye(2), torch.tensor([0, 1, 1]), 2.0)
    assert found["accuracy"].tolist() == [100, 0, 100]
    assert found["alignment"].tolist() == [1, 0, 1]
    right, wrong = np.log(1 + np.exp(-2)), np.log(1 + np.exp(2))
    np.testing.assert_allclose(found["loss"], [right, wrong, right], rtol=1e-6)


def test_frequencies_count_texts_that_name_a_class():
    texts = ["A red fox.", "red  FOX, red fox", "foxes", "the fox", "fox-red"]
    labels = pd.Series(["fox", "red fox", "Red Fox!", "cat"])
    expected = {"fox": 4, "red fox": 2, "Red Fox!": 2, "cat": 0}
    assert class_statistics.class_frequencies(labels, texts) == expected


@given(label=st.text(), texts=st.lists(st.text(), max_size=3))
@example(label="猫", texts=["犬", "!", ""])
@example(label="?", texts=["a fox"])
def test_a_label_is_counted_only_in_texts_that_contain_it(label, texts):
    words = [" ".join(re.findall("[a-z0-9]+", text.lower())) for text in (label, *texts)]
    if not words[0]:
        with pytest.raises(CmpError, match=r"cannot be counted; give the number .* --counts$"):
            class_statistics.class_frequencies(pd.Series([label]), texts)
        return
    found = class_statistics.class_frequencies(pd.Series([label]), texts)[label]
    assert found == sum(f" {words[0]} " in f" {text} " for text in words[1:])


def test_counts_of_another_corpus_are_taken_and_must_be_whole(base, tmp_path):
    corpus = forked.small_corpus()
    labels = corpus.classes["new-flags"]
    path = tmp_path / "counts.csv"
    pd.DataFrame({"class": labels, "count": range(len(labels))}).to_csv(path, index=False)
    counts = read_counts(path)
    found = class_statistics.measure_classes(base, "small", corpus, counts).set_index("entry")[
        "frequency"
    ]
    assert [found[f"new-flags+++{label}"] for label in labels] == list(range(len(labels)))
    del counts["algeria"]
    with pytest.raises(CmpError, match="counts: no count of 'algeria'"):
        class_statistics.measure_classes(base, "small", corpus, counts)
    for role, words in (
        ("pool", "there is no pool to count names in"),
        ("adapt", "the role adapt"),
    ):
        roles = {name: x for name, x in corpus.datasets.items() if x.role != role}
        with pytest.raises(CmpError, match=words):
            class_statistics.measure_classes(
                base, "small", dataclasses.replace(corpus, datasets=roles)
            )
    path.write_text("class,count\n007,1\n010,2\n")
    assert read_counts(path) == {"007": 1, "010": 2}
    path.write_text("name,count\na,1\n")
    with pytest.raises(CmpError, match="expected the columns class,count"):
        read_counts(path)


def test_orders_of_the_benchmark_go_by_what_was_measured(corpus):
    stream = config.Stream(order="easy-accuracy", tasks=4)
    known = streams.class_statistics("embedded")["accuracy"]
    means = [known[block].mean() for block in streams.task_classes(corpus, stream, 0)]
    assert means == sorted(means, reverse=True)
    assert means[0] > 30 > means[-1]
