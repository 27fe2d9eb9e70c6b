"""The book as a program: chapters, their parameters, running them, the committed notebooks.

A chapter is `book/NN_name.md`, a MyST Markdown notebook with one cell tagged `parameters`. The
heavy imports (jupytext, papermill) stand in the functions that need them: a chapter's kernel
imports this module for `guard` alone.
"""

import ast
import contextlib
import difflib
import functools
import hashlib
import json
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

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from cmp.errors import CmpError
from cmp.files import write_whole
from cmp.paths import ROOT, build_folder

BOOK = ROOT / "book"
FORMATS = "ipynb,md:myst"
CHAPTER = re.compile(r"(\d\d|A\d)_[a-z0-9_]+\.md")
KERNELSPEC = {"display_name": "Python 3", "language": "python", "name": "python3"}
TYPES = {"str": str, "int": int, "float": float, "bool": bool}
PROFILES = ("quick", "cpu", "gpu")
RULES = {  # what else a parameter of this name must obey, in words and as a test
    "profile": ("one of quick, cpu, gpu", lambda value: value in PROFILES),
    "seeds": ("at least 1", lambda value: value >= 1),
    "jobs": ("at least 1", lambda value: value >= 1),
    "device": ("cpu, cuda or cuda:N", lambda value: re.fullmatch(r"cpu|cuda(:\d+)?", value)),
}
FINGERPRINTED = (
    "cmp/**/*.py",
    "cmp/model_configs/**/*",
    "cmp/weights/*.json",
    "data_manifests/**/*",
    "book/results/**/*",
    "book/studies/**/*",
)
OnCell = Callable[[int, int], None]


class ChapterFailed(CmpError):
    """A chapter's cell raised, or its kernel died; says where, and where the notebook is."""


@dataclass(frozen=True)
class Parameter:
    """One line of a parameters cell: `name: type = default  # help`."""

    name: str
    type: str
    default: object
    help: str

    def __str__(self) -> str:
        return f"{self.name}: {self.type}" + (f" ({self.help})" if self.help else "")


@dataclass(frozen=True)
class Task:
    """A chapter to run: from where to where, with what, and what is known of it beforehand."""

    source: Path
    target: Path
    parameters: dict[str, object]
    fingerprint: str
    current: bool
    seconds: float | None


# chapters and notebooks


def chapters(folder: Path = BOOK) -> dict[str, Path]:
    """The chapters by number, in order; a misnamed file or a number given twice: `CmpError`."""
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("*.md")):
        match = CHAPTER.fullmatch(path.name)
        if not match:
            raise CmpError(f"{path}: a chapter is called NN_name.md, such as 03_merging.md")
        if match[1] in found:
            raise CmpError(f"{folder}: {found[match[1]].name} and {path.name} have one number")
        found[match[1]] = path
    return found


def select(numbers: Iterable[str] | None = None, folder: Path = BOOK) -> list[Path]:
    """The chapters of these numbers, or all, in the book's order; unknown: `CmpError`."""
    found = chapters(folder)
    wanted = [number.zfill(2) for number in numbers or found]
    for number in wanted:
        if number not in found:
            raise CmpError(f"no chapter {number}; there are {', '.join(found) or 'none yet'}")
    return [path for number, path in found.items() if number in wanted]


def source_text(source: Path) -> str:
    """The chapter's text with line ends as on Unix."""
    try:
        return source.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise CmpError(f"{source}: cannot be read ({error})") from error


def source_hash(source: Path) -> str:
    """sha256 of the chapter's text with line ends as on Unix."""
    return hashlib.sha256(source_text(source).encode()).hexdigest()


def notebook(source: Path):
    """The chapter as an nbformat notebook without outputs, the same to the byte every time.

    A cell's id is a hash of its text and of how often that text stood before: an edit changes no
    other cell's id. Raises `CmpError` where jupytext cannot read the file.
    """
    import jupytext

    try:
        book = jupytext.reads(source_text(source), fmt="md:myst")
    except ValueError as error:
        raise CmpError(f"{source}: not a MyST Markdown notebook ({error})") from error
    book.metadata["kernelspec"] = dict(KERNELSPEC)
    seen: dict[str, int] = {}
    for cell in book.cells:
        number = seen[cell.source] = seen.get(cell.source, -1) + 1
        cell["id"] = hashlib.sha256(f"{number}:{cell.source}".encode()).hexdigest()[:12]
    return book


