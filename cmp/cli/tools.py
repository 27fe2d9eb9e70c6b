"""`cmpt merge`, `plan`, `doctor` and `bench`."""

import dataclasses
import importlib
from pathlib import Path
from typing import Annotated

import torch
import typer
from tqdm import tqdm

from cmp.cli.shared import Device, Settings, Threads, default_device
from cmp.errors import CmpError
from cmp.merging import files as merging_files
from cmp.merging.rules import MergeOptions
from cmp.registry import get_option, option_names

BENCHMARKS = {
    "step": ("step", ("tiny", "tiny-vit", "bench-nano", "bench-micro", "bench-mid")),
    "pieces": ("step", ("tiny",)),
    "loop": ("loop", ("tiny",)),
    "evaluate": ("evaluate", ("tiny",)),
    "checkpoint": ("checkpoint", ("tiny",)),
    "study": ("study", ("tiny",)),
    "merge": ("merge", ("ViT-B-16",)),
    "data": ("data", ()),
    "gpu": ("gpu", ("tiny", "bench-mid", "ViT-B-16")),
}
"""Name -> (module of `cmp.bench`, which has a function of that name; models by default)."""


def merge(
    rule: Annotated[str, typer.Argument(help=", ".join(option_names("merge_rule")))],
    models: Annotated[list[Path], typer.Argument(help="Safetensors files, newest first.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write.")],
    base: Annotated[
        Path | None,
        typer.Option(help="What the models were trained from; rules on task vectors need it."),
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="One per model, such as 0.7,0.3. Default: equal ones.")
    ] = None,
    scale: Annotated[
        float | None, typer.Option(help="Scale of the merged task vector. Default: the rule's.")
    ] = None,
    density: Annotated[
        float | None, typer.Option(help="Share of entries that is kept. Default: 0.3.")
    ] = None,
    outliers: Annotated[
        float | None, typer.Option(help="Share of the largest that is dropped. Default: 0.01.")
    ] = None,
    alpha: Annotated[
        float | None, typer.Option(help="LiNeS: scale of the first block. Default: 0.5.")
    ] = None,
    beta: Annotated[
        float | None, typer.Option(help="LiNeS: increase to the last block. Default: 0.5.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of rules that draw at random.")] = 0,
    threads: Threads = 1,
) -> None:
    """Merge safetensors files tensor by tensor; the result's metadata name its parents.

    Example: cmpt merge ties new.safetensors old.safetensors --base start.safetensors -o out.safetensors
    """
    torch.set_num_threads(threads)
    draws = get_option("merge_rule", rule).facts["draws"]
    given = {
        "weights": weights and parse_weights(weights), "scale": scale, "density": density,
        "outliers": outliers, "alpha": alpha, "beta": beta,
    }  # fmt: skip
    given = {key: value for key, value in given.items() if value is not None}
    options = merge_options(rule, given, seed)
    used = [key for key in OPTION_RANGES if rule in rules_with(key)]
    record = {key: getattr(options, key) for key in used} | ({"seed": seed} if draws else {})
    total = merging_files.total_bytes([*models, *([base] if base else [])])
    with tqdm(total=total, desc=rule, unit="B", unit_scale=True, disable=None) as bar:
        merging_files.merge_files(rule, models, out, base, options, record, bar.update)
    typer.echo(f"{out}: {rule} of {len(models)} models")


OPTION_RANGES = {
    "weights": (lambda options: True, ""),
    "scale": (lambda options: options.scale is None or 0 < options.scale < float("inf"), "above 0"),
    "density": (lambda options: 0 < options.density <= 1, "above 0 and at most 1"),
    "outliers": (
        lambda options: 0 <= options.outliers <= 1 - options.density, "from 0 to 1 - density"
    ),
    "alpha": (lambda options: 0 <= options.alpha < float("inf"), "at least 0"),
    "beta": (lambda options: 0 <= options.beta < float("inf"), "at least 0"),
}  # fmt: skip
"""Of each option of `cmpt merge`: whether its value is possible, and what it must be."""


def rules_with(key: str) -> list[str]:
    """Return the rules that an option is for."""
    return option_names("merge_rule", "weight" if key == "weights" else key)


def merge_options(rule: str, given: dict[str, object], seed: int) -> MergeOptions:
    """Return the settings of a merge; raise `CmpError` for one that the rule does not take."""
    for key, value in given.items():
        if rule not in rules_with(key):
            rules = ", ".join(rules_with(key))
            raise CmpError(f"--{key} {value}: {rule!r} takes none, only {rules}")
    options = dataclasses.replace(MergeOptions(), **given, draw=(seed,))
    for key, (is_possible, wanted) in OPTION_RANGES.items():
        if rule in rules_with(key) and not is_possible(options):
            raise CmpError(f"--{key} {getattr(options, key):g}: must be a number {wanted}")
    return options


