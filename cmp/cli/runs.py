"""The commands `run`, `resume` and `eval`, which train and score models."""

import math
import signal
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from tqdm import tqdm

from cmp import config, evaluation, mixtures, models, starts
from cmp.cli import shared
from cmp.data import load_data
from cmp.errors import CmpError, Interrupted
from cmp.experiments import preflight, pretraining, statistics
from cmp.files import SHORT_ID
from cmp.releases.candidates import find_candidate
from cmp.releases.sentences import describe_ruin
from cmp.runs import checkpoints, identity, launch, lookup, store
from cmp.runs.launch import ResolvedRun, read_settings, resolve_run
from cmp.runs.logs import log_path
from cmp.runs.lookup import find_unfinished
from cmp.runs.runner import Observer
from cmp.scale import devices, processes
from cmp.scale.execution import ExecutionConfig, copy_to_host
from cmp.training import StepResult, make_train_state


def run(
    what: Annotated[str, typer.Argument(metavar="PROFILE|FILE")],
    settings: shared.Settings = None,
    dry_run: bool = False,
    threads: shared.Threads = 1,
    device: str | None = None,
    micro_batch: shared.OptionalPositive = None,
    checkpoint_activations: bool = False,
    compile: bool = False,
    keep_weights: bool = False,
    tensorboard: Path | None = None,
    wandb: str | None = None,
    stop_after: shared.OptionalPositive = None,
) -> None:
    """Train a model on a stream of updates, evaluate it, and store the run.

    A stored run is loaded, and a stopped run continues from its last checkpoint.
    `torchrun -m cmp run ...` splits each batch between processes.

    model.start=run:ID begins a new stream from the final weights of a finished run. Only the
    weights are used: the run's data are replayed only if their manifests now say `role: pool`.

    Args:
        what: A profile (quick, cpu or gpu), or a file of settings, NAME.yaml.
        tensorboard: Write TensorBoard files to this folder, in addition to the log. Default: none.
        wandb: Log to this project of Weights & Biases, in addition to the log. Default: none.
        stop_after: Stop after this many updates, to try settings. Run the same command without this
            option to continue. Default: the whole stream.

    Example:
        cmpt run cpu method.name=lora schedule.peak=0.005
    """
    torch.set_num_threads(threads)
    run_config = read_config(what, settings or [])
    device = starts.default_device(run_config.model.name, device)
    execution = ExecutionConfig(micro_batch, checkpoint_activations, compile)
    if dry_run:
        return plan_run(run_config, device, execution)
    with processes.init_distributed(device) as local_device:
        devices.check_device(local_device)
        resolved = resolve_run(run_config)
        boards = shared.name_boards(tensorboard, wandb)
        try:
            compute_run(resolved, local_device, execution, keep_weights, boards, stop_after)
        except Interrupted as stop:
            done = max((kept.task for kept in lookup.unfinished_runs(resolved.id)), default=0)
            if not stop_after or done < stop_after:
                raise
            if processes.rank() == 0:
                typer.echo(f"{stop}; compare the scores with `cmpt results ls`")


def resume(
    run_id: str,
    threads: Annotated[int | None, typer.Option(min=1, max=1024)] = None,
    device: str | None = None,
    micro_batch: shared.OptionalPositive = None,
    checkpoint_activations: bool | None = None,
    compile: bool | None = None,
    keep_weights: bool | None = None,
) -> None:
    """Continue a stopped or killed run from its last checkpoint.

    Options that you omit keep their last values, except `--threads` and `--device`, which keep
    those with which the run began. The run also keeps its TensorBoard folder, its W&B project and,
    unless you set it again, CMP_WORKERS.

    Args:
        threads: Number of torch threads. Default: the number with which the run began.
        device: Device: cpu or cuda. With several processes, each uses one GPU. Default: the device
            on which the run began.
        micro_batch: Samples to process at a time. Default: as before.

    Example:
        cmpt resume 3f2a
    """
    progress = find_unfinished(run_id)
    name = f"run {progress.run[:SHORT_ID]}"
    torch.set_num_threads(threads or progress.machine["threads"])
    given = {"micro_batch": micro_batch, "checkpoint_activations": checkpoint_activations}
    given |= {"compile_towers": compile, "keep_weights": keep_weights}
    options = progress.launch | {key: value for key, value in given.items() if value is not None}
    store.check_sources(progress.run, progress.options)
    run_config = config.parse(progress.config, f"checkpoint of {name}")
    if pretraining.is_pretraining(run_config):
        raise CmpError(f"{name} is a pretraining run; continue it with its `cmpt pretrain`")
    execution, keep, boards = launch.take_launch(options)
    device = shared.recorded_device(progress.machine, device)
    with processes.init_distributed(device) as local_device:
        devices.check_device(local_device)
        resolved = resolve_run(run_config)
        if resolved.id != progress.run:
            raise CmpError(
                f"{name} began with different data or weights, or another version of this package; "
                "use `cmpt run` to start again"
            )
        if processes.rank() == 0:
            words = [f"{key} {value}" for key, value in sorted(options.items())]
            words = ", ".join([f"{torch.get_num_threads()} thread(s)", *words])
            typer.echo(f"{name} continues: {local_device}, {words}")
        compute_run(resolved, local_device, execution, keep, boards)


