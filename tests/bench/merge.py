"""Measure merging against copying as many bytes as it has to read and write.

The floor of an operation is its bytes divided by the speed of copying one whole model, measured in
the same round. A rule that first needs a statistic of a whole tensor (slerp) reads its models
twice.
"""

import contextlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from cmp import models
from cmp.bench import timing
from cmp.bench.report import Report
from cmp.config import Merging
from cmp.data import Corpus
from cmp.merging import apply
from cmp.merging import files as merging_files
from cmp.merging.policies import update_step_average
from cmp.merging.rules import MergeOptions, Weights
from cmp.registry import get_option
from cmp.seeds import torch_generator

COLUMNS = ("operation", "x the floor", "10-90 %", "target", "ms", "GB")
SLOW_ROUNDS = 3
"""Rounds for operations that take seconds."""
COPIES, STREAMED, DENSITY = 5, 20, 0.2


class Operation(NamedTuple):
    """A timed operation.

    Attributes:
        call: Performs it once.
        models: The number of models that it reads and writes, for its floor.
        target: The largest acceptable multiple of the floor, or "".
    """

    call: Callable[[], object]
    models: int
    target: object = ""


def merge(names: list[str], corpus: Corpus, rounds: int, batch: int | None) -> Report:
    """Measure rules on state dicts with a model's shapes and random entries."""
    rows, notes = [], []
    for name in names:
        base = random_like(models.create_fused_model(name).state_dict())
        tuned = [moved(base, number) for number in range(COPIES)]
        rows += in_memory(tuned, base, rounds)
        note, file_rows = from_files(tuned, rounds)
        rows += file_rows
        ratio, row = trimming(tuned[:2], base, min(rounds, SLOW_ROUNDS))
        rows.append(row)
        entries = sum(x.numel() for x in base.values())
        notes.append(f"{name}: {len(base)} tensors, {entries / 1e6:.1f} M entries, {note}")
        notes.append(f"TIES of 2 is {ratio} times as fast as with a global kthvalue; target 6")
    return Report("merge", "merging against copying", COLUMNS, rows, notes)


def random_like(weights: Weights) -> Weights:
    """Return fp32 noise with the shapes of a state dict."""
    noise = torch_generator("bench merge", 0)
    return {name: torch.randn(x.shape, generator=noise) for name, x in weights.items()}


def moved(base: Weights, number: int) -> Weights:
    """Return slightly perturbed weights."""
    noise = torch_generator("bench merge", 1, number)
    return {k: torch.randn(x.shape, generator=noise).mul_(0.01).add_(x) for k, x in base.items()}


def merge_into(
    rule: str,
    models: list[Weights],
    base: Weights | None = None,
    out: Weights | None = None,
    finite: bool = True,
    **settings: Any,
) -> Weights:
    """Merge weights, by default as a run does, which knows that they are finite."""
    option = get_option("merge_rule", rule)
    options = MergeOptions.make(option, len(models), **settings)
    return dict(apply.iter_merged(option, models, base, options, out, finite=finite))


def in_memory(tuned: list[Weights], base: Weights, rounds: int) -> list[dict[str, Any]]:
    """Return the rows for merges in memory, into existing tensors."""
    pair, out = tuned[:2], {name: torch.empty_like(x) for name, x in base.items()}
    half, into = {"weights": (0.5, 0.5)}, {"out": out}
    memory = {"average": out}
    section = Merging(policy="step-ema")
    operations = {
        "interpolation of 2": Operation(
            lambda: merge_into("interpolation", pair, **half, **into), 3, 1.2
        ),
        "mean of 5": Operation(lambda: merge_into("interpolation", tuned, **into), 6, 1.2),
        "EMA, a step": Operation(
            lambda: update_step_average(section, memory, lambda: tuned[0], 0, 1), 3, 1.3
        ),
        "slerp of 2": Operation(lambda: merge_into("slerp", pair, **half, **into), 5, 1.4),
        "task arithmetic of 5": Operation(
            lambda: merge_into("task-arithmetic", tuned, base, scale=0.3, **into), 7, 3
        ),
        "interpolation of 2, checked": Operation(
            lambda: merge_into("interpolation", pair, **half, **into, finite=False), 3
        ),
        "interpolation of 2, new tensors": Operation(
            lambda: merge_into("interpolation", pair, **half), 3
        ),
    }
    return measure(operations, base, rounds)


