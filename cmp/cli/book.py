"""`cmpt study`, `book` and `site`: the runs, the notebooks and the pages of the book."""

from typing import Annotated

import typer

from cmp import config
from cmp.cli import shared
from cmp.errors import CmpError


def study(
    chapter: str,
    profile: str = "cpu",
    jobs: shared.Positive = 2,
    backend: str = "local",
    device: str | None = None,
    shard: str | None = None,
    dry_run: bool = False,
    force: bool = False,
    publish: bool = False,
) -> None:
    """Compute the runs of a chapter's study that are not stored.

    Stopped or killed, the same command goes on where it was.

    Args:
        chapter: The study's number, such as 01.
        profile: Size of the runs: quick, cpu or gpu.
        jobs: Runs at a time, each on one thread.
        backend: local, or ray for the cluster at RAY_ADDRESS.
        shard: i/n, to compute the i-th of n parts only. Default: all runs.
        force: Compute more than a chapter's budget allows.
        publish: Write the metrics to book/results at the end.

    Example:
        cmpt study 01 --jobs 4
    """
    from cmp.experiments import preflight, results, studies
    from cmp.experiments.claims import claims_of

    if backend not in studies.BACKENDS:
        raise CmpError(f"--backend: {backend!r}: there are {', '.join(studies.BACKENDS)}")
    if publish and profile != "cpu":
        raise CmpError(f"--publish: the book argues from the cpu profile, not from {profile!r}")
    if publish and shard:
        raise CmpError("--publish: a shard is not the whole study; publish when all are computed")
    device, grid = shared.default_device(profile, device), studies.load_study(chapter)
    claims_of(grid)  # a wrong claim is refused now, not after hours of runs
    # a full run takes hours: of a model that is not embedded, the live settings once each
    is_foreign = profile in config.FOREIGN_MODEL_PROFILES
    runs = grid.configs(profile, 1, live_only=True) if is_foreign else grid.configs(profile)
    if dry_run and is_foreign:
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
    profile: str = "quick",
    chapter: list[str] | None = None,
    parameter: Annotated[list[str] | None, typer.Option("--parameter", "-P")] = None,
    jobs: shared.Positive = 1,
    dry_run: bool = False,
    publish: bool = False,
) -> None:
    """Run the chapters through papermill; notebooks that are up to date are skipped.

    Args:
        profile: Size of the runs: quick, cpu or gpu.
        chapter: A chapter's number, such as 01; repeat it for more. Default: all.
        parameter: name=value for the chapters; repeat it for more.
        jobs: Chapters at a time.
        publish: Write the committed notebooks instead.

    Example:
        cmpt book --chapter 01 -P seeds=2
    """
    if publish:
        if parameter or dry_run:
            raise CmpError("--publish runs the defaults: leave out -P and --dry-run")
        shared.import_lab("run").commit_notebooks(chapter, jobs)
        return
    given = parameter or []
    if wrong := [assignment for assignment in given if "=" not in assignment]:
        raise CmpError(f"-P {wrong[0]!r}: expected name=value, such as seeds=3")
    parameters = dict(assignment.split("=", 1) for assignment in given)
    shared.import_lab("run").run_book(profile, chapter, parameters, jobs, dry_run)


def site(picture: bool = False) -> None:
    """Build the book's pages; offline, once the packages of the theme are fetched.

    Args:
        picture: Draw the picture of the first page again instead.

    Example:
        cmpt site
    """
    if picture:
        typer.echo(f"drawn: {shared.import_lab('figures').write_idea()}")
        return
    typer.echo(f"the book: {shared.import_lab('site').make_site()}")
    typer.echo("to read it: python3 -m http.server --bind 127.0.0.1 --directory _build/html")
