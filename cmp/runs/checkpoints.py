"""All-or-nothing saves of `RunState`, from which a run goes on as if nothing had happened.

A checkpoint is one safetensors file: the tensors, and in its header the rest as JSON. Its name ends
in the hash of its content, so it needs no pointer that could be lost or lag behind: a file whose
name and content agree is whole, and the furthest whole one is where the run goes on.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import re
import shutil
import time
import warnings
from pathlib import Path
from typing import Any, Self

import pandas as pd
import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from cmp.errors import CmpError, Interrupted
from cmp.files import flush, make_folder, write_whole
from cmp.paths import SHORT, build_folder, named
from cmp.runs.signals import StopRequest
from cmp.steps import distributed

SCHEMA = 1
EVERY = 50
"""Steps between two checkpoints within a task."""

NAME = re.compile(r"task-(\d{1,6})-step-(\d{1,9})-([0-9a-f]{64})\.safetensors")


@dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True))
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


_PROGRESS = TypeAdapter(Progress)


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


def tensors(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Tensor]:
    """The tensors of a run's state, by name; they are not copied."""
    found = {f"weights/{name}": x for name, x in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        moments = optimizer.state.get(parameter, {}) if optimizer else {}
        found |= {f"optimizer/{name}/{key}": x for key, x in moments.items()}
    return found


def below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those whose names begin so, by the rest of their names."""
    named = tensors.items()
    return {name.removeprefix(prefix): x for name, x in named if name.startswith(prefix)}


def restore(
    found: dict[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Put a state's weights into the network, and its moments beside the parameters that they
    belong to; `CmpError` if they are another network's."""
    try:
        model.load_state_dict(below(found, "weights/"))
    except RuntimeError as error:
        raise CmpError(f"weights of another network: {str(error).splitlines()[0]}") from error
    for name, parameter in model.named_parameters() if optimizer else ():
        if moments := below(found, f"optimizer/{name}/"):
            optimizer.state[parameter] = {
                key: x.to(parameter.device, copy=True) for key, x in moments.items()
            }


def write(state: RunState, folder: Path) -> Path:
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
        flush(partial)
        os.replace(partial, folder / name)
        flush(folder)
    except (OSError, SafetensorError) as error:
        raise CmpError(
            f"{folder}: the checkpoint of task {progress.task}, step {progress.step} cannot be "
            f"written ({error}); the one before it is kept"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
    return folder / name


def read(path: Path) -> RunState:
    """Read a checkpoint; `CmpError` names the file if it is not what was once written."""
    match = NAME.fullmatch(path.name)
    try:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if not match or match[3] != digest:
            raise CmpError(f"{path}: damaged: its content is not what its name says")
        with safe_open(path, framework="pt") as file:
            progress = _PROGRESS.validate_json((file.metadata() or {}).get("progress", ""))
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValidationError) as error:
        reason = str(error).splitlines()[0]
        raise CmpError(f"{path}: no readable checkpoint ({reason})") from error
    if progress.schema != SCHEMA:
        raise CmpError(f"{path}: written in schema {progress.schema}; this is schema {SCHEMA}")
    return RunState(progress, found)


def folder_of(run_id: str) -> Path:
    """Where the checkpoints of a run lie while it is not finished."""
    return named(build_folder() / "checkpoints", run_id[:SHORT])


def unfinished() -> list[Progress]:
    """Where each run that is not finished was left."""
    folders = sorted((build_folder() / "checkpoints").glob("*/"))
    found = [latest(folder) for folder in folders]
    return [each[1].progress for each in found if each]


def threads(progress: Progress) -> int:
    """Torch threads where the run began; `CmpError` if the checkpoint does not say."""
    found = progress.machine.get("threads")
    if not isinstance(found, int) or found < 1:
        raise CmpError(f"checkpoint of run {progress.run}: machine.threads: must be a number")
    return found


def find(prefix: str) -> Progress:
    """The one unfinished run whose id starts with `prefix`; else `CmpError`."""
    everything = unfinished()
    matching = [each for each in everything if each.run.startswith(prefix)]
    if len(matching) != 1:
        names = ", ".join(each.run[:SHORT] for each in everything) or "none"
        raise CmpError(f"{prefix!r}: not the id of one unfinished run; there are: {names}")
    return matching[0]


def candidates(folder: Path) -> list[Path]:
    """The checkpoints of a folder, furthest first, whole or not."""
    matches = [NAME.fullmatch(path.name) for path in folder.glob("task-*.safetensors")]
    found = [match for match in matches if match]
    found.sort(key=lambda match: (int(match[1]), int(match[2]), match[3]), reverse=True)
    return [folder / match[0] for match in found]


def latest(folder: Path) -> tuple[Path, RunState] | None:
    """The furthest whole checkpoint of a folder, or none; each that is damaged is warned of."""
    for path in candidates(folder):
        try:
            return path, read(path)
        except CmpError as error:
            warnings.warn(f"{error}; the one before it is used", stacklevel=2)
    return None


def left(keeper: "Keeper | None", device: torch.device) -> RunState | None:
    """Where a run was left, or none. Of several processes the first has the keeper; each of them
    reads the file that it found, on a disk that all see."""
    state = keeper.load() if keeper else None
    if distributed.size() == 1:
        return state
    found = distributed.told(str(keeper.last or "") if keeper else "", device)
    return read(Path(found)) if found else None


class Keeper:
    """The checkpoints of one run, held by one process at a time.

    Used as a context; `CmpError` if another process computes the same run, or with `wait` once it
    does no more. every: steps between two checkpoints within a task; one is also written at each
    task's end.
    """

    def __init__(self, run_id: str, every: int = EVERY, wait: bool = False):
        self.run_id, self.every, self.wait = run_id, every, wait
        self.folder = folder_of(run_id)
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
        message = f"stopped waiting for another process that computes run {self.run_id[:SHORT]}"
        raise Interrupted(message, stop.signal)

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            os.close(self._lock)  # which gives up the lock
            self._lock = None

    def load(self) -> RunState | None:
        """Where this run was left, or none."""
        found = latest(self.folder)
        if found is None:
            return None
        self.last, state = found
        if state.progress.run != self.run_id:
            raise CmpError(f"{self.folder}: holds checkpoints of run {state.progress.run}")
        return state

    def save(self, state: RunState) -> None:
        """Write a state; of the others only the one before it is kept."""
        path = write(state, self.folder)
        keep = {path, self.last, self.folder / "lock"}
        for other in self.folder.iterdir():
            if other not in keep and not other.is_dir():
                other.unlink(missing_ok=True)
        self.last = path

    def report(self, content: dict[str, Any]) -> Path:
        """Write what is known of a step that diverged beside the last good state."""
        path = self.folder / "diverged.json"
        write_whole(path, json.dumps(content, indent=1))
        return path

    def remove(self) -> None:
        """Delete the checkpoints: the run is finished and stored."""
        shutil.rmtree(self.folder, ignore_errors=True)
