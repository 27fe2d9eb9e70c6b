"""The planner: what it promises fits, and what cannot be is a sentence."""

import dataclasses
import json
import re

import open_clip
import pytest
import torch
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from cmp import budgets, cli, config, mixtures, starts, streams
from cmp.embedded import packed
from cmp.errors import CmpError
from cmp.merging.policies import TaskEnd, apply_policy
from cmp.readers import class_statistics
from cmp.runs import forecast, paper
from lab.evidence import planner
from lab.evidence.guidelines import load_guidelines
from lab.evidence.planner import DEVICES, GIGA, ImpossibleRequest, PlanRequest

invoke = CliRunner().invoke
HOURS = 0.0116
"""On one core, as many FLOPs as the `cpu` profile's own run takes."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The name of a folder that describes the network of `tiny`, which is none of ours there."""
    folder = tmp_path_factory.mktemp("models") / "a model"
    folder.mkdir()
    about = {"model_cfg": open_clip.get_model_config("tiny"), "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(about))
    return f"local-dir:{folder}"


def core(**changes):
    """A request for `small` on a core."""
    return PlanRequest(**{"gpu_hours": HOURS, "device": "core"} | changes)


def real(**changes):
    """A request for ViT-B-16 on a card."""
    return PlanRequest(**{"model": "ViT-B-16", "gpu_hours": 8.0, "images": 3000} | changes)


def spent(plan):
    """What a plan's run costs, in the unit of the request, counted anew."""
    run, request = plan.run, plan.request
    cost = budgets.method_cost(run)
    flops = run.stream.tasks * (run.training.steps * cost.step + cost.end)
    if request.gpu_hours is not None:
        return flops / DEVICES[request.device].speed / 3600
    return flops * cost.memory / budgets.full_cost(run).memory / GIGA


REQUESTS = st.builds(
    PlanRequest,
    model=st.sampled_from(("small", "tiny", "tiny-vit")),
    updates=st.integers(1, 60),
    gpu_hours=st.floats(1e-4, 50),
    device=st.sampled_from(sorted(DEVICES)),
    keep=st.sampled_from(sorted(planner.KEEP)),
    pool=st.sampled_from((None, 0.0, 0.01, 0.1, 1.0)),
    other_pool=st.booleans(),
    buffer=st.sampled_from((None, 0, 1, 300, 10_000)),
)


@settings(max_examples=12)
@given(REQUESTS, st.booleans())
def test_any_feasible_request_is_a_run_that_fits(request, adjusted):
    if adjusted:
        request = dataclasses.replace(request, gpu_hours=None, gmafs=request.gpu_hours * 1e5)
    try:
        plan = planner.make_plan(request)
    except ImpossibleRequest as error:
        assert str(error)
        assume(False)
    allowed = request.gmafs if adjusted else request.gpu_hours
    assert spent(plan) <= allowed * (1 + 1e-6)
    one_more = plan.run.stream.tasks * budgets.method_cost(plan.run).step
    if not adjusted:  # and no step is left over
        assert spent(plan) + one_more / DEVICES[request.device].speed / 3600 > allowed * (1 - 1e-6)
    assert config.parse(yaml.safe_load(planner.plan_as_yaml(plan)), "plan") == config.parse(
        plan.tree
    )
    assert plan.costs["GB of memory"] * GIGA <= DEVICES[request.device].memory
    assert (plan.run.mixture.pretraining > 0) == (request.pool != 0 and not request.other_pool)
    assert (plan.run.mixture.buffer > 0) == (request.buffer != 0 and request.updates > 1)


def test_a_plan_of_an_embedded_model_is_a_file_that_run_accepts(tmp_path):
    options = ["--gpu-hours", str(HOURS), "--device", "core", "--updates", "6", "--buffer", "300"]
    result = invoke(cli.app, ["plan", "--model", "small", *options])
    assert result.exit_code == 0, result.output
    file = tmp_path / "plan.yaml"
    file.write_text(result.stdout)
    dry = invoke(cli.app, ["run", str(file), "--dry-run"])
    assert dry.exit_code == 0, dry.output
    assert "mixture.capacity: 300" in dry.stdout
    assert "merging.policy: ema" in dry.stdout
    assert "stream.tasks: 6" in dry.stdout


@pytest.mark.parametrize("changes", [{}, {"buffer": 0}, {"other_pool": True}])
def test_a_plan_of_many_small_updates_takes_no_more_than_the_smallest_holds(changes):
    plan = planner.make_plan(core(gpu_hours=4 * HOURS, updates=99, **changes))
    assert len(mixtures.task_pools(plan.run, packed.load_embedded())) == 99
    batch = plan.run.training.batch
    assert note(plan, f"With batches larger than {batch},")
    larger = dataclasses.replace(plan.run.training, batch=batch + 4)
    with pytest.raises(CmpError):
        mixtures.task_pools(dataclasses.replace(plan.run, training=larger), packed.load_embedded())


def test_a_plan_of_a_real_model_is_a_file_that_a_dry_run_accepts(tmp_path):
    result = invoke(cli.app, ["plan", "--model", "ViT-B-16", "--gpu-hours", "8", "--updates", "20"])
    assert result.exit_code == 0, result.output
    tree = yaml.safe_load(result.stdout)
    assert tree["model"] == {"name": "ViT-B-16", "start": "laion2b_s34b_b88k"}
    assert tree["data"] == "fomo"
    file = tmp_path / "plan.yaml"
    file.write_text(result.stdout)
    dry = invoke(cli.app, ["run", str(file), "--dry-run"])
    assert dry.exit_code == 1, dry.output  # without data and a card
    assert "weights   to fetch" in dry.stdout
    run = config.parse(tree)
    assert (run.stream.tasks, run.training.batch, run.schedule.peak) == (20, 512, 1e-5)
    hours = 20 * run.training.steps * forecast.estimate_step(run, "h100").seconds / 3600
    assert 7.99 < hours <= 8
    flops = 20 * run.training.steps * budgets.method_cost(run).step
    assert flops / hours / 3600 == pytest.approx(0.4 * 989e12)
    said = " ".join(result.stdout.replace("#", "").split())
    assert "8 hours on h100" in said and "predicted from FLOPs at an assumed 40%" in said


@pytest.mark.parametrize("request_", [core(), real()])
def test_a_plan_gives_the_advice_of_each_guideline(request_):
    plan = planner.make_plan(request_)
    advice = {name: guideline.advice for name, guideline in load_guidelines().items()}
    assert plan.advice == advice and len(advice) > 4
    said = " ".join(planner.plan_as_yaml(plan).replace("#", "").split())
    assert all(" ".join(words.split()) in said for words in advice.values())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"gpu_hours": None}, "give the compute either"),
        ({"gmafs": 1.0}, "give the compute either"),
        ({"gpu_hours": 0.0}, "must be above 0"),
        ({"gpu_hours": -1.0}, "must be above 0"),
        ({"gpu_hours": float("nan")}, "must be above 0"),
        ({"gpu_hours": 1e-6}, "buys no step in each of 20 updates of small at batch 64"),
        ({"gpu_hours": 1e9, "device": "h100"}, "more than a run can have"),
        ({"updates": 0}, "a stream has from 1 to"),
        ({"updates": 523}, "the embedded stream has 522 classes"),
        ({"model": "ViT-B-32", "device": "a100", "images": 1}, "more updates than images"),
        ({"model": "ViT-B-32", "device": "a100", "updates": 2_000_000}, "more updates than images"),
        ({"keep": "all", "pool": 0.0}, "every update that learns something forgets something"),
        ({"keep": "everything"}, "there are balance, most, all"),
        ({"device": "tpu"}, "there are h100"),
        ({"pool": 1.5}, "give the fraction of the pool"),
        (
            {"keep": "all", "other_pool": True},
            "nothing that the model learned from can be replayed",
        ),
        ({"buffer": -1}, "a number of images"),
        ({"model": "tinny"}, "not an open_clip model"),
        ({"model": "tinny"}, "did you mean 'tiny'?"),
        ({"model": "vit-b-16"}, "did you mean 'ViT-B-16'?"),
        ({"model": "ViT-B-61"}, "did you mean 'ViT-B-16'?"),
        ({"model": "ViT-B-32-256-none"}, "not an open_clip model"),
    ],
)
def test_what_cannot_be_is_answered_in_a_sentence(changes, words):
    with pytest.raises(ImpossibleRequest, match=re.escape(words)):
        planner.make_plan(core(**changes))


