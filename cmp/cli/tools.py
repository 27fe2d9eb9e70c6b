"""The commands `config`, `plan`, `doctor`, `pretrain` and `bench`, which support runs."""

from pathlib import Path

import typer

from cmp.cli import shared
from cmp.errors import CmpError, did_you_mean
from cmp.project import build_folder


def explain_keys(section: shared.OptionalArgument = None) -> None:
    """Print the keys of a run's config with their types, units, defaults and meanings.

    Give them to `cmpt run` as KEY=VALUE or in a file. seed=N sets all seeds at once, and
    recipe=NAME sets the keys of a recipe.

    Args:
        section: A section, such as schedule, or a single key, such as schedule.peak, seed or
            recipe. Default: all.

    Example:
        cmpt config schedule
    """
    from cmp import config
    from cmp.cli.keys import describe_sections

    known = describe_sections()
    known["seed"] = "seed\n    whole number at least 0\n    Sets all keys of seeds at once."
    recipes = ", ".join(config.RECIPES)
    known["recipe"] = f"recipe\n    one of {recipes}\n    Sets the keys of a recipe."
    names = [*config.RunConfig.__dataclass_fields__] if section is None else [section]
    if section not in (None, *known):
        near = did_you_mean(section, known)
        raise CmpError(f"config: no section or key is called {section!r}{near}")
    typer.echo("\n\n".join(known[name] for name in names))


def plan(
    model: str = "small",
    updates: int = 20,
    images: int | None = None,
    gpu_hours: float | None = None,
    gmafs: float | None = None,
    device: str = "h100",
    keep: str = "balance",
    pool: float | None = None,
    other_pool: bool = False,
    buffer: int | None = None,
    start: str | None = None,
) -> None:
    """Plan a run for your model, data and compute, and print it as a file for `cmpt run`.

    Comments in the file give costs, scores of similar runs, and reasons.

    Args:
        model: One of this book's own models, such as small, or an open_clip model, hf-hub:ORG/NAME,
            or local-dir:FOLDER for a folder in open_clip's format.
        updates: Number of updates.
        images: Mean number of images per update. Default: that of the benchmark.
        gpu_hours: Compute budget for training all updates, in hours on the device. Give this or
            --gmafs.
        gmafs: Compute budget for all updates, in memory-adjusted GFLOPs. Give this or --gpu-hours.
        device: Device of the plan: h100, a100, rtx-4090, l40s, l40, l4, t4 or core (one CPU core).
        keep: What to aim for: balance (new and old alike), most (old before new) or all (nothing
            may be lost, even if little is learned).
        pool: Fraction of the pretraining data, or of your own pool, to replay, 0 to 1. Default: 0.5
            for this book's own models, otherwise 1.
        other_pool: Replay public data, because the pretraining data are not available.
        buffer: Number of images of earlier updates that can be stored. Default: all.
        start: Starting weights: a pretrained tag of open_clip, or the path of a file. Default: the
            paper's, else the first that open_clip lists, or the hub's or folder's own.

    Example:
        cmpt plan --model ViT-B-16 --gpu-hours 8 --updates 20
    """
    from cmp.experiments import evidence, planner

    request = planner.PlanRequest(
        model, updates, images, gpu_hours, gmafs, device, keep, pool, other_pool, buffer, start
    )
    made = planner.make_plan(request, evidence.gather_evidence())
    typer.echo(planner.plan_as_yaml(made), nl=False)


