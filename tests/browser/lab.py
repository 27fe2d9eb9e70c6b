"""JupyterLab on this machine alone, with the book's settings, and a browser without a screen."""

import contextlib
import importlib.util
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from cmp.project import project_folder

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page

HOST = "127.0.0.1"
OPTIONS = [
    "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-quic", "--no-first-run",
]  # fmt: skip
IDLE = """() => {
    const kernel = window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel;
    return kernel && kernel.connectionStatus === "connected" && kernel.status === "idle";
}"""
COMMAND = """async name => {
    await window.jupyterapp.shell.currentWidget.sessionContext.ready;
    return window.jupyterapp.commands.execute(name);
}"""
SHUT_DOWN = "() => window.jupyterapp.shell.currentWidget.sessionContext.shutdown()"
START_SECONDS, STOP_SECONDS = 180, 15
PAGE_SECONDS = 60


def missing() -> str | None:
    """What a browser test needs and this machine lacks, as a sentence; none if all is there."""
    if importlib.util.find_spec("playwright") is None:
        return "The Python package playwright is missing: pip install -r requirements.txt"
    if shutil.which("chromium") is None:
        return "The browser chromium is missing: on Debian, apt-get install chromium"
    return None


@contextlib.contextmanager
def lab(root: Path, log: Path) -> Iterator[tuple[str, str]]:
    """(address, token) of a JupyterLab that serves the folder `root`, and is stopped at the end.

    All its own folders are new and empty; the book's settings say that nothing pops up. Every cell
    is rendered, also those off screen, so that a test finds them. Raises `RuntimeError` with the
    log's end if it does not start.
    """
    with socket.socket() as free:
        free.bind((HOST, 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as own:
        server = _start(root, log, Path(own), port, token := secrets.token_hex(16))
        try:
            _wait(server, f"http://{HOST}:{port}/api?token={token}", log)
            yield f"http://{HOST}:{port}", token
        finally:
            _stop(server)


def _start(root: Path, log: Path, own: Path, port: int, token: str) -> subprocess.Popen:
    settings = own / "settings"
    notebook = settings / "@jupyterlab" / "notebook-extension"
    notebook.mkdir(parents=True)
    (notebook / "tracker.jupyterlab-settings").write_text('{"windowingMode": "none"}')
    names = {"CONFIG": "config", "DATA": "data", "RUNTIME": "runtime"}
    folders = {f"JUPYTER_{kind}_DIR": str(own / name) for kind, name in names.items()}
    environment = os.environ | folders | {
        "JUPYTERLAB_SETTINGS_DIR": str(settings),
        "JUPYTERLAB_WORKSPACES_DIR": str(own / "workspaces"),
        "JUPYTER_CONFIG_PATH": str(project_folder() / "book" / "_lab"),
        "PYTHONPATH": os.pathsep.join(
            filter(None, [str(project_folder() / "book"), os.environ.get("PYTHONPATH")])
        ),
        "IPYTHONDIR": str(own / "ipython"),
        "JUPYTER_TOKEN": token,
    }  # fmt: skip
    command = [
        *(sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"),
        *(f"--ip={HOST}", f"--port={port}", "--ServerApp.port_retries=0"),
        *(f"--ServerApp.root_dir={root}", "--LabApp.news_url=None"),
        *("--LabApp.extension_manager=readonly", "--LabApp.expose_app_in_browser=True"),
    ]
    with log.open("w") as out:
        return subprocess.Popen(
            command, env=environment, stdout=out, stderr=out, start_new_session=True
        )


def _wait(server: subprocess.Popen, address: str, log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and server.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(address, timeout=2):
            return
        time.sleep(0.2)
    raise RuntimeError(f"JupyterLab did not start:\n{log.read_text()[-2000:]}")


def _stop(server: subprocess.Popen) -> None:
    """Asked first, for then it stops its kernels; they also end by themselves without it."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(STOP_SECONDS)
            return


@contextlib.contextmanager
def browser() -> "Iterator[Browser]":
    """A browser without a screen, closed at the end; what a test expects has as long as a page."""
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=1000 * PAGE_SECONDS)
    options = OPTIONS + ["--no-sandbox"] * (os.geteuid() == 0)  # as root, it refuses to start else
    with sync_playwright() as playwright:
        path = shutil.which("chromium")
        found = playwright.chromium.launch(executable_path=path, args=options)
        try:
            yield found
        finally:
            found.close()


@dataclass
class Watched:
    """A page, what went wrong on it, and the addresses elsewhere that it asked for."""

    page: "Page"
    errors: list[str] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", self._said)
        self.page.on("request", lambda request: self._asked(request.url))
        self.page.on("websocket", lambda connection: self._asked(connection.url))

    def _said(self, message: "ConsoleMessage") -> None:
        if message.type == "error":
            self.errors.append(f"{message.text} ({message.location.get('url')})")

    def _asked(self, address: str) -> None:
        parts = urlsplit(address)
        if parts.scheme not in ("data", "blob", "about") and parts.hostname != HOST:
            self.elsewhere.append(address)

    def command(self, name: str) -> None:
        """Do what one of JupyterLab's commands does, such as run all cells, to its end."""
        done = self.page.evaluate(f"async name => (await ({COMMAND})(name)) !== false", name)
        assert done, f"{name}: a cell failed:\n{self.page.locator('.jp-Notebook').inner_text()}"

    def begin(self, name: str) -> None:
        """Begin such a command."""
        self.page.evaluate(f"name => {{ ({COMMAND})(name) }}", name)

    def idle(self) -> None:
        """Wait for the kernel: the toolbar says idle before it is there, and running then asks
        which kernel."""
        self.page.wait_for_function(IDLE)


@contextlib.contextmanager
def opened(context: "BrowserContext", address: str, token: str, notebook: str) -> Iterator[Watched]:
    """A notebook of a `lab` on a page of its own, its kernel ready; the kernel ends with it."""
    page = context.new_page()
    page.set_default_timeout(1000 * PAGE_SECONDS)
    try:
        watched = Watched(page)
        page.goto(f"{address}/lab/tree/{notebook}?token={token}&reset")
        watched.idle()
        yield watched
        page.evaluate(SHUT_DOWN)
    finally:
        page.close()
