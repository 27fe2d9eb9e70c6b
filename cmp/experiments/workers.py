"""Runs in one-thread worker processes of this machine, where a lost worker costs its run only."""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext

import torch

from cmp import distributed, models
from cmp.checkpoints import SIGNALS, CheckpointManager, StopRequest
from cmp.config import RunConfig
from cmp.data import load_corpus
from cmp.errors import CmpError, Interrupted
from cmp.experiments import store
from cmp.files import build_folder
from cmp.runner import NO_OBSERVER, Observer, execute
from cmp.training import ExecutionConfig

ATTEMPTS = 5
"""Times that a run is begun or gone on with before its lost workers are taken for its own fault."""

_IS_STORED = "stored"
"""What the first of several processes tells the others of a run that need not be computed."""

Failures = dict[RunConfig, str]


def run_one(
    run_config: RunConfig,
    observer: Observer = NO_OBSERVER,
    device: str = "cpu",
    wait: bool = False,
    execution: ExecutionConfig = ExecutionConfig(),
    keep: bool = False,
) -> store.StoredRun:
    """The stored run of a config; computed in this process if it is missing, from its last
    checkpoint on. wait: for another process that computes it, instead of an error. keep: its final
    weights are stored too, as those of every model are that is not embedded; a run that is stored
    without them is computed again. Of several processes (`cmp.steps.distributed`) all call this."""
    corpus = load_corpus(run_config)
    run_id = store.run_id_of(run_config, corpus)
    if distributed.rank():
        if not distributed.broadcast("", device):
            execute(run_config, corpus, observer, device=device, execution=execution)
        distributed.barrier()
        return store.load_run(run_id)
    if is_kept(run_id, keep):
        distributed.broadcast(_IS_STORED, device)
        CheckpointManager(run_id).remove()  # a kill may have come between the last two lines below
    else:
        with CheckpointManager(run_id, wait=wait) as manager:
            if is_kept(run_id, keep):  # another process was faster
                distributed.broadcast(_IS_STORED, device)
            else:
                distributed.broadcast("", device)
                result = execute(
                    run_config,
                    corpus,
                    observer,
                    device=device,
                    manager=manager,
                    execution=execution,
                )
                keep = keep or run_config.model.name not in models.family_names()
                finished = store.make_stored_run(run_id, run_config, result)
                store.save_run(finished, result.model if keep else None)
            manager.remove()
    distributed.barrier()
    return store.load_run(run_id)


def is_kept(run_id: str, weights: bool) -> bool:
    """Whether a run is stored, with its final weights where they are asked for."""
    return store.is_stored(run_id) and (not weights or store.weights_path(run_id).exists())


def run_locally(
    todo: list[RunConfig], jobs: int, device: str, finished: Callable[[], None]
) -> Failures:
    """Compute runs in `jobs` processes; calls `finished` after each, returns why others failed.

    A worker that dies (out of memory, killed) is replaced and its run goes on from its checkpoint.
    Raises `Interrupted` on SIGINT and SIGTERM, once the workers have saved their runs.
    """
    queue, attempts, failures = list(reversed(todo)), Counter(), {}
    with StopRequest() as stop, _worker_pool() as crew:
        busy: dict[Connection, _Worker] = {}
        while queue or busy:
            while queue and len(busy) < jobs:
                worker = next((each for each in crew if each not in busy.values()), None)
                if worker is None:
                    crew.append(worker := _Worker(device))
                worker.begin(queue.pop())
                busy[worker.pipe] = worker
            for pipe in connection.wait(busy, 0.2):
                worker = busy.pop(pipe)
                run_config = worker.run_config
                try:
                    why = pipe.recv()
                except (EOFError, OSError):
                    crew.remove(worker)
                    attempts[run_config] += 1
                    if attempts[run_config] < ATTEMPTS:
                        queue.append(run_config)
                        continue
                    why = worker.death()
                if why:
                    failures[run_config] = why
                else:
                    finished()
            if stop.signal and (queue or busy):
                message = f"stopped with {len(queue) + len(busy)} runs to go"
                raise Interrupted(f"{message}; the same command goes on", stop.signal)
    return failures


def failure_reason(error: BaseException) -> str:
    """Why a run failed, in one line."""
    if isinstance(error, CmpError):
        return str(error)
    try:
        text = " ".join(str(error).split())
    except Exception:  # of an exception that cannot even be shown
        text = "(it has no text)"
    return f"{type(error).__name__}: {text}"


class _Worker:
    """A process that computes the runs it is handed, one after another.

    Each worker has a pipe of its own, and no lock is shared: whenever one is killed, the others and
    this process go on.
    """

    def __init__(self, device: str):
        context = _context(device)
        self.pipe, theirs = context.Pipe()
        arguments = (theirs, device, str(build_folder().absolute()))
        self.process = context.Process(target=_worker_main, args=arguments, daemon=True)
        self.process.start()
        theirs.close()

    def begin(self, run_config: RunConfig) -> None:
        """Hand it a run; its answer through the pipe is why that failed, or nothing."""
        self.run_config = run_config
        with contextlib.suppress(OSError):  # it is dead, as its pipe will say next
            self.pipe.send(run_config)

    def death(self) -> str:
        """What it died of, and how often the run's workers did."""
        self.process.join()
        code = self.process.exitcode
        cause = f"by {signal.Signals(-code).name}" if code < 0 else f"with status {code}"
        return f"its worker died {ATTEMPTS} times, last {cause}; is there enough memory?"


def _context(device: str) -> BaseContext:
    """How workers start: from a server that has imported everything, where that is safe.

    The server outlives a study, so the next one in the same process starts at once.
    """
    if device != "cpu" or sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


@contextlib.contextmanager
def _worker_pool() -> Iterator[list[_Worker]]:
    """Workers, who end when this is left, those with a run once that is saved.

    They are asked again every second, as one may have been between two runs. However long it takes,
    a second signal to this process ends it.
    """
    crew: list[_Worker] = []
    try:
        yield crew
    finally:
        try:
            for worker in crew:
                worker.pipe.close()
            while alive := [each.process for each in crew if each.process.is_alive()]:
                for process in alive:
                    process.terminate()
                connection.wait([process.sentinel for process in alive], 1.0)
        finally:
            for worker in crew:
                worker.process.kill()


def _worker_main(pipe: Connection, device: str, build: str) -> None:
    """A worker's life. Signals act on its runs only, so no second one breaks off a save."""
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    os.environ["CMP_BUILD"] = build
    torch.set_num_threads(1)
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    with contextlib.suppress(EOFError, OSError):  # the parent is gone, or done
        while True:
            pipe.send(_attempt_run(pipe.recv(), device))


def _attempt_run(run_config: RunConfig, device: str) -> str | None:
    """Compute a run; returns why it failed, if it did. A run that was stopped ends the worker."""
    try:
        run_one(run_config, device=device, wait=True)
    except Interrupted as stop:
        sys.exit(128 + stop.signal)
    except Exception as error:
        return failure_reason(error)
    return None


def _stop_with_parent() -> None:
    """Stop and save once the parent is gone, asking again as in `_crew`."""
    connection.wait([multiprocessing.parent_process().sentinel])
    while True:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1.0)
