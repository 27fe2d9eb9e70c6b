"""A chapter's cells in a kernel of this very Python, through papermill."""

import functools
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

from cmp.book import chapters


@functools.cache
def manager(kernels: int = 1) -> type:
    """A manager whose kernels run this very Python with a fixed hash seed, so many at a time.

    Each has its share of the cores, and its threads sleep while they wait: threads that spin for
    one whose core is busy take several times as long.

    Jupyter itself looks `python3` up by name, first among the user's own kernels.
    """
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpec

    threads = max(1, (os.cpu_count() or 1) // kernels)
    command = [sys.executable, "-Xfrozen_modules=off", "-m", "ipykernel_launcher"]
    spec = KernelSpec(
        argv=[*command, "-f", "{connection_file}", "--log-level=CRITICAL"],
        env={
            "PYTHONHASHSEED": "0",
            "OMP_NUM_THREADS": str(threads),
            "OMP_WAIT_POLICY": "passive",
        },
        display_name=chapters.KERNELSPEC["display_name"],
        language=chapters.KERNELSPEC["language"],
    )
    return type("ThisPython", (AsyncKernelManager,), {"kernel_spec": property(lambda self: spec)})


def run(book, part: Path, changed: dict, folder: Path, on_start: Callable, kernels: int = 1):
    """papermill, quiet, in this folder; the notebook so far is at `part`; returns it at the end.
    kernels: how many run at the same time."""
    import papermill

    logging.getLogger("papermill").setLevel(logging.CRITICAL)
    chapters.write_notebook(book, part)
    path = str(part).replace("{", "{{").replace("}", "}}")  # papermill formats its paths
    return papermill.execute_notebook(
        path,
        path,
        changed,
        progress_bar=False,
        start_timeout=120,
        kernel_manager_class=manager(kernels),
        resources={"metadata": {"path": str(folder)}},
        shutdown_kernel="immediate",  # a graceful one interrupts, and the kernel may complain
        record_timing=False,
        coalesce_streams=True,
        on_cell_start=on_start,
    )
