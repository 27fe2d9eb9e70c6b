"""Save a run's state atomically, so that it can resume as if it had never stopped.

A checkpoint is one safetensors file. Its header contains everything except the tensors as JSON,
with a separate hash, so that it can be read without them. The file's name ends in the hash of its
content, so there is no pointer to the latest file that could be lost or out of date: a file is
intact if its name matches its content, and a run resumes from the latest intact one.
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
import weakref
from collections.abc import Callable
from concurrent import futures
from pathlib import Path
from types import FrameType
from typing import IO, Any, Self

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as checked_dataclass
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer

from cmp import files, parsing, project
from cmp.errors import CmpError, Interrupted, explain_errors, explain_limit
from cmp.files import write_tensors
from cmp.models import PREPROCESSING
from cmp.scale import processes
from cmp.scale.decoding import STOPS

SCHEMA = 2
INTERVAL, MAX_SHARE = 120.0, 0.02
"""Seconds between checkpoints within a task, and the largest share of the time that saving may
take: after a slow save, the next one comes later."""
REPORT = "diverged.json"
"""The file beside the checkpoints that describes a diverged step."""
LOCK = "lock"
"""The file by which a process holds a run."""
_GROUP_KEYS = ("lr", "multiple", "weight_decay")
"""Keys of an optimiser's groups that follow from the config."""
_FILE_NAME = re.compile(r"task-(\d{1,7})-step-(\d{1,10})-([0-9a-f]{64})\.safetensors")
_BESIDE_NAME = re.compile(r"(model|base)-(\d{1,10})-([0-9a-f]{64})\.safetensors")

_locks: weakref.WeakSet[IO] = weakref.WeakSet()
"""The files by which this process holds locks. Processes that it forks, such as those that decode
images, close them, since they may outlive it by seconds."""
os.register_at_fork(after_in_child=lambda: [lock.close() for lock in _locks])


class StopRequest:
    """A context in which the first SIGINT, SIGTERM or SIGHUP is only recorded, in `signal`.

    SIGHUP, which comes when a terminal is closed, stays ignored under `nohup`. A second SIGINT has
    its usual effect, so that Ctrl-C can still interrupt a hung step. A second SIGTERM does not,
    since torchrun, `timeout` and batch systems send several at once. Outside the main thread, where
    Python delivers no signals, nothing is caught.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            is_kept = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            caught = [number for number in STOPS if number != signal.SIGHUP or not is_kept]
            self._before = {number: signal.signal(number, self._note) for number in caught}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = self.signal or number
        signal.signal(signal.SIGINT, self._before[signal.SIGINT])


class Damaged(CmpError):
    """An error for a checkpoint whose content is not what was written, so that nothing in it can
    be of use."""


REMEDY = "; delete the checkpoint or, if it is a release's, get the release again"
"""What to do about a state that cannot be used."""


@checked_dataclass(frozen=True, config=ConfigDict(extra="ignore", strict=True))
class Progress:
    """Everything in a checkpoint except its tensors.

    Other keys are ignored, such as `launch` of 0.3, which held options of the command.

    Attributes:
        schema: The version of the format.
        run: The run's id.
        config: The run's config, as a tree.
        task: The next task.
        step: The next step. 0 means that the task has not begun and earlier ones are evaluated.
        metrics: The rows of metrics so far.
        seconds: The computing time so far.
        machine: The machine on which the run began, see `cmp.runs.machine.machine_record`, with
            `moved` if it was on another one since.
        options: Sources of options from outside the package, see `RunConfig.option_record`.
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


@dataclasses.dataclass(frozen=True)
class RunState:
    """The complete state of a run between two steps.

    Batches, buffer, augmentation and learning rate are functions of (config, task, step), so only
    the progress and some tensors have to be saved.

    Attributes:
        progress: How far the run has come.
        tensors: "weights/NAME", "optimizer/PARAMETER/MOMENT"; "number/optimizer/PARAMETER/KEY" and
            "number/group/INDEX/KEY", numbers that an optimiser keeps for a parameter or a group, as
            tensors []; "method/..." and "merging/...", the state of the method and the merge
            policy; "trunk/...", the state at a branch;
            "deployed/..." after the last task, if a next task would start from other weights;
            "hits/TASK/DATASET" of `cmp.runs.runner.RunResult`.
    """

    progress: Progress
    tensors: dict[str, Tensor]

    def part(self, name: str) -> dict[str, Tensor]:
        """Return the tensors of a part, such as "trunk", by their names within it."""
        return strip_prefix(self.tensors, f"{name}/")


