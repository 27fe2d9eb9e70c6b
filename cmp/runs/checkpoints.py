"""All-or-nothing saves of a run's state, from which it goes on as if nothing had happened.

A checkpoint is one safetensors file: the tensors, and in its header the rest as JSON, with a hash
of its own, so that it can be read without the tensors. The file's name ends in the hash of its
content, so it needs no pointer that could be lost or lag behind: a file whose name and content
agree is whole, and the furthest whole one is where the run goes on.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import re
import signal
import threading
import time
import warnings
from collections.abc import Callable
from concurrent import futures
from pathlib import Path
from types import FrameType
from typing import Any, Self

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as checked_dataclass
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer

from cmp import files, project
from cmp.errors import CmpError, Interrupted, explain_errors
from cmp.files import write_tensors
from cmp.scale import processes

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SCHEMA = 2
INTERVAL, MAX_SHARE = 120.0, 0.02
"""Seconds between two checkpoints within a task, and the largest part of the time that they may
take: where a save takes long, the next one comes later."""
REPORT = "diverged.json"
"""The file that describes a step that diverged, beside the checkpoints."""
_FILE_NAME = re.compile(r"task-(\d{1,6})-step-(\d{1,9})-([0-9a-f]{64})\.safetensors")
_BESIDE_NAME = re.compile(r"(model|base)-(\d{1,9})-([0-9a-f]{64})\.safetensors")


class StopRequest:
    """While entered, the first SIGINT or SIGTERM is only noted, in `signal`.

    A second SIGINT acts as it did before, so that a hung step can still be broken off by Ctrl-C. A
    second SIGTERM does not: torchrun, `timeout` and batch systems send several at once. Outside the
    main thread, where Python delivers no signals, nothing is caught.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = self.signal or number
        signal.signal(signal.SIGINT, self._before[signal.SIGINT])


@checked_dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True))
class Progress:
    """What a checkpoint holds beside its tensors.

    Attributes:
        schema: The format.
        run: The run's id.
        config: The run's config, as a tree.
        task: The task that comes next.
        step: The step that comes next; 0 stands for a task that has not begun, after the
            evaluation of those before it.
        metrics: The rows so far.
        seconds: Computing time so far.
        machine: Where the run began, see `cmp.runs.runner.machine_record`.
        options: Sources of options that are not the package's own, see `RunConfig.option_record`.
        launch: Options of the command that computed it last, which `cmpt resume` takes over.
    """

    schema: int
    run: str
    config: dict[str, Any]
    task: int
    step: int
    metrics: list[dict[str, Any]]
    seconds: float
    machine: dict[str, Any]
    options: dict[str, dict[str, Any]] = Field(default_factory=dict)
    launch: dict[str, bool | int | str] = Field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class RunState:
    """All that a run carries from one step to the next.

    Batches, buffer, augmentation and learning rate are functions of (config, task, step), so what
    is left is the progress and some tensors.

    Attributes:
        progress: Where the run is.
        tensors: "weights/NAME", "optimizer/PARAMETER/MOMENT"; "method/..." and "merging/..." that
            a method and a merge policy carry; "trunk/..." that a branch left; "deployed/..." after
            the last task, where a next one would start from other weights; "hits/TASK/DATASET" of
            `cmp.runs.runner.RunResult`.
    """

    progress: Progress
    tensors: dict[str, Tensor]


