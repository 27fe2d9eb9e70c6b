"""Mixtures and streams: the pure functions are right, and a control that moves draws them again."""

import json
import re
import shlex

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from cmp import cli, config, mixtures, streams
from cmp.cli.runs import read_config
from cmp.config import Mixture, Stream
from cmp.experiments import statistics
from lab import analyses, explorers, figures
from lab.figures import runs

pytestmark = pytest.mark.usefixtures("clean_drawing")
WEIGHTS = st.integers(0, 20)
PROFILE = {"training": {"batch": 64, "steps": 40}, "stream": {"tasks": 8}}


def parts_of(explorer):
    """({description: control}, the triangle if there is one, sentence, picture, what is below)."""
    box, sentence, picture, below = explorer.children
    named = {c.description: c for c in box.children if c.has_trait("description")}
    rest = [control for control in box.children if not control.has_trait("description")]
    return named, rest, sentence, picture, below


def command(below):
    """The run of "Copy as config", as a shell would make it."""
    lines = re.search(r"<pre[^>]*>(.*)</pre>", below.value, re.S)[1].replace("\\\n", " ")
    return read_config("cpu", shlex.split(lines)[3:])


def published(settings, replicates=3, **scores):
    """A study's metrics: A_KA 10 + 40 B + 20 D + replicate, A_ZS 20 + 30 P at the end, half of
    both on the way; of settings name -> tree."""
    rows = []
    for name, tree in settings.items():
        run = config.parse(PROFILE | tree)
        p, d, b = run.mixture.pretraining, run.mixture.update, run.mixture.buffer
        text = json.dumps(run.to_dict())
        for replicate in range(replicates):
            ends = {"adapt": 10 + 40 * b + 20 * d + replicate, "eval": 20 + 30 * p}
            for task, scope in ((3, "full"), (5, "full"), (8, "full"), (8, "subset")):
                for role, score in ends.items():
                    value = score * (1 if task == 8 else 0.5)
                    rows.append((name, replicate, task, scope, role, value, text))
    columns = ["setting", "replicate", "task", "scope", "role", "score", "config"]
    return pd.DataFrame(rows, columns=columns)


def shares(p, d, b, **more):
    return {"mixture": {"pretraining": p, "update": d, "buffer": b, **more}}


TRIANGLE = {
    "thirds": {},
    "pool": shares(1.0, 0.0, 0.0),
    "update": shares(0.0, 1.0, 0.0),
    "buffer": shares(0.0, 0.0, 1.0),
    "whole pool": shares(0.5, 0.5, 0.0, replay=1.0),
}


# --- the mixture explorer


@given(WEIGHTS, WEIGHTS, WEIGHTS.map(lambda weight: weight + 1))
def test_shares_of_the_triangle_become_a_mixture_without_stray_digits(p, d, b):
    total = p + d + b
    run = analyses.mixture_run([p / total + 1e-12, d / total, b / total - 1e-12], 64, 8, 40)
    found = run.mixture
    assert found.pretraining + found.update + found.buffer == pytest.approx(1, abs=1e-6)
    assert (found.pretraining, found.update) == (pytest.approx(p / total), pytest.approx(d / total))
    assert analyses.mixture_run([1 / 3] * 3, 64, 8, 40).mixture == Mixture()


def test_mixture_explorer_draws_what_its_controls_say(monkeypatch):
    drawn = []
    original = figures.plot_batch
    monkeypatch.setattr(figures, "plot_batch", lambda a, b: drawn.append((a, b)) or original(a, b))
    explorer = explorers.mixture_explorer()
    controls, [triangle], sentence, picture, below = parts_of(explorer)
    before = bytes(picture.value)
    triangle.value = [0.0, 0.5, 0.5]
    parts, passes = statistics.expected_counts(
        Mixture(0, 0.5, 0.5), 64, 8, 40, 0.1 * analyses.POOL, analyses.ARRIVING / 8
    )
    assert drawn[-1][0].equals(parts)
    assert drawn[-1][1].equals(passes)
    assert bytes(picture.value) != before
    assert "P 0.00, D 0.50, B 0.50" in sentence.value
    assert command(below).mixture == Mixture(0, 0.5, 0.5)
    controls["Tasks T"].value = 4
    controls["Pool kept for replay"].value = 0.31622776601683794
    run = command(below)
    assert (run.stream.tasks, run.mixture.replay) == (4, 0.316228)
    assert f"({0.316228 * analyses.POOL:,.0f} images)" in sentence.value
    assert "Drawn is a buffer" not in below.value
    controls["Buffer"].value = "reservoir"
    assert (command(below).mixture.policy, command(below).mixture.capacity) == ("reservoir", 1000)
    assert "Drawn is a buffer that keeps all, not 'reservoir'." in below.value


