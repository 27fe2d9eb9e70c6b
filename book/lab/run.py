"""Run the book's chapters with papermill, atomically, skipping those that are current.

The committed notebooks are chapters executed with their defaults, byte for byte reproducible.
"""

import base64
import io
import json
import logging
import os
import queue
import re
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import nbformat
from PIL import Image
from tqdm import tqdm

from cmp.errors import CmpError
from cmp.files import write_atomic
from cmp.parsing import parse_json
from cmp.project import build_folder
from lab import chapters, keeping, stamps

PLACES = {sys.prefix: "<python>", str(chapters.BOOK.parent): ".", str(Path.home()): "~"}
VOLATILE = {
    r"/[^\s\"]*/ipykernel_\d+/\d+\.py": "<cell>",
    r" at 0x[0-9a-f]{6,16}\b": " at 0x0",
    r"\[\d\d:\d\d(:\d\d)?(&lt;|<)[^\]]{1,40}\]": "[time]",
} | {re.escape(place) + r"(?![\w.-])": name for place, name in PLACES.items()}
"""What differs between two runs of a chapter -> its replacement."""
MOST_NAMED = 3
"""Changed parts that are named for a stale notebook."""
RECORD = "from lab import chapter_setup\n\nchapter_setup.print_record(globals(), {!r})"
"""A last cell, with the path of the chapter, that is executed and then removed."""


class Task(NamedTuple):
    """A chapter to run.

    Attributes:
        source: The chapter.
        target: The path for its executed notebook.
        parameters: All parameter values.
        is_published: Whether the notebook is written in the form to commit.
        keeps_outputs: Whether only the text is written again, without running the chapter.
    """

    source: Path
    target: Path
    parameters: dict[str, object]
    is_published: bool = False
    keeps_outputs: bool = False

    @property
    def seconds(self) -> float | None:
        """The duration of the chapter's last run, if any."""
        return run_record(self.target).get("seconds")


def run_record(target: Path) -> dict:
    """Return the record in an executed notebook of how it was made, or {} if it is missing or
    damaged."""
    try:
        record = parse_json(target.read_text(encoding="utf-8"))["metadata"]["cmp"]
        is_text = all(isinstance(digest, str) for digest in record.get("stamp", {}).values())
        return record if is_text and isinstance(record.get("seconds", 0.0), int | float) else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def execute_chapter(task: Task) -> None:
    """Run a chapter in its folder, and write its target only if it succeeds.

    Raises:
        CmpError: A cell failed or the kernel died; the notebook so far is in `NAME.failed.ipynb`.
    """
    stamp, began = stamps.make_stamp(task.source), time.monotonic()
    executed, record = _execute(task, chapters.notebook(task.source))
    drop_widgets(executed)
    texts = iter(record.pop("texts"))
    for cell in executed.cells:
        cell.source = next(texts) if cell.cell_type == "markdown" else cell.source
    stamp |= stamps.digest_files(record.pop("files"))
    executed.metadata["cmp"] = record | {
        "stamp": stamp,
        "parameters": task.parameters,
        "seconds": round(time.monotonic() - began, 1),
    }
    del executed.metadata["papermill"]
    page = stable_notebook(executed, task.source) if task.is_published else executed
    write_atomic(task.target, nbformat.writes(page))


def refill_text(task: Task) -> None:
    """Write a chapter's committed notebook with its present text and the outputs that it has.

    Raises:
        CmpError: A mark of the text cannot be filled in.
    """
    stamp, page = stamps.make_stamp(task.source), chapters.notebook(task.source)
    committed, empty = nbformat.read(task.target, 4), chapters.notebook(task.source)
    empty.cells = []
    _, record = _execute(task, empty)  # which fills in the text
    texts = iter(record["texts"])
    cells = iter([cell for cell in committed.cells if cell.cell_type == "code"])
    for cell in page.cells:
        if cell.cell_type == "markdown":
            cell.source = next(texts)
        else:
            ran = next(cells)
            cell.update(execution_count=ran.execution_count, outputs=ran.outputs)
    page.metadata = committed.metadata
    about = page.metadata["cmp"]
    read = [name for name in about["stamp"] if name.endswith(stamps.SUFFIXES)]
    about["stamp"] = stamp | stamps.digest_files([*read, *record["files"]])
    write_atomic(task.target, nbformat.writes(page))