def state_tensors(model: nn.Module, optimizer: Optimizer | None = None) -> dict[str, Tensor]:
    """Return the tensors of a run's state by name, without copying them.

    Raises:
        CmpError: The optimiser's state contains something other than tensors and numbers.
    """
    tensors = {f"weights/{name}": x for name, x in model.state_dict().items()}
    if optimizer is None:
        return tensors
    states = {f"optimizer/{n}": optimizer.state.get(p, {}) for n, p in model.named_parameters()}
    for index, group in enumerate(optimizer.param_groups):
        # numbers that follow from the config are not state
        given = optimizer.defaults | {key: group.get(key) for key in _GROUP_KEYS}
        states[f"group/{index}"] = {
            key: x
            for key, x in group.items()
            if isinstance(x, int | float) and (key not in given or x != given[key])
        }
    for place, values in states.items():
        for key, x in values.items():
            if isinstance(x, Tensor):
                tensors[f"{place}/{key}"] = x
            elif isinstance(x, int | float):
                dtype = torch.float64 if isinstance(x, float) else None
                tensors[f"number/{place}/{key}"] = torch.tensor(x, dtype=dtype)
            elif x is not None:
                raise CmpError(
                    f"{type(optimizer).__name__}: {key}: a {type(x).__name__} cannot be saved; "
                    "keep only tensors and numbers in an optimiser's state"
                )
    return tensors


def strip_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names start with a prefix, keyed by the rest of the name."""
    return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}


def join_parts(parts: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the tensors of all parts of a state, named "PART/NAME"."""
    return {f"{part}/{name}": x for part, named in parts.items() for name, x in named.items()}


def restore(tensors: dict[str, Tensor], model: nn.Module, optimizer: Optimizer | None) -> None:
    """Load a state's weights into a network, and its moments and numbers into an optimiser.

    Raises:
        CmpError: The weights are not those of such a network.
    """
    try:
        model.load_state_dict(strip_prefix(tensors, "weights/"))
    except RuntimeError as error:
        words = " ".join(str(error).split())[:200]
        raise CmpError(f"the saved state does not fit the network ({words}){REMEDY}") from error
    if optimizer is None:
        return
    for name, parameter in model.named_parameters():
        moments = strip_prefix(tensors, f"optimizer/{name}/")
        numbers = strip_prefix(tensors, f"number/optimizer/{name}/")
        if moments or numbers:
            device = parameter.device
            optimizer.state[parameter] = {k: x.to(device, copy=True) for k, x in moments.items()}
            optimizer.state[parameter] |= {k: x.item() for k, x in numbers.items()}
    for index, group in enumerate(optimizer.param_groups):
        group |= {k: x.item() for k, x in strip_prefix(tensors, f"number/group/{index}/").items()}


def write_checkpoint(state: RunState, folder: Path) -> Path:
    """Write a state atomically, and return its path.

    Raises:
        CmpError: The file cannot be written.
    """
    progress = state.progress
    text = json.dumps(dataclasses.asdict(progress))
    header = {"progress": f"{hashlib.sha256(text.encode()).hexdigest()} {text}"}
    what = f"{folder}: the checkpoint of task {progress.task}, step {progress.step}"
    outcome = "the previous one is kept" if checkpoint_files(folder) else "nothing is saved yet"
    with files.report_disk_errors(what, outcome):
        name = f"task-{progress.task}-step-{progress.step}"
        return write_tensors(state.tensors, header, folder, name)


def read_checkpoint(path: Path) -> RunState:
    """Return the state of a checkpoint.

    Raises:
        Damaged: The content is not what was written.
        CmpError: The file cannot be read here, or not by this version.
    """
    with explain_errors(f"{path}: cannot be read as a checkpoint", "", SafetensorError):
        check_content(path)
        return RunState(read_progress(path), load_file(path))


def check_content(path: Path) -> None:
    """Raise `Damaged` unless a file's content matches the hash in its name, see `write_tensors`."""
    match = _FILE_NAME.fullmatch(path.name) or _BESIDE_NAME.fullmatch(path.name)
    if not match or match[3] != files.file_digest(path):
        raise Damaged(f"{path}: damaged: its content does not match the hash in its name")


