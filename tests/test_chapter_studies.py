"""What a chapter says of its own study, held against the study's files and published runs."""

import options
import pytest

from cmp.experiments import results, store, studies
from cmp.experiments.claims import final_scores, setting_means
from lab import analyses

CHAPTER_05 = ("05-tuning", "05", "05-transfer")
METHODS = [
    "full", "locked-image", "locked-text", "bitfit", "lnfit", "lora", "dora", "vera", "galore",
    "ewc", "si", "distillation",
]  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_methods_stand_at_what_ended_best_in_their_tuning(name):
    """In the geometric mean, on the validation split."""
    ends = final_scores(store.trajectory(results.published_metrics("02-tuning")))
    means = ends.groupby("setting")["GM"].mean()
    best = max((each for each in means.index if each.split(",")[0] == name), key=means.get)
    tuned = studies.load_study("02-tuning").configs("cpu", 1)[best, 0]
    chosen = studies.load_study("02").configs("cpu", 1)[name, 0]
    assert (chosen.method, chosen.schedule) == (tuned.method, tuned.schedule)
    assert chosen.training == tuned.training
    assert chosen.training.budget == 1


def test_tuning_looks_at_nothing_that_is_reported():
    tuned = studies.load_study("02-tuning").configs("cpu").values()
    reported = studies.load_study("02").configs("cpu").values()
    assert {each.evaluation.split for each in tuned} == {"validation"}
    assert {each.evaluation.split for each in reported} == {"test"}
    streams = [{each.seeds.stream for each in runs} for runs in (tuned, reported)]
    assert not streams[0] & streams[1]


def test_a_chapter_s_studies_are_within_its_budget():
    runs = {
        chapter: set(studies.load_study(chapter).configs("cpu").values())
        for chapter in ("02", "02-tuning", "03", "06", "07")
    }
    assert len(runs["02"] | runs["02-tuning"]) <= 180
    assert all(len(each) <= 180 for each in runs.values())


def test_the_orders_of_chapter_06_are_all_there_are():
    settings = studies.load_study("06").configs("cpu", 1).values()
    found = {(each.stream.order, each.stream.reverse) for each in settings}
    named = set(options.choices()["stream.order"]) - {"listed"}
    assert {order for order, _ in found} == named
    assert len([reverse for _, reverse in found if reverse]) >= 4


def test_chapter_07_has_fifteen_points_of_the_triangle_and_three_replicates():
    grid = studies.load_study("07").configs("cpu")
    points = {}
    for (name, replicate), each in grid.items():
        mixture = each.mixture
        if name.startswith("triangle") or name in ("thirds", "buffer only", "pool only"):
            share = (mixture.pretraining, mixture.update, mixture.buffer)
            points.setdefault(share, set()).add(replicate)
    assert len(points) >= 15
    assert min(map(len, points.values())) >= 3


def test_chapter_02_has_every_method_and_03_every_policy_and_rule():
    grid = studies.load_study("02").configs("cpu", 1).values()
    assert {each.method.name for each in grid} == set(options.choices()["method.name"])
    assert set(METHODS) == set(options.choices()["method.name"])
    merged = [each.merging for each in studies.load_study("03").configs("cpu", 1).values()]
    assert {each.policy for each in merged} == set(options.choices()["merging.policy"])
    assert {each.rule for each in merged if each.policy == "ema"} == set(
        options.choices()["merging.rule"]
    )


def peaks(model, method):
    """Chapter 05's choice, and the grid that it was made from, if it was made there."""
    ends = setting_means(store.trajectory(results.published_metrics("05-tuning")))["GM"]
    grid = {name: score for name, score in ends.items() if name.startswith(f"{model}: {method},")}
    return float(max(grid, key=grid.get).rpartition(" ")[2]) if grid else None


def test_sizes_stand_at_the_rates_that_ended_best_in_their_tuning():
    names = {"none": "full", "ema": "EMA"}
    for chapter in ("05", "05-transfer"):
        for (name, _), each in studies.load_study(chapter).configs("cpu", 1).items():
            kind = "LoRA" if each.method.name == "lora" else names.get(each.merging.policy)
            plain = each.method.name in ("full", "lora") and each.schedule.meta == "none"
            if kind and plain and "lower rate" not in name and each.mixture.update == 1 / 3:
                best = peaks(each.model.name, kind)
                if best is None:  # of `tiny`, chosen in 02-tuning
                    tuned = studies.load_study("02").configs("cpu", 1)[kind.lower(), 0]
                    best = tuned.schedule.peak
                assert each.schedule.peak == best, (chapter, name)


def test_families_of_the_transfer_study_differ_in_size_and_rates_alone():
    grid = studies.load_study("05-transfer").configs("cpu", 1)
    names = {name.partition(": ")[2] for name, _ in grid}
    families = {name.partition(":")[0] for name, _ in grid}
    assert len(names) == 10
    assert families == {"tiny", "tiny-half", "tiny-double", "tiny-quad", "tiny-vit"}
    for family in families - {"tiny"}:
        for name in names:
            one, other = (grid[f"{each}: {name}", 0] for each in (family, "tiny"))
            assert (one.method, one.merging) == (other.method, other.merging)
            assert (one.mixture, one.schedule.meta) == (other.mixture, other.schedule.meta)
            rates = [each.schedule.peak for each in (one, other)]
            if name not in ("LoRA", "EMA"):
                ratio = (
                    grid[f"{family}: full", 0].schedule.peak / grid["tiny: full", 0].schedule.peak
                )
                assert rates[0] / rates[1] == pytest.approx(ratio)


def test_the_families_have_the_same_compute():
    grid = studies.load_study("05-transfer").configs("cpu", 1)
    for (name, _), each in grid.items():
        assert analyses.run_compute(each) == pytest.approx(analyses.compute_unit(), rel=0.03), name


def test_chapter_05_took_no_more_than_it_may():
    runs = {run.id: run for name in CHAPTER_05 for run in results.published_runs(name)}
    assert sum(run.provenance["seconds"] for run in runs.values()) <= 3.5 * 3600
    assert all(
        len(set(studies.load_study(name).configs("cpu").values())) <= 180 for name in CHAPTER_05
    )


def test_chapter_05_s_tuning_looks_at_nothing_that_is_reported():
    tuned = studies.load_study("05-tuning").configs("cpu").values()
    assert {each.evaluation.split for each in tuned} == {"validation"}
    for name in ("05", "05-transfer"):
        reported = studies.load_study(name).configs("cpu").values()
        assert not {each.seeds.stream for each in tuned} & {each.seeds.stream for each in reported}