def drop_widgets(executed) -> None:
    """Remove widgets from an executed notebook, keeping the stills of explorers but no progress
    bars.

    Without a kernel, a widget can only show that it is missing.
    """
    executed.metadata.pop("widgets", None)
    for cell in executed.cells:
        if "outputs" not in cell:
            continue
        kept = []
        for output in cell.outputs:
            data = output.get("data", {})
            if keeping.VIEW in data:  # a viewer shows only one format of an output
                stills = [{kind: data[kind]} for kind in ("text/html", "image/png") if kind in data]
                kept += [nbformat.v4.new_output("display_data", still) for still in stills]
            else:
                kept.append(output)
        cell.outputs = kept


def _execute(task: Task, notebook) -> tuple[nbformat.NotebookNode, dict]:
    """Run a notebook quietly in its chapter's folder, and return it with the chapter's record, see
    `lab.chapter_setup.print_record`. While it runs, the notebook so far is `.NAME.part.ipynb`."""
    import papermill
    from papermill.exceptions import PapermillExecutionError

    logging.getLogger("papermill").setLevel(logging.CRITICAL)
    source, target = task.source, task.target
    folder = build_folder() / "published" if task.is_published else target.resolve().parent
    part = folder / f".{target.stem}.part.ipynb"
    failed = folder / f"{target.stem}.failed.ipynb"
    defaults = {p.name: p.default for p in chapters.parameters(source).values()}
    changed = {key: value for key, value in task.parameters.items() if value != defaults[key]}
    last, started = RECORD.format(str(source.resolve())), []

    def on_start(cell, cell_index: int) -> None:
        started.extend([cell.source] if cell.cell_type == "code" else [])

    notebook.cells.append(nbformat.v4.new_code_cell(last, id="record"))
    write_atomic(part, nbformat.writes(notebook))
    path = str(part).replace("{", "{{").replace("}", "}}")  # papermill formats its paths
    try:
        executed = papermill.execute_notebook(
            path,
            path,
            changed,
            progress_bar=False,
            start_timeout=120,
            kernel_manager_class=kernel_manager(),
            extra_arguments=["--IPKernelApp.extra_extensions=lab.reads"],
            resources={"metadata": {"path": str(source.resolve().parent)}},
            shutdown_kernel="immediate",  # a graceful one interrupts, and the kernel may complain
            record_timing=False,
            coalesce_streams=True,
            on_cell_start=on_start,
        )
    except (PapermillExecutionError, RuntimeError) as error:
        os.replace(part, failed)
        raise _failure(source, failed, started, error) from error
    finally:
        part.unlink(missing_ok=True)
    failed.unlink(missing_ok=True)
    printed = [x["text"] for x in executed.cells.pop()["outputs"] if x.get("name") == "stdout"]
    return executed, parse_json("".join(printed))


def kernel_manager() -> type:
    """Return a manager with kernels that run this Python, while Jupyter would look up `python3`.

    The hash seed is fixed, and waiting threads sleep, since spinning for a thread on a busy core
    takes several times as long.
    """
    from ipykernel.kernelspec import get_kernel_dict
    from jupyter_client import AsyncKernelManager, kernelspec

    spec = get_kernel_dict(["--log-level=CRITICAL"], ["-Xfrozen_modules=off"])
    spec["env"] = {"PYTHONHASHSEED": "0", "OMP_WAIT_POLICY": "passive"}
    return type("ThisPython", (AsyncKernelManager,), {"kernel_spec": kernelspec.KernelSpec(**spec)})


def _failure(source: Path, kept: Path, started: list[str], error: Exception) -> CmpError:
    """Return the error for a chapter that failed in a cell, with the place and the end of the
    traceback."""
    text = "\n".join(getattr(error, "traceback", None) or [str(error)])
    lines = re.sub(r"\x1b\[[0-9;]*m", "", text).strip().splitlines()
    number = getattr(error, "exec_count", None) or len(started)
    cell = getattr(error, "source", "".join(started[-1:])).strip().splitlines()
    where = f"{source.stem}: cell [{number}] failed: {cell[0] if cell else 'its kernel'}"
    what = "\n    ".join([where, *lines[-6:]])
    return CmpError(f"{what}\n  the notebook so far: {kept}")


def plan_tasks(wanted: Iterable[tuple[Path, Path, dict[str, str]]]) -> list[Task]:
    """Return tasks; raise `CmpError` for an invalid parameter.

    Args:
        wanted: For each task the chapter, the path for its executed notebook, and parameter -> text
            of a value.
    """
    return [
        Task(source, target, chapters.check_parameters(source, given))
        for source, target, given in wanted
    ]


