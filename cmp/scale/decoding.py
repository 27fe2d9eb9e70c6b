"""Images that processes beside the training one decode ahead of it."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch.utils.data import DataLoader

from cmp.errors import CmpError
from cmp.scale import processes

STOPS = {signal.SIGINT, signal.SIGTERM}
"""Signals that a run notes and that its decoding processes leave to it."""
HAS_SENDERS = hasattr(signal, "sigwaitinfo")
"""Whether a process can tell who sent a signal: on Linux, not on macOS."""
JOBS = "CMP_JOBS"
"""The environment variable that tells a study's workers how many they are."""


def usable_cores() -> float:
    """Return how many cores this job may use: of its affinity and its control group, the fewer."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with contextlib.suppress(OSError, ValueError):  # "max 100000" where there is no quota
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return min(cores or 1, int(quota) / int(period))
    return cores or 1


def worker_count(device: torch.device) -> int:
    """Return how many processes decode images: `$CMP_WORKERS`, if it is set.

    By default there are none beside training on a CPU; for a GPU there are as many as cores but
    one, of this process's share of the job's cores where several train on a machine. `srun` may
    have given each its cores, or let all use all.

    Args:
        device: Where the images are used.

    Raises:
        CmpError: `$CMP_WORKERS` is no number from 0 to 1024.
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


def prefetch(
    make: Callable[[Any], Any], keys: Sequence, workers: int, device: torch.device
) -> Iterator[Any]:
    """Return an iterator over items that other processes make ahead, two each; 0 make none ahead.

    The processes are forked where that is possible, so that they share what is in memory. A signal
    to all processes of a job, as a batch system sends it, does not end them: the run needs them for
    the step that it still takes.

    Args:
        make: Makes the item of a key.
        keys: The keys in order.
        workers: How many processes.
        device: Where the items are used.

    Raises:
        CmpError: As `make` raised it.
    """
    context = "fork" if workers and sys.platform == "linux" else None  # 3.14 would not fork
    options: Any = {"batch_size": None, "num_workers": workers, "collate_fn": make}
    options |= {"multiprocessing_context": context, "worker_init_fn": _await_parent}
    try:
        yield from _start(DataLoader(cast(Any, keys), pin_memory=device.type == "cuda", **options))
    except CmpError as error:  # torch has put that process's traceback before its sentence
        raise CmpError(str(error).rpartition("CmpError: ")[2].strip()) from error


def _start(loader: DataLoader) -> Iterator[Any]:
    """Start a loader's processes, which have `STOPS` blocked from their first moment on."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS if HAS_SENDERS else ())
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _await_parent(_: int) -> None:
    """Let this process end at SIGTERM of its parent only; torch ends it by that, too."""
    parent = os.getppid()

    def wait() -> None:
        while True:
            found = signal.sigwaitinfo(STOPS)
            if (found.si_signo, found.si_pid) == (signal.SIGTERM, parent):
                os._exit(0)

    if HAS_SENDERS:
        threading.Thread(target=wait, daemon=True).start()