@pytest.mark.parametrize("images", [1, 4, 300, 10**6])
@pytest.mark.parametrize("buffer", [None, 100])
def test_a_plan_for_the_embedded_stream_does_not_depend_on_the_images_given(images, buffer):
    without, given = (
        planner.make_plan(core(images=number, buffer=buffer)) for number in (None, images)
    )
    assert given.tree == without.tree and given.costs == without.costs
    assert set(given.notes) - set(without.notes) == {planner.NOTES["own images"]}


def test_a_model_without_weights_has_nothing_to_keep():
    with pytest.raises(ImpossibleRequest, match="no pretrained weights"):
        planner.make_plan(PlanRequest("ViT-M-32", gpu_hours=1.0, images=100))


def test_what_is_too_large_is_trained_in_part_or_not_at_all(monkeypatch):
    small = DEVICES["core"]._replace(memory=3.2e7)  # full fine-tuning of `small` takes more
    monkeypatch.setitem(DEVICES, "core", small)
    plan = planner.make_plan(core())
    assert plan.run.method.name == "locked-image"
    assert any("does not fit into core's memory" in each for each in plan.notes)
    monkeypatch.setitem(DEVICES, "core", small._replace(memory=1e6))
    with pytest.raises(ImpossibleRequest, match="does not fit into core, 0 GB"):
        planner.make_plan(core())


