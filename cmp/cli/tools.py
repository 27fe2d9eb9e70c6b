"""`cmpt merge`: models made of models."""

import dataclasses
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich import box
from rich.table import Table
from tqdm import tqdm

from cmp import budgets, config
from cmp.budgets import Cost, paper_steps
from cmp.cli.runs import read_config
from cmp.cli.shared import Device, Threads, console, place
from cmp.config import RunConfig
from cmp.embedded import packed
from cmp.errors import CmpError
from cmp.experiments import evidence, forecast, paper, planner
from cmp.experiments.paper import model_catalogue
from cmp.experiments.planner import DEVICES, KEEP, NEW, PlanRequest
from cmp.merging import files as merging_files
from cmp.merging.rules import MergeOptions
from cmp.registry import get_option, option_names

DEFAULT_OPTIONS = MergeOptions()


def merge(
    rule: Annotated[str, typer.Argument(help=", ".join(option_names("merge_rule")))],
    models: Annotated[list[Path], typer.Argument(help="Safetensors files, newest first.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write.")],
    base: Annotated[
        Path | None, typer.Option(help="What the models were trained from, for task vectors.")
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="One a model, such as 0.7,0.3; equal ones by default.")
    ] = None,
    scale: Annotated[float | None, typer.Option(help="Of the merged task vector.")] = None,
    density: Annotated[float | None, typer.Option(help="Share that is kept.")] = None,
    outliers: Annotated[float | None, typer.Option(help="Share dropped at the top.")] = None,
    alpha: Annotated[float | None, typer.Option(help="LiNeS: of the first block.")] = None,
    beta: Annotated[float | None, typer.Option(help="LiNeS: from first to last.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of rules that draw by chance.")] = 0,
    threads: Threads = 1,
) -> None:
    """Merge models tensor by tensor; the file says in its metadata what it was made of."""
    torch.set_num_threads(threads)
    facts = get_option("merge_rule", rule).facts
    given = {
        "weights": None if weights is None else parse_weights(weights), "scale": scale,
        "density": density, "outliers": outliers, "alpha": alpha, "beta": beta,
    }  # fmt: skip
    how = merge_options(
        rule, {key: value for key, value in given.items() if value is not None}, seed
    )
    record = {key: getattr(how, key) for key in given if rule in rules_with(key)}
    record |= {"seed": seed} if facts["draws"] else {}
    paths = [*models, *([base] if base else [])]
    bar = tqdm(
        total=merging_files.total_bytes(paths), desc=rule, unit="B", unit_scale=True, disable=None
    )
    with bar:
        merging_files.merge_files(rule, models, out, base, how, record, bar.update)
    console.print(f"{out}: {rule} of {len(models)} models", highlight=False)


def rules_with(key: str) -> list[str]:
    """The rules that a setting is for."""
    return option_names("merge_rule", "weight" if key == "weights" else key)


def merge_options(rule: str, given: dict[str, object], seed: int) -> MergeOptions:
    """What was given, in its ranges; `CmpError` for what the rule does not take."""
    for key, value in given.items():
        if rule not in rules_with(key):
            raise CmpError(
                f"--{key} {value}: {rule!r} takes none, only {', '.join(rules_with(key))}"
            )
    how = dataclasses.replace(DEFAULT_OPTIONS, **given, draw=(seed,))
    top = how.outliers if rule in rules_with("outliers") else 0.0
    good = {
        "scale": (how.scale is None or 0 < how.scale < float("inf"), "above 0"),
        "density": (0 < how.density <= 1, "above 0 and at most 1"),
        "outliers": (0 <= top <= 1 - how.density, f"from 0 to 1 - density {how.density:g}"),
        "alpha": (0 <= how.alpha < float("inf"), "at least 0"),
        "beta": (0 <= how.beta < float("inf"), "at least 0"),
    }
    for key, (is_good, wanted) in good.items():
        if rule in rules_with(key) and not is_good:
            raise CmpError(f"--{key} {getattr(how, key):g}: must be a number {wanted}")
    return how


def parse_weights(text: str) -> tuple[float, ...]:
    """Numbers with commas between them."""
    try:
        return tuple(float(each) for each in text.split(","))
    except ValueError as error:
        raise CmpError(f"--weights {text!r}: expected numbers such as 0.7,0.3") from error


GIGA = 1e9
METHODS = option_names("method")


def method_config(model: str, batch: int, text: str) -> RunConfig:
    """The run of a method as `--method` writes it: "lora,rank=64"."""
    name, *settings = text.split(",")
    tree = {"model": {"name": model, "start": "random"}, "training": {"batch": batch}}
    assignments = [f"method.name={name}", *(f"method.{each}" for each in settings)]
    return config.parse(config.override(tree, assignments), f"--method {text}")


