"""Continual multimodal pretraining: training, merging, schedules, mixtures, streams, budgets.

The names below are the public API. They are imported when they are first used, so that
`import cmp` is quick.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cmp.budgets import Cost, step_cost, steps_for
    from cmp.config import RunConfig, Schedule
    from cmp.data import Corpus, load_data
    from cmp.errors import CmpError
    from cmp.evaluation import evaluate
    from cmp.experiments.api import run
    from cmp.merging.apply import merge
    from cmp.merging.files import merge_files
    from cmp.merging.policies import MergedWeights, TaskEnd
    from cmp.mixtures import MixtureSampler
    from cmp.models import create_model, load_model
    from cmp.registry import load_plugin, option_names, register
    from cmp.schedules import TaskSchedule, learning_rate, lr_scheduler
    from cmp.training import ForwardOutput, TrainState, UpdateMethod, train_step, train_task

__version__ = "0.2.0.dev0"

NUMERICS = 3
"""Part of every run's id. Raised by hand when a change may alter a run's result."""

_HOMES = {
    "cmp.budgets": ("Cost", "step_cost", "steps_for"),
    "cmp.config": ("RunConfig", "Schedule"),
    "cmp.data": ("Corpus", "load_data"),
    "cmp.errors": ("CmpError",),
    "cmp.evaluation": ("evaluate",),
    "cmp.experiments.api": ("run",),
    "cmp.merging.apply": ("merge",),
    "cmp.merging.files": ("merge_files",),
    "cmp.merging.policies": ("MergedWeights", "TaskEnd"),
    "cmp.mixtures": ("MixtureSampler",),
    "cmp.models": ("create_model", "load_model"),
    "cmp.registry": ("load_plugin", "option_names", "register"),
    "cmp.schedules": ("TaskSchedule", "learning_rate", "lr_scheduler"),
    "cmp.training": ("ForwardOutput", "TrainState", "UpdateMethod", "train_step", "train_task"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "NUMERICS", "CmpError", "Corpus", "Cost", "ForwardOutput", "MergedWeights", "MixtureSampler",
    "RunConfig", "Schedule", "TaskEnd", "TaskSchedule", "TrainState", "UpdateMethod",
    "create_model", "evaluate", "learning_rate", "load_data", "load_model", "load_plugin",
    "lr_scheduler", "merge", "merge_files", "option_names", "register", "run", "step_cost",
    "steps_for", "train_step", "train_task",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'cmp' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