def write_notebook(book, path: Path) -> None:
    """Write an nbformat notebook, whole or not at all."""
    import nbformat

    write_whole(path, nbformat.writes(book))


# parameters


def declared(cell: str) -> dict[str, Parameter]:
    """The parameters that a parameters cell declares.

    Every statement is `name: type = literal  # help`, with type str, int, float or bool; anything
    else is a `CmpError`.
    """
    found = {}
    for node in ast.parse(cell).body:
        line = cell.splitlines()[node.end_lineno - 1].encode()
        try:
            name, kind = node.target.id, ast.unparse(node.annotation)
            default, _ = ast.literal_eval(node.value), TYPES[kind]
        except (AttributeError, ValueError, KeyError) as error:
            raise CmpError(
                f"parameters cell: {line.decode().strip()!r}: write name: type = value  # help, "
                f"with a type of {', '.join(TYPES)}"
            ) from error
        comment = line[node.end_col_offset :].decode().strip(" #")
        found[name] = Parameter(name, kind, default, comment)
    return found


def parameters(source: Path) -> dict[str, Parameter]:
    """A chapter's parameters by name, as `papermill --help-notebook` shows them too.

    Raises `CmpError` where there is not exactly one cell tagged `parameters`, or papermill reads
    the cell differently (it gives up on a line with a second `=`).
    """
    from papermill.translators import PythonTranslator

    tagged = [c for c in notebook(source).cells if "parameters" in c.metadata.get("tags", [])]
    if len(tagged) != 1:
        raise CmpError(f"{source}: {len(tagged)} cells are tagged parameters; there must be one")
    try:
        found = declared(tagged[0].source)
    except (CmpError, SyntaxError) as error:
        raise CmpError(f"{source}: {error}") from error
    seen = {p.name: p.help for p in PythonTranslator.inspect(tagged[0])}
    for name, parameter in found.items():
        if seen.get(name) != parameter.help:
            raise CmpError(f"{source}: papermill cannot read {name}; is there a second = or #?")
    return found


def refusal(what: str, valid: dict[str, Parameter]) -> CmpError:
    """The error for a wrong parameter: what is wrong, then every valid one."""
    return CmpError(f"{what}; the parameters are {', '.join(map(str, valid.values()))}")


def check(values: dict[str, object], valid: dict[str, Parameter]) -> None:
    """Refuse an unknown name, a wrong type and an impossible value, with a `CmpError`."""
    for name, value in values.items():
        if name not in valid:
            near = difflib.get_close_matches(name, valid, n=1, cutoff=0.0)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise refusal(f"no parameter is called {name!r}{hint}", valid)
        kind = TYPES[valid[name].type]
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise refusal(f"{name}: {value!r} is no {kind.__name__}", valid)
        words, holds = RULES.get(name, ("", lambda value: True))
        if not holds(value):
            raise refusal(f"{name}: {value!r} must be {words}", valid)


def convert(text: str, kind: str) -> object:
    """The text as a value of the type, or the text itself where it is none."""
    try:
        return {"true": True, "false": False}[text.lower()] if kind == "bool" else TYPES[kind](text)
    except (KeyError, ValueError):
        return text


def check_parameters(source: Path, given: dict[str, str]) -> dict[str, object]:
    """All of a chapter's parameters: the defaults, and the given ones converted to their types.

    Raises `CmpError` that lists the valid parameters for an unknown name, a text that is no value
    of the type, and an impossible value.
    """
    valid = parameters(source)
    values = {n: convert(text, valid[n].type) if n in valid else text for n, text in given.items()}
    values = {name: parameter.default for name, parameter in valid.items()} | values
    try:
        check(values, valid)
    except CmpError as error:
        raise CmpError(f"{source.stem}: {error}") from error
    return values


def differing(source: Path, values: dict[str, object]) -> dict[str, object]:
    """Those of the values that are not the chapter's defaults; checked, as by `check`."""
    valid = parameters(source)
    check(values, valid)
    return {name: value for name, value in values.items() if value != valid[name].default}


