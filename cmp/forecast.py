"""How long runs will take, from what such runs took, or from a few steps measured now."""

import dataclasses
import time

import numpy as np

from cmp import evaluation, models, runs, store, training
from cmp.config import RunConfig
from cmp.data import corpus as corpora

STEPS = 4
"""Steps that are measured where no such run is stored; the first is not counted."""


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
    return config.stream.tasks * config.training.steps


def _kind(config: RunConfig) -> tuple:
    """What decides the time of a step, with the evaluations' share in it."""
    return (config.model.name, config.training, config.stream.tasks, config.evaluation)


def _known(device: str) -> dict[tuple, float]:
    """Seconds a step of stored runs, by kind: the median."""
    found: dict[tuple, list[float]] = {}
    for run_id in store.stored_ids():
        stored, run_config = store.about(run_id)
        made = stored.provenance
        if (made["device"] == "cpu") == (device == "cpu"):
            found.setdefault(_kind(run_config), []).append(made["seconds"] / _steps(run_config))
    return {kind: float(np.median(times)) for kind, times in found.items()}


def _measure(config: RunConfig, device: str) -> float:
    """Seconds a step of such a run, evaluations shared out, from a few of its steps and one
    evaluation of each size."""
    corpus, steps = corpora.load(), []
    short = dataclasses.replace(config, training=dataclasses.replace(config.training, steps=STEPS))
    model = models.load(config.model, config.seeds.init).to(device)
    tokens = models.tokens(config.model.name, corpus.texts)
    pools = runs.task_pools(short, corpus)
    training.train_task(
        model, short, corpus, tokens, pools[-1], len(pools) - 1,
        after_step=lambda step, loss: steps.append((loss.item(), time.perf_counter())),
    )  # fmt: skip
    total = _steps(config) * (steps[-1][1] - steps[0][1]) / (STEPS - 1)
    for size, count in runs.evaluations(config):
        started = time.perf_counter()
        evaluation.evaluate(
            model, config.model.name, corpus, subset=size, precision=config.training.precision
        )
        total += count * (time.perf_counter() - started)
    return total / _steps(config)
