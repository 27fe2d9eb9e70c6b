"""What several commands do with runs and updates: compute them with a progress bar, forecast their
cost, and print them."""

import math
import signal
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
import typer
from tqdm import tqdm

from cmp import config, evaluation, mixtures
from cmp.cli import shared
from cmp.errors import CmpError, clean_text
from cmp.files import SHORT_ID
from cmp.readers import class_statistics
from cmp.releases import release, sentences
from cmp.releases.sentences import describe_release_retention
from cmp.releases.update_plan import UpdatePlan
from cmp.runs import checkpoints, forecast, identity, launch, logs, preflight, store
from cmp.runs.launch import ResolvedRun
from cmp.runs.runner import Observer
from cmp.scale import devices, processes
from cmp.scale.execution import ExecutionConfig, copy_to_host
from cmp.training import StepResult, make_train_state

STEPS_TOLERANCE = 0.25
"""How far the steps of an update may differ from those of the last one, as a fraction, for its time
to be forecast from that."""


def progress_observer(
    bar: tqdm, stop_after: int | None = None, enough: float = math.inf
) -> Observer:
    """Return an observer that updates a progress bar. Every 20 steps it shows the images per second
    and a loss at most 40 steps old, so that no step waits for a GPU. After `stop_after` tasks, or
    if the run resumes with at least `enough` steps done, the observer asks the run to stop."""
    losses: list[Callable[[], torch.Tensor]] = []

    def step(task: int, step: int, result: StepResult, network: torch.nn.Module) -> None:
        bar.update()
        if step % 20 == 0 and not bar.disable:
            losses.append(copy_to_host(result.loss))
            if len(losses) > 1:
                about = bar.format_dict
                speed = about["rate"] or (bar.n - bar.initial) / about["elapsed"]
                words = f"{speed * result.samples:,.0f} images/s, loss {losses.pop(0)():.3f}"
                bar.set_postfix_str(words)

    def after_task(done: int, scores: evaluation.Scores) -> None:
        words = ", ".join(f"{key} {value:.1f}" for key, value in scores.summary().items())
        bar.write(f"{f'after update {done}' if done else 'before the stream'}: {words}")
        if done == stop_after:
            signal.raise_signal(signal.SIGINT)  # saves the state and ends the run

    def resumed(steps: int) -> None:  # earlier steps do not count for the speed
        bar.n, bar.initial = bar.n + steps, bar.initial + steps
        if steps >= enough:
            signal.raise_signal(signal.SIGINT)

    return Observer(step, after_task, resumed)


def compute_run(
    run: ResolvedRun,
    device: str,
    execution: ExecutionConfig,
    keep_weights: bool,
    boards: Mapping[str, str],
    stop_after: int | None = None,
) -> None:
    """Compute or load a run, and print its scores.

    With several processes, only the first prints.
    """
    is_first = processes.rank() == 0
    if (is_kept := launch.is_kept(run.id, keep_weights)) and is_first:
        typer.echo("this run is already stored; nothing to compute")
    with tqdm(total=run.steps, desc="run", unit=" steps", disable=is_kept or not is_first) as bar:
        enough = math.inf
        if stop_after and stop_after < run.config.stream.tasks:
            enough = sum(run.fitted.steps[:stop_after])
        observer = progress_observer(bar, stop_after, enough)
        stored = launch.compute(
            run, observer, device, execution=execution, keep=keep_weights, boards=boards
        )
    if is_first:
        print_run(stored)


def plan_run(run_config: config.RunConfig, device: str, execution: ExecutionConfig) -> None:
    """Print what a run would do without computing anything; exit with status 1 if it cannot
    start."""
    for key, value in run_config.changes().items():
        typer.echo(f"{key}: {value}")
    typer.echo("Other keys have their defaults (`cmpt results show` prints all keys later).")
    checks, corpus, fitted = preflight.check_run(run_config, device, execution)
    typer.echo("\n".join(preflight.describe_run(run_config, fitted)))
    if corpus:
        columns = ("dataset", "role", "classes", "train", "validation", "test")
        shared.print_table(columns, preflight.count_images(corpus))
        pools = mixtures.task_pools(fitted, corpus)
        report = class_statistics.stream_report(run_config, corpus)
        passes = ", ".join(f"{number:.1f}" for number in report["passes"])
        typer.echo(f"images of each update: {', '.join(map(str, report['images']))}")
        typer.echo(f"times that an image is seen in its own update: {passes}")
        typer.echo(f"images replayed from the pool: {len(pools[0].pretraining)}")
    report_checks(checks)
    if corpus is None or not identity.has_start(run_config):
        return typer.echo("run: its id is known once its starting weights are on this machine")
    make_train_state(run_config, corpus, execution=replace(execution, compile_towers=False))
    run_id = identity.run_id_of(run_config, corpus)
    if store.is_stored(run_id):
        state = "stored"
    else:
        checkpoints.refuse_unfinished(run_id)
        saved = checkpoints.checkpoint_files(checkpoints.run_folder(run_id))
        state = "continues from its last checkpoint" if saved else "to be computed"
    typer.echo(f"run {run_id[:SHORT_ID]}: {state}")


