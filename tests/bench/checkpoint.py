"""Saves as a run makes them, for measurements."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from cmp.bench.networks import TASK
from cmp.runs import checkpoints
from cmp.runs.checkpoints import SCHEMA, CheckpointManager, Progress, RunState
from cmp.runs.machine import machine_record


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
