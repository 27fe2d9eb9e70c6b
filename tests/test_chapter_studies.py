"""What a chapter says of its own study, held against the study's files and published runs."""

import pytest

from cmp import claims, config, results, store, studies
from cmp.config import OF_METHODS

METHODS = [
    "full", "locked-image", "locked-text", "bitfit", "lnfit", "lora", "dora", "vera", "galore",
    "ewc", "si", "distillation",
]  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_methods_stand_at_what_ended_best_in_their_tuning(name):
    """In the geometric mean, on the validation split."""
    ends = claims.final(store.trajectory(results.published("02-tuning")))
    means = ends.groupby("setting")["GM"].mean()
    best = max((each for each in means.index if each.split(",")[0] == name), key=means.get)
    tuned = studies.load("02-tuning").configs("cpu", 1)[best, 0]
    chosen = studies.load("02").configs("cpu", 1)[name, 0]
    assert (chosen.method, chosen.schedule) == (tuned.method, tuned.schedule)
    assert chosen.training == tuned.training
    assert chosen.training.budget == 1


def test_tuning_looks_at_nothing_that_is_reported():
    tuned = studies.load("02-tuning").configs("cpu").values()
    reported = studies.load("02").configs("cpu").values()
    assert {each.evaluation.split for each in tuned} == {"validation"}
    assert {each.evaluation.split for each in reported} == {"test"}
    streams = [{each.seeds.stream for each in runs} for runs in (tuned, reported)]
    assert not streams[0] & streams[1]


def test_a_chapter_s_studies_are_within_its_budget():
    runs = {
        chapter: set(studies.load(chapter).configs("cpu").values())
        for chapter in ("02", "02-tuning", "03", "06", "07")
    }
    assert len(runs["02"] | runs["02-tuning"]) <= studies.MAX_RUNS
    assert all(len(each) <= studies.MAX_RUNS for each in runs.values())


def test_the_orders_of_chapter_06_are_all_there_are():
    settings = studies.load("06").configs("cpu", 1).values()
    found = {(each.stream.order, each.stream.reverse) for each in settings}
    named = set(config.choices()["stream.order"]) - {"listed"}
    assert {order for order, _ in found} == named
    assert len([reverse for _, reverse in found if reverse]) >= 4


def test_chapter_07_has_fifteen_points_of_the_triangle_and_three_replicates():
    grid = studies.load("07").configs("cpu")
    points = {}
    for (name, replicate), each in grid.items():
        mixture = each.mixture
        if name.startswith("triangle") or name in ("thirds", "buffer only", "pool only"):
            share = (mixture.pretraining, mixture.update, mixture.buffer)
            points.setdefault(share, set()).add(replicate)
    assert len(points) >= 15
    assert min(map(len, points.values())) >= 3


def test_chapter_02_has_every_method_and_03_every_policy_and_rule():
    grid = studies.load("02").configs("cpu", 1).values()
    assert {each.method.name for each in grid} == set(config.choices()["method.name"])
    assert set(METHODS) == set(config.choices()["method.name"]) >= set(OF_METHODS)
    merged = [each.merging for each in studies.load("03").configs("cpu", 1).values()]
    assert {each.policy for each in merged} == set(config.choices()["merging.policy"])
    assert {each.rule for each in merged if each.policy == "ema"} == set(
        config.choices()["merging.rule"]
    )
