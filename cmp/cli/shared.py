"""Shared parts of commands: options, help from docstrings, tables, and access to the book's
package.

Like all modules with commands, it has no heavy imports, so that help is fast.
"""

import copy
import inspect
import math
import os
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from typer.core import TyperCommand, TyperGroup

from cmp.errors import CmpError, clean_text

Positive = Annotated[int, typer.Option(min=1)]
Threads = Annotated[int, typer.Option(min=1, max=1024)]  # thread libraries crash with more
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
    "threads": "Number of torch threads; affects the last bits of results.",
    "device": "Device: cpu or cuda. With several processes, each uses one GPU. Default: cpu for "
    "this book's own models, such as small, otherwise cuda.",
    "micro_batch": "Samples to process at a time, if a whole batch does not fit in memory. "
    "Default: the whole batch.",
    "checkpoint_activations": "Recompute activations to save memory; steps take a third longer.",
    "compile": "Compile both towers with torch, on a GPU. The first steps take longer.",
    "keep_weights": "Also store the final weights of one of this book's own models, for `cmpt "
    "export`.",
    "dry_run": "Print the plan without computing anything.",
    "seed": "The base model's number.",
    "data": "Source of the data: embedded (this book's benchmark), fomo (FoMo-in-Flux), or a "
    "folder of manifests.",
}
"""Help for parameters of several commands; a command's docstring may override it."""

Role = Literal["pool", "substitute", "adapt", "eval", "transfer"]
ROLE_NAMES: dict[Role, str] = {
    "pool": "pretraining pool",
    "substitute": "stand-in for the pool",
    "adapt": "adaptation (A_KA)",
    "eval": "retention (A_ZS)",
    "transfer": "transfer (reported separately)",
}
"""The names of dataset roles in tables, in order."""
NUMBERS = r"([-+−]?[\d.,/]*|–)( to [-−]?[\d.,]+)?|no interval"
"""A pattern of cells that are numbers, or intervals as `interval_in_words` writes them."""
TEXT_WIDTH = 12
"""The least width of a column of longer texts in a table."""


def path(text: str) -> Path:
    """Return the path that a value of the command line names, with "~" expanded, which shells leave
    alone in --out=~/new.

    Raises:
        typer.BadParameter: The value is empty, and would name the current folder.
    """
    return Path(word(text)).expanduser()


def word(text: str) -> str:
    """Return a value of the command line that is not empty.

    Raises:
        typer.BadParameter: It is empty, such as a shell's variable that is not set.
    """
    if not text:
        raise typer.BadParameter("must not be empty; is a variable of your shell not set?")
    return text


PARSERS = {Path: path, str: word}
"""Type -> the function that reads a value of it. Older versions of typer show its name in help."""


def make_group(docstring: str, *functions: Callable[..., None]) -> typer.Typer:
    """Return a group of commands.

    Args:
        docstring: The docstring of the group's module.
        functions: The commands, named like the functions, without an underscore at the end.

    Returns:
        The group, with help from the docstrings.
    """
    text = split_docstring(docstring)[0]
    group = typer.Typer(cls=Commands, no_args_is_help=True, help=text)
    for function in functions:
        add_command(group, function, function.__name__.rstrip("_"))
    return group


def add_command(
    group: typer.Typer, command: Callable[..., None] | typer.Typer, name: str, panel: str = ""
) -> None:
    """Add a function or a group of commands to a group.

    Args:
        group: The group.
        command: The function, whose docstring is its help, or the other group.
        name: The name of the command.
        panel: The heading below which help lists it.
    """
    options: dict[str, Any] = {"rich_help_panel": panel} if panel else {}
    if isinstance(command, typer.Typer):
        group.add_typer(command, name=name, **options)
    else:
        group.command(name, cls=PlainCommand, help=take_help(command), **options)(command)


OF_A_CHECKOUT = ("study", "book", "site", "lab", "plan", "pretrain", "build", "verify")
"""Commands that the study book adds where its repository is installed."""


class Commands(TyperGroup):
    """A group of commands that knows which ones only a checkout has."""

    def resolve_command(self, ctx, args):
        """Return the name of the command at the start of `args`, the command, and the rest.

        Raises:
            CmpError: The command is one that a wheel does not have.
        """
        if args[0] not in self.commands and args[0] in OF_A_CHECKOUT:
            raise CmpError(
                f"{args[0]!r} is a command of the study book, which a wheel does not have: clone "
                "its repository, and run `make env` there"
            )
        return super().resolve_command(ctx, args)


class PlainCommand(TyperCommand):
    """A command whose help is plain text, since rich cuts long options off."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options | {"rich_markup_mode": None})


def take_help(function: Callable) -> str:
    """Turn a function's parameters into options and arguments, with help from its docstring.

    A parameter without a default becomes an argument, and one with the default False a flag. Paths
    and texts are read by `PARSERS`.

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
        info.parser = info.parser or _find_parser(kind)
        info.help = descriptions.get(name) or DESCRIPTIONS[name]
        function.__annotations__[name] = Annotated[kind, info]
    return text


