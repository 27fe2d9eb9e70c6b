"""Read chapters from source: MyST Markdown notebooks with one cell of typed, checked parameters.

A chapter is `book/NN_name.md`. Functions import jupytext themselves, because a chapter's kernel
imports this module without reading chapters.
"""

import ast
import contextlib
import hashlib
import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from cmp import registry
from cmp.config import PROFILES
from cmp.errors import CmpError, did_you_mean, explain_errors

BOOK = Path(__file__).resolve().parents[1]
CHAPTER = re.compile(r"(\d\d|A\d)_[a-z0-9_]+\.md")
KERNELSPEC = {"display_name": "Python 3", "language": "python", "name": "python3"}
Rule = tuple[str, Callable[[Any], object]]
TYPES = {"str": str, "int": int, "float": float, "bool": bool}
_SHARE = ("from 0 to 1", lambda value: 0 <= value <= 1)
_COUNT = ("at least 1", lambda value: value >= 1)


FOLDED = "jp-MarkdownHeadingCollapsed"
"""What JupyterLab keeps in the metadata of a heading that is folded."""
SHARES = ("pool", "update", "buffer")
"""Parameters that are the shares of a batch if a chapter has all three."""


def _named(kind: str) -> Rule:
    return (
        f'one of cmp.option_names("{kind}")',
        lambda value: value in registry.option_names(kind),
    )


RULES: dict[str, Rule] = {
    "profile": (f"one of {', '.join(PROFILES)}", lambda value: value in PROFILES),
    **dict.fromkeys(("seeds", "jobs", "steps", "rank"), _COUNT),
    "device": ("cpu, cuda or cuda:N", lambda value: re.fullmatch(r"cpu|cuda(:\d+)?", value)),
    "stream_seed": ("from 0 to 2147483647", lambda value: 0 <= value < 2**31),
    **dict.fromkeys(("weight", "replay", "pool", "update", "buffer"), _SHARE),
    "peak": ("above 0", lambda value: 0 < value < math.inf),
    "strength": ("0 or more", lambda value: 0 <= value < math.inf),
    "method": _named("method"),
    "meta": _named("meta_schedule"),
    "order": _named("order"),
    "pictures": (
        "a folder of class folders; in a notebook, give an absolute path",
        lambda path: not path or any(map(Path.is_dir, Path(os.path.expanduser(path)).glob("*"))),
    ),
}
"""Parameter -> the condition on its values, as text and as a test."""
PATHS = ("pictures",)
"""Parameters that are paths."""


class Parameter(NamedTuple):
    """A line of a parameters cell: `name: type = default  # help`.

    Attributes:
        name: The name in the chapter.
        type: A key of `TYPES`.
        default: The value in the cell.
        help: The comment.
    """

    name: str
    type: str
    default: object
    help: str

    def __str__(self) -> str:
        return f"{self.name}: {self.type}" + (f" ({self.help})" if self.help else "")


def chapters(folder: Path = BOOK) -> dict[str, Path]:
    """Find the chapters of a folder.

    Args:
        folder: The book.

    Returns:
        Number -> source, in order.
    """
    paths = sorted(folder.glob("*.md"))
    return {match[1]: path for path in paths if (match := CHAPTER.fullmatch(path.name))}


def select(numbers: Iterable[str] | None = None, folder: Path = BOOK) -> list[Path]:
    """Find chapters by number.

    Args:
        numbers: The numbers, such as "3" or "A1"; all by default.
        folder: The book.

    Returns:
        Sources, in the book's order.

    Raises:
        CmpError: There is no such chapter.
    """
    sources = chapters(folder)
    wanted = [number.zfill(2) for number in numbers or sources]
    if unknown := [number for number in wanted if number not in sources]:
        raise CmpError(
            f"no chapter {unknown[0]}; the chapters are {', '.join(sources) or 'none yet'}"
        )
    return [path for number, path in sources.items() if number in wanted]


