"""Show a release, or free disk space."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cmp.cli import shared
from cmp.errors import CmpError

if TYPE_CHECKING:
    from cmp.releases.release import Release


def show(folder: Annotated[Path, typer.Argument(metavar="RELEASE")]) -> None:
    """Print the updates in a release and the log of the last one, check all of its files, and say
    what the next update needs.

    If a file is missing or damaged, the exit status is 1.

    Args:
        folder: The folder of the release.

    Example:
        cmpt release show releases/2026-02
    """
    from cmp.cli.computing import print_log
    from cmp.releases import release

    made = release.read_release(folder)
    faults = made.find_faults()
    rows = [
        (n, x.name, x.images, x.steps, sum(x.counts), f"{x.peak:g}", f"{x.seconds:.0f}")
        for n, x in enumerate(made.record.updates, 1)
    ]
    columns = ("", "update", "images", "steps", "batch", "peak", "seconds")
    shared.print_table(columns, rows, release.describe(made))
    print_log(folder / release.LOG_FILE)
    is_slim = made.is_slimmed and not made.has_state
    others = "slimmed, so no update can start from it; all other files" if is_slim else "all files"
    typer.echo(f"{others}{f' but {len(faults)}' if faults else ''} are intact")
    for fault in faults.values():
        typer.echo(fault)
    if made.has_state and release.LEDGER_FILE not in faults:
        typer.echo("\n".join(_needs(made)))
    if faults:
        raise typer.Exit(1)


def _needs(made: "Release") -> Iterable[str]:
    """Yield lines on what the next update needs, and whether it is there."""
    from cmp import starts
    from cmp.releases import arrivals

    yield "the next update needs this folder, and each earlier image where it was:"
    for folder, (needed, there, reason) in arrivals.count_present(made.ledger()).items():
        yield f"  {reason or f'{folder}: {there:,} of {needed:,} images are there'}"
    if folder := starts.model_folder(made.config.model.name):
        is_gone = "" if folder.is_dir() else ", but that is not there"
        yield f"  {folder}: the config and tokenizer of the model are read from there{is_gone}"
    yield "if a folder of images has moved, give the update --moved OLD=NEW"


def slim(folder: Annotated[Path, typer.Argument(metavar="RELEASE")], newest: bool = False) -> None:
    """Free disk space: remove the weights and moments that only another update would need.

    Serving and comparing still work. To start an update from the release again, repeat the
    command that made it with another -o. That needs the release before it, not slimmed.

    Args:
        folder: The folder of the release.
        newest: Slim it even if your next update, or an unfinished one, may start from it.

    Example:
        cmpt release slim releases/2026-01
    """
    from cmp.releases import release
    from cmp.releases.update import find_unfinished

    made = release.read_release(folder)
    beside = release.releases_beside(made)
    if not newest and not any(_goes_on_from(made, each) for each in beside):
        raise CmpError(
            f"{folder}: no release beside it goes on from it and has its own state, so your next "
            "update may need it; to slim it all the same, add --newest"
        )
    if not newest and (work := find_unfinished(made)):
        raise CmpError(
            f"{folder}: the unfinished update in {work} may start from it; finish that, or delete "
            "its folder; to slim the release all the same, add --newest"
        )
    freed = release.slim(folder)
    parents = [each.folder for each in beside if each.record.id == made.record.parent]
    start = f" from {parents[0]}" if parents else ""
    typer.echo(
        f"{folder}: {freed / 2**20:,.0f} MiB freed; no update can start from it any more, unless "
        f"you repeat its own update{start} with another -o"
    )


def _goes_on_from(made: "Release", later: "Release") -> bool:
    """Return whether another release has the state of the same stream after more updates, whole."""
    is_later = made.record.id in [x.id for x in later.record.updates[:-1]]
    return is_later and later.has_state and not {*later.slimmable()} & {*later.find_faults()}


app = shared.make_group(__doc__, show, slim)
