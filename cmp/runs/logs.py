"""Log each step of a run as a line of JSON while it runs.

The line of a step has `task`, `step`, `loss`, `gradient_norm` (before clipping), `rate`, `time`
(Unix seconds), `samples_per_second`, and `waiting`, the share of the time that was spent waiting
for images. On a GPU it also has `memory`, the peak in bytes so far, and `peak_share`, the share of
the GPU's peak FLOP/s, with a step's FLOPs as `cmp.budgets` counts them. The line of an evaluation
has `done` (tasks) and those of `A_KA`, `A_ZS` and `GM` that were scored. Each line ends in `check`,
a checksum of the rest. Damaged lines are skipped when the log is read, and a log that cannot be
written only gives a warning.
"""

import contextlib
import itertools
import json
import math
import time
import warnings
import zlib
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
from cmp.files import SHORT_ID, child_path, make_folder
from cmp.parsing import parse_json
from cmp.project import build_folder
from cmp.runs.boards import open_board
from cmp.runs.runner import Observer
from cmp.scale import decoding, processes
from cmp.scale.devices import find_device
from cmp.training import StepResult

FLUSH_SECONDS = 5.0
"""Steps are recorded without waiting for the device. After this many, they are fetched and
written."""
BARS = "▁▂▃▄▅▆▇█"
WIDTH = 40
NUMBER_LIMIT = 2**63
"""A bound far above any number in a log."""
_TYPES = dict.fromkeys(("task", "step", "done"), (int,)) | dict.fromkeys(
    (
        *("loss", "gradient_norm", "rate", "time", "samples_per_second", "memory", "waiting"),
        *("peak_share", "A_KA", "A_ZS", "GM"),
    ),
    (int, float),
)
"""The keys that a line may have, and their types."""


def log_path(run_id: str) -> Path:
    """Return the path of a run's log, which may not exist."""
    return child_path(build_folder() / "logs", run_id[:SHORT_ID], ".jsonl")


def read_log(run_id: str) -> pd.DataFrame:
    """Return the log of a run, one row per line; empty if there is none."""
    return check_log(log_path(run_id))[0]


def check_log(path: Path) -> tuple[pd.DataFrame, int]:
    """Return a log, one row per line, and how many damaged lines were skipped.

    The last line may be incomplete if the run is still going or was killed.
    """
    rows = [_parse_line(line) for line in filter(None, _read_lines(path))]
    return pd.DataFrame([row for row in rows if row is not None]), rows.count(None)


def _read_lines(path: Path) -> list[bytes]:
    """Return the lines of a file, the last one without a line break, or none if it cannot be
    read."""
    with contextlib.suppress(OSError):
        if path.is_file():
            return path.read_bytes().split(b"\n")
    return [b""]


def _parse_line(line: bytes) -> dict[str, Any] | None:
    """Return the row of a line, or None if it is damaged. Version 0.2.0 wrote no checksum."""
    try:
        row = parse_json(line.decode())
        check = row.pop("check", None)
        is_row = all(type(x) in _TYPES[name] for name, x in row.items())
        is_row &= not any(NUMBER_LIMIT <= abs(x) < math.inf for x in row.values())
    except (ValueError, LookupError, AttributeError, TypeError):
        return None
    is_row &= "done" in row or {"task", "step"} <= row.keys()
    return row if is_row and check in (None, _checksum(row)) else None


def _checksum(row: dict[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(row).encode()):08x}"


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
        line = json.dumps(row | {"check": _checksum(row)}).encode() + b"\n"
        numbers = {name: row[name] for name in row.keys() - {"task", "step", "time", "done"}}
        for name, sink in list(self.sinks.items()):
            with self._drop_if_failing(name):
                if name == "file":
                    sink.write(line)
                else:
                    sink.add(numbers, self._place(row))

    def _cut(self, steps: int) -> None:
        """Remove lines logged after the checkpoint that the run resumes from."""
        kept, position = 0, 0
        for line in _read_lines(self.path)[:-1]:
            position += len(line) + 1
            if row := _parse_line(line):
                is_known = row.get("done", row.get("task")) < len(self.starts)
                if not is_known or self._place(row) + ("step" in row) > steps:
                    break
                kept = position
        with self._drop_if_failing("file"):
            if file := self.sinks.get("file"):
                file.truncate(kept)

    def _place(self, row: dict[str, Any]) -> int:
        """Return how many steps of the stream precede a row."""
        return self.starts[row["done"] if "done" in row else row["task"]] + row.get("step", 0)
