"""Explorers whose answers take Python: they ask what they show, and say what the package says."""

import json
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

from forked import await_true
from matplotlib.figure import Figure

import cmp
from cmp import models
from cmp.readers import class_statistics
from cmp.runs import paper
from lab import kernel_explorers


def test_a_stream_is_that_of_its_report(corpus):
    table = kernel_explorers.stream_table(corpus=corpus)
    [(key, answer)] = table["answers"].items()
    assert key == '["random",false,"classes",20,0]'
    report = class_statistics.stream_report(cmp.config.parse(cmp.config.profile("cpu")), corpus)
    assert answer["images"] == report["images"].tolist()
    assert [sum(column) for column in zip(*answer["counts"], strict=True)] == [*report["classes"]]
    assert answer["changes"] == {}
    json.dumps(table, allow_nan=False)


def test_a_question_has_the_key_that_the_script_gives_it(monkeypatch):
    """JavaScript writes 1.0 as 1."""
    sheet = kernel_explorers.SHEET["stream"] | {"defaults": {"order": "random", "tasks": 1.0}}
    sheet |= {"fields": [{"key": key, "options": []} for key in ("order", "tasks")], "presets": []}
    monkeypatch.setitem(kernel_explorers.SHEET, "stream", sheet)
    table = kernel_explorers._make_table("stream", lambda request: request, False, {})
    assert list(table["answers"]) == ['["random",1]']


def test_a_budget_has_the_costs_of_the_package():
    table = kernel_explorers.budget_table()
    cost = table["answers"]['["small",64,"lora"]']
    expected = paper.method_cost("small", 64, "lora")
    assert (cost["step"], cost["end"], cost["memory"]) == (
        expected.step,
        expected.end,
        expected.memory,
    )
    assert len(table["answers"]) == kernel_explorers.READY < len(table["each"]["method"])


def test_points_of_a_path_that_are_asked_together_do_not_mix(corpus, monkeypatch):
    """Each answer has a thread of its own, and all have one network: while one of them evaluates
    it, all others have merged their weights."""
    before, tuned = (models.create_model("tiny", seed).state_dict() for seed in (0, 1))
    requests = [{"rule": "interpolation", "share": share / 100} for share in range(31, 37)]
    merge, merged, others = kernel_explorers.merge, [], 0

    def evaluate(network, *_, **__):
        seen = {models.weights_digest(network)}
        await_true(lambda: len(merged) >= others, "asked for all points")
        seen.add(models.weights_digest(network))
        return SimpleNamespace(summary=lambda: {"weights": len(seen)})

    monkeypatch.setattr(kernel_explorers.evaluation, "evaluate", evaluate)
    monkeypatch.setattr(kernel_explorers.figures, "plot_merge_path", lambda *_: Figure())
    monkeypatch.setattr(
        kernel_explorers, "merge", lambda *x, **y: (merge(*x, **y), merged.append(0))[0]
    )
    explorer = kernel_explorers.path_explorer("tiny", before, tuned, corpus)
    others = len(merged) + len(requests)
    with ThreadPoolExecutor(len(requests)) as pool:
        answers = list(pool.map(explorer._answer, requests))
    assert answers == [{"weights": 1}] * len(requests)
