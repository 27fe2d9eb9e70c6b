"""Forecast how long runs take, from stored runs, from a few measured steps, or from FLOPs."""

import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from cmp import budgets, evaluation, mixtures, models
from cmp.config import Method, RunConfig
from cmp.data import load_data
from cmp.errors import CmpError, first_line
from cmp.registry import Option, get_option
from cmp.runs import store
from cmp.runs.runner import evaluation_sizes
from cmp.scale.execution import ExecutionConfig
from cmp.training import StepResult, create_optimizer, make_train_state, train_task

GIGA = 1e9
USABLE_MEMORY = 0.9
"""Fraction of a device's memory that a step may use."""
COPIES = 2
"""Copies of the network that EMA-Merge keeps besides the trained one; see
`cmp.merging.policies`."""
SAVES = 3
"""Checkpoints on the disk at a time: the last two, and the next one while it is written."""


class Device(NamedTuple):
    """The assumed properties of a device.

    Attributes:
        peak: FLOP/s of dense bf16 products, as stated by its maker.
        utilisation: The fraction of the peak that training reaches.
        memory: The memory in bytes.
        about: The source of the numbers.
    """

    peak: float
    utilisation: float
    memory: float
    about: str

    @property
    def speed(self) -> float:
        """The FLOP/s that training is assumed to reach."""
        return self.peak * self.utilisation


_CSV = pd.read_csv(Path(__file__).with_name("devices.csv"), index_col="name")
DEVICES = {row[0]: Device(*row[1:]) for row in _CSV.itertuples()}
"""Devices by name. 40% of an H100 is 4e14 FLOP/s, the rate for which the paper states its budget in
hours."""

ROUND_TIMES = (1, 2, 5, 10, 20, 30, 45)
UNITS = {"s": 1, "min": 60, "h": 3600, "days": 86400}
MEASURED_STEPS = 4
"""Steps to measure if no such run is stored; the first is not counted."""

_IRRELEVANT = ("model.start", "stream.", "mixture.", "schedule.", "optimizer.", "seeds.")
_IRRELEVANT += ("method.strength", "merging.weight")
"""Keys that do not affect the time of a step."""


def check_device(device: str) -> None:
    """Raise `CmpError` if torch cannot use a device, such as "cuda" without a GPU."""
    models.check_device_name(device)
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = first_line(error)
        raise CmpError(f"device {device!r}: cannot be used here ({reason}); choose cpu") from error


def training_flops(run_config: RunConfig) -> float:
    """Return the FLOPs of a run's training, without evaluations."""
    run_config, cost = budgets.apply_budget(run_config), budgets.method_cost(run_config)
    return sum(steps * cost.step + cost.end for steps in run_config.steps)


def device_name(device: str) -> str:
    """Return the name of a device in a run's provenance: "cpu", or the name of the GPU."""
    return "cpu" if device == "cpu" else torch.cuda.get_device_name(device)


def device_facts(device: str) -> Device:
    """Return the assumed properties of a device: a core, or the GPU of this name. An unlisted GPU
    is treated as an H100."""
    if device == "cpu":
        return DEVICES["core"]
    name = device_name(device).lower().replace(" ", "-")
    return next((facts for key, facts in DEVICES.items() if key in name), DEVICES["h100"])


def forecast_sentence(run_config: RunConfig, device: str = "cuda") -> str:
    """Return how long a run's training may take on a device, without measuring. A missing GPU is
    replaced by an H100."""
    is_here = device == "cpu" or torch.cuda.is_available()
    facts = device_facts(device) if is_here else DEVICES["h100"]
    return (
        f"about {round_time(training_flops(run_config) / facts.speed)} of training, estimated "
        f"from FLOPs ({facts.about}), plus time for reading images and evaluations"
    )


def round_time(seconds: float) -> str:
    """Return a time rounded, by ratio, to a scale of round times such as "20 s" and "2 min"."""
    ladder = {f"{step} {unit}": step * size for unit, size in UNITS.items() for step in ROUND_TIMES}
    return min(ladder, key=lambda words: abs(math.log(ladder[words] / max(seconds, 0.1))))


def forecast_seconds(configs: list[RunConfig], device: str = "cpu") -> list[float]:
    """Return the forecast of each run, in seconds of one core or of a GPU.

    It is based on stored runs of the same kind. If there are none, a few steps of an embedded model
    are measured. For other models, measuring would take minutes, so FLOPs are used.
    """
    if not configs:  # no need to read the store
        return []
    seconds, families = _stored_step_seconds(device), models.family_names()
    for run_config in configs:
        if (key := _timing_key(run_config)) not in seconds:
            is_embedded = run_config.model.name in families
            seconds[key] = (_measure_step if is_embedded else _estimate_step)(run_config, device)
    return [seconds[_timing_key(each)] * budgets.total_steps(each) for each in configs]


