"""Finished runs: ls, show, verify, compare, export."""

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from tqdm import tqdm

from cmp import budgets, checkpoints, config
from cmp.cli.runs import print_run, progress_observer
from cmp.cli.shared import console
from cmp.errors import CmpError
from cmp.experiments import results, store
from cmp.files import SHORT_ID, atomic_file

app = typer.Typer(no_args_is_help=True, help=__doc__)


@app.command("ls")
def list_() -> None:
    """Every stored run, oldest first, with what differs from the `cpu` profile."""
    defaults = dict(config.flat_keys(config.parse(config.profile("cpu")).to_dict()))
    table = Table()
    table.add_column("run", no_wrap=True)
    table.add_column("images")
    for column in ("A_KA %", "A_ZS %", "seconds"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("differs from cpu in")
    for run_id in store.stored_ids():
        try:
            found = store.load_run(run_id)
        except CmpError as error:  # damaged, or of a version with other settings
            console.print(f"left out: {error}", highlight=False)
            continue
        last = store.trajectory(found.metrics).iloc[-1]
        leaves = config.flat_keys(found.config.to_dict())
        changes = " ".join(f"{key}={value}" for key, value in leaves if value != defaults[key])
        scores = (f"{last.A_KA:.1f}", f"{last.A_ZS:.1f}", f"{found.provenance['seconds']:.0f}")
        table.add_row(run_id, last.scope, *scores, changes)
    console.print(table)
    for progress in checkpoints.unfinished_runs():
        if not store.is_stored(progress.run):  # killed between the result and its checkpoints' end
            console.print(
                f"unfinished: {progress.run[:SHORT_ID]}, {progress.task} tasks and {progress.step} "
                "steps are done",
                highlight=False,
            )


@app.command()
def show(run_id: Annotated[str, typer.Argument(help="The id, or its beginning.")]) -> None:
    """One run: config, provenance, trajectory."""
    found = store.find_run(run_id)
    for key, value in [*config.flat_keys(found.config.to_dict()), *found.provenance.items()]:
        console.print(f"{key}: {value}", highlight=False)
    print_run(found)


@app.command()
def verify(
    run_id: Annotated[str | None, typer.Argument(help="The id, or its beginning.")] = None,
    sample: Annotated[int, typer.Option(min=1, help="Published runs, drawn by --seed.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Another seed, another sample.")] = 0,
) -> None:
    """Compute a run again and compare: bitwise equal, within tolerance, or different (status 1).

    Without an id, a sample of the book's published runs.
    """
    found = [store.find_run(run_id)] if run_id else results.sample_published(sample, seed)
    if not found:
        raise CmpError("nothing is published yet; `cmpt study NN --publish` does it")
    answers = []
    for each in found:
        total = each.config.stream.tasks * budgets.apply_budget(each.config).training.steps
        with tqdm(total=total, desc="verify", unit=" steps") as bar:
            verdict = results.verify_published(each, progress_observer(bar))
        console.print(
            f"{each.id[:SHORT_ID]}: {verdict.answer}: {verdict.sentence}", highlight=False
        )
        answers.append(verdict.answer)
    if "different" in answers:
        raise typer.Exit(1)


@app.command()
def compare(
    chapter: Annotated[str, typer.Argument(help="The study's number, such as 01.")],
) -> None:
    """Compare a study's runs in the store with the published ones; rows that differ are named.

    Status 1 if any is missing or different. To compute it anew, set CMP_BUILD to a folder in which
    only the data are built.
    """
    answers = Counter()
    for each in results.published_runs(chapter.zfill(2)):
        verdict, rows = results.compare_with_store(each)
        answers[verdict.answer] += 1
        if verdict.answer == "bitwise equal":
            continue
        console.print(
            f"{each.id[:SHORT_ID]}: {verdict.answer}: {verdict.sentence}", highlight=False
        )
        for row in rows.itertuples() if verdict.answer == "different" else ():
            where = f"after {row.task} tasks, {row.scope}: {row.aggregate}"
            now = f"stored {row.stored:.2f}, now {row.now:.2f}, moved {row.moved:+.2f}"
            console.print(f"  {where}: {now}", highlight=False)
    console.print(", ".join(f"{count} {answer}" for answer, count in answers.items()))
    if answers.keys() & {"different", "missing"}:
        raise typer.Exit(1)


@app.command()
def export(
    run_id: Annotated[str, typer.Argument(help="The id, or its beginning.")],
    file: Annotated[Path, typer.Argument(help="A .csv or .parquet file.")],
) -> None:
    """Write a run's metrics, a row a (task, scope, dataset), to a file."""
    found = store.find_run(run_id)
    frame = found.metrics.assign(run=found.id)
    writers = {".csv": frame.to_csv, ".parquet": frame.to_parquet}
    if file.suffix not in writers:
        raise CmpError(f"{file}: the name must end in .csv or .parquet")
    with atomic_file(file) as partial:
        writers[file.suffix](partial, index=False)
    console.print(f"{len(frame)} rows: {file}")
