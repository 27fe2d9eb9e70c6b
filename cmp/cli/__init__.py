"""The command line, `cmpt`.

Its modules import torch and all that needs it in the body of a command, since that takes seconds:
so help, and the answer to a mistyped option, do not wait for it.
"""

import contextlib
import functools
import io
import os
import pkgutil
import re
import sys
import warnings
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, TextIO

import typer

import cmp
from cmp.cli import shared
from cmp.errors import CmpError, Interrupted, ReportedFault, clean_text
from cmp.faults import explain_failure, report_fault
from cmp.project import foreign_owners, foreign_sentence

PANELS = {
    "Keep a model current": {"update": "updates:update", "tune": "updates:tune",
                             "compare": "comparing:compare", "release": "releases:app",
                             "export": "exporting:export"},
    "Run": {"run": "runs:run", "resume": "runs:resume", "eval": "runs:evaluate",
            "results": "results:app", "config": "tools:explain_keys"},
    "Data": {"data": "data:app", "stream": "streams:app"},
    "Tools": {"merge": "merging:merge", "budget": "budget:budget", "doctor": "tools:doctor",
              "bench": "tools:bench"},
}  # fmt: skip
"""For each heading of the help, command -> module of this package, and its function or group."""

app = typer.Typer(
    cls=shared.Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)
_groups = {"": app}
for _panel, _places in PANELS.items():
    for _name, _place in _places.items():
        _groups[_name] = pkgutil.resolve_name(f"cmp.cli.{_place}")
        shared.add_command(app, _groups[_name], _name, _panel)
for _entry in sorted(entry_points(group="cmp.commands"), key=lambda entry: entry.name):
    _group, _, _name = _entry.name.rpartition(".")  # such as "data.build"
    shared.add_command(_groups[_group], _entry.load(), _name, "" if _group else "Book and plug-ins")


def main() -> None:
    """Run the command line.

    An error that the user can fix is printed as one line, with exit status 2. A run stopped by a
    signal exits with 128 plus the signal's number, as usual in shells; with several processes, the
    first prints a message. Any other error is a bug in this package or in one that it uses. It is
    reported with status 70 (`EX_SOFTWARE` in sysexits.h). With CMP_DEBUG=1, bugs and errors of the
    machine, such as a full disk, are tracebacks.
    """
    if not hasattr(cmp, "__version__"):  # another package's `__init__.py`
        complain(foreign_sentence(foreign_owners()))
        sys.exit(2)
    if (encoding := sys.getfilesystemencoding()) != "utf-8":
        complain(
            f"this locale is not UTF-8 but {encoding}, so names of files would be misread; set "
            "PYTHONUTF8=1 or LANG=C.UTF-8"
        )
        sys.exit(2)
    output, errors = Output(sys.stdout), Output(sys.stderr)
    tell = functools.cache(complain)  # several steps of a command may give the same warning
    warnings.showwarning = lambda message, *_: tell(str(message))
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        status = 0
        try:
            run_command()
        except SystemExit as end:
            status = end.code
        except Exception as error:
            if os.environ.get("CMP_DEBUG"):
                raise
            complain(report_fault(error))
            status = 70
        output.flush()
        if output.error and not isinstance(output.error, BrokenPipeError):
            complain(f"standard output: cannot be written ({output.error}); write it elsewhere")
            status = status or 2
        errors.flush()
    sys.exit(status)


_DRAWING = re.compile(r"(^\r|^\x1b\[A|\x1b\[[0-7;]*m)")
"""What progress bars and tables write besides text: a step back to begin with, and colours; not
style 8, which hides text."""


class Output:
    """An output stream whose errors do not stop a run: after the first, such as a full disk or a
    closed pipe, output is lost. No name in a text steers the terminal.

    Attributes:
        error: The first error, or None.
    """

    def __init__(self, stream: TextIO | None):
        # a stream that was closed from the start is None
        self.stream = stream or open(os.devnull, "w")  # noqa: SIM115
        self.error: OSError | None = None
        if isinstance(stream, io.TextIOWrapper):  # not every terminal has all letters
            stream.reconfigure(errors="replace")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write a text, and return its length."""
        parts = re.split(_DRAWING, text)
        parts[::2] = map(clean_text, parts[::2])
        self._attempt(lambda: self.stream.write("".join(parts)))
        return len(text)

    def flush(self) -> None:
        """Write what is buffered."""
        self._attempt(self.stream.flush)

    def _attempt(self, action: Callable[[], object]) -> None:
        try:
            action()
        except OSError as error:
            self.error = self.error or error
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())  # for what is buffered, too
            os.close(nowhere)


def run_command() -> None:
    """Run the given command, and exit as described in `main`."""
    try:
        app()
    except Interrupted as stop:
        from cmp.scale import processes

        if processes.rank() == 0:
            complain(stop)
        sys.exit(128 + stop.signal)
    except Exception as error:
        is_traced = os.environ.get("CMP_DEBUG") and not isinstance(error, CmpError)
        if is_traced or not (sentence := explain_failure(error)):
            raise
        complain(sentence)
        sys.exit(70 if isinstance(error, ReportedFault) else 2)


def complain(message: object) -> None:
    """Print a sentence to standard error; of a path too long for any disk, only the ends."""
    typer.echo(re.sub(r"(\S{200})\S{600,}(\S{200})", r"\1...\2", f"cmpt: {message}"), err=True)


def _root(version: bool = False, plugin: list[Path] | None = None) -> None:
    """Keep a CLIP model current over many updates, and measure what it learns and loses.

    Args:
        version: Print the version and exit.
        plugin: First load a Python file that registers options; repeat for more files.
    """
    if version:
        typer.echo(f"cmpt {cmp.__version__}")
        raise typer.Exit
    if build := os.environ.get("CMP_BUILD"):  # kernels and workers have a different current folder
        os.environ["CMP_BUILD"] = os.path.abspath(os.path.expanduser(build))
    if plugin:
        from cmp.registry import load_plugin

        for path in plugin:
            if not path.is_file():
                raise CmpError(f"--plugin {path}: no such regular file")
            load_plugin(path)
        os.environ["CMP_PLUGINS"] = os.pathsep.join(str(path.absolute()) for path in plugin)


app.callback(help=shared.take_help(_root), invoke_without_command=True)(_root)
