"""Compute runs in one-thread worker processes on this machine; a lost worker affects only its
run."""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import torch

from cmp.config import RunConfig
from cmp.errors import Interrupted
from cmp.faults import describe_bug, explain_failure
from cmp.files import write_atomic
from cmp.project import build_folder
from cmp.registry import load_plugin
from cmp.runs import launch
from cmp.runs.checkpoints import StopRequest
from cmp.scale.decoding import JOBS, STOPS

ATTEMPTS = 5
"""How often a run is started or resumed before the loss of its worker is a failure."""


Failures = dict[RunConfig, str]
"""The reasons why runs failed."""


def list_devices(device: str) -> list[str]:
    """Return the devices for workers; for "cuda", all visible GPUs."""
    cards = torch.cuda.device_count() if device == "cuda" else 0
    return [f"cuda:{number}" for number in range(cards)] or [device]


def default_jobs(device: str) -> int:
    """Return how many runs to compute at a time: two on a CPU, or one per GPU."""
    return 2 if device == "cpu" else len(list_devices(device))


def run_locally(
    todo: list[RunConfig],
    jobs: int,
    device: str,
    finished: Callable[[RunConfig], None],
    stop: StopRequest,
) -> Failures:
    """Compute runs in worker processes.

    A worker that dies (out of memory, killed) is replaced, and its run resumes from its checkpoint.
    With "cuda", workers are spread evenly over the GPUs.

    Args:
        todo: The runs to compute.
        jobs: The number of workers.
        device: "cpu" or "cuda".
        finished: Called with each run that did not fail.
        stop: Records whether a signal was received.

    Returns:
        The reasons why runs failed.

    Raises:
        Interrupted: A signal was received; the workers have saved their runs.
    """
    devices = list_devices(device)
    with _worker_pool() as pool:
        busy: dict[Connection, _Worker] = {}

        def start(run_config: RunConfig) -> Connection:
            worker = next((idle for idle in pool if idle not in busy.values()), None)
            if worker is None:
                counts = Counter(other.device for other in pool)
                pool.append(worker := _Worker(min(devices, key=lambda d: counts[d]), jobs))
            with contextlib.suppress(OSError):  # the worker is dead, as its pipe will show
                worker.pipe.send(run_config)
            busy[worker.pipe] = worker
            return worker.pipe

        def wait(pipes: Iterable[Connection]) -> Iterator[tuple[Connection, Outcome]]:
            for pipe in connection.wait(pipes, 0.2):
                worker = busy.pop(pipe)
                try:
                    yield pipe, pipe.recv()
                except (EOFError, OSError):
                    pool.remove(worker)
                    yield pipe, LostRun(worker.death())

        return compute_all(todo, jobs, start, wait, finished, stop)


class LostRun(str):
    """How a run's process was lost, in words."""


Outcome = str | None
"""The outcome of a run: None if it is stored, or why it failed; a `LostRun` may start again."""


def compute_all(
    todo: list[RunConfig],
    jobs: int,
    start: Callable[[RunConfig], Any],
    wait: Callable[[Iterable[Any]], Iterable[tuple[Any, Outcome]]],
    finished: Callable[[RunConfig], None],
    stop: StopRequest,
) -> Failures:
    """Compute runs with the given functions, starting a lost run again up to `ATTEMPTS` times in
    total.

    While studies are paused (`pause_file`), runs in progress finish and no new ones begin.

    Args:
        todo: The runs to compute.
        jobs: The number of runs at a time.
        start: Starts a run and returns a handle.
        wait: Waits briefly for handles, and yields those that have ended with their outcome.
        finished: Called with each run that did not fail.
        stop: Records whether a signal was received.

    Returns:
        The reasons why runs failed.

    Raises:
        Interrupted: A signal was received before all runs had ended.
    """
    queue, attempts, failures = list(reversed(todo)), Counter(), {}
    running: dict[Any, RunConfig] = {}
    while queue or running:
        is_paused = pause_file().exists()
        if is_paused and not running:
            time.sleep(0.2)
        while queue and len(running) < jobs and not is_paused:
            run_config = queue.pop()
            running[start(run_config)] = run_config
        for handle, outcome in wait(running):
            run_config = running.pop(handle)
            attempts[run_config] += isinstance(outcome, LostRun)
            if outcome is None:
                finished(run_config)
            elif isinstance(outcome, LostRun) and attempts[run_config] < ATTEMPTS:
                queue.append(run_config)
            else:
                failures[run_config] = outcome
        if stop.signal and (queue or running):
            message = f"stopped with {len(queue) + len(running)} runs to go"
            raise Interrupted(f"{message}; repeat the command to continue", stop.signal)
    return failures