def report_checks(checks: list[preflight.Check]) -> None:
    """Print checks; exit with status 1 if anything is missing or damaged."""
    for check in checks:
        typer.echo(clean_text(f"{check.what:10}{check.state:10}{check.sentence}"))
    bad = [x.what for x in checks if x.state in (preflight.MISSING, preflight.DAMAGED)]
    if bad:
        typer.echo(f"Not ready: {', '.join(bad)}. The lines above say why.")
        raise typer.Exit(1)


def print_run(stored: store.StoredRun) -> None:
    """Print a run's scores over its stream, its time and the hash of its weights."""
    rows = [
        (row.task, row.scope, *map(shared.score_text, (row.A_KA, row.A_ZS, row.GM)))
        for row in store.trajectory(stored.metrics).itertuples()
    ]
    columns = ("updates", "images", "A_KA %", "A_ZS %", "GM %")
    shared.print_table(columns, rows, f"run {stored.id[:SHORT_ID]}")
    typer.echo("{seconds:.1f} s on {threads} thread(s)".format_map(stored.provenance))
    if stored.weights:
        typer.echo(f"final weights sha256 {stored.weights}")
    log, batch = logs.log_path(stored.id), stored.config.training.batch
    if words := sentences.describe_ruin(stored.metrics, log, batch):
        typer.echo(words)


def print_log(path: Path) -> None:
    """Print the columns of a log as lines of bars, if there is one."""
    log = logs.read_log(path)
    speeds = ("samples_per_second", "waiting", "peak_share", "memory")
    for name in ("loss", "gradient_norm", "rate", *speeds):
        if name in log and (known := log[name].dropna()).size:
            first, last = known.iloc[[0, -1]]
            typer.echo(f"{name:18} {first:.4g} {logs.sparkline(known)} {last:.4g}")


def forecast_lines(plan: UpdatePlan, device: str, execution: ExecutionConfig) -> list[str]:
    """Return how long an update may take, by the last one if it was computed alike, how much memory
    a step needs, and whether the device is another one than this machine has.

    Raises:
        CmpError: This machine has GPUs, but not this one.
    """
    is_like_last = _is_like_last(plan, device, execution)  # raises if this GPU is not there
    try:
        memory = preflight.check_memory(plan.fitted, device, execution).sentence
        if is_like_last:
            last = plan.earlier[-1]
            seconds = plan.steps * last.seconds / last.steps
            time = (
                f"about {forecast.time_in_words(seconds)} for training and evaluations, at the "
                f"speed of {last.name}, whose {last.steps} steps took "
                f"{forecast.time_in_words(last.seconds)}, without the comparison at the end"
            )
        else:
            step = forecast.estimate_step(plan.fitted, device, execution, plan.corpus)
            time = forecast.describe_forecast(step, plan.steps)
    except CmpError as error:  # a method of one's own whose cost cannot be counted
        return [f"forecast: unknown: {error}"]
    lines = [f"forecast: {time}", f"memory: {memory}"]
    if not devices.is_present(device):
        lines.append("device: torch finds no GPU on this machine; the numbers are for an H100")
    return lines


def _is_like_last(plan: UpdatePlan, device: str, execution: ExecutionConfig) -> bool:
    """Return whether an update takes as long for each step, with its share of the evaluations, as
    the last one: about as many steps, the same method, batch, precision and kind of device, and no
    other way to compute it."""
    if not (devices.is_present(device) and plan.parent and execution == ExecutionConfig()):
        return False
    last = plan.earlier[-1].steps
    if abs(plan.steps - last) > STEPS_TOLERANCE * last:
        return False
    machine = {"device": devices.device_name(device), "threads": torch.get_num_threads()}
    if not machine.items() <= plan.parent.record.provenance.items():
        return False
    ways = [
        (x.method, x.training.batch, x.training.precision)
        for x in (plan.parent.config, plan.config)
    ]
    return ways[0] == ways[1]


def release_lines(made: release.Release) -> str:
    """Return lines on what to look at in a release."""
    folder = made.folder
    lines = [
        release.describe(made), f"open_clip loads it as local-dir:{folder}",
        f"report: {folder / release.REPORT_FILE}", describe_release_retention(made),
    ]  # fmt: skip
    return "\n".join(filter(None, lines))
