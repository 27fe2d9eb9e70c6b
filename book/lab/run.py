"""Running the book: chapters through papermill, whole or not at all, skipped where current."""

import contextlib
import functools
import hashlib
import logging
import os
import queue
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lab import chapters
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from cmp.config import PROFILES
from cmp.errors import CmpError
from cmp.files import build_folder, parse_json, project_folder

FINGERPRINTED = (
    "cmp/**/*.py",
    "cmp/**/*.json",
    "weights/*.json",
    "book/lab/**/*.py",
    "book/lab/**/*.js",
    "data_manifests/**/*",
    "book/results/**/*",
    "book/studies/**/*",
    "book/guidelines.yaml",
)
OnCell = Callable[[int, int], None]


class ChapterFailed(CmpError):
    """A chapter's cell raised, or its kernel died; says where, and where the notebook is."""


@dataclass(frozen=True)
class Task:
    """A chapter to run: from where to where, with what, and what is known of it beforehand."""

    source: Path
    target: Path
    parameters: dict[str, object]
    fingerprint: str
    current: bool
    seconds: float | None


def package_fingerprint(root: Path = project_folder()) -> str:
    """sha256 over what a chapter's outputs rest on beside its source: code, manifests, results."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in FINGERPRINTED for path in root.glob(pattern)}):
        if path.is_file() and not path.name.startswith("."):
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            digest.update(f"{path.relative_to(root).as_posix()} {content}\n".encode())
    return digest.hexdigest()


def run_record(target: Path) -> dict:
    """What an executed notebook says of its making; empty where it is missing or damaged."""
    try:
        made = parse_json(target.read_text(encoding="utf-8"))["metadata"]["cmp"]
        return made if isinstance(made.get("seconds", 0.0), int | float) else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def is_current(source: Path, target: Path, parameters: dict, fingerprint: str) -> bool:
    """Whether `target` was executed from this very source, parameters and fingerprint."""
    made = run_record(target)
    wanted = (chapters.source_hash(source), parameters, fingerprint)
    return (made.get("source_sha256"), made.get("parameters"), made.get("fingerprint")) == wanted


def failure_error(source: Path, kept: Path, last: dict, error: Exception) -> ChapterFailed:
    """The error for a chapter that stopped in its last started cell: where, the traceback's end."""
    text = "\n".join(getattr(error, "traceback", None) or [str(error)])
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text).strip().splitlines()
    number = getattr(error, "exec_count", None) or last["number"]
    cell = getattr(error, "source", last["source"]).strip().splitlines()
    where = f"{source.stem}: cell [{number}] failed: {cell[0] if cell else 'its kernel'}"
    what = "\n    ".join([where, *plain[-6:]])
    return ChapterFailed(f"{what}\n  the notebook so far: {kept}")


def cell_watcher(last: dict, cells: int, on_cell: OnCell | None) -> Callable:
    """nbclient's hook at the start of a cell: keeps in `last` which code cell, tells on_cell."""

    def starts(cell, cell_index: int) -> None:
        if cell.cell_type == "code":
            last.update(number=last["number"] + 1, source=cell.source)
        if on_cell:
            on_cell(cell_index, cells)

    return starts


def execute_chapter(
    source: Path,
    target: Path,
    parameters: dict[str, object],
    on_cell: OnCell | None = None,
    fingerprint: str = "",
) -> None:
    """Run a chapter in its folder; `target` is there whole at the end, or is what it was before.

    While it runs, the notebook so far is `.NAME.part.ipynb` beside target. `on_cell(done, cells)`
    is called before each cell. Raises `ChapterFailed`; the notebook so far is then
    `NAME.failed.ipynb`.
    """
    from papermill.exceptions import PapermillExecutionError

    book = chapters.notebook(source)
    made = {"source_sha256": chapters.source_hash(source), "parameters": parameters}
    part = target.resolve().with_name(f".{target.stem}.part.ipynb")
    failed = target.with_suffix(".failed.ipynb")
    changed = chapters.changed_parameters(source, parameters)
    last = {"number": 0, "source": ""}
    starts = cell_watcher(last, len(book.cells) + bool(changed), on_cell)
    began = time.monotonic()
    try:
        done = run_cells(book, part, changed, source.resolve().parent, starts)
    except (PapermillExecutionError, RuntimeError) as error:
        os.replace(part, failed)
        raise failure_error(source, failed, last, error) from error
    finally:
        part.unlink(missing_ok=True)
    seconds = round(time.monotonic() - began, 1)
    done.metadata["cmp"] = made | {"fingerprint": fingerprint, "seconds": seconds}
    del done.metadata["papermill"]
    chapters.write_notebook(done, target)
    failed.unlink(missing_ok=True)


def plan_chapters(sources: list[Path], folder: Path, given: dict[str, str]) -> list[Task]:
    """What there is to do, all parameters checked; a chapter's forecast is its time before."""
    fingerprint = package_fingerprint()
    tasks = []
    for source in sources:
        values = chapters.check_parameters(source, given)
        target = folder / f"{source.stem}.ipynb"
        current = is_current(source, target, values, fingerprint)
        seconds = run_record(target).get("seconds")
        tasks.append(Task(source, target, values, fingerprint, current, seconds))
    return tasks


def show_plan(tasks: list[Task], jobs: int, console: Console) -> None:
    """A line a chapter: current, or what is known of its time; then the sum."""
    todo = [task for task in tasks if not task.current]
    for task in tasks:
        forecast = f"to run, {task.seconds:.0f} s before" if task.seconds else "to run, first time"
        console.print(f"{task.source.stem}: {'current, skipped' if task.current else forecast}")
    known = [task.seconds for task in todo if task.seconds]
    seconds = sum(known) / max(1, min(jobs, len(todo)))
    forecast = f", about {seconds:.0f} s for the {len(known)} that ran before" if known else ""
    console.print(f"{len(todo)} of {len(tasks)} chapters to run{forecast}")


