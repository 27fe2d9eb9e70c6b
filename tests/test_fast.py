"""The fast path is the same training as plain open_clip's; how its speed is measured."""

import copy
import io
import itertools
import json

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from cmp import arithmetic, budgets, cli, evaluation, mixtures, models, schedules, training
from cmp.bench import gpu, networks, pictures, step, timing
from cmp.bench.networks import TASK
from cmp.config import RunConfig
from cmp.data import NOISE, Corpus, augment, colour_map, normalise
from cmp.errors import CmpError
from cmp.scale import compiling, devices
from cmp.seeds import torch_generator
from cmp.training import train_task

run = CliRunner().invoke


def nano(batch: int, steps: int) -> RunConfig:
    settings = f"training.steps={steps}", "training.precision=fp32"
    return networks.configure_run("bench-nano", batch, *settings)


def fast(
    run_config: RunConfig, corpus: Corpus, double: bool = False
) -> tuple[nn.Module, torch.Tensor]:
    """The network after one task of `training.train_task`, and the losses."""
    state, losses = training.make_train_state(run_config, corpus), []
    if double:
        state.model.double()
    pools = mixtures.task_pools(run_config, corpus)[TASK]
    train_task(state, pools, TASK, lambda _, result: losses.append(result.loss))
    return state.model, torch.stack(losses)


def plain_reference(run_config: RunConfig, corpus: Corpus) -> tuple[nn.Module, torch.Tensor]:
    """The same task in float64 with open_clip's model and loss, and torch's AdamW as it comes."""
    model = models.create_fused_model("bench-nano")
    tokens = models.tokenizer("bench-nano")(corpus.texts)
    model.double().train()
    recipe = run_config.optimizer
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices}, {"params": others, "weight_decay": 0.0}],
        betas=(recipe.beta1, recipe.beta2), eps=recipe.eps, weight_decay=recipe.weight_decay,
    )  # fmt: skip
    losses, steps = [], run_config.training.steps
    for number, batch in enumerate(itertools.islice(networks.batches(run_config, corpus), steps)):
        generator = torch_generator("augment", 0, TASK, number)
        x = augment(batch.images, torch.rand(len(batch.rows), NOISE, generator=generator))
        x = normalise(x, model.visual.image_mean, model.visual.image_std).double()
        output = model(x, tokens[batch.texts])
        features = output["image_features"], output["text_features"]
        loss = open_clip.ClipLoss()(*features, output["logit_scale"])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        for group in optimizer.param_groups:
            group["lr"] = schedules.learning_rate(run_config.schedule, steps, TASK, number)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, np.log(100))
        losses.append(loss.detach())
    return model, torch.stack(losses)


@pytest.mark.numbers
def test_colours_are_what_happens_one_after_the_other():
    uniform = torch.Generator().manual_seed(0)
    rgba = 255 * torch.rand(5, 4, 6, 7, generator=uniform)
    rgba[:, :3] *= rgba[:, 3:] / 255
    background = torch.rand(5, 3, 1, generator=uniform)
    contrast, brightness, saturation = torch.rand(3, 5, 1, 1, generator=uniform)
    mix, offset = colour_map(background, contrast, brightness, saturation)
    x = rgba[:, :3] / 255 + (1 - rgba[:, 3:] / 255) * background[..., None]
    x = x * contrast[..., None] + brightness[..., None]
    grey = x.mean(1, keepdim=True)
    expected = grey + saturation[..., None] * (x - grey)
    torch.testing.assert_close((mix @ rgba.flatten(2) + offset).view_as(x), expected)


@pytest.mark.numbers
def test_steps_are_plain_open_clips(corpus, monkeypatch):
    run_config = nano(batch=8, steps=4)
    assert run_config.optimizer.weight_decay > 0
    plain, expected = plain_reference(run_config, corpus)
    monkeypatch.setattr(training, "normalise", lambda *given: normalise(*given).double())
    model, losses = fast(run_config, corpus, double=True)
    torch.testing.assert_close(losses, expected, atol=1e-8, rtol=0)

    weights, ours = models.split_attention(plain).state_dict(), model.state_dict()
    assert weights.keys() == ours.keys()
    for key in weights:
        torch.testing.assert_close(ours[key], weights[key], atol=1e-8, rtol=0, msg=key)


@pytest.mark.numbers
def test_changed_weights_are_scored_anew(corpus):
    """Also where the change goes past autograd's count of changes."""
    model = models.create_model("tiny", 0)
    first = evaluation.evaluate(model, "tiny", corpus, subset=16)
    for change in ("visual.trunk.norm.weight", "token_embedding.weight"):
        weight = model.get_parameter(change)
        weight.data.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
        now = evaluation.evaluate(model, "tiny", corpus, subset=16)
        of_a_copy = evaluation.evaluate(copy.deepcopy(model), "tiny", corpus, subset=16)
        np.testing.assert_array_equal(now.hits["hit"], of_a_copy.hits["hit"])
        assert (now.hits["answer"] != first.hits["answer"]).any()
        first = now


def test_alternatives_take_turns():
    calls = []
    alternatives = {name: lambda name=name: calls.append(name) for name in "abc"}
    seconds = timing.interleaved(alternatives, rounds=3)
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab"
    assert {name: len(rounds) for name, rounds in seconds.items()} == dict.fromkeys("abc", 3)