def pause_file() -> Path:
    """Return the file that pauses all studies of a build folder while it exists."""
    return build_folder() / "paused"


def pause_studies(pause: bool) -> None:
    """Pause or resume all studies of this build folder."""
    if pause:
        write_atomic(pause_file(), "")
    else:
        pause_file().unlink(missing_ok=True)


def failure_reason(error: BaseException) -> str:
    """Return why a run failed: a sentence, and for a bug also its traceback."""
    return explain_failure(error) or describe_bug(error)


def worker_environment() -> dict[str, str]:
    """Return the environment variables that a worker process shares with this one."""
    keys = ("CMP_BUILD", "CMP_PLUGINS", "CMP_WORKERS")
    return {key: os.environ[key] for key in keys if key in os.environ}


def load_plugins() -> None:
    """Load the plugins named in `CMP_PLUGINS`."""
    for path in filter(None, os.environ.get("CMP_PLUGINS", "").split(os.pathsep)):
        load_plugin(Path(path))


class _Worker:
    """A process that computes runs one after another.

    Each worker has its own pipe, and there are no shared locks, so if one is killed, the others and
    this process continue.
    """

    def __init__(self, device: str, jobs: int):
        self.device, context = device, _context(device)
        self.pipe, theirs = context.Pipe()
        environment = worker_environment() | {"CMP_BUILD": str(build_folder().absolute())}
        arguments = (theirs, device, environment | {JOBS: str(jobs)})
        # not a daemon, as it may have children that decode images; `_worker_pool` ends it
        self.process = context.Process(target=_worker_main, args=arguments, daemon=False)
        self.process.start()
        theirs.close()

    def signal(self, number: int) -> bool:
        """Send the process a signal (0 for none), and return whether it is running.

        The server that started it may have died from a signal to all processes of a job.
        """
        self.process.is_alive()  # reaps it if it has ended
        with contextlib.suppress(OSError):
            os.kill(self.process.pid, number)
            return True
        return False

    def death(self) -> str:
        """Return why the process died, and how often the run's workers died."""
        self.process.join()
        code = self.process.exitcode
        cause = f"by {signal.Signals(-code).name}" if code < 0 else f"with status {code}"
        return f"its worker died {ATTEMPTS} times (finally {cause}); check that memory suffices"


def _context(device: str) -> BaseContext:
    """Return how workers start: if it is safe, from a server that has imported everything.

    The server outlives a study, so the next one in the same process starts immediately.
    """
    if device != "cpu" or sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


@contextlib.contextmanager
def _worker_pool() -> Iterator[list[_Worker]]:
    """Yield a list for workers, and end them on exit, after saving their runs.

    They are asked again every second, since a worker may have been between two runs. A second
    Ctrl-C ends this process at any time.
    """
    pool: list[_Worker] = []
    try:
        yield pool
    finally:
        try:
            for worker in pool:
                worker.pipe.close()
            while alive := [worker for worker in pool if worker.signal(0)]:
                for worker in alive:
                    worker.signal(signal.SIGTERM)
                living = [worker.process for worker in alive if worker.process.is_alive()]
                connection.wait([process.sentinel for process in living], 1.0)
        finally:
            for worker in pool:
                worker.process.kill()


def _worker_main(pipe: Connection, device: str, environment: dict[str, str]) -> None:
    """Compute runs until the pipe closes."""
    parent = multiprocessing.parent_process()
    stop_gently(lambda: connection.wait([parent.sentinel]))
    os.environ.update(environment)
    torch.set_num_threads(1)
    reason = None
    try:
        load_plugins()
        if device != "cpu":
            torch.cuda.set_device(device)
    except Exception as error:  # a plugin may have been edited since the study began
        reason = failure_reason(error)
    with contextlib.suppress(EOFError, OSError):  # the parent has died or finished
        while True:
            run_config = pipe.recv()
            pipe.send(reason or _attempt_run(run_config, device))


def _attempt_run(run_config: RunConfig, device: str) -> str | None:
    """Compute a run, and return why it failed or None. If the run is stopped, end the worker."""
    try:
        launch.run_one(run_config, device=device, wait=True)
    except Interrupted as stop:
        sys.exit(128 + stop.signal)
    except Exception as error:
        return failure_reason(error)
    return None


def stop_gently(wait_for_parent: Callable[[], Any]) -> None:
    """Let signals affect only the runs of this process, so that a second one does not interrupt a
    save.

    Args:
        wait_for_parent: Returns once the parent has died. From then on, the process is repeatedly
            asked to stop and save, since it may be between two runs.
    """
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)

    def stop() -> None:
        wait_for_parent()
        while True:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1.0)

    threading.Thread(target=stop, daemon=True).start()