def test_memory_in_bf16_is_that_of_table_4():
    run = config.parse(
        {
            "model": {"name": paper.TABLE4_MODEL, "start": "random"},
            "training": {"batch": paper.TABLE4_BATCH},
        }
    )
    assert forecast.step_memory(run) / GIGA == pytest.approx(paper.TABLE4["full"].memory, rel=0.02)


def test_a_merged_plan_keeps_as_many_networks_as_are_counted():
    merging, weights = planner.make_plan(core()).run.merging, {"w": torch.ones(2)}
    memory = {"zero": weights}
    for done in (1, 2, 3):
        memory, _, _ = apply_policy(TaskEnd(merging, memory, weights, done, 0))
    assert len(memory) == forecast.COPIES


def test_the_embedded_stream_is_as_large_as_the_planner_thinks():
    corpus = packed.load_embedded()
    run = config.parse(config.profile("cpu"))
    tasks = streams.task_classes(corpus, run.stream, 0)
    assert class_statistics.class_counts(tasks).to_numpy().sum() == planner.CLASSES
    rows = sum(len(corpus.rows("train", dataset=each)) for each in corpus.by_role("adapt"))
    assert rows == planner.ARRIVING


def test_the_default_plan_is_the_recipe():
    plan = planner.make_plan(core())
    recipe = config.parse({"recipe": "default"})
    assert plan.run.carries_moments == recipe.carries_moments
    for part in ("merging", "method"):
        assert getattr(plan.run, part) == getattr(recipe, part)
    shares = ("pretraining", "update", "buffer")
    assert [getattr(plan.run.mixture, each) for each in shares] == [
        getattr(recipe.mixture, each) for each in shares
    ]


