"""The recipe as a file of its own computes what the package computes."""

import re
import subprocess
import sys

import pytest
import torch
import yaml

from cmp import config, mixtures, models, training
from cmp.data import normalise, to_rgb
from cmp.errors import CmpError
from cmp.runs import launch, runner
from lab import chapters

PATH = chapters.BOOK / "recipe.py"
RECIPE = {
    "recipe": "default",
    "merging": {"weight": 0.25},
    "training": {"augment": False},
    "peak": 0.0048,
}
"""The settings of the package that the file spells out."""


def cells():
    """The parts of the file, without the lines of %% that divide them."""
    return re.split(r"^# %%.*\n", PATH.read_text("utf-8"), flags=re.MULTILINE)


def run_cells(some, namespace):
    for cell in some:
        exec(compile(cell, PATH, "exec"), namespace)


@pytest.mark.numbers
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_the_loop_ends_in_the_weights_of_the_package(tmp_path, corpus, monkeypatch, dtype):
    """On the package's batches, over two updates of twenty steps.

    In fp32, AdamW makes steps of full length of a gradient that is nothing but rounding, as that
    of the biases of keys. There are few such weights, and in fp64 none. The fp64 run begins with a
    logit scale beyond CLIP's bound, which magnifies rounding in fp32.
    """
    sizes = {"stream": {"tasks": 2}, "training": {"steps": 20, "batch": 16}}
    path = tmp_path / "short.yaml"
    path.write_text(yaml.safe_dump(config.profile("quick") | sizes))
    settings = launch.from_keywords(str(path), RECIPE | {"precision": "fp32"})
    pools = mixtures.task_pools(settings, corpus)
    tokens = models.tokenize(settings.model.name, tuple(corpus.texts)).long()

    def draw_batch(month, step):
        batch = mixtures.make_batch(settings, corpus, pools[month], month, step)
        pixels = normalise(to_rgb(batch.images), visual.image_mean, visual.image_std)
        return pixels.to(dtype), tokens[batch.texts]

    monkeypatch.setattr(sys, "argv", [PATH.name, str(path)])
    plain, parts = {}, cells()
    run_cells(parts[:-2], plain)  # up to the optimiser
    visual = plain["network"].to(dtype).visual
    start = models.load_model(settings.model, settings.seeds.init).to(dtype)
    if dtype == torch.float64:
        for network in (plain["network"], start):
            network.logit_scale.data.fill_(5)
    run_cells(parts[-2:], plain | {"draw_batch": draw_batch, "score": lambda month: month})

    monkeypatch.setattr(training, "normalise", lambda *given: normalise(*given).to(dtype))
    monkeypatch.setattr(runner.Run, "evaluate", lambda run, done: None)  # takes no fp64
    weights = runner.execute(settings, corpus, model=start).model.state_dict()
    own = plain["network"].state_dict()
    assert own.keys() == weights.keys()
    far = torch.cat([(own[key] - x).abs().flatten() for key, x in weights.items()])
    if dtype == torch.float64:
        assert far.max() < 1e-8
    else:
        assert (far > 1e-5).float().mean() < 1e-3


def test_data_that_are_missing_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("CMP_BUILD", str(tmp_path))
    monkeypatch.setattr(sys, "argv", [PATH.name, "gpu"])
    with pytest.raises(CmpError, match="63 of 63 datasets of 'fomo' are absent"):
        run_cells(cells(), {})


@pytest.mark.long
def test_the_file_runs_by_itself_and_its_model_learns():
    run = subprocess.run([sys.executable, PATH], capture_output=True, text=True, check=True)
    scores = re.findall(r"^month (\d): A_KA ([\d.]+), A_ZS ([\d.]+)$", run.stdout, re.MULTILINE)
    months, learned, kept = zip(*scores, strict=True)
    assert months == tuple("012345")
    assert all(0 < float(score) < 100 for score in learned + kept)
    assert float(learned[-1]) > float(learned[0]) + 10