def evaluate(
    model: str,
    seed: shared.NotNegative = 0,
    start: str | None = None,
    split: Literal["test", "validation"] = "test",
    data: str = "embedded",
    threads: shared.Threads = 2,
    device: str | None = None,
) -> None:
    """Score a model zero-shot on every dataset, with standard errors over concepts.

    Args:
        model: One of this book's own models, such as small, or an open_clip model, hf-hub:ORG/NAME,
            or local-dir:FOLDER for a folder in open_clip's format.
        start: Weights to score: annealed, unannealed or cosine for this book's own models; a
            pretrained tag of open_clip for others; the path of a file, run:ID or random for all.
            Default: annealed, or the weights of the hub or folder.
        split: Images to score: test, or validation for choosing settings.
        device: Device: cpu or cuda. Default: cpu for this book's own models, otherwise cuda.

    Example:
        cmpt eval small --seed 3 --start unannealed
    """
    torch.set_num_threads(threads)
    devices.check_device(device := starts.default_device(model, device))
    start = start or (starts.HUB if starts.is_hub(model) else config.Model().start)
    name = model
    if model.startswith("local-dir:") and start == starts.HUB:  # a release is checked first
        _, name, network = find_candidate(model)
    else:
        section = config.parse({"model": {"name": model, "start": start}}, "cmpt eval").model
        network = models.load_model(section, seed)
    scores = evaluation.evaluate(network.to(device), name, load_data(data), split)
    table, rows = scores.datasets, []
    for role in shared.ROLE_NAMES:
        for row in table[table["role"] == role].itertuples():
            numbers = map(shared.score_text, (row.score, row.standard_error, row.chance))
            rows.append((row.Index, role, row.metric, *numbers, row.images, row.classes))
        if (table["role"] == role).any():
            rows.append(None)
    summary = scores.summary()
    for key in (*evaluation.ROLES, "GM"):
        error = shared.score_text(scores.aggregate(key)[1]) if key in evaluation.ROLES else ""
        rows.append((key, "", "", shared.score_text(summary.get(key)), error, "", "", ""))
    columns = ("dataset", "role", "metric", "score", "s.e.", "chance", "n", "ways")
    base = f" base {seed}" * (start in config.STARTS)
    title = f"{model}, {start}{base}, {split}, in percent"
    shared.print_table(columns, rows, title)


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


def read_config(what: str, settings: list[str]) -> config.RunConfig:
    """Return the config of a profile or a YAML file, changed by key=value settings."""
    return config.parse(config.override(read_settings(what), settings), what)


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
        report = statistics.stream_report(run_config, corpus)
        passes = ", ".join(f"{number:.1f}" for number in report["passes"])
        typer.echo(f"images of each update: {', '.join(map(str, report['images']))}")
        typer.echo(f"times that an image is seen in its own update: {passes}")
        typer.echo(f"images replayed from the pool: {len(pools[0].pretraining)}")
    report_checks(checks)
    if corpus is None or not identity.has_start(run_config):
        return typer.echo("run: its id is known once its starting weights are on this machine")
    make_train_state(run_config, corpus, execution=replace(execution, compile_towers=False))
    run_id = identity.run_id_of(run_config, corpus)
    saved = checkpoints.checkpoint_files(checkpoints.checkpoint_folder(run_id))
    state = "continues from its last checkpoint" if saved else "to be computed"
    typer.echo(f"run {run_id[:SHORT_ID]}: {'stored' if store.is_stored(run_id) else state}")


def report_checks(checks: list[preflight.Check]) -> None:
    """Print checks; exit with status 1 if anything is missing or damaged."""
    for check in checks:
        typer.echo(f"{check.what:10}{check.state:10}{check.sentence}")
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
    if words := describe_ruin(stored.metrics, log_path(stored.id), stored.config.training.batch):
        typer.echo(words)
    typer.echo("{seconds:.1f} s on {threads} thread(s)".format_map(stored.provenance))
    if stored.weights:
        typer.echo(f"final weights sha256 {stored.weights}")