def source_text(source: Path) -> str:
    """Return a chapter's text with Unix line endings; raise `CmpError` if it cannot be read."""
    with explain_errors(f"{source}: cannot be read"):
        return source.read_text(encoding="utf-8")


def copy_diagrams(folder: Path) -> None:
    """Copy the diagrams to the folder of notebooks that show them, creating it if it is missing."""
    pictures = shutil.ignore_patterns("*.yaml")
    shutil.copytree(BOOK / "diagrams", folder / "diagrams", ignore=pictures, dirs_exist_ok=True)


def notebook(source: Path):
    """Read a chapter as a notebook without outputs, byte for byte reproducible.

    The id of a cell is a hash of the chapter's name, the cell's text and the number of earlier
    cells with the same text. So an edit does not change the ids of other cells, and chapters never
    share an id.

    Args:
        source: The chapter.

    Returns:
        An nbformat notebook.

    Raises:
        CmpError: jupytext cannot read the file.
    """
    import jupytext

    text = source_text(source)
    # anything that its parsers of YAML, Markdown and JSON schemas raise
    with explain_errors(f"{source}: not a MyST Markdown notebook", "", Exception):
        book = jupytext.reads(text, fmt="md:myst")
    book.metadata["kernelspec"] = dict(KERNELSPEC)
    seen = Counter()
    for cell in book.cells:
        identity = f"{source.stem}:{seen[cell.source]}:{cell.source}"
        cell["id"] = hashlib.sha256(identity.encode()).hexdigest()[:12]
        seen[cell.source] += 1
    return book


def evidence_place(notebook: Any) -> int:
    """Return the index of the cell with the heading of a chapter's evidence, or the number of its
    cells if it has none. JupyterLab opens that section folded.

    Args:
        notebook: An nbformat notebook.
    """
    places = [n for n, cell in enumerate(notebook.cells) if cell.metadata.get(FOLDED)]
    return places[0] if places else len(notebook.cells)


def declared_parameters(cell: str) -> dict[str, Parameter]:
    """Read the parameters that a parameters cell declares.

    Args:
        cell: The code of the cell. Every statement is `name: type = literal # help`, with a type
            from `TYPES`.

    Returns:
        Parameters by name.

    Raises:
        CmpError: A statement has another form.
        SyntaxError: The code is not valid Python.
    """
    parameters = {}
    with explain_errors("parameters cell: Python cannot read it", "", RecursionError, MemoryError):
        body = ast.parse(cell).body
    for node in body:
        line = cell.split("\n")[node.end_lineno - 1].encode()  # Python's line numbers
        try:
            name, kind = node.target.id, ast.unparse(node.annotation)
            default, _ = ast.literal_eval(node.value), TYPES[kind]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CmpError(
                f"parameters cell: {line.decode().strip()!r}: write name: type = value  # help, "
                f"with a type of {', '.join(TYPES)}"
            ) from error
        comment = line[node.end_col_offset :].decode().strip(" #")
        parameters[name] = Parameter(name, kind, default, comment)
    return parameters


def parameters(source: Path) -> dict[str, Parameter]:
    """Read a chapter's parameters, which `papermill --help-notebook` also shows.

    Args:
        source: The chapter.

    Returns:
        Parameters by name.

    Raises:
        CmpError: There is not exactly one cell tagged `parameters`, or a line of it has another
            form.
    """
    tagged = [c for c in notebook(source).cells if "parameters" in c.metadata.get("tags", [])]
    if len(tagged) != 1:
        raise CmpError(f"{source}: {len(tagged)} cells are tagged parameters; there must be one")
    try:
        return declared_parameters(tagged[0].source)
    except (CmpError, SyntaxError) as error:
        raise CmpError(f"{source}: {error}") from error