def guard(scope: dict[str, object], **used: object) -> None:
    """For chapters, in the cell after the parameters cell: `guard(globals())`.

    papermill itself only warns about an unknown `-p name` and takes any type. It puts the given
    values in a cell of its own that begins with `# Parameters`; this looks that cell and the
    parameters cell up in the kernel's history (`In`), so that whatever else is defined, now or
    when the cell is run again, does not matter. Keywords, `profile=profile, ...`, may say which
    parameters the chapter uses: they must be the declared ones. Raises `CmpError` that lists the
    valid parameters for a name that the parameters cell does not declare and for a value that is
    not of its type. Outside IPython nothing can have been injected, and nothing is checked.
    """
    if "In" not in scope:
        return
    valid: dict[str, Parameter] = {}
    injected: set[str] = set()
    for cell in scope["In"]:
        with contextlib.suppress(CmpError, SyntaxError):
            if cell.startswith("# Parameters\n"):
                statements = [node for node in ast.parse(cell).body if isinstance(node, ast.Assign)]
                injected |= {node.targets[0].id for node in statements}
            else:
                valid = valid or declared(cell)
    if not valid:
        raise CmpError("run the parameters cell first")
    check({name: scope[name] for name in [*valid, *sorted(injected - {*valid})]}, valid)
    if used and used.keys() != valid.keys():
        raise refusal(f"the chapter uses {', '.join(used)}", valid)


# running


def package_fingerprint(root: Path = ROOT) -> str:
    """sha256 over what a chapter's outputs rest on beside its source: code, manifests, results."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in FINGERPRINTED for path in root.glob(pattern)}):
        if path.is_file() and not path.name.startswith("."):
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            digest.update(f"{path.relative_to(root).as_posix()} {content}\n".encode())
    return digest.hexdigest()


def record(target: Path) -> dict:
    """What an executed notebook says of its making; empty where it is missing or damaged."""
    try:
        return json.loads(target.read_text(encoding="utf-8"))["metadata"]["cmp"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def is_current(source: Path, target: Path, parameters: dict, fingerprint: str) -> bool:
    """Whether `target` was executed from this very source, parameters and fingerprint."""
    made = record(target)
    wanted = (source_hash(source), parameters, fingerprint)
    return (made.get("source_sha256"), made.get("parameters"), made.get("fingerprint")) == wanted


@functools.cache
def kernel_manager() -> type:
    """A manager whose kernels run this very Python with a fixed hash seed.

    Jupyter itself looks `python3` up by name, first among the user's own kernels.
    """
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpec

    command = [sys.executable, "-Xfrozen_modules=off", "-m", "ipykernel_launcher"]
    spec = KernelSpec(
        argv=[*command, "-f", "{connection_file}", "--log-level=CRITICAL"],
        env={"PYTHONHASHSEED": "0"},
        display_name=KERNELSPEC["display_name"],
        language=KERNELSPEC["language"],
    )
    return type("ThisPython", (AsyncKernelManager,), {"kernel_spec": property(lambda self: spec)})


def failure(source: Path, kept: Path, last: dict, error: Exception) -> ChapterFailed:
    """The error for a chapter that stopped in its last started cell: where, the traceback's end."""
    text = "\n".join(getattr(error, "traceback", None) or [str(error)])
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text).strip().splitlines()
    number = getattr(error, "exec_count", None) or last["number"]
    cell = getattr(error, "source", last["source"]).strip().splitlines()
    where = f"{source.stem}: cell [{number}] failed: {cell[0] if cell else 'its kernel'}"
    what = "\n    ".join([where, *plain[-6:]])
    return ChapterFailed(f"{what}\n  the notebook so far: {kept}")


def run_kernel(book, part: Path, changed: dict, folder: Path, on_start: Callable):
    """papermill, quiet, in this folder; the notebook so far is at `part`; returns it at the end."""
    import papermill

    logging.getLogger("papermill").setLevel(logging.CRITICAL)
    write_notebook(book, part)
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