def measure(operations: dict[str, Operation], base: Weights, rounds: int) -> list[dict[str, Any]]:
    """Return one row per operation, relative to a copy in the same round."""
    flat = torch.cat([x.reshape(-1) for x in base.values()])
    space, size = torch.empty_like(flat), 4e-9 * len(flat)
    calls = {name: operation.call for name, operation in operations.items()}
    seconds = timing.interleaved({"copy": lambda: space.copy_(flat)} | calls, rounds)
    rows = [table_row("copy", seconds["copy"], seconds["copy"], 2 * size)]
    for name, operation in operations.items():
        floor = seconds["copy"] * operation.models / 2
        gigabytes = operation.models * size
        rows.append(table_row(name, seconds[name], floor, gigabytes, operation.target))
    return rows


def table_row(
    name: str, seconds: np.ndarray, floor: np.ndarray, gigabytes: float, target: object = ""
) -> dict[str, Any]:
    """Return a row of the table.

    Args:
        name: The operation.
        seconds: The time in each round, [rounds].
        floor: The floor in each round, [rounds].
        gigabytes: The amount that it reads and writes.
        target: The largest acceptable multiple of the floor.
    """
    low, middle, high = np.quantile(seconds / floor, [0.1, 0.5, 0.9])
    milliseconds = 1e3 * float(np.median(seconds))
    cells = (name, float(middle), f"{low:.2f}-{high:.2f}", target, milliseconds, gigabytes)
    return dict(zip(COLUMNS, cells, strict=True))


def from_files(tuned: list[Weights], rounds: int) -> tuple[str, list[dict[str, Any]]]:
    """Measure the mean of 20 files, tensor by tensor, with as many distinct files as models.

    Returns:
        A note on the memory used besides the files' pages, which the system may drop, and the rows.
    """
    rule = get_option("merge_rule", "interpolation")
    with tempfile.TemporaryDirectory(prefix="cmp-bench-") as folder:
        paths = [Path(folder) / f"{number}.safetensors" for number in range(len(tuned))]
        for path, weights in zip(paths, tuned, strict=True):
            save_file(weights, path)
        peak = [0.0]

        def stream() -> None:
            before = anonymous_megabytes()
            with contextlib.ExitStack() as stack:
                files = [
                    stack.enter_context(merging_files.open_tensors(paths[number % len(paths)]))
                    for number in range(STREAMED)
                ]
                shapes = files[0].outline
                for _ in apply.iter_merged(rule, files, None, MergeOptions(), outline=shapes):
                    peak[0] = max(peak[0], anonymous_megabytes() - before)

        name = f"mean of {STREAMED}, from files"
        operations = {name: Operation(stream, STREAMED + 1, 2)}
        rows = measure(operations, tuned[0], min(rounds, 2 * SLOW_ROUNDS))
    return f"{name}: {peak[0]:.0f} MB of extra memory, target 300", rows[1:]


def anonymous_megabytes() -> float:
    """Return this process's memory that is not backed by files, in MB, or 0 if the system does not
    report it."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def trimming(
    pair: list[Weights], base: Weights, rounds: int
) -> tuple[timing.Ratio, dict[str, Any]]:
    """Compare TIES of two models with an implementation that uses kthvalue on each whole task
    vector."""
    out = {name: torch.empty_like(x) for name, x in base.items()}
    calls = {
        "fast": lambda: merge_into("ties", pair, base, out, finite=False, density=DENSITY),
        "plain": lambda: plain_ties(pair, base, DENSITY),
    }
    seconds = timing.interleaved(calls, rounds)
    size = 4e-9 * sum(x.numel() for x in base.values())
    floor = copy_seconds(base, rounds) * 4 / 2
    row = table_row("TIES of 2", seconds["fast"], floor, 4 * size)
    return timing.times_faster(seconds["plain"], seconds["fast"]), row


def copy_seconds(base: Weights, rounds: int) -> np.ndarray:
    """Return the seconds of copying a whole model, in separate rounds, [rounds]."""
    flat = torch.cat([x.reshape(-1) for x in base.values()])
    space = torch.empty_like(flat)
    return timing.interleaved({"copy": lambda: space.copy_(flat)}, rounds)["copy"]


def plain_ties(models: list[Weights], base: Weights, density: float) -> Tensor:
    """Return TIES as it is usually implemented, on whole task vectors with one kthvalue each."""
    start = torch.cat([x.reshape(-1) for x in base.values()])
    taus = torch.stack([torch.cat([x.reshape(-1) for x in m.values()]) - start for m in models])
    rank = len(start) - round(density * len(start)) + 1
    for tau in taus:
        tau.mul_(tau.abs() >= tau.abs().kthvalue(rank).values)
    agree = taus * taus.sum(0).sign() > 0
    return start + (taus * agree).sum(0) / agree.sum(0).clamp(min=1)
