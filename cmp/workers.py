"""Runs in one-thread worker processes of this machine, where a lost worker costs its run only."""

import concurrent.futures
import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator

import torch
from pebble import ProcessExpired, ProcessPool

from cmp import runs, store
from cmp.checkpoints import Keeper
from cmp.config import RunConfig
from cmp.data import corpus as corpora
from cmp.errors import CmpError, Interrupted
from cmp.signals import StopRequest

ATTEMPTS = 5
"""Times that a run is begun or gone on with before its lost workers are taken for its own fault."""

Failures = dict[RunConfig, str]


def run_one(
    run_config: RunConfig,
    observer: runs.Observer = runs.SILENT,
    device: str = "cpu",
    wait: bool = False,
) -> store.Run:
    """The stored run of a config; computed in this process if it is missing, from its last
    checkpoint on. wait: for another process that computes it, instead of an error."""
    corpus = corpora.load()
    run_id = store.identify(run_config, corpus)
    if store.is_stored(run_id):
        Keeper(run_id).remove()  # a kill may have come between the last two lines below
        return store.load(run_id)
    with Keeper(run_id, wait=wait) as keeper:
        if not store.is_stored(run_id):  # else another process was faster
            result = runs.run(run_config, corpus, observer, device=device, keeper=keeper)
            store.save(store.finished(run_id, run_config, result))
        keeper.remove()
    return store.load(run_id)


def local(todo: list[RunConfig], jobs: int, device: str, finished: Callable[[], None]) -> Failures:
    """Compute runs in `jobs` processes; calls `finished` after each, returns why others failed.

    A worker that dies (out of memory, killed) is replaced and its run goes on from its checkpoint.
    Raises `Interrupted` on SIGINT and SIGTERM, once the workers have saved their runs.
    """
    attempts, failures = dict.fromkeys(todo, 0), {}
    with StopRequest() as stop, _pool(min(jobs, len(todo))) as pool:
        waiting = {}

        def begin(run_config: RunConfig) -> None:
            attempts[run_config] += 1
            waiting[pool.schedule(_work, args=[run_config, device])] = run_config

        for run_config in todo:
            begin(run_config)
        while waiting:
            done, _ = concurrent.futures.wait(waiting, 0.2, concurrent.futures.FIRST_COMPLETED)
            if stop.signal:
                message = f"stopped with {len(waiting)} runs to go; the same command goes on"
                raise Interrupted(message, stop.signal)
            for future in done:
                run_config = waiting.pop(future)
                error = future.exception()
                if error is None:
                    finished()
                elif isinstance(error, ProcessExpired) and attempts[run_config] < ATTEMPTS:
                    begin(run_config)
                else:
                    failures[run_config] = reason(error)
    return failures


def reason(error: BaseException) -> str:
    """Why a run failed, in one line."""
    if isinstance(error, ProcessExpired):
        code = error.exitcode or 0
        cause = signal.Signals(-code).name if code < 0 else f"status {code}"
        return f"its worker died {ATTEMPTS} times, last by {cause}; is there enough memory?"
    if isinstance(error, CmpError):
        return str(error)
    return f"{type(error).__name__}: {error}"


@contextlib.contextmanager
def _pool(size: int) -> Iterator[ProcessPool]:
    """A pool whose workers end with it, whatever ends it."""
    context = multiprocessing.get_context("spawn")
    pool = ProcessPool(size, context=context, initializer=_prepare, initargs=[os.getpid()])
    try:
        yield pool
    finally:
        pool.stop()
        pool.join()


def _prepare(parent: int) -> None:
    """Set a worker up: one thread, and an end of its own once its parent was killed."""
    torch.set_num_threads(1)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def _work(run_config: RunConfig, device: str) -> None:
    run_one(run_config, device=device, wait=True)