def test_tags_of_the_paper_are_open_clip_s():
    import open_clip

    for name, tag in planner.TAGS.items():
        assert tag in open_clip.list_pretrained_tags_by_model(name)
    assert set(starts.family_names()) & set(planner.TAGS) == set()


@pytest.mark.parametrize("model", ["small", "ViT-B-32"])
def test_a_plan_has_the_recipe_s_form_whatever_the_model(model):
    recipe = config.recipe_tree("default")
    settings = planner.choose_settings(PlanRequest(model, gpu_hours=1.0))
    assert settings["merging"] == recipe["merging"]
    assert settings["schedule"]["name"] == recipe["schedule"]["name"]
    assert settings["mixture"].items() >= recipe["mixture"].items()
    careful = planner.choose_settings(PlanRequest(model, gpu_hours=1.0, keep="all"))
    assert careful["merging"]["weight"] == 0.1


def test_a_real_plan_shows_no_image_more_often_than_was_measured_and_says_so():
    request = PlanRequest("ViT-B-16", updates=5, gpu_hours=8.0, images=2000)
    plan, update = planner.make_plan(request), planner._update_share
    passes = plan.run.training.steps * update(plan.run) / request.images
    assert planner.MAX_PASSES - 1 < passes <= planner.MAX_PASSES
    assert plan.costs["hours on h100"] < 1
    assert any(note.startswith("The compute would buy") for note in plan.notes)
    more = planner.make_plan(PlanRequest("ViT-B-16", gpu_hours=8.0))
    assert more.costs["hours on h100"] == pytest.approx(8, rel=0.01)
    assert not any(note.startswith("The compute would buy") for note in more.notes)


def note(plan, words):
    """The one note of a plan that begins so."""
    [text] = [each for each in plan.notes if each.startswith(words)]
    return text


def test_a_real_plan_that_keeps_old_knowledge_first_says_what_to_do_about_the_peak():
    plan = planner.make_plan(real(keep="most"))
    assert "the lowest of these peaks" in note(plan, "To keep old knowledge first")
    others = [real(), core(keep="most")]
    notes = [each for request in others for each in planner.make_plan(request).notes]
    assert not [each for each in notes if each.startswith("To keep old knowledge first")]


def test_a_pool_of_one_s_own_is_replayed_whole_and_a_public_one_stands_in():
    mixture = planner.make_plan(real()).run.mixture
    assert (mixture.replay, mixture.select) == (1, "random")
    assert planner.make_plan(real(pool=0.2)).run.mixture.replay == 0.2
    public = planner.make_plan(real(other_pool=True))
    assert public.run.mixture == mixture
    assert "hardly retained more than none" in note(public, "Your pool stands in for")
    small = planner.make_plan(core()).run.mixture
    assert (small.replay, small.select) == (0.5, "concepts")  # as in the studies


def test_an_embedded_model_replays_no_public_data_and_is_told_why():
    plan = planner.make_plan(core(other_pool=True))
    assert plan.run.mixture.shares == pytest.approx((0, 1 / 3, 2 / 3))
    assert "hardly retained more than none" in note(plan, "Public data are not replayed")


@pytest.mark.parametrize(
    ("changes", "batch"),
    [({}, 512), ({"images": 40}, 64), ({"buffer": 50}, 64), ({"images": 2}, 5),
     ({"images": 2, "pool": 0.0}, 2), ({"images": 40, "updates": 1}, 128)],
)  # fmt: skip
def test_a_batch_takes_no_more_of_an_update_or_the_buffer_than_they_hold(tiny, changes, batch):
    plan = planner.make_plan(real(model=tiny, gpu_hours=0.05, **changes))
    run, images = plan.run, plan.request.images
    assert run.training.batch == batch
    first = mixtures.batch_counts(run.mixture, batch, empty_buffer=True)
    later = mixtures.batch_counts(run.mixture, batch, empty_buffer=False)
    assert max(first[1], later[1]) <= images
    assert later[2] <= min(images, plan.request.buffer or images)
    is_told = [each for each in plan.notes if each.startswith(f"With batches larger than {batch},")]
    assert bool(is_told) == (batch < 512)


