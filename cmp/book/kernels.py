"""A chapter's cells in a kernel of this very Python, through papermill."""

import functools
import logging
import sys
from collections.abc import Callable
from pathlib import Path

from cmp.book import chapters


@functools.cache
def manager() -> type:
    """A manager whose kernels run this very Python with a fixed hash seed, and with threads that
    sleep while they wait: those that spin for one whose core is busy take several times as long.

    Jupyter itself looks `python3` up by name, first among the user's own kernels.
    """
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpec

    command = [sys.executable, "-Xfrozen_modules=off", "-m", "ipykernel_launcher"]
    spec = KernelSpec(
        argv=[*command, "-f", "{connection_file}", "--log-level=CRITICAL"],
        env={"PYTHONHASHSEED": "0", "OMP_WAIT_POLICY": "passive"},
        display_name=chapters.KERNELSPEC["display_name"],
        language=chapters.KERNELSPEC["language"],
    )
    return type("ThisPython", (AsyncKernelManager,), {"kernel_spec": property(lambda self: spec)})


def run(book, part: Path, changed: dict, folder: Path, on_start: Callable):
    """papermill, quiet, in this folder; the notebook so far is at `part`; returns it at the end."""
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
        kernel_manager_class=manager(),
        resources={"metadata": {"path": str(folder)}},
        shutdown_kernel="immediate",  # a graceful one interrupts, and the kernel may complain
        record_timing=False,
        coalesce_streams=True,
        on_cell_start=on_start,
    )