def _find_parser(kind: Any) -> Callable[[str], Any] | None:
    """Return the parser of a type, of its items if it is a list, or None."""
    return next(filter(None, map(_find_parser, get_args(kind))), PARSERS.get(kind))


def split_docstring(docstring: str) -> tuple[str, dict[str, str]]:
    """Return the text of a Google docstring, with its example, and the descriptions of
    parameters."""
    text, sections = _split_sections(docstring)
    text = "\n\n".join(" ".join(part.split()) for part in text.split("\n\n"))  # wrapped again
    if "Example" in sections:
        text += f"\n\nExample: {sections['Example']}"
    return text, describe_names(docstring, "Args")


def describe_names(docstring: str, section: str) -> dict[str, str]:
    """Return the description of each name in a section, "Args" or "Attributes", of a Google
    docstring."""
    lines = _split_sections(docstring)[1].get(section, "")
    descriptions = re.findall(r"^(\w+): (.*(?:\n .*)*)", lines, re.M)
    return {name: " ".join(words.split()) for name, words in descriptions}


def _split_sections(docstring: str) -> tuple[str, dict[str, str]]:
    text, *parts = re.split(r"\n\n(Args|Attributes|Example):\n", docstring)
    return text, dict(zip(parts[::2], map(textwrap.dedent, parts[1::2]), strict=True))


def check_out(out: Path, option: str = "--out", suffix: str = "") -> None:
    """Raise `CmpError` if an output does not have a suffix, such as ".html", or its folder does not
    exist, is inside a release, or cannot be written to."""
    from cmp.releases.release import refuse_inside

    if suffix and out.suffix != suffix:
        raise CmpError(f"{option} {out}: use a name that ends in {suffix}")
    if not out.parent.is_dir():
        raise CmpError(f"{option} {out}: the folder {out.parent} does not exist; create it first")
    if not os.access(out.parent, os.W_OK | os.X_OK):
        raise CmpError(f"{option} {out}: nothing can be written to the folder {out.parent}")
    refuse_inside(out, f"{option} {out}")


def refuse_options(why: str, **given: object) -> None:
    """Raise `CmpError` if an option was given that would have no effect.

    Args:
        why: The reason, such as "needs --profile".
        **given: The options and their values; those that are None or False were not given.
    """
    for name, value in given.items():
        if value is not None and value is not False:
            raise CmpError(f"--{name.replace('_', '-')}: {why}")


def name_boards(tensorboard: Path | None, wandb: str | None) -> dict[str, str]:
    """Return the boards of a command, as `cmp.runs.launch.compute` takes them."""
    boards = {"tensorboard": str(tensorboard or ""), "wandb": wandb or ""}
    return {name: place for name, place in boards.items() if place}


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[object] | None], title: str | None = None
) -> None:
    """Print a table that fits into 80 characters, without truncating numbers. On a narrower
    terminal, its lines are longer, so that numbers and the names beside them can still be read.

    Args:
        columns: The headers. Columns of numbers and intervals are right-aligned.
        rows: The cells, as text or numbers; None draws a line.
        title: The heading.
    """
    from rich import box, cells, console, table

    rows = [row and [_cell(value) for value in row] for row in rows]
    title = title and clean_text(title)
    shown = table.Table(title=title, box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    least = len(columns) + 1  # for the spaces around columns
    for number, column in enumerate(columns):
        is_number = all(re.fullmatch(NUMBERS, row[number]) for row in rows if row)
        justify, overflow = ("right", "ellipsis") if is_number else ("left", "fold")
        widest = max(map(cells.cell_len, [column, *(row[number] for row in rows if row)]))
        least += widest if is_number else min(widest, TEXT_WIDTH)
        shown.add_column(
            column, justify=justify, overflow=overflow, no_wrap=is_number,
            min_width=None if is_number else min(widest, TEXT_WIDTH),
        )  # fmt: skip
    for row in rows:
        shown.add_row(*row) if row else shown.add_section()
    terminal = console.Console(highlight=False, markup=False)
    terminal.width = max(terminal.width, least)
    terminal.print(shown)


def score_text(score: float | None) -> str:
    """Return a score with one decimal, or a dash for None or NaN."""
    return "-" if score is None or math.isnan(score) else f"{score:.1f}"


def _cell(value: object) -> str:
    """Return a cell as text: numbers with four digits, or all digits of large ones."""
    if isinstance(value, float) and abs(value) < 1000:
        return f"{value:.4g}"
    return f"{value:,.0f}" if isinstance(value, int | float) else clean_text(str(value))
