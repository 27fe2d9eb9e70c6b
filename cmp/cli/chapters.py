"""`cmp book`: the chapters, run headless."""

from typing import Annotated

import typer

from cmp import book
from cmp.book import publishing
from cmp.errors import CmpError


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
        publishing.publish(chapter, jobs)
        return
    given = {}
    for assignment in parameter or []:
        name, equals, value = assignment.partition("=")
        if not equals:
            raise CmpError(f"-P {assignment!r}: expected name=value, such as seeds=3")
        given[name] = value
    book.run_book(profile, chapter, given, jobs, dry_run)
