"""`cmpt`, the command line. The module of a command is imported when the command is called."""

import ast
import contextlib
import datetime
import importlib
import importlib.metadata
import os
import platform
import re
import shlex
import sys
import traceback
import warnings
from pathlib import Path

import typer
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from typer.core import TyperCommand, TyperGroup

import cmp
from cmp.cli import shared
from cmp.errors import CmpError, Interrupted
from cmp.project import DISTRIBUTION, foreign_owners, foreign_sentence

PANELS = {
    "Keep a model current": {"update": "updates.update", "tune": "updates.tune",
                             "compare": "comparing.compare", "release": "releases.app",
                             "export": "runs.export"},
    "Run": {"run": "runs.run", "resume": "runs.resume", "eval": "runs.evaluate",
            "results": "results.app", "config": "keys.show"},
    "Book": {"study": "book.study", "book": "book.book", "site": "book.site", "lab": "book.lab"},
    "Data": {"data": "data.app", "stream": "streams.app"},
    "Tools": {"merge": "tools.merge", "budget": "budget.budget", "plan": "tools.plan",
              "doctor": "tools.doctor", "pretrain": "tools.pretrain", "bench": "tools.bench"},
}  # fmt: skip
"""By heading of the help: command -> module of this package, and the function or group in it."""
COMMANDS = {name: place for panel in PANELS.values() for name, place in panel.items()}


class LazyGroup(TyperGroup):
    """A group that imports a command's module when the command is called: it takes seconds."""

    def resolve_command(self, ctx, args):
        """Return the name of the command that `args` begin with, the command, and the rest."""
        name, _, rest = super().resolve_command(ctx, args)
        return name, load_command(name), rest


def load_command(name: str) -> TyperCommand | TyperGroup:
    """Import a command, or a group of them."""
    module, _, attribute = COMMANDS[name].partition(".")
    command = getattr(importlib.import_module(f"cmp.cli.{module}"), attribute)
    parent = typer.Typer()
    if isinstance(command, typer.Typer):
        parent.add_typer(command, name=name)
    else:
        parent.command(name, help=shared.take_help(command))(command)
    return typer.main.get_group(parent).commands[name]


def help_text(name: str) -> str:
    """Return the help of a command, or of a group, without importing its module."""
    module, _, attribute = COMMANDS[name].partition(".")
    tree = ast.parse((Path(__file__).parent / f"{module}.py").read_text(encoding="utf-8"))
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    return shared.split_docstring(ast.get_docstring(functions.get(attribute, tree)))[0]


app = typer.Typer(
    cls=LazyGroup, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)
for _panel, _names in PANELS.items():
    for _name in _names:
        app.command(_name, help=help_text(_name), rich_help_panel=_panel)(lambda: None)


def main() -> None:
    """Run the command line.

    An error that the user can correct is printed as one line, with exit status 2. A run that was
    stopped by a signal ends with status 128 plus the signal's number, as usual in shells; the first
    of several processes says so. Anything else is a fault of this package, or of one that it uses:
    it is reported, with status 70, which is `EX_SOFTWARE` in sysexits.h. With CMP_DEBUG=1 it is
    shown as Python shows it.
    """
    if not hasattr(cmp, "__version__"):  # an `__init__.py` that is not ours
        complain(foreign_sentence(foreign_owners()))
        sys.exit(2)
    warnings.showwarning = lambda message, *_: complain(message)
    try:
        run_command()
    except Exception as error:
        if os.environ.get("CMP_DEBUG"):
            raise
        complain(report_fault(error))
        sys.exit(70)


def run_command() -> None:
    """Run the command that was typed, and end as `main` says."""
    try:
        app()
    except (CmpError, OSError) as error:  # such as a disk that is full
        complain(error)
        sys.exit(2)
    except ModuleNotFoundError as error:
        if not error.name or error.name.startswith("cmp"):
            raise
        words = f"pip install '{DISTRIBUTION}{extras_with(error.name)}'"
        complain(f"this command needs the package {error.name!r}: {words}")
        sys.exit(2)
    except Interrupted as stop:
        from cmp.scale import processes

        if processes.rank() == 0:
            complain(stop)
        sys.exit(128 + stop.signal)


def report_fault(error: Exception) -> str:
    """Write what helps to find a fault to a file of the build folder: the versions, the command and
    the traceback, and no data.

    Returns:
        A sentence that says what to send, also where the file cannot be written.
    """
    what = "".join(traceback.format_exception_only(error)).partition("\n")[0]
    fault = f"a fault of this program, not of your command ({what:.300})"
    try:
        from cmp.files import write_atomic
        from cmp.project import build_folder

        packages = {each.name: each.version for each in importlib.metadata.distributions()}
        lines = [
            f"cmpt {cmp.__version__}, Python {sys.version}, {platform.platform()}",
            f"command: {shlex.join(sys.argv)}",
            "".join(traceback.format_exception(error)),
            *(f"{name} {version}" for name, version in sorted(packages.items())),
        ]
        name = f"{datetime.datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}.txt"
        path = build_folder().absolute() / "reports" / name
        write_atomic(path, "\n".join(lines) + "\n")
    except Exception as refused:  # a full disk, or whatever the first fault has left
        why = f"no report could be written ({type(refused).__name__})"
        return f"{fault}; {why}: run the command again with CMP_DEBUG=1, and send what it prints"
    return f"{fault}; please send {path} to the maintainers, and say what you did before"


def extras_with(module: str) -> str:
    """Return the extra that installs a module, such as "[experiments]".

    Returns:
        Nothing for a package that every installation has; all extras but those for clusters and
        tests for a module that comes with a package of theirs.
    """
    package = canonicalize_name(module.partition(".")[0])
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # run without installing
        for requirement in map(Requirement, importlib.metadata.requires(DISTRIBUTION) or ()):
            if canonicalize_name(requirement.name) == package:
                extra = re.search(r'extra == "(\w+)"', str(requirement.marker))
                return f"[{extra[1]}]" if extra else ""
    return "[experiments,book]"


def complain(message: object) -> None:
    """Print a sentence on standard error."""
    typer.echo(f"cmpt: {message}", err=True)


def _root(version: bool = False, plugin: list[Path] | None = None) -> None:
    """Keep a CLIP model up to date over a stream of updates, and measure gains and costs.

    Args:
        version: Print the version and exit.
        plugin: Load a Python file that registers options before the command runs; repeat for more
            files.
    """
    if version:
        typer.echo(f"cmpt {cmp.__version__}")
        raise typer.Exit
    if build := os.environ.get("CMP_BUILD"):  # kernels and workers have other current folders
        os.environ["CMP_BUILD"] = os.path.abspath(os.path.expanduser(build))
    if plugin:
        from cmp.registry import load_plugin

        for path in plugin:
            if not path.is_file():
                raise CmpError(f"--plugin {path}: there is no such regular file")
            load_plugin(path)
        os.environ["CMP_PLUGINS"] = os.pathsep.join(str(path.absolute()) for path in plugin)


app.callback(help=shared.take_help(_root), invoke_without_command=True)(_root)
