"""Explorers with answers computed in Python: streams, budgets, and paths between weights.

All use the script `kernel` with a table of their kind. The values of their form are a question, or
one question for each value of a key in `each`. On the site, the table contains the answers to all
possible questions.
"""

import dataclasses
import functools
import itertools
import json
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

import cmp
from cmp import budgets, config, evaluation, models, starts, streams
from cmp.data import Corpus
from cmp.errors import CmpError
from cmp.merging.apply import merge
from cmp.merging.rules import Weights
from cmp.readers import class_statistics
from cmp.registry import option_names
from cmp.runs import paper
from cmp.runs.launch import changes_to_cpu
from lab import analyses, figures
from lab.evidence import results, verdicts
from lab.explorers import (
    SHEET,
    Answer,
    Explorer,
    draw_still,
    profile_settings,
    stored_runs,
)

READY = 5
"""Answers per question that are available from the start, and in the still."""
STORED = 9
"""Points of a path that are scored for pages without a kernel."""
STREAM = ("order", "reverse", "equal", "tasks")

Table = dict[str, Any]


def _make_table(
    kind: str, answer: Answer, with_answers: bool, menus: Mapping[str, list], **facts: Any
) -> Table:
    """Return the table of a kind of explorer.

    Args:
        kind: The key in the sheet of explorers.
        answer: Answers its questions.
        with_answers: Whether to include answers to all questions on the fewer values of the site,
            instead of only the first ones.
        menus: The entries of menus by key, if not in the sheet, and the values of `each`.
        **facts: Further data for the script.
    """
    sheet = SHEET[kind]
    site = sheet.get("site", {}) if with_answers else {}
    fields = [_make_field(field, site.get(field["key"]), menus) for field in sheet["fields"]]
    each = {key: site.get(key, menus.get(key, values)) for key, values in sheet["each"].items()}
    values = {key: [value] for key, value in sheet["defaults"].items()}
    values |= {key: listed[:READY] for key, listed in each.items()}
    if with_answers:
        values |= {f["key"]: [x for x, _ in f["options"]] for f in fields if "options" in f}
        values |= {f["key"]: [False, True] for f in fields if not {"options", "range"} & f.keys()}
        values |= each
    presets = [
        preset
        for preset in sheet["presets"]
        if not with_answers or all(state in values[key] for key, state in preset["state"].items())
    ]
    table = {"script": "kernel", "kind": kind, "fields": fields, "each": each, "presets": presets}
    table |= {key: sheet[key] for key in ("chapter", "defaults")} | {"answers": {}} | facts
    for request in _questions(table, values):
        if (key := _question_key(request)) not in table["answers"]:
            try:
                table["answers"][key] = answer(request)
            except CmpError as error:
                table["answers"][key] = {"refused": str(error)}
    return table


def _question_key(request: Mapping[str, Any]) -> str:
    """Return the key of a question's answer in a table, as the script writes it: '["slerp",1]' for
    {"rule": "slerp", "share": 1.0}."""
    values = [int(x) if isinstance(x, float) and x.is_integer() else x for x in request.values()]
    return json.dumps(values, separators=(",", ":"))


def _make_field(listed: Mapping[str, Any], only: list | None, menus: Mapping) -> dict[str, Any]:
    """Return a field with its menu, restricted to the given values if there are any."""
    options = listed.get("options", menus.get(listed["key"])) or only or []
    pairs = [[each, str(each)] for each in options if only is None or each in only]
    return dict(listed) | ({"options": pairs} if pairs else {})


def _questions(table: Table, values: Mapping[str, list]) -> Iterator[dict[str, Any]]:
    """Yield the script's questions for every combination of values by key."""
    for chosen in itertools.product(*values.values()):
        state = dict(zip(values, chosen, strict=True))
        keys = [field["key"] for field in table["fields"] if not field.get("local")]
        yield {key: state[key] for key in dict.fromkeys([*keys, *table["each"]])}


def _explorer(
    table: Table, figure: Figure, words: str, answer: Answer, stored: Table | None = None
) -> Explorer:
    """Return the explorer of a table, with a still for when there is no kernel.

    Args:
        table: The table in a notebook.
        figure: The picture for the still.
        words: A description of the picture.
        answer: Answers its questions.
        stored: The table for a page without a kernel, if only the notebook has it.
    """
    still = draw_still(table["kind"], figure, words, table=stored)
    return Explorer("kernel", table, still, answer=answer)


def stream_table(with_answers: bool = False, corpus: Corpus | None = None) -> Table:
    """Return the table of the explorer of streams.

    Args:
        with_answers: Whether to include answers to all questions, for pages without a kernel.
        corpus: The embedded benchmark, loaded if None.
    """
    corpus = corpus or cmp.load_data("embedded")
    published = analyses.published_settings("orders")
    configs, on_way = results.setting_configs(published), verdicts.run_scores(published)["way"]
    stored = stored_runs(published)
    for row in stored:
        way = on_way.loc[row["label"]].mean()
        row["way"] = None if np.isnan(way) else round(float(way), 2)
        row["state"] = {key: getattr(configs[row["label"]].stream, key) for key in STREAM}
    menus = {"order": option_names("order", partial=False, updates=False)}
    facts = {"stored": stored, "datasets": sorted(corpus.by_role("adapt"))}
    facts["profiles"] = profile_settings()
    answer = functools.partial(_stream_answer, corpus)
    return _make_table("stream", answer, with_answers, menus, **facts)


def _stream_answer(corpus: Corpus, request: Mapping[str, Any]) -> dict[str, Any]:
    counts, report, run = _stream_facts(corpus, request)
    return {
        "counts": counts.T.to_numpy().tolist(),
        "images": report["images"].tolist(),
        "sentence": stream_sentence(report),
        "changes": changes_to_cpu(run),
    }