def changed_since(tasks: list[Task]) -> dict[Path, list[str]]:
    """Return target -> the names of what has changed since it was made, see `lab.stamps`. If there
    is no target, that is everything."""
    now = {source: stamps.make_stamp(source) for source in {task.source for task in tasks}}
    changed = {}
    for task in tasks:
        record = run_record(task.target)
        parts = stamps.changed_parts(record.get("stamp", {}), now[task.source])
        is_same = record.get("parameters") == task.parameters
        changed[task.target] = parts if is_same else ["parameters", *parts]
    return changed


def print_plan(tasks: list[Task], jobs: int = 1) -> list[Task]:
    """Print what is to be done about each task, and return the tasks that are not current.

    Args:
        tasks: The tasks.
        jobs: The number of chapters at a time.
    """
    changed, todo = changed_since(tasks), []
    for task in tasks:
        if parts := changed[task.target]:
            todo.append(task._replace(keeps_outputs=_is_only_text(task, parts)))
        tqdm.write(f"{task.target.stem}: {_state(todo[-1] if parts else task, parts)}")
    known = [seconds for task in todo if not task.keeps_outputs and (seconds := task.seconds)]
    total = sum(known) / max(1, min(jobs, len(todo)))
    forecast = f", about {total:.0f} s for the {len(known)} that ran before" if known else ""
    tqdm.write(f"{len(todo)} of {len(tasks)} chapters to write{forecast}")
    return todo


def _is_only_text(task: Task, changed: list[str]) -> bool:
    """Return whether a committed notebook differs from its chapter in Markdown alone."""
    if not task.is_published or changed != ["text"]:
        return False
    books = nbformat.read(task.target, 4), chapters.notebook(task.source)
    ran, now = ([c.source for c in book.cells if c.cell_type == "code"] for book in books)
    return ran == now


def run_tasks(tasks: list[Task], jobs: int = 1, dry_run: bool = False) -> dict[Path, CmpError]:
    """Run the tasks that are not current, and copy the diagrams to their notebooks.

    Args:
        tasks: The tasks.
        jobs: The number of chapters at a time.
        dry_run: Whether to only print the plan.

    Returns:
        Target -> why it failed, in the order of the tasks.
    """
    todo, failures = print_plan(tasks, jobs), {}
    if dry_run:
        return failures
    for task, error in tqdm(_finished(todo, jobs), "book", len(todo), disable=None):
        if isinstance(error, CmpError):
            failures[task.target] = error
        elif error:
            raise error
        took = f"{task.seconds} s" if task.seconds else "written"
        tqdm.write(f"{task.target.stem}: {'failed' if error else took}")
    for folder in {task.target.parent for task in tasks if not task.is_published}:
        chapters.copy_diagrams(folder)
    return {task.target: failures[task.target] for task in todo if task.target in failures}


def _state(task: Task, changed: list[str]) -> str:
    """Return what is to be done about a task, and why."""
    if not changed:
        return "current, skipped"
    if not task.target.exists():
        return "to run, first time"
    if not run_record(task.target).get("stamp"):
        return "to run, since its stamp cannot be read"
    more = f" and {len(changed) - MOST_NAMED} more" if len(changed) > MOST_NAMED else ""
    kept = "; only its text is written again" if task.keeps_outputs else ""
    took = f"; took {task.seconds:.0f} s" if task.seconds else ""
    return f"stale ({', '.join(changed[:MOST_NAMED])}{more} changed){kept}{took}"


def _finished(tasks: list[Task], jobs: int) -> Iterator[tuple[Task, Exception | None]]:
    """Run tasks, `jobs` at a time, and yield each with its error as it ends.

    The threads only wait for their kernels. They are daemons, and a kernel ends with its parent, so
    an interrupt or a kill leaves nothing running.
    """
    finished: queue.SimpleQueue = queue.SimpleQueue()
    waiting = iter(tasks)

    def work() -> None:
        for task in waiting:  # shared by all threads: each takes the next task
            try:
                (refill_text if task.keeps_outputs else execute_chapter)(task)
                finished.put((task, None))
            except Exception as error:
                finished.put((task, error))

    for _ in range(min(jobs, len(tasks))):
        threading.Thread(target=work, daemon=True).start()
    for _ in tasks:
        yield finished.get()


def raise_failures(failures: dict[Path, CmpError]) -> None:
    """Raise one `CmpError` for all chapters that failed, if any."""
    if failures:
        parts = "\n".join(map(str, failures.values()))
        raise CmpError(f"{len(failures)} of the chapters failed\n{parts}")


