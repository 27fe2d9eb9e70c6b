"""Log each step of a run as a line of JSON while it runs.

The line of a step has `task`, `step`, `loss`, `gradient_norm` (before clipping), `rate`, `time`
(Unix seconds), `samples_per_second`, and `waiting`, the share of the time that was spent waiting
for images. On a GPU it also has `memory`, the peak in bytes so far, and `peak_share`, the share of
the GPU's peak FLOP/s, with a step's FLOPs as `cmp.budgets` counts them. The line of an evaluation
has `done` (tasks) and those of `A_KA`, `A_ZS` and `GM` that were scored. A kill may leave half a
line at the end, which is left out when the log is read, and removed when the run goes on. A log
that cannot be written only gives a warning.
"""

import contextlib
import itertools
import json
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd
import torch
from torch import nn

from cmp import budgets
from cmp.config import RunConfig
from cmp.errors import CmpError
from cmp.evaluation import Scores
from cmp.files import make_folder
from cmp.runs.boards import open_board
from cmp.runs.checkpoints import run_folder
from cmp.runs.runner import Observer
from cmp.scale import decoding, processes
from cmp.scale.devices import find_device
from cmp.training import StepResult

FLUSH_SECONDS = 5.0
"""Steps are recorded without waiting for the device. After this many, they are fetched and
written."""
BARS = "▁▂▃▄▅▆▇█"
WIDTH = 40


def log_path(run_id: str) -> Path:
    """Return the path of a run's log, which may not exist."""
    return run_folder(run_id) / "log.jsonl"


def read_log(path: Path) -> pd.DataFrame:
    """Return a log, one row per line; empty if there is none, or if it cannot be read.

    The last line may be incomplete if the run is still going or was killed, and is then left out.
    """
    rows = []
    with contextlib.suppress(OSError):
        for line in path.read_bytes().split(b"\n") if path.is_file() else ():
            with contextlib.suppress(ValueError):
                rows.append(json.loads(line))
    return pd.DataFrame(rows)


