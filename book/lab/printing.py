"""Print the book with a headless browser: a PDF of all pages, and a card of one page."""

import contextlib
import functools
import http.server  # noqa: TID251 - serves the built site to the browser that prints it
import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

from markdown_it import MarkdownIt

from cmp.errors import CmpError
from cmp.files import write_atomic
from cmp.project import build_folder
from lab import chapters, values

LEFT_OUT = ("atlas", "api", "whats-new", "where-it-runs")
"""Pages that are useful only on a screen."""
BROWSERS = (
    "chromium", "chromium-browser", "google-chrome",
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
)  # fmt: skip
PATIENCE_SECONDS = 300
SHEET = """<style>
@page { size: A4; margin: 16mm 15mm; }
:root { color-scheme: light; }
section { break-before: page; }
.answering { break-inside: avoid; }
pre, .wide { white-space: pre-wrap; overflow-wrap: anywhere; }
.wide, .math { overflow: visible; mask-image: none; }
table { max-width: 100%; }
:is(td, th) { overflow-wrap: anywhere; white-space: normal !important; min-width: 0 !important; }
.notebook, .anchor, .copy { display: none; }
img { max-height: 235mm; object-fit: contain; }
</style>"""
CARD = """<style>
@page { size: A4; margin: 12mm 15mm; }
body { font: 9.3pt/1.34 system-ui, "Noto Sans", "DejaVu Sans", sans-serif; color: #1d2329; }
h1 { font-size: 22pt; margin: 0 0 3mm; border-top: 2.5mm solid #882255; padding-top: 3mm; }
h2 { font-size: 12pt; margin: 4mm 0 1.5mm; color: #882255; }
table { border-collapse: collapse; margin: 0 0 2mm; }
th, td { text-align: left; padding: 0.7mm 6mm 0.7mm 0; border-bottom: 0.2mm solid #ccc; }
p, ol { margin: 0 0 2mm; } ol { padding-left: 6mm; } li { margin-bottom: 0.8mm; }
</style>"""


def whole_book(pages: Path) -> str:
    """Return all pages of a built site as one, with folded parts open and internal links.

    Args:
        pages: The folder of the built site.
    """
    project = json.loads((pages / "config.json").read_text(encoding="utf-8"))["projects"][0]
    slugs = ["", *(each["slug"] for each in project["pages"] if each.get("slug"))]
    slugs = [slug for slug in slugs if slug not in LEFT_OUT]
    parts = []
    for slug in slugs:
        text = (pages / slug / "index.html").read_text(encoding="utf-8")
        [article] = re.findall(r"<article>(.*)</article>", text, re.S)
        [chapter] = re.findall(r"<body([^>]*)>", text)
        inner = _inside(article, slug, slugs)
        parts.append(f'<section id="{slug or "start"}"{chapter}>{inner}</section>')
    head = '<meta charset="utf-8"><title>' + project["title"] + "</title>"
    for sheet in ("vendor/katex/katex.min.css", "myst-theme.css"):
        head += f'<link rel="stylesheet" href="/{sheet}">'
    body = "".join(parts)
    return f'<!doctype html><html lang="en"><head>{head}{SHEET}</head><body>{body}</body></html>'


def _inside(article: str, slug: str, slugs: list[str]) -> str:
    """Return the text of a page as a part of the whole book."""
    mark = slug or "start"

    def link(match: re.Match) -> str:
        page, _, name = match[1].partition("#")
        to = page.strip("/") if page else slug
        if page and not page.startswith("/"):
            return match[0]  # an external link
        if to not in slugs or name.startswith("explorer="):  # paper sets no explorer
            return ""
        return f'href="#{to or "start"}' + (f'--{name}"' if name else '"')

    text = re.sub(r'href="([^"]*)"', link, article)
    text = re.sub(r' id="([^"]+)"', rf' id="{mark}--\1"', text)
    text = text.replace("<details", "<details open").replace(' loading="lazy"', "")
    return re.sub(r"</?noscript>", "", text)


def card_page() -> str:
    """Return the card "Keep CLIP current" as a page, with numbers from published results."""
    folder = chapters.BOOK / "lab"
    card = (folder / "card.md").read_text(encoding="utf-8")
    answer = (folder / "answer.md").read_text(encoding="utf-8")
    text = values.fill_values(card.replace("ANSWER", answer), "card: ")
    body = MarkdownIt("commonmark").enable("table").render(text)
    body = re.sub(r"A_(KA|ZS)", r"A<sub>\1</sub>", body)
    head = f'<meta charset="utf-8"><title>Keep CLIP current</title>{CARD}'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>'


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve a folder only to this machine, and yield its URL."""
    handler = functools.partial(_Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


def find_browser() -> Path | None:
    """Return the path of a browser that can open and print pages, if there is one."""
    return next((Path(path) for path in map(shutil.which, BROWSERS) if path), None)


def print_page(pages: Path, name: str, text: str) -> Path:
    """Print a page that uses the files of a built site.

    Args:
        pages: The folder of the built site.
        name: The name of the PDF, without its suffix.
        text: The page.

    Returns:
        The PDF, in the build folder.

    Raises:
        CmpError: There is no browser, or it failed or hangs.
    """
    target, page = build_folder().absolute() / f"{name}.pdf", pages / f"print-{name}.html"
    if not (browser := find_browser()):
        raise CmpError(
            "no browser to print with: install chromium (on Debian: apt-get install chromium)"
        )
    write_atomic(page, text)
    options = ["--headless", "--disable-gpu", "--disable-dev-shm-usage", "--no-pdf-header-footer"]
    options += ["--no-sandbox"] * (os.geteuid() == 0)  # it does not start as root otherwise
    try:
        with served(pages) as address:
            command = [browser, *options, f"--print-to-pdf={target}", f"{address}/{page.name}"]
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False
            )
    except subprocess.TimeoutExpired as error:
        raise CmpError(
            f"{target} was not printed: {browser} did not end in {PATIENCE_SECONDS} seconds; "
            "repeat the command, or try another version of chromium"
        ) from error
    finally:
        page.unlink()
    if done.returncode or not target.exists():
        raise CmpError(f"{target} was not printed:\n{done.stderr[-2000:]}")
    return target


def print_book(pages: Path) -> list[Path]:
    """Print the book and its card, and return the paths of both PDFs.

    Args:
        pages: The folder of the built site.
    """
    return [
        print_page(pages, "book", whole_book(pages)),
        print_page(pages, "card", card_page()),
    ]
