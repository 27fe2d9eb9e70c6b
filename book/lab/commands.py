"""The commands of a checkout: those that compute, print and open the book, and that make its data
and bases."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cmp.cli import shared
from cmp.errors import CmpError
from cmp.files import SHORT_ID
from cmp.project import build_folder

if TYPE_CHECKING:
    from lab.evidence.studies import StudyPlan


def study(
    names: Annotated[list[str] | None, typer.Argument(metavar="[STUDY]...")] = None,
    profile: str | None = None,
    jobs: shared.OptionalPositive = None,
    backend: str = "local",
    device: str | None = None,
    shard: str | None = None,
    dry_run: bool = False,
    publish: bool = False,
    pause: bool = False,
    resume: bool = False,
) -> None:
    """Compute the missing runs of one or more studies, in the given order.

    If the command is stopped or killed, repeat it to continue.

    Args:
        names: Names of studies, such as front.
        profile: Size of the runs: quick, cpu or gpu. Default: that of the study.
        jobs: Number of runs at a time, each on one thread. Default: 2, or one per GPU.
        backend: Where runs are computed: local, or ray for the cluster at RAY_ADDRESS.
        device: Device: cpu or cuda. Default: cuda for profile gpu, otherwise cpu.
        shard: Compute only part i of n of the runs, given as i/n. Default: all runs.
        publish: Write the metrics of each study to book/results once all its runs are computed.
        pause: Pause all studies of this build folder after the runs in progress.
        resume: Continue the studies that --pause stopped.

    Example:
        cmpt study front merging --jobs 2 --publish
    """
    from cmp import config, starts
    from cmp.runs import preflight
    from lab.evidence import real, results, studies, workers

    if pause or resume:
        others = (profile, jobs, device, shard, dry_run, publish, backend != "local")
        if names or (pause and resume) or any(others):
            raise CmpError(
                "study: --pause and --resume are for all studies; give one of them alone. To "
                "continue a study that was stopped, repeat its command without them"
            )
        workers.pause_studies(pause)
        words = "are paused; `cmpt study --resume` continues them" if pause else "go on"
        typer.echo(f"the studies in {build_folder()} {words}")
        return
    if not names:
        raise CmpError("study: give the name of one or more studies, such as front")
    if backend not in studies.BACKENDS:
        raise CmpError(f"--backend: {backend!r}: choose from {', '.join(studies.BACKENDS)}")
    grids = [studies.load_study(name) for name in names]
    profiles = {profile} if profile else {grid.profile for grid in grids}
    if len(profiles) > 1:
        raise CmpError(f"study: {' and '.join(names)} use different profiles; give --profile")
    [profile] = profiles
    if publish and (profile != "cpu" or shard):
        why = f"the book needs the cpu profile, not {profile!r}"
        raise CmpError(f"--publish: {'needs all runs; drop --shard' if shard else why}")
    usual = config.parse(config.profile(profile), profile).model.name
    device = starts.default_device(usual, device)
    is_foreign, plans = profile in config.FOREIGN_MODEL_PROFILES, {}
    for grid in grids:
        if grid.name == real.STUDY and not dry_run:
            real.prepare_data(typer.echo)
        restored = results.restore_runs(grid, profile, dry_run)
        # full runs take hours, so for studies written for smaller runs, compute each live setting
        # once
        is_live_only = is_foreign and grid.profile != profile
        runs = grid.configs(profile, 1, live_only=True) if is_live_only else grid.configs(profile)
        if dry_run and is_foreign:
            typer.echo("\n".join(preflight.describe_study(runs, device)))
            continue
        part = studies.shard_runs([*runs.values()], shard or "1/1")
        plans[grid.name] = plan = studies.plan_study(part, device)
        typer.echo(f"{grid.question}\nstudy {grid.name}, {profile}: {plan}")
        if dry_run and restored:
            typer.echo(f"{restored} published runs would be restored, not computed")
    if not dry_run:
        compute_programme(plans, jobs or workers.default_jobs(device), device, backend, publish)
    if real.STUDY in plans and not shard and not dry_run:
        page = real.write_page(studies.load_study(real.STUDY).configs(profile))
        typer.echo(f"{page.read_text()}\nwritten: {page}, and the same as a table in CSV")


def compute_programme(
    plans: "dict[str, StudyPlan]", jobs: int, device: str, backend: str, publish: bool
) -> None:
    """Compute the runs of several studies with one progress bar. A failed study does not stop
    others.

    Args:
        plans: The work of each study.
        jobs: The number of runs at a time.
        device: "cpu" or "cuda".
        backend: One of `lab.evidence.studies.BACKENDS`.
        publish: Whether to publish each study as soon as it is computed.

    Raises:
        CmpError: At the end, if studies failed; the message says which and why.
    """
    from tqdm import tqdm

    from lab.evidence import results, studies, workers

    if workers.pause_file().exists():
        typer.echo("studies are paused; run `cmpt study --resume` to continue them")
    times = [times for plan in plans.values() for times in plan.todo.items()]
    weights = {run: max(1, round(seconds)) for run, seconds in times}
    failures: list[str] = []
    form = "{l_bar}{bar}| {n_fmt} of {total_fmt} core-s, {elapsed}<{remaining}"
    with tqdm(total=sum(weights.values()), bar_format=form) as bar:
        for name, plan in plans.items():
            bar.set_description(f"study {name}")
            try:
                todo = list(plan.todo)
                studies.compute_runs(todo, jobs, device, backend, lambda x: bar.update(weights[x]))
                if publish:
                    bar.write(f"published: {results.publish_study(studies.load_study(name))}")
            except CmpError as error:
                failures.append(f"study {name}: {error}")
    if failures:
        raise CmpError("\n".join(failures))


def book(
    profile: str = "quick",
    chapter: list[str] | None = None,
    parameter: Annotated[list[str] | None, typer.Option("--parameter", "-P")] = None,
    seeds: shared.Positive = 1,
    jobs: shared.Positive = 1,
    dry_run: bool = False,
    publish: bool = False,
) -> None:
    """Execute the chapters with papermill, skipping notebooks that are up to date.

    Args:
        profile: Size of the runs: quick, cpu or gpu.
        chapter: Number of a chapter, such as 01; repeat for more. Default: all chapters.
        parameter: Set a parameter of the chapters, as name=value; repeat for more. Several values,
            as name=value,value, make a grid for one chapter, with a notebook per point and an
            index.
        seeds: Number of streams per point of a grid.
        jobs: Number of chapters at a time.
        publish: Write the committed notebooks, with the default parameters. With --dry-run, the
            exit status is 1 if one is stale.

    Example:
        cmpt book --chapter 04 -P peak=0.0008,0.0016 --seeds 3
    """
    from lab import grids, run

    if publish:
        if parameter or profile != "quick" or seeds > 1:
            options = "--profile, --seeds and -P"
            raise CmpError(f"--publish: uses the default parameters; leave out {options}")
        if not dry_run:
            run.commit_notebooks(chapter, jobs)
        elif not run.check_committed(chapter, jobs):
            raise typer.Exit(1)
        return
    given = parameter or []
    if wrong := [assignment for assignment in given if "=" not in assignment]:
        raise CmpError(f"-P {wrong[0]!r}: expected name=value, such as seeds=3")
    parameters = dict(assignment.split("=", 1) for assignment in given)
    if "profile" in parameters:
        raise CmpError("-P profile: give it as --profile")
    if seeds > 1 or any("," in text for text in parameters.values()):
        if len(chapter or []) != 1:
            raise CmpError("-P: a grid needs one chapter; add --chapter, such as --chapter 04")
        grids.run_grid(profile, *chapter, parameters, seeds, jobs, dry_run)
        return
    run.run_book(profile, chapter, parameters, jobs, dry_run)


def site(picture: bool = False, predictions: bool = False) -> None:
    """Build the book as static pages. The first build downloads the theme's packages.

    Args:
        picture: Only draw the images of the first page and of README.
        predictions: Only train the models of the first screen, about a minute for each setting, and
            store their predictions.

    Example:
        cmpt site
    """
    from lab import figures, first_screen
    from lab.site import make_site

    if picture and predictions:
        raise CmpError("site: give only one of --picture and --predictions")
    if predictions:
        typer.echo(f"stored: {first_screen.write_predictions()}")
        return
    if picture:
        typer.echo(f"drawn: {figures.write_idea()}")
        typer.echo(f"drawn: {first_screen.write_picture()}")
        return
    pages = make_site()
    typer.echo(f"the book: {pages}")
    folder = shlex.quote(str(pages))
    typer.echo(f"to read it: python3 -m http.server --bind 127.0.0.1 --directory {folder}")


def lab(
    arguments: Annotated[list[str] | None, typer.Argument(metavar="[OPTION]...")] = None,
    diff: str | None = None,
    reset: str | None = None,
    prepare: bool = False,
) -> None:
    """Open your own copies of the chapters in JupyterLab. Updates of the book do not change them.

    Args:
        arguments: Options for JupyterLab, after --, such as -- --port 9000.
        diff: Show how your copy of a chapter, such as 04, differs from the book's.
        reset: Replace your copy of a chapter with the book's version, and keep yours beside it.
        prepare: Make the copies without opening them.

    Example:
        cmpt lab --diff 04
    """
    from lab import reader

    if sum(map(bool, (diff, reset, prepare))) > 1:
        raise CmpError("lab: give only one of --diff, --reset and --prepare")
    if diff:
        typer.echo(reader.diff_chapter(diff) or "your copy is the same as the book's")
        return
    if reset:
        typer.echo(f"your version: {reader.reset_chapter(reset)}")
        return
    for name, note in (reader.prepare_copies() | reader.fetch_scripts()).items():
        if note:
            typer.echo(f"{name}: {note}")
    if prepare:
        typer.echo(f"the copies: {reader.copies_folder()}")
        return
    raise typer.Exit(reader.open_lab(arguments or []))


def build(names: shared.OptionalArguments = None, jobs: shared.OptionalPositive = None) -> None:
    """Download, render and pack embedded datasets that are missing or out of date.

    Args:
        names: Names of embedded datasets. Default: all.
        jobs: Number of processes. Default: one per core.

    Example:
        cmpt data build new-flags
    """
    from benchmark.build import build_datasets
    from cmp.embedded import manifest

    built = build_datasets(names, jobs)
    current = len(manifest.select_datasets(names)) - len(built)
    typer.echo(f"{len(built)} datasets built, {current} up to date")


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

    Comments in the file give its costs, and the advice that applies.

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
    from lab.evidence import planner

    request = planner.PlanRequest(
        model, updates, images, gpu_hours, gmafs, device, keep, pool, other_pool, buffer, start
    )
    typer.echo(planner.plan_as_yaml(planner.make_plan(request)), nl=False)


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

    from benchmark import pretraining
    from cmp import budgets
    from cmp.cli.computing import progress_observer
    from cmp.embedded import models as embedded_models
    from cmp.embedded import packed

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


def verify(
    run_id: shared.OptionalArgument = None,
    sample: shared.OptionalPositive = None,
    seed: Annotated[int | None, typer.Option(min=0)] = None,
    device: str | None = None,
    micro_batch: shared.OptionalPositive = None,
    checkpoint_activations: bool = False,
) -> None:
    """Compute a run again and compare it with the stored one.

    The result is "bitwise equal", "within tolerance", or "different". If it is different, the exit
    status is 1.

    Args:
        run_id: Id of a published or stored run, or its first digits. Default: a sample of the
            published runs.
        sample: Number of published runs to draw at random, if no id is given. Default: 1.
        seed: Seed of the draw. Default: 0.
        device: Device: cpu or cuda. Default: the one on which the run was computed.

    Example:
        cmpt results verify --sample 3 --seed 7
    """
    from tqdm import tqdm

    from cmp import budgets
    from cmp.cli.computing import progress_observer
    from cmp.scale.execution import ExecutionConfig
    from lab.evidence import results

    if run_id:
        shared.refuse_options("draws published runs; leave out the id", sample=sample, seed=seed)
    chosen = (
        [results.find_run(run_id)] if run_id else results.sample_published(sample or 1, seed or 0)
    )
    if not chosen:
        raise CmpError(
            f"{results.RESULTS}: nothing is published; run this in a checkout of the project, or "
            "publish a study with `cmpt study NAME --publish`"
        )
    answers, execution = set(), ExecutionConfig(micro_batch, checkpoint_activations)
    for run in chosen:
        total = budgets.total_steps(run.config)
        with tqdm(total=total, desc="verify", unit=" steps") as bar:
            place = device or ("cpu" if run.provenance.get("device") == "cpu" else "cuda")
            observer = progress_observer(bar)
            verdict = results.verify_published(run, observer, place, execution)
        typer.echo(f"{run.id[:SHORT_ID]}: {verdict.answer}: {verdict.sentence}")
        answers.add(verdict.answer)
    if "different" in answers:
        raise typer.Exit(1)
