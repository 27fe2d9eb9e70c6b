"""`cmp`: the package from a shell."""

import ast
import sys
import warnings
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from typer.core import TyperCommand, TyperGroup

from cmp import __version__
from cmp.cli.shared import console
from cmp.errors import CmpError, Interrupted

COMMANDS = {
    "run": "runs.run_command",
    "resume": "runs.resume",
    "export": "runs.export_command",
    "merge": "tools.merge",
    "plan": "tools.plan",
    "budget": "tools.budget",
    "doctor": "tools.doctor",
    "eval": "runs.evaluate",
    "pretrain": "runs.pretrain",
    "study": "studies.study",
    "results": "results.app",
    "data": "data.app",
    "stream": "data.stream_app",
    "book": "studies.run_book",
    "site": "studies.build_site",
    "bench": "tools.bench",
}
"""Command -> module of this package and function, or group of commands, in it."""


class Commands(TyperGroup):
    """Imports a command's module when it is called: what it stands on takes seconds."""

    def resolve_command(self, ctx, args):
        """The command that the first of `args` names, and the other arguments."""
        name, _, others = super().resolve_command(ctx, args)
        return name, loaded(name), others


def loaded(name: str) -> TyperCommand | TyperGroup:
    """A command, or a group of them, ready to be called."""
    module, _, attribute = COMMANDS[name].partition(".")
    found, whole = getattr(import_module(f"cmp.cli.{module}"), attribute), typer.Typer()
    if isinstance(found, typer.Typer):
        whole.add_typer(found, name=name)
    else:
        whole.command(name)(found)
    return typer.main.get_group(whole).commands[name]


def summary(name: str) -> str:
    """The docstring of a command's function, of a group's module, read without importing it."""
    module, _, attribute = COMMANDS[name].partition(".")
    tree = ast.parse((Path(__file__).parent / f"{module}.py").read_text(encoding="utf-8"))
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    return ast.get_docstring(functions.get(attribute, tree))


app = typer.Typer(
    cls=Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)
for _name in COMMANDS:
    app.command(_name, help=summary(_name))(lambda: None)


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
