"""Configs and batches of the runs whose steps benchmarks measure.

`bench-nano`, `bench-micro` and `bench-mid` are plain vision transformers used only here. Importing
this module registers them with open_clip.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path

import open_clip

from cmp import config, mixtures
from cmp.config import RunConfig
from cmp.data import Batch, Corpus

CONFIGS = Path(__file__).resolve().parent / "model_configs"
open_clip.add_model_config(CONFIGS)

LARGE = "ViT-B-16"
"""A real model, which needs a GPU."""
SIZES = {"bench-mid": 64, LARGE: 512}
"""Samples per step, if not `SIZE`."""
SIZE = 128
TASK = 1
"""The first task with a buffer, in which each pool gives a third of the batch."""


def configure_run(name: str, batch: int | None, *settings: str, profile: str = "cpu") -> RunConfig:
    """Return the config of a benchmark's run, which starts from random weights.

    Args:
        name: The model's name.
        batch: Samples per batch; if None, the value in `SIZES`.
        settings: More settings, as key=value.
        profile: The profile that they change.
    """
    size = batch or SIZES.get(name, SIZE)
    given = [f"model.name={name}", "model.start=random", f"training.batch={size}", *settings]
    return config.parse(config.override(config.profile(profile), given), "benchmark")


def batches(run_config: RunConfig, corpus: Corpus) -> Iterator[Batch]:
    """Yield the batches of the task endlessly."""
    pools = mixtures.task_pools(run_config, corpus)[TASK]
    for step in itertools.count():
        yield mixtures.make_batch(run_config, corpus, pools, TASK, step)
