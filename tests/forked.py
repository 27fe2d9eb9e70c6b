"""Small runs in processes of their own, which may die at any moment.

A fork server has imported the package and read a small corpus once, see `forked_preload`; a child
costs little more than its run. Nothing in the package knows of this: a child patches what it needs.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pwd
import resource
import signal
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import forkserver, get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import options
import pandas as pd
import pytest
import safetensors.torch
from torch import nn

from cmp import cli, config, files, models
from cmp.cli import computing
from cmp.config import RunConfig
from cmp.data import Corpus
from cmp.embedded import packed
from cmp.embedded.manifest import embedded_manifests
from cmp.errors import CmpError
from cmp.files import SHORT_ID
from cmp.runs import checkpoints, identity, launch, store
from cmp.runs.checkpoints import CheckpointManager
from cmp.runs.runner import Observer
from cmp.scale.execution import ExecutionConfig
from cmp.training import StepResult
from lab.evidence import studies, workers

STORING = "storing"
"""What a child says right before it stores its result."""
DATASETS = ("pool-shapes", "new-flags", "shapes", "substitute-icons")
SETTINGS = ("stream.tasks=3", "training.steps=4", "training.batch=4", "evaluation.subset=1")
TASKS, STEPS = 3, 4
TIMEOUT = 120.0
_serve = workers._worker_main


@functools.cache
def small_corpus() -> Corpus:
    """A pool, an update, a retention set and a stand-in for the pool: all that a run needs."""
    return packed.join_packed([packed.read_packed(embedded_manifests()[name]) for name in DATASETS])


def clip_folder(folder: Path, seed: int, width: int = 32, side: int = 32) -> Path:
    """Write a small CLIP to a new folder as open_clip does for a hub: features of `width` numbers,
    of pictures of `side` pixels, which it sees otherwise than CLIP does. Returns the folder."""
    folder.mkdir()
    about = {
        "embed_dim": width,
        "vision_cfg": {"image_size": side, "layers": 1, "width": 64, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2}
        | {"layers": 1},
    }
    how = {"size": side, "mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"}
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": about, "preprocess_cfg": how})
    )
    model = models.create_model(f"local-dir:{folder}", seed)
    models.export_weights(model, folder / "open_clip_model.safetensors")
    return folder


def small_config(*settings: str) -> RunConfig:
    """Three tasks of four steps."""
    return config.parse(config.override(config.profile("quick"), [*SETTINGS, *settings]))


def small_id() -> str:
    """The id of the run that every child computes."""
    return identity.run_id_of(small_config(), small_corpus())


class Family(NamedTuple):
    """A run of another option, of two tasks of three steps. settings: assignments to the config;
    micro_batch: as in `ExecutionConfig`."""

    settings: tuple[str, ...]
    micro_batch: int | None = None


def families() -> list[Family]:
    """A run for each choice of each option, some in micro-batches; one in four scores whole test
    sets."""
    rows = [row for row in options.SETTINGS if "stream.traits=by-hand" not in row]
    rows += [("optimizer.carry=true", "merging.policy=step-ema")]
    rows = [(*row, "evaluation.full=true") if i % 4 == 0 else row for i, row in enumerate(rows)]
    return [Family(row) for row in rows] + [Family(row, 3) for row in rows[::20]]


@functools.cache
def server():
    """The fork server, running. To be called while `CMP_BUILD` is where the data are.

    A process has one such server; if a study began one before, it gives way.
    """
    forkserver._forkserver._stop()
    context = get_context("forkserver")
    context.set_forkserver_preload(["forked_preload"])
    with pytest.MonkeyPatch.context() as patch:  # the server does not take over sys.path
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        forkserver.ensure_running()
    return context


@dataclass(frozen=True)
class Outcome:
    """How a child ended. weights, metrics: of the stored run, if it got that far; resumed: steps
    that it found done, none if it computed nothing; error: what it refused to do; hits: a hash of
    which questions were answered right."""

    status: int | None = None
    weights: str | None = None
    metrics: pd.DataFrame | None = None
    resumed: int | None = None
    error: str = ""
    hits: str = ""


class Child:
    """A process that computes the small run, or does as `body` says, in a build folder."""

    def __init__(self, build: Path, body: Callable | None = None, *arguments):
        self.build, self.output = build, build.with_name(f"{build.name}.txt")
        self.has_begun, self.is_storing = False, False
        self._outcome = Outcome()
        self._receiver, sender = server().Pipe(duplex=False)
        body = body or compute
        self._process = server().Process(
            target=_live, args=(sender, build, self.output, body, arguments)
        )
        self._process.start()
        self.pid = self._process.pid
        sender.close()

    def hear(self, timeout: float = 0.0) -> bool:
        """Take one message, if there is any in time; false once the child is gone, too."""
        try:
            if not self._receiver.poll(timeout):
                return False
            message = self._receiver.recv()
        except (EOFError, OSError):
            return False
        if isinstance(message, Outcome):
            self._outcome = message
        self.has_begun = True
        self.is_storing |= isinstance(message, str) and message == STORING
        return True

    def await_run(self) -> None:
        """Wait until the run has begun, or until the child ends without one."""
        if not self.hear(TIMEOUT):
            raise AssertionError(f"the child did not begin\n{self.said()}")

    def alive(self) -> bool:
        """Whether it still runs."""
        return self._process.is_alive()

    def signal(self, number: int) -> None:
        """Send a signal, if there is anyone to get it."""
        if self.alive():
            os.kill(self.pid, number)

    def outcome(self) -> Outcome:
        """Wait for its end."""
        self._process.join(TIMEOUT)
        if self.alive():
            self.signal(signal.SIGKILL)
            raise AssertionError(f"the child hangs\n{self.said()}")
        while self.hear():
            pass
        return dataclasses.replace(self._outcome, status=self._process.exitcode)

    def said(self) -> str:
        """All that it, and those before it in the same folder, printed."""
        return self.output.read_text() if self.output.exists() else ""


def _live(sender: Connection, build: Path, output: Path, body: Callable, arguments: tuple) -> None:
    handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for standard in (1, 2):
        os.dup2(handle, standard)
    os.environ["CMP_BUILD"] = str(build)
    # nothing damaged may ever be met, so no warning of it
    warnings.filterwarnings("error", category=UserWarning, module="cmp")
    packed.load_embedded = lambda *roles: small_corpus()
    body(sender.send, *arguments)


def compute(
    tell: Callable[[object], None], trouble: str = "", save: int = 1, family: Family | None = None
) -> None:
    """Compute the small run, a checkpoint a step. trouble: one of `TROUBLES`, from save number
    `save` on, the first being 1; family: settings of another run, whose weights are stored, too."""
    launch.CheckpointManager = functools.partial(CheckpointManager, interval=0.0)
    if trouble:
        _before_save(save, TROUBLES[trouble])
    steps_done: list[int] = []
    observer = Observer(
        step=lambda task, step, result, model: tell("a step"),
        task=lambda done, scores: steps_done.append(0),
        resumed=steps_done.append,
    )
    save_run = store.save_run

    def told(*arguments) -> None:
        tell(STORING)
        save_run(*arguments)

    store.save_run = told
    run_config = small_config() if family is None else options.small(*family.settings)
    tell("begun")
    try:
        run = launch.run_one(
            run_config, observer, execution=family and ExecutionConfig(family.micro_batch),
            keep=family is not None,
        )  # fmt: skip
    except CmpError as error:
        tell(Outcome(error=str(error)))
    else:
        hits = hashlib.sha256(b"".join(run.hits[name].tobytes() for name in sorted(run.hits)))
        resumed = steps_done[0] if steps_done else None
        tell(Outcome(None, run.weights, run.metrics, resumed, hits=hits.hexdigest()))


def command(
    tell: Callable[[object], None], arguments: tuple[str, ...], number: int = 0, at: int = 0
) -> None:
    """`cmp ARGUMENTS`; signal `number` comes in step number `at` of the run, the first being 1."""
    watch = computing.progress_observer

    def watch_and_stop(*arguments) -> Observer:
        observer = watch(*arguments)

        def step(task: int, step: int, result: StepResult, model: nn.Module) -> None:
            observer.step(task, step, result, model)
            if number and task * STEPS + step + 1 == at:
                os.kill(os.getpid(), number)

        return Observer(step, observer.task, observer.resumed)

    computing.progress_observer = watch_and_stop
    cli.sys.argv = ["cmp", *arguments]
    cli.main()


LETHAL, DEADLY = 0.0011, 0.0012
"""Peak learning rates of runs that kill their worker in their second task: once, and always."""


def study(tell: Callable[[object], None], grids: Path, *arguments: str) -> None:
    """`cmpt study ARGUMENTS` on the grids of a folder; its workers are children of the fork server
    as well, and live as `serve` says."""
    forkserver._forkserver.ensure_running = lambda: None  # it is, though only its parent can ask
    studies.STUDIES, workers._worker_main = grids, serve
    tell("begun")
    cli.sys.argv = ["cmp", "study", *arguments]
    cli.main()


def serve(pipe: Connection, device: str, environment: dict[str, str]) -> None:
    """A worker's life on the small corpus. It leaves a file of its process's number beside its
    build folder, as `workers_of` reads, others once it has begun a run and computed a step, and one
    line in "resumed" for each run that goes on.

    With a file "slow" there, every step takes a while; runs of some learning rates are lethal.
    """
    packed.load_embedded = lambda *roles: small_corpus()
    place, run_one = Path(f"{environment['CMP_BUILD']}-workers"), launch.run_one
    place.mkdir(exist_ok=True)

    def watched(run_config: RunConfig, **options) -> store.StoredRun:
        def step(task: int, step: int, result: StepResult, model: nn.Module) -> None:
            (place / f"step-{os.getpid()}").touch()
            if (place / "slow").exists():
                time.sleep(0.5)
            peak, mark = run_config.schedule.peak, place / "died"
            if task == 1 and peak == LETHAL and not mark.exists():
                mark.touch()
                die()
            if task == 1 and peak == DEADLY:
                die()

        def resumed(steps: int) -> None:
            with open(place / "resumed", "a") as file:
                file.write(f"{steps}\n")

        (place / f"begun-{os.getpid()}").touch()
        return run_one(run_config, Observer(step, resumed=resumed), **options)

    launch.run_one = watched
    (place / str(os.getpid())).touch()
    _serve(pipe, device, environment)


def workers_of(build: Path) -> list[int]:
    """The workers that studies in a build folder have, living ones only."""
    names = [path.name for path in Path(f"{build}-workers").glob("[0-9]*")]
    return sorted(int(name) for name in names if is_alive(int(name)))


def is_alive(pid: int) -> bool:
    """Whether a process runs."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def await_true(condition: Callable[[], object], what: str, seconds: float = TIMEOUT) -> None:
    """Wait until something is so; `AssertionError` says what never was."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"after {seconds:g} s: never {what}"
        time.sleep(0.01)


def _before_save(number: int, action: Callable[[], None]) -> None:
    """Do something right before a run's save of this number."""
    save, count = CheckpointManager.save, iter(range(1, 1000))

    def counted(manager: CheckpointManager, state: checkpoints.RunState) -> None:
        if next(count) == number:
            action()
        save(manager, state)

    CheckpointManager.save = counted


