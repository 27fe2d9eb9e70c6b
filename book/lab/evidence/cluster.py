"""Compute runs as Ray tasks on one machine or a cluster. Ray is an extra:
`pip install "ray>=2.40,<3"`.

Each node computes in its own build folder, where `cmpt data build` must have been run (or which all
nodes share). It returns the finished run, with final weights if they are kept, to the process that
started it, which stores the run.
"""

import contextlib
import logging
import os
import platform
import signal
import socket  # noqa: TID251 - asks whether the cluster that the user named answers
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import Any

import torch

from cmp.config import RunConfig
from cmp.errors import CmpError, Interrupted, first_line
from cmp.models import Network
from cmp.project import build_folder
from cmp.runs import identity, launch, lookup, store
from cmp.runs.checkpoints import StopRequest
from cmp.scale.decoding import JOBS
from lab.evidence import workers

STOP_SECONDS = 20
"""Seconds that runs have to finish their step and save after a stop is requested."""


def run_on_ray(
    todo: list[RunConfig],
    jobs: int,
    device: str,
    finished: Callable[[RunConfig], None],
    stop: StopRequest,
) -> workers.Failures:
    """Compute runs on the Ray cluster at `RAY_ADDRESS`, or on this machine if it is not set.

    A run takes one core, and one GPU if `device` is "cuda"; runs on the GPUs of a node share its
    cores for decoding. If its node or worker is lost, a run restarts elsewhere, from its checkpoint
    if the nodes share a build folder.

    Args:
        todo: The runs to compute.
        jobs: The number of runs at a time.
        device: "cpu" or "cuda".
        finished: Called with each run that did not fail.
        stop: Records whether a signal was received.

    Returns:
        The reasons why runs failed.

    Raises:
        CmpError: The cluster cannot be reached.
        ModuleNotFoundError: The extra `ray` is not installed.
        Interrupted: A signal was received; the runs are saved.
    """
    with _connected(jobs) as ray:
        task, references = _ray_task(ray, device), set()

        def start(run_config: RunConfig) -> Any:
            # without the weights, the node looks for them and says what is missing
            reference = task.remote(identity.known_id(run_config), run_config, device, jobs)
            references.add(reference)
            return reference

        def wait(running: Iterable[Any]) -> Iterator[tuple[Any, workers.Outcome]]:
            for reference in ray.wait(list(running), timeout=0.2)[0]:
                references.remove(reference)
                yield reference, _outcome(ray, reference)

        try:
            return workers.compute_all(todo, jobs, start, wait, finished, stop)
        except Interrupted:
            # they save themselves, as on SIGINT; stop waiting tasks first, or they would start
            waiting = list(references)
            for reference in reversed(waiting):
                ray.cancel(reference)
            ray.wait(waiting, num_returns=len(waiting), timeout=STOP_SECONDS)
            raise


@contextlib.contextmanager
def _connected(jobs: int) -> Iterator[ModuleType]:
    """Connect to Ray and yield it; a cluster that is started here is also stopped here."""
    address, handler = os.environ.get("RAY_ADDRESS"), signal.getsignal(signal.SIGTERM)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not address:  # needed for 127.0.0.1; Ray reads it on import
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    import ray  # in the extra `ray`

    if ray.is_initialized():
        yield ray
        return
    options = {} if address else {"num_cpus": jobs, "include_dashboard": False}
    try:
        host, _, port = (address or "").removeprefix("ray://").rpartition(":")
        if port.isdecimal():  # fail if nothing answers; Ray would retry for minutes
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address or "local", log_to_driver=False, logging_level=logging.ERROR, **options)
    except SystemExit as error:  # Ray's reaction to SIGTERM
        raise Interrupted("stopped before a run began", signal.SIGTERM) from error
    except Exception as error:  # Ray raises all kinds of errors
        message = f"backend ray: {address or 'a local cluster'}: {first_line(error)}"
        raise CmpError(message) from error
    finally:
        if signal.getsignal(signal.SIGTERM) is not handler:  # Ray replaced it
            signal.signal(signal.SIGTERM, handler)
    try:
        yield ray
    finally:
        ray.shutdown()


def _ray_task(ray: ModuleType, device: str) -> Any:
    """Return `_compute_on_node` as a Ray task.

    Ray's own retries are off, since they never end for a run that exceeds the memory.
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
    """Store a task's run, or return why it failed or how its node or worker was lost."""
    try:
        result = ray.get(reference)
    except ray.exceptions.RayTaskError as error:  # `_compute_on_node` could not be called
        cause = error.cause or error
        return f"{type(cause).__name__}: {first_line(cause)}"
    except ray.exceptions.RayError as error:  # its message has pages of advice
        return workers.LostRun(f"lost {workers.ATTEMPTS} times, last time: {first_line(error)}")
    if isinstance(result, str):
        return result
    run, model = result
    if not store.is_stored(run.id):  # else the worker did, in a shared build folder
        store.save_run(run, model)
    return None


def _share_cores(jobs: int) -> None:
    """Let the decoding processes of this node's runs, one on each of its GPUs and at most `jobs`,
    share its cores, see `cmp.scale.decoding.worker_count`."""
    import ray

    node_id = ray.get_runtime_context().get_node_id()
    [node] = [each for each in ray.nodes() if each["NodeID"] == node_id]
    os.environ[JOBS] = str(max(1, min(jobs, int(node["Resources"].get("GPU", jobs)))))


def _compute_on_node(
    run_id: str, run_config: RunConfig, device: str, jobs: int
) -> tuple[store.StoredRun, Network | None] | str:
    """Return a run with its final network (None if it is not kept), or why it failed."""
    torch.set_num_threads(1)
    try:
        workers.load_plugins()
        if device != "cpu":
            _share_cores(jobs)
        lookup.fetch_start(run_config)
        if run_id and identity.run_id_of(run_config) != run_id:
            raise CmpError(
                f"node {platform.node()}: its data, bases or version of cmp differ from those here"
            )
        run = launch.run_one(run_config, device=device, wait=True)
        return run, store.final_model(run) if launch.is_kept(run.id, weights=True) else None
    except (Exception, Interrupted) as error:
        return workers.failure_reason(error)
