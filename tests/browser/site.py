"""A page in a browser without a screen: what keeps people out of it, and fingers on it."""

import contextlib
import functools
import http.server
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmark import packages
from cmp.embedded.manifest import Package

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

AXE = Package(
    registry="npm", package="axe-core", version="4.14.1", file="axe-core-4.14.1.tgz",
    sha256="e6b0ce02b84d892e2e33e403485e7f3d6c29e2be6df65daf44d89ba564139745",
    licence="MPL-2.0", attribution="axe-core by Deque Systems", url="https://github.com/dequelabs/axe-core",
)  # fmt: skip
RUN_AXE = """async ([rules, within]) => {
    const found = await axe.run([...document.querySelectorAll(within)], {
        resultTypes: ["violations"], ...(rules.length ? {runOnly: rules} : {}),
    });
    return found.violations
        .map((each) => `${each.id}: ${each.nodes.map((node) => node.html).slice(0, 3).join(" ")}`);
}"""


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve a folder only to this machine, and yield its address."""
    handler = functools.partial(_Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


def axe() -> str:
    """The script that looks for what keeps people out."""
    return packages.archive_member(packages.fetch_package(AXE), "package/axe.min.js").decode()


def axe_finds(page: "Page", rules: Sequence[str] = (), within: str = "html") -> list[str]:
    """What keeps people out of the parts of a page that a selector finds, of any gravity."""
    if not page.evaluate("'axe' in window"):
        page.evaluate(axe())
    return page.evaluate(RUN_AXE, [[*rules], within])


def touches(page: "Page") -> Callable[..., None]:
    """A function that puts a finger on a page ("touchStart", x, y), moves it ("touchMove", x, y)
    and lifts it ("touchEnd"), as the browser itself hears of it."""
    session = page.context.new_cdp_session(page)

    def touch(kind: str, *at: float) -> None:
        points = [{"x": at[0], "y": at[1]}] if at else []
        session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    return touch


def finger(page: "Page", handle: "Locator", right: float, down: float) -> Callable[[], None]:
    """Drag by a finger; return what lifts it."""
    handle.scroll_into_view_if_needed()
    box = handle.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    touch = touches(page)
    touch("touchStart", x, y)
    for part in range(1, 9):
        touch("touchMove", x + right * part / 8, y + down * part / 8)
        page.wait_for_timeout(20)
    return lambda: touch("touchEnd")