def die(*_: object, **__: object) -> None:
    """Die as if the power failed."""
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(TIMEOUT)  # the signal is on its way


def _die_instead(place: object, name: str) -> Callable[[], None]:
    return lambda: setattr(place, name, die)


def _die_half_written() -> None:
    save_file = safetensors.torch.save_file

    def write_half(tensors: dict, path: Path, header: dict) -> None:
        save_file(tensors, path, header)
        os.truncate(path, path.stat().st_size // 2)
        die()

    safetensors.torch.save_file = write_half


def _die_flushing(content: str = "") -> Callable[[], None]:
    """Die where a run's folder would be flushed, once it has this content."""
    real = files.sync_to_disk

    def flush(path: Path) -> None:
        if path.match("runs/*") and (path / content).exists():
            die()
        real(path)

    return lambda: [setattr(place, "sync_to_disk", flush) for place in (files, store)]


def _die_renaming(name: str) -> Callable[[], None]:
    """Die where a file would get this name."""
    real = os.replace

    def replace(source: Path, target: Path) -> None:
        if Path(target).name == name:
            die()
        real(source, target)

    return lambda: setattr(os, "replace", replace)


def _die_pruning(before: bool) -> None:
    unlink = Path.unlink

    def prune(path: Path, missing_ok: bool = False) -> None:
        is_checkpoint = checkpoints._FILE_NAME.fullmatch(path.name)
        if not (before and is_checkpoint):
            unlink(path, missing_ok)
        if is_checkpoint:
            die()

    Path.unlink = prune


def _die_removing() -> None:
    """Die after the first file."""
    real = Path.unlink

    def unlink(path: Path, missing_ok: bool = False) -> None:
        real(path, missing_ok)
        die()

    remove = CheckpointManager.remove

    def start_removing(manager: CheckpointManager) -> None:
        Path.unlink = unlink
        remove(manager)

    CheckpointManager.remove = start_removing


def _fill_disk() -> None:
    """From now on no file takes more than a third of a checkpoint: writes fail, as on a full disk;
    Python ignores the signal that comes with it."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (6_000_000, 6_000_000))


def _make_read_only() -> None:
    """Nobody may write to the run's folder, which root always may: so root goes."""
    checkpoints.run_folder(small_id()).chmod(0o555)
    if os.getuid() == 0:
        os.setuid(pwd.getpwnam("nobody").pw_uid)


TROUBLES: dict[str, Callable[[], None]] = {
    "before the write": _die_instead(safetensors.torch, "save_file"),
    "half written": _die_half_written,
    "before the hash": _die_instead(files, "file_digest"),
    "before the rename": _die_instead(os, "replace"),
    "before the folder is flushed": _die_flushing(),
    "before the old one is pruned": functools.partial(_die_pruning, True),
    "after the old one is pruned": functools.partial(_die_pruning, False),
    "before the result is written": _die_instead(pd.DataFrame, "to_parquet"),
    "before the result is renamed": _die_renaming(store.METRICS),
    "before the record is renamed": _die_renaming(store.RECORD),
    "after the record is renamed": _die_flushing(store.RECORD),
    "before the checkpoints are removed": _die_instead(CheckpointManager, "remove"),
    "while the checkpoints are removed": _die_removing,
    "the disk is full": _fill_disk,
    "the folder is read-only": _make_read_only,
}


def leftovers(build: Path, run_id: str | None = None) -> list[str]:
    """What a finished run left in its build folder beside itself."""
    name = (run_id or small_id())[:SHORT_ID]
    run = {"runs", f"runs/{name}", *(f"runs/{name}/{x}" for x in (*store.FILES, "log.jsonl"))}
    return sorted({str(path.relative_to(build)) for path in build.rglob("*")} - run)
