"""Forecast how long runs take: from stored runs, measured steps, or FLOPs and the speed of
decoding."""

import contextlib
import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable
from typing import NamedTuple, cast

import numpy as np
import pandas as pd
import torch

from cmp import budgets, evaluation, mixtures, models, starts
from cmp.config import Method, RunConfig
from cmp.data import Corpus, ImageFiles, load_data
from cmp.errors import CmpError
from cmp.registry import Option, get_option
from cmp.runs import logs, store
from cmp.runs.runner import evaluation_sizes
from cmp.scale import processes
from cmp.scale.decoding import worker_count
from cmp.scale.devices import DEVICES, device_name, is_present, product_rate
from cmp.scale.execution import ExecutionConfig
from cmp.schedules import Schedule
from cmp.seeds import numpy_generator
from cmp.towers import tower_blocks
from cmp.training import StepResult, make_train_state, train_task

GIGA = 1e9
USABLE_MEMORY = 0.9
"""Fraction of a device's memory that a step may use."""
COPIES = 2
"""Copies of the network that EMA-Merge keeps besides the trained one; see
`cmp.merging.policies`."""
SAVES = 3
"""Checkpoints on the disk at a time: the last two, and the next one while it is written."""


DECODED, DECODERS = 384.0, 15
"""Images that a core is assumed to decode per second (JPEGs of 500 x 375 to 224 x 224, as measured
on one core), and the decoding processes that are assumed beside a GPU that is not on this
machine."""
DECODED_IMAGES = 32
"""Images that are decoded to measure how many a core decodes per second."""
MEASURED, UNCOUNTED = 50, 5
"""Steps of a run whose measured time replaces the forecast, and the steps before them that do not
count, such as those in which towers are compiled."""
PAUSE = 20
"""A time between two steps of a log that is longer than this many steps was a pause."""

UNITS = {"s": 1, "min": 60, "h": 3600, "days": 86400}
MEASURED_STEPS, CARD_STEPS = 4, 10
"""Steps to measure of an embedded model if no such run is stored, of which the first is not
counted, and of any model on a GPU, after `UNCOUNTED` others."""

_IRRELEVANT = ("model.start", "stream.", "mixture.", "schedule.", "optimizer.", "seeds.")
_IRRELEVANT += ("method.strength", "merging.weight")
"""Keys that do not affect the time of a step."""


class StepForecast(NamedTuple):
    """A forecast of a training step.

    Attributes:
        seconds: Seconds per step, without evaluations.
        by: How it was predicted or measured.
    """

    seconds: float
    by: str


def estimate_step(
    run_config: RunConfig,
    device: str,
    execution: ExecutionConfig | None = None,
    corpus: Corpus | None = None,
    run_id: str = "",
) -> StepForecast:
    """Estimate the time of a run's step, without evaluations.

    It is measured if the run has a log of enough steps, or on a GPU that is here if the data are,
    too. Otherwise it is predicted: the time of the step's FLOPs, or that of decoding its images if
    that is longer. Micro-batches and recomputed activations each take another forward pass.

    Args:
        run_config: The run's config, with the steps that its budget or passes give.
        device: One of `DEVICES`, which need not be here, or "cpu" or "cuda". A missing GPU is
            replaced by an H100 with `DECODERS` processes that decode.
        execution: How steps are computed.
        corpus: The run's data, if they are on this machine. For a GPU that is not here, some of the
            images are decoded to measure how long that takes. Otherwise, it is assumed.
        run_id: The run's id, that of its config as given; "" if it is not known.
    """
    if run_id and (measured := measured_step_seconds(logs.read_log(logs.log_path(run_id)))):
        return StepForecast(measured, f"measured over {MEASURED} steps of this run")
    execution, name = execution or ExecutionConfig(), run_config.model.name
    is_here = device not in ("cpu", *DEVICES) and is_present(device)
    if is_here and corpus and not run_config.method.views:  # storing features takes long
        # what does not fit or cannot be computed is said by other checks
        with contextlib.suppress(CmpError, torch.OutOfMemoryError):
            return _measure_on_card(run_config, corpus, device, execution)
    images, count = math.inf, processes.world_size()
    batch = math.ceil(run_config.training.batch / count)
    if device not in ("cpu", "core") and name not in starts.family_names():
        images = decoding_rate(corpus, run_config) if corpus and corpus.in_files else DECODED
        images *= worker_count(torch.device(device)) if is_here else DECODERS
    is_split = (execution.micro_batch or batch) < batch
    again = {"micro-batches": is_split, "activations": execution.checkpoint_activations}
    flops = step_flops(run_config)
    # a forward pass is a third of a full step
    flops += sum(again.values()) * budgets.full_cost(run_config).step / 3
    speed, words = _assumed_speed(device, is_here)
    if batch / images > flops / count / speed:
        return StepForecast(batch / images, f"predicted from decoding {images:,.0f} images/s")
    passes = " and ".join(key for key, is_repeated in again.items() if is_repeated)
    passes = f", with another forward pass for {passes}" if passes else ""
    return StepForecast(flops / count / speed, f"predicted from FLOPs{passes} at {words}")


