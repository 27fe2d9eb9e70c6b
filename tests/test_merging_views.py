"""The path between two models: what is shown is what was computed."""

import json
import re

import forked
import pandas as pd
import pytest
import torch

from cmp import config, evaluation, models
from cmp.runs.runner import execute
from lab import analyses, figures, kernel_explorers
from lab.analyses import task_end_weights

pytestmark = pytest.mark.usefixtures("clean_drawing")


def test_ends_are_the_weights_that_tasks_end_in():
    run_config, corpus = forked.small_config(), forked.small_corpus()
    ends = task_end_weights(run_config, corpus)
    assert len(ends) == 1 + run_config.stream.tasks
    start = models.load_model(run_config.model, run_config.seeds.init).state_dict()
    assert all(torch.equal(x, start[name]) for name, x in ends[0].items())
    last = execute(run_config, corpus).model.state_dict()
    assert all(torch.equal(x, last[name]) for name, x in ends[-1].items())
    places = {x.data_ptr() for weights in ends for x in weights.values()}
    assert len(places) == len(ends) * len(start)


def test_the_path_is_scored_where_it_is_asked(monkeypatch):
    monkeypatch.setattr(analyses, "SUBSET", 4)
    corpus = forked.small_corpus()
    before = models.load_model(config.Model(), 0).state_dict()
    tuned = models.load_model(config.Model(), 1).state_dict()
    explorer = kernel_explorers.path_explorer("small", before, tuned, corpus)
    network = models.create_model("small").eval()
    for share in (0.0, 0.15, 1.0):
        merged = {name: share * tuned[name] + (1 - share) * x for name, x in before.items()}
        network.load_state_dict(merged)
        expected = evaluation.evaluate(network, "small", corpus, subset=4).summary()
        found = explorer._answer({"rule": "interpolation", "share": share})
        assert found == pytest.approx(expected, abs=2)  # rounding may flip an answer
    assert explorer._answer({"rule": "slerp", "share": 0.0}).keys() == expected.keys()
    # what stands in its place moves, too, on a page without a kernel
    still = explorer.still["text/html"]
    assert 'data-explorer="path"' in still
    table = json.loads(re.search(r'<script type="application/json">(.*)</script>', still)[1])
    assert table["script"] == "kernel"
    assert len(table["answers"]) == len(table["each"]["share"]) == 9
    for key, answer in table["answers"].items():
        rule, share = json.loads(key)
        assert answer == explorer._answer({"rule": rule, "share": share})


def test_a_path_is_drawn():
    between = pd.DataFrame(
        {"A_KA": [10.0, 16.0, 15.0], "A_ZS": [44.0, 42.0, 33.0]}, [0.0, 0.5, 1.0]
    )
    (axes,) = figures.plot_merge_path(between, between.loc[0.5]).axes
    assert axes.lines[0].get_xdata().tolist() == [10, 16, 15]
    assert axes.lines[1].get_ydata().tolist() == [44, 33]
    assert {text.get_text() for text in axes.texts} == {"before", "fine-tuned", "share 0.50"}