def read_progress(path: Path) -> Progress:
    """Return everything in a checkpoint except its tensors, which are neither read nor checked.

    Raises:
        Damaged: The header is not what was written.
        CmpError: The file cannot be read here, or is not a checkpoint of this schema.
    """
    with explain_errors(f"{path}: cannot be read as a checkpoint"):
        path.open("rb").close()  # safetensors says of every file it may not open that none is there
        try:
            with safe_open(path, framework="pt") as file:
                text = (file.metadata() or {}).get("progress", "")
        except SafetensorError as error:
            if explain_limit(error):
                raise
            raise Damaged(f"{path}: damaged: {error}") from error
        if text.startswith("{"):  # 0.2.0 wrote no hash of the header
            check_content(path)
        else:
            digest, _, text = text.partition(" ")
            if hashlib.sha256(text.encode()).hexdigest() != digest:
                raise Damaged(f"{path}: damaged: its header does not match its hash")
        parsing.refuse_later(parsing.parse_json(text), "schema", SCHEMA, path)
        progress = parsing.parse_record(text, Progress)
    if progress.schema != SCHEMA:
        raise CmpError(
            f"{path}: has schema {progress.schema}, but this version reads schema {SCHEMA}{REMEDY}"
        )
    return progress


def run_folder(run_id: str) -> Path:
    """Return the folder of a run, finished or not, see `cmp.runs.store`."""
    return files.child_path(project.build_folder() / "runs", run_id[: files.SHORT_ID])


def refuse_unfinished(run_id: str) -> None:
    """Raise `CmpError` if version 0.3 left a run unfinished: its checkpoints are elsewhere."""
    folder = files.child_path(project.build_folder() / "checkpoints", run_id[: files.SHORT_ID])
    if checkpoint_files(folder):
        raise CmpError(
            f"{folder}: version 0.3 left this run unfinished, and this version cannot continue it; "
            "finish it with 0.3, or delete this folder to start again"
        )


