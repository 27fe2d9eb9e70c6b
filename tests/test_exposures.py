"""How often samples are seen: counts are those of the batches, means are means of counts."""

import forked
import numpy as np
import pytest

from cmp import config, mixtures, streams
from cmp.experiments import statistics
from tests import chapter_code


def test_counts_are_those_of_the_batches_that_training_makes():
    chosen, corpus = forked.small_config(), forked.small_corpus()
    found = statistics.sample_counts(chosen, corpus)
    by_hand = np.zeros_like(found)
    for task, pools in enumerate(mixtures.task_pools(chosen, corpus)):
        for step in range(chosen.training.steps):
            for row in mixtures.make_batch(chosen, corpus, pools, task, step).rows:
                by_hand[task, row] += 1
    assert (found == by_hand).all()
    assert found.sum() == 3 * 4 * 4


def test_report(corpus):
    chosen = config.parse(config.profile("cpu"))
    report = statistics.stream_report(chosen, corpus)
    assert report["classes"].tolist() == [
        len(b) for b in streams.task_classes(corpus, chosen.stream, 0)
    ]
    assert report["images"].sum() == len(streams.adaptation_rows(corpus))
    assert report["buffer"].tolist() == [0, *report["images"].cumsum()[:-1]]
    assert report["passes"][2] == pytest.approx(40 * 21 / report["images"][2])
    assert report["passes"][1] == pytest.approx(40 * 32 / report["images"][1])


def distance(corpus, **mixture):
    chosen = config.parse({"mixture": mixture} | config.profile("cpu"))
    return chapter_code.definitions("07")["distance_to_union"](chosen, corpus)


def test_replay_brings_batches_nearer_to_the_union(corpus):
    thirds = distance(corpus)
    update = distance(corpus, pretraining=0.0, update=1.0, buffer=0.0)
    buffer = distance(corpus, pretraining=0.0, update=0.0, buffer=1.0)
    for each in (thirds, update, buffer):
        assert len(each) == 8
        assert (each >= 0).all()
        assert (each <= 1).all()
    pool = distance(corpus, pretraining=1.0, update=0.0, buffer=0.0)
    assert pool == pytest.approx(0.92, abs=0.02)  # all but the kept tenth of the pool is missing
    assert update.min() > 0.8
    assert thirds[0] > thirds[-1]
    assert buffer[-1] < thirds[-1] < update[-1]
