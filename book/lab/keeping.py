"""Keep explorers and progress bars in saved notebooks, and restore explorers in JupyterLab.

The view of a live widget shows an error message once its kernel is gone. So a saved explorer is its
still: HTML and a picture, in two outputs, since a viewer shows only one format of an output. Its
view is kept in the output's metadata, and restored when the notebook is opened while the same
kernel process is alive. A saved progress bar is a line of text.
"""

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

VIEW = "application/vnd.jupyter.widget-view+json"
PICTURE = "image/png"
MARK = "cmp"
"""The key of an output's metadata for the view and the kernel's process id."""
PASSING: dict[str, Any] = {MARK: {"passing": True}}
"""The metadata of an output that shows something only while its cell runs."""
BAR = re.compile(
    r"(?:(?P<name>.*): )?\s*(?:\d+%\|.*\| *\S+/(?P<total>\S+)|\S.*) \[.*(?:/s|s/).*\]$"
)
"""The text of a progress bar, whose total may be unknown."""


def kernel_mark() -> dict[str, Any]:
    """Return the record of the current process for an explorer's output."""
    return {MARK: {"process": os.getpid()}}


def stored_outputs(output: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield what is stored of an output, which is changed in place."""
    data, mark = output.get("data", {}), output.get("metadata", {}).get(MARK, {})
    if mark.get("passing"):
        return
    bar = BAR.match("".join(data.get("text/plain", ""))) if VIEW in data else None
    if "process" in mark and VIEW in data:
        mark["view"] = data.pop(VIEW)
    elif bar:
        del data[VIEW]
        named, total = bar["name"] and f": {bar['name']}", bar["total"] and f" to {bar['total']}"
        data["text/plain"] = f"[progress bar{named or ''}{total or ''}]"
    yield output
    if "process" in mark and PICTURE in data:
        picture = {"output_type": "display_data", "data": {PICTURE: data.pop(PICTURE)}}
        yield picture | {"metadata": {MARK: {"still": True}}}


def store_notebook(notebook: Mapping[str, Any], process: int | None = None) -> None:
    """Store the stills of explorers in place of their views, and progress bars as text.

    Args:
        notebook: The content of the notebook, changed in place.
        process: The process id of its kernel if that is alive: its explorers get back their views.
    """
    for cell in notebook.get("cells", ()):
        kept: list[dict[str, Any]] = []
        for output in cell.get("outputs", ()):
            mark = output.get("metadata", {}).get(MARK, {})
            if "view" in mark and mark["process"] == process:
                output["data"][VIEW] = mark["view"]
                kept.append(output)
            elif mark.get("still") and kept and VIEW in kept[-1].get("data", {}):
                kept[-1]["data"] |= output["data"]
            else:
                kept += stored_outputs(output)
        if "outputs" in cell:
            cell["outputs"] = kept


def contents_manager() -> type:
    """Return JupyterLab's contents manager, extended to call `store_notebook` for notebooks that
    are saved or opened."""
    from jupyter_server.services.contents.largefilemanager import AsyncLargeFileManager

    class ExplorersManager(AsyncLargeFileManager):
        async def get(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
            model = await super().get(path, *args, **kwargs)
            if model.get("type") == "notebook" and model.get("content"):
                store_notebook(model["content"], await self._kernel_process(path))
            return model

        async def save(self, model: dict[str, Any], path: str = "") -> dict[str, Any]:
            if model.get("type") == "notebook" and model.get("content"):
                store_notebook(model["content"])  # as a hook, it would warn at each start
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
