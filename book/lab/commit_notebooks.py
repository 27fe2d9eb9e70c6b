"""The committed notebooks: chapters executed with their defaults, stable to the byte."""

import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from lab import chapters, run
from rich.console import Console

from cmp.errors import CmpError
from cmp.files import build_folder, project_folder

VOLATILE = (  # what differs between two runs of one chapter, and what stands for it
    (re.compile(r"/[^\s\"]*/ipykernel_\d+/\d+\.py"), "<cell>"),
    (re.compile(r" at 0x[0-9a-f]{6,16}\b"), " at 0x0"),
    (re.compile(r"\[\d\d:\d\d(:\d\d)?(&lt;|<)[^\]]{1,40}\]"), "[time]"),
    *(
        (re.compile(re.escape(str(path)) + r"(?![\w.-])"), replacement)
        for path, replacement in (
            (sys.prefix, "<python>"),
            (project_folder(), "."),
            (Path.home(), "~"),
        )
    ),
)


def widget_names(outputs: list, states: dict[str, dict]) -> dict[str, str]:
    """Widgets' random ids -> their numbers: as the outputs show them, each then what it holds.

    Those that nothing holds (links) follow, in the order of their state.
    """
    names: dict[str, str] = {}

    def visit(node) -> None:
        for name in re.findall(r"[0-9a-f]{32}", json.dumps(node, sort_keys=True)):
            if name in states and name not in names:
                names[name] = f"{len(names):032x}"
                visit(states[name])

    visit(outputs)
    alike = {name: re.sub(r"[0-9a-f]{32}", "", json.dumps(states[name])) for name in states}
    visit(sorted(states, key=alike.get))
    return names


def stable_notebook(executed, source: Path):
    """An executed notebook as it is committed: a second run of the chapter differs in nothing.

    Goes: times, paths of this machine, addresses, random ids of cells and widgets, versions.
    Stays: outputs, widget state, the source's hash, and what makes jupytext see the same inputs in
    both files (it refuses to open a pair whose notebook is newer and differs).
    """
    import nbformat

    def scrub(node):
        text = json.dumps(node)
        for name, number in widgets.items():
            text = text.replace(name, number)
        for pattern, replacement in VOLATILE:
            text = pattern.sub(replacement, text)
        return nbformat.from_dict(json.loads(text))

    state = executed.metadata.get("widgets", {})
    states = {name: model for kind in state.values() for name, model in kind["state"].items()}
    widgets = widget_names([cell.get("outputs") for cell in executed.cells], states)
    page = chapters.notebook(source)
    pairing = {"default_lexer": "ipython3", "formats": chapters.FORMATS} | page.metadata.get(
        "jupytext", {}
    )
    for cell, ran in zip(page.cells, executed.cells, strict=True):
        if cell.cell_type == "code":
            cell.execution_count = ran.execution_count
            cell.outputs = scrub(ran.outputs)
    made = {key: executed.metadata["cmp"][key] for key in ("source_sha256", "parameters")}
    page.metadata = nbformat.from_dict(
        {
            "cmp": made,
            "jupytext": {key: pairing[key] for key in ("default_lexer", "formats")},
            "kernelspec": chapters.KERNELSPEC,
            "language_info": {"name": "python", "file_extension": ".py"},
        }
        | ({"widgets": scrub(state)} if state else {})
    )
    return page


def commit_notebooks(
    numbers: Iterable[str] | None = None, jobs: int = 1, folder: Path = chapters.BOOK
) -> list[Path]:
    """Write `book/NN_name.ipynb`: chapters executed with their defaults, stable; returns them.

    A source must pair itself with its notebook in its header, else `CmpError`. What fails is
    listed in one `CmpError` at the end; its committed notebook stays as it was.
    """
    import nbformat

    sources = chapters.select(numbers, folder)
    for source in sources:
        if (
            chapters.notebook(source).metadata.get("jupytext", {}).get("formats")
            != chapters.FORMATS
        ):
            raise CmpError(
                f"{source}: add to the header:\njupytext:\n  formats: {chapters.FORMATS}"
            )
    console = Console(soft_wrap=True, highlight=False, markup=False)
    tasks = run.plan_chapters(sources, build_folder() / "published", {})
    run.show_plan(tasks, jobs, console)
    failures = run.run_chapters(tasks, jobs, console)
    written = []
    for task in tasks:
        if run.is_current(task.source, task.target, task.parameters, task.fingerprint):
            page = stable_notebook(nbformat.read(task.target, as_version=4), task.source)
            written.append(task.source.with_suffix(".ipynb"))
            chapters.write_notebook(page, written[-1])
    console.print(f"notebooks: {folder}")
    run.raise_failures(failures)
    return written


def stale_notebooks(folder: Path = chapters.BOOK) -> list[str]:
    """The chapters whose committed notebook is missing or was made from another source."""
    return [
        source.stem
        for source in chapters.chapters(folder).values()
        if run.run_record(source.with_suffix(".ipynb")).get("source_sha256")
        != chapters.source_hash(source)
    ]