def parse_weights(text: str) -> tuple[float, ...]:
    """Return numbers that are separated by commas."""
    try:
        return tuple(float(number) for number in text.split(","))
    except ValueError as error:
        raise CmpError(f"--weights {text!r}: expected numbers such as 0.7,0.3") from error


def plan(
    model: Annotated[str, typer.Option(help="An embedded model or any of open_clip's.")] = "tiny",
    updates: Annotated[int, typer.Option(help="How many updates there will be.")] = 8,
    images: Annotated[
        int | None, typer.Option(help="Images of an update, on average. Default: the benchmark's.")
    ] = None,
    gpu_hours: Annotated[
        float | None, typer.Option(help="Compute: hours on the device for training all updates.")
    ] = None,
    gmafs: Annotated[
        float | None, typer.Option(help="Or compute in memory-adjusted GFLOPs, as in the paper.")
    ] = None,
    device: Annotated[str, typer.Option(help="h100, a100, rtx-4090, l4 or core.")] = "h100",
    keep: Annotated[
        str, typer.Option(help="What must be kept of the old: balance, most or all.")
    ] = "balance",
    new: Annotated[str, typer.Option(help="What is new in updates: both, or names.")] = "both",
    pool: Annotated[
        float, typer.Option(help="Part of the pretraining data that can be replayed.")
    ] = 0.1,
    other_pool: Annotated[
        bool, typer.Option("--other-pool", help="Replay public data in place of them.")
    ] = False,
    buffer: Annotated[
        int | None, typer.Option(help="Images of earlier updates that can be kept. Default: all.")
    ] = None,
) -> None:
    """Print a file for `cmpt run`, with its costs, where such runs ended, and why, as comments.

    Example: cmpt plan --model ViT-B-16 --gpu-hours 8 --updates 20
    """
    from cmp.experiments import evidence, planner

    request = planner.PlanRequest(
        model, updates, images, gpu_hours, gmafs, device, keep, new,
        0.0 if other_pool else pool, other_pool, buffer,
    )  # fmt: skip
    made = planner.make_plan(request, evidence.gather_evidence())
    typer.echo(planner.plan_as_yaml(made), nl=False)


def doctor(
    settings: Settings = None,
    profile: Annotated[
        str | None, typer.Option(help="quick, cpu, gpu, or FILE.yaml. Default: the set-up alone.")
    ] = None,
    device: Device = None,
) -> None:
    """Check the set-up, or with --profile what a run needs; status 1 if anything is missing.

    Example: cmpt doctor --profile gpu
    """
    from cmp.cli.runs import read_config
    from cmp.experiments import preflight

    if profile is None:
        checks = preflight.check_setup()
    else:
        run_config = read_config(profile, settings or [])
        checks = preflight.check_run(run_config, default_device(profile, device))
        typer.echo(preflight.describe_run(run_config)[0])
    for check in checks:
        typer.echo(f"{check.what:10}{check.state:10}{check.sentence}")
    if preflight.MISSING in [check.state for check in checks]:
        raise typer.Exit(1)


def bench(
    name: Annotated[str, typer.Argument(help=", ".join(BENCHMARKS))],
    model: Annotated[
        list[str] | None,
        typer.Option(help="A model; repeat it for more. Default: the benchmark's."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Times that each alternative runs.")] = 15,
    batch: Annotated[
        int | None,
        typer.Option(min=2, help="Samples per step. Default: 128; mid 64, ViT-B-16 512."),
    ] = None,
    threads: Threads = 1,
) -> None:
    """Measure how fast alternatives are, in turn within this process; writes a JSON file, too.

    Each number is the median over rounds, with the 10-90 % range of the rounds.

    Example: cmpt bench step --model tiny
    """
    from rich.console import Console

    from cmp.embedded import packed

    if name not in BENCHMARKS:
        raise CmpError(f"no benchmark is called {name!r}; there are {', '.join(BENCHMARKS)}")
    module, defaults = BENCHMARKS[name]
    torch.set_num_threads(threads)
    measure = getattr(importlib.import_module(f"cmp.bench.{module}"), name)
    report = measure(model or list(defaults), packed.load_embedded(), rounds, batch)
    Console(highlight=False).print(report.table())
    typer.echo("\n".join([*report.notes, f"written: {report.write()}"]))