def test_ratios_are_taken_within_rounds():
    """A machine that is ten times slower in some rounds changes nothing."""
    weather = np.array([1.0, 10.0, 1.0, 10.0, 1.0])
    ratio = timing.times_faster(3 * weather, 2 * weather)
    assert (ratio.low, ratio.median, ratio.high) == pytest.approx((1.5, 1.5, 1.5))


@pytest.mark.long
def test_flops_of_a_step(corpus):
    """Backward is twice forward, and pairs of distinct captions save what they should."""
    run_config = nano(batch=32, steps=1)
    batch = next(networks.batches(run_config, corpus))
    tokens = models.tokenizer("bench-nano")(corpus.texts)
    plain = models.split_attention(models.create_fused_model("bench-nano"))
    full, less = map(
        budgets.count_flops,
        (
            step.plain_stepper(run_config, corpus, plain),
            step.our_stepper(run_config, corpus, "fp32"),
        ),
    )
    share = models.pack_texts(tokens[batch.texts.unique()])[0].numel() / (32 * 16)
    text = 6 * 32 * 16 * 3 * 12 * 128**2  # three layers' matrices
    assert 1 < full / (text + 6 * 32 * 17 * 4 * 12 * 128**2) < 1.1  # and four of the image's
    assert share < 0.9
    assert (full - less) / (text * (1 - share)) == pytest.approx(1, abs=0.1)


@pytest.mark.long
def test_bench_step_from_a_shell(corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("CMP_BUILD", str(tmp_path))
    result = run(cli.app, ["bench", "step", "--model", "tiny", "--rounds", "2", "--batch", "8"])
    assert result.exception is None
    for words in ("tiny plain fp32", "tiny bf16", "distinct captions"):
        assert words in result.stdout
    report = json.loads((tmp_path / "bench" / "step.json").read_text())
    assert [row["path"] for row in report["rows"]] == ["tiny plain fp32", "tiny fp32", "tiny bf16"]
    assert report["rows"][0]["times as fast"]["median"] == 1
    assert report["machine"]["threads"] == 1
    assert report["machine"]["torch"] == torch.__version__


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["stepp"], ["stepp", "features"]),
        (["step", "--model", "tinny"], ["tinny", "tiny"]),
        (["step", "--model", "ViT-B-16"], ["224 pixels", "32"]),
        pytest.param(
            ["gpu"], ["CUDA"],
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)  # fmt: skip
def test_misuse_is_refused(arguments, words, corpus):
    error = run(cli.app, ["bench", *arguments]).exception
    assert isinstance(error, CmpError)
    assert all(word in str(error) for word in words)


@pytest.mark.long
def test_the_gpu_benchmark_without_a_gpu(corpus, monkeypatch, tmp_path):
    """Everything but the device itself, on embedded images and on JPEGs."""
    for name, value in {"DEVICE": "cpu", "STEPS": 1, "RUN_STEPS": 2}.items():
        monkeypatch.setattr(gpu, name, value)
    monkeypatch.setattr(compiling, "BACKEND", "eager")
    monkeypatch.setattr(arithmetic, "lacks_bf16_kernels", lambda kind: False)  # dynamo needs it
    monkeypatch.setattr(compiling, "LAUNCH_BOUND", 0)
    monkeypatch.setitem(devices.SIDE, "cpu", 64)  # bf16 is emulated here
    monkeypatch.setattr(networks, "LARGE", "bench-nano")
    rows = gpu.measure_all(["tiny", "bench-nano"], corpus, 1, 12)
    steps, tasks = rows[:5], rows[5:]
    assert [row["path"] for row in steps] == [
        "tiny fp32", "tiny bf16", "tiny bf16, compiled", "bench-nano bf16",
        "bench-nano bf16, compiled",
    ]  # fmt: skip
    assert all(row["% of peak"] > 0 for row in steps)
    assert [row["path"] for row in tasks] == [f"{row['path']}, a run" for row in steps[3:]]
    assert all(row["samples/s"] == pytest.approx(12e3 / row["ms a step"]) for row in rows)
    for name in ("tiny", "bench-nano"):
        _, data = gpu.prepare(name, corpus, 4, tmp_path)
        assert data.in_files == (name == "bench-nano")


def test_a_real_model_is_measured_in_bf16():
    assert gpu.paths_of(networks.LARGE) == ["bf16", "bf16, compiled"]


def test_captions_are_as_long_as_they_say(tmp_path):
    for captions, mean in (("short", 24), ("long", 77)):
        data = pictures.load_collection(tmp_path / captions, 48, captions)
        lengths = models.tokenizer("ViT-B-16")(data.texts).argmax(1) + 1
        assert lengths.float().mean() == pytest.approx(mean, abs=2)
        assert len(data.texts) == 48
        assert sorted(set(data.table["dataset"])) == sorted(pictures.SETS)


def test_generated_pictures_are_as_large_as_they_should_be(tmp_path, corpus):
    run_config, data = gpu.prepare("bench-nano", corpus, 4, tmp_path, pixels=(500, 375))
    assert Image.open(io.BytesIO(data.images.read(0))).size == (500, 375)
    usual, _ = gpu.prepare("bench-nano", corpus, 4, tmp_path)
    assert usual.data != run_config.data
