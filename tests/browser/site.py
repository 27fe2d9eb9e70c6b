"""The built pages on this machine alone, in a browser without a screen."""

import contextlib
import functools
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

from browser.lab import HOST

from cmp.embedded import packages
from cmp.embedded.manifest import Package

AXE = Package(
    registry="npm", package="axe-core", version="4.14.1", file="axe-core-4.14.1.tgz",
    sha256="e6b0ce02b84d892e2e33e403485e7f3d6c29e2be6df65daf44d89ba564139745",
    licence="MPL-2.0", attribution="axe-core by Deque Systems", url="https://github.com/dequelabs/axe-core",
)  # fmt: skip
RUN_AXE = """async (rules) => {
    const found = await axe.run(document, {
        resultTypes: ["violations"], ...(rules.length ? {runOnly: rules} : {}),
    });
    return found.violations
        .filter((each) => ["serious", "critical"].includes(each.impact))
        .map((each) => `${each.id}: ${each.nodes.map((node) => node.html).slice(0, 3).join(" ")}`);
}"""


def axe() -> str:
    """The script that looks for what keeps people out."""
    return packages.archive_member(packages.fetch_package(AXE), "package/axe.min.js").decode()


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Files of a folder, without a word."""

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a server of a folder's files, stopped at the end."""
    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer((HOST, 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://{HOST}:{server.server_port}"
        finally:
            server.shutdown()