def state_tensors(model: nn.Module, optimizer: Optimizer | None = None) -> dict[str, Tensor]:
    """Return the tensors of a run's state by name; they are not copied."""
    tensors = {f"weights/{name}": x for name, x in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        moments = optimizer.state.get(parameter, {}) if optimizer else {}
        tensors |= {f"optimizer/{name}/{key}": x for key, x in moments.items()}
    return tensors


def strip_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names start with a prefix, by the rest of their names."""
    return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}


def restore(tensors: dict[str, Tensor], model: nn.Module, optimizer: Optimizer | None) -> None:
    """Load a state's weights into a network, and its moments into an optimiser."""
    model.load_state_dict(strip_prefix(tensors, "weights/"))
    for name, parameter in model.named_parameters():
        if optimizer and (moments := strip_prefix(tensors, f"optimizer/{name}/")):
            device = parameter.device
            optimizer.state[parameter] = {k: x.to(device, copy=True) for k, x in moments.items()}


def write_checkpoint(state: RunState, folder: Path) -> Path:
    """Write a state, whole or not at all, and return its path.

    Raises:
        CmpError: The disk refuses.
    """
    progress = state.progress
    text = json.dumps(dataclasses.asdict(progress))
    header = {"progress": f"{hashlib.sha256(text.encode()).hexdigest()} {text}"}
    what = f"{folder}: the checkpoint of task {progress.task}, step {progress.step}"
    with files.report_disk_errors(what, "the one before it is kept"):
        name = f"task-{progress.task}-step-{progress.step}"
        return write_tensors(state.tensors, header, folder, name)


def read_checkpoint(path: Path) -> RunState:
    """Return the state of a checkpoint.

    Raises:
        CmpError: The file is not what was once written.
    """
    with explain_errors(f"{path}: no readable checkpoint", "", SafetensorError):
        check_content(path)
        return RunState(read_progress(path), load_file(path))


def check_content(path: Path) -> None:
    """Raise `CmpError` unless a file's content is what `write_tensors` has put into its name."""
    match = _FILE_NAME.fullmatch(path.name) or _BESIDE_NAME.fullmatch(path.name)
    if not match or match[3] != files.file_digest(path):
        raise CmpError(f"{path}: damaged: its content is not what its name says")


def read_progress(path: Path) -> Progress:
    """Return what a checkpoint holds beside its tensors, which are neither read nor checked.

    Raises:
        CmpError: The file is no checkpoint of this schema, or this part of it is damaged.
    """
    with explain_errors(f"{path}: no readable checkpoint", "", SafetensorError):
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get("progress", "")
        if text.startswith("{"):  # 0.2.0 wrote no hash of this part
            check_content(path)
        else:
            digest, _, text = text.partition(" ")
            if hashlib.sha256(text.encode()).hexdigest() != digest:
                raise CmpError(f"{path}: damaged: its header is not what was written")
        progress = files.parse_record(text, Progress)
    if progress.schema != SCHEMA:
        raise CmpError(f"{path}: written in schema {progress.schema}; this is schema {SCHEMA}")
    return progress


def checkpoint_folder(run_id: str) -> Path:
    """Return where the checkpoints of an unfinished run are."""
    return files.child_path(project.build_folder() / "checkpoints", run_id[: files.SHORT_ID])


def checkpoint_files(folder: Path) -> list[Path]:
    """Return the checkpoints of a folder, the furthest first, whole or not."""
    matches = filter(None, (_FILE_NAME.fullmatch(path.name) for path in folder.glob("task-*")))
    order = sorted(matches, key=lambda found: (int(found[1]), int(found[2]), found[3]))
    return [folder / found[0] for found in reversed(order)]


def latest_checkpoint(folder: Path) -> tuple[Path, RunState] | None:
    """Return the furthest whole checkpoint of a folder, None if there is none.

    It warns of each that is damaged.
    """
    return _first_readable(folder, read_checkpoint)


def latest_progress(folder: Path) -> Progress | None:
    """Return how far the run of a folder has come; of its checkpoints no tensor is read."""
    found = _first_readable(folder, read_progress)
    return found and found[1]


def _first_readable(folder: Path, read: Callable[[Path], files.T]) -> tuple[Path, files.T] | None:
    for path in checkpoint_files(folder):
        try:
            return path, read(path)
        except CmpError as error:
            warnings.warn(f"{error}; the one before it is used", stacklevel=3)
    return None


def model_files(folder: Path) -> list[Path]:
    """Return what `CheckpointManager.keep_model` wrote, in the order of tasks."""
    return files_beside(folder, "model")


def files_beside(folder: Path, kind: str) -> list[Path]:
    """Return the files of a kind, "model" or "base", that are beside checkpoints, in the order of
    their numbers; of the same number the one that was written last is the last."""
    matches = filter(None, (_BESIDE_NAME.fullmatch(path.name) for path in folder.glob("*")))
    paths = [folder / found[0] for found in matches if found[1] == kind]
    return sorted(paths, key=lambda path: (file_number(path), path.stat().st_mtime_ns))


def file_number(path: Path) -> int:
    """Return the number in the name of a file of `files_beside`."""
    return int(path.name.split("-")[1])


def latest(manager: "CheckpointManager | None") -> RunState | None:
    """Return the state that a run goes on from, None at its start.

    Of several processes the first has the manager; the others read the file that it found, on a
    disk that all see.
    """
    state = manager.load() if manager else None
    path = processes.broadcast(str(manager.last or "") if manager else "")
    return read_checkpoint(Path(path)) if path and not manager else state


class CheckpointManager:
    """The checkpoints of one run, held by one process at a time; used as a context.

    Attributes:
        last: The checkpoint that was read or written last.
        in_background: Whether `save` returns once the state is copied, and `keep_model` at once; a
            thread writes.
        launch: As in `Progress`.
    """

    def __init__(
        self,
        run_id: str,
        interval: float = INTERVAL,
        wait: bool = False,
        folder: Path | None = None,
    ):
        """Prepare the manager.

        Args:
            run_id: The run's id.
            interval: Seconds between two checkpoints within a task; one is also written at its end.
            wait: Whether entering waits for another process that computes the same run, instead
                of raising `CmpError`.
            folder: Where they are kept; the run's own place in the build folder where None.
        """
        self.run_id, self.interval, self.wait = run_id, interval, wait
        self.launch: dict[str, bool | int | str] = {}
        self.folder = folder or checkpoint_folder(run_id)
        self.last: Path | None = None
        self.in_background = False
        self._lock = contextlib.ExitStack()
        self._due = time.monotonic() + interval
        self._writer = futures.ThreadPoolExecutor(1, "checkpoint")
        self._writing: list[futures.Future[None]] = []

    def __enter__(self) -> Self:
        if self.folder.is_symlink():
            raise CmpError(f"{self.folder}: is a link; checkpoints elsewhere are not touched")
        try:
            self._take_lock()
        except BlockingIOError as error:
            self.__exit__()
            raise CmpError(f"{self.folder}: another process is computing this run") from error
        except OSError as error:
            raise CmpError(f"{self.folder}: cannot be written ({error})") from error
        return self

    def _take_lock(self) -> None:
        """Lock the folder; a request to stop ends the wait.

        Who had it before may have deleted it meanwhile: a lock counts if its file is still there.
        Without a wait it is tried for half a second: `runs_in_progress` takes the lock to look.
        """
        path, end = self.folder / "lock", time.monotonic() + 0.5
        with StopRequest() as stop:
            while not stop.signal:
                files.make_folder(self.folder)
                try:
                    lock = self._lock.enter_context(path.open("ab"))
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                        return
                except (BlockingIOError, FileNotFoundError):
                    if not self.wait and time.monotonic() > end:
                        raise
                self._lock.close()
                time.sleep(0.1)
        message = "stopped waiting for another process that computes run "
        raise Interrupted(message + self.run_id[: files.SHORT_ID], stop.signal)

    def __exit__(self, *_: object) -> None:
        self._writer.shutdown()  # what is being written gets its name
        self._lock.close()  # which gives it up

    def is_due(self, done: int, steps: int) -> bool:
        """Return whether a checkpoint is due after `done` of a task's steps."""
        return done < steps and time.monotonic() >= self._due

    def load(self) -> RunState | None:
        """Return the state that the run goes on from, None at its start."""
        self.last, state = latest_checkpoint(self.folder) or (None, None)
        if state and state.progress.run != self.run_id:
            raise CmpError(f"{self.folder}: holds checkpoints of run {state.progress.run}")
        return state

    def save(self, state: RunState) -> None:
        """Write a state; of the others only the one before it is kept.

        Raises:
            CmpError: The disk refuses this state, or refused what came before in the background.
        """
        started = time.monotonic()
        self.finish()
        if self.in_background:
            copies = {name: x.detach().to("cpu", copy=True) for name, x in state.tensors.items()}
            state = dataclasses.replace(state, tensors=copies)
        self._call(self._write, state)
        now = time.monotonic()
        self._due = now + max(self.interval, (now - started) / MAX_SHARE * (self.interval > 0))

    def _call(self, write: Callable[..., None], *arguments: Any) -> None:
        """Let the thread write, after what it was given before, or write here."""
        if self.in_background:
            self._writing.append(self._writer.submit(write, *arguments))
        else:
            write(*arguments)

    def finish(self) -> None:
        """Wait until all is written; raise `CmpError` if the disk refused it."""
        while self._writing:
            self._writing.pop(0).result()

    def _write(self, state: RunState) -> None:
        path, models = write_checkpoint(state, self.folder), model_files(self.folder)
        # a model of a later task is left from before the run had to go back
        newest = [model for model in models if file_number(model) <= state.progress.task][-1:]
        old = {*checkpoint_files(self.folder), *models, self.folder / REPORT}
        with files.report_disk_errors(f"{self.folder}:", "the checkpoints are kept"):
            for other in old - {path, self.last, *newest}:
                other.unlink(missing_ok=True)
        self.last = path

    def keep_model(self, done: int, weights: dict[str, Tensor], preprocessing: str) -> None:
        """Write the model that is deployed after some tasks; the next checkpoint deletes the one
        before it.

        Training goes on from other weights under some policies, so no checkpoint has the model.

        Args:
            done: How many tasks.
            weights: Its tensors on the CPU, which nobody changes any more.
            preprocessing: How images are prepared, as `cmp.models.export_weights` writes it.
        """
        self._call(self._write_model, done, weights, preprocessing)

    def _write_model(self, done: int, weights: dict[str, Tensor], preprocessing: str) -> None:
        with files.report_disk_errors(f"{self.folder}: the model after task {done}"):
            write_tensors(weights, {"preprocess_cfg": preprocessing}, self.folder, f"model-{done}")

    def keep_base(self, step: int, weights: dict[str, Tensor]) -> None:
        """Write the weights that a pretraining has after a step, for `load_base`."""
        before = files_beside(self.folder, "base")
        with files.report_disk_errors(f"{self.folder}: the base of step {step}"):
            path = write_tensors(weights, {}, self.folder, f"base-{step}")
            for other in before:
                if other != path:
                    other.unlink(missing_ok=True)

    def load_base(self, step: int) -> dict[str, Tensor]:
        """Return what `keep_base` wrote.

        Raises:
            CmpError: It is not there, or damaged.
        """
        paths = [x for x in files_beside(self.folder, "base") if file_number(x) == step]
        name = self.run_id[: files.SHORT_ID]
        remedy = f"`cmpt results rm {name}` and the same command begin anew"
        if not paths:
            words = f"the weights of step {step} are not here, as if another version had begun"
            raise CmpError(f"{self.folder}: {words}; {remedy}")
        with explain_errors(f"{paths[-1]}: cannot be read", f"; {remedy}", CmpError):
            check_content(paths[-1])
            return load_file(paths[-1])

    def report(self, content: dict[str, Any]) -> Path:
        """Write a report of a step that diverged beside the last good state; return its path."""
        path = self.folder / REPORT
        futures.wait(self._writing)  # a save ends by deleting all but states; its error may wait
        files.write_atomic(path, json.dumps(content, indent=1))
        return path

    def remove(self) -> None:
        """Delete the checkpoints of a run that is finished and stored."""
        futures.wait(self._writing)  # whether the disk refused it does not matter any more
        own = [*checkpoint_files(self.folder), self.folder / REPORT]
        own += [path for kind in ("model", "base") for path in files_beside(self.folder, kind)]
        files.delete_folder(self.folder, [*own, self.folder / "lock"])
