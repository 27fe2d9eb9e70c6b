"""The commands `study`, `book`, `site` and `lab`, which compute and open the book."""

import shlex
from typing import TYPE_CHECKING, Annotated

import typer

from cmp.cli import shared
from cmp.errors import CmpError, ReportedFault
from cmp.project import build_folder, project_folder

if TYPE_CHECKING:
    from cmp.experiments.studies import StudyPlan


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
    from cmp.experiments import preflight, real, results, studies, workers

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
    if publish and not (project_folder() / "book" / "studies").is_dir():
        raise CmpError("--publish: writes to book/results; run this in a checkout of the project")
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
        backend: One of `cmp.experiments.studies.BACKENDS`.
        publish: Whether to publish each study as soon as it is computed.

    Raises:
        CmpError: At the end, if studies failed; the message says which and why.
    """
    from tqdm import tqdm

    from cmp.experiments import results, studies, workers

    if workers.pause_file().exists():
        typer.echo("studies are paused; run `cmpt study --resume` to continue them")
    times = [times for plan in plans.values() for times in plan.todo.items()]
    weights = {run: max(1, round(seconds)) for run, seconds in times}
    failures: list[str] = []
    kind = CmpError
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
                kind = ReportedFault if isinstance(error, ReportedFault) else kind
    if failures:
        raise kind("\n".join(failures))


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
        publish: Write the committed notebooks, with the default parameters.

    Example:
        cmpt book --chapter 04 -P peak=0.0008,0.0016 --seeds 3
    """
    if publish:
        if parameter or profile != "quick" or seeds > 1:
            options = "--profile, --seeds and -P"
            raise CmpError(f"--publish: uses the default parameters; leave out {options}")
        shared.import_lab("run").commit_notebooks(chapter, jobs, dry_run)
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
        grids = shared.import_lab("grids")
        grids.run_grid(profile, *chapter, parameters, seeds, jobs, dry_run)
        return
    shared.import_lab("run").run_book(profile, chapter, parameters, jobs, dry_run)


def site(picture: bool = False, predictions: bool = False, pdf: bool = False) -> None:
    """Build the book as static pages. The first build downloads the theme's packages.

    Args:
        picture: Only draw the images of the first page and of README.
        predictions: Only train the models of the first screen, about a minute for each setting, and
            store their predictions.
        pdf: Also print the book and the card "Keep CLIP current" to PDF, with an installed
            chromium.

    Example:
        cmpt site
    """
    if sum((picture, predictions, pdf)) > 1:
        raise CmpError("site: give only one of --picture, --predictions and --pdf")
    if predictions:
        typer.echo(f"stored: {shared.import_lab('first_screen').write_predictions()}")
        return
    if picture:
        typer.echo(f"drawn: {shared.import_lab('figures').write_idea()}")
        typer.echo(f"drawn: {shared.import_lab('first_screen').write_picture()}")
        return
    pages = shared.import_lab("site").make_site()
    typer.echo(f"the book: {pages}")
    if pdf:
        for path in shared.import_lab("printing").print_book(pages):
            typer.echo(f"printed: {path}")
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
    if sum(map(bool, (diff, reset, prepare))) > 1:
        raise CmpError("lab: give only one of --diff, --reset and --prepare")
    reader = shared.import_lab("reader")
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
