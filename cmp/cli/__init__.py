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
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, TextIO

import typer

import cmp
from cmp.cli import shared
from cmp.errors import CmpError, Interrupted, clean_text
from cmp.faults import describe_bug, explain_failure

PANELS = {
    "Keep a model current": {"update": "updates:update", "tune": "updates:tune",
                             "compare": "comparing:compare", "release": "releases:app",
                             "export": "exporting:export"},
    "Run": {"run": "runs:run", "eval": "runs:evaluate",
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
    """Run the command line, and exit with the status of `run_command`."""
    if (encoding := sys.getfilesystemencoding()) != "utf-8":
        complain(
            f"this locale is not UTF-8 but {encoding}, so names of files would be misread; set "
            "PYTHONUTF8=1 or LANG=C.UTF-8"
        )
        sys.exit(2)
    output, raw = open_output(sys.stdout)
    errors, _ = open_output(sys.stderr)
    tell = functools.cache(complain)  # several steps of a command may give the same warning
    warnings.showwarning = lambda message, *_: tell(str(message))
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        status = run_command()
        output.flush()
        if raw.error and not isinstance(raw.error, BrokenPipeError):
            complain(f"standard output: cannot be written ({raw.error}); write it elsewhere")
            status = status or 2
        errors.flush()
    sys.exit(status)


class Output(io.FileIO):
    """A standard stream without which a run goes on: what cannot be written is lost, as when the
    disk is full or the reader of a pipe has left.

    Attributes:
        error: The last error, or None.
    """

    error: OSError | None = None

    def write(self, data: Any) -> int:
        """Write bytes or lose them, and return how many are done with."""
        try:
            return super().write(data)
        except OSError as error:
            self.error = error
            return len(data)


def open_output(stream: TextIO | None) -> tuple[TextIO, Output]:
    """Return a text stream in place of a standard stream, which is None if it was closed from the
    start, and what writes its bytes. Letters that a terminal does not have become "?"."""
    raw = Output(stream.fileno(), "w", closefd=False) if stream else Output(os.devnull, "w")
    encoding = stream.encoding if stream else None
    buffer = io.BufferedWriter(raw)
    return io.TextIOWrapper(buffer, encoding, errors="replace", line_buffering=True), raw


def run_command() -> int | str | None:
    """Run the given command, and return its exit status.

    An error that the user can fix is printed as one sentence, with status 2. A run stopped by a
    signal has 128 plus the signal's number, as usual in shells; with several processes, the first
    prints a message. Any other error is a bug in this package or in one that it uses. Its traceback
    is printed below a sentence, with status 70 (`EX_SOFTWARE` in sysexits.h).
    """
    try:
        app()
    except SystemExit as end:
        return end.code
    except Interrupted as stop:
        from cmp.scale import processes

        if processes.rank() == 0:
            complain(stop)
        return 128 + stop.signal
    except Exception as error:
        sentence = explain_failure(error)
        complain(sentence or describe_bug(error))
        return 2 if sentence else 70
    return 0


def complain(message: object) -> None:
    """Print a sentence to standard error, without characters that steer a terminal; of a path too
    long for any disk, only the ends."""
    text = re.sub(r"(\S{200})\S{600,}(\S{200})", r"\1...\2", f"cmpt: {message}")
    typer.echo(clean_text(text), err=True)


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