def execute(
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

    book = notebook(source)
    made = {"source_sha256": source_hash(source), "parameters": parameters}
    part = target.resolve().with_name(f".{target.stem}.part.ipynb")
    failed = target.with_suffix(".failed.ipynb")
    last = {"number": 0, "source": ""}

    def starts(cell, cell_index: int) -> None:
        if cell.cell_type == "code":
            last.update(number=last["number"] + 1, source=cell.source)
        if on_cell:
            on_cell(cell_index, cells)

    changed = differing(source, parameters)
    cells = len(book.cells) + bool(changed)
    began = time.monotonic()
    try:
        done = run_kernel(book, part, changed, source.resolve().parent, starts)
    except (PapermillExecutionError, RuntimeError) as error:
        os.replace(part, failed)
        raise failure(source, failed, last, error) from error
    finally:
        part.unlink(missing_ok=True)
    seconds = round(time.monotonic() - began, 1)
    done.metadata["cmp"] = made | {"fingerprint": fingerprint, "seconds": seconds}
    del done.metadata["papermill"]
    write_notebook(done, target)
    failed.unlink(missing_ok=True)


def plan(sources: list[Path], folder: Path, given: dict[str, str]) -> list[Task]:
    """What there is to do, all parameters checked; a chapter's forecast is its time before."""
    fingerprint = package_fingerprint()
    tasks = []
    for source in sources:
        values = check_parameters(source, given)
        target = folder / f"{source.stem}.ipynb"
        current = is_current(source, target, values, fingerprint)
        seconds = record(target).get("seconds")
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
            execute(task.source, task.target, task.parameters, on_cell, task.fingerprint)
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


def run(tasks: list[Task], jobs: int, console: Console) -> list[CmpError]:
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
            state = "failed" if error else f"{record(task.target)['seconds']} s"
            console.print(f"{task.source.stem}: {state}")
    return [failed[task.source] for task in todo if task.source in failed]


def report(failures: list[CmpError]) -> None:
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
    folder: Path = BOOK,
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
    tasks = plan(select(numbers, folder), target, {**(given or {}), "profile": profile})
    show_plan(tasks, jobs, console)
    if not dry_run:
        failures = run(tasks, jobs, console)
        console.print(f"notebooks: {target}")
        report(failures)
    return [task.target for task in tasks]


# the committed notebooks


VOLATILE = (  # what differs between two runs of one chapter, and what stands for it
    (re.compile(r"/[^\s\"]*/ipykernel_\d+/\d+\.py"), "<cell>"),
    (re.compile(r" at 0x[0-9a-f]{6,16}\b"), " at 0x0"),
    (re.compile(r"\[\d\d:\d\d(:\d\d)?(&lt;|<)[^\]]{1,40}\]"), "[time]"),
    *(
        (re.compile(re.escape(str(path)) + r"(?![\w.-])"), replacement)
        for path, replacement in ((sys.prefix, "<python>"), (ROOT, "."), (Path.home(), "~"))
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


def stable(executed, source: Path):
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
    book = notebook(source)
    pairing = {"default_lexer": "ipython3", "formats": FORMATS} | book.metadata.get("jupytext", {})
    for cell, ran in zip(book.cells, executed.cells, strict=True):
        if cell.cell_type == "code":
            cell.execution_count = ran.execution_count
            cell.outputs = scrub(ran.outputs)
            for output in cell.outputs:
                if "execution_count" in output:
                    output["execution_count"] = ran.execution_count
    made = {key: executed.metadata["cmp"][key] for key in ("source_sha256", "parameters")}
    book.metadata = nbformat.from_dict(
        {
            "cmp": made,
            "jupytext": {key: pairing[key] for key in ("default_lexer", "formats")},
            "kernelspec": KERNELSPEC,
            "language_info": {"name": "python", "file_extension": ".py"},
        }
        | ({"widgets": scrub(state)} if state else {})
    )
    return book


def publish(numbers: Iterable[str] | None = None, folder: Path = BOOK) -> list[Path]:
    """Write `book/NN_name.ipynb`: chapters executed with their defaults, stable; returns them.

    A source must pair itself with its notebook in its header, else `CmpError`. What fails is
    listed in one `CmpError` at the end; its committed notebook stays as it was.
    """
    import nbformat

    sources = select(numbers, folder)
    for source in sources:
        if notebook(source).metadata.get("jupytext", {}).get("formats") != FORMATS:
            raise CmpError(f"{source}: add to the header:\njupytext:\n  formats: {FORMATS}")
    console = Console(soft_wrap=True, highlight=False, markup=False)
    tasks = plan(sources, build_folder() / "published", {})
    show_plan(tasks, 1, console)
    failures = run(tasks, 1, console)
    written = []
    for task in tasks:
        if is_current(task.source, task.target, task.parameters, task.fingerprint):
            book = stable(nbformat.read(task.target, as_version=4), task.source)
            written.append(task.source.with_suffix(".ipynb"))
            write_notebook(book, written[-1])
    console.print(f"notebooks: {folder}")
    report(failures)
    return written


def stale(folder: Path = BOOK) -> list[str]:
    """The chapters whose committed notebook is missing or was made from another source."""
    return [
        source.stem
        for source in chapters(folder).values()
        if record(source.with_suffix(".ipynb")).get("source_sha256") != source_hash(source)
    ]
