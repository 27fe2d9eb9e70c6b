"""Measure training steps of runs on a GPU: time and memory, and the speed of whole tasks on JPEG
files."""

import dataclasses
import itertools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from cmp import budgets, mixtures, models, starts
from cmp.bench import networks, pictures, timing
from cmp.bench.jpegs import SIZE, decoding_rates
from cmp.bench.networks import TASK
from cmp.bench.report import Report
from cmp.config import RunConfig
from cmp.data import Corpus
from cmp.embedded import packed
from cmp.errors import CmpError
from cmp.mixtures import Pools
from cmp.scale.devices import product_rate
from cmp.scale.execution import ExecutionConfig
from cmp.training import (
    StepResult,
    TrainState,
    create_optimizer,
    make_train_state,
    train_step,
    train_task,
)

DEVICE = "cuda"
STEPS = 10
"""Steps that are timed together, so that the device's queue is full."""
TASKS, RUN_STEPS = 2, 40
"""Steps per task of a run; the first half is not timed."""
READY = 2
"""Batches that are decoded in advance and used in turn when only the step is timed."""
IMAGES_PER_SAMPLE = 6
"""Images written per sample of a batch, so that every pool has enough."""
COLUMNS = ("path", "times as fast", "ms a step", "samples/s", "peak MB", "% of peak")
COMPILED = ExecutionConfig(compile_towers=True)
PATHS = {
    "fp32": ("fp32", ExecutionConfig()),
    "bf16": ("bf16", ExecutionConfig()),
    "bf16, compiled": ("bf16", COMPILED),
}
"""Name -> `training.precision`, and how steps are computed."""


def gpu(names: list[str], rounds: int, batch: int | None) -> Report:
    """Measure the steps of runs in fp32, in bf16, and in bf16 with compiled towers.

    Raises:
        CmpError: There is no GPU.
    """
    if not torch.cuda.is_available():
        raise CmpError(
            "cmpt bench gpu needs a CUDA device, but torch finds none: use a machine with an "
            "NVIDIA GPU and a CUDA build of torch, or cmpt bench step for the CPU"
        )
    rows = measure_all(names, packed.load_embedded(), rounds, batch)
    decoded = ", ".join(f"{size} {rate:.0f}" for size, rate in decoding_rates().items())
    notes = [
        f"images/s that a core decodes and crops to 224 pixels, by size: {decoded}",
        "% of peak: relative to one large matrix product on this GPU in the same precision; "
        "torch's precision settings are not changed, as in runs",
        "models that are not embedded: 298 x 224 JPEGs, with captions of 24 tokens on average",
        f"a run: {RUN_STEPS // 2} steps of a task, with decoding by the run's loader; images of "
        "other rows are decoded in advance, on the host",
    ]
    return Report("gpu", torch.cuda.get_device_name(), COLUMNS, rows, notes)


