"""List, show and delete runs.

Example:
    cmpt results show 3f2a
"""

from typing import TYPE_CHECKING

import typer

from cmp.cli import shared
from cmp.errors import CmpError
from cmp.files import SHORT_ID
from cmp.project import build_folder

if TYPE_CHECKING:
    from cmp.runs.store import StoredRun


def ls() -> None:
    """List all stored and unfinished runs, with their differences from the `cpu` profile.

    Stored runs come first, from oldest to newest.

    Example:
        cmpt results ls
    """
    from cmp.runs import lookup, store

    rows, left_out = [], []
    for run_id in store.stored_ids():
        try:
            rows.append(_row(store.load_run(run_id), ""))
        except CmpError as error:  # damaged, or from a version with other settings
            left_out.append(f"left out: {error}")
    for progress in lookup.unfinished_runs():
        try:
            run = lookup.run_so_far(progress, progress.task)
            rows.append(_row(run, f"{progress.task} of {run.config.stream.tasks} updates"))
        except CmpError as error:
            left_out.append(f"left out: {error}")
    columns = ("run", "unfinished", "images", "A_KA %", "A_ZS %", "GM %", "seconds")
    shared.print_table((*columns, "differs from cpu in"), rows)
    typer.echo(f"runs of {build_folder().absolute()}")
    if left_out:
        typer.echo("\n".join(left_out), err=True)


def _row(run: "StoredRun", unfinished: str) -> tuple[str, ...]:
    """Return a run's row in `ls`; the run may be unfinished."""
    from cmp.runs import launch, store

    [last] = store.final_scores(store.trajectory(run.metrics)).itertuples()
    words = " ".join(f"{k}={value}" for k, value in launch.changes_to_cpu(run.config).items())
    scores = [shared.score_text(score) for score in (last.A_KA, last.A_ZS, last.GM)]
    seconds = f"{run.provenance['seconds']:.0f}"
    return run.id[:SHORT_ID], unfinished, str(last.scope), *scores, seconds, words


def show(run_id: str) -> None:
    """Show a run: its config, the machine that computed it, and its scores over the stream.

    Example:
        cmpt results show 3f2a
    """
    from cmp import config
    from cmp.cli.computing import print_log, print_run
    from cmp.runs import logs, lookup

    run = lookup.find_any_run(run_id)
    for key, value in [*config.flat_keys(run.config.to_dict()), *run.provenance.items()]:
        typer.echo(f"{key}: {value}")
    print_run(run)
    print_log(logs.log_path(run.id))


def rm(run_id: str) -> None:
    """Delete a run with its weights, log and checkpoints, without asking.

    Runs in progress cannot be deleted. Runs that started from a deleted run (model.start=run:ID)
    can no longer be verified or resumed.

    Example:
        cmpt results rm 3f2a
    """
    from cmp.runs import lookup

    name, size = lookup.delete_run(run_id)
    typer.echo(f"run {name}: deleted, {size / 1e6:,.1f} MB freed")


app = shared.make_group(__doc__, ls, show, rm)