def check_values(values: dict[str, object], valid: dict[str, Parameter], source: str = "") -> None:
    """Raise an error for parameter values that a chapter cannot run with.

    Args:
        values: The values by name.
        valid: The chapter's parameters.
        source: The beginning of error messages.

    Raises:
        CmpError: A name is unknown, or a value is invalid or has the wrong type; the message says
            what is wrong and lists the parameters.
    """
    for name, value in values.items():
        if fault := _fault(name, value, valid):
            known = ", ".join(map(str, valid.values()))
            raise CmpError(f"{source}{fault}; the parameters are {known}")
    shares = [values[name] for name in SHARES if name in valid and name in values]
    if len(shares) == len(SHARES) and abs(sum(shares) - 1) > 1e-6:
        raise CmpError(f"{source}{' + '.join(SHARES)} must be 1, not {sum(shares):g}")


def _fault(name: str, value: object, valid: dict[str, Parameter]) -> str:
    """Return what is wrong with a parameter's value, or ""."""
    if name not in valid:
        return f"no parameter is called {name!r}{did_you_mean(name, valid)}"
    kind = TYPES[valid[name].type]
    if type(value) is not kind and not (kind is float and type(value) is int):
        return f"{name}: {value!r} is not of type {kind.__name__}"
    words, holds = RULES.get(name, ("", lambda value: True))
    with contextlib.suppress(TypeError):  # declared with a type other than the rule's
        if holds(value):
            return ""
    return f"{name}: {value!r} must be {words}"


def convert_value(text: str, kind: str) -> object:
    """Return the text as a value of a type from `TYPES`, or the text itself if it is not valid."""
    try:
        return {"true": True, "false": False}[text.lower()] if kind == "bool" else TYPES[kind](text)
    except (KeyError, ValueError):
        return text


def check_parameters(source: Path, given: dict[str, str]) -> dict[str, object]:
    """Return the values of all of a chapter's parameters, with absolute paths: a chapter runs in
    its own folder, not in the one where its parameters were given.

    Args:
        source: The chapter.
        given: Name -> text of a value; others have their defaults.

    Returns:
        Values by name.

    Raises:
        CmpError: A name is unknown, or a text is not a valid value of its type.
    """
    valid = parameters(source)
    values = {name: parameter.default for name, parameter in valid.items()}
    for name, text in given.items():
        values[name] = convert_value(text, valid[name].type) if name in valid else text
        if name in PATHS and text:
            values[name] = os.path.abspath(os.path.expanduser(text))
    check_values(values, valid, f"{source.stem}: ")
    return values


def check_injected(scope: dict[str, object]) -> dict[str, Parameter]:
    """Check the parameters of the running chapter, in the cell after the parameters cell.

    papermill itself only warns about an unknown `-p name`, accepts any type, and passes
    `-p merge true` as text, which is converted here. It puts given values in a cell that begins
    with `# Parameters`. This cell and the parameters cell are found in the kernel's history (`In`),
    so that other names do not matter, now or when the cell is run again. Outside IPython, nothing
    can have been injected, so nothing is checked.

    Args:
        scope: The chapter's `globals()`.

    Returns:
        The parameters that the chapter declares, by name; none outside IPython.

    Raises:
        CmpError: A name is not declared, or a value has the wrong type; the message lists the
            parameters. Or the parameters cell has not run, or a line of it has another form.
    """
    if "In" not in scope:
        return {}
    valid: dict[str, Parameter] = {}
    injected: set[str] = set()
    fault = CmpError("run the parameters cell first")
    for cell in scope["In"]:
        try:
            if cell.startswith("# Parameters\n"):
                statements = [node for node in ast.parse(cell).body if isinstance(node, ast.Assign)]
                injected |= {node.targets[0].id for node in statements}
            else:
                valid = valid or declared_parameters(cell)
        except SyntaxError:  # such as a cell with a magic
            continue
        except CmpError as error:  # another cell, or the parameters cell after a wrong edit
            fault = error if re.search(r"^profile *:", cell, re.M) else fault
    if not valid:
        raise fault
    for name in injected & valid.keys():
        if isinstance(scope[name], str):
            scope[name] = convert_value(scope[name], valid[name].type)
    check_values({name: scope[name] for name in [*valid, *sorted(injected - {*valid})]}, valid)
    return valid
