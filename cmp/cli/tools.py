"""The commands `merge`, `plan`, `doctor`, `pretrain` and `bench`, which support runs."""

import itertools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tqdm import tqdm

from cmp import starts
from cmp.cli import shared
from cmp.errors import CmpError, did_you_mean
from cmp.merging.files import merge_files
from cmp.merging.rules import MergeOptions, tensor_settings
from cmp.project import build_folder
from cmp.registry import Option, get_option


def merge(
    rule: str,
    models: list[Path],
    out: Annotated[Path | None, typer.Option("--out", "-o")] = None,
    base: Path | None = None,
    weights: str | None = None,
    scale: float | None = None,
    density: float | None = None,
    outliers: float | None = None,
    alpha: float | None = None,
    beta: float | None = None,
    protect: float | None = None,
    seed: shared.NotNegative = 0,
    candidates: Annotated[list[str] | None, typer.Option("--try", metavar="KEY=VALUE,...")] = None,
    model: str | None = None,
    data: str | None = None,
    threads: shared.Threads = 1,
    device: str | None = None,
) -> None:
    """Merge safetensors files into one, tensor by tensor.

    The metadata of the new file name the merged files. With --try, nothing is written: merges with
    each value are scored on the validation images of --data.

    Args:
        rule: Merge rule, such as ties; `cmpt config merging` lists all. opcm and tsv decompose each
            matrix: for two ViT-B/16, this takes one or two minutes on one core. All others take
            seconds.
        models: Safetensors files to merge, newest first.
        out: File to write, NAME.safetensors. Only an earlier merge is replaced.
        base: Weights that the models were trained from, for rules on task vectors.
        weights: Weight of each model, such as 0.7,0.3. Default: equal weights.
        scale: Factor of the merged task vector. Default: that of the rule.
        density: Fraction of a task vector's entries to keep, 0 to 1. Default: 0.3.
        outliers: Fraction of the largest entries to drop, 0 to 1. Default: 0.01.
        alpha: Factor of the first block, for rule lines. Default: 0.5.
        beta: Increase of the factor from the first to the last block, for rule lines. Default: 0.5.
        protect: Leading directions of earlier models that later ones must not change, for rule
            opcm, as a fraction of the sum of singular values. Default: 0.5.
        seed: Seed for rules with random draws.
        candidates: Values of a setting to compare, such as density=0.1,0.3, or
            weight=0.1,0.25,0.5 for the weight of the newest model; repeat for combinations.
        model: Network of the files, for --try: one of this book's own models, such as small, or an
            open_clip model.
        data: Data to score on, for --try: embedded, fomo, or a folder of manifests. Default:
            embedded.
        device: Device for scoring, for --try: cpu or cuda. Default: cpu for this book's own models,
            otherwise cuda.

    Example:
        cmpt merge ties new.safetensors old.safetensors --base start.safetensors -o out.safetensors
    """
    if bool(candidates) == bool(out):
        raise CmpError(
            "give either -o FILE to write a merge or --try KEY=VALUES to compare settings"
        )
    torch.set_num_threads(threads)
    settings = {"scale": scale, "density": density, "outliers": outliers, "alpha": alpha,
                "beta": beta, "protect": protect}  # fmt: skip
    given = {key: value for key, value in settings.items() if value is not None}
    given |= {"weights": parse_weights(weights), "draw": (seed,)}
    if out is None:
        if model is None:
            raise CmpError("--try: give the network of the files with --model, such as small")
        source = data or "embedded"
        try_settings(rule, models, base, given, candidates or [], model, source, device)
        return
    shared.refuse_options("needs --try", model=model, data=data, device=device)
    shared.check_out(out, suffix=".safetensors")
    total = merged_bytes([*models, *([base] if base else [])])
    with tqdm(total=total, desc=rule, unit="B", unit_scale=True, disable=None) as bar:
        merge_files(rule, models, out, base, bar.update, **given)
    typer.echo(f"{out}: {rule} of {len(models)} models")


