"""What each step of a run came to: lines of JSON, written while it goes on.

A line of a step has `task`, `step`, `loss`, `gradient_norm` (before clipping), `rate`, `time` (Unix
seconds), `samples_per_second`, and on a card `memory`, the most bytes so far. A line of an
evaluation has `done` (tasks), `A_KA`, `A_ZS` and `GM`, as far as they were scored.
"""

import json
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import pandas as pd
import torch
from torch import nn

from cmp import budgets
from cmp.config import RunConfig
from cmp.errors import CmpError
from cmp.evaluation import Scores
from cmp.files import SHORT_ID, build_folder, child_path, make_folder
from cmp.runner import Observer
from cmp.training import StepResult

FLUSH_SECONDS = 5.0
"""Steps are noted without waiting for the device; this often it is waited for, and they are
written."""
BARS = "▁▂▃▄▅▆▇█"
WIDTH = 40


def log_path(run_id: str) -> Path:
    """Return the file of a run's log, whether it exists or not."""
    return child_path(build_folder() / "logs", run_id[:SHORT_ID], ".jsonl")


def read_log(run_id: str) -> pd.DataFrame:
    """Return the log of a run, a row per line; empty where there is none.

    A line that is only half written, as when a run is going on, is left out.
    """
    path, rows = log_path(run_id), []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return pd.DataFrame(rows)


def sparkline(values: pd.Series) -> str:
    """Return the course of some numbers as a line of bars, each the mean of a part of them."""
    known = values.dropna()
    parts = known.groupby(pd.RangeIndex(len(known)) * WIDTH // max(len(known), WIDTH)).mean()
    low, span = parts.min(), (parts.max() - parts.min()) or 1.0
    return "".join(BARS[round((value - low) / span * (len(BARS) - 1))] for value in parts)


class RunLog:
    """The log of a run that goes on; used as a context."""

    def __init__(self, run_id: str, run_config: RunConfig, device: str, board: Path | None):
        """Prepare the log.

        Args:
            run_id: The run's id.
            run_config: Its config.
            device: Where it is computed.
            board: A folder for TensorBoard, which needs the package of that name.

        Raises:
            CmpError: A board is asked for, and TensorBoard is not installed.
        """
        self.path, self.device, self.board = log_path(run_id), device, None
        self.steps = budgets.apply_budget(run_config).training.steps
        self.batch = run_config.training.batch
        self.pending: list[tuple[int, int, StepResult, float]] = []
        self.flushed, self._stack = time.monotonic(), ExitStack()
        if board:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise CmpError("--tensorboard: `pip install tensorboard` installs it") from error
            self.board = self._stack.enter_context(SummaryWriter(str(board)))

    def __enter__(self) -> Self:
        make_folder(self.path.parent)
        self.file = self._stack.enter_context(self.path.open("a", encoding="utf-8"))
        return self

    def __exit__(self, *_: object) -> None:
        with self._stack:
            self.flush()
        if not self.path.stat().st_size:  # the run was refused before it began
            self.path.unlink()

    def observe(self, observer: Observer) -> Observer:
        """Return an observer that tells another one, and this log."""

        def task(done: int, scores: Scores) -> None:
            observer.task(done, scores)
            if done == 0:  # what an earlier process left that saved nothing
                self.file.truncate(0)
            self.flush()
            self._write({"done": done} | scores.summary(), done * self.steps)

        def resumed(steps: int) -> None:
            observer.resumed(steps)
            self._cut(steps)

        def step(task: int, step: int, result: StepResult, model: nn.Module) -> None:
            observer.step(task, step, result, model)
            self.pending.append((task, step, result, time.time()))
            if time.monotonic() - self.flushed >= FLUSH_SECONDS:
                self.flush()

        return Observer(step, task, resumed)

    def flush(self) -> None:
        """Write the steps that are pending; the device is waited for once."""
        now = time.monotonic()
        if self.pending:
            numbers = torch.stack([torch.stack(result[:2]) for _, _, result, _ in self.pending])
            rate = len(self.pending) * self.batch / max(now - self.flushed, 1e-9)
            common: dict[str, Any] = {"samples_per_second": float(f"{rate:.4g}")}
            if self.device != "cpu":
                common["memory"] = torch.cuda.max_memory_allocated(self.device)
            pairs = zip(self.pending, numbers.tolist(), strict=True)
            for (task, step, result, when), (loss, norm) in pairs:
                row = {"task": task, "step": step, "loss": loss, "gradient_norm": norm}
                row |= {"rate": result.rate, "time": round(when, 3)} | common
                self._write(row, task * self.steps + step)
        self.pending, self.flushed = [], now
        self.file.flush()

    def _write(self, row: dict[str, Any], place: int) -> None:
        """Write a line; on the board its numbers stand at `place`, in steps of the stream."""
        self.file.write(json.dumps(row) + "\n")
        if self.board:
            for name in row.keys() - {"task", "step", "time", "done"}:
                self.board.add_scalar(name, row[name], place)

    def _cut(self, steps: int) -> None:
        """Leave out what was logged after the checkpoint that the run goes on from."""
        kept, seen = [], 0
        for line in self.path.read_text(encoding="utf-8").splitlines(keepends=True):
            seen += '"step": ' in line
            if seen > steps or not line.endswith("\n"):
                break
            kept.append(line)
        self.file.truncate(0)
        self.file.writelines(kept)