def run_book(
    profile: str,
    numbers: Iterable[str] | None,
    given: dict[str, str],
    jobs: int = 1,
    dry_run: bool = False,
    folder: Path = chapters.BOOK,
) -> None:
    """Run chapters with a profile, skipping current ones. A failed chapter does not stop the
    others.

    The executed notebooks go to `_build/PROFILE`.

    Args:
        profile: A profile of `cmp`.
        numbers: The chapters; None for all.
        given: Other parameters: name -> text of a value.
        jobs: The number of chapters at a time.
        dry_run: Whether to only print the plan.
        folder: The book.

    Raises:
        CmpError: Before anything starts, if a parameter is invalid; at the end, if chapters failed.
    """
    target, sources = build_folder() / profile, chapters.select(numbers, folder)
    given = given | {"profile": profile}
    tasks = plan_tasks((source, target / f"{source.stem}.ipynb", given) for source in sources)
    failures = run_tasks(tasks, jobs, dry_run)
    if not dry_run:
        print(f"notebooks: {target}")
    raise_failures(failures)


def stable_notebook(executed, source: Path):
    """Return an executed notebook in the form to commit, which another run of the chapter
    reproduces.

    Times, paths of this machine, memory addresses, random cell ids and versions are removed.
    Outputs and the stamp are kept, and pictures get fewer colours.

    Args:
        executed: An nbformat notebook.
        source: The chapter's source.

    Returns:
        A new nbformat notebook.
    """
    page = chapters.notebook(source)
    for cell, ran in zip(page.cells, executed.cells, strict=True):
        cell.source = ran.source
        if cell.cell_type == "code":
            text = json.dumps(ran.outputs)
            for pattern, replacement in VOLATILE.items():
                text = re.sub(pattern, replacement, text)
            cell.execution_count = ran.execution_count
            cell.outputs = nbformat.from_dict(json.loads(text))
            for data in (output.get("data", {}) for output in cell.outputs):
                if "image/png" in data:
                    data["image/png"] = shrink_picture(data["image/png"])
    about, ran = page.metadata, executed.metadata["cmp"]
    about["cmp"] = {key: ran[key] for key in ("stamp", "parameters")}
    about.pop("jupytext", None)  # values are filled in, so the text differs from the source
    about["language_info"] = {"name": "python", "file_extension": ".py"}
    return page


def shrink_picture(png: str) -> str:
    """Reduce a picture of a notebook to at most 256 colours, which is a third of its size.

    A clone contains every version of every notebook, and most of their size is pictures.

    Args:
        png: The PNG as base64.
    """
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    picture = picture.quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    picture.save(file := io.BytesIO(), "png", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def committed_tasks(
    numbers: Iterable[str] | None = None, folder: Path = chapters.BOOK
) -> list[Task]:
    """Return the tasks that write `book/NN_name.ipynb`: chapters executed with their defaults, byte
    for byte reproducible.

    Args:
        numbers: The chapters; all by default.
        folder: The book.
    """
    sources = chapters.select(numbers, folder)
    tasks = plan_tasks((source, source.with_suffix(".ipynb"), {}) for source in sources)
    return [task._replace(is_published=True) for task in tasks]


def commit_notebooks(
    numbers: Iterable[str] | None = None, jobs: int = 1, folder: Path = chapters.BOOK
) -> None:
    """Write the committed notebooks that are stale, see `committed_tasks`. Where only Markdown
    changed, the chapter's outputs stay, and its text is written again without running it.

    Args:
        numbers: The chapters; all by default.
        jobs: The number of chapters at a time.
        folder: The book.

    Raises:
        CmpError: Chapters failed; their committed notebooks are unchanged.
    """
    failures = run_tasks(committed_tasks(numbers, folder), jobs)
    print(f"notebooks: {folder}")
    raise_failures(failures)


def check_committed(
    numbers: Iterable[str] | None = None, jobs: int = 1, folder: Path = chapters.BOOK
) -> bool:
    """Print which committed notebooks are stale and why, or have no chapter, and how to mend it.

    Args:
        numbers: The chapters; all by default.
        jobs: The number of chapters at a time, for the forecast.
        folder: The book.

    Returns:
        Whether all of them are current.
    """
    stale = print_plan(committed_tasks(numbers, folder), jobs)
    if stale:
        chosen = "".join(f" --chapter {task.source.name[:2]}" for task in stale)
        tqdm.write(f"write them again: cmpt book --publish{chosen}")
    named = [x for x in folder.glob("*.ipynb") if chapters.CHAPTER.fullmatch(f"{x.stem}.md")]
    left = [path for path in sorted(named) if not path.with_suffix(".md").exists() and not numbers]
    for path in left:
        tqdm.write(f"{path.stem}: there is no {path.stem}.md; delete it: git rm {path}")
    return not stale and not left
