"""How often samples are seen: counts are those of the batches, means are means of counts."""

import forked
import numpy as np
import pytest

from cmp import config, mixtures, streams
from cmp.config import Mixture
from cmp.errors import CmpError
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


def test_expected_exposures_are_the_mean_of_the_counted_ones(corpus):
    tree = config.override(config.profile("cpu"), ["stream.equal=images", "stream.tasks=8"])
    chosen = config.parse(tree)
    found, pools = statistics.sample_counts(chosen, corpus), mixtures.task_pools(chosen, corpus)
    pool, own = len(pools[0].pretraining), np.mean([len(each.update) for each in pools])
    batch, steps = chosen.training.batch, chosen.training.steps
    _, passes = statistics.expected_counts(chosen.mixture, batch, len(pools), steps, pool, own)
    mean = passes[list(statistics.BATCH_PARTS)].sum(axis=1)
    assert found[:, pools[0].pretraining].sum(axis=0).mean() == pytest.approx(mean[0], rel=1e-6)
    for task, pool in enumerate(pools, start=1):
        assert found[:, pool.update].sum(axis=0).mean() == pytest.approx(mean[task], rel=0.1)


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


def test_replay_brings_batches_nearer_to_all_data(corpus):
    """As chapter 07 measures it."""
    chapter = chapter_code.definitions("07")
    chapter["corpus"] = corpus  # its functions' globals

    def of(*shares):
        names, tree = ("pretraining", "update", "buffer"), config.profile("cpu")
        tree["mixture"] |= dict(zip(names, shares, strict=True))
        return chapter["distance_to_all"](config.parse(tree))

    thirds, no_pool, no_buffer = of(1 / 3, 1 / 3, 1 / 3), of(0.0, 0.5, 0.5), of(0.5, 0.5, 0.0)
    assert 0 < thirds < no_pool < of(0.0, 1.0, 0.0) < 1
    assert thirds < no_buffer
    pools = mixtures.task_pools(config.parse(config.profile("cpu")), corpus)
    kept, arriving = len(pools[0].pretraining), sum(len(each.update) for each in pools)
    share = kept / (kept + arriving)  # of the pool in all data; every update has a part of the rest
    excess = (0.75 - share) + (0.25 - (1 - share) / len(pools))
    assert of(0.75, 0.25, 0.0) == pytest.approx(excess, abs=0.02)


def test_exposure_by_hand():
    """Thirds of 6 (3, 3, 0 then 2, 2, 2), 3 tasks x 10 steps, 20 images a task, 10 in the pool."""
    _, passes = statistics.expected_counts(Mixture(), 6, 3, 10, pool_size=10, task_size=20)
    assert passes["pretraining pool"].tolist() == [7, 0, 0, 0]
    assert passes["update"].tolist() == [0, 1.5, 1, 1]
    assert passes["buffer"].tolist() == [0, 1.5, 0.5, 0]
    with pytest.raises(CmpError, match="positive"):
        statistics.expected_counts(Mixture(), 6, 3, 10, 0, 20)
