"""How long a run takes: predicted from FLOPs and the speed of decoding, or measured."""

import dataclasses
import json
from unittest.mock import Mock

import forked
import numpy as np
import pandas as pd
import pytest
import torch
from pictures import classes
from typer.testing import CliRunner

from cmp import budgets, cli, config, models
from cmp.runs import forecast, identity, logs, preflight
from cmp.runs.forecast import DEVICES
from cmp.scale import processes
from cmp.scale.execution import ExecutionConfig
from lab.evidence import planner

GPU = config.parse(config.profile("gpu"))
HOUR = 3600
no_card = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def gpu_run(*settings):
    return config.parse(config.override(config.profile("gpu"), settings))


def hours(run, *arguments, **options):
    """The hours of all steps of a run."""
    step = forecast.estimate_step(run, "h100", *arguments, **options)
    return step.seconds * sum(run.steps) / HOUR


def test_a_planned_step_takes_its_flops_at_an_assumed_share_of_the_peak():
    step = forecast.estimate_step(GPU, "h100")
    assert step.seconds == pytest.approx(budgets.full_cost(GPU).step / (0.4 * 989e12))
    assert step.by.startswith("predicted from FLOPs at an assumed 40% of the peak of an H100 SXM")
    assert step.by.endswith("where public runs took two to three times as long")


@pytest.fixture
def a10g(monkeypatch):
    """A GPU of this machine that is not listed."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr("cmp.runs.forecast.device_name", lambda device: "NVIDIA A10G")
    monkeypatch.setattr("cmp.runs.forecast.product_rate", lambda dtype, device: 5e13)
    monkeypatch.setattr(forecast, "worker_count", lambda device: 100)


def test_a_card_that_is_here_is_not_taken_for_another(a10g):
    step = forecast.estimate_step(GPU, "cuda")
    assert step.seconds == pytest.approx(budgets.full_cost(GPU).step / (0.4 * 5e13))
    assert "40% of the peak of NVIDIA A10G (50 TFLOP/s by a large product)" in step.by


def test_on_a_card_that_is_here_a_run_s_own_steps_are_measured(a10g, pictures, monkeypatch):
    run, asked = gpu_run(*pictures), []

    def measure(run_config, corpus, model, device, clock, execution, steps, uncounted):
        asked.append((execution, steps - uncounted))
        return 2.0, 0.0

    monkeypatch.setattr(forecast, "_step_seconds", measure)
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, device: self)
    corpus, flops = preflight.load_run_data(run), budgets.full_cost(run).step
    for execution in (ExecutionConfig(8), ExecutionConfig(), ExecutionConfig()):
        step = forecast.estimate_step(run, "cuda", execution, corpus)
    share = f"at {flops / 2.0 / 5e13:.0%} of the speed of a large product"
    assert step == (2.0, f"measured over 10 steps on NVIDIA A10G, {share}")
    assert asked == [(ExecutionConfig(8), 10), (ExecutionConfig(), 10)]
    monkeypatch.setattr(forecast, "_CARD_SECONDS", {})
    monkeypatch.setattr(forecast, "_step_seconds", Mock(side_effect=torch.OutOfMemoryError))
    assert "predicted" in forecast.estimate_step(run, "cuda", None, corpus).by


def test_steps_are_measured_by_the_run_s_own_loop():
    corpus = forked.small_corpus()
    run = config.parse(config.override(config.profile("quick"), ["model.name=tiny"]))
    ticks = iter(float(n) for n in range(100))
    model = models.create_model("tiny")
    step, _ = forecast._step_seconds(run, corpus, model, "cpu", lambda: next(ticks), None, 7, 5)
    assert step == 1.0


def test_a_card_without_units_for_bf16_is_slower_than_an_l4():
    """A T4 has half of an L4's peak in fp16, but the study trains in bf16."""
    seconds = {card: forecast.estimate_step(GPU, card).seconds for card in ("l4", "t4")}
    assert seconds["t4"] > 8 * seconds["l4"]


