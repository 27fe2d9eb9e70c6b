"""Measure a training step against the same step of plain open_clip."""

import dataclasses
import itertools
from collections.abc import Callable

import numpy as np
import open_clip
import torch
from torch import nn

from cmp import budgets, models
from cmp.bench import networks, timing
from cmp.bench.networks import TASK
from cmp.bench.report import Report
from cmp.config import RunConfig
from cmp.data import NOISE, Corpus, augment, normalise
from cmp.embedded import packed
from cmp.scale.devices import product_rate
from cmp.seeds import torch_generator
from cmp.training import clamp_logit_scale, create_optimizer, make_train_state, train_step

RATE = 1e-4
COLUMNS = ("path", "times as fast", "ms", "samples/s", "GFLOP", "% of peak")


def our_stepper(run_config: RunConfig, corpus: Corpus, precision: str) -> Callable[[], None]:
    """Return a function that makes the next batch and takes a step of a run on it."""
    training = dataclasses.replace(run_config.training, precision=precision)
    state = make_train_state(dataclasses.replace(run_config, training=training), corpus)
    optimizer, numbered = create_optimizer(state), enumerate(networks.batches(run_config, corpus))

    def step() -> None:
        number, batch = next(numbered)
        train_step(state, optimizer, batch, TASK, number, RATE)

    return step


def plain_stepper(
    run_config: RunConfig, corpus: Corpus, model: models.Network
) -> Callable[[], None]:
    """Return a function that makes the next batch, augments it as a run does, and takes a step on
    it with open_clip's model and loss, and torch's AdamW."""
    tokens = models.tokenize(run_config.model.name, tuple(corpus.texts))
    loss_of, numbered = open_clip.ClipLoss(), enumerate(networks.batches(run_config, corpus))
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=RATE)
    model.train()

    def step() -> None:
        number, batch = next(numbered)
        generator = torch_generator("augment", 0, TASK, number)
        x = augment(batch.images, torch.rand(len(batch.rows), NOISE, generator=generator))
        x = normalise(x, model.visual.image_mean, model.visual.image_std)
        output = model(x, tokens[batch.texts])
        features = output["image_features"], output["text_features"]
        loss = loss_of(*features, output["logit_scale"])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, run_config.optimizer.clip)
        optimizer.step()
        clamp_logit_scale(model)

    return step


def measure(
    run_config: RunConfig, corpus: Corpus, rounds: int
) -> tuple[list[dict[str, object]], str]:
    """Return a row for each kind of step, of which plain open_clip's is the baseline, and a note on
    the model and its batches."""
    name = run_config.model.name
    plain = models.create_fused_model(name)
    steppers = {
        "plain fp32": plain_stepper(run_config, corpus, plain),
        "fp32": our_stepper(run_config, corpus, "fp32"),
        "bf16": our_stepper(run_config, corpus, "bf16"),
    }
    flops = {path: budgets.count_flops(step) for path, step in steppers.items()}
    # torch's counter misses fused attention on a CPU
    split = models.split_attention(models.create_fused_model(name))
    flops["plain fp32"] = budgets.count_flops(plain_stepper(run_config, corpus, split))
    seconds = timing.interleaved(steppers, rounds)
    rows, batch, peaks = [], run_config.training.batch, {}
    for path, times in seconds.items():
        dtype, middle = torch.bfloat16 if path == "bf16" else torch.float32, float(np.median(times))
        peaks[dtype] = peaks.get(dtype) or product_rate(dtype)
        rows.append(
            {
                "path": f"{name} {path}",
                "times as fast": timing.times_faster(seconds["plain fp32"], times),
                "ms": 1e3 * middle,
                "samples/s": batch / middle,
                "GFLOP": flops[path] / 1e9,
                "% of peak": 100 * flops[path] / middle / peaks[dtype],
            }
        )
    size = sum(parameter.numel() for parameter in plain.parameters())
    some = itertools.islice(networks.batches(run_config, corpus), 8)
    distinct = np.mean([len(batch.texts.unique()) for batch in some])
    note = (
        f"{name}: {size / 1e6:.1f} M parameters; batches of {batch} with "
        f"{distinct:.0f} distinct captions of at most {plain.context_length} "
        f"tokens; a vocabulary of {plain.token_embedding.num_embeddings:,} rows"
    )
    return rows, note


def step(names: list[str], rounds: int, batch: int | None) -> Report:
    """Measure our step in bf16 and fp32 against plain open_clip's in fp32, for each model.

    The vocabulary of an embedded model is part of the model, so plain open_clip uses it, too.
    """
    corpus, rows, notes = packed.load_embedded(), [], []
    for name in names:
        run_config = networks.configure_run(name, batch, "training.steps=1")
        measured, note = measure(run_config, corpus, rounds)
        rows += measured
        notes.append(note)
    return Report("step", "a training step", COLUMNS, rows, notes)
