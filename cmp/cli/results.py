"""List, show, verify, compare and export finished runs.

Example:
    cmpt results verify --sample 3
"""

from collections import Counter
from pathlib import Path

import typer
from tqdm import tqdm

from cmp import budgets
from cmp.cli import shared
from cmp.cli.runs import print_config, print_run, progress_observer
from cmp.errors import CmpError
from cmp.experiments import results, runs, store
from cmp.files import SHORT_ID, atomic_file


def ls() -> None:
    """List every stored run, oldest first, with what differs from the `cpu` profile.

    Example:
        cmpt results ls
    """
    rows = []
    for run_id in store.stored_ids():
        try:
            run = store.load_run(run_id)
        except CmpError as error:  # damaged, or of a version with other settings
            typer.echo(f"left out: {error}")
            continue
        last = store.trajectory(run.metrics).iloc[-1]
        changes = " ".join(f"{key}={value}" for key, value in run.config.changes().items())
        scores = (f"{last.A_KA:.1f}", f"{last.A_ZS:.1f}", f"{run.provenance['seconds']:.0f}")
        rows.append((run_id, last.scope, *scores, changes))
    columns = ("run", "images", "A_KA %", "A_ZS %", "seconds", "differs from cpu in")
    shared.print_table(columns, rows)
    for progress in runs.unfinished_runs():
        if not store.is_stored(progress.run):  # a kill may come before checkpoints are removed
            done = f"{progress.task} tasks and {progress.step} steps are done"
            typer.echo(f"unfinished: {progress.run[:SHORT_ID]}, {done}")


def show(run_id: str) -> None:
    """Show one run: its config, where it was computed, and its scores over the stream.

    Example:
        cmpt results show 3f2a
    """
    run = store.find_run(run_id)
    print_config(run.config)
    for key, value in run.provenance.items():
        typer.echo(f"{key}: {value}")
    print_run(run)


def verify(
    run_id: shared.OptionalArgument = None,
    sample: shared.Positive = 1,
    seed: shared.NotNegative = 0,
) -> None:
    """Compute a run again and compare: bitwise equal, within tolerance, or different (status 1).

    Args:
        run_id: A stored run's id, or its beginning. Default: a sample of the published runs.
        sample: How many published runs, drawn at random.
        seed: Seed of the sample.

    Example:
        cmpt results verify --sample 3 --seed 7
    """
    chosen = [store.find_run(run_id)] if run_id else results.sample_published(sample, seed)
    if not chosen:
        raise CmpError(
            f"{results.RESULTS}: nothing is published; run this in a checkout of the project, or "
            "publish a study by `cmpt study NN --publish`"
        )
    answers = set()
    for run in chosen:
        total = run.config.stream.tasks * budgets.apply_budget(run.config).training.steps
        with tqdm(total=total, desc="verify", unit=" steps") as bar:
            verdict = results.verify_published(run, progress_observer(bar))
        _print_verdict(run, verdict)
        answers.add(verdict.answer)
    if "different" in answers:
        raise typer.Exit(1)


def compare(chapter: str) -> None:
    """Compare a study's runs in the store with the published ones; differing scores are named.

    Status 1 if any run is missing or different. To compute a study again, set CMP_BUILD to a folder
    in which only the data are built.

    Args:
        chapter: The study's number, such as 01.

    Example:
        cmpt results compare 01
    """
    answers = Counter()
    for run in results.published_runs(chapter.zfill(2)):
        verdict = results.compare_with_store(run)
        answers[verdict.answer] += 1
        if verdict.answer != "bitwise equal":
            _print_verdict(run, verdict)
        for row in verdict.changes.itertuples() if verdict.answer == "different" else ():
            scores = f"stored {row.stored:.2f}, now {row.now:.2f}, moved {row.moved:+.2f}"
            typer.echo(f"  after {row.task} tasks, {row.scope}: {row.aggregate}: {scores}")
    typer.echo(", ".join(f"{count} {answer}" for answer, count in answers.items()))
    if answers.keys() & {"different", "missing"}:
        raise typer.Exit(1)


def _print_verdict(run: store.StoredRun, verdict: store.Verdict) -> None:
    typer.echo(f"{run.id[:SHORT_ID]}: {verdict.answer}: {verdict.sentence}")


def export(run_id: str, file: Path) -> None:
    """Write a run's metrics to a file, a row per (task, scope, dataset).

    Args:
        file: The file to write, NAME.csv or NAME.parquet.

    Example:
        cmpt results export 3f2a metrics.csv
    """
    run = store.find_run(run_id)
    frame = run.metrics.assign(run=run.id)
    writers = {".csv": frame.to_csv, ".parquet": frame.to_parquet}
    if file.suffix not in writers:
        raise CmpError(f"{file}: the name must end in .csv or .parquet")
    with atomic_file(file) as partial:
        writers[file.suffix](partial, index=False)
    typer.echo(f"{len(frame)} rows: {file}")


app = shared.make_group(__doc__, ls, show, verify, compare, export)
