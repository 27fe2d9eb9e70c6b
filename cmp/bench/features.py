"""Measure a step on stored image features against one that trains all weights."""

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F

from cmp import models
from cmp.arithmetic import autocast
from cmp.bench import networks, timing
from cmp.bench.report import Report
from cmp.config import Method, RunConfig
from cmp.data import Batch
from cmp.stored_features import StoredFeatures
from cmp.training import TrainState, train_step

CAPTIONS = (8, 16, 77)
"""Tokens per caption."""
ENCODED = 16
"""Images per call when encoding is timed."""
RATE = 1e-5
COLUMNS = ("step", "times as fast", "ms", "images/s")


def make_stepper(run_config: RunConfig, caption: int) -> Callable[[], object]:
    """Return a function that takes a step on one random batch.

    Args:
        run_config: The config. If its method stores views, the stored features are random, too.
        caption: Tokens per caption.
    """
    model, batch = models.create_model(run_config.model.name), run_config.training.batch
    noise, size = torch.Generator().manual_seed(0), models.preprocessing(model).size
    vocabulary: int = cast(Any, model).token_embedding.num_embeddings
    last = vocabulary - 1  # the end of a text is its largest token
    tokens = torch.randint(1, last, (batch, model.context_length), generator=noise)
    tokens[:, caption - 1] = last
    tokens[:, caption:] = 0
    rows, no_corpus = np.arange(batch), None
    state = TrainState(run_config, no_corpus, model, tokens)  # pyright: ignore[reportArgumentType]
    state.method.prepare(state)
    models.set_train_mode(model)
    images = torch.randint(0, 256, (batch, 3, size, size), generator=noise, dtype=torch.uint8)
    if views := run_config.method.views:
        width = models.encode_text(model, tokens[:1]).shape[1]
        table = F.normalize(torch.randn(views, batch, width, generator=noise), dim=-1)
        state.stored_features, images = StoredFeatures("", rows, table), images[:0]
    one = Batch(rows, images, torch.arange(batch))
    return lambda: train_step(state, state.optimizer, one, networks.TASK, 0, RATE)


def make_encoder(run_config: RunConfig) -> Callable[[], object]:
    """Return a function that encodes `ENCODED` random images, as when features are stored."""
    model = models.create_model(run_config.model.name).eval()
    size = models.preprocessing(model).size
    pixels = torch.randn(ENCODED, 3, size, size, generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def encode() -> None:
        with autocast(run_config.training.precision, pixels.device):
            models.encode_image(model, pixels)

    return encode


def features(names: list[str], rounds: int, batch: int | None) -> Report:
    """Measure, for each model and length of captions, a step on stored features against a full one,
    and the encoding of an image."""
    rows = []
    for name in names:
        run_config = networks.configure_run(name, batch)
        size = run_config.training.batch
        locked = dataclasses.replace(run_config, method=Method("locked-image", views=1))
        context = models.create_on_meta(name).context_length
        for caption in [n for n in CAPTIONS if n <= context]:
            steps = {"all weights": run_config, "stored features": locked}
            steppers = {word: make_stepper(each, caption) for word, each in steps.items()}
            seconds = timing.interleaved(steppers, rounds)
            rows += [
                {
                    "step": f"{name}, {caption} tokens, {word}",
                    "times as fast": timing.times_faster(seconds["all weights"], times),
                    "ms": 1e3 * float(np.median(times)),
                    "images/s": size / float(np.median(times)),
                }
                for word, times in seconds.items()
            ]
        times = timing.interleaved({"encode": make_encoder(run_config)}, rounds)["encode"]
        middle = float(np.median(times)) / ENCODED
        rows.append({"step": f"{name}, encoding", "ms": 1e3 * middle, "images/s": 1 / middle})
    notes = ["Encoding: milliseconds per image, once for each image and stored view."]
    return Report("features", "a step on stored image features", COLUMNS, rows, notes)
