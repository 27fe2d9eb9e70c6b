"""How long a run takes: predicted from a trace and the speed of decoding, then measured."""

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
import torch
from pictures import classes
from typer.testing import CliRunner

from cmp import budgets, cli, config
from cmp.runs import forecast, identity, kernels, logs, preflight
from cmp.runs.forecast import DEVICES
from cmp.scale import decoding, processes
from cmp.scale.execution import ExecutionConfig
from lab.evidence import planner

GPU = config.parse(config.profile("gpu"))
H100 = DEVICES["h100"]
HOUR = 3600
no_card = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def gpu_run(*settings):
    return config.parse(config.override(config.profile("gpu"), settings))


def hours(run, *arguments, **options):
    """The hours of all steps of a run."""
    return forecast.predict_step(run, H100, *arguments, **options).seconds * sum(run.steps) / HOUR


def test_a_step_takes_its_flops_at_the_share_that_its_trace_predicts():
    flops = budgets.full_cost(GPU).step
    eager, compiled = (
        forecast.predict_step(GPU, H100, ExecutionConfig(compile_towers=each))
        for each in (False, True)
    )
    share = kernels.traced_share("ViT-B-16", 512, False)
    assert 0.33 < share < 0.36  # `cmpt bench trace` says 34.3%
    assert eager.seconds == pytest.approx(flops / (share * H100.peak))
    assert "34% (from its kernels) of the peak of an H100" in eager.by
    # a compiled step is traced at more than the share that is assumed at most
    assert kernels.traced_share("ViT-B-16", 512, True) > H100.utilisation
    assert compiled.seconds == pytest.approx(flops / (H100.utilisation * H100.peak))
    assert "40% (assumed)" in compiled.by
    assert eager.by.startswith("predicted") and compiled.by.startswith("predicted")


def test_micro_batches_share_a_step_of_the_optimiser():
    """As if each had its own, a large network looked two fifths slower."""
    own, shared = (kernels.traced_share("ViT-H-14", 8, False, parts=n) for n in (1, 64))
    assert 1.3 < shared / own < 1.6
    config, execution = gpu_run("model.name=ViT-H-14"), ExecutionConfig(micro_batch=8)
    parts = forecast.predict_step(config, H100, execution)
    flops = budgets.full_cost(config).step * 4 / 3  # features are computed twice
    assert parts.seconds == pytest.approx(flops / (shared * H100.peak), rel=1e-3)


def test_a_card_with_a_slower_memory_reaches_less_of_its_peak():
    """Of an L4's peak, elementwise operations leave less than of an RTX 4090's."""
    shares = [
        budgets.full_cost(GPU).step / forecast.predict_step(GPU, DEVICES[card]).seconds
        / DEVICES[card].peak
        for card in ("l4", "rtx-4090")
    ]  # fmt: skip
    assert shares[0] < 0.3 < shares[1]


def test_a_card_that_is_not_listed_is_named_with_what_it_is_taken_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(forecast, "worker_count", lambda device: 100)
    said = {}
    for card in ("Quadro RTX 8000", "Tesla T4"):
        for place in ("cmp.scale.devices", "cmp.runs.forecast"):
            monkeypatch.setattr(f"{place}.device_name", lambda device, card=card: card)
        said[card] = forecast.forecast_step(GPU, "cuda").by
    assert "Quadro RTX 8000 is not listed, so an H100 is assumed" in said["Quadro RTX 8000"]
    assert "of the peak of a T4 in fp32" in said["Tesla T4"]
    assert "not listed" not in said["Tesla T4"]


def test_a_card_without_units_for_bf16_is_slower_than_an_l4():
    """A T4 has half of an L4's peak in fp16, but the study trains in bf16."""
    seconds = {card: forecast.predict_step(GPU, DEVICES[card]).seconds for card in ("l4", "t4")}
    assert seconds["t4"] > 8 * seconds["l4"]


@pytest.mark.long
def test_micro_batches_and_recomputed_activations_take_a_forward_pass_each():
    """A third of a step is its forward pass. At 40%, ViT-H-14 takes 11.8 h, and 15.7 in parts."""
    run = gpu_run("model.name=ViT-H-14")
    plain, parts = hours(run), hours(run, ExecutionConfig(64))
    assert plain == pytest.approx(11.75, abs=0.05)
    assert parts >= 15.66
    compiled = hours(run, ExecutionConfig(64, compile_towers=True))  # at 40%, as the whole batch
    assert compiled == pytest.approx(plain * 4 / 3, rel=0.001)
    both = hours(run, ExecutionConfig(64, True, True))
    assert both == pytest.approx(plain * 5 / 3, rel=0.001)
    words = forecast.predict_step(run, H100, ExecutionConfig(64)).by
    assert "with another forward pass for micro-batches" in words
    assert hours(run, ExecutionConfig(512)) == plain  # the whole batch at once


def test_a_network_that_cannot_be_traced_is_taken_at_the_assumed_share():
    assert kernels.traced_share("ViT-B-16-SigLIP", 8, False) is None
    run = gpu_run("model.name=ViT-B-16-SigLIP")
    assert "40% (assumed)" in forecast.predict_step(run, H100).by


def test_decoding_that_is_slower_than_the_card_decides():
    fast = forecast.predict_step(GPU, H100, decoding=1e6)
    slow = forecast.predict_step(GPU, H100, decoding=1000.0)
    assert fast == forecast.predict_step(GPU, H100)
    assert slow == (0.512, "predicted from decoding 1,000 images/s")


def test_several_processes_share_a_step(monkeypatch):
    alone = forecast.predict_step(GPU, H100).seconds
    monkeypatch.setattr(processes, "world_size", lambda: 4)
    # a quarter of the batch each, of which a card makes a little less
    assert alone / 4 < forecast.predict_step(GPU, H100).seconds < alone / 3.5
    assert forecast.predict_step(GPU, H100, decoding=1000.0).seconds == 0.128


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
    step = forecast.forecast_step(run, "cuda", corpus=corpus)
    if not torch.cuda.is_available():
        assert step.seconds == pytest.approx(32 / (2.0 * forecast.DECODERS))
    assert "decoding" in step.by
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("cmp.scale.devices.device_name", lambda device: "NVIDIA H100")
    monkeypatch.setattr(decoding, "usable_cores", lambda: 8)
    assert forecast.forecast_step(run, "cuda", corpus=corpus).seconds == pytest.approx(32 / 14)
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
    assert "34% (from its kernels)" in said[0]
    assert "40% (assumed)" in said[1] and "another forward pass" not in said[1]
    assert "with another forward pass for micro-batches" in said[2]


def test_a_plan_takes_the_same_forecast_and_is_bound_by_decoding_too():
    """ViT-B-32 computes faster than 15 processes decode."""
    request = planner.PlanRequest("ViT-B-32", updates=5, gpu_hours=1.0)
    run = gpu_run("model.name=ViT-B-32", "model.start=random")
    assert planner.predict_step(request, run) == (
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
    assert forecast.forecast_step(run, "cpu").seconds == pytest.approx(seconds)
    assert "at the speed of a core" in forecast.forecast_step(run, "cpu").by
