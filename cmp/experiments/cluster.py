"""Runs as Ray tasks, on one machine or a cluster; Ray is an extra: `pip install "ray>=2.40,<3"`.

Each node computes in its own build folder, where `cmpt data build` has been called (or which all
nodes share), and hands the finished run back to the process that started it, which stores it; with
its final weights, if it keeps them.
"""

import contextlib
import logging
import os
import platform
import signal
import socket
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import Any

import torch

from cmp.config import RunConfig
from cmp.errors import CmpError, Interrupted, first_line
from cmp.experiments import workers
from cmp.models import Network
from cmp.project import build_folder
from cmp.runs import identity, launch, store
from cmp.runs.checkpoints import StopRequest

STOP_SECONDS = 20
"""Seconds that runs are given to finish their step and save, once a stop was requested."""


def run_on_ray(
    todo: list[RunConfig],
    jobs: int,
    device: str,
    finished: Callable[[RunConfig], None],
    stop: StopRequest,
) -> workers.Failures:
    """Compute runs on the Ray cluster that `RAY_ADDRESS` names, or on this machine without one.

    A run takes one core, and a GPU where `device` is one. A run whose node or worker is lost starts
    again elsewhere, from its checkpoint where the nodes share a build folder.

    Args:
        todo: The runs.
        jobs: How many are computed at a time.
        device: "cpu" or "cuda".
        finished: Called with each run that did not fail.
        stop: Whether a signal came.

    Returns:
        Why runs failed.

    Raises:
        CmpError: Ray is not installed, or no cluster can be reached.
        Interrupted: A signal came; the runs are saved.
    """
    with _connected(jobs) as ray:
        task, references = _ray_task(ray, device), set()

        def start(run_config: RunConfig) -> Any:
            # without the weights the node, too, is asked for them, and says what is missing
            reference = task.remote(identity.known_id(run_config), run_config, device)
            references.add(reference)
            return reference

        def wait(running: Iterable[Any]) -> Iterator[tuple[Any, workers.Outcome]]:
            for reference in ray.wait(list(running), timeout=0.2)[0]:
                references.remove(reference)
                yield reference, _outcome(ray, reference)

        try:
            return workers.compute_all(todo, jobs, start, wait, finished, stop)
        except Interrupted:
            # they save themselves, as on SIGINT; first to stop are those that would start otherwise
            waiting = list(references)
            for reference in reversed(waiting):
                ray.cancel(reference)
            ray.wait(waiting, num_returns=len(waiting), timeout=STOP_SECONDS)
            raise


@contextlib.contextmanager
def _connected(jobs: int) -> Iterator[ModuleType]:
    """Yield Ray, connected; a cluster that is started here ends here."""
    address, handler = os.environ.get("RAY_ADDRESS"), signal.getsignal(signal.SIGTERM)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not address:  # the only way to 127.0.0.1; Ray reads it when it is imported
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    try:
        import ray
    except ImportError as error:
        raise CmpError('backend ray: Ray is not installed; `pip install "ray>=2.40,<3"`') from error
    if ray.is_initialized():
        yield ray
        return
    options = {} if address else {"num_cpus": jobs, "include_dashboard": False}
    try:
        host, _, port = (address or "").removeprefix("ray://").rpartition(":")
        if port.isdecimal():  # an error where nothing answers; Ray itself would try for minutes
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address or "local", log_to_driver=False, logging_level=logging.ERROR, **options)
    except SystemExit as error:  # how Ray ends at SIGTERM
        raise Interrupted("stopped before a run began", signal.SIGTERM) from error
    except Exception as error:  # Ray raises all kinds, plain `Exception` too
        message = f"backend ray: {address or 'a local cluster'}: {first_line(error)}"
        raise CmpError(message) from error
    finally:
        if signal.getsignal(signal.SIGTERM) is not handler:  # Ray took it over
            signal.signal(signal.SIGTERM, handler)
    try:
        yield ray
    finally:
        ray.shutdown()


def _ray_task(ray: ModuleType, device: str) -> Any:
    """Return `_compute_on_node` as a Ray task.

    Ray's own retries are off: they have no end for a run that is larger than the memory.
    """
    gpus = 0 if device == "cpu" else 1
    if gpus > ray.cluster_resources().get("GPU", 0):
        raise CmpError(f"device {device}: no node of the Ray cluster has a GPU")
    environment = workers.worker_environment()
    if "CMP_BUILD" in environment:
        environment["CMP_BUILD"] = str(build_folder().absolute())
    options = {"num_gpus": gpus, "runtime_env": {"env_vars": environment}}
    return ray.remote(num_cpus=1, max_retries=0, **options)(_compute_on_node)


def _outcome(ray: ModuleType, reference: Any) -> workers.Outcome:
    """Store a task's run, or return why there is none, or what became of its node or worker."""
    try:
        result = ray.get(reference)
    except ray.exceptions.RayTaskError as error:  # `_compute_on_node` could not even be called
        return workers.failure_reason(error.cause or error)
    except ray.exceptions.RayError as error:  # whose text has pages of advice
        return workers.LostRun(f"lost {workers.ATTEMPTS} times, last time: {first_line(error)}")
    if isinstance(result, str):
        return result
    run, model = result
    if not store.is_stored(run.id):  # by the worker, in a shared build folder
        store.save_run(run, model)
    return None


def _compute_on_node(
    run_id: str, run_config: RunConfig, device: str
) -> tuple[store.StoredRun, Network | None] | str:
    """Return a run with its final network, None if it is not kept; or why it failed."""
    torch.set_num_threads(1)
    try:
        workers.load_plugins()
        store.fetch_start(run_config)
        if identity.run_id_of(run_config) != run_id:
            raise CmpError(f"node {platform.node()}: other data, bases or version of cmp than here")
        run = launch.run_one(run_config, device=device, wait=True)
        return run, store.final_model(run) if launch.is_kept(run.id, weights=True) else None
    except (Exception, Interrupted) as error:
        return workers.failure_reason(error)
