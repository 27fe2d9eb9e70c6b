"""`cmpt merge`, `plan`, `doctor`, `pretrain` and `bench`."""

from collections.abc import Sequence
from pathlib import Path

import torch
import typer
from tqdm import tqdm

from cmp.cli import shared
from cmp.errors import CmpError
from cmp.files import build_folder
from cmp.merging import files as merging_files
from cmp.merging.apply import parse_options
from cmp.merging.rules import MergeOptions


def merge(
    rule: str,
    models: list[Path],
    out: shared.OutFile,
    base: Path | None = None,
    weights: str | None = None,
    scale: float | None = None,
    density: float | None = None,
    outliers: float | None = None,
    alpha: float | None = None,
    beta: float | None = None,
    seed: shared.NotNegative = 0,
    threads: shared.Threads = 1,
) -> None:
    """Merge safetensors files tensor by tensor; the result's metadata name its parents.

    Args:
        rule: interpolation, slerp, task-arithmetic, lines, model-stock, magmax, random, ties, dare,
            dare-ties, breadcrumbs, breadcrumbs-ties, or a rule of a plugin.
        models: Safetensors files, newest first.
        out: The file to write.
        base: What the models were trained from; rules on task vectors need it.
        weights: One per model, such as 0.7,0.3. Default: equal ones.
        scale: Scale of the merged task vector. Default: the rule's.
        density: Share of entries that is kept. Default: 0.3.
        outliers: Share of the largest entries that is dropped. Default: 0.01.
        alpha: Of lines, the scale of the first block. Default: 0.5.
        beta: Of lines, the increase to the last block. Default: 0.5.
        seed: Seed of rules that draw at random.

    Example:
        cmpt merge ties new.safetensors old.safetensors --base start.safetensors -o out.safetensors
    """
    torch.set_num_threads(threads)
    settings = {"scale": scale, "density": density, "outliers": outliers, "alpha": alpha,
                "beta": beta}  # fmt: skip
    options = merge_options(rule, weights, settings, seed)
    total = merged_bytes([*models, *([base] if base else [])])
    with tqdm(total=total, desc=rule, unit="B", unit_scale=True, disable=None) as bar:
        merging_files.merge_files(rule, models, out, base, options, bar.update)
    typer.echo(f"{out}: {rule} of {len(models)} models")


def merged_bytes(paths: Sequence[Path]) -> int:
    """Return how many bytes a merge reads and writes; raise `CmpError` for a missing file."""
    if missing := [path for path in paths if not path.is_file()]:  # a pipe may never end
        raise CmpError(f"{missing[0]}: cannot be read: there is no such regular file")
    sizes = [path.stat().st_size for path in paths]
    return sum(sizes) + sizes[0]


def merge_options(
    rule: str, weights: str | None, settings: dict[str, float | None], seed: int
) -> MergeOptions:
    """Return the options of a merge; raise `CmpError` for what the rule does not take."""
    numbers = None
    if weights is not None:
        try:
            numbers = [float(number) for number in weights.split(",")]
        except ValueError as error:
            raise CmpError(f"--weights {weights}: expected numbers such as 0.7,0.3") from error
    given = {key: value for key, value in settings.items() if value is not None}
    return parse_options(rule, numbers, (seed,), **given)


def plan(
    model: str = "small",
    updates: int = 8,
    images: int | None = None,
    gpu_hours: float | None = None,
    gmafs: float | None = None,
    device: str = "h100",
    keep: str = "balance",
    new: str = "both",
    pool: float = 0.1,
    other_pool: bool = False,
    buffer: int | None = None,
) -> None:
    """Print a file for `cmpt run`, with its costs, where such runs ended, and why, as comments.

    Args:
        model: An embedded model, or any of open_clip's.
        updates: How many updates there will be.
        images: Images of an update, on average. Default: those of the benchmark.
        gpu_hours: Compute, in hours on the device for training all updates.
        gmafs: Or compute in memory-adjusted GFLOPs, the paper's unit.
        device: h100, a100, rtx-4090, l4 or core.
        keep: What must be kept of the model's knowledge: balance, most or all.
        new: What is new in the updates: both names and looks, or names.
        pool: The part of the pretraining data that can be replayed.
        other_pool: Replay public data in place of the pretraining data.
        buffer: Images of earlier updates that can be kept. Default: all.

    Example:
        cmpt plan --model ViT-B-16 --gpu-hours 8 --updates 20
    """
    from cmp.experiments import evidence, planner

    pool = 0.0 if other_pool else pool
    request = planner.PlanRequest(
        model, updates, images, gpu_hours, gmafs, device, keep, new, pool, other_pool, buffer
    )
    made = planner.make_plan(request, evidence.gather_evidence())
    typer.echo(planner.plan_as_yaml(made), nl=False)


