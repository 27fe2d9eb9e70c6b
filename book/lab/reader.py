"""The book in JupyterLab: a reader's own copies of the chapters, and a start page.

The copies are in `_build/lab`, so that reading and running a chapter does not change the project.
An update of the book replaces all copies except those whose cells a reader has edited.
"""

import base64
import difflib
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import nbformat

from cmp.errors import CmpError, explain_errors
from cmp.files import write_atomic
from cmp.project import build_folder
from lab import chapters, explorers, first_screen

START = "start.ipynb"
LIVE = "from lab import first_screen\n\nfirst_screen.first_explorer()"
"""The cell of the start page that shows the first screen."""
STILL = f'<p><img src="{first_screen.PICTURE.name}" alt="{first_screen.ALT}"></p>'
"""Its output until somebody runs it."""
MINE = " (mine)"
"""Suffix of a reader's copy after it was replaced by the book's version."""
FOLDED = re.compile(r":::\{dropdown\} ([^\n]*)\n(.*?)\n:::", re.S)


def copies_folder() -> Path:
    """Return the folder of a reader's copies."""
    return build_folder() / "lab"


def read_copy(path: Path):
    """Return a notebook; raise `CmpError` if it is damaged."""
    with explain_errors(f"{path}: cannot be read as a notebook", "", Exception):
        return nbformat.read(path, as_version=4)


def cells_digest(notebook) -> str:
    """Return the sha256 of a notebook's cells without their outputs."""
    return hashlib.sha256("\0".join(cell.source for cell in notebook.cells).encode()).hexdigest()


def make_copy(source: Path):
    """Return a reader's copy of a chapter: its committed notebook in plain Markdown, with links to
    the previous and next chapters where the lesson ends."""
    copy = read_copy(source.with_suffix(".ipynb"))
    for cell in copy.cells:
        if cell.cell_type == "markdown":
            cell.source = plain_markdown(cell.source)
    files = [None, *(f"{each.stem}.ipynb" for each in chapters.chapters().values()), None]
    place = files.index(f"{source.stem}.ipynb")
    around = {"Before": files[place - 1], "Start": START, "Next": files[place + 1]}
    links = [f"[{words}]({file})" for words, file in around.items() if file]
    cell = nbformat.v4.new_markdown_cell(" · ".join(links), id="links")
    copy.cells.insert(chapters.evidence_place(copy), cell)
    copy.metadata.setdefault("cmp", {})["copied"] = cells_digest(copy)
    return copy


NEEDS = """**To run this notebook**, put it into the folder `book` of a checkout of the project.
There, `make study` sets up the environment and the data, and `make lab` opens all chapters with
their explorers. Anywhere else you can read it: outputs are the book's, and explorers are pictures.
"""
CHECK = """# Everything below needs a checkout: check for it first, for a clear error message.
import importlib.util

missing = [name for name in ("cmp", "lab") if importlib.util.find_spec(name) is None]
if missing:
    raise ImportError(f"no package {' and '.join(missing)} here: see the first cell")
"""


def make_download(path: Path):
    """Return a self-contained notebook: plain Markdown with embedded diagrams, after one cell that
    says what is needed to run it and one that checks for it."""
    copy = read_copy(path)
    for cell in copy.cells:
        if cell.cell_type == "markdown":
            text = plain_markdown(cell.source)
            cell.source = re.sub(r"\]\((diagrams/[\w-]+\.svg)\)", _inline_diagram, text)
    copy.cells[:0] = [
        nbformat.v4.new_markdown_cell(NEEDS, id="needs"),
        nbformat.v4.new_code_cell(CHECK, id="check"),
    ]
    return copy


def _inline_diagram(match: re.Match) -> str:
    """Return the end of an image's Markdown with the picture embedded as a data URL."""
    content = (chapters.BOOK / match[1]).read_bytes()
    return f"](data:image/svg+xml;base64,{base64.b64encode(content).decode()})"


def plain_markdown(text: str) -> str:
    """Convert MyST Markdown to plain Markdown: folded boxes become HTML details. Labels such as
    `(A4-01)=` and links that set an explorer are removed."""
    text = re.sub(r"\{set\}`(.+?)\s*<\w+:[^`]*>`", r"\1", text)
    text = re.sub(r"(?m)^\([\w-]+\)=$", "", text)
    return FOLDED.sub(r"<details><summary>\1</summary>\n\n\2\n\n</details>", text)


def prepare_copies() -> dict[str, str]:
    """Copy chapters that a reader does not have, and replace copies that were not edited. A damaged
    copy is set aside first.

    Returns:
        Stem of each chapter -> a note on the copy, or "".
    """
    notes = {}
    chapters.copy_diagrams(copies_folder())
    for number, source in chapters.chapters().items():
        target, fresh = copies_folder() / f"{source.stem}.ipynb", make_copy(source)
        notes[source.stem] = ""
        try:
            own = read_copy(target) if target.exists() else None
        except CmpError:
            own, kept = None, set_aside(target)
            notes[source.stem] = f"your copy was damaged and is now {kept.name}"
        if own:
            copied = own.metadata.get("cmp", {}).get("copied")
            is_edited, is_newest = copied != cells_digest(own), copied == cells_digest(fresh)
            if is_edited and is_newest:
                notes[source.stem] = "edited by you"
            elif is_edited:
                notes[source.stem] = (
                    "your edited copy was kept, but the book has another version: compare them "
                    f"with `cmpt lab --diff {number}`, or take it with `--reset {number}`"
                )
            if is_edited or is_newest:
                continue  # with the reader's edits and outputs
        write_atomic(target, nbformat.writes(fresh))
    shutil.copy(first_screen.PICTURE, copies_folder())
    shutil.copy(chapters.BOOK / "manual.md", copies_folder())  # chapters link to it
    write_start_page(notes)
    return notes