def checkpoint_files(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, latest first, including damaged ones."""
    matches = filter(None, (_FILE_NAME.fullmatch(path.name) for path in folder.glob("task-*")))
    order = sorted(matches, key=lambda found: (int(found[1]), int(found[2]), found[3]))
    return [folder / found[0] for found in reversed(order)]


def latest_checkpoint(folder: Path) -> tuple[Path, RunState] | None:
    """Return the latest intact checkpoint in a folder, or None.

    Damaged ones give a warning.

    Raises:
        CmpError: A checkpoint may be intact, but cannot be read here or by this version.
    """
    return _first_readable(folder, read_checkpoint)


def latest_progress(folder: Path) -> Progress | None:
    """Return how far the run in a folder has come, without reading tensors.

    Raises:
        CmpError: As in `latest_checkpoint`.
    """
    found = _first_readable(folder, read_progress)
    return found and found[1]


def _first_readable(
    folder: Path, read: Callable[[Path], parsing.T]
) -> tuple[Path, parsing.T] | None:
    """Return the latest checkpoint that is not damaged, and what `read` returns for it.

    A run that went on from an earlier one, or from its start, would delete this one. So only what
    is of no use is passed over, and files that another process has just deleted.
    """
    for path in checkpoint_files(folder):
        try:
            return path, read(path)
        except CmpError as error:
            is_gone = isinstance(error.__cause__, FileNotFoundError)
            if not (is_gone or isinstance(error, Damaged)):
                raise
            warnings.warn(f"{error}; using the previous one", stacklevel=3)
    return None


def files_beside(folder: Path, kind: str) -> list[Path]:
    """Return the files of a kind, "model" or "base", beside checkpoints, sorted by number."""
    matches = filter(None, (_BESIDE_NAME.fullmatch(path.name) for path in folder.glob("*")))
    return sorted((folder / found[0] for found in matches if found[1] == kind), key=file_number)


def file_number(path: Path) -> int:
    """Return the number in the name of a file of `files_beside`."""
    return int(path.name.split("-")[1])


def latest(manager: "CheckpointManager | None") -> RunState | None:
    """Return the state to resume a run from, or None at its start.

    With several processes, only the first has the manager. The others read the file that it found,
    on a shared disk.
    """
    state = manager.load() if manager else None
    path = processes.broadcast(str(manager.last or "") if manager else "")
    return read_checkpoint(Path(path)) if path and not manager else state


class CheckpointManager:
    """A context that manages the checkpoints of a run, for one process at a time.

    Attributes:
        last: The checkpoint that was read or written last.
        in_background: Whether a thread writes, so that `save` returns once the state is copied, and
            `keep_model` immediately.
    """

    def __init__(
        self,
        run_id: str,
        interval: float = INTERVAL,
        wait: bool = False,
        folder: Path | None = None,
        in_background: bool = False,
    ):
        """Prepare the manager.

        Args:
            run_id: The run's id.
            interval: Seconds between checkpoints within a task; one is also written at its end.
            wait: Whether to wait for another process that computes the same run, instead of raising
                `CmpError`.
            folder: The folder for checkpoints. If None, that of the run, see `run_folder`.
            in_background: Whether a thread writes, as for a run on a GPU, which then goes on.
        """
        self.run_id, self.interval, self.wait = run_id, interval, wait
        self.folder = folder or run_folder(run_id)
        self.last: Path | None = None
        self.in_background = in_background
        self._lock = contextlib.ExitStack()
        self._due = time.monotonic() + interval
        self._writer = futures.ThreadPoolExecutor(1, "checkpoint")
        self._writing: list[futures.Future[None]] = []

    def __enter__(self) -> Self:
        if self.folder.is_symlink():
            raise CmpError(
                f"{self.folder}: this is a link, and checkpoints elsewhere are not changed; "
                "remove the link"
            )
        try:
            self._take_lock()
        except BlockingIOError as error:
            self.__exit__()
            raise CmpError(f"{self.folder}: another process is computing this run") from error
        except OSError as error:
            raise CmpError(f"{self.folder}: cannot be written ({error})") from error
        return self

    def _take_lock(self) -> None:
        """Lock the folder, waiting until a request to stop, which `Interrupted` then reports.

        The previous owner may have deleted the file meanwhile, so a lock is valid only if its file
        still exists. Without waiting, locking is retried for half a second, since
        `runs_in_progress` briefly takes the lock.
        """
        path, end = self.folder / LOCK, time.monotonic() + 0.5
        with StopRequest() as stop:
            while not stop.signal:
                files.make_folder(self.folder)
                try:
                    lock = self._lock.enter_context(path.open("ab"))
                    _locks.add(lock)
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                        self._lock.callback(self._delete_if_empty, lock)
                        break
                except (BlockingIOError, FileNotFoundError):
                    if not self.wait and time.monotonic() > end:
                        raise
                self._lock.close()
                time.sleep(0.1)
        if stop.signal:  # perhaps just when the lock was taken
            self._lock.close()
            raise Interrupted(
                f"stopped before run {self.run_id[: files.SHORT_ID]} began here", stop.signal
            )

    def __exit__(self, *_: object) -> None:
        self._writer.shutdown()  # finishes writing
        self._lock.close()  # releases it

    def _delete_if_empty(self, lock: IO) -> None:
        """Delete the folder of a run that saved nothing, such as one that was refused, unless
        another process has begun the run again since `remove`."""
        path = self.folder / LOCK
        with contextlib.suppress(OSError):
            is_own = os.path.samestat(os.fstat(lock.fileno()), path.stat())
            if is_own and [*self.folder.iterdir()] == [path]:
                path.unlink()
                self.folder.rmdir()

    def is_due(self, done: int, steps: int) -> bool:
        """Return whether a checkpoint is due after `done` of a task's steps."""
        return done < steps and time.monotonic() >= self._due

    def load(self) -> RunState | None:
        """Return the state to resume the run from, or None at its start.

        Raises:
            CmpError: As in `latest_checkpoint`, or the checkpoints are of another run.
        """
        self.last, state = latest_checkpoint(self.folder) or (None, None)
        if state and state.progress.run != self.run_id:
            raise CmpError(
                f"{self.folder}: contains checkpoints of run {state.progress.run}; delete or move "
                "them"
            )
        return state

    def save(self, state: RunState) -> None:
        """Write a state, keeping only the previous one besides it.

        Raises:
            CmpError: This state, or an earlier one in the background, cannot be written.
        """
        started = time.monotonic()
        self.finish()
        if self.in_background:
            copies = {name: x.detach().to("cpu", copy=True) for name, x in state.tensors.items()}
            state = dataclasses.replace(state, tensors=copies)
        self._call(self._write, state)
        now = time.monotonic()
        # a test that saves at every step sets the interval to 0
        pause = (now - started) / MAX_SHARE if self.interval > 0 else 0.0
        self._due = now + max(self.interval, pause)

    def _call(self, write: Callable[..., None], *arguments: Any) -> None:
        """Write in the thread, after its earlier tasks, or right here."""
        if self.in_background:
            self._writing.append(self._writer.submit(write, *arguments))
        else:
            write(*arguments)

    def finish(self) -> None:
        """Wait until everything is written; raise `CmpError` if writing failed."""
        while self._writing:
            self._writing.pop(0).result()

    def _write(self, state: RunState) -> None:
        path, models = write_checkpoint(state, self.folder), files_beside(self.folder, "model")
        # a model of a later task was left when the run resumed from an earlier state
        newest = [model for model in models if file_number(model) <= state.progress.task][-1:]
        old = {*checkpoint_files(self.folder), *models, self.folder / REPORT}
        with files.report_disk_errors(f"{self.folder}:", "the checkpoints are kept"):
            for other in old - {path, self.last, *newest}:
                other.unlink(missing_ok=True)
        self.last = path

    def keep_model(self, done: int, weights: dict[str, Tensor], preprocessing: str) -> None:
        """Write the model deployed after a number of tasks. The next checkpoint deletes the
        previous model.

        Some policies continue training from other weights, so checkpoints may not contain the
        model.

        Args:
            done: The number of completed tasks.
            weights: The model's tensors on the CPU, which must not change afterwards.
            preprocessing: How images are prepared, in the form that `cmp.models.export_weights`
                writes.
        """
        self._call(self._write_model, done, weights, preprocessing)

    def _write_model(self, done: int, weights: dict[str, Tensor], preprocessing: str) -> None:
        with files.report_disk_errors(f"{self.folder}: the model after task {done}"):
            before, header = files_beside(self.folder, "model"), {PREPROCESSING: preprocessing}
            path = write_tensors(weights, header, self.folder, f"model-{done}")
            for other in before:  # the run went back and computed this task again
                if file_number(other) == done and other != path:
                    other.unlink(missing_ok=True)

    def keep_base(self, step: int, weights: dict[str, Tensor]) -> None:
        """Write the weights of a pretraining run after a step, for `load_base`."""
        before = files_beside(self.folder, "base")
        with files.report_disk_errors(f"{self.folder}: the base of step {step}"):
            path = write_tensors(weights, {}, self.folder, f"base-{step}")
            for other in before:
                if other != path:
                    other.unlink(missing_ok=True)

    def load_base(self, step: int) -> dict[str, Tensor]:
        """Return the weights that `keep_base` wrote.

        Raises:
            CmpError: The file is missing or damaged.
        """
        paths = [x for x in files_beside(self.folder, "base") if file_number(x) == step]
        name = self.run_id[: files.SHORT_ID]
        remedy = f"run `cmpt results rm {name}` and repeat the command"
        if not paths:
            raise CmpError(
                f"{self.folder}: the weights of step {step} are missing, perhaps because another "
                f"version began the run; {remedy}"
            )
        with explain_errors(f"{paths[-1]}: cannot be read", f"; {remedy}", CmpError):
            check_content(paths[-1])
            return load_file(paths[-1])

    def report(self, content: dict[str, Any]) -> Path:
        """Write a report of a diverged step beside the last good state, and return its path."""
        path = self.folder / REPORT
        futures.wait(self._writing)  # a save ends by deleting other files; its error can wait
        files.write_atomic(path, json.dumps(content, indent=1))
        return path

    def remove(self) -> None:
        """Delete the checkpoints of a finished and stored run, and its folder if nothing else is in
        it."""
        futures.wait(self._writing)  # errors no longer matter
        own = [*checkpoint_files(self.folder), self.folder / REPORT]
        own += [path for kind in ("model", "base") for path in files_beside(self.folder, kind)]
        # the lock last: `cmp.runs.launch.compute` calls this again as long as there is one
        files.delete_files(self.folder, [*own, self.folder / LOCK])
