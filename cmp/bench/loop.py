"""Measure the training loop against its bare core, for the cost of batches, augmentation, schedule
and checks."""

from collections.abc import Callable
from itertools import islice

import numpy as np
import torch
from torch import nn

from cmp import models
from cmp.arithmetic import autocast
from cmp.bench import networks, timing
from cmp.bench.networks import BF16, TASK, Setting
from cmp.bench.report import Report
from cmp.data import Corpus, augment, normalise
from cmp.errors import CmpError
from cmp.losses import contrastive_loss
from cmp.seeds import torch_generator
from cmp.training import build_adamw, train_task

STEPS = 8
"""Steps per task, which is the unit that is timed."""
COLUMNS = ("model", "loop / bare", "ms a step", "bare ms a step")


def make_loop(setting: Setting) -> Callable[[], None]:
    """Return a function that trains one task with `training.train_task`."""
    state = networks.train_state(setting, BF16)
    return lambda: train_task(state, setting.pools, TASK)


def make_bare(setting: Setting) -> Callable[[], None]:
    """Return a function that takes as many steps on prepared batches: forward, backward, clipped
    AdamW."""
    model, tokens = networks.network(setting, BF16)
    inputs = []
    for step, batch in enumerate(islice(setting.batches(), setting.config.training.steps)):
        x = augment(batch.images, torch_generator("augment", 0, TASK, step))
        x = normalise(x, model.visual.image_mean, model.visual.image_std)
        distinct, place = batch.texts.unique(return_inverse=True)
        inputs.append((x, tokens[distinct], place))

    def steps() -> None:
        optimizer = build_adamw(model, setting.config.optimizer)
        for group in optimizer.param_groups:
            group["lr"] = networks.RATE
        for x, text_tokens, place in inputs:
            with autocast(BF16.precision, torch.device("cpu")):
                image = models.encode_image(model, x)
                text = models.encode_text(model, text_tokens)[place]
            loss = contrastive_loss(image, text, model.logit_scale)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), setting.config.optimizer.clip)
            optimizer.step()

    return steps


def loop(names: list[str], corpus: Corpus, rounds: int, batch: int | None) -> Report:
    """Measure `training.train_task` against bare steps in bf16.

    Raises:
        CmpError: A model takes images of a different size from those stored.
    """
    rows = []
    for name in names:
        setting = networks.setting(name, corpus, batch, STEPS)
        if setting.side != corpus.images.shape[-1]:
            raise CmpError(
                f"--model: {name!r} takes images of a different size, and this benchmark does not "
                "resize them; choose another model"
            )
        calls = {"bare": make_bare(setting), "loop": make_loop(setting)}
        seconds = timing.interleaved(calls, rounds)
        rows.append(
            {
                "model": name,
                "loop / bare": timing.times_faster(seconds["loop"], seconds["bare"]),
                "ms a step": 1e3 / STEPS * float(np.median(seconds["loop"])),
                "bare ms a step": 1e3 / STEPS * float(np.median(seconds["bare"])),
            }
        )
    return Report("loop", "the training loop", COLUMNS, rows)