def _assumed_speed(device: str, is_here: bool) -> tuple[float, str]:
    """Return the FLOP/s that training is assumed to reach on a device, and what they are."""
    if is_here:
        rate = product_rate(torch.bfloat16, device)
        about = f"{device_name(device)} ({rate / 1e12:.3g} TFLOP/s by a large product)"
        facts = DEVICES["h100"]._replace(peak=rate, about=about)
    else:
        facts = DEVICES.get("core" if device == "cpu" else device, DEVICES["h100"])
    if facts is DEVICES["core"]:
        return facts.speed, f"the speed of {facts.about}"
    share = f"an assumed {facts.utilisation:.0%} of the peak of {facts.about}"
    return facts.speed, f"{share}, where public runs took two to three times as long"


_CARD_SECONDS: dict[tuple[str, str, ExecutionConfig], float] = {}


def _measure_on_card(
    run_config: RunConfig, corpus: Corpus, device: str, execution: ExecutionConfig
) -> StepForecast:
    """Measure a few steps of a run on a GPU, with random weights, and one large product."""
    key = (_timing_key(run_config), device, execution)  # a study has many runs of a kind
    if key not in _CARD_SECONDS:
        model, clock = models.create_model(run_config.model.name).to(device), time.perf_counter
        steps = UNCOUNTED + CARD_STEPS
        _CARD_SECONDS[key], _ = _step_seconds(
            run_config, corpus, model, device, clock, execution, steps, UNCOUNTED
        )
    rate = product_rate(torch.bfloat16, device)
    share = step_flops(run_config) / processes.world_size() / _CARD_SECONDS[key] / rate
    by = f"measured over {CARD_STEPS} steps on {device_name(device)}"
    return StepForecast(_CARD_SECONDS[key], f"{by}, at {share:.0%} of the speed of a large product")


def step_flops(run_config: RunConfig) -> float:
    """Return the FLOPs of a step, including its part of the work at the end of a task."""
    cost, steps = budgets.method_cost(run_config), budgets.apply_budget(run_config).steps
    return cost.step + (cost.end * len(steps) / sum(steps) if steps else 0)


def describe_forecast(step: StepForecast, steps: int) -> str:
    """Return how long a number of steps may take, and how that was found. If the number is not
    known yet and given as 0, it is the time of a step."""
    times = f"{time_in_words(step.seconds)} a step"
    if steps:
        times = f"about {time_in_words(steps * step.seconds)} of training, {times}"
    return f"{times}, {step.by}; evaluations take additional time"