def test_stored_runs_predict_and_the_nearest_are_listed():
    explorer = explorers.mixture_explorer(published(TRIANGLE))
    controls, [triangle], _, _, below = parts_of(explorer)
    assert [point["name"] for point in triangle.points] == ["thirds", "pool", "update", "buffer"]
    triangle.value = [0.0, 0.5, 0.5]  # the scores are linear: 10 + 20 + 10 + 1, and 20
    assert "<b>A_KA 41.0%</b> (38.5 to 43.5)" in below.value
    assert "<b>A_ZS 20.0%</b> (20.0 to 20.0)" in below.value
    cells = re.findall(r"<td>(.*?)</td>", below.value)
    assert cells[:7] == ["thirds", "0.33", "0.33", "0.33", "0.33", "31.0", "30.0"]
    assert len(cells) == 4 * 7
    controls["Steps a task"].value = 80
    assert "No prediction: the stored runs are of training.steps=40." in below.value
    controls["Steps a task"].value = 40
    controls["Buffer"].value = "class-balanced"
    assert "No prediction: the stored runs are of mixture.policy=unlimited." in below.value


def test_no_stored_runs_around_a_mixture_is_said():
    some = {name: TRIANGLE[name] for name in ("thirds", "pool", "update")}
    _, [triangle], sentence, _, below = parts_of(explorers.mixture_explorer(published(some)))
    triangle.value = [0.0, 0.0, 1.0]
    assert "no stored mixtures lie around this one" in below.value
    assert "B 1.00" in sentence.value


# --- the stream explorer


def test_stream_explorer_draws_what_its_controls_say(monkeypatch, corpus):
    drawn = []
    original = figures.plot_stream
    monkeypatch.setattr(figures, "plot_stream", lambda a, b: drawn.append((a, b)) or original(a, b))
    controls, _, sentence, picture, below = parts_of(explorers.stream_explorer(corpus))
    before = bytes(picture.value)
    for name, value in {"Order": "dataset", "Equal": "images", "Tasks T": 6, "Seed": 3}.items():
        controls[name].value = value
    controls["Reversed"].value = True
    asked = Stream(order="dataset", reverse=True, equal="images", tasks=6)
    expected = statistics.class_counts(streams.task_classes(corpus, asked, 3))
    counts, report = drawn[-1]
    assert counts[expected.columns].equals(expected)
    assert list(counts) == sorted(corpus.by_role("adapt"))
    assert report["images"].sum() == len(streams.adaptation_rows(corpus))
    assert bytes(picture.value) != before
    assert "522 classes in 6 tasks. Images a task: " in sentence.value
    run = command(below)
    assert (run.stream, run.seeds.stream, run.seeds.init) == (asked, 3, 3)
    result = CliRunner().invoke(cli.app, ["stream", "show", "stream.order=dataset", "seed=3"])
    assert result.exit_code == 0


def test_stored_runs_of_a_stream_are_listed(corpus):
    settings = {
        "random": {},
        "by name": {"stream": {"order": "dataset", "tasks": 8}},
        "by name, buffer": {"stream": {"order": "dataset", "tasks": 8}, **shares(0.0, 0.5, 0.5)},
    }
    explorer = explorers.stream_explorer(corpus, published(settings))
    controls, _, _, _, below = parts_of(explorer)
    assert "<td>random</td>" in below.value
    assert "by name" not in below.value
    controls["Order"].value = "dataset"
    assert "<td>by name</td>" in below.value
    assert "<td>by name, buffer</td>" in below.value
    # A_KA of the buffer: 10 + 20 + 10 + 1 at the end, half of it on the way
    assert "41.0" in below.value
    assert "20.5" in below.value
    controls["Order"].value = "time"
    assert "No stored run follows this stream" in below.value


def test_the_sentence_of_a_stream():
    report = pd.DataFrame(
        {"classes": [2, 3], "datasets": [1, 2], "images": [10, 40], "passes": [4.0, 1.0]}
    )
    assert explorers.stream_sentence(report) == (
        "5 classes in 2 tasks. Images a task: 10 to 40, 4.0 times as many; so a task goes over its "
        "own images 1.0 to 4.0 times. Datasets a task: 1 to 2."
    )


# --- means of what is seen


@given(
    st.tuples(WEIGHTS, WEIGHTS, WEIGHTS).filter(any),
    st.integers(2, 512),
    st.integers(1, 20),
    st.integers(1, 200),
    st.integers(1, 10_000),
    st.floats(1, 5_000),
)
def test_expected_exposures_add_up_to_everything_seen(weights, batch, tasks, steps, pool, size):
    chosen = Mixture(*[weight / sum(weights) for weight in weights])
    parts, passes = statistics.expected_counts(chosen, batch, tasks, steps, pool, size)
    seen = passes[list(runs.POOLS)].mul(passes["images"], axis=0).sum()
    assert seen.sum() == pytest.approx(batch * steps * tasks)
    first, later = (mixtures.batch_counts(chosen, batch, empty) for empty in (True, False))
    for name, one, other in zip(runs.POOLS, first, later, strict=True):
        assert seen[name] == pytest.approx(steps * (one + other * (tasks - 1)))
    assert parts.to_numpy().tolist() == [list(first), list(later)][: min(tasks, 2)]
    assert (passes["buffer"].iloc[1:].diff().dropna() <= 1e-12).all()  # early images come back most