def measure_all(
    names: list[str], corpus: Corpus, rounds: int, batch: int | None
) -> list[dict[str, object]]:
    """Return the rows of the given models; `corpus` is the embedded benchmark."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="cmp-bench-") as folder:
        for name in names:
            run_config, data = prepare(name, corpus, batch, Path(folder))
            rows += measure(run_config, data, rounds)
            if name == networks.LARGE:
                rows += [whole_task(run_config, data, path) for path in paths_of(name)]
    return rows


def prepare(
    name: str,
    corpus: Corpus,
    batch: int | None,
    folder: Path,
    captions: str = "short",
    pixels: tuple[int, int] = SIZE,
) -> tuple[RunConfig, Corpus]:
    """Return the config and the data of a model's runs.

    Args:
        name: The model's name.
        corpus: The embedded benchmark, for embedded models.
        batch: Samples per batch; if None, the value in `networks.SIZES`.
        folder: The folder for the JPEGs of other models.
        captions: A key of `pictures.LENGTHS`.
        pixels: Width and height of the JPEGs.
    """
    settings = [f"training.steps={RUN_STEPS}", "training.budget=null", f"stream.tasks={TASKS}"]
    if name in starts.family_names():
        return networks.configure_run(name, batch, *settings), corpus
    count = IMAGES_PER_SAMPLE * (batch or networks.SIZES.get(name, networks.SIZE))
    folder /= f"{captions}-{count}-{pixels[0]}"
    corpus = pictures.load_collection(folder, count, captions, pixels)
    settings += [f"data={folder}", "mixture.replay=1.0"]
    return networks.configure_run(name, batch, *settings, profile="gpu"), corpus


def make_state(run_config: RunConfig, corpus: Corpus, path: str) -> TrainState:
    """Return the state of a run that computes its steps with one of `PATHS`."""
    precision, execution = PATHS[path]
    training = dataclasses.replace(run_config.training, precision=precision)
    run_config = dataclasses.replace(run_config, training=training)
    return make_train_state(run_config, corpus, device=DEVICE, execution=execution)


def measure(run_config: RunConfig, corpus: Corpus, rounds: int) -> list[dict[str, object]]:
    """Return one row per path of a model; the first is the baseline of the others."""
    steppers, memory, flops = {}, {}, {}
    name, batch = run_config.model.name, run_config.training.batch
    for path in paths_of(name):
        before = allocated_bytes()
        steppers[path] = make_stepper(make_state(run_config, corpus, path))
        memory[path] = peak_bytes(steppers[path]) - before
        if not PATHS[path][1].compile_towers:
            flops[PATHS[path][0]] = budgets.count_flops(steppers[path])
    blocks = {path: make_block(step) for path, step in steppers.items()}
    seconds = timing.interleaved(blocks, rounds)
    base, *_ = seconds.values()
    rows = []
    for path, times in seconds.items():
        middle, precision = float(np.median(times)) / STEPS, PATHS[path][0]
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        peak = product_rate(dtype, DEVICE)
        rows.append(
            {
                "path": f"{name} {path}",
                "times as fast": timing.times_faster(base, times),
                "ms a step": 1e3 * middle,
                "samples/s": batch / middle,
                "peak MB": memory[path] / 1e6,
                "% of peak": 100 * flops[precision] / middle / peak,
            }
        )
    return rows


def paths_of(name: str) -> list[str]:
    """Return those of `PATHS` that fit a GPU; a real model at its batch size fits only in bf16."""
    return [path for path in PATHS if name != networks.LARGE or PATHS[path][0] == "bf16"]


def make_stepper(state: TrainState) -> Callable[[], StepResult]:
    """Return a function that takes a step of a run on one of `READY` batches in host memory."""
    run_config, pools = state.config, mixtures.task_pools(state.config, state.corpus)[TASK]
    side, optimizer = models.preprocessing(state.model).size, create_optimizer(state)
    batches = [
        mixtures.make_batch(run_config, state.corpus, pools, TASK, step, side=side)
        for step in range(READY)
    ]
    numbers = itertools.count()

    def step() -> StepResult:
        number = next(numbers)
        batch = batches[number % READY]
        return train_step(state, optimizer, batch, TASK, number, run_config.schedule.peak)

    return step


def whole_task(run_config: RunConfig, corpus: Corpus, path: str) -> dict[str, object]:
    """Return a row for a task of a run, with images decoded by its loader."""
    state = make_state(run_config, corpus, path)
    pools = mixtures.task_pools(run_config, corpus)[TASK]
    seconds: list[float] = []
    peak = peak_bytes(lambda: seconds.append(task_step_seconds(state, pools)), times=1)
    return {
        "path": f"{run_config.model.name} {path}, a run",
        "ms a step": 1e3 * seconds[0],
        "samples/s": run_config.training.batch / seconds[0],
        "peak MB": peak / 1e6,
    }


def task_step_seconds(
    state: TrainState,
    pools: Pools,
    after_step: Callable[[int, StepResult], None] = lambda step, result: None,
) -> float:
    """Train one task of a run on data from the run's loader.

    Args:
        state: The network and its run, changed in place.
        pools: The pools that the task may draw from.
        after_step: Called after each step.

    Returns:
        The seconds per step of the second half of its steps.
    """
    steps, ends = state.config.training.steps, []

    def watch(step: int, result: StepResult) -> None:
        after_step(step, result)
        if step + 1 in (steps // 2, steps):
            synchronize()
            ends.append(time.perf_counter())

    train_task(state, pools, TASK, watch)
    return (ends[-1] - ends[0]) / (steps - steps // 2)


def synchronize() -> None:
    """Wait until the GPU, if there is one, has finished all queued work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def allocated_bytes() -> int:
    """Return the bytes of all tensors on the GPU, or 0 without one."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def peak_bytes(call: Callable[[], object], times: int = 2) -> int:
    """Return the peak bytes of tensors on the GPU during a number of calls, or 0 without one."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    for _ in range(times):
        call()
    synchronize()
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def make_block(step: Callable[[], object]) -> Callable[[], None]:
    """Return a function that takes `STEPS` steps and waits for the device."""

    def steps() -> None:
        for _ in range(STEPS):
            step()
        synchronize()

    return steps