def test_micro_batches_and_recomputed_activations_take_a_forward_pass_each():
    """A third of a step is its forward pass."""
    run = gpu_run("model.name=ViT-H-14")
    plain = hours(run)
    assert hours(run, ExecutionConfig(64)) == pytest.approx(plain * 4 / 3, rel=0.001)
    both = hours(run, ExecutionConfig(64, True))
    assert both == pytest.approx(plain * 5 / 3, rel=0.001)
    words = forecast.estimate_step(run, "h100", ExecutionConfig(64)).by
    assert "with another forward pass for micro-batches" in words
    assert hours(run, ExecutionConfig(512)) == plain  # the whole batch at once


def test_decoding_that_is_slower_than_the_card_decides(monkeypatch):
    monkeypatch.setattr(forecast, "DECODED", 1000.0 / forecast.DECODERS)
    step = forecast.estimate_step(GPU, "h100")
    assert step == (pytest.approx(0.512), "predicted from decoding 1,000 images/s")


def test_several_processes_share_a_step(monkeypatch):
    alone = forecast.estimate_step(GPU, "h100").seconds
    monkeypatch.setattr(processes, "world_size", lambda: 4)
    assert forecast.estimate_step(GPU, "h100").seconds == pytest.approx(alone / 4)
    monkeypatch.setattr(forecast, "DECODED", 1000.0 / forecast.DECODERS)
    assert forecast.estimate_step(GPU, "h100").seconds == pytest.approx(0.128)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A small collection of files, and the settings of a run on it."""
    root = tmp_path_factory.mktemp("pictures")
    for place, role in enumerate(("adapt", "pool", "eval")):
        classes(root / role, [f"{word} {place}" for word in ("fox", "owl", "oak", "elm")], 24)
        about = {"name": role, "title": role, "role": role, "licence": "own",
                 "reader": {"kind": "folder", "path": role}}  # fmt: skip
        (root / f"{role}.yaml").write_text(json.dumps(about))
    settings = [f"data={root}", "model.name=ViT-B-16", "model.start=random", "stream.tasks=2"]
    return [*settings, "training.batch=32", "training.steps=100", "mixture.replay=1.0"]


def slow_decoder(monkeypatch, images):
    """Let images take a second together for each so many of them."""
    seconds = [0.0]
    monkeypatch.setattr(forecast.time, "perf_counter", lambda: seconds[0])

    def random_crops(self, rows, *arguments):
        seconds[0] += len(rows) / images

    monkeypatch.setattr("cmp.readers.images.ImageFiles.random_crops", random_crops)


def test_images_that_are_here_are_decoded_to_see_how_long_that_takes(pictures, monkeypatch):
    run = gpu_run(*pictures)
    corpus = preflight.load_run_data(run)
    slow_decoder(monkeypatch, 2.0)
    assert forecast.decoding_rate(corpus, run) == pytest.approx(2.0)
    step = forecast.estimate_step(run, "cuda", corpus=corpus)
    if not torch.cuda.is_available():
        assert step.seconds == pytest.approx(32 / (2.0 * forecast.DECODERS))
    assert "decoding" in step.by
    monkeypatch.undo()
    assert forecast.decoding_rate(corpus, run) > 10  # by the real decoder


@no_card
def test_dry_run_and_doctor_say_that_decoding_decides(pictures, monkeypatch):
    slow_decoder(monkeypatch, 2.0)
    runner = CliRunner()
    dry = runner.invoke(cli.app, ["run", "gpu", *pictures, "--dry-run"])
    doctor = runner.invoke(cli.app, ["doctor", "--profile", "gpu", *pictures])
    for result in (dry, doctor):
        assert result.output.count("predicted from decoding 30 images/s") == 1, result.output
        assert "about 3.56 min of training, 1.07 s a step" in result.output


def test_a_study_s_plan_decodes_the_images_that_are_here(pictures, monkeypatch):
    run = gpu_run(*pictures)
    slow_decoder(monkeypatch, 2.0)
    lines = preflight.describe_study({("plain", 0): run}, "cuda")
    [line] = [line for line in lines if "forecast" in line]
    if not torch.cuda.is_available():
        assert "predicted from decoding 30 images/s" in line
    away = dataclasses.replace(run, data="nowhere")
    [line] = [x for x in preflight.describe_study({("plain", 0): away}, "cuda") if "forecast" in x]
    assert "30 images/s" not in line


@no_card
def test_doctor_forecasts_the_mode_in_which_a_run_is_computed():
    said = [CliRunner().invoke(cli.app, ["doctor", "--profile", "gpu", *mode]).output
            for mode in ([], ["--compile"], ["--micro-batch", "64", "--compile"])]  # fmt: skip
    assert "an assumed 40%" in said[1] and "another forward pass" not in said[0] + said[1]
    assert "with another forward pass for micro-batches" in said[2]


def test_a_plan_takes_the_same_forecast_and_is_bound_by_decoding_too():
    """ViT-B-32 computes faster than 15 processes decode."""
    request = planner.PlanRequest("ViT-B-32", updates=5, gpu_hours=1.0)
    run = gpu_run("model.name=ViT-B-32", "model.start=random")
    assert forecast.estimate_step(run, request.device) == (
        512 / (forecast.DECODED * forecast.DECODERS), "predicted from decoding 5,760 images/s"
    )  # fmt: skip
    costs = planner.plan_costs(request, run)
    assert costs["hours on h100"] == pytest.approx(sum(run.steps) * 512 / 5760 / HOUR)


def write_log(run, corpus, seconds, steps, task=0):
    """A log of a run whose steps take so many seconds each, the first five a minute more."""
    path = logs.log_path(identity.run_id_of(run, corpus))
    path.parent.mkdir(exist_ok=True, parents=True)
    with path.open("a") as file:
        for step in range(steps):
            now = 1e9 + seconds * step + 60 * min(step, 5)
            file.write(json.dumps({"task": task, "step": step, "loss": 1.0, "time": now}) + "\n")
    return path


def test_fifty_measured_steps_replace_the_forecast(pictures, monkeypatch, tmp_path):
    run = gpu_run(*pictures)
    corpus = preflight.load_run_data(run)
    monkeypatch.setenv("CMP_BUILD", str(tmp_path))

    def sentence(run):
        """As in a dry run. The profile has a budget, so that the run has fewer steps than given."""
        checks, _, fitted = preflight.check_run(run, "cuda", ExecutionConfig())
        assert fitted != run
        return next(check.sentence for check in checks if check.what == "time")

    write_log(run, corpus, 2.0, 55)
    assert "predicted" in sentence(run)
    write_log(run, corpus, 2.0, 56, task=1)
    assert "2 s a step, measured over 50 steps of this run" in sentence(run)
    assert "predicted" in sentence(gpu_run(*pictures, "seed=1"))
    assert forecast.measured_step_seconds(pd.DataFrame()) is None


def test_memory_counts_the_images_that_a_teacher_looks_at():
    settings = ["model.name=ViT-B-32", "model.start=random", "training.batch=8"]
    run = gpu_run(*settings, "method.name=distillation")
    parts = forecast.memory_account(run)
    assert parts["activations"] > forecast.memory_account(gpu_run(*settings))["activations"]
    assert forecast.step_memory(run) > sum(parts.values()) / 2


@pytest.mark.parametrize("pause", [86400.0, -3600.0], ids=["a day", "the clock was set back"])
def test_a_pause_in_a_log_is_not_taken_for_steps(pause):
    times = np.arange(60) * 2.0
    times[30:] += pause
    log = pd.DataFrame({"task": 0, "step": range(60), "time": times})
    assert forecast.measured_step_seconds(log) == pytest.approx(2.0)


def test_times_have_three_digits():
    times = {0.0: "0 ms", 0.0168: "16.8 ms", 59.0: "59 s", 56_420: "15.7 h", 2e6: "23.1 days"}
    assert {x: forecast.time_in_words(x) for x in times} == times


def test_an_embedded_run_is_predicted_from_its_flops_on_a_core():
    run = config.parse(config.profile("cpu"))
    seconds = budgets.full_cost(run).step / DEVICES["core"].peak
    assert forecast.estimate_step(run, "cpu").seconds == pytest.approx(seconds)
    assert "at the speed of a core" in forecast.estimate_step(run, "cpu").by
