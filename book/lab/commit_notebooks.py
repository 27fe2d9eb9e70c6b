"""The committed notebooks: chapters executed with their defaults, stable to the byte."""

import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import nbformat

from cmp.errors import CmpError
from cmp.files import build_folder, write_atomic
from lab import chapters, run

PLACES = {sys.prefix: "<python>", str(chapters.BOOK.parent): ".", str(Path.home()): "~"}
VOLATILE = {
    r"/[^\s\"]*/ipykernel_\d+/\d+\.py": "<cell>",
    r" at 0x[0-9a-f]{6,16}\b": " at 0x0",
    r"\[\d\d:\d\d(:\d\d)?(&lt;|<)[^\]]{1,40}\]": "[time]",
} | {re.escape(place) + r"(?![\w.-])": name for place, name in PLACES.items()}
"""What differs between two runs of a chapter -> what stands for it."""
WIDGET_ID = r"[0-9a-f]{32}"


def widget_names(outputs: list, states: dict[str, dict]) -> dict[str, str]:
    """Number widgets in the order in which the outputs show them, each followed by what it holds.

    Args:
        outputs: Of all cells.
        states: A widget's random id -> its state. Widgets that nothing holds (links) come last, in
            the order of their states.

    Returns:
        Random id -> number.
    """
    names: dict[str, str] = {}

    def visit(node) -> None:
        for name in re.findall(WIDGET_ID, json.dumps(node, sort_keys=True)):
            if name in states and name not in names:
                names[name] = f"{len(names):032x}"
                visit(states[name])

    visit(outputs)
    visit(sorted(states, key=lambda name: re.sub(WIDGET_ID, "", json.dumps(states[name]))))
    return names


def stable_notebook(executed, source: Path):
    """Return an executed notebook as it is committed: another run of the chapter changes nothing.

    Times, paths of this machine, addresses, random ids of cells and widgets, and versions are left
    out. Outputs, widget state, the source's hash, and what makes jupytext see the same inputs in
    both files stay (it refuses to open a pair whose notebook is newer and differs).

    Args:
        executed: An nbformat notebook.
        source: The chapter that it was made from.

    Returns:
        Another nbformat notebook.
    """
    state = executed.metadata.get("widgets", {})
    states = {name: model for kind in state.values() for name, model in kind["state"].items()}
    widgets = widget_names([cell.get("outputs") for cell in executed.cells], states)

    def scrub(node):
        text = json.dumps(node)
        for name, number in widgets.items():
            text = text.replace(name, number)
        for pattern, replacement in VOLATILE.items():
            text = re.sub(pattern, replacement, text)
        return nbformat.from_dict(json.loads(text))

    page = chapters.notebook(source)
    for cell, ran in zip(page.cells, executed.cells, strict=True):
        if cell.cell_type == "code":
            cell.execution_count, cell.outputs = ran.execution_count, scrub(ran.outputs)
    about, ran = page.metadata, executed.metadata["cmp"]
    lexer = about.get("jupytext", {}).get("default_lexer", "ipython3")
    about["cmp"] = {key: ran[key] for key in ("source_sha256", "parameters")}
    about["jupytext"] = {"default_lexer": lexer, "formats": chapters.FORMATS}
    about["language_info"] = {"name": "python", "file_extension": ".py"}
    if state:
        about["widgets"] = scrub(state)
    return page


def commit_notebooks(
    numbers: Iterable[str] | None = None, jobs: int = 1, folder: Path = chapters.BOOK
) -> list[Path]:
    """Write `book/NN_name.ipynb`: chapters executed with their defaults, stable to the byte.

    Args:
        numbers: Chapters, all by default.
        jobs: Chapters at the same time.
        folder: The book.

    Returns:
        The written notebooks.

    Raises:
        CmpError: A source does not pair itself with its notebook in its header; or chapters failed,
            whose committed notebooks stay as they were.
    """
    sources = chapters.select(numbers, folder)
    for source in sources:
        pairing = chapters.notebook(source).metadata.get("jupytext", {})
        if pairing.get("formats") != chapters.FORMATS:
            raise CmpError(
                f"{source}: add to the header:\njupytext:\n  formats: {chapters.FORMATS}"
            )
    tasks, failures = run.run_chapters(sources, build_folder() / "published", {}, jobs)
    written = []
    for task in tasks:
        if task.is_current():
            page = stable_notebook(nbformat.read(task.target, as_version=4), task.source)
            written.append(task.source.with_suffix(".ipynb"))
            write_atomic(written[-1], nbformat.writes(page))
    print(f"notebooks: {folder}")
    run.raise_failures(failures)
    return written
