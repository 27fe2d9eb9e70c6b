"""Keep explorers in saved notebooks, and restore them in JupyterLab.

A saved explorer is its still: HTML and a picture, which every notebook viewer shows. The view of a
live widget would show an error message there, since its model is in a kernel. So the view is moved
to the output's metadata when a notebook is saved, and restored when it is opened while the same
kernel process is alive.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

VIEW = "application/vnd.jupyter.widget-view+json"
MARK = "cmp"
"""The key of an output's metadata for the view and the kernel's process id."""


def kernel_mark() -> dict[str, Any]:
    """Return the record of the current process for an explorer's output."""
    return {MARK: {"process": os.getpid()}}


def _outputs(notebook: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the outputs of explorers in a notebook."""
    for cell in notebook.get("cells", ()):
        for output in cell.get("outputs", ()):
            if "process" in output.get("metadata", {}).get(MARK, {}):
                yield output


def keep_stills(model: Mapping[str, Any]) -> None:
    """Move the views of explorers out of a notebook that is about to be saved.

    Args:
        model: The model that a contents manager saves, changed in place.
    """
    if model.get("type") != "notebook" or not model.get("content"):
        return
    for output in _outputs(model["content"]):
        if view := output["data"].pop(VIEW, None):
            output["metadata"][MARK]["view"] = view


def restore_views(notebook: Mapping[str, Any], process: int | None) -> None:
    """Restore the views of explorers in a notebook if its kernel still has their models.

    Args:
        notebook: The content of the notebook, changed in place.
        process: The process id of its kernel, or None without a kernel.
    """
    for output in _outputs(notebook):
        mark = output["metadata"][MARK]
        if mark["process"] == process and "view" in mark:
            output["data"][VIEW] = mark["view"]


def contents_manager() -> type:
    """Return JupyterLab's contents manager, extended to call `restore_views` for opened notebooks
    and `keep_stills` for saved ones."""
    from jupyter_server.services.contents.largefilemanager import AsyncLargeFileManager

    class ExplorersManager(AsyncLargeFileManager):
        async def get(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
            model = await super().get(path, *args, **kwargs)
            if model.get("type") == "notebook" and model.get("content"):
                restore_views(model["content"], await self._kernel_process(path))
            return model

        async def save(self, model: dict[str, Any], path: str = "") -> dict[str, Any]:
            keep_stills(model)  # as a hook, it would warn whenever the server starts
            return await super().save(model, path)

        async def _kernel_process(self, path: str) -> int | None:
            """Return the process id of the kernel in a notebook's session."""
            sessions = getattr(self.parent, "session_manager", None)
            with contextlib.suppress(Exception):  # no session, or one that is ending
                session = await sessions.get_session(path=path.strip("/"))
                kernel = self.parent.kernel_manager.get_kernel(session["kernel"]["id"])
                return kernel.provisioner.pid
            return None

    return ExplorersManager
