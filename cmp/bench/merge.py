"""What merging costs, against copying as many bytes as it has to read and write.

The floor of an operation is its bytes over the speed of a copy of one whole model, measured in the
same round. A rule that needs a number of a whole tensor first (slerp) reads its models twice.
"""

import contextlib
import functools
import tempfile
from pathlib import Path

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
"""Of what takes seconds."""
COPIES, STREAMED, DENSITY = 5, 20, 0.2


def merge(names: list[str], corpus: Corpus, rounds: int, batch: int | None) -> Report:
    """Rules on state dicts of a model's shapes with random entries, in memory and from files."""
    rows, notes = [], []
    for name in names:
        base = random_like(models.create_fused_model(name).state_dict())
        several = [moved(base, number) for number in range(COPIES)]
        rows += in_memory(several, base, rounds)
        note, more = from_files(several, rounds)
        rows += more
        ratio, row = trimming(several[:2], base, min(rounds, SLOW_ROUNDS))
        rows.append(row)
        entries = sum(x.numel() for x in base.values())
        notes.append(f"{name}: {len(base)} tensors, {entries / 1e6:.1f} M entries, {note}")
        notes.append(f"TIES of 2 is {ratio} times as fast as with a global kthvalue; target 6")
    return Report("merge", "merging against copying", COLUMNS, rows, notes)


def random_like(weights: Weights) -> Weights:
    """Noise in the shapes of a state dict, fp32."""
    noise = torch_generator("bench merge", 0)
    return {name: torch.randn(x.shape, generator=noise) for name, x in weights.items()}


def moved(base: Weights, number: int) -> Weights:
    """Weights a little off."""
    noise = torch_generator("bench merge", 1, number)
    return {k: torch.randn(x.shape, generator=noise).mul_(0.01).add_(x) for k, x in base.items()}


def in_memory(several: list[Weights], base: Weights, rounds: int) -> list[dict]:
    """Rows of what is merged in memory, into tensors that are there."""
    pair, out = several[:2], {name: torch.empty_like(x) for name, x in base.items()}
    half, into = (
        MergeOptions(weights=(0.5, 0.5)),
        functools.partial(apply.merge, out=out, finite=True),
    )
    memory = {"average": out}
    step = Merging(policy="step-ema")
    calls = {  # operation: (call, models read and written, target)
        "interpolation of 2": (lambda: into("interpolation", pair, options=half), 3, 1.3),
        "mean of 5": (lambda: into("interpolation", several), 6, 1.3),
        "EMA, a step": (lambda: update_step_average(step, memory, lambda: several[0]), 3, 1.3),
        "slerp of 2": (lambda: into("slerp", pair, options=half), 5, 1.5),
        "task arithmetic of 5": (
            lambda: into("task-arithmetic", several, base, MergeOptions(scale=0.3)), 7, 2,
        ),
        "interpolation of 2, checked": (
            lambda: into("interpolation", pair, options=half, finite=False), 3, "",
        ),
        "interpolation of 2, new tensors": (
            lambda: apply.merge("interpolation", pair, options=half, finite=True), 3, "",
        ),
    }  # fmt: skip
    return measured(calls, base, rounds)


def measured(calls: dict[str, tuple], base: Weights, rounds: int) -> list[dict]:
    """A row for each call, against a copy in the same round."""
    flat = torch.cat([x.reshape(-1) for x in base.values()])
    space, size = torch.empty_like(flat), 4e-9 * len(flat)
    each = {"copy": lambda: space.copy_(flat)} | {name: call[0] for name, call in calls.items()}
    seconds = timing.interleaved(each, rounds)
    rows = [row("copy", seconds["copy"], seconds["copy"], 2 * size, "")]
    for name, (_, count, target) in calls.items():
        floor = seconds["copy"] * count / 2
        rows.append(row(name, seconds[name], floor, count * size, target))
    return rows


def row(name: str, seconds: np.ndarray, floor: np.ndarray, size: float, target: object) -> dict:
    """A row of the table. size: GB that are read and written."""
    low, middle, high = np.quantile(seconds / floor, [0.1, 0.5, 0.9])
    found = (name, float(middle), f"{low:.2f}-{high:.2f}", target, 1e3 * np.median(seconds), size)
    return dict(zip(COLUMNS, (*found[:4], float(found[4]), found[5]), strict=True))


def from_files(several: list[Weights], rounds: int) -> tuple[str, list[dict]]:
    """The mean of 20 files, of which as many differ as there are models, tensor by tensor; and what
    memory it takes beside the files' own pages, which the system may drop."""
    with tempfile.TemporaryDirectory(prefix="cmp-bench-") as folder:
        paths = [Path(folder) / f"{number}.safetensors" for number in range(len(several))]
        for path, weights in zip(paths, several, strict=True):
            save_file(weights, path)
        peak, rule = [0.0], get_option("merge_rule", "interpolation")

        def stream() -> None:
            before = anonymous()
            with contextlib.ExitStack() as stack:
                opened = [stack.enter_context(merging_files.open_tensors(paths[number % len(paths)]))
                          for number in range(STREAMED)]  # fmt: skip
                for _ in apply.iter_merged(rule, opened, None, MergeOptions()):
                    peak[0] = max(peak[0], anonymous() - before)

        name = f"mean of {STREAMED}, from files"
        calls = {name: (stream, STREAMED + 1, 2)}
        rows = measured(calls, several[0], min(rounds, 2 * SLOW_ROUNDS))
    return f"{name}: {peak[0]:.0f} MB of extra memory, target 300", rows[1:]


def anonymous() -> float:
    """MB of memory of this process that no file stands behind; 0 where the system does not say."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def trimming(pair: list[Weights], base: Weights, rounds: int) -> tuple[timing.Ratio, dict]:
    """TIES of two models, against the same by kthvalue over each whole task vector."""
    out = {name: torch.empty_like(x) for name, x in base.items()}
    how = MergeOptions(density=DENSITY)
    calls = {
        "fast": lambda: apply.merge("ties", pair, base, how, out),
        "plain": lambda: plain_ties(pair, base, DENSITY),
    }
    seconds = timing.interleaved(calls, rounds)
    size = 4e-9 * sum(x.numel() for x in base.values())
    floor = copy_seconds(base, rounds) * 4 / 2
    found = row("TIES of 2", seconds["fast"], floor, 4 * size, "")
    return timing.times_faster(seconds["plain"], seconds["fast"]), found


def copy_seconds(base: Weights, rounds: int) -> np.ndarray:
    """Of a copy of a whole model, in rounds of its own."""
    flat = torch.cat([x.reshape(-1) for x in base.values()])
    space = torch.empty_like(flat)
    return timing.interleaved({"copy": lambda: space.copy_(flat)}, rounds)["copy"]


def plain_ties(models: list[Weights], base: Weights, density: float) -> Tensor:
    """TIES as it is usually written: whole task vectors, a kthvalue of each. Returns the vector."""
    start = torch.cat([x.reshape(-1) for x in base.values()])
    taus = torch.stack([torch.cat([x.reshape(-1) for x in m.values()]) - start for m in models])
    rank = len(start) - round(density * len(start)) + 1
    for tau in taus:
        tau.mul_(tau.abs() >= tau.abs().kthvalue(rank).values)
    agree = taus * taus.sum(0).sign() > 0
    return start + (taus * agree).sum(0) / agree.sum(0).clamp(min=1)
