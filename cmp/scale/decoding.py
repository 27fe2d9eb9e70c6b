"""Decode images ahead of training, in separate processes."""

import contextlib
import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from cmp.errors import CmpError, first_line
from cmp.scale import processes

STOPS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
"""Signals that a run handles and its decoding processes ignore."""
HAS_SENDERS = hasattr(signal, "sigwaitinfo")
"""Whether a process can see who sent a signal: on Linux, but not on macOS."""
JOBS = "CMP_JOBS"
"""The environment variable with the number of a study's workers."""
_waited = 0.0


def usable_cores() -> float:
    """Return how many cores this job may use: the minimum of its affinity and its control group."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with contextlib.suppress(OSError, ValueError):  # "max 100000" if there is no quota
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return min(cores or 1, int(quota) / int(period))
    return cores or 1


def worker_count(device: torch.device) -> int:
    """Return the number of processes that decode images, `$CMP_WORKERS` if it is set.

    The default is 0 for training on a CPU, and for a GPU one fewer than the cores of this process.
    If several processes train on a machine, they share the job's cores. `srun` may give each
    process its own cores or all of them.

    Args:
        device: The device that will use the images.

    Raises:
        CmpError: `$CMP_WORKERS` is not a number from 0 to 1024.
    """
    setting = os.environ.get("CMP_WORKERS")
    if setting is None:
        cores, tasks = usable_cores(), processes.srun_tasks()
        cores = min(cores, int(os.environ.get("SLURM_CPUS_ON_NODE", cores * tasks)) / tasks)
        sharing = max(processes.local_world_size() / tasks, int(os.environ.get(JOBS, 1)))
        return max(1, int(cores / sharing) - 1) if device.type == "cuda" else 0
    if not setting.isdecimal() or int(setting) > 1024:
        raise CmpError(f"CMP_WORKERS: {setting!r}: expected a number of processes, 0 to 1024")
    return int(setting)


def seconds_waited() -> float:
    """Return how long this process has waited for items of `prefetch` in total, in seconds."""
    return _waited


def prefetch(
    make: Callable[[Any], Any], keys: Sequence, workers: int, device: torch.device
) -> Iterator[Any]:
    """Return an iterator over items that other processes prepare, two at a time in each.

    The processes are forked if possible, so that they share memory. A signal to all processes of a
    job, as from a batch system, does not end them, since the run needs them to finish its current
    step.

    Args:
        make: Returns the item for a key: a tensor, or a tuple with tensors.
        keys: The keys in order.
        workers: The number of processes; with 0, this process prepares the items.
        device: The device that will use the items.

    Raises:
        CmpError: The error that `make` raised, or shared memory is full.
    """
    workers = min(workers, len(keys))
    make = functools.partial(_make_shared, make) if workers else make
    context = "fork" if workers and sys.platform == "linux" else None  # 3.14 does not
    options: Any = {"batch_size": None, "num_workers": workers, "collate_fn": make}
    options |= {"multiprocessing_context": context, "worker_init_fn": _await_parent}
    try:
        yield from _time_waits(
            _start(DataLoader(cast(Any, keys), pin_memory=device.type == "cuda", **options))
        )
    except CmpError as error:  # torch puts the worker's traceback before the message
        raise CmpError(str(error).rpartition("CmpError: ")[2].strip()) from error


def _make_shared(make: Callable[[Any], Any], key: Any) -> Any:
    """Return an item with its tensors in shared memory.

    Otherwise torch would move them there in a thread, and drop an error, so that a run would wait
    forever.
    """
    item = make(key)
    try:
        for part in item if isinstance(item, tuple) else (item,):
            if isinstance(part, Tensor):
                part.share_memory_()
    except RuntimeError as error:
        raise CmpError(
            f"decoded images do not fit into shared memory ({first_line(error):.200}); set "
            "CMP_WORKERS to a smaller number, or to 0, or enlarge /dev/shm (docker run --shm-size)"
        ) from error
    return item


def _start(loader: DataLoader) -> Iterator[Any]:
    """Start a loader's processes with `STOPS` blocked from the beginning."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS if HAS_SENDERS else ())
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _time_waits(items: Iterator[Any]) -> Iterator[Any]:
    """Yield the same items, adding the time until each is there to `seconds_waited`."""
    global _waited
    while True:
        started = time.perf_counter()
        try:
            item = next(items)
        except StopIteration:
            return
        finally:
            _waited += time.perf_counter() - started
        yield item


def _await_parent(_: int) -> None:
    """Let SIGTERM end this process only if its parent sends it, as torch does to end workers."""
    parent = os.getppid()

    def wait() -> None:
        while True:
            found = signal.sigwaitinfo(STOPS)
            if (found.si_signo, found.si_pid) == (signal.SIGTERM, parent):
                os._exit(0)

    if HAS_SENDERS:
        threading.Thread(target=wait, daemon=True).start()
