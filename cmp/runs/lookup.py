"""Find runs by the start of their ids: finished ones, unfinished ones, and the run that another
starts from."""

import fcntl
import warnings
from dataclasses import replace

import pandas as pd

from cmp import config, models, starts
from cmp.config import RunConfig
from cmp.errors import CmpError
from cmp.files import SHORT_ID, delete_files
from cmp.project import build_folder
from cmp.runs import checkpoints, logs
from cmp.runs.checkpoints import LOCK, Progress, latest_progress, run_folder
from cmp.runs.store import (
    FILES,
    RECORD,
    StoredRun,
    final_model,
    kept_path,
    load_run,
    stored_ids,
)
from cmp.scale import processes
from cmp.starts import RUN_PREFIX


def find_run(prefix: str) -> StoredRun:
    """Return the only stored run whose id starts with `prefix`; raise `CmpError` otherwise."""
    matching = [name for name in stored_ids() if name.startswith(prefix[:SHORT_ID])]
    if len(matching) != 1:
        problem = "no stored run" if not matching else f"{len(matching)} stored runs"
        raise CmpError(f"{prefix!r}: {problem} with this id; `cmpt results ls` lists all runs")
    run = load_run(matching[0])
    if not run.id.startswith(prefix):
        raise CmpError(f"{prefix!r}: no stored run with this id; the closest is {run.id}")
    return run


def fetch_start(run_config: RunConfig) -> RunConfig:
    """Download a run's starting weights if necessary, since its id depends on their content.

    With several processes (`cmp.scale.processes`), all of them call this, and the first downloads.

    Returns:
        The config, with the full id of the run that it starts from, if any.

    Raises:
        CmpError: The weights are missing and cannot be downloaded; or see `find_parent`.
    """
    parent = find_parent(run_config)
    with processes.first_process_first():
        starts.fetch_weights(run_config.model, run_config.seeds.init)
    if parent is None:
        return run_config
    return replace(run_config, model=replace(run_config.model, start=f"{RUN_PREFIX}{parent.id}"))


def find_parent(run_config: RunConfig) -> StoredRun | None:
    """Return the finished run whose final weights a run starts from, or None.

    Raises:
        CmpError: There is no such run, it has another model, or its weights were not kept or are
            damaged.
    """
    name, start = run_config.model.name, run_config.model.start
    if not start.startswith(RUN_PREFIX):
        return None
    prefix = start.removeprefix(RUN_PREFIX)
    try:
        if not prefix.isalnum():
            raise CmpError(f"{start!r}: give at least the first digits of a run's id, run:ID")
        parent = find_run(prefix)
        if parent.config.model.name != name:
            raise CmpError(
                f"run {parent.id[:SHORT_ID]} has the model {parent.config.model.name!r}, not "
                f"{name!r}; change model.name"
            )
        kept_path(parent)
    except CmpError as error:
        raise CmpError(f"model.start: {error}") from error
    return parent


def unfinished_runs(prefix: str = "") -> list[Progress]:
    """Return the progress of each unfinished run whose id starts with a prefix.

    Runs whose checkpoints cannot be read here, or by this version, give a warning.
    """
    folders = sorted((build_folder() / "runs").glob("[0-9a-f]*/"))
    named = [folder for folder in folders if folder.name.startswith(prefix[:SHORT_ID])]
    readable = []
    for folder in named:
        if (folder / RECORD).exists():
            continue
        try:
            readable.append(latest_progress(folder))
        except CmpError as error:  # the other runs do not depend on it
            warnings.warn(f"left out: {error}", stacklevel=2)
    return [progress for progress in readable if progress and progress.run.startswith(prefix)]


def runs_in_progress() -> int:
    """Return how many runs of this build folder are being computed, by any process."""
    count = 0
    for path in (build_folder() / "runs").glob(f"*/{LOCK}"):
        try:
            with path.open() as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            count += 1
        except OSError:  # the run has just ended
            continue
    return count