def doctor(
    settings: shared.Settings = None, profile: str | None = None, device: str | None = None
) -> None:
    """Check the set-up, or with --profile what a run needs; status 1 if it is absent or damaged.

    Args:
        profile: quick, cpu, gpu, or a file, NAME.yaml. Default: the set-up alone.

    Example:
        cmpt doctor --profile gpu
    """
    from cmp.cli.runs import read_config
    from cmp.experiments import preflight

    if profile is None:
        checks = preflight.check_setup()
    else:
        run_config = read_config(profile, settings or [])
        checks = preflight.check_run(run_config, shared.default_device(run_config, device))
        typer.echo(preflight.describe_run(run_config)[0])
    for check in checks:
        typer.echo(f"{check.what:10}{check.state:10}{check.sentence}")
    if {preflight.MISSING, preflight.DAMAGED} & {check.state for check in checks}:
        raise typer.Exit(1)


def pretrain(
    model: str,
    settings: shared.Settings = None,
    seed: shared.NotNegative = 0,
    out: Path | None = None,
    threads: shared.Threads = 1,
) -> None:
    """Pretrain a base on the pool, and compare it with the one that ships (else status 1).

    Both checkpoints are written, each with its model card.

    Args:
        model: An embedded model, such as small.
        out: Folder for weights and cards. Default: models in the build folder.

    Example:
        cmpt pretrain small --seed 7
    """
    from cmp.cli.runs import progress_observer
    from cmp.embedded import models as embedded_models
    from cmp.embedded import packed
    from cmp.experiments import pretraining

    torch.set_num_threads(threads)
    run_config = pretraining.pretraining_config(model, seed, *(settings or []))
    folder = out or build_folder() / "models"
    with tqdm(
        total=run_config.training.steps, desc=f"pretrain {model} {seed}", unit=" steps"
    ) as bar:
        observer = progress_observer(bar)
        cards = pretraining.pretrain(run_config, packed.load_embedded(), folder, observer)
    for start, card in cards.items():
        scores = card["scores"].items()
        values = ", ".join(f"{k} {x['value']} ± {x['standard_error']}" for k, x in scores)
        typer.echo(f"{start}: {values}")
        shipped = embedded_models.base_path(model, start, seed)
        if shipped.exists() and not settings and shipped.parent != folder.resolve():
            within, sentence = pretraining.compare_cards(card, pretraining.read_card(shipped))
            typer.echo(f"{start}: {sentence}")
            if not within:
                raise typer.Exit(1)
    typer.echo(f"weights and cards: {folder}")


def bench(
    name: str,
    model: list[str] | None = None,
    rounds: shared.Positive = 15,
    batch: shared.Batch = None,
    threads: shared.Threads = 1,
) -> None:
    """Measure how fast alternatives are, in turn within this process; writes a JSON file, too.

    Each number is the median over rounds, with the 10-90 % range of the rounds.

    Args:
        name: step, pieces, loop, evaluate, checkpoint, study, merge, data, gpu or trace.
        model: A model; repeat it for more. Default: those of the benchmark.
        rounds: Times that each alternative runs.
        batch: Samples per step, at least 2. Default: 128; bench-mid 64, ViT-B-16 512.

    Example:
        cmpt bench step --model small
    """
    from rich.console import Console

    from cmp.bench import run_benchmark

    torch.set_num_threads(threads)
    report = run_benchmark(name, model, rounds, batch)
    Console(highlight=False).print(report.table())
    typer.echo("\n".join([*report.notes, f"written: {report.write()}"]))
