"""Running the book: chapters through papermill, whole or not at all, skipped where current.

The committed notebooks are chapters executed with their defaults, stable to the byte.
"""

import base64
import hashlib
import io
import json
import logging
import os
import queue
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import nbformat
from PIL import Image
from tqdm import tqdm

from cmp import NUMERICS
from cmp.config import PROFILES
from cmp.errors import CmpError
from cmp.files import parse_json, write_atomic
from cmp.project import build_folder
from lab import chapters, values

FINGERPRINTED = ("book/lab/**/*.py", "book/results/*", "book/studies/*", "book/*.yaml")
"""What a chapter's outputs rest on beside its source and `NUMERICS`; goldens guard other code."""
PLACES = {sys.prefix: "<python>", str(chapters.BOOK.parent): ".", str(Path.home()): "~"}
VOLATILE = {
    r"/[^\s\"]*/ipykernel_\d+/\d+\.py": "<cell>",
    r" at 0x[0-9a-f]{6,16}\b": " at 0x0",
    r"\[\d\d:\d\d(:\d\d)?(&lt;|<)[^\]]{1,40}\]": "[time]",
} | {re.escape(place) + r"(?![\w.-])": name for place, name in PLACES.items()}
"""What differs between two runs of a chapter -> what stands for it."""
ENDS = "from lab import chapter_setup\n\nchapter_setup.print_ends(globals())"
"""A last cell that is executed and taken out again."""
WIDGET = "application/vnd.jupyter.widget-view+json"


class Task(NamedTuple):
    """A chapter to run.

    Attributes:
        source: The chapter.
        target: Where its executed notebook goes.
        parameters: All values.
        fingerprint: See `package_fingerprint`.
    """

    source: Path
    target: Path
    parameters: dict[str, object]
    fingerprint: str = ""

    def made_from(self) -> dict[str, object]:
        """Return what the executed notebook says that it was made from."""
        given = {"parameters": self.parameters, "fingerprint": self.fingerprint}
        return {"source_sha256": chapters.source_hash(self.source)} | given

    def is_current(self) -> bool:
        """Return whether the target was executed from these very things."""
        record = run_record(self.target)
        return all(record.get(key) == value for key, value in self.made_from().items())

    @property
    def seconds(self) -> float | None:
        """What the chapter took when it ran last, if it ran."""
        return run_record(self.target).get("seconds")


def package_fingerprint(root: Path = chapters.BOOK.parent) -> str:
    """Hash what the outputs of every chapter rest on beside its source.

    Args:
        root: The folder of the project.

    Returns:
        sha256 over `NUMERICS`, results, studies, guidelines and the book's package.
    """
    digest = hashlib.sha256(f"{NUMERICS}\n".encode())
    for path in sorted({path for pattern in FINGERPRINTED for path in root.glob(pattern)}):
        if path.is_file() and not path.name.startswith("."):
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            digest.update(f"{path.relative_to(root).as_posix()} {content}\n".encode())
    return digest.hexdigest()


def run_record(target: Path) -> dict:
    """Return what an executed notebook says of its making; empty if it is missing or damaged."""
    try:
        record = parse_json(target.read_text(encoding="utf-8"))["metadata"]["cmp"]
        return record if isinstance(record.get("seconds", 0.0), int | float) else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def execute_chapter(task: Task) -> None:
    """Run a chapter in its folder; its target is whole at the end, or is what it was before.

    While it runs, the notebook so far is `.NAME.part.ipynb` beside the target.

    Raises:
        CmpError: A cell failed, or the kernel died; the notebook so far is `NAME.failed.ipynb`.
    """
    from papermill.exceptions import PapermillExecutionError

    source, target, record = task.source, task.target, task.made_from()
    part = target.resolve().with_name(f".{target.stem}.part.ipynb")
    failed = target.with_suffix(".failed.ipynb")
    defaults = {p.name: p.default for p in chapters.parameters(source).values()}
    changed = {key: value for key, value in task.parameters.items() if value != defaults[key]}
    started = []

    def on_start(cell, cell_index: int) -> None:
        started.extend([cell.source] if cell.cell_type == "code" else [])

    began = time.monotonic()
    try:
        executed = _execute(source, part, changed, on_start)
    except (PapermillExecutionError, RuntimeError) as error:
        os.replace(part, failed)
        raise _failure(source, failed, started, error) from error
    finally:
        part.unlink(missing_ok=True)
    drop_widgets(executed)
    ends = executed.cells.pop()["outputs"]
    record["ends"] = parse_json(ends[0]["text"]) if ends else {}
    values.fill_notebook(executed, source.stem.partition("_")[0])
    executed.metadata["cmp"] = record | {"seconds": round(time.monotonic() - began, 1)}
    del executed.metadata["papermill"]
    write_atomic(target, nbformat.writes(executed))
    failed.unlink(missing_ok=True)


