"""Measure the cost of a checkpoint relative to the time between two of them."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from cmp.bench import networks, timing
from cmp.bench.networks import TASK
from cmp.bench.report import Report
from cmp.data import Corpus
from cmp.runs import checkpoints
from cmp.runs.checkpoints import INTERVAL, SCHEMA, CheckpointManager, Progress, RunState
from cmp.runs.machine import machine_record
from cmp.training import train_task

COLUMNS = ("model", "% of the time", "ms", "10-90 %", "ms until it goes on", "MB")


def checkpoint(names: list[str], corpus: Corpus, rounds: int, batch: int | None) -> Report:
    """Measure a checkpoint within a task on this disk: its total time, and how long training waits
    if a thread writes it."""
    rows = []
    for name in names:
        setting = networks.setting(name, corpus, batch, steps=1)
        state = networks.train_state(setting, "bf16")
        train_task(state, setting.pools, TASK)  # creates moments
        with (
            tempfile.TemporaryDirectory(prefix="cmp-bench-") as folder,
            CheckpointManager("benchmark") as manager,
        ):
            manager.folder, tree = Path(folder), setting.config.to_dict()
            save = make_save(manager, tree, state.model, state.optimizer)

            def go_on(manager=manager, save=save) -> None:
                manager.in_background = True
                save()
                manager.in_background = False

            seconds = timing.interleaved(
                {"whole": save, "waits": go_on}, rounds, clock=time.perf_counter
            )
            manager.finish()
            megabytes = checkpoints.checkpoint_files(manager.folder)[0].stat().st_size / 1e6
        low, middle, high = 1e3 * np.quantile(seconds["whole"], [0.1, 0.5, 0.9])
        rows.append(
            {
                "model": name,
                "% of the time": 100 * float(middle) / 1e3 / (INTERVAL + float(middle) / 1e3),
                "ms": float(middle),
                "10-90 %": f"{low:.1f}-{high:.1f}",
                "ms until it goes on": 1e3 * float(np.median(seconds["waits"])),
                "MB": megabytes,
            }
        )
    return Report("checkpoint", f"a checkpoint every {INTERVAL:.0f} s", COLUMNS, rows)


def make_save(
    manager: CheckpointManager,
    tree: dict[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> Callable[[], None]:
    """Return a function that saves the state as a run does, keeping two checkpoints.

    Args:
        manager: Saves the checkpoints.
        tree: The run's config.
        model: The network.
        optimizer: The network's optimiser.
    """

    def save() -> None:
        progress = Progress(SCHEMA, "benchmark", tree, TASK, 1, [], 0.0, machine_record())
        manager.save(RunState(progress, checkpoints.state_tensors(model, optimizer)))

    return save
