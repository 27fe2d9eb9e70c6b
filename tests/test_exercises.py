"""Exercises: answers that are right, near or wrong, and the book's own answers, computed again."""

import itertools

import numpy as np
import pytest
import torch

import cmp
import lab
from cmp import mixtures, streams
from cmp.errors import CmpError
from cmp.merging.policies import TaskEnd, apply_policy
from cmp.parsing import read_yaml
from cmp.readers import class_statistics
from cmp.runs import launch, paper
from lab import analyses, chapters, exercises
from lab.evidence import planner, verdicts
from lab.evidence.studies import load_study

SHEET = read_yaml(exercises.SHEET)
CHECKED = SHEET["exercises"]


@pytest.mark.parametrize("number", CHECKED)
def test_the_right_answer_is_right_and_each_hint_is_said_of_its_mistake(number):
    exercise = CHECKED[number]
    assert lab.check(number, exercise["answer"]).word == "right"
    assert str(lab.check(number, exercise["answer"])) == f"Right. {exercise['right']}"
    for hint in exercise["hints"]:
        verdict = lab.check(number, hint["answer"])
        assert (verdict.word != "right", verdict.why) == (True, hint["say"])


@pytest.mark.parametrize(
    "number, answer, word",
    [
        ("05.1", 4, "right"), ("05.1", np.float32(4), "right"), ("05.1", np.array([4]), "right"),
        ("05.1", 3.2, "near"), ("05.1", 40, "not yet"), ("05.1", "four", "not yet"),
        ("05.1", True, "not yet"), ("05.1", None, "not yet"), ("05.1", [4, 4], "not yet"),
        ("05.1", float("nan"), "not yet"),
        ("03.2", (0.25, 0.4375), "right"), ("03.2", [0.25, 0.46], "near"),
        ("03.2", 0.25, "not yet"), ("03.2", np.array([0.5, 0.0]), "not yet"),
        ("01.2", "Helps, size open.", "right"), ("01.2", "helps size open", "right"),
        ("02.1", "locked_image", "right"), ("02.1", "Locked image tower.", "right"),
        ("02.1", " Locked-Image ", "right"), ("02.1", "bitfit", "not yet"), ("02.1", 3, "not yet"),
    ],
)  # fmt: skip
def test_an_answer_is_right_near_or_wrong(number, answer, word):
    verdict = lab.check(number, answer)
    assert verdict.word == word and verdict.why
    assert f'class="verdict {word.replace(" ", "-")}"' in verdict._repr_html_()


@pytest.mark.parametrize("answer", [None, ["locked-image"], 3])
def test_what_is_no_text_is_told_from_a_wrong_one(answer):
    assert lab.check("02.1", answer).why == "Expected words in quotes: the method's name."


def test_a_number_that_is_no_float_is_wrong():
    assert [lab.check("05.1", size).word for size in (10**400, -(10**400))] == ["not yet"] * 2


def test_what_cannot_be_checked_is_refused_with_what_can():
    with pytest.raises(CmpError, match=r"99\.9.*03\.2"):
        lab.check("99.9", 1)
    with pytest.raises(CmpError, match="03"):
        lab.recall("99")


def test_recall_questions_hide_their_answers():
    for chapter, pairs in SHEET["recall"].items():
        assert chapter in chapters.chapters()
        shown = lab.recall(chapter)
        for question, answer in pairs:
            assert question in str(shown) and answer not in str(shown)
        assert shown._repr_html_().count("<details>") == len(pairs)


def test_texts_are_shown_as_they_are():
    questions = exercises.Questions((("Is a < b in `x`?", "<script>"),))
    assert "a &lt; b in <code>x</code>" in questions._repr_html_()
    assert "<script>" not in questions._repr_html_()


# the answers themselves


def test_every_checked_exercise_stands_in_its_chapter():
    for number in CHECKED:
        chapter, exercise = number.split(".")
        text = chapters.source_text(chapters.chapters()[chapter]).partition("\n## Exercises")[2]
        assert f"\n{exercise}. " in text, number


def answer(number):
    return CHECKED[number]["answer"]


def deployed_after_three_updates(policy):
    """The share of each update's movement, in a direction of its own, in what a policy deploys."""
    memory = {"zero": {"w": torch.zeros(3)}}
    start = deployed = memory["zero"]
    for done, move in enumerate(torch.eye(3), 1):
        trained = {"w": start["w"] + move}
        end = TaskEnd(cmp.Merging(policy, weight=0.25), memory, trained, done, seed=0)
        memory, start, deployed = apply_policy(end)
    return deployed["w"].tolist()