def doctor(
    settings: shared.Settings = None,
    profile: str | None = None,
    device: str | None = None,
    micro_batch: shared.OptionalPositive = None,
    checkpoint_activations: bool = False,
    compile: bool = False,
) -> None:
    """Check the setup, and with --profile everything that a run needs.

    The exit status is 1 if anything is missing or damaged.

    Args:
        profile: quick, cpu, gpu, or a file of settings, NAME.yaml. Default: only check the setup.

    Example:
        cmpt doctor --profile gpu
    """
    from cmp import config, starts
    from cmp.cli.computing import report_checks
    from cmp.experiments import preflight
    from cmp.scale.execution import ExecutionConfig

    if profile is None:
        if settings:
            raise CmpError(f"{settings[0]}: settings need --profile, such as --profile gpu")
        shared.refuse_options(
            "needs --profile", device=device, micro_batch=micro_batch,
            checkpoint_activations=checkpoint_activations, compile=compile,
        )  # fmt: skip
        checks = preflight.check_setup()
    else:
        run_config = config.read_config(profile, settings or [])
        device = starts.default_device(run_config.model.name, device)
        execution = ExecutionConfig(micro_batch, checkpoint_activations, compile)
        checks, _, fitted = preflight.check_run(run_config, device, execution)
        typer.echo(preflight.describe_run(run_config, fitted)[0])
    report_checks(checks)


def pretrain(
    model: str,
    settings: shared.Settings = None,
    seed: shared.NotNegative = 0,
    out: Path | None = None,
    threads: shared.Threads = 1,
) -> None:
    """Pretrain a base model on the pool, and compare it with the shipped one.

    The annealed and the unannealed weights are written, each with a model card. The exit status is
    1 if a score differs from the shipped model's by more than the tolerance.

    Args:
        model: Name of one of this book's own models, such as small.
        out: Folder for weights and cards. Default: models in the build folder.

    Example:
        cmpt pretrain small --seed 7
    """
    import torch
    from tqdm import tqdm

    from cmp import budgets
    from cmp.cli.computing import progress_observer
    from cmp.embedded import models as embedded_models
    from cmp.embedded import packed
    from cmp.experiments import pretraining

    torch.set_num_threads(threads)
    run_config = pretraining.pretraining_config(model, seed, *(settings or []))
    folder = out or build_folder() / "models"
    steps = budgets.total_steps(run_config)
    with tqdm(total=steps, desc=f"pretrain {model} {seed}", unit=" steps") as bar:
        observer = progress_observer(bar)
        cards = pretraining.pretrain(run_config, packed.load_embedded(), folder, observer)
    all_within = True
    for start, card in cards.items():
        scores = card["scores"].items()
        values = ", ".join(f"{k} {x['value']} ± {x['standard_error']}" for k, x in scores)
        typer.echo(f"{start}: {values}")
        shipped = embedded_models.base_path(model, start, seed)
        is_other = shipped.parent.resolve() != folder.resolve()
        if shipped.exists() and not settings and is_other:
            within, sentence = pretraining.compare_cards(card, pretraining.read_card(shipped))
            typer.echo(f"{start}: {sentence}")
            all_within &= within
    typer.echo(f"weights and cards: {folder}")
    if not all_within:
        raise typer.Exit(1)


def bench(
    name: str,
    model: list[str] | None = None,
    rounds: shared.Positive = 15,
    batch: shared.Batch = None,
    threads: shared.Threads = 1,
) -> None:
    """Compare the speed of several ways to do the same step (`trace` predicts it), and write a JSON
    file.

    The alternatives run in turn in this process. Each number is the median over rounds, with the 10
    to 90% range.

    Args:
        name: Benchmark: step, features, trace or gpu.
        model: Name of a model; repeat for more. Default: the models of the benchmark.
        rounds: Number of times that each alternative runs.
        batch: Samples per step, at least 2. Default: 128; 64 for bench-mid; 512 for ViT-B-16.

    Example:
        cmpt bench step --model small
    """
    import torch

    from cmp.bench import run_benchmark

    torch.set_num_threads(threads)
    report = run_benchmark(name, model, rounds, batch)
    rows = [[row.get(column, "") for column in report.columns] for row in report.rows]
    shared.print_table(report.columns, rows, report.title)
    typer.echo("\n".join([*report.notes, f"written: {report.write()}"]))