def decoding_rate(corpus: Corpus, run_config: RunConfig) -> float:
    """Return how many images of a run's data one core of this machine decodes per second, measured
    on a few of them."""
    side = models.preprocessing(models.create_on_meta(run_config.model.name)).size
    rows = corpus.rows("train")
    rows = rows[:: max(1, len(rows) // DECODED_IMAGES)][:DECODED_IMAGES]
    images, started = cast(ImageFiles, corpus.images), time.perf_counter()
    images.random_crops(rows, side, numpy_generator("decoding rate", 0).random((len(rows), 4)))
    return len(rows) / max(time.perf_counter() - started, 1e-9)


def measured_step_seconds(log: pd.DataFrame) -> float | None:
    """Return the seconds per step over the first `MEASURED` steps in a run's log after the first
    `UNCOUNTED`, or None if no task has so many.

    A step that took more than `PAUSE` times the median does not count, since the run was stopped
    before it and resumed, nor does one before which the clock was set back.
    """
    if "time" not in log:
        return None
    for _, rows in log.dropna(subset=["step"]).groupby("task"):
        times = rows["time"].to_numpy()[UNCOUNTED : UNCOUNTED + MEASURED + 1]
        if len(times) > MEASURED:
            seconds = np.diff(times)
            is_step = (seconds >= 0) & (seconds <= PAUSE * np.median(seconds))
            return float(seconds[is_step].mean())
    return None


def time_in_words(seconds: float) -> str:
    """Return a time with three digits in a suitable unit, such as "15.7 h" and "168 ms"."""
    units = {"ms": 1e-3} | UNITS
    unit = max((name for name in units if units[name] <= seconds), key=units.get, default="ms")
    return f"{float(f'{seconds / units[unit]:.3g}'):g} {unit}"


def forecast_seconds(configs: list[RunConfig], device: str = "cpu") -> list[float]:
    """Return the forecast of each run, in seconds of one core or of a GPU.

    It is based on stored runs of the same kind. If there are none, a few steps of an embedded model
    are measured. For other models, measuring would take minutes, so `estimate_step` predicts.
    """
    if not configs:  # no need to read the store
        return []
    seconds, families = _stored_step_seconds(device), starts.family_names()
    for run_config in configs:
        if (key := _timing_key(run_config)) not in seconds:
            if run_config.model.name in families:
                seconds[key] = _measure_step(run_config, device)
            else:
                seconds[key] = estimate_step(run_config, device).seconds
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
            provenance = record.provenance
            if provenance["threads"] != 1 or provenance.get("device") != device_name(device):
                continue
            per_step = provenance["seconds"] / budgets.total_steps(run_config)
        except CmpError:  # damaged, in an older format, or its data are gone
            continue
        seconds.setdefault(_timing_key(run_config), []).append(per_step)
    return {key: float(np.median(values)) for key, values in seconds.items()}


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
        step, end = _step_seconds(run_config, corpus, model, device, clock)
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
    run_config: RunConfig,
    corpus: Corpus,
    model: torch.nn.Module,
    device: str,
    clock: Callable[[], float],
    execution: ExecutionConfig | None = None,
    steps: int = MEASURED_STEPS,
    uncounted: int = 1,
) -> tuple[float, float]:
    """Return the seconds of a step of the last task, and of the method's work at the end of a
    task."""
    # `passes` stays, since it may shrink batches
    task_steps = (steps,) * run_config.stream.tasks
    training = dataclasses.replace(run_config.training, budget=None, task_steps=task_steps)
    curve = Schedule("constant", peak=run_config.schedule.peak)  # any curve fits in
    short = dataclasses.replace(run_config, training=training, schedule=curve)
    state = make_train_state(short, corpus, model, device, execution or ExecutionConfig())
    pools, ends = mixtures.task_pools(short, state.corpus), []

    def after_step(step: int, result: StepResult) -> None:
        result.loss.item()  # waits for the device
        ends.append(clock())

    train_task(state, pools[-1], len(pools) - 1, after_step=after_step)
    return (ends[-1] - ends[uncounted - 1]) / (steps - uncounted), clock() - ends[-1]


def memory_account(run: RunConfig, recomputed: bool = False) -> dict[str, int]:
    """Return the bytes of a run's step in fp32 by purpose, see `cmp.budgets.memory_account`.

    Args:
        run: The run.
        recomputed: Whether the network recomputes what it can, so that "activations" are only the
            inputs of all blocks.
    """
    name, batch, method = run.model.name, run.training.batch, run.method
    option, replayed = get_option("method", method.name), budgets.replayed_samples(run)
    return _cached_account(name, batch, method, replayed, option, option.digest, recomputed)


@functools.cache
def _cached_account(
    name: str,
    batch: int,
    method: Method,
    replayed: int,
    option: Option,
    digest: str,
    recomputed: bool,
) -> dict[str, int]:
    model = models.create_on_meta(name)
    if recomputed:
        model.set_grad_checkpointing(True)
    return budgets.memory_account(budgets.shape_state(name, method, model), batch, replayed)


def recomputed_activations(run: RunConfig) -> int | None:
    """Return the bytes of a step's activations in fp32 if they are recomputed, or None if the
    network does not support that.

    The inputs of all blocks are kept, and the activations of one block exist at a time.
    """
    model = models.create_on_meta(run.model.name)
    if not hasattr(getattr(model.visual, "transformer", None), "grad_checkpointing"):
        return None
    blocks = tower_blocks(parameter for parameter, _ in model.named_parameters())
    block_inputs = memory_account(run, recomputed=True)["activations"]
    rest = memory_account(run)["activations"] - block_inputs
    return block_inputs + rest // min(count for _, count in blocks.values())


def checkpoint_bytes(run: RunConfig) -> int:
    """Return the bytes of a run's checkpoints on the disk, treating every merge as EMA-Merge."""
    parts = memory_account(run)
    copies = 1 + COPIES * (run.merging.policy != "none")
    return SAVES * (copies * parts["weights"] + parts["optimizer"])


def step_memory(run: RunConfig, recomputed: bool = False) -> float:
    """Return the bytes at the peak of a run's step.

    In bf16, activations take half the bytes of fp32, and autocast adds a copy of the weights.
    ViT-B-16 at batch 512 then takes 47.2 GB; Table 4 says 46.6.

    Args:
        run: The run.
        recomputed: Whether activations are recomputed, if the network supports that.
    """
    parts = memory_account(run)
    activations = float(parts["activations"])
    fixed = sum(parts.values()) - activations
    if recomputed:
        activations = recomputed_activations(run) or activations
    if run.training.precision == "bf16":
        return fixed + (activations + parts["weights"]) / 2
    return fixed + activations