def test_answers_of_merging():
    shares = [deployed_after_three_updates(policy) for policy in ("ema", "last-unrolled")]
    assert answer("03.2") == pytest.approx([each[1] for each in shares], abs=1e-6)
    assert shares == [pytest.approx([0.25, 0.25, 0.25]), pytest.approx([1, 0.4375, 0.25])]


def test_answers_of_schedules():
    falling = cmp.Schedule("rsqrt", meta="rsqrt", peak=0.0016)
    meta = analyses.learning_rates(falling, 20, 40).mean()
    plain = analyses.learning_rates(cmp.Schedule("wsd", peak=1.0), 20, 40).mean()
    assert answer("04.1") == pytest.approx(meta / plain, abs=1e-6)
    peaks = np.sin(np.pi / (2 * (np.arange(20) + 1))) ** 2
    assert answer("04.2") == int((peaks < 0.01).argmax()) + 1


@pytest.mark.long
def test_the_answer_about_samples():
    samples = paper.model_catalogue(("ViT-B-32", "ViT-L-14"))["samples"]
    assert answer("05.2") == pytest.approx(samples["ViT-B-32"] / samples["ViT-L-14"], abs=0.01)


def test_the_answer_about_a_perfect_learner():
    large = [min(10 * update, 90) / 90 for update in (5, 9)]
    assert answer("06.1") == pytest.approx([100 * share / 2 for share in large], abs=0.01)


def test_the_answer_about_the_reservoir():
    run = cmp.config.parse(cmp.config.profile("quick"))
    draws = run.training.steps * run.training.batch / 3
    assert answer("07.2") == pytest.approx(draws / 300, abs=0.01)
    assert mixtures.batch_counts(run.mixture, batch=64, empty_buffer=False)[2] in (21, 22)


@pytest.mark.long
def test_the_answer_about_budgets():
    def ratio(method):
        return [
            paper.method_cost(model, 64, "full").step / paper.method_cost(model, 64, method).step
            * paper.method_cost(model, 64, "full").memory
            / paper.method_cost(model, 64, method).memory
            for model in ("small", "ViT-B-16")
        ]  # fmt: skip

    methods = ("locked-image", "bitfit", "lora", "ewc", "locked-text")
    gains = {name: large / small for name in methods for small, large in [ratio(name)]}
    assert max(gains, key=gains.get) == answer("02.1")


def test_the_answers_about_the_benchmark():
    assert answer("01.2") == verdicts.read_interval(0.9, 1.6)
    stream = launch.from_keywords("cpu", {}).stream
    corpus = cmp.load_data("embedded")
    counts = class_statistics.class_counts(streams.task_classes(corpus, stream, 0)).sum()
    points = [100 / len(counts) / classes for classes in (counts.min(), counts.max())]
    assert answer("01.3") == pytest.approx(points, abs=1e-4)


def test_the_answer_about_neighbours():
    corpus, order = cmp.load_data("embedded"), cmp.config.Stream(order="similarity")
    paths = [streams.class_order(corpus, order, seed) for seed in (0, 1)]
    one, other = (set(itertools.pairwise(path)) for path in paths)
    assert answer("06.2") == len(one & other)


def test_the_answer_about_the_smallest_replay():
    """Of the mixtures that lose less than three points against thirds, as the triangle shows."""
    study, axes = "mixtures-more", ["A_KA", "A_ZS"]
    names = [name for name in load_study(study).settings if name.startswith("triangle, ")]
    thirds = verdicts.setting_scores("mixtures", "thirds")
    enough = []
    for name in names:
        own = verdicts.setting_scores(study, name)
        loss = (thirds[axes] - own[axes]).mean()  # over the streams that both have
        shares = load_study(study).configs("cpu", 1)[name, 0].mixture
        if loss.max() < 3:
            enough.append(shares.pretraining + shares.buffer)
    assert answer("07.1") == pytest.approx(min(enough))


@pytest.mark.long
def test_the_answer_about_a_night_of_training():
    request = planner.PlanRequest("ViT-B-16", gpu_hours=8, device="h100", updates=20)
    steps = planner.make_plan(request).run.training.steps
    assert answer("08.1") == pytest.approx(steps, rel=0.01)


def test_the_answers_about_months():
    mixture = cmp.Mixture(pretraining=0.25, update=0.25, buffer=0.5)
    _, places, _ = mixtures.counts_for_passes(mixture, 64, (1000, 25, 100), 2.0)
    steps = max(mixtures.MIN_STEPS, -(-2 * 25 // places))
    assert answer("09.2") == [places, steps * places / 25]