def _stream_facts(corpus: Corpus, request: Mapping[str, Any]) -> tuple:
    """Return the classes per update and dataset, the report on each update, and the run."""
    stream = {key: request[key] for key in STREAM}
    tree = config.profile("cpu") | {"stream": stream, "seeds": {"stream": request["seed"]}}
    run = config.parse(tree, "stream")
    counts = class_statistics.class_counts(
        streams.task_classes(corpus, run.stream, run.seeds.stream)
    )
    counts = counts.reindex(columns=sorted(corpus.by_role("adapt")), fill_value=0)
    return counts, class_statistics.stream_report(run, corpus), run


def stream_sentence(report: pd.DataFrame) -> str:
    """Return sentences on how unequal the updates of a stream are.

    Args:
        report: See `cmp.readers.class_statistics.stream_report`.

    Returns:
        The sentences.
    """
    images, passes, datasets = report["images"], report["passes"], report["datasets"]
    return (
        f"{report['classes'].sum()} classes in {len(report)} updates. The largest update brings "
        f"{images.max()} images, {images.max() / images.min():.1f} times as many as the smallest; "
        f"an update shows its own images {passes.min():.1f} to {passes.max():.1f} times. Datasets "
        f"in an update: {datasets.min()} to {datasets.max()}."
    )


def stream_explorer(corpus: Corpus) -> Explorer:
    """Explore the order in which classes arrive, the resulting updates, and the scores of such
    runs.

    Args:
        corpus: The embedded benchmark.

    Returns:
        The explorer.
    """
    table = stream_table(corpus=corpus)
    counts, report, _ = _stream_facts(corpus, table["defaults"])
    figure, answer = figures.plot_stream(counts, report), functools.partial(_stream_answer, corpus)
    return _explorer(table, figure, stream_sentence(report), answer)


def budget_table(with_answers: bool = False) -> Table:
    """Return the table of the explorer of budgets, with the cost of a step of each method.

    Args:
        with_answers: Whether to include answers to all questions, for pages without a kernel.
    """
    first = SHEET["budget"]["each"]["method"]
    methods = list(dict.fromkeys([*first, *option_names("method")]))
    menus = {"model": [*starts.family_names(), *paper.CATALOGUE_MODELS], "method": methods}
    facts = {"slack": budgets.SLACK, "names": SHEET["budget"]["names"]}
    return _make_table("budget", _budget_answer, with_answers, menus, **facts)


def _budget_answer(request: Mapping[str, Any]) -> dict[str, float]:
    cost = paper.method_cost(request["model"], request["batch"], request["method"])
    return dataclasses.asdict(cost)


def budget_explorer() -> Explorer:
    """Explore the cost of a step of each method, and how many steps a budget allows.

    Returns:
        The explorer.
    """
    table = budget_table()
    state, methods = table["defaults"], table["each"]["method"][:READY]
    steps = state["total"] / state["updates"]
    costs = paper.budget_table(state["model"], state["batch"], steps, methods)
    costs = costs.rename(index=table["names"])
    allowed = ", ".join(f"{name} {count:,}" for name, count in costs["steps"].items())
    words = f"Steps per update for the cost of {steps:g} steps of full fine-tuning: {allowed}."
    return _explorer(table, figures.plot_allowed_steps(costs), words, _budget_answer)


def path_explorer(name: str, before: Weights, tuned: Weights, corpus: Corpus) -> Explorer:
    """Explore the path between two models, merging and scoring each point on demand.

    Args:
        name: The model's name.
        before, tuned: The model's weights before and after fine-tuning.
        corpus: The data; scores are on fixed subsets of the tests.

    Returns:
        The explorer.
    """
    network, lock = models.create_model(name).eval(), threading.Lock()

    @functools.cache
    def score(rule: str, share: float) -> dict[str, float]:
        merged = merge(rule, [tuned, before], weights=(share, 1 - share))
        with lock:  # there is one network, but each answer has its own thread
            network.load_state_dict(merged)
            return evaluation.evaluate(network, name, corpus, subset=analyses.SUBSET).summary()

    def answer(request: Mapping[str, Any]) -> dict[str, float]:
        return score(request["rule"], request["share"])

    menus = {"rule": option_names("merge_rule", "weight", base=False)}
    table = _make_table("path", answer, False, menus, subset=analyses.SUBSET)
    rule, share = table["defaults"].values()
    stored = _stored_path(table, answer)
    shares = sorted(table["each"]["share"][:READY])
    between = pd.DataFrame([score(rule, each) for each in shares], shares)
    scores = ", ".join(f"{key} {value:.1f}%" for key, value in between.loc[share].items())
    words = f"{share:.2f} of the fine-tuned weights, by {rule}: {scores}."
    figure = figures.plot_merge_path(between, between.loc[share])
    return _explorer(table, figure, words, answer, stored)


def _stored_path(table: Table, answer: Answer) -> Table:
    """Return the table of a path for a page without a kernel, with one rule at `STORED` points."""
    rule, shares = table["defaults"]["rule"], [n / (STORED - 1) for n in range(STORED)]
    fields = []
    for field in table["fields"]:
        only = {"options": [[rule, rule]]} if field["key"] == "rule" else {"step": shares[1]}
        fields.append(field | only)
    requests = [{"rule": rule, "share": share} for share in shares]
    answers = {_question_key(request): answer(request) for request in requests}
    return table | {"fields": fields, "each": {"share": shares}, "answers": answers}


TABLES = {
    "stream": functools.partial(stream_table, True),
    "budget": functools.partial(budget_table, True),
}
"""Functions that make the table of each explorer that works on the site without a kernel."""