def try_settings(
    rule: str,
    paths: Sequence[Path],
    base: Path | None,
    given: dict[str, Any],
    candidates: Sequence[str],
    model: str,
    data: str,
    device: str | None,
) -> None:
    """Score merges with each combination of settings on validation images, and print a table.

    Args:
        rule: The rule.
        paths: The files to merge, newest first. They are also scored.
        base: The weights that they were trained from.
        given: The settings shared by all merges.
        candidates: The values to compare, as "key=value,value" for one key each.
        model: The network of the files.
        data: The data to score on.
        device: The device for scoring.

    Raises:
        CmpError: A candidate cannot be read, the rule does not take it, or torch cannot use the
            device.
    """
    from cmp import evaluation, models
    from cmp.data import load_data
    from cmp.scale import devices

    option = get_option("merge_rule", rule)
    trials = candidate_settings(option, candidates, len(paths))
    merged_bytes([*paths, *([base] if base else [])])
    for trial in trials.values():  # before computing anything
        MergeOptions.make(option, len(paths), **given | trial)
    devices.check_device(device := starts.default_device(model, device))
    corpus, rows = load_data(data), []

    def score(label: str, path: Path) -> None:
        network = models.load_from_file(model, path).to(device)
        scores = evaluation.evaluate(network, model, corpus, "validation")
        summary = scores.summary()
        cells = [
            shared.score_text(value)
            for key in evaluation.ROLES
            for value in (
                (summary[key], scores.aggregate(key)[1]) if key in summary else (None,) * 2
            )
        ]
        rows.append((label, *cells, shared.score_text(summary.get("GM"))))

    with (
        tempfile.TemporaryDirectory() as folder,
        tqdm(total=len(paths) + len(trials), desc=rule, disable=None) as bar,
    ):
        for path in paths:
            score(path.name, path)
            bar.update()
        for label, trial in trials.items():
            merged = Path(folder) / "merged.safetensors"
            merge_files(rule, paths, merged, base, **given | trial)
            score(label, merged)
            bar.update()
    columns = [rule, *(column for key in evaluation.ROLES for column in (key, "s.e.")), "GM"]
    shared.print_table(columns, rows, f"{model}, validation, in percent")


def candidate_settings(
    rule: Option, candidates: Sequence[str], count: int
) -> dict[str, dict[str, Any]]:
    """Return the settings of each combination of candidates, by its label in the table.

    Args:
        rule: The rule.
        candidates: "key=value,value" for one key each. "weight" is that of the newest model, and
            the others share the rest.
        count: The number of models to merge.

    Raises:
        CmpError: A candidate does not have this form, the rule does not take its key, or a key is
            given twice.
    """
    known = [*(["weight"] if "weight" in rule.settings else []), *tensor_settings(rule)]
    choices = []
    for text in candidates:
        key, _, values = text.partition("=")
        if key not in known:
            takes = f"{rule.name!r} takes {', '.join(known) or 'no settings'}"
            raise CmpError(f"--try {text}: {takes}, not {key!r}{did_you_mean(key, known)}")
        try:
            choices.append([(key, float(value)) for value in values.split(",")])
        except ValueError as error:
            raise CmpError(f"--try {text}: expected numbers, such as weight=0.1,0.5") from error
    keys = [text.partition("=")[0] for text in candidates]
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise CmpError(
            f"--try: {twice[0]!r} is given twice; give all its values at once, as in "
            f"{twice[0]}=0.1,0.3"
        )
    found = {}
    for combination in itertools.product(*choices):
        trial: dict[str, Any] = dict(combination)
        if "weight" in trial:
            newest = trial.pop("weight")
            others = (1 - newest) / max(count - 1, 1)
            trial["weights"] = [newest, *[others] * (count - 1)]
        found[" ".join(f"{key}={value:.12g}" for key, value in combination)] = trial
    return found


def merged_bytes(paths: Sequence[Path]) -> int:
    """Return how many bytes a merge reads and writes; raise `CmpError` if a file is missing."""
    if missing := [path for path in paths if not path.is_file()]:  # a pipe may never end
        raise CmpError(f"{missing[0]}: cannot be read: no such regular file")
    sizes = [path.stat().st_size for path in paths]
    return sum(sizes) + sizes[0]


def parse_weights(text: str | None) -> list[float] | None:
    """Return the numbers in `--weights`; raise `CmpError` if they are not numbers."""
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
        device: Device of the plan: h100, a100, rtx-4090, l40s, l40, l4, t4 or core.
        keep: What matters more: balance (new and old alike), most (keep old first) or all (lose
            nothing).
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
    from cmp.cli.runs import read_config, report_checks
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
        run_config = read_config(profile, settings or [])
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
    from cmp import budgets
    from cmp.cli.runs import progress_observer
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
        name: Benchmark: step, trace or gpu.
        model: Name of a model; repeat for more. Default: the models of the benchmark.
        rounds: Number of times that each alternative runs.
        batch: Samples per step, at least 2. Default: 128; 64 for bench-mid; 512 for ViT-B-16.

    Example:
        cmpt bench step --model small
    """
    from cmp.bench import run_benchmark

    torch.set_num_threads(threads)
    report = run_benchmark(name, model, rounds, batch)
    rows = [[row.get(column, "") for column in report.columns] for row in report.rows]
    shared.print_table(report.columns, rows, report.title)
    typer.echo("\n".join([*report.notes, f"written: {report.write()}"]))
