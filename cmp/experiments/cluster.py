"""Runs as Ray tasks, on one machine or a cluster; Ray is an extra: `pip install "ray>=2.40,<3"`.

Each node computes in its own build folder, where `cmpt data build` has been called (or which all
nodes share), and hands the finished run back to the process that asked; that process stores it.
"""

import contextlib
import logging
import os
import platform
import signal
import socket
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch

from cmp.checkpoints import StopRequest
from cmp.config import RunConfig
from cmp.data import load_corpus
from cmp.errors import CmpError, Interrupted
from cmp.experiments import store, workers
from cmp.experiments.workers import ATTEMPTS, Failures
from cmp.files import build_folder

STOP_SECONDS = 20
"""Seconds that runs are given to finish their step and save, once a stop was asked for."""


def run_on_ray(
    todo: list[RunConfig], jobs: int, device: str, finished: Callable[[], None]
) -> Failures:
    """Compute runs on the Ray cluster that `RAY_ADDRESS` names, or on this machine without one.

    A run takes one core, and a GPU where `device` is one; at most `jobs` run at a time. One whose
    node or worker is lost is begun again elsewhere, from its checkpoint where the nodes share a
    build folder. Calls `finished` after each run and returns why others failed. Raises
    `Interrupted` on SIGINT and SIGTERM, once the runs are saved.
    """
    queue, waiting = list(reversed(todo)), {}
    attempts, failures = dict.fromkeys(todo, 0), {}
    with StopRequest() as stop, _connected(jobs) as engine:
        task = _ray_task(engine, device)
        while queue or waiting:
            while queue and len(waiting) < jobs:
                run_config = queue.pop()
                attempts[run_config] += 1
                run_id = store.run_id_of(run_config, load_corpus(run_config))
                waiting[task.remote(run_id, run_config, device)] = run_config
            done, _ = engine.wait(list(waiting), timeout=0.2)
            if stop.signal:
                _stop_tasks(engine, list(waiting))
                message = f"stopped with {len(waiting) + len(queue)} runs to go"
                raise Interrupted(f"{message}; the same command goes on", stop.signal)
            for each in done:
                run_config = waiting.pop(each)
                result = _task_result(engine, each)
                if isinstance(result, store.StoredRun):
                    if not store.is_stored(result.id):  # by the worker, in a shared build folder
                        store.save_run(result)
                    finished()
                elif isinstance(result, str):
                    failures[run_config] = result
                elif attempts[run_config] < ATTEMPTS:
                    queue.append(run_config)
                else:
                    failures[run_config] = (
                        f"lost {ATTEMPTS} times, last time so: {_first_line(result)}"
                    )
    return failures


@contextlib.contextmanager
def _connected(jobs: int) -> Iterator[ModuleType]:
    """Ray, connected to a cluster; one that begins here is this machine's only, and ends here."""
    address, handler = os.environ.get("RAY_ADDRESS"), signal.getsignal(signal.SIGTERM)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not address:  # the only way to 127.0.0.1; Ray reads it when it is imported
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    try:
        import ray as engine
    except ImportError as error:
        raise CmpError('backend ray: Ray is not installed; `pip install "ray>=2.40,<3"`') from error
    if engine.is_initialized():
        yield engine
        return
    here = {} if address else {"num_cpus": jobs, "include_dashboard": False}
    try:
        if address:
            _check_reachable(address)
        engine.init(address or "local", log_to_driver=False, logging_level=logging.ERROR, **here)
    except SystemExit as error:  # how Ray ends at SIGTERM
        raise Interrupted("stopped before a run began", signal.SIGTERM) from error
    except Exception as error:  # Ray raises all kinds, plain `Exception` too
        raise CmpError(
            f"backend ray: {address or 'a local cluster'}: {_first_line(error)}"
        ) from error
    finally:
        if signal.getsignal(signal.SIGTERM) is not handler:  # Ray took it over
            signal.signal(signal.SIGTERM, handler)
    try:
        yield engine
    finally:
        engine.shutdown()


def _check_reachable(address: str) -> None:
    """`OSError` where nothing answers; Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdecimal():
        socket.create_connection((host, int(port)), timeout=10).close()


def _ray_task(engine: ModuleType, device: str) -> Any:
    """`_work` as a Ray task. Retries are left to `ray`: Ray's own have no end for a run that is
    larger than the memory."""
    gpus = 0 if device == "cpu" else 1
    if gpus > engine.cluster_resources().get("GPU", 0):
        raise CmpError(f"device {device}: no node of the Ray cluster has a GPU")
    folder = {"CMP_BUILD": str(build_folder().absolute())} if "CMP_BUILD" in os.environ else {}
    return engine.remote(
        num_cpus=1, num_gpus=gpus, max_retries=0, runtime_env={"env_vars": folder}
    )(_compute_on_node)


def _task_result(engine: ModuleType, done: Any) -> store.StoredRun | str | Exception:
    """A task's run; or why there is none; or what became of its node or worker."""
    try:
        return engine.get(done)
    except engine.exceptions.RayTaskError as error:  # not even `_work` could be called
        return workers.failure_reason(error.cause or error)
    except engine.exceptions.RayError as error:
        return error


def _stop_tasks(engine: ModuleType, waiting: list[Any]) -> None:
    """Have runs save themselves, as they do on SIGINT; first those that would begin otherwise."""
    for each in reversed(waiting):
        engine.cancel(each)
    engine.wait(waiting, num_returns=len(waiting), timeout=STOP_SECONDS)


def _first_line(error: Exception) -> str:
    """What is said first; Ray adds pages of advice."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _compute_on_node(run_id: str, run_config: RunConfig, device: str) -> store.StoredRun | str:
    torch.set_num_threads(1)
    try:
        if store.run_id_of(run_config, load_corpus(run_config)) != run_id:
            raise CmpError(f"node {platform.node()}: other data, bases or version of cmp than here")
        return workers.run_one(run_config, device=device, wait=True)
    except (Exception, Interrupted) as error:
        return workers.failure_reason(error)