def test_earlier_updates_of_a_stream_of_one_are_in_the_pool():
    plan = planner.make_plan(real(updates=1))
    assert plan.run.mixture.shares == (0.75, 0.25, 0)
    assert note(plan, "A stream of one update")
    assert " 1 update of " in planner.plan_summary(plan)
    kept = planner.make_plan(real(updates=1, pool=0.0, buffer=100)).run.mixture
    assert kept.shares == pytest.approx((2 / 3, 1 / 3, 0))
    assert (kept.replay, kept.capacity) == (1, None)
    none = planner.make_plan(real(updates=1, buffer=0))
    assert none.run.mixture.shares == (0.5, 0.5, 0)
    assert not any("A stream of one update" in each for each in none.notes)
    embedded = planner.make_plan(core(updates=1))  # its pool has no earlier updates
    assert embedded.run.mixture.shares == (0.5, 0.5, 0)


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (core(start="openai"), "start 'openai': no such file; for small there are annealed, una"),
        (core(start="anealed"), "did you mean 'annealed'"),
        (real(start="annealed"), "for ViT-B-16 there are random, openai, "),
        (real(start="hub"), "start 'hub'"),
    ],
)
def test_a_start_that_the_model_does_not_have_is_refused(request_, words):
    with pytest.raises(ImpossibleRequest, match=words):
        planner.make_plan(request_)


@pytest.mark.long
def test_a_plan_begins_with_the_weights_that_are_given():
    plan = planner.make_plan(real(start="ours.pt"))
    usual = planner.make_plan(real())
    assert plan.tree["model"] == {"name": "ViT-B-16", "start": "ours.pt"}
    assert plan.costs == usual.costs
    without = planner.make_plan(PlanRequest("ViT-M-32", gpu_hours=1.0, start="ours.pt"))
    assert without.run.model.start == "ours.pt"  # open_clip has no weights of it
    embedded = planner.make_plan(core(start="ours.pt"))
    assert embedded.run.model.start == "ours.pt"


@pytest.mark.defect
def test_a_model_in_a_folder_is_planned_from_its_own_config(tiny):
    plan = planner.make_plan(real(model=tiny, gpu_hours=0.01))
    assert plan.run.model == config.Model(tiny, "hub")
    ours = dataclasses.replace(plan.run, model=config.Model("tiny"))
    assert budgets.method_cost(plan.run) == budgets.method_cost(ours)
    given = planner.make_plan(real(model=tiny, gpu_hours=0.01, start="ours.pt"))
    assert given.run.model.start == "ours.pt"
    with pytest.raises(CmpError, match=r"model\.start.*'annealed'.*random"):
        planner.make_plan(real(model=tiny, start="annealed"))
    with pytest.raises(CmpError, match=r"model\.name.*local-dir:/nowhere"):
        planner.make_plan(real(model="local-dir:/nowhere"))


@pytest.mark.defect
def test_a_plan_of_a_few_steps_is_refused_with_what_the_compute_is_enough_for():
    with pytest.raises(ImpossibleRequest, match="buys 2 steps in each of 20 updates") as error:
        planner.make_plan(core(gpu_hours=HOURS / 16))
    most = int(re.search(r"enough for at most (\d+) update", str(error.value))[1])
    plan = planner.make_plan(core(gpu_hours=HOURS / 16, updates=most))
    assert plan.run.training.steps >= planner.MIN_STEPS
    with pytest.raises(ImpossibleRequest):
        planner.make_plan(core(gpu_hours=HOURS / 16, updates=most + 1))


@pytest.mark.defect
def test_a_device_in_capitals_is_answered_with_its_name():
    with pytest.raises(ImpossibleRequest, match="did you mean 'h100'"):
        planner.make_plan(real(device="H100"))
