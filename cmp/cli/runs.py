"""`cmp run` and `cmp resume`: one run, computed and kept."""

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table
from tqdm import tqdm

from cmp import budgets, config, methods, mixtures, models
from cmp.cli.networks import watch
from cmp.cli.shared import Checkpointing, Device, KeepWeights, MicroBatch, Threads, console, place
from cmp.config import RunConfig
from cmp.errors import CmpError
from cmp.files import read_yaml, whole_file
from cmp.paths import SHORT
from cmp.runs import checkpoints, doctor, plans, provenance, store, workers
from cmp.steps import distributed
from cmp.steps.execution import WHOLE, Execution


def read_config(what: str, settings: list[str]) -> RunConfig:
    """A config from a profile's name or a YAML file, with key=value settings on top."""
    path = Path(what)
    is_file = path.suffix in (".yaml", ".yml")
    tree = read_yaml(path) if is_file else config.profile(what)
    return config.parse(config.override(tree, settings), what)


def run(
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
    execution = Execution(micro_batch, checkpoint_activations)
    device = place(what, device)
    if dry_run and plan_without_all(run_config, device):
        return
    provenance.check_device(device)
    with distributed.joined(device) as own:
        data = doctor.data_of(run_config)
        # refuses what cannot be, before anything starts
        pools = mixtures.task_pools(budgets.applied(run_config), data)
        if dry_run:
            methods.learner(run_config, data)  # refuses what is not there, or does not fit
            print_plan(run_config, store.identify(run_config, data), pools)
            return
        compute(run_config, own, execution, keep_weights)


def plan_without_all(run_config: RunConfig, device: str) -> bool:
    """Print the plan of a run whose data, weights or card are not all here; else, or for embedded
    models, do nothing, and say so."""
    if run_config.model.name in models.EMBEDDED:
        return False
    checks = doctor.needs(run_config, device)
    if doctor.MISSING not in [each.state for each in checks]:
        return False
    for key, value in config.flat_keys(run_config.to_dict()):
        console.print(f"{key}: {value}", highlight=False)
    for line in plans.of_run(run_config, device):
        console.print(line, highlight=False, soft_wrap=True)
    return True


def compute(
    run_config: RunConfig,
    device: str = "cpu",
    execution: Execution = WHOLE,
    keep_weights: bool = False,
) -> None:
    """Compute a run, from its last checkpoint on, with progress, or look it up; print what it
    found. Of several processes the first alone prints."""
    total = run_config.stream.tasks * budgets.applied(run_config).training.steps
    first = distributed.rank() == 0
    run_id = store.identify(run_config, doctor.data_of(run_config))
    if stored := workers.is_kept(run_id, keep_weights):
        console.print("this run is stored; nothing to compute")
    with tqdm(total=total, desc="run", unit=" steps", disable=stored or not first) as bar:
        finished = workers.run_one(
            run_config, watch(bar), device, execution=execution, keep=keep_weights
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
    """Go on with a run that was stopped or killed. `cmp run` with its config does the same."""
    progress = checkpoints.find(run_id)
    torch.set_num_threads(threads or checkpoints.threads(progress))
    run_config = config.parse(progress.config, f"checkpoint of run {run_id}")
    if run_config.model.start == "random" and run_config.mixture.pretraining == 1:
        raise CmpError(
            f"run {progress.run[:SHORT]} is a pretraining: the same `cmp pretrain` goes on with it"
        )
    if store.identify(run_config, doctor.data_of(run_config)) != progress.run:
        raise CmpError(
            f"run {progress.run[:SHORT]} was begun with other data, other starting weights or "
            "another version of this package; `cmp run` begins it anew"
        )
    with distributed.joined(device or "cpu") as own:
        compute(run_config, own, Execution(micro_batch, checkpoint_activations), keep_weights)


def export(
    run_id: Annotated[str, typer.Argument(help="The id of a stored run, or its beginning.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="FILE.safetensors to write.")],
) -> None:
    """Write a run's final weights for open_clip: create_model(NAME, pretrained=FILE) loads them."""
    if out.suffix != ".safetensors":
        raise CmpError(f"{out}: name it FILE.safetensors: open_clip tells the format by that")
    run = store.find(run_id)
    model = store.final_model(run)
    with whole_file(out) as partial:
        models.export(model, partial)
    name = run.config.model.name
    console.print(f"written: {out}, weights of open_clip's {name!r}", highlight=False)
    if name in models.EMBEDDED:
        console.print("open_clip knows that name once cmp.models is imported", highlight=False)


def print_plan(run_config: RunConfig, run_id: str, pools: list[mixtures.Pools]) -> None:
    """What a run would do: its settings, its tasks, whether it is stored."""
    for key, value in config.flat_keys(run_config.to_dict()):
        console.print(f"{key}: {value}", highlight=False)
    sizes = ", ".join(str(len(pool.update)) for pool in pools)
    console.print(f"images of each update: {sizes}", highlight=False)
    begun = bool(checkpoints.candidates(checkpoints.folder_of(run_id)))
    state = "goes on from its last checkpoint" if begun else "to be computed"
    state = "stored" if store.is_stored(run_id) else state
    steps = run_config.stream.tasks * budgets.applied(run_config).training.steps
    console.print(plans.batch(run_config), highlight=False, soft_wrap=True)
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
