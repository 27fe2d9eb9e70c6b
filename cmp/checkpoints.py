"""SIGINT and SIGTERM as a request: finish the step, save, then stop."""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import threading
import time
import warnings
from pathlib import Path
from types import FrameType
from typing import Any, Self

import pandas as pd
import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from cmp import distributed
from cmp.errors import CmpError, Interrupted
from cmp.files import SHORT_ID, build_folder, child_path, make_folder, sync_to_disk, write_atomic

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """While entered, the first SIGINT or SIGTERM is only noted, in `signal`.

    The second acts as it did before, so a hung step can still be broken off. Outside the main
    thread, where Python delivers no signals, nothing is caught.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._before = {each: signal.signal(each, self._note) for each in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for each, handler in self._before.items():
            signal.signal(each, handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.__exit__()
        self.signal = number


SCHEMA = 1
DEFAULT_EVERY = 50
"""Steps between two checkpoints within a task."""

_FILE_NAME = re.compile(r"task-(\d{1,6})-step-(\d{1,9})-([0-9a-f]{64})\.safetensors")


@checked_dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True))
class Progress:
    """What a checkpoint holds beside its tensors.

    config: the run's, as a tree. task, step: what comes next; step 0 stands for a task that has not
    begun, after the evaluation of those before it. metrics: the rows found so far. seconds: spent
    so far. machine: where the run began, see `cmp.runs.provenance.here`.
    """

    schema: int
    run: str
    config: dict[str, Any]
    task: int
    step: int
    metrics: list[dict[str, Any]]
    seconds: float
    machine: dict[str, Any]


_PROGRESS_ADAPTER = TypeAdapter(Progress)


@dataclasses.dataclass(frozen=True)
class RunState:
    """All that a run carries from one step to the next.

    Batches, buffer, augmentation and learning rate are functions of (config, task, step), so what
    is left is where the run is, what it found, and its tensors: "weights/NAME",
    "optimizer/PARAMETER/MOMENT"; "method/..." and "merging/..." that a method and a merging policy
    carry; and while a branch is cooled down, "trunk/..." that it left.
    """

    progress: Progress
    tensors: dict[str, Tensor]

    def metrics(self) -> pd.DataFrame:
        """The rows found so far, as `cmp.runs.Result` has them."""
        return pd.DataFrame(self.progress.metrics)


def state_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> dict[str, Tensor]:
    """The tensors of a run's state, by name; they are not copied."""
    found = {f"weights/{name}": x for name, x in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        moments = optimizer.state.get(parameter, {}) if optimizer else {}
        found |= {f"optimizer/{name}/{key}": x for key, x in moments.items()}
    return found


def strip_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those whose names begin so, by the rest of their names."""
    named = tensors.items()
    return {name.removeprefix(prefix): x for name, x in named if name.startswith(prefix)}


def restore(
    found: dict[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Put a state's weights into the network, and its moments beside the parameters that they
    belong to; `CmpError` if they are another network's."""
    try:
        model.load_state_dict(strip_prefix(found, "weights/"))
    except RuntimeError as error:
        raise CmpError(f"weights of another network: {str(error).splitlines()[0]}") from error
    for name, parameter in model.named_parameters() if optimizer else ():
        if moments := strip_prefix(found, f"optimizer/{name}/"):
            optimizer.state[parameter] = {
                key: x.to(parameter.device, copy=True) for key, x in moments.items()
            }


def write_checkpoint(state: RunState, folder: Path) -> Path:
    """Write a state into `folder`, whole or not at all; `CmpError` where the disk refuses.

    The file is whole and on the disk before it gets its name.
    """
    progress = state.progress
    header = {"progress": json.dumps(dataclasses.asdict(progress))}
    named = {name: x.detach().contiguous() for name, x in state.tensors.items()}
    partial = folder / f".partial-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(named, partial, header)
        with open(partial, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        name = f"task-{progress.task}-step-{progress.step}-{digest}.safetensors"
        sync_to_disk(partial)
        os.replace(partial, folder / name)
        sync_to_disk(folder)
    except (OSError, SafetensorError) as error:
        raise CmpError(
            f"{folder}: the checkpoint of task {progress.task}, step {progress.step} cannot be "
            f"written ({error}); the one before it is kept"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
    return folder / name


def read_checkpoint(path: Path) -> RunState:
    """Read a checkpoint; `CmpError` names the file if it is not what was once written."""
    match = _FILE_NAME.fullmatch(path.name)
    try:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if not match or match[3] != digest:
            raise CmpError(f"{path}: damaged: its content is not what its name says")
        with safe_open(path, framework="pt") as file:
            progress = _PROGRESS_ADAPTER.validate_json((file.metadata() or {}).get("progress", ""))
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValidationError) as error:
        reason = str(error).splitlines()[0]
        raise CmpError(f"{path}: no readable checkpoint ({reason})") from error
    if progress.schema != SCHEMA:
        raise CmpError(f"{path}: written in schema {progress.schema}; this is schema {SCHEMA}")
    return RunState(progress, found)


def checkpoint_folder(run_id: str) -> Path:
    """Where the checkpoints of a run lie while it is not finished."""
    return child_path(build_folder() / "checkpoints", run_id[:SHORT_ID])


def unfinished_runs() -> list[Progress]:
    """Where each run that is not finished was left."""
    folders = sorted((build_folder() / "checkpoints").glob("*/"))
    found = [latest_checkpoint(folder) for folder in folders]
    return [each[1].progress for each in found if each]


def recorded_threads(progress: Progress) -> int:
    """Torch threads where the run began; `CmpError` if the checkpoint does not say."""
    found = progress.machine.get("threads")
    if not isinstance(found, int) or found < 1:
        raise CmpError(f"checkpoint of run {progress.run}: machine.threads: must be a number")
    return found


def find_unfinished(prefix: str) -> Progress:
    """The one unfinished run whose id starts with `prefix`; else `CmpError`."""
    everything = unfinished_runs()
    matching = [each for each in everything if each.run.startswith(prefix)]
    if len(matching) != 1:
        names = ", ".join(each.run[:SHORT_ID] for each in everything) or "none"
        raise CmpError(f"{prefix!r}: not the id of one unfinished run; there are: {names}")
    return matching[0]


def checkpoint_files(folder: Path) -> list[Path]:
    """The checkpoints of a folder, furthest first, whole or not."""
    matches = [_FILE_NAME.fullmatch(path.name) for path in folder.glob("task-*.safetensors")]
    found = [match for match in matches if match]
    found.sort(key=lambda match: (int(match[1]), int(match[2]), match[3]), reverse=True)
    return [folder / match[0] for match in found]


def latest_checkpoint(folder: Path) -> tuple[Path, RunState] | None:
    """The furthest whole checkpoint of a folder, or none; each that is damaged is warned of."""
    for path in checkpoint_files(folder):
        try:
            return path, read_checkpoint(path)
        except CmpError as error:
            warnings.warn(f"{error}; the one before it is used", stacklevel=2)
    return None


def latest(keeper: "CheckpointManager | None", device: torch.device) -> RunState | None:
    """Where a run was left, or none. Of several processes the first has the keeper; each of them
    reads the file that it found, on a disk that all see."""
    state = keeper.load() if keeper else None
    if distributed.world_size() == 1:
        return state
    found = distributed.broadcast(str(keeper.last or "") if keeper else "", device)
    return read_checkpoint(Path(found)) if found else None


class CheckpointManager:
    """The checkpoints of one run, held by one process at a time.

    Used as a context; `CmpError` if another process computes the same run, or with `wait` once it
    does no more. every: steps between two checkpoints within a task; one is also written at each
    task's end.
    """

    def __init__(self, run_id: str, every: int = DEFAULT_EVERY, wait: bool = False):
        self.run_id, self.every, self.wait = run_id, every, wait
        self.folder = checkpoint_folder(run_id)
        self.last: Path | None = None
        self._lock: int | None = None

    def __enter__(self) -> Self:
        if self.folder.is_symlink():
            raise CmpError(f"{self.folder}: is a link; checkpoints elsewhere are not touched")
        make_folder(self.folder)
        try:
            self._lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT)
            self._take_lock()
        except BlockingIOError as error:
            self.__exit__()
            raise CmpError(f"{self.folder}: another process is computing this run") from error
        except OSError as error:
            raise CmpError(f"{self.folder}: cannot be written ({error})") from error
        return self

    def _take_lock(self) -> None:
        """Lock the folder, at once or with `wait` at last; a request to stop ends the wait."""
        with StopRequest() as stop:
            while not stop.signal:
                try:
                    return fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    if not self.wait:
                        raise
                time.sleep(0.1)
        self.__exit__()
        message = f"stopped waiting for another process that computes run {self.run_id[:SHORT_ID]}"
        raise Interrupted(message, stop.signal)

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            os.close(self._lock)  # which gives up the lock
            self._lock = None

    def load(self) -> RunState | None:
        """Where this run was left, or none."""
        found = latest_checkpoint(self.folder)
        if found is None:
            return None
        self.last, state = found
        if state.progress.run != self.run_id:
            raise CmpError(f"{self.folder}: holds checkpoints of run {state.progress.run}")
        return state

    def save(self, state: RunState) -> None:
        """Write a state; of the others only the one before it is kept."""
        path = write_checkpoint(state, self.folder)
        keep = {path, self.last, self.folder / "lock"}
        for other in self.folder.iterdir():
            if other not in keep and not other.is_dir():
                other.unlink(missing_ok=True)
        self.last = path

    def report(self, content: dict[str, Any]) -> Path:
        """Write what is known of a step that diverged beside the last good state."""
        path = self.folder / "diverged.json"
        write_atomic(path, json.dumps(content, indent=1))
        return path

    def remove(self) -> None:
        """Delete the checkpoints: the run is finished and stored."""
        shutil.rmtree(self.folder, ignore_errors=True)