def measured_cost(run_config: RunConfig) -> Cost:
    """A method's cost; its memory is measured where there is a CUDA card, else accounted for."""
    found = budgets.method_cost(run_config)
    if not torch.cuda.is_available():
        return found
    return dataclasses.replace(found, memory=budgets.measured_memory(run_config))


def budget(
    model: Annotated[str, typer.Option(help="An embedded model or any of open_clip's.")] = "tiny",
    batch: Annotated[int, typer.Option(min=2, help="Samples a step.")] = 64,
    total: Annotated[
        float | None, typer.Option(help="Memory-adjusted GFLOPs in all; what `cpu` costs.")
    ] = None,
    tasks: Annotated[int, typer.Option(min=1, help="Updates that share the total.")] = 8,
    method: Annotated[
        list[str] | None, typer.Option(help="Such as lora,rank=64; again for more; all.")
    ] = None,
    table4: Annotated[
        bool, typer.Option("--table4", help="The paper's Table 4 beside ours instead.")
    ] = False,
    models: Annotated[
        bool, typer.Option("--models", help="Real models, fully fine-tuned, instead.")
    ] = False,
) -> None:
    """FLOPs, memory and steps of each method under one budget; nothing is computed but shapes."""
    if models:
        if table4 or method:
            raise CmpError("--models is of full fine-tuning: leave out --method and --table4")
        console.print(table_of_models(total or paper.TABLE4_TOTAL))
        return
    if table4:
        if method or total is not None:
            raise CmpError("--table4 has its own methods and total: leave out --method and --total")
        console.print(table_4())
        console.print(
            "steps: as printed, by its rule, and with what comes after a task charged once a task",
            highlight=False,
        )
        return
    console.print(table_of(model, batch, total, tasks, method or METHODS))
    kind = "measured on this card" if torch.cuda.is_available() else "accounted for"
    console.print(
        f"a step: GFLOPs, memory ({kind}, in fp32), GMAFs = GFLOPs x memory / full's; a task: "
        "GMAFs at its end, charged once, its steps and samples",
        highlight=False,
    )


def table_of_models(total: float) -> Table:
    """A row a real model: what `total` GFLOPs buy."""
    columns = ("million", "GFLOPs", "GB", "steps", "samples")
    table = narrow_table(f"batches of {paper.TABLE4_BATCH}: {total:,.4g} GFLOPs", columns, "model")
    for row in model_catalogue(total=total).itertuples():
        numbers = (f"{row.parameters:,.0f}", f"{row.GFLOPs:,.1f}", f"{row.GB:,.0f}")
        table.add_row(row.Index, *numbers, f"{row.steps:,}", f"{row.samples:,}")
    return table


def table_of(
    model: str, batch: int, total: float | None, tasks: int, wanted: Sequence[str]
) -> Table:
    """A row a method under one total, in memory-adjusted GFLOPs; by default what `cpu` costs."""
    full = measured_cost(method_config(model, batch, "full"))
    if total is None:
        total = tasks * config.profile("cpu")["training"]["steps"] * full.step / GIGA
    if not total > 0:
        raise CmpError(f"--total: {total:g} memory-adjusted GFLOPs; must be above 0")
    title = f"{model}, batch {batch}: {total:,.4g} memory-adjusted GFLOPs over {tasks} tasks"
    columns = ("GFLOPs", "GB", "x full", "GMAFs", "at end", "steps", "samples")
    table = narrow_table(title, columns)
    for text in wanted:
        found = measured_cost(method_config(model, batch, text))
        table.add_row(
            text,
            *method_cells(found, budgets.make_budget(total * GIGA / tasks, found, full), batch),
        )
    return table


def narrow_table(title: str, columns: tuple[str, ...], first: str = "method") -> Table:
    """A table that fits 80 characters without cutting a number."""
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    table.add_column(first, min_width=12, overflow="fold")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def giga(flops: float) -> str:
    """GFLOPs, with decimals where they are few."""
    return f"{flops / GIGA:,.0f}" if flops >= 1e3 * GIGA else f"{flops / GIGA:.2f}"


def method_cells(found: Cost, allowed: budgets.Budget, batch: int) -> tuple[str, ...]:
    """A method's row."""
    return (
        giga(found.step),
        f"{found.memory / GIGA:.3f}",
        f"{allowed.multiplier:.4f}",
        giga(allowed.step),
        giga(allowed.end),
        f"{allowed.steps:,}" if allowed.steps else "none fits",
        f"{allowed.steps * batch:,}",
    )


