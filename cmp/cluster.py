"""Runs as Ray tasks, on one machine or a cluster; Ray is an extra: `pip install "ray>=2.40,<3"`.

Each node computes in its own build folder, where `cmp data build` has been called (or which all
nodes share), and hands the finished run back to the process that asked; that process stores it.
"""

from collections.abc import Callable

from cmp import store, workers
from cmp.config import RunConfig
from cmp.errors import CmpError
from cmp.workers import ATTEMPTS, Failures


def ray(todo: list[RunConfig], jobs: int, device: str, finished: Callable[[], None]) -> Failures:
    """Compute runs on the Ray cluster that `RAY_ADDRESS` names, or on this machine without one.

    A run takes one core, and a GPU where `device` is one; at most `jobs` run at a time. One whose
    node or worker is lost begins again elsewhere, from its checkpoint where the nodes share a build
    folder. Calls `finished` after each run and returns why others failed.
    """
    try:
        import ray as engine
    except ImportError as error:
        raise CmpError('backend ray: Ray is not installed; `pip install "ray>=2.40,<3"`') from error
    begun = not engine.is_initialized()
    if begun:
        engine.init(log_to_driver=False)
    gpus = 0 if device == "cpu" else 1
    task = engine.remote(num_cpus=1, num_gpus=gpus, max_retries=ATTEMPTS)(_work)
    waiting, failures, queue = {}, {}, list(reversed(todo))
    try:
        while queue or waiting:
            while queue and len(waiting) < jobs:
                run_config = queue.pop()
                waiting[task.remote(run_config, device)] = run_config
            [done], _ = engine.wait(list(waiting), num_returns=1)
            run_config = waiting.pop(done)
            try:
                store.save(engine.get(done))
                finished()
            except engine.exceptions.RayError as error:
                failures[run_config] = workers.reason(getattr(error, "cause", None) or error)
    finally:
        if begun:
            engine.shutdown()
    return failures


def _work(run_config: RunConfig, device: str) -> store.Run:
    import torch

    torch.set_num_threads(1)
    return workers.run_one(run_config, device=device, wait=True)