def sparkline(values: pd.Series) -> str:
    """Return numbers as a line of bars, each showing the mean of a section."""
    known = values[np.isfinite(values)]
    parts = known.groupby(pd.RangeIndex(len(known)) * WIDTH // max(len(known), WIDTH)).mean()
    low, span = parts.min(), (parts.max() - parts.min()) or 1.0
    return "".join(BARS[round((value - low) / span * (len(BARS) - 1))] for value in parts)


class RunLog:
    """A context that writes the log of a run in progress."""

    def __init__(
        self,
        path: Path,
        run_id: str,
        run_config: RunConfig,
        device: str,
        boards: Mapping[str, str] | None = None,
    ):
        """Prepare the log.

        Args:
            path: The file, see `log_path`.
            run_id: The id of the run or update.
            run_config: The config that is run, with the steps that its budget allows.
            device: The device of the run.
            boards: By option of the command, a folder for "tensorboard", and a project for "wandb".

        Raises:
            CmpError: A board is requested whose package is not installed.
        """
        self.path, self.device = path, device
        self.starts = [0, *itertools.accumulate(run_config.steps)]
        self.pending: list[tuple[int, int, StepResult, float]] = []
        self.flushed, self.waited = time.monotonic(), decoding.seconds_waited()
        self.sinks: dict[str, Any] = {}  # boards, and "file", which is opened last
        for name, place in (boards or {}).items():
            with self._drop_if_failing(name):
                self.sinks[name] = open_board(name, place, run_id, run_config.to_dict())
        self.share = 0.0  # of the GPU's peak, at one sample per second; 0 if it is unknown
        if device != "cpu" and (card := find_device(device)):
            with contextlib.suppress(CmpError):  # a method whose cost cannot be counted
                flops = budgets.method_cost(run_config).step / run_config.training.batch
                self.share = flops / processes.world_size() / card.peak

    def __enter__(self) -> Self:
        if self.device != "cpu":  # the memory of an earlier run in this process does not count
            torch.cuda.reset_peak_memory_stats(self.device)
        with self._drop_if_failing("file"):
            make_folder(self.path.parent)
            self.sinks["file"] = self.path.open("ab")
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()
        for name, sink in list(self.sinks.items()):
            with self._drop_if_failing(name):
                sink.close()
        with self._drop_if_failing("file"):
            if "file" in self.sinks and not self.path.stat().st_size:  # it failed before it began
                self.path.unlink()

    @contextlib.contextmanager
    def _drop_if_failing(self, what: str) -> Iterator[None]:
        """If the "file" or one of the boards fails, warn and continue without it."""
        try:
            yield
        except Exception as error:  # a board has its own threads and libraries
            if what != "file" and isinstance(error, CmpError):  # it is not installed
                raise
            name = f"{self.path}: the log" if what == "file" else f"--{what}: the board"
            words = f"{name} cannot be written ({error}); the run continues without it"
            warnings.warn(words, stacklevel=3)
            with contextlib.suppress(Exception):
                self.sinks.pop(what).close()

    def observe(self, observer: Observer) -> Observer:
        """Return an observer that writes this log and calls another observer."""

        def task(done: int, scores: Scores) -> None:
            observer.task(done, scores)
            with self._drop_if_failing("file"):
                if done == 0 and (file := self.sinks.get("file")):
                    file.truncate(0)  # lines of an earlier process that saved nothing
            self.flush()
            self._write({"done": done} | scores.summary())

        def resumed(steps: int) -> None:
            observer.resumed(steps)
            self._cut(steps)
            self.flushed, self.waited = time.monotonic(), decoding.seconds_waited()

        def step(task: int, step: int, result: StepResult, model: nn.Module) -> None:
            observer.step(task, step, result, model)
            self.pending.append((task, step, result, time.time()))
            # the time of the evaluation after a task is not that of its steps
            is_last = self.starts[task] + step + 1 == self.starts[task + 1]
            if is_last or time.monotonic() - self.flushed >= FLUSH_SECONDS:
                self.flush()

        def saving() -> None:
            observer.saving()
            self.flush()

        return Observer(step, task, resumed, saving)

    def flush(self) -> None:
        """Write the pending steps, waiting for the device once."""
        now, waited = time.monotonic(), decoding.seconds_waited()
        if self.pending:
            numbers = torch.stack([torch.stack(result[:2]) for _, _, result, _ in self.pending])
            seconds = max(now - self.flushed, 1e-9)
            rate = sum(result.samples for _, _, result, _ in self.pending) / seconds
            common: dict[str, Any] = {"samples_per_second": float(f"{rate:.4g}")}
            common["waiting"] = float(f"{min(1, (waited - self.waited) / seconds):.3g}")
            if self.share:
                common["peak_share"] = float(f"{rate * self.share:.3g}")
            if self.device != "cpu":
                common["memory"] = torch.cuda.max_memory_allocated(self.device)
            pairs = zip(self.pending, numbers.tolist(), strict=True)
            for (task, step, result, when), (loss, norm) in pairs:
                row = {"task": task, "step": step, "loss": loss, "gradient_norm": norm}
                row |= {"rate": result.rate, "time": round(when, 3)} | common
                self._write(row)
        self.pending, self.flushed, self.waited = [], now, waited
        with self._drop_if_failing("file"):
            if file := self.sinks.get("file"):
                file.flush()

    def _write(self, row: dict[str, Any]) -> None:
        """Write a line to the file, and its numbers to the boards."""
        line = json.dumps(row).encode() + b"\n"
        numbers = {name: row[name] for name in row.keys() - {"task", "step", "time", "done"}}
        for name, sink in list(self.sinks.items()):
            with self._drop_if_failing(name):
                if name == "file":
                    sink.write(line)
                else:
                    sink.add(numbers, self._place(row))

    def _cut(self, steps: int) -> None:
        """Remove lines logged after the checkpoint that the run resumes from, and half a line."""

        def is_kept(line: bytes) -> bool:
            row = json.loads(line) if line.endswith(b"\n") else None
            return row is not None and self._place(row) + ("step" in row) <= steps

        with self._drop_if_failing("file"):
            if file := self.sinks.get("file"):
                lines = self.path.read_bytes().splitlines(keepends=True)
                file.truncate(sum(map(len, itertools.takewhile(is_kept, lines))))

    def _place(self, row: dict[str, Any]) -> int:
        """Return how many steps of the stream precede a row."""
        return self.starts[row["done"] if "done" in row else row["task"]] + row.get("step", 0)