def find_model(prefix: str) -> tuple[StoredRun, models.Network]:
    """Return the only run whose id starts with a prefix, and its model.

    Returns:
        A stored run, or an unfinished one cut off after its last finished task.
        The final network, or the one deployed after that task.

    Raises:
        CmpError: There is no such run, its weights were not kept, or no task is finished.
    """
    if (progress := _progress_of(prefix)) is None:
        run = find_run(prefix)
        return run, final_model(run)
    name = f"run {progress.run[:SHORT_ID]}"
    kept = checkpoints.files_beside(run_folder(progress.run), "model")
    numbers = {checkpoints.file_number(path): path for path in kept}
    done = max((number for number in numbers if number <= progress.task), default=0)
    if not done:
        raise CmpError(
            f"{name}: no task is finished; repeat the command that began it, which continues it"
        )
    run = run_so_far(progress, done)
    try:
        checkpoints.check_content(numbers[done])
        return run, models.load_from_file(run.config.model.name, numbers[done])
    except FileNotFoundError as error:
        raise CmpError(
            f"{name}: it is still running, and has just replaced its model of task {done}; "
            "repeat the command"
        ) from error


def find_any_run(prefix: str) -> StoredRun:
    """Return the only run whose id starts with a prefix, stored or unfinished; raise `CmpError`
    otherwise."""
    progress = _progress_of(prefix)
    return run_so_far(progress, progress.task) if progress else find_run(prefix)


def _progress_of(prefix: str) -> Progress | None:
    """Return the only unfinished run whose id starts with a prefix, or None if no unfinished one
    has it; raise `CmpError` if others have it, too."""
    if not (unfinished := unfinished_runs(prefix)):
        return None
    stored = [name for name in stored_ids() if name.startswith(prefix[:SHORT_ID])]
    if len(stored) + len(unfinished) > 1:
        raise CmpError(
            f"{prefix!r}: several runs have an id that starts so; `cmpt results ls` lists all runs"
        )
    return unfinished[0]


def run_so_far(progress: Progress, done: int) -> StoredRun:
    """Return an unfinished run as if it had ended after `done` tasks, without weights."""
    run_config = config.parse(progress.config, f"checkpoint of run {progress.run[:SHORT_ID]}")
    rows = pd.DataFrame(progress.metrics).query("task <= @done")
    scopes = rows[rows["task"] == done]["scope"]  # the full test is scored only at both ends
    rows = rows[rows["scope"].isin(scopes)]
    provenance = progress.machine | {"seconds": progress.seconds}
    return StoredRun(progress.run, run_config, provenance, rows, "")


def delete_run(prefix: str) -> tuple[str, int]:
    """Delete a stored or unfinished run: its result, weights, log and checkpoints.

    Args:
        prefix: The run's id, or its first digits.

    Returns:
        The short id, and the number of bytes freed.

    Raises:
        CmpError: The id does not match exactly one run, or a process is computing it.
    """
    names = [path.name for path in (build_folder() / "runs").glob("[0-9a-f]*/")]
    names = [name for name in names if name.startswith(prefix[:SHORT_ID])]
    if len(names) != 1 or not prefix:
        raise CmpError(
            f"{prefix!r}: {len(names) or 'no'} runs have this id; `cmpt results ls` lists all runs"
        )
    [name] = names
    if len(prefix) > SHORT_ID and not unfinished_runs(prefix):
        find_run(prefix)  # compares the digits that the folder's name lacks
    with checkpoints.CheckpointManager(name) as manager:
        folder = manager.folder

        def held() -> int:
            return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

        size = held()
        delete_files(folder, [*(folder / file for file in FILES), logs.log_path(name)])
        manager.remove()
        if others := sorted(path.name for path in folder.glob("*")):
            names = ", ".join(others[:3] if len(others) <= 3 else [*others[:3], "..."])
            warnings.warn(
                f"{folder}: kept, since it contains files that cmpt did not write ({names}); move "
                "or delete it",
                stacklevel=2,
            )
        return name, size - held()
