"""How long runs will take, from what such runs took, or from a few steps measured now."""

import dataclasses
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from cmp import budgets, evaluation, methods, mixtures, models, runs, training
from cmp.budgets import counting
from cmp.config import Mixture, Model, Optimizer, RunConfig, Schedule, Seeds, Stream
from cmp.data import corpus as corpora
from cmp.errors import CmpError
from cmp.runs import store

STEPS = 4
"""Steps that are measured where no such run is stored; the first is not counted."""

CARD, PEAK, SHARE = "H100", 989e12, 0.4
"""A card, the bf16 FLOP/s of its data sheet, and the share of them that a training step is taken to
reach where nothing is measured."""

CLOCKS = {"cpu": time.process_time}
"""On one thread the processor's own time, which the work of others does not prolong; else wall."""


def on_card(config: RunConfig) -> float:
    """An estimate of a run's training in seconds of one `CARD`, from its FLOPs alone, evaluations
    apart: nothing is measured, and nothing need be here."""
    config = budgets.applied(config)
    cost = counting.cost(config)
    flops = config.stream.tasks * (config.training.steps * cost.step + cost.end)
    return flops / (PEAK * SHARE)


def seconds(configs: list[RunConfig], device: str = "cpu") -> list[float]:
    """The forecast of each run, in seconds of one core (or of the device)."""
    known = _known(device)
    found = []
    for each in configs:
        kind = _kind(each)
        if kind not in known:
            known[kind] = _measure(each, device)
        found.append(known[kind] * _steps(each))
    return found


def _steps(config: RunConfig) -> int:
    return config.stream.tasks * budgets.applied(config).training.steps


def _kind(config: RunConfig) -> RunConfig:
    """The same without what does not move the time of a step, evaluations shared out."""
    return dataclasses.replace(
        config,
        model=Model(config.model.name),
        stream=Stream(tasks=config.stream.tasks),
        mixture=Mixture(),
        schedule=Schedule(),
        optimizer=Optimizer(),
        seeds=Seeds(),
    )


def _known(device: str) -> dict[RunConfig, float]:
    """Seconds a step of stored runs on one thread, by kind: the median."""
    found: dict[RunConfig, list[float]] = {}
    for run_id in store.stored_ids():
        try:
            stored, run_config = store.about(run_id)
        except CmpError:  # damaged or of an older format: it says nothing, and is in nobody's way
            continue
        made = stored.provenance
        if made["threads"] == 1 and (made.get("device") == "cpu") == (device == "cpu"):
            found.setdefault(_kind(run_config), []).append(made["seconds"] / _steps(run_config))
    return {kind: float(np.median(times)) for kind, times in found.items()}


def _measure(config: RunConfig, device: str) -> float:
    """Seconds a step of such a run on one thread, all else shared out, from a few of its steps
    and one evaluation of each size; random weights take as long as any."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model = models.create(config.model.name).to(device)
        clock = CLOCKS.get(device, time.perf_counter)
        (step, end), asked = _step_seconds(config, model, clock), runs.evaluations(config)
        rest = end * config.stream.tasks
        rest += sum(
            count * _evaluation_seconds(config, model, size, clock) for size, count in asked
        )
        return step + rest / _steps(config)
    finally:
        torch.set_num_threads(threads)


def _step_seconds(
    config: RunConfig, model: nn.Module, clock: Callable[[], float]
) -> tuple[float, float]:
    """A step of the last task, the mean of a few; and what the method does at the task's end."""
    ends = []
    short = dataclasses.replace(
        config, training=dataclasses.replace(config.training, steps=STEPS, budget=None)
    )
    learner = methods.learner(short, corpora.of(config), model)
    pools = mixtures.task_pools(short, learner.corpus)
    training.train_task(
        learner, pools[-1], len(pools) - 1,
        after_step=lambda step, loss: ends.append((loss.item(), clock())),
    )  # fmt: skip
    last = ends[-1][1]
    return (last - ends[0][1]) / (STEPS - 1), clock() - last


def _evaluation_seconds(
    config: RunConfig, model: nn.Module, size: int | None, clock: Callable[[], float]
) -> float:
    """One evaluation on so many images a dataset, none for all."""
    started = clock()
    corpus, precision = corpora.of(config), config.training.precision
    evaluation.evaluate(model, config.model.name, corpus, subset=size, precision=precision)
    return clock() - started
