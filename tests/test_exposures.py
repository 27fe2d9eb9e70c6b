"""How often samples are seen: counts are those of the batches, means are means of counts."""

import forked
import numpy as np
import pandas as pd
import pytest

from cmp import budgets, config, mixtures, streams
from cmp.readers import class_statistics
from lab import analyses
from tests import chapter_code


def test_counts_are_those_of_the_batches_that_training_makes():
    chosen, corpus = forked.small_config(), forked.small_corpus()
    found = analyses.sample_counts(chosen, corpus)
    by_hand = np.zeros_like(found)
    for task, pools in enumerate(mixtures.task_pools(chosen, corpus)):
        for step in range(chosen.training.steps):
            for row in mixtures.make_batch(chosen, corpus, pools, task, step).rows:
                by_hand[task, row] += 1
    assert (found == by_hand).all()
    assert found.sum() == 3 * 4 * 4


def test_report(corpus):
    chosen = config.parse(config.profile("cpu"))
    report = class_statistics.stream_report(chosen, corpus)
    assert report["classes"].tolist() == [
        len(b) for b in streams.task_classes(corpus, chosen.stream, 0)
    ]
    assert report["images"].sum() == len(streams.adaptation_rows(corpus))
    assert report["buffer"].tolist() == [0, *report["images"].cumsum()[:-1]]
    assert report["passes"][2] == pytest.approx(40 * 21 / report["images"][2])
    assert report["passes"][1] == pytest.approx(40 * 32 / report["images"][1])


def test_counts_and_passes_are_of_the_steps_that_a_budget_buys(corpus):
    settings = ["method.name=lora", "training.budget=1.0", "stream.tasks=2"]
    chosen = config.parse(config.override(config.profile("cpu"), settings))
    bought = budgets.apply_budget(chosen)
    assert bought.training.steps != chosen.training.steps
    counts = analyses.sample_counts(chosen, corpus)
    assert counts.sum() == 2 * bought.training.steps * chosen.training.batch
    report = class_statistics.stream_report(chosen, corpus)
    assert report.equals(class_statistics.stream_report(bought, corpus))


def test_replay_brings_batches_nearer_to_all_data(corpus):
    """As chapter 07 measures it."""
    chapter = chapter_code.definitions("07")
    names = streams.class_names(corpus, np.arange(len(corpus.table)))
    chapter |= {"corpus": corpus, "labels": pd.factorize(names)[0]}  # its functions' globals

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
