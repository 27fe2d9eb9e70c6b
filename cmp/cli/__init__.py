"""`cmp`: the package from a shell."""

import sys
import warnings
from typing import Annotated

import typer
from rich.console import Console

from cmp import __version__
from cmp.cli import (
    bench,
    budget,
    chapters,
    checking,
    data,
    merging,
    networks,
    planner,
    results,
    runs,
    site,
    streams,
    studies,
)
from cmp.cli.shared import console
from cmp.errors import CmpError, Interrupted

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.add_typer(data.app, name="data")
app.add_typer(results.app, name="results")
app.add_typer(streams.app, name="stream")
app.command("eval")(networks.evaluate)
app.command()(networks.pretrain)
app.command()(runs.run)
app.command()(runs.resume)
app.command()(runs.export)
app.command()(checking.doctor)
app.command()(studies.study)
app.command()(merging.merge)
app.command()(bench.bench)
app.command()(budget.budget)
app.command()(planner.plan)
app.command("book")(chapters.run_book)
app.command("site")(site.build_site)


def main() -> None:
    """Run the command line; what a user can mend is printed as a sentence, with status 2.

    A run that was stopped by a signal ends with 128 and the signal's number, as a shell has it.
    """
    warnings.showwarning = lambda message, *_: complain(message)
    try:
        app()
    except CmpError as error:
        complain(error)
        sys.exit(2)
    except Interrupted as stop:
        complain(stop)
        sys.exit(128 + stop.signal)


def complain(message: object) -> None:
    """A sentence on standard error."""
    Console(stderr=True, soft_wrap=True, highlight=False).print(f"cmp: {message}", markup=False)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False):
    """Continual multimodal pretraining: keep a CLIP model up to date, and measure it."""
    if version:
        console.print(f"cmp {__version__}")
        raise typer.Exit
