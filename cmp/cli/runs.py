"""`cmpt eval` and `cmpt pretrain`: models, scored and made."""

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table
from tqdm import tqdm

from cmp import budgets, checkpoints, config, distributed, evaluation, mixtures, models
from cmp.cli.shared import (
    ROLE_NAMES,
    Checkpointing,
    Data,
    Device,
    KeepWeights,
    MicroBatch,
    Seed,
    Threads,
    console,
    place,
)
from cmp.config import RunConfig
from cmp.data import load_data
from cmp.embedded import models as embedded_models
from cmp.embedded import packed
from cmp.errors import CmpError
from cmp.experiments import forecast, pretraining, store, workers
from cmp.files import SHORT_ID, atomic_file, build_folder, read_yaml
from cmp.runner import Observer, check_device
from cmp.training import ExecutionConfig, make_train_state


def evaluate(
    model: Annotated[str, typer.Argument(help="An embedded model, such as tiny.")],
    seed: Seed = 0,
    start: Annotated[str, typer.Option(help="annealed or unannealed.")] = "annealed",
    weights: Annotated[
        Path | None, typer.Option(help="A file to use instead, as open_clip or a run has them.")
    ] = None,
    split: Annotated[str, typer.Option(help="test, or validation for choices.")] = "test",
    data: Data = "embedded",
    threads: Threads = 2,
) -> None:
    """Zero-shot scores on every dataset, with standard errors over concepts."""
    torch.set_num_threads(threads)
    if start not in ("annealed", "unannealed"):
        raise CmpError(f"--start: {start!r}: choose annealed or unannealed")
    if split not in ("test", "validation"):
        raise CmpError(f"--split: {split!r}: choose test or validation")
    if weights:
        network = models.load_from_file(model, weights)
    else:
        tree = {"model": {"name": model, "start": start}, "seed": seed}
        chosen = config.parse(tree, "cmpt eval")
        network = models.load_model(chosen.model, chosen.seeds.init)
    scores = evaluation.evaluate(network, model, load_data(data), split)
    print_scores(scores, f"{model}, {weights or f'{start} base {seed}'}, {split}")


def print_scores(scores: evaluation.Scores, title: str) -> None:
    """The table of an evaluation, datasets by role, then the aggregates."""
    table = Table(title=f"{title}, in percent")
    table.add_column("dataset", no_wrap=True)
    table.add_column("role")
    table.add_column("metric")
    for column in ("score", "s.e.", "chance", "n", "ways"):
        table.add_column(column, justify="right")
    for role in ROLE_NAMES:
        rows = scores.datasets[scores.datasets["role"] == role]
        for row in rows.itertuples():
            numbers = (f"{x:.1f}" for x in (row.score, row.standard_error, row.chance))
            table.add_row(row.Index, role, row.metric, *numbers, str(row.images), str(row.classes))
        if len(rows):
            table.add_section()
    for key, value in scores.summary().items():
        error = f"{scores.aggregate(key)[1]:.1f}" if key in evaluation.ROLES else ""
        table.add_row(f"[bold]{key}[/bold]", "", "", f"[bold]{value:.1f}[/bold]", error)
    console.print(table)


def pretrain(
    model: Annotated[str, typer.Argument(help="An embedded model, such as tiny.")],
    settings: Annotated[list[str] | None, typer.Argument(help="key=value ...")] = None,
    seed: Seed = 0,
    out: Annotated[Path | None, typer.Option(help="Folder for weights and cards.")] = None,
    threads: Threads = 1,
) -> None:
    """Pretrain a base on the pool; write both checkpoints with their model cards."""
    torch.set_num_threads(threads)
    run_config = pretraining.pretraining_config(model, seed, *(settings or []))
    folder = out or build_folder() / "models"
    steps = run_config.training.steps + pretraining.joint_config(model, seed).training.steps
    with tqdm(total=steps, desc=f"pretrain {model} {seed}", unit=" steps") as bar:
        cards = pretraining.pretrain(
            run_config, packed.load_embedded(), folder, progress_observer(bar)
        )
    for start, card in cards.items():
        found = card["scores"]
        values = ", ".join(f"{k} {v['value']} ± {v['standard_error']}" for k, v in found.items())
        console.print(f"{start}: {values}", highlight=False)
        shipped = embedded_models.base_path(model, start, seed)
        if shipped.exists() and not settings and shipped.parent != folder.resolve():
            within, sentence = pretraining.compare_cards(card, pretraining.read_card(shipped))
            console.print(f"{start}: {sentence}", highlight=False)
            if not within:
                raise typer.Exit(1)
    console.print(f"weights and cards: {folder}")


