"""Streams: nothing lost, nothing twice, blocks of equal class count, seeds that matter."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmp import streams
from cmp.config import Stream
from cmp.errors import CmpError


@given(st.integers(1, 300), st.integers(1, 60))
def test_cut(classes, tasks):
    order = [f"d+++{index}" for index in range(classes)]
    if tasks > classes:
        with pytest.raises(CmpError, match=r"stream\.tasks"):
            streams.cut(order, tasks)
        return
    blocks = streams.cut(order, tasks)
    assert [entry for block in blocks for entry in block] == order
    sizes = [len(block) for block in blocks]
    assert len(sizes) == tasks
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) - min(sizes) <= 1


def test_entries_are_the_adaptation_classes(corpus):
    entries = streams.entries(corpus)
    assert len(entries) == sum(corpus.datasets[d].counts.classes for d in corpus.by_role("adapt"))
    assert "new-digits+++seven" in entries


def test_class_counts(corpus):
    tasks = streams.cut(streams.random(streams.entries(corpus), 0), 5)
    counts = streams.class_counts(tasks)
    assert counts.sum(axis=1).tolist() == [len(task) for task in tasks]
    assert counts["new-digits"].sum() == 10
    assert counts.index.tolist() == [1, 2, 3, 4, 5]


def test_tasks_share_all_training_images(corpus):
    rows = streams.task_rows(corpus, Stream(tasks=7), seed=2)
    everything = np.concatenate(rows)
    assert len(set(everything)) == len(everything)
    roles = corpus.table["dataset"].iloc[everything].map(lambda name: corpus.datasets[name].role)
    assert set(roles) == {"adapt"}
    adapt = sum(corpus.datasets[d].counts.train for d in corpus.by_role("adapt"))
    assert len(everything) == adapt


def test_two_seeds_differ_in_every_task(corpus):
    one, two = (streams.task_rows(corpus, Stream(tasks=8), seed) for seed in (0, 1))
    assert all(set(a) != set(b) for a, b in zip(one, two, strict=True))
    again = streams.task_rows(corpus, Stream(tasks=8), 0)
    for a, b in zip(one, again, strict=True):
        np.testing.assert_array_equal(a, b)