def fetch_scripts() -> dict[str, str]:
    """Fetch the script that explorers need from a registry, for work without a network later.

    Returns:
        "explorers" -> why this failed, or "".
    """
    try:
        explorers.script("d3")
    except CmpError as error:
        return {"explorers": str(error)}
    return {"explorers": ""}


def write_start_page(notes: dict[str, str]) -> None:
    """Write the notebook that JupyterLab opens, if it would change; one that the reader edited, or
    that is damaged, is set aside first."""
    start, page = copies_folder() / START, start_page(notes)
    page.metadata["cmp"] = {"copied": cells_digest(page)}
    if start.exists():
        try:
            own = read_copy(start)
        except CmpError:
            set_aside(start)
        else:
            if cells_digest(own) == cells_digest(page):
                return  # with its outputs
            if own.metadata.get("cmp", {}).get("copied") != cells_digest(own):
                set_aside(start)
    write_atomic(start, nbformat.writes(page))


def set_aside(path: Path) -> Path:
    """Rename a reader's notebook, so that the book's version can take its place, and return the new
    path."""
    kept, more = path.with_name(f"{path.stem}{MINE}.ipynb"), 2
    while kept.exists():
        kept, more = path.with_name(f"{path.stem}{MINE} {more}.ipynb"), more + 1
    os.replace(path, kept)
    return kept


def start_page(notes: dict[str, str]):
    """Return the notebook that JupyterLab opens: the first screen, and the chapters with notes on
    the copies."""
    rows = []
    for source in chapters.chapters().values():
        title = re.search(r"^# (.+)$", chapters.source_text(source), re.M)
        note = f" ({notes[source.stem]})" if notes[source.stem] else ""
        rows.append(f"* [{title[1] if title else source.stem}]({source.stem}.ipynb){note}")
    text = Path(__file__).with_name("start.md").read_text(encoding="utf-8")
    before, after = text.replace("CHAPTERS", "\n".join(rows)).split("\n\nSCREEN\n\n")
    still = nbformat.v4.new_output("display_data", {"text/html": STILL})
    cells = [
        nbformat.v4.new_markdown_cell(before, id="before"),
        nbformat.v4.new_code_cell(LIVE, id="first", outputs=[still]),
        nbformat.v4.new_markdown_cell(after, id="after"),
    ]
    metadata = {"kernelspec": dict(chapters.KERNELSPEC)}
    return nbformat.v4.new_notebook(cells=cells, metadata=metadata)


def find_copy(number: str) -> tuple[Path, Path]:
    """Return a chapter and a reader's copy of it; raise `CmpError` if there is no copy."""
    [source] = chapters.select([number])
    target = copies_folder() / f"{source.stem}.ipynb"
    if not target.exists():
        raise CmpError(f"{target}: you have no copy of this chapter; run `cmpt lab` to make it")
    return source, target


def diff_chapter(number: str) -> str:
    """Return a line-by-line diff between a reader's copy of a chapter and the book's."""
    source, target = find_copy(number)
    texts = [
        "\n\n".join(cell.source for cell in book.cells).splitlines()
        for book in (make_copy(source), read_copy(target))
    ]
    return "\n".join(difflib.unified_diff(*texts, "the book", "your copy", lineterm=""))


def reset_chapter(number: str) -> Path:
    """Replace a reader's copy of a chapter with the book's version.

    Returns:
        The new path of the reader's version.
    """
    _, target = find_copy(number)
    kept = set_aside(target)
    prepare_copies()
    return kept


def open_lab(arguments: list[str]) -> int:
    """Open JupyterLab on the copies, at the start page, and return its exit status.

    A SIGTERM to this process is passed on to it.
    """
    settings = str(chapters.BOOK / "_lab")
    paths = {"JUPYTER_CONFIG_PATH": settings, "PYTHONPATH": str(chapters.BOOK)}
    for name, path in paths.items():
        paths[name] = os.pathsep.join(filter(None, [path, os.environ.get(name)]))
    # the folder of a kernel has another path where `_build` is a link
    paths["CMP_BUILD"] = str(build_folder().absolute())
    command = [sys.executable, "-m", "jupyterlab", str(copies_folder())]
    options = [f"--LabApp.default_url=/lab/tree/{START}", *arguments]
    with subprocess.Popen(command + options, env=os.environ | paths) as lab:
        before = signal.signal(signal.SIGTERM, lambda *_: lab.terminate())
        try:
            return lab.wait()
        except BaseException:  # such as Ctrl+C, which it received as well
            lab.kill()
            raise
        finally:
            signal.signal(signal.SIGTERM, before)