def table_4() -> Table:
    """The paper's rows at T = 20: its steps by its own rule, by ours, and from what we count."""
    columns = ("GFLOPs", "ours", "x full", "ours", "steps", "its rule", "once", "all ours")
    title = f"Table 4: {paper.TABLE4_MODEL}, batch {paper.TABLE4_BATCH}, T = {paper.TABLE4_TASKS}"
    table = narrow_table(title, columns)
    full = measured_cost(method_config(paper.TABLE4_MODEL, paper.TABLE4_BATCH, "full"))
    allowed = paper.TABLE4_TOTAL * GIGA / paper.TABLE4_TASKS
    for label, row in paper.TABLE4.items():
        found = measured_cost(method_config(paper.TABLE4_MODEL, paper.TABLE4_BATCH, row.method))
        ours = budgets.make_budget(allowed, found, full)
        table.add_row(
            label,
            giga(row.gflops * GIGA), giga(found.step),
            f"{row.multiplier:.4f}", f"{ours.multiplier:.4f}",
            f"{row.steps:,}",
            f"{paper_steps(paper.TABLE4_TOTAL, paper.TABLE4_TASKS, row.gflops, row.multiplier):,}",
            f"{paper.budget_charged_once(row).steps:,}",
            f"{ours.steps:,}",
        )  # fmt: skip
    return table


def _listed(words: dict[str, object]) -> str:
    return ", ".join(words)


def plan(
    model: Annotated[str, typer.Option(help="An embedded model or any of open_clip's.")] = "tiny",
    updates: Annotated[int, typer.Option(help="How many updates there will be.")] = 8,
    images: Annotated[
        int | None, typer.Option(help="Images of each, on average; those of the benchmark.")
    ] = None,
    gpu_hours: Annotated[
        float | None, typer.Option(help="Hours on the device, for training all updates.")
    ] = None,
    gmafs: Annotated[
        float | None, typer.Option(help="Or memory-adjusted GFLOPs in all, as the paper has it.")
    ] = None,
    device: Annotated[str, typer.Option(help=f"One of {_listed(DEVICES)}.")] = "h100",
    keep: Annotated[str, typer.Option(help=f"What must be kept: {_listed(KEEP)}.")] = "balance",
    new: Annotated[str, typer.Option(help=f"What is new in updates: {_listed(NEW)}.")] = "both",
    pool: Annotated[float, typer.Option(help="Part of the pretraining data at hand.")] = 0.1,
    other_pool: Annotated[
        bool, typer.Option("--other-pool", help="Public data would stand in for them.")
    ] = False,
    buffer: Annotated[
        int | None, typer.Option(help="Images of earlier updates that can be kept; all.")
    ] = None,
) -> None:
    """Print a file for `cmpt run FILE`: its costs, where such runs ended, and why, as comments."""
    wish = PlanRequest(
        model, updates, images, gpu_hours, gmafs, device, keep, new,
        0.0 if other_pool else pool, other_pool, buffer,
    )  # fmt: skip
    typer.echo(
        planner.plan_as_yaml(planner.make_plan(wish, evidence.gather_evidence())),
        nl=False,
    )


def doctor(
    settings: Annotated[list[str] | None, typer.Argument(help="key=value ...")] = None,
    profile: Annotated[str | None, typer.Option(help="quick, cpu, gpu, or FILE.yaml.")] = None,
    device: Device = None,
) -> None:
    """Check the set-up, or with --profile what a run needs; status 1 if anything is missing."""
    if profile is None:
        checks = forecast.check_setup()
    else:
        run_config = read_config(profile, settings or [])
        checks = forecast.check_run(run_config, place(profile, device))
        console.print(forecast.describe_steps(run_config), highlight=False)
    table = Table(box=None, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for check in checks:
        table.add_row(check.what, check.state, check.sentence)
    console.print(table)
    if forecast.MISSING in [check.state for check in checks]:
        raise typer.Exit(1)


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


def bench(
    name: Annotated[str, typer.Argument(help=", ".join(BENCHMARKS))],
    model: Annotated[list[str] | None, typer.Option(help="Again for more than one.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Times that each alternative runs.")] = 15,
    batch: Annotated[
        int | None, typer.Option(min=2, help="Samples a step; 128, mid 64, ViT-B-16 512.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Torch threads.")] = 1,
) -> None:
    """Measure ratios, alternatives in turn within this process; they go to a JSON file too.

    Each is the median over rounds, with the 10-90 % range of the rounds.
    """
    if name not in BENCHMARKS:
        raise CmpError(f"no benchmark is called {name!r}; there are {', '.join(BENCHMARKS)}")
    module, models = BENCHMARKS[name]
    torch.set_num_threads(threads)
    measure = getattr(importlib.import_module(f"cmp.bench.{module}"), name)
    report = measure(model or list(models), packed.load_embedded(), rounds, batch)
    console.print(report.table())
    for note in report.notes:
        console.print(note, highlight=False)
    console.print(f"written: {report.write()}", highlight=False)
