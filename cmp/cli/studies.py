"""`cmpt study`: a chapter's grid of runs."""

from typing import Annotated

import typer

from cmp import config
from cmp.cli.shared import Device, console, import_lab, place
from cmp.errors import CmpError
from cmp.experiments import forecast, results, studies
from cmp.experiments.claims import claims_of


def study(
    chapter: Annotated[str, typer.Argument(help="The chapter's number, such as 01.")],
    profile: Annotated[str, typer.Option(help="quick, cpu or gpu.")] = "cpu",
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time, each on one thread.")] = 2,
    backend: Annotated[str, typer.Option(help="local, or ray for a cluster.")] = "local",
    device: Device = None,
    shard: Annotated[str | None, typer.Option(help="i/n: the i-th of n parts only.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan only.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Go over the chapter's budget.")] = False,
    publish: Annotated[bool, typer.Option("--publish", help="Write book/results.")] = False,
) -> None:
    """Compute the missing runs of a chapter's study; stopped or killed, it goes on where it was."""
    if backend not in studies.BACKENDS:
        raise CmpError(f"--backend: {backend!r}: there are {', '.join(studies.BACKENDS)}")
    if publish and profile != "cpu":
        raise CmpError(f"--publish: the book argues from the cpu profile, not from {profile!r}")
    if publish and shard:
        raise CmpError("--publish: a shard is not the whole study; publish when all are computed")
    device, grid = place(profile, device), studies.load_study(chapter)
    claims_of(grid)  # what it is to show is refused now, not after hours of runs
    # a full run takes hours: of a model that is not embedded, the live settings, once each
    own = profile in config.OWN_MODEL_PROFILES
    asked = grid.configs(profile, 1, live_only=True) if own else grid.configs(profile)
    if dry_run and own:
        console.print("\n".join(forecast.describe_study(asked, device)), highlight=False)
        return
    configs = list(asked.values())
    if shard:
        configs = studies.shard_runs(configs, shard)
    console.print(grid.question, highlight=False)
    plan = studies.plan_study(configs, device)
    console.print(f"study {chapter}, {profile}: {plan}", highlight=False)
    if dry_run:
        return
    if profile == "cpu" and not force:
        plan.check_budget()
    studies.compute_runs(configs, jobs, device, backend)
    if publish:
        console.print(f"published: {results.publish_study(grid, profile)}", highlight=False)


def run_book(
    profile: Annotated[str, typer.Option(help="quick, cpu or gpu.")] = "quick",
    chapter: Annotated[
        list[str] | None, typer.Option(help="A chapter's number, such as 01; all by default.")
    ] = None,
    parameter: Annotated[
        list[str] | None, typer.Option("--parameter", "-P", help="name=value for the chapters.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Chapters at the same time.")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan only.")] = False,
    publish: Annotated[
        bool, typer.Option("--publish", help="Write the committed notebooks instead.")
    ] = False,
) -> None:
    """Run the chapters through papermill; what is current is skipped."""
    if publish:
        if parameter or dry_run:
            raise CmpError("--publish runs the defaults: leave out -P and --dry-run")
        import_lab("commit_notebooks").commit_notebooks(chapter, jobs)
        return
    given = {}
    for assignment in parameter or []:
        name, equals, value = assignment.partition("=")
        if not equals:
            raise CmpError(f"-P {assignment!r}: expected name=value, such as seeds=3")
        given[name] = value
    import_lab("run").run_book(profile, chapter, given, jobs, dry_run)


def build_site(
    picture: Annotated[
        bool, typer.Option("--picture", help="Draw the first page's picture anew instead.")
    ] = False,
) -> None:
    """Build the book's pages; offline, once the packages of the theme are fetched."""
    if picture:
        console.print(f"drawn: {import_lab('figures.idea').write()}", soft_wrap=True)
        return
    folder = import_lab("site").make_site()
    console.print(f"the book: {folder}", soft_wrap=True)
    console.print("to read it: python3 -m http.server --bind 127.0.0.1 --directory _build/html")