def drop_widgets(executed) -> None:
    """Leave the stills of explorers in an executed notebook, and nothing of progress bars.

    Without a kernel, a widget could only say that it is missing.
    """
    executed.metadata.pop("widgets", None)
    for cell in executed.cells:
        kept = []
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if WIDGET in data:  # a viewer shows one kind of an output only
                stills = [{kind: data[kind]} for kind in ("text/html", "image/png") if kind in data]
                kept += [nbformat.v4.new_output("display_data", still) for still in stills]
            else:
                kept.append(output)
        if "outputs" in cell:
            cell.outputs = kept


def _execute(source: Path, part: Path, changed: dict, on_start: Callable):
    """Run papermill, quietly and in the chapter's folder; the notebook so far is at `part`."""
    import papermill

    logging.getLogger("papermill").setLevel(logging.CRITICAL)
    notebook = chapters.notebook(source)
    notebook.cells.append(nbformat.v4.new_code_cell(ENDS, id="ends"))
    write_atomic(part, nbformat.writes(notebook))
    path = str(part).replace("{", "{{").replace("}", "}}")  # papermill formats its paths
    return papermill.execute_notebook(
        path,
        path,
        changed,
        progress_bar=False,
        start_timeout=120,
        kernel_manager_class=kernel_manager(),
        resources={"metadata": {"path": str(source.resolve().parent)}},
        shutdown_kernel="immediate",  # a graceful one interrupts, and the kernel may complain
        record_timing=False,
        coalesce_streams=True,
        on_cell_start=on_start,
    )


def kernel_manager() -> type:
    """Return a manager whose kernels run this very Python, where Jupyter would look up `python3`.

    The hash seed is fixed, and threads sleep while they wait: those that spin for one whose core is
    busy take several times as long.
    """
    from ipykernel.kernelspec import get_kernel_dict
    from jupyter_client import AsyncKernelManager, kernelspec

    spec = get_kernel_dict(["--log-level=CRITICAL"], ["-Xfrozen_modules=off"])
    spec["env"] = {"PYTHONHASHSEED": "0", "OMP_WAIT_POLICY": "passive"}
    return type("ThisPython", (AsyncKernelManager,), {"kernel_spec": kernelspec.KernelSpec(**spec)})


def _failure(source: Path, kept: Path, started: list[str], error: Exception) -> CmpError:
    """Return the error for a chapter that stopped in a cell: where, and the traceback's end."""
    text = "\n".join(getattr(error, "traceback", None) or [str(error)])
    lines = re.sub(r"\x1b\[[0-9;]*m", "", text).strip().splitlines()
    number = getattr(error, "exec_count", None) or len(started)
    cell = getattr(error, "source", "".join(started[-1:])).strip().splitlines()
    where = f"{source.stem}: cell [{number}] failed: {cell[0] if cell else 'its kernel'}"
    what = "\n    ".join([where, *lines[-6:]])
    return CmpError(f"{what}\n  the notebook so far: {kept}")


def plan_chapters(sources: list[Path], folder: Path, given: dict[str, str]) -> list[Task]:
    """Return a task for each of some chapters; raise `CmpError` for a wrong parameter.

    Args:
        sources: Chapters.
        folder: Where the executed notebooks go.
        given: Parameter -> text of a value.
    """
    fingerprint, tasks = package_fingerprint(), []
    for source in sources:
        values = chapters.check_parameters(source, given)
        tasks.append(Task(source, folder / f"{source.stem}.ipynb", values, fingerprint))
    return tasks


def run_tasks(tasks: list[Task], jobs: int = 1, dry_run: bool = False) -> dict[Path, CmpError]:
    """Run those of some tasks that are not current.

    Args:
        tasks: What there is to run.
        jobs: Chapters at the same time.
        dry_run: Print the plan only.

    Returns:
        Target -> why it failed, in the order of the tasks.
    """
    todo = [task for task in tasks if not task.is_current()]
    for task in tasks:
        forecast = f"to run, {task.seconds:.0f} s before" if task.seconds else "to run, first time"
        tqdm.write(f"{task.target.stem}: {forecast if task in todo else 'current, skipped'}")
    known = [task.seconds for task in todo if task.seconds]
    total = sum(known) / max(1, min(jobs, len(todo)))
    forecast = f", about {total:.0f} s for the {len(known)} that ran before" if known else ""
    tqdm.write(f"{len(todo)} of {len(tasks)} chapters to run{forecast}")
    failures = {}
    if dry_run:
        return failures
    for task, error in tqdm(_finished(todo, jobs), "book", len(todo), disable=None):
        if isinstance(error, CmpError):
            failures[task.target] = error
        elif error:
            raise error
        tqdm.write(f"{task.target.stem}: {'failed' if error else f'{task.seconds} s'}")
    return {task.target: failures[task.target] for task in todo if task.target in failures}


