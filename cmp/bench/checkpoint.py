"""What a checkpoint costs, against the steps between two of them."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from cmp import checkpoints
from cmp.bench import networks, timing
from cmp.bench.networks import BF16, TASK
from cmp.bench.report import Report
from cmp.checkpoints import DEFAULT_EVERY, SCHEMA, CheckpointManager, Progress, RunState
from cmp.data import Corpus
from cmp.runner import machine_record
from cmp.training import build_adamw, train_task

COLUMNS = ("model", "% of the time", "10-90 %", "ms", "MB", f"ms of {DEFAULT_EVERY} steps")
BATCH = 64
"""Samples per batch, as in profile `cpu`: the shorter the steps, the more a checkpoint weighs."""


def checkpoint(names: list[str], corpus: Corpus, rounds: int, batch: int | None) -> Report:
    """Measure a checkpoint within a task, on this disk, and the steps that come between two."""
    rows = []
    for name in names:
        setting = networks.setting(name, corpus, batch or BATCH, DEFAULT_EVERY)
        state = networks.train_state(setting, BF16)
        optimizer = build_adamw(state.model, setting.config.optimizer)

        def steps(setting=setting, state=state, optimizer=optimizer) -> None:
            train_task(state, setting.pools, TASK, optimizer=optimizer)

        with tempfile.TemporaryDirectory(prefix="cmp-bench-") as folder:
            save = make_save(Path(folder), setting.config.to_dict(), state.model, optimizer)
            seconds = timing.interleaved(
                {"steps": steps, "save": save}, rounds, clock=time.perf_counter
            )
            megabytes = checkpoints.checkpoint_files(Path(folder))[0].stat().st_size / 1e6
        low, middle, high = 100 * np.quantile(seconds["save"] / seconds["steps"], [0.1, 0.5, 0.9])
        rows.append(
            {
                "model": name,
                "% of the time": float(middle),
                "10-90 %": f"{low:.2f}-{high:.2f}",
                "ms": 1e3 * float(np.median(seconds["save"])),
                "MB": megabytes,
                f"ms of {DEFAULT_EVERY} steps": 1e3 * float(np.median(seconds["steps"])),
            }
        )
    return Report("checkpoint", f"a checkpoint every {DEFAULT_EVERY} steps", COLUMNS, rows)


def make_save(
    folder: Path, tree: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer
) -> Callable[[], None]:
    """Return a function that saves the state as a run does, with two checkpoints kept.

    Args:
        folder: Where checkpoints go.
        tree: The run's config.
        model: The network.
        optimizer: Its optimizer.
    """
    manager = CheckpointManager("benchmark")
    manager.folder = folder

    def save() -> None:
        progress = Progress(
            SCHEMA, "benchmark", tree, TASK, DEFAULT_EVERY, [], 0.0, machine_record()
        )
        manager.save(RunState(progress, checkpoints.state_tensors(model, optimizer)))

    return save