def events(tasks: list[Task], jobs: int) -> Iterator[tuple[Task, int, int, Exception | None]]:
    """Run tasks, `jobs` at a time; yields (task, done, cells, error), done == cells at its end.

    The threads only wait for their kernels. They are daemons, and a kernel goes when its parent
    goes: an interrupt or a kill leaves nothing running.
    """
    waiting: queue.SimpleQueue[Task] = queue.SimpleQueue()
    happened: queue.SimpleQueue = queue.SimpleQueue()
    for task in tasks:
        waiting.put(task)

    def attempt(task: Task) -> Exception | None:
        def on_cell(done: int, cells: int) -> None:
            happened.put((task, done, cells, None))

        try:
            execute_chapter(task.source, task.target, task.parameters, on_cell, task.fingerprint)
        except Exception as error:
            return error

    def work() -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                task = waiting.get_nowait()
                happened.put((task, 1, 1, attempt(task)))

    for _ in range(min(jobs, len(tasks))):
        threading.Thread(target=work, daemon=True).start()
    left = len(tasks)
    while left:
        event = happened.get()
        left -= event[1] == event[2]
        yield event


def run_chapters(tasks: list[Task], jobs: int, console: Console) -> list[CmpError]:
    """Run those that are not current, with progress; returns the failures, in the book's order.

    Whatever is raised that is no `CmpError` is raised again.
    """
    todo = [task for task in tasks if not task.current]
    failed: dict[Path, CmpError] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f} %"))
    times = (TimeElapsedColumn(), TimeRemainingColumn())
    quiet = not console.is_terminal
    with Progress(*columns, *times, console=console, disable=quiet) as bars:
        whole = bars.add_task("book", total=len(todo))
        bar = {task.source: bars.add_task(task.source.stem, visible=False) for task in todo}
        for task, done, cells, error in events(todo, jobs):
            bars.update(bar[task.source], completed=done, total=cells, visible=done < cells)
            if done < cells:
                continue
            bars.advance(whole)
            if isinstance(error, CmpError):
                failed[task.source] = error
            elif error:
                raise error
            state = "failed" if error else f"{run_record(task.target)['seconds']} s"
            console.print(f"{task.source.stem}: {state}")
    return [failed[task.source] for task in todo if task.source in failed]


def raise_failures(failures: list[CmpError]) -> None:
    """Raise one `CmpError` for the chapters that failed, if any did."""
    if failures:
        parts = "\n".join(map(str, failures))
        raise CmpError(f"{len(failures)} of the chapters failed\n{parts}")


def run_book(
    profile: str,
    numbers: Iterable[str] | None = None,
    given: dict[str, str] | None = None,
    jobs: int = 1,
    dry_run: bool = False,
    target: Path | None = None,
    folder: Path = chapters.BOOK,
) -> list[Path]:
    """Run the chapters of a profile in order; returns where their notebooks are.

    numbers: which chapters, all by default; given: `-P name=value`; target: the folder for the
    notebooks, `_build/PROFILE` by default. What is current is skipped; a chapter that fails stops
    no other. All parameters are checked before anything starts. Raises one `CmpError` that lists
    what failed.
    """
    if profile not in PROFILES:
        raise CmpError(f"--profile: {profile!r}: choose {', '.join(PROFILES)}")
    if (given or {}).get("profile", profile) != profile:
        raise CmpError(f"profile: {profile} and {given['profile']} are both given; use --profile")
    console = Console(soft_wrap=True, highlight=False, markup=False)
    target = target or build_folder() / profile
    tasks = plan_chapters(
        chapters.select(numbers, folder), target, {**(given or {}), "profile": profile}
    )
    show_plan(tasks, jobs, console)
    if not dry_run:
        failures = run_chapters(tasks, jobs, console)
        console.print(f"notebooks: {target}")
        raise_failures(failures)
    return [task.target for task in tasks]


@functools.cache
def kernel_manager() -> type:
    """A manager whose kernels run this very Python with a fixed hash seed, and with threads that
    sleep while they wait: those that spin for one whose core is busy take several times as long.

    Jupyter itself looks `python3` up by name, first among the user's own kernels.
    """
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpec

    command = [sys.executable, "-Xfrozen_modules=off", "-m", "ipykernel_launcher"]
    spec = KernelSpec(
        argv=[*command, "-f", "{connection_file}", "--log-level=CRITICAL"],
        env={"PYTHONHASHSEED": "0", "OMP_WAIT_POLICY": "passive"},
        display_name=chapters.KERNELSPEC["display_name"],
        language=chapters.KERNELSPEC["language"],
    )
    return type("ThisPython", (AsyncKernelManager,), {"kernel_spec": property(lambda self: spec)})


def run_cells(book, part: Path, changed: dict, folder: Path, on_start: Callable):
    """papermill, quiet, in this folder; the notebook so far is at `part`; returns it at the end."""
    import papermill

    logging.getLogger("papermill").setLevel(logging.CRITICAL)
    chapters.write_notebook(book, part)
    path = str(part).replace("{", "{{").replace("}", "}}")  # papermill formats its paths
    return papermill.execute_notebook(
        path,
        path,
        changed,
        progress_bar=False,
        start_timeout=120,
        kernel_manager_class=kernel_manager(),
        resources={"metadata": {"path": str(folder)}},
        shutdown_kernel="immediate",  # a graceful one interrupts, and the kernel may complain
        record_timing=False,
        coalesce_streams=True,
        on_cell_start=on_start,
    )