def _timing_key(run_config: RunConfig) -> str:
    """Return everything that the time of a step depends on, including its share of evaluations, as
    text."""
    changes = run_config.changes().items()
    relevant = {key: value for key, value in changes if not key.startswith(_IRRELEVANT)}
    return json.dumps([run_config.stream.tasks, relevant], sort_keys=True)


def _stored_step_seconds(device: str) -> dict[str, float]:
    """Return the median seconds per step of stored runs on one thread, by timing key."""
    seconds: dict[str, list[float]] = {}
    for run_id in store.stored_ids():
        try:
            record, run_config = store.load_record(run_id)
        except CmpError:  # damaged, or in an older format
            continue
        provenance = record.provenance
        if provenance["threads"] == 1 and provenance.get("device") == device_name(device):
            per_step = provenance["seconds"] / budgets.total_steps(run_config)
            seconds.setdefault(_timing_key(run_config), []).append(per_step)
    return {key: float(np.median(values)) for key, values in seconds.items()}


def _estimate_step(run_config: RunConfig, device: str) -> float:
    """Return the seconds of a step estimated from its FLOPs, without evaluations."""
    return training_flops(run_config) / device_facts(device).speed / budgets.total_steps(run_config)


def _measure_step(run_config: RunConfig, device: str) -> float:
    """Return the seconds per step of a run on one thread, including each step's share of everything
    else.

    A few steps and one evaluation of each size are measured, with random weights.
    """
    name, precision = run_config.model.name, run_config.training.precision
    # on one thread, use CPU time, which other processes do not affect
    clock = time.process_time if device == "cpu" else time.perf_counter
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        corpus, model = load_data(run_config.data), models.create_model(name).to(device)
        step, end = _step_seconds(run_config, model, device, clock)
        others = end * run_config.stream.tasks
        evaluations = range(run_config.stream.tasks + 1)
        sizes = [size for done in evaluations for size in evaluation_sizes(run_config, done)]
        for size in set(sizes):
            started = clock()
            evaluation.evaluate(model, name, corpus, subset=size, precision=precision)
            others += sizes.count(size) * (clock() - started)
        return step + others / budgets.total_steps(run_config)
    finally:
        torch.set_num_threads(threads)


def _step_seconds(
    run_config: RunConfig, model: torch.nn.Module, device: str, clock: Callable[[], float]
) -> tuple[float, float]:
    """Return the seconds of a step of the last task, and of the method's work at the end of a
    task."""
    open_ended = {"budget": None, "passes": None, "task_steps": ()}
    training = dataclasses.replace(run_config.training, steps=MEASURED_STEPS, **open_ended)
    short = dataclasses.replace(run_config, training=training)
    corpus = load_data(run_config.data)
    state = make_train_state(short, corpus, model, device, ExecutionConfig())
    pools, ends = mixtures.task_pools(short, state.corpus), []

    def after_step(step: int, result: StepResult) -> None:
        result.loss.item()  # waits for the device
        ends.append(clock())

    train_task(state, pools[-1], len(pools) - 1, after_step=after_step)
    return (ends[-1] - ends[0]) / (MEASURED_STEPS - 1), clock() - ends[-1]


def memory_account(name: str, batch: int, method: Method) -> dict[str, int]:
    """Return the bytes of a training step in fp32 by purpose, see `cmp.budgets.memory_account`."""
    return _cached_account(name, batch, method, get_option("method", method.name))


@functools.cache
def _cached_account(name: str, batch: int, method: Method, option: Option) -> dict[str, int]:
    state = budgets.shape_state(name, method, models.create_on_meta(name))
    return budgets.memory_account(state, batch)


def checkpoint_bytes(run: RunConfig) -> int:
    """Return the bytes of a run's checkpoints on the disk, treating every merge as EMA-Merge."""
    parts = memory_account(run.model.name, run.training.batch, run.method)
    copies = 1 + COPIES * (run.merging.policy != "none")
    return SAVES * (copies * parts["weights"] + parts["optimizer"])


def step_memory(run: RunConfig) -> float:
    """Return the bytes at the peak of a run's step.

    In bf16, activations take half the bytes of fp32. ViT-B-16 at batch 512 then takes 46.9 GB;
    Table 4 says 46.6.
    """
    parts = memory_account(run.model.name, run.training.batch, run.method)
    saved = parts["activations"] / 2 if run.training.precision == "bf16" else 0.0
    return sum(parts.values()) - saved


def measured_memory(run_config: RunConfig) -> float:
    """Return the peak bytes of two fp32 steps on this machine's GPU."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    name, size = run_config.model.name, run_config.training.batch
    state = budgets.shape_state(name, run_config.method, models.create_model(name).cuda())
    needs_pool = get_option("method", run_config.method.name).facts["needs_pool"]
    optimizer = create_optimizer(state)
    for _ in range(2):
        output = budgets.forward_shapes(state, size, size // 3 * needs_pool)
        loss = budgets.total_loss(state, output)
        optimizer.zero_grad()
        loss.backward()
        state.method.step(state, optimizer)
    return torch.cuda.max_memory_allocated()
