"""A training step on a GPU: its time and memory, and whether it ever waits for the device; and a
short run of the default recipe.
"""

import contextlib
import dataclasses
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from cmp import bench, config
from cmp.bench import networks, timing
from cmp.bench.networks import BF16, FP32, Pieces, Setting
from cmp.bench.report import Report
from cmp.data import Corpus
from cmp.errors import CmpError
from cmp.runner import Observer, execute

DEVICE = "cuda"
STEPS = 10
"""Steps that are timed together, so that the device's queue is full."""
TASKS, RUN_STEPS = 2, 20
BLOCK = 256
"""Images that are enlarged together."""
PACKAGE = Path(bench.__file__).parents[1]
COLUMNS = (
    "path", "times as fast", "ms a step", "samples/s", "peak MB", "% of peak", "waits at",
)  # fmt: skip
PATHS = {
    "TF32": (FP32, torch.contiguous_format),
    "bf16": (BF16, torch.contiguous_format),
    "bf16, channels_last": (BF16, torch.channels_last),
}


def gpu(names: list[str], corpus: Corpus, rounds: int, batch: int | None) -> Report:
    """Measure TF32, bf16 and channels_last, all with torch's fused attention.

    Raises:
        CmpError: There is no GPU.
    """
    if not torch.cuda.is_available():
        raise CmpError(
            "cmpt bench gpu needs a CUDA device, and torch finds none: use a machine with an "
            "NVIDIA GPU and a CUDA build of torch; cmpt bench step measures the CPU"
        )
    torch.set_float32_matmul_precision("high")  # TF32 in products; convolutions have it by default
    settings = [networks.setting(name, corpus, batch) for name in names]
    rows = [row for setting in settings for row in measure(setting, rounds)]
    rows += [short_run(setting) for setting in settings if setting.name == networks.LARGE]
    notes = [
        "% of peak: of the products per second of one large matrix product on this card, in bf16",
        f"images of 32 pixels are enlarged; a run is {TASKS} tasks of {RUN_STEPS} steps by the "
        "gpu profile, random weights, with its evaluations left out of ms a step",
        "waits at: where the host first waits for the device within a step; it never should",
        "a run itself waits twice a step, so that nothing that is not finite is ever kept",
    ]
    return Report("gpu", torch.cuda.get_device_name(), COLUMNS, rows, notes)


def measure(setting: Setting, rounds: int) -> list[dict[str, object]]:
    """Return a row per path of one model; the first is what the others are compared with."""
    steppers, memory = {}, {}
    paths = paths_of(setting)
    for path, (pieces, layout) in paths.items():
        steppers[path], memory[path] = measure_memory(setting, pieces, layout)
    blocks = {path: make_block(step) for path, step in steppers.items()}
    seconds = timing.interleaved(blocks, rounds)
    base, *_ = seconds.values()
    rows = []
    for path, (pieces, _) in paths.items():
        middle = float(np.median(seconds[path])) / STEPS
        peak = timing.matmul_peak(torch.bfloat16 if pieces.bf16 else torch.float32, DEVICE)
        rows.append(
            {
                "path": f"{setting.name} {path}",
                "times as fast": timing.times_faster(base, seconds[path]),
                "ms a step": 1e3 * middle,
                "samples/s": setting.config.training.batch / middle,
                "peak MB": memory[path] / 1e6,
                "% of peak": 100 * networks.step_flops(setting, pieces, DEVICE) / middle / peak,
                "waits at": first_wait(steppers[path]) or "never",
            }
        )
    return rows


def paths_of(setting: Setting) -> dict[str, tuple[Pieces, torch.memory_format]]:
    """Return those of `PATHS` that fit a card; a real model at its batch does in bf16 only."""
    if setting.name != networks.LARGE:
        return PATHS
    return {path: pieces for path, pieces in PATHS.items() if pieces[0].bf16}


def short_run(setting: Setting) -> dict[str, object]:
    """Return a row for a run of the `gpu` profile on the packaged images, cut to a few steps."""
    batch = setting.config.training.batch
    settings = [
        f"model.name={setting.name}", "model.start=random", f"stream.tasks={TASKS}",
        f"training.steps={RUN_STEPS}", f"training.batch={batch}", "training.budget=null",
        "mixture.replay=1.0", "evaluation.subset=8", "evaluation.full=false",
    ]  # fmt: skip
    tree = config.override(config.profile("gpu"), settings)
    blocks = setting.corpus.images.split(BLOCK)
    images = torch.cat([networks.enlarge(block, setting.side) for block in blocks])
    corpus = dataclasses.replace(setting.corpus, images=images)
    ends: list[float] = []
    observer = Observer(lambda task, step, loss, model: ends.append(time.perf_counter()))
    torch.cuda.reset_peak_memory_stats()
    execute(config.parse(tree, "benchmark"), corpus, observer, device=DEVICE)
    middle = float(np.median(np.diff(ends)))
    return {
        "path": f"{setting.name} run",
        "ms a step": 1e3 * middle,
        "samples/s": batch / middle,
        "peak MB": torch.cuda.max_memory_allocated() / 1e6,
    }


def measure_memory(
    setting: Setting, pieces: Pieces, layout: torch.memory_format
) -> tuple[Callable[[], None], int]:
    """Return a function that takes a step, and the bytes at the peak of two.

    Args:
        setting: The model and its batches.
        pieces: The pieces of the fast path.
        layout: The memory format of the weights.
    """
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step = networks.stepper(setting, pieces, DEVICE, layout)
    for _ in range(2):
        step()
    torch.cuda.synchronize()
    return step, torch.cuda.max_memory_allocated() - before


def make_block(step: Callable[[], None]) -> Callable[[], None]:
    """Return a function that takes `STEPS` steps and returns when the device is done."""

    def steps() -> None:
        for _ in range(STEPS):
            step()
        torch.cuda.synchronize()

    return steps


def first_wait(step: Callable[[], None]) -> str | None:
    """Return where in the package a step makes the host wait, as `file.py:line`; None if nowhere.

    torch raises at the first operation that synchronises; whatever comes behind is not seen.
    """
    torch.cuda.synchronize()
    with forbid_waits():
        try:
            step()
        except RuntimeError as error:
            if "synchronizing" not in str(error):
                raise
            frames = traceback.extract_tb(error.__traceback__)
            own = [frame for frame in frames if Path(frame.filename).is_relative_to(PACKAGE)]
            return f"{Path(own[-1].filename).relative_to(PACKAGE)}:{own[-1].lineno}"
    return None


@contextlib.contextmanager
def forbid_waits() -> Iterator[None]:
    """Within, an operation that makes the host wait for the device raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
