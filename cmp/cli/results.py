"""`cmp run`, `cmp study` and `cmp results`: runs computed, kept, and shown."""

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table
from tqdm import tqdm

from cmp import checkpoints, config, runs, store, studies, verification
from cmp.cli.networks import watch
from cmp.cli.shared import Threads, console
from cmp.config import RunConfig
from cmp.data import corpus
from cmp.errors import CmpError
from cmp.files import read_yaml
from cmp.paths import SHORT

app = typer.Typer(no_args_is_help=True, help="Finished runs: ls, show, verify, export.")


def read_config(what: str, settings: list[str]) -> RunConfig:
    """A config from a profile's name or a YAML file, with key=value settings on top."""
    path = Path(what)
    is_file = path.suffix in (".yaml", ".yml")
    tree = read_yaml(path) if is_file else config.profile(what)
    return config.parse(config.override(tree, settings), what)


def run(
    what: Annotated[str, typer.Argument(metavar="PROFILE|FILE", help="quick, cpu, or FILE.yaml.")],
    settings: Annotated[list[str] | None, typer.Argument(help="key=value ...")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan only.")] = False,
    threads: Threads = 1,
) -> None:
    """Take a model through a stream of updates; a run that is stored is looked up."""
    torch.set_num_threads(threads)
    run_config = read_config(what, settings or [])
    data = corpus.load()
    run_id = store.identify(run_config, data)
    pools = runs.task_pools(run_config, data)  # refuses what cannot be, before anything starts
    if dry_run:
        print_plan(run_config, run_id, pools)
        return
    if store.is_stored(run_id):
        console.print("this run is stored; nothing to compute")
        print_run(studies.run_one(run_config))
    else:
        compute(run_config)


def compute(run_config: RunConfig) -> None:
    """Compute a run, from its last checkpoint on, with progress; print what it found."""
    total = run_config.stream.tasks * run_config.training.steps
    with tqdm(total=total, desc="run", unit=" steps") as bar:
        finished = studies.run_one(run_config, watch(bar))
    print_run(finished)


def resume(
    run_id: Annotated[str, typer.Argument(help="The id of an unfinished run, or its beginning.")],
    threads: Annotated[int | None, typer.Option(help="Torch threads; as it began.")] = None,
) -> None:
    """Go on with a run that was stopped or killed. `cmp run` with its config does the same."""
    progress = checkpoints.find(run_id)
    torch.set_num_threads(threads or progress.machine["threads"])
    compute(config.parse(progress.config, f"checkpoint of run {run_id}"))


def print_plan(run_config: RunConfig, run_id: str, pools: list[runs.Pools]) -> None:
    """What a run would do: its settings, its tasks, whether it is stored."""
    for key, value in config.flat_keys(run_config.to_dict()):
        console.print(f"{key}: {value}", highlight=False)
    sizes = ", ".join(str(len(pool.update)) for pool in pools)
    console.print(f"images of each update: {sizes}", highlight=False)
    state = "stored" if store.is_stored(run_id) else "to be computed"
    steps = run_config.stream.tasks * run_config.training.steps
    console.print(f"run {run_id[:SHORT]}: {steps} steps, {state}", highlight=False)


def print_run(finished: store.Run) -> None:
    """A run's trajectory, its id and its time."""
    table = Table(title=f"run {finished.id[:SHORT]}")
    for column in ("updates", "images", "A_KA %", "A_ZS %", "GM %"):
        table.add_column(column, justify="right")
    for row in store.trajectory(finished.metrics).itertuples():
        values = (f"{value:.1f}" for value in (row.A_KA, row.A_ZS, row.GM))
        table.add_row(str(row.task), row.scope, *values)
    console.print(table)
    about = finished.provenance
    console.print(f"{about['seconds']:.1f} s on {about['threads']} thread(s)", highlight=False)
    console.print(f"final weights sha256 {finished.weights}", highlight=False, soft_wrap=True)


@app.command("ls")
def list_() -> None:
    """Every stored run, oldest first, with what differs from the `cpu` profile."""
    defaults = dict(config.flat_keys(config.parse(config.profile("cpu")).to_dict()))
    table = Table()
    table.add_column("run", no_wrap=True)
    for column in ("A_KA %", "A_ZS %", "seconds"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("differs from cpu in")
    for run_id in store.stored_ids():
        found = store.load(run_id)
        last = store.trajectory(found.metrics).iloc[-1]
        leaves = config.flat_keys(found.config.to_dict())
        changes = " ".join(f"{key}={value}" for key, value in leaves if value != defaults[key])
        scores = (f"{last.A_KA:.1f}", f"{last.A_ZS:.1f}", f"{found.provenance['seconds']:.0f}")
        table.add_row(run_id, *scores, changes)
    console.print(table)
    for progress in checkpoints.unfinished():
        console.print(
            f"unfinished: {progress.run[:SHORT]}, {progress.task} of "
            f"{progress.config['stream']['tasks']} tasks and {progress.step} steps",
            highlight=False,
        )


@app.command()
def show(run_id: Annotated[str, typer.Argument(help="The id, or its beginning.")]) -> None:
    """One run: config, provenance, trajectory."""
    found = store.find(run_id)
    for key, value in [*config.flat_keys(found.config.to_dict()), *found.provenance.items()]:
        console.print(f"{key}: {value}", highlight=False)
    print_run(found)


@app.command()
def verify(run_id: Annotated[str, typer.Argument(help="The id, or its beginning.")]) -> None:
    """Compute a run again and compare: bitwise equal, within tolerance, or different (status 1)."""
    found = store.find(run_id)
    total = found.config.stream.tasks * found.config.training.steps
    with tqdm(total=total, desc="run", unit=" steps") as bar:
        verdict = verification.verify(found, corpus.load(), watch(bar))
    console.print(f"{found.id[:SHORT]}: {verdict.answer}: {verdict.sentence}", highlight=False)
    if verdict.answer == "different":
        raise typer.Exit(1)


@app.command()
def export(
    run_id: Annotated[str, typer.Argument(help="The id, or its beginning.")],
    file: Annotated[Path, typer.Argument(help="A .csv or .parquet file.")],
) -> None:
    """Write a run's metrics, a row a (task, scope, dataset), to a file."""
    found = store.find(run_id)
    frame = found.metrics.assign(run=found.id)
    if file.suffix == ".csv":
        frame.to_csv(file, index=False)
    elif file.suffix == ".parquet":
        frame.to_parquet(file, index=False)
    else:
        raise CmpError(f"{file}: the name must end in .csv or .parquet")
    console.print(f"{len(frame)} rows: {file}")


def study(
    chapter: Annotated[str, typer.Argument(help="The chapter's number, such as 01.")],
    profile: Annotated[str, typer.Option(help="quick or cpu.")] = "cpu",
    jobs: Annotated[int, typer.Option(min=1, help="One-thread processes.")] = 2,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan only.")] = False,
    publish: Annotated[bool, typer.Option("--publish", help="Write book/results.")] = False,
) -> None:
    """Compute the missing runs of a chapter's study; stopped, it goes on where it was."""
    grid = studies.load(chapter)
    configs = list(grid.configs(profile).values())
    todo = len(studies.missing(configs))
    console.print(f"{grid.question}\n{len(configs)} runs, {todo} to compute", highlight=False)
    if dry_run:
        return
    studies.compute(configs, jobs)
    if publish:
        console.print(f"published: {studies.publish(grid, profile)}")
