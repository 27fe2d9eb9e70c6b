"""`cmpt merge`, `plan`, `doctor`, `pretrain` and `bench`: tools around a run."""

from collections.abc import Sequence
from pathlib import Path

import torch
import typer
from tqdm import tqdm

from cmp.cli import shared
from cmp.errors import CmpError
from cmp.merging.files import merge_files
from cmp.project import build_folder


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
    """Merge safetensors files into one, tensor by tensor.

    The metadata of the new file name the files that it was merged from.

    Args:
        rule: Merge rule: interpolation, slerp, task-arithmetic, lines, model-stock, magmax, random,
            ties, dare, dare-ties, breadcrumbs, breadcrumbs-ties, or a rule of a plugin.
        models: Safetensors files to merge, newest first.
        out: File to write.
        base: Weights from which the models were trained, for rules on task vectors.
        weights: Weight of each model, such as 0.7,0.3. Default: equal weights.
        scale: Factor of the merged task vector. Default: that of the rule.
        density: Fraction of a task vector's entries to keep, 0 to 1. Default: 0.3.
        outliers: Fraction of the largest entries to drop, 0 to 1. Default: 0.01.
        alpha: Factor of the first block, for rule lines. Default: 0.5.
        beta: Increase of the factor from the first to the last block, for rule lines. Default: 0.5.
        seed: Seed of rules that draw at random.

    Example:
        cmpt merge ties new.safetensors old.safetensors --base start.safetensors -o out.safetensors
    """
    shared.check_out(out)
    torch.set_num_threads(threads)
    settings = {"scale": scale, "density": density, "outliers": outliers, "alpha": alpha,
                "beta": beta}  # fmt: skip
    given = {key: value for key, value in settings.items() if value is not None}
    numbers = parse_weights(weights)
    total = merged_bytes([*models, *([base] if base else [])])
    with tqdm(total=total, desc=rule, unit="B", unit_scale=True, disable=None) as bar:
        merge_files(rule, models, out, base, bar.update, weights=numbers, draw=(seed,), **given)
    typer.echo(f"{out}: {rule} of {len(models)} models")


def merged_bytes(paths: Sequence[Path]) -> int:
    """Return how many bytes a merge reads and writes; raise `CmpError` for a missing file."""
    if missing := [path for path in paths if not path.is_file()]:  # a pipe may never end
        raise CmpError(f"{missing[0]}: cannot be read: there is no such regular file")
    sizes = [path.stat().st_size for path in paths]
    return sum(sizes) + sizes[0]


def parse_weights(text: str | None) -> list[float] | None:
    """Return the numbers of `--weights`; raise `CmpError` where they are none."""
    try:
        return text and [float(number) for number in text.split(",")]
    except ValueError as error:
        raise CmpError(f"--weights {text}: expected numbers such as 0.7,0.3") from error


def plan(
    model: str = "small",
    updates: int = 20,
    images: int | None = None,
    gpu_hours: float | None = None,
    gmafs: float | None = None,
    device: str = "h100",
    keep: str = "balance",
    new: str = "both",
    pool: float | None = None,
    other_pool: bool = False,
    buffer: int | None = None,
    start: str | None = None,
) -> None:
    """Plan a run for your model, data and compute, and print it as a file for `cmpt run`.

    Comments in the file give its costs, the scores of similar runs, and the reasons.

    Args:
        model: Name of an embedded model, or of any model of open_clip; or hf-hub:ORG/NAME, or
            local-dir:FOLDER, a folder as open_clip writes it.
        updates: Number of updates.
        images: Mean number of images per update. Default: that of the benchmark.
        gpu_hours: Compute budget for training all updates, in hours on the device. Give this or
            --gmafs.
        gmafs: Compute budget for all updates, in memory-adjusted GFLOPs. Give this or --gpu-hours.
        device: Device of the plan: h100, a100, rtx-4090, l4 or core.
        keep: How much of the model's knowledge must be kept: balance, most or all.
        new: What is new in the updates: both (names and looks), or names, which adds a note.
        pool: Fraction of the pretraining data, or of your own pool, to replay, 0 to 1. Default: 0.5
            for embedded models, otherwise 1.
        other_pool: There are only public data to replay, and no pretraining data.
        buffer: Number of images of earlier updates that can be stored. Default: all.
        start: Weights to begin with: a pretrained tag of open_clip, or the path of a file. Default:
            those of the paper, or the first that open_clip lists; of a hub or a folder, its own.

    Example:
        cmpt plan --model ViT-B-16 --gpu-hours 8 --updates 20
    """
    from cmp.experiments import evidence, planner

    request = planner.PlanRequest(
        model, updates, images, gpu_hours, gmafs, device, keep, new, pool, other_pool, buffer, start
    )
    made = planner.make_plan(request, evidence.gather_evidence())
    typer.echo(planner.plan_as_yaml(made), nl=False)


def doctor(
    settings: shared.Settings = None,
    profile: str | None = None,
    device: str | None = None,
    micro_batch: shared.OptionalPositive = None,
    checkpoint_activations: bool = False,
) -> None:
    """Check the set-up, and with --profile everything that a run needs.

    The exit status is 1 if anything is missing or damaged.

    Args:
        profile: quick, cpu, gpu, or a file of settings, NAME.yaml. Default: the set-up alone.

    Example:
        cmpt doctor --profile gpu
    """
    from cmp import models
    from cmp.cli.runs import read_config, report_checks
    from cmp.experiments import preflight
    from cmp.scale.execution import ExecutionConfig

    if profile is None:
        checks = preflight.check_setup()
    else:
        run_config = read_config(profile, settings or [])
        device = models.default_device(run_config.model.name, device)
        execution = ExecutionConfig(micro_batch, checkpoint_activations)
        checks = preflight.check_run(run_config, device, execution)
        typer.echo(preflight.describe_run(run_config)[0])
    report_checks(checks)


def pretrain(
    model: str,
    settings: shared.Settings = None,
    seed: shared.NotNegative = 0,
    out: Path | None = None,
    threads: shared.Threads = 1,
) -> None:
    """Pretrain a base model on the pool, and compare it with the one that ships.

    The annealed and the unannealed weights are written, each with a model card. The exit status is
    1 if a score differs from the shipped model's by more than the tolerance.

    Args:
        model: Name of an embedded model, such as small.
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
        observer = progress_observer(bar, run_config.training.batch)
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
    """Measure the speed of alternatives, and write the result to a JSON file.

    The alternatives run in turn within this process. Each number is the median over rounds, with
    the range from 10 to 90% of the rounds.

    Args:
        name: Benchmark: step, pieces, loop, evaluate, checkpoint, study, merge, data, gpu or
            trace.
        model: Name of a model; repeat for more. Default: the models of the benchmark.
        rounds: Number of times that each alternative runs.
        batch: Samples per step, at least 2. Default: 128; 64 for bench-mid, 512 for ViT-B-16.

    Example:
        cmpt bench step --model small
    """
    from rich.console import Console

    from cmp.bench import run_benchmark

    torch.set_num_threads(threads)
    report = run_benchmark(name, model, rounds, batch)
    Console(highlight=False).print(report.table())
    typer.echo("\n".join([*report.notes, f"written: {report.write()}"]))
