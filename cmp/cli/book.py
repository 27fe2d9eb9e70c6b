"""`cmpt study`, `book` and `site`: the runs, the notebooks and the pages of the book."""

from typing import Annotated

import typer

from cmp import config
from cmp.cli.shared import Device, DryRun, default_device, import_lab
from cmp.errors import CmpError


def study(
    chapter: Annotated[str, typer.Argument(help="The study's number, such as 01.")],
    profile: Annotated[str, typer.Option(help="Size of the runs: quick, cpu or gpu.")] = "cpu",
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time, each on one thread.")] = 2,
    backend: Annotated[
        str, typer.Option(help="local, or ray for the cluster at RAY_ADDRESS.")
    ] = "local",
    device: Device = None,
    shard: Annotated[
        str | None, typer.Option(help="i/n: compute the i-th of n parts. Default: all.")
    ] = None,
    dry_run: DryRun = False,
    force: Annotated[bool, typer.Option("--force", help="Exceed the chapter's budget.")] = False,
    publish: Annotated[
        bool, typer.Option("--publish", help="Write book/results at the end.")
    ] = False,
) -> None:
    """Compute the runs of a chapter's study that are not stored.

    Stopped or killed, the same command goes on where it was.

    Example: cmpt study 01 --jobs 4
    """
    from cmp.experiments import preflight, results, studies
    from cmp.experiments.claims import claims_of

    if backend not in studies.BACKENDS:
        raise CmpError(f"--backend: {backend!r}: there are {', '.join(studies.BACKENDS)}")
    if publish and profile != "cpu":
        raise CmpError(f"--publish: the book argues from the cpu profile, not from {profile!r}")
    if publish and shard:
        raise CmpError("--publish: a shard is not the whole study; publish when all are computed")
    device, grid = default_device(profile, device), studies.load_study(chapter)
    claims_of(grid)  # a claim that is wrong is refused now, not after hours of runs
    # a full run takes hours: of a model that is not embedded, the live settings once each
    is_own = profile in config.OWN_MODEL_PROFILES
    runs = grid.configs(profile, 1, live_only=True) if is_own else grid.configs(profile)
    if dry_run and is_own:
        typer.echo("\n".join(preflight.describe_study(runs, device)))
        return
    configs = list(runs.values())
    if shard:
        configs = studies.shard_runs(configs, shard)
    plan = studies.plan_study(configs, device)
    typer.echo(f"{grid.question}\nstudy {chapter}, {profile}: {plan}")
    if dry_run:
        return
    if profile == "cpu" and not force:
        plan.check_budget()
    studies.compute_runs(configs, jobs, device, backend)
    if publish:
        typer.echo(f"published: {results.publish_study(grid, profile)}")


def book(
    profile: Annotated[str, typer.Option(help="Size of the runs: quick, cpu or gpu.")] = "quick",
    chapter: Annotated[
        list[str] | None,
        typer.Option(help="A chapter's number, such as 01; repeat it for more. Default: all."),
    ] = None,
    parameter: Annotated[
        list[str] | None,
        typer.Option("--parameter", "-P", help="name=value for the chapters; repeat it for more."),
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Chapters at a time.")] = 1,
    dry_run: DryRun = False,
    publish: Annotated[
        bool, typer.Option("--publish", help="Write the committed notebooks instead.")
    ] = False,
) -> None:
    """Run the chapters through papermill; notebooks that are up to date are skipped.

    Example: cmpt book --chapter 01 -P seeds=2
    """
    if publish:
        if parameter or dry_run:
            raise CmpError("--publish runs the defaults: leave out -P and --dry-run")
        import_lab("commit_notebooks").commit_notebooks(chapter, jobs)
        return
    parameters = {}
    for assignment in parameter or []:
        name, equals, value = assignment.partition("=")
        if not equals:
            raise CmpError(f"-P {assignment!r}: expected name=value, such as seeds=3")
        parameters[name] = value
    import_lab("run").run_book(profile, chapter, parameters, jobs, dry_run)


def site(
    picture: Annotated[
        bool, typer.Option("--picture", help="Draw the first page's picture again instead.")
    ] = False,
) -> None:
    """Build the book's pages; offline, once the packages of the theme are fetched.

    Example: cmpt site
    """
    if picture:
        typer.echo(f"drawn: {import_lab('figures').write_idea()}")
        return
    typer.echo(f"the book: {import_lab('site').make_site()}")
    typer.echo("to read it: python3 -m http.server --bind 127.0.0.1 --directory _build/html")