def _finished(tasks: list[Task], jobs: int) -> Iterator[tuple[Task, Exception | None]]:
    """Run tasks, `jobs` at a time; yields each with its error, in the order in which they end.

    The threads only wait for their kernels. They are daemons, and a kernel goes when its parent
    goes: an interrupt or a kill leaves nothing running.
    """
    finished: queue.SimpleQueue = queue.SimpleQueue()
    waiting = iter(tasks)

    def work() -> None:
        for task in waiting:  # one iterator for all threads: each takes the next task
            try:
                execute_chapter(task)
                finished.put((task, None))
            except Exception as error:
                finished.put((task, error))

    for _ in range(min(jobs, len(tasks))):
        threading.Thread(target=work, daemon=True).start()
    for _ in tasks:
        yield finished.get()


def raise_failures(failures: dict[Path, CmpError]) -> None:
    """Raise one `CmpError` for the chapters that failed, if any did."""
    if failures:
        parts = "\n".join(map(str, failures.values()))
        raise CmpError(f"{len(failures)} of the chapters failed\n{parts}")


def check_profile(profile: str, given: Mapping[str, str]) -> None:
    """Raise `CmpError` for no profile of `cmp`, and for another among the parameters."""
    if profile not in PROFILES:
        raise CmpError(f"--profile: {profile!r}: choose {', '.join(PROFILES)}")
    if given.get("profile", profile) != profile:
        raise CmpError(f"profile: {profile} and {given['profile']} are both given; use --profile")


def run_book(
    profile: str,
    numbers: Iterable[str] | None,
    given: dict[str, str],
    jobs: int = 1,
    dry_run: bool = False,
    folder: Path = chapters.BOOK,
) -> None:
    """Run chapters with a profile; what is current is skipped, and one that fails stops no other.

    The executed notebooks go to `_build/PROFILE`.

    Args:
        profile: A profile of `cmp`.
        numbers: Chapters, all where None.
        given: Other parameters: name -> text of a value.
        jobs: Chapters at the same time.
        dry_run: Print the plan only.
        folder: The book.

    Raises:
        CmpError: A parameter is wrong, before anything starts; or chapters failed, at the end.
    """
    check_profile(profile, given)
    target, sources = build_folder() / profile, chapters.select(numbers, folder)
    tasks = plan_chapters(sources, target, given | {"profile": profile})
    failures = run_tasks(tasks, jobs, dry_run)
    if not dry_run:
        chapters.copy_diagrams(target)
        print(f"notebooks: {target}")
    raise_failures(failures)


def stable_notebook(executed, source: Path):
    """Return an executed notebook as it is committed: another run of the chapter changes nothing.

    Times, paths of this machine, addresses, random ids of cells, and versions are left out. Outputs
    and the source's hash stay; pictures have fewer colours.

    Args:
        executed: An nbformat notebook.
        source: The chapter that it was made from.

    Returns:
        Another nbformat notebook.
    """

    def scrub(node):
        text = json.dumps(node)
        for pattern, replacement in VOLATILE.items():
            text = re.sub(pattern, replacement, text)
        return nbformat.from_dict(json.loads(text))

    page = chapters.notebook(source)
    for cell, ran in zip(page.cells, executed.cells, strict=True):
        cell.source = ran.source
        if cell.cell_type == "code":
            cell.execution_count, cell.outputs = ran.execution_count, scrub(ran.outputs)
            for data in (output.get("data", {}) for output in cell.outputs):
                if "image/png" in data:
                    data["image/png"] = shrink_picture(data["image/png"])
    about, ran = page.metadata, executed.metadata["cmp"]
    about["cmp"] = {key: ran[key] for key in ("source_sha256", "parameters")}
    about.pop("jupytext", None)  # values are filled in: the text is no longer that of the source
    about["language_info"] = {"name": "python", "file_extension": ".py"}
    return page


def shrink_picture(png: str) -> str:
    """Return a picture of a notebook with at most 256 colours, a third of its size.

    A clone holds every version of every notebook, most of which are pictures.

    Args:
        png: A PNG as base64.
    """
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    picture = picture.quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    picture.save(file := io.BytesIO(), "png", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


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
        CmpError: Chapters failed, whose committed notebooks stay as they were.
    """
    sources = chapters.select(numbers, folder)
    tasks = plan_chapters(sources, build_folder() / "published", {})
    failures = run_tasks(tasks, jobs)
    written = []
    for task in tasks:
        if task.is_current():
            page = stable_notebook(nbformat.read(task.target, as_version=4), task.source)
            written.append(task.source.with_suffix(".ipynb"))
            write_atomic(written[-1], nbformat.writes(page))
    print(f"notebooks: {folder}")
    raise_failures(failures)
    return written
