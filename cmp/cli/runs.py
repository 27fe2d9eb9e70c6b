"""The commands `run` and `eval`, which train and score models."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from cmp.cli import shared
from cmp.errors import Interrupted


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
    from cmp import config

    run_config = config.read_config(what, settings or [])  # a wrong file is refused at once
    import torch

    from cmp import starts
    from cmp.cli.computing import compute_run, plan_run
    from cmp.runs.checkpoints import latest_progress, run_folder
    from cmp.runs.launch import resolve_run
    from cmp.scale import devices, processes
    from cmp.scale.execution import ExecutionConfig

    torch.set_num_threads(threads)
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
        except Interrupted:
            kept = latest_progress(run_folder(resolved.id))
            if not stop_after or not kept or kept.task < stop_after:
                raise
            if processes.rank() == 0:
                again = "the same command without --stop-after continues"
                typer.echo(f"stopped; {again}; compare the scores with `cmpt results ls`")


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
    import torch

    from cmp import config, evaluation, models, starts
    from cmp.data import load_data
    from cmp.releases.candidates import find_candidate
    from cmp.scale import devices

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
