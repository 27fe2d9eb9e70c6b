"""`cmp study`: a chapter's grid of runs."""

from typing import Annotated

import typer

from cmp import claims, config, studies
from cmp.cli.shared import Device, console, place
from cmp.errors import CmpError
from cmp.runs import plans
from cmp.studies import results


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
    device, grid = place(profile, device), studies.load(chapter)
    claims.of(grid)  # what it is to show is refused now, not after hours of runs
    # a full run takes hours: of a model that is not embedded, the live settings, once each
    own = profile in config.OWN_MODEL
    asked = grid.configs(profile, 1, live_only=True) if own else grid.configs(profile)
    if dry_run and own:
        console.print("\n".join(plans.of_study(asked, device)), highlight=False)
        return
    configs = list(asked.values())
    if shard:
        configs = studies.shard(configs, shard)
    console.print(grid.question, highlight=False)
    plan = studies.plan(configs, device)
    console.print(f"study {chapter}, {profile}: {plan}", highlight=False)
    if dry_run:
        return
    if profile == "cpu" and not force:
        plan.check_budget()
    studies.compute(configs, jobs, device, backend)
    if publish:
        console.print(f"published: {results.publish(grid, profile)}", highlight=False)
