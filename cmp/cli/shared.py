"""What commands share: options, help from docstrings, tables, and access to the book's package.

This module imports nothing heavy, so that `cmpt --help` is quick.
"""

import copy
import importlib
import inspect
import math
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, get_args, get_origin

import typer

from cmp.errors import CmpError

Positive = Annotated[int, typer.Option(min=1)]
Threads = Annotated[int, typer.Option(min=1, max=1024)]  # libraries of threads crash at more
Batch = Annotated[int | None, typer.Option(min=2, max=2**20)]
OptionalPositive = Annotated[int | None, typer.Option(min=1)]
NotNegative = Annotated[int, typer.Option(min=0)]
Argument = Annotated[str, typer.Argument()]
OptionalArgument = Annotated[str | None, typer.Argument()]
OptionalArguments = Annotated[list[str] | None, typer.Argument()]
Settings = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")]
OutFile = Annotated[Path, typer.Option("--out", "-o")]

DESCRIPTIONS = {
    "settings": "Config keys to change, such as schedule.peak=0.0005.",
    "run_id": "Id of a run, or its first digits.",
    "threads": "Number of torch threads. Another number changes the last bits of results.",
    "device": "Device: cpu or cuda. Each of several processes takes one card. Default: cpu for "
    "embedded models, otherwise cuda.",
    "micro_batch": "Samples to process at a time, if a whole batch exceeds the memory. "
    "Default: the whole batch.",
    "checkpoint_activations": "Recompute activations: less memory, about a third more time.",
    "compile": "Compile both towers with torch, on a card. The first steps take about a minute.",
    "keep_weights": "Store the final weights also of an embedded model, for `cmpt export`.",
    "dry_run": "Print the plan without computing anything.",
    "seed": "Number of the base model.",
    "data": "Source of the data: embedded, fomo, or a folder of manifests.",
}
"""Help of parameters that several commands have; a command's docstring may say otherwise."""

ROLE_NAMES = {
    "pool": "pretraining pool",
    "substitute": "stand-in for the pool",
    "adapt": "adaptation (A_KA)",
    "eval": "retention (A_ZS)",
    "transfer": "transfer (reported apart)",
}
"""What tables call the roles of datasets, in their order."""


def make_group(docstring: str, *functions: Callable[..., None]) -> typer.Typer:
    """Make a group of commands.

    Args:
        docstring: Of the group's module.
        functions: The commands, called as the functions are, but for an underscore at the end.

    Returns:
        The group, whose help is that of the docstrings.
    """
    group = typer.Typer(no_args_is_help=True, help=split_docstring(docstring)[0])
    for function in functions:
        group.command(function.__name__.rstrip("_"), help=take_help(function))(function)
    return group


def take_help(function: Callable) -> str:
    """Turn a function's parameters into options and arguments that its docstring describes.

    A parameter without a default is an argument; one that is False by default is a flag.

    Returns:
        The docstring's text, with its example.
    """
    text, descriptions = split_docstring(inspect.getdoc(function))
    for name, parameter in inspect.signature(function, eval_str=True).parameters.items():
        annotation = parameter.annotation
        kind, *infos = get_args(annotation) if get_origin(annotation) is Annotated else [annotation]
        flag = [f"--{name.replace('_', '-')}"] if parameter.default is False else []
        has_default = parameter.default is not parameter.empty
        info = copy.copy(infos[0]) if infos else None
        info = info or (typer.Option(*flag) if has_default else typer.Argument())
        info.help = descriptions.get(name) or DESCRIPTIONS[name]
        function.__annotations__[name] = Annotated[kind, info]
    return text


def split_docstring(docstring: str) -> tuple[str, dict[str, str]]:
    """Return the text of a Google docstring, with its example, and what it says of parameters."""
    text, sections = _split_sections(docstring)
    if "Example" in sections:
        text += f"\n\nExample: {sections['Example']}"
    return text, describe_names(docstring, "Args")


def describe_names(docstring: str, section: str) -> dict[str, str]:
    """Return what a section of a Google docstring, "Args" or "Attributes", says of each name."""
    lines = _split_sections(docstring)[1].get(section, "")
    descriptions = re.findall(r"^(\w+): (.*(?:\n .*)*)", lines, re.M)
    return {name: " ".join(words.split()) for name, words in descriptions}


def _split_sections(docstring: str) -> tuple[str, dict[str, str]]:
    text, *parts = re.split(r"\n\n(Args|Attributes|Example):\n", docstring)
    return text, dict(zip(parts[::2], map(textwrap.dedent, parts[1::2]), strict=True))


def check_out(out: Path) -> None:
    """Raise `CmpError` if there is no folder for a file or folder that is to be written."""
    if not out.parent.is_dir():
        raise CmpError(f"--out {out}: there is no folder {out.parent}; make it first")


def recorded_device(machine: Mapping[str, Any], device: str | None) -> str:
    """Return the device that was given, or the kind that a machine's record names."""
    return device or ("cpu" if machine.get("device") == "cpu" else "cuda")


def import_lab(name: str) -> ModuleType:
    """Import a module of the book's package, which is in a checkout of the project only.

    Args:
        name: The module within `lab`, such as "figures".

    Raises:
        CmpError: The current folder is not in a checkout.
    """
    from cmp.project import project_folder

    book = project_folder() / "book"
    if not (book / "lab").is_dir():
        raise CmpError(f"{book / 'lab'}: no such folder; run this in a checkout of the project")
    if str(book) not in sys.path:
        sys.path.append(str(book))
    return importlib.import_module(f"lab.{name}")


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[object] | None], title: str | None = None
) -> None:
    """Print a table that fits 80 characters without cutting a number.

    Args:
        columns: Headers. Columns of numbers are aligned right.
        rows: The cells, text or numbers; None draws a line.
        title: The heading.
    """
    from rich import box, console, table

    rows = [row and [_cell(value) for value in row] for row in rows]
    shown = table.Table(title=title, box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    for number, column in enumerate(columns):
        is_number = all(re.fullmatch(r"[-+]?[\d.,/]*", row[number]) for row in rows if row)
        justify = "right" if is_number else "left"
        shown.add_column(column, justify=justify, no_wrap=is_number or not number)
    for row in rows:
        shown.add_row(*row) if row else shown.add_section()
    console.Console(highlight=False, markup=False).print(shown)


def score_text(score: float | None) -> str:
    """Return a score with one decimal; a dash where there is none, None or NaN."""
    return "-" if score is None or math.isnan(score) else f"{score:.1f}"


def _cell(value: object) -> str:
    """Return a cell's text: four digits of a number, all of a large one."""
    if isinstance(value, float) and abs(value) < 1000:
        return f"{value:.4g}"
    return f"{value:,.0f}" if isinstance(value, int | float) else str(value)