def progress_observer(bar: tqdm) -> Observer:
    """Progress with the running loss; reads the loss once every 20 steps only."""

    def step(task: int, step: int, loss: torch.Tensor, network: torch.nn.Module) -> None:
        bar.update()
        if step % 20 == 0:
            bar.set_postfix_str(f"loss {loss.item():.3f}")

    def after_task(done: int, scores: evaluation.Scores) -> None:
        found = ", ".join(f"{key} {value:.1f}" for key, value in scores.summary().items())
        bar.write(f"after {done} tasks: {found}")

    def resumed(steps: int) -> None:  # what was done before says nothing about the speed now
        bar.n, bar.initial = bar.n + steps, bar.initial + steps

    return Observer(step, after_task, resumed)


def read_config(what: str, settings: list[str]) -> RunConfig:
    """A config from a profile's name or a YAML file, with key=value settings on top."""
    path = Path(what)
    is_file = path.suffix in (".yaml", ".yml")
    tree = read_yaml(path) if is_file else config.profile(what)
    return config.parse(config.override(tree, settings), what)


def run_command(
    what: Annotated[
        str, typer.Argument(metavar="PROFILE|FILE", help="quick, cpu, gpu, or FILE.yaml.")
    ],
    settings: Annotated[
        list[str] | None, typer.Argument(help="key=value ...; recipe=default")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan only.")] = False,
    threads: Threads = 1,
    device: Device = None,
    micro_batch: MicroBatch = None,
    checkpoint_activations: Checkpointing = False,
    keep_weights: KeepWeights = False,
) -> None:
    """Take a model through a stream of updates; a run that is stored is looked up.

    `torchrun -m cmp run ...` shares each batch between processes.
    """
    torch.set_num_threads(threads)
    run_config = read_config(what, settings or [])
    execution = ExecutionConfig(micro_batch, checkpoint_activations)
    device = place(what, device)
    if dry_run and plan_without_all(run_config, device):
        return
    check_device(device)
    with distributed.init_distributed(device) as own:
        data = forecast.data_for(run_config)
        # refuses what cannot be, before anything starts
        pools = mixtures.task_pools(budgets.apply_budget(run_config), data)
        if dry_run:
            make_train_state(run_config, data)  # refuses what is not there, or does not fit
            print_plan(run_config, store.run_id_of(run_config, data), pools)
            return
        compute_run(run_config, own, execution, keep_weights)


def plan_without_all(run_config: RunConfig, device: str) -> bool:
    """Print the plan of a run whose data, weights or card are not all here; else, or for embedded
    models, do nothing, and say so."""
    if run_config.model.name in models.family_names():
        return False
    checks = forecast.check_needs(run_config, device)
    if forecast.MISSING not in [each.state for each in checks]:
        return False
    for key, value in config.flat_keys(run_config.to_dict()):
        console.print(f"{key}: {value}", highlight=False)
    for line in forecast.describe_run(run_config, device):
        console.print(line, highlight=False, soft_wrap=True)
    return True


def compute_run(
    run_config: RunConfig,
    device: str = "cpu",
    execution: ExecutionConfig = ExecutionConfig(),
    keep_weights: bool = False,
) -> None:
    """Compute a run, from its last checkpoint on, with progress, or look it up; print what it
    found. Of several processes the first alone prints."""
    total = run_config.stream.tasks * budgets.apply_budget(run_config).training.steps
    first = distributed.rank() == 0
    run_id = store.run_id_of(run_config, forecast.data_for(run_config))
    if stored := workers.is_kept(run_id, keep_weights):
        console.print("this run is stored; nothing to compute")
    with tqdm(total=total, desc="run", unit=" steps", disable=stored or not first) as bar:
        finished = workers.run_one(
            run_config, progress_observer(bar), device, execution=execution, keep=keep_weights
        )
    if first:
        print_run(finished)


def resume(
    run_id: Annotated[str, typer.Argument(help="The id of an unfinished run, or its beginning.")],
    threads: Annotated[int | None, typer.Option(min=1, help="Torch threads; as it began.")] = None,
    device: Device = None,
    micro_batch: MicroBatch = None,
    checkpoint_activations: Checkpointing = False,
    keep_weights: KeepWeights = False,
) -> None:
    """Go on with a run that was stopped or killed. `cmpt run` with its config does the same."""
    progress = checkpoints.find_unfinished(run_id)
    torch.set_num_threads(threads or checkpoints.recorded_threads(progress))
    run_config = config.parse(progress.config, f"checkpoint of run {run_id}")
    if run_config.model.start == "random" and run_config.mixture.pretraining == 1:
        raise CmpError(
            f"run {progress.run[:SHORT_ID]} is a pretraining: the same `cmpt pretrain` goes on with it"
        )
    if store.run_id_of(run_config, forecast.data_for(run_config)) != progress.run:
        raise CmpError(
            f"run {progress.run[:SHORT_ID]} was begun with other data, other starting weights or "
            "another version of this package; `cmpt run` begins it anew"
        )
    with distributed.init_distributed(device or "cpu") as own:
        compute_run(
            run_config, own, ExecutionConfig(micro_batch, checkpoint_activations), keep_weights
        )


def export_command(
    run_id: Annotated[str, typer.Argument(help="The id of a stored run, or its beginning.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="FILE.safetensors to write.")],
) -> None:
    """Write a run's final weights for open_clip: create_model(NAME, pretrained=FILE) loads them."""
    if out.suffix != ".safetensors":
        raise CmpError(f"{out}: name it FILE.safetensors: open_clip tells the format by that")
    run = store.find_run(run_id)
    model = store.final_model(run)
    with atomic_file(out) as partial:
        models.export_weights(model, partial)
    name = run.config.model.name
    console.print(f"written: {out}, weights of open_clip's {name!r}", highlight=False)
    if name in models.family_names():
        console.print("open_clip knows that name once cmp.models is imported", highlight=False)


def print_plan(run_config: RunConfig, run_id: str, pools: list[mixtures.Pools]) -> None:
    """What a run would do: its settings, its tasks, whether it is stored."""
    for key, value in config.flat_keys(run_config.to_dict()):
        console.print(f"{key}: {value}", highlight=False)
    sizes = ", ".join(str(len(pool.update)) for pool in pools)
    console.print(f"images of each update: {sizes}", highlight=False)
    begun = bool(checkpoints.checkpoint_files(checkpoints.checkpoint_folder(run_id)))
    state = "goes on from its last checkpoint" if begun else "to be computed"
    state = "stored" if store.is_stored(run_id) else state
    steps = run_config.stream.tasks * budgets.apply_budget(run_config).training.steps
    console.print(forecast.describe_batch(run_config), highlight=False, soft_wrap=True)
    console.print(f"run {run_id[:SHORT_ID]}: {steps} steps, {state}", highlight=False)


def print_run(finished: store.StoredRun) -> None:
    """A run's trajectory, its id and its time."""
    table = Table(title=f"run {finished.id[:SHORT_ID]}")
    for column in ("updates", "images", "A_KA %", "A_ZS %", "GM %"):
        table.add_column(column, justify="right")
    for row in store.trajectory(finished.metrics).itertuples():
        values = (f"{value:.1f}" for value in (row.A_KA, row.A_ZS, row.GM))
        table.add_row(str(row.task), row.scope, *values)
    console.print(table)
    about = finished.provenance
    console.print(f"{about['seconds']:.1f} s on {about['threads']} thread(s)", highlight=False)
    console.print(f"final weights sha256 {finished.weights}", highlight=False, soft_wrap=True)
