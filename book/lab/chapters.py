"""Chapters as sources: MyST Markdown notebooks with one cell of typed, checked parameters.

A chapter is `book/NN_name.md`. jupytext and papermill are imported in the functions that need them:
a chapter's kernel imports this module for `guard` alone.
"""

import ast
import contextlib
import difflib
import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cmp.config import PROFILES
from cmp.errors import CmpError
from cmp.files import project_folder, write_atomic

BOOK = project_folder() / "book"
FORMATS = "ipynb,md:myst"
PAGES = ("STYLE.md", "api.md", "architecture.md", "glossary.md", "index.md", "literature.md")
"""Texts of the book that are no chapters."""
CHAPTER = re.compile(r"(\d\d|A\d)_[a-z0-9_]+\.md")
KERNELSPEC = {"display_name": "Python 3", "language": "python", "name": "python3"}
TYPES = {"str": str, "int": int, "float": float, "bool": bool}
RULES = {  # what else a parameter of this name must obey, in words and as a test
    "profile": (f"one of {', '.join(PROFILES)}", lambda value: value in PROFILES),
    "seeds": ("at least 1", lambda value: value >= 1),
    "jobs": ("at least 1", lambda value: value >= 1),
    "device": ("cpu, cuda or cuda:N", lambda value: re.fullmatch(r"cpu|cuda(:\d+)?", value)),
}


@dataclass(frozen=True)
class Parameter:
    """One line of a parameters cell: `name: type = default  # help`."""

    name: str
    type: str
    default: object
    help: str

    def __str__(self) -> str:
        return f"{self.name}: {self.type}" + (f" ({self.help})" if self.help else "")


def chapters(folder: Path = BOOK) -> dict[str, Path]:
    """The chapters by number, in order; a misnamed file or a number given twice: `CmpError`."""
    found: dict[str, Path] = {}
    for path in sorted(set(folder.glob("*.md")) - {folder / name for name in PAGES}):
        match = CHAPTER.fullmatch(path.name)
        if not match:
            raise CmpError(f"{path}: a chapter is called NN_name.md, such as 03_merging.md")
        if match[1] in found:
            raise CmpError(f"{folder}: {found[match[1]].name} and {path.name} have one number")
        found[match[1]] = path
    return found


def select(numbers: Iterable[str] | None = None, folder: Path = BOOK) -> list[Path]:
    """The chapters of these numbers, or all, in the book's order; unknown: `CmpError`."""
    found = chapters(folder)
    wanted = [number.zfill(2) for number in numbers or found]
    for number in wanted:
        if number not in found:
            raise CmpError(f"no chapter {number}; there are {', '.join(found) or 'none yet'}")
    return [path for number, path in found.items() if number in wanted]


def source_text(source: Path) -> str:
    """The chapter's text with line ends as on Unix."""
    try:
        return source.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise CmpError(f"{source}: cannot be read ({error})") from error


def source_hash(source: Path) -> str:
    """sha256 of the chapter's text with line ends as on Unix."""
    return hashlib.sha256(source_text(source).encode()).hexdigest()


def notebook(source: Path):
    """The chapter as an nbformat notebook without outputs, the same to the byte every time.

    A cell's id is a hash of the chapter's name, of its text and of how often that text stood
    before: an edit changes no other cell's id, and no two chapters share one. Raises `CmpError`
    where jupytext cannot read the file.
    """
    import jupytext

    text = source_text(source)
    try:
        book = jupytext.reads(text, fmt="md:myst")
    except Exception as error:  # whatever its parsers of YAML, Markdown and JSON schemas raise
        raise CmpError(f"{source}: not a MyST Markdown notebook ({error})") from error
    book.metadata["kernelspec"] = dict(KERNELSPEC)
    seen: dict[str, int] = {}
    for cell in book.cells:
        number = seen[cell.source] = seen.get(cell.source, -1) + 1
        identity = f"{source.stem}:{number}:{cell.source}"
        cell["id"] = hashlib.sha256(identity.encode()).hexdigest()[:12]
    return book


def write_notebook(book, path: Path) -> None:
    """Write an nbformat notebook, whole or not at all."""
    import nbformat

    write_atomic(path, nbformat.writes(book))


def declared_parameters(cell: str) -> dict[str, Parameter]:
    """The parameters that a parameters cell declares.

    Every statement is `name: type = literal  # help`, with type str, int, float or bool; anything
    else is a `CmpError`.
    """
    found = {}
    try:
        body = ast.parse(cell).body
    except (ValueError, RecursionError, MemoryError) as error:
        raise CmpError(f"parameters cell: Python cannot read it ({error})") from error
    for node in body:
        line = cell.split("\n")[node.end_lineno - 1].encode()  # lines as Python counts them
        try:
            name, kind = node.target.id, ast.unparse(node.annotation)
            default, _ = ast.literal_eval(node.value), TYPES[kind]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CmpError(
                f"parameters cell: {line.decode().strip()!r}: write name: type = value  # help, "
                f"with a type of {', '.join(TYPES)}"
            ) from error
        comment = line[node.end_col_offset :].decode().strip(" #")
        found[name] = Parameter(name, kind, default, comment)
    return found


def parameters(source: Path) -> dict[str, Parameter]:
    """A chapter's parameters by name, as `papermill --help-notebook` shows them too.

    Raises `CmpError` where there is not exactly one cell tagged `parameters`, or papermill reads
    the cell differently (it gives up on a line with a second `=`).
    """
    from papermill.translators import PythonTranslator

    tagged = [c for c in notebook(source).cells if "parameters" in c.metadata.get("tags", [])]
    if len(tagged) != 1:
        raise CmpError(f"{source}: {len(tagged)} cells are tagged parameters; there must be one")
    try:
        found = declared_parameters(tagged[0].source)
    except (CmpError, SyntaxError) as error:
        raise CmpError(f"{source}: {error}") from error
    seen = {p.name: p.help for p in PythonTranslator.inspect(tagged[0])}
    for name, parameter in found.items():
        if seen.get(name) != parameter.help:
            raise CmpError(f"{source}: papermill cannot read {name}; is there a second = or #?")
    return found


def parameter_error(what: str, valid: dict[str, Parameter]) -> CmpError:
    """The error for a wrong parameter: what is wrong, then every valid one."""
    return CmpError(f"{what}; the parameters are {', '.join(map(str, valid.values()))}")


def check_values(values: dict[str, object], valid: dict[str, Parameter]) -> None:
    """Refuse an unknown name, a wrong type and an impossible value, with a `CmpError`."""
    for name, value in values.items():
        if name not in valid:
            near = difflib.get_close_matches(name, valid, n=1, cutoff=0.0)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise parameter_error(f"no parameter is called {name!r}{hint}", valid)
        kind = TYPES[valid[name].type]
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise parameter_error(f"{name}: {value!r} is no {kind.__name__}", valid)
        words, holds = RULES.get(name, ("", lambda value: True))
        try:
            obeyed = holds(value)
        except TypeError:  # declared with another type than the rule's
            obeyed = False
        if not obeyed:
            raise parameter_error(f"{name}: {value!r} must be {words}", valid)


def convert_value(text: str, kind: str) -> object:
    """The text as a value of the type, or the text itself where it is none."""
    try:
        return {"true": True, "false": False}[text.lower()] if kind == "bool" else TYPES[kind](text)
    except (KeyError, ValueError):
        return text


def check_parameters(source: Path, given: dict[str, str]) -> dict[str, object]:
    """All of a chapter's parameters: the defaults, and the given ones converted to their types.

    Raises `CmpError` that lists the valid parameters for an unknown name, a text that is no value
    of the type, and an impossible value.
    """
    valid = parameters(source)
    values = {
        n: convert_value(text, valid[n].type) if n in valid else text for n, text in given.items()
    }
    values = {name: parameter.default for name, parameter in valid.items()} | values
    try:
        check_values(values, valid)
    except CmpError as error:
        raise CmpError(f"{source.stem}: {error}") from error
    return values


def changed_parameters(source: Path, values: dict[str, object]) -> dict[str, object]:
    """Those of the values that are not the chapter's defaults; checked, as by `check`."""
    valid = parameters(source)
    check_values(values, valid)
    return {name: value for name, value in values.items() if value != valid[name].default}


def check_injected(scope: dict[str, object]) -> None:
    """For chapters, in the cell after the parameters cell: `guard(globals())`.

    papermill itself only warns about an unknown `-p name` and takes any type; `-p dry_run true` is
    a text to it, which becomes what it means here. It puts the given values in a cell of its own
    that begins with `# Parameters`; this looks that cell and the parameters cell up in the kernel's
    history (`In`), so that whatever else is defined, now or when the cell is run again, does not
    matter. Raises `CmpError` that lists the valid parameters
    for a name that the parameters cell does not declare and for a value that is not of its type.
    Outside IPython nothing can have been injected, and nothing is checked.
    """
    if "In" not in scope:
        return
    valid: dict[str, Parameter] = {}
    injected: set[str] = set()
    for cell in scope["In"]:
        with contextlib.suppress(CmpError, SyntaxError):
            if cell.startswith("# Parameters\n"):
                statements = [node for node in ast.parse(cell).body if isinstance(node, ast.Assign)]
                injected |= {node.targets[0].id for node in statements}
            else:
                valid = valid or declared_parameters(cell)
    if not valid:
        raise CmpError("run the parameters cell first")
    for name in injected & valid.keys():
        if isinstance(scope[name], str):
            scope[name] = convert_value(scope[name], valid[name].type)
    check_values({name: scope[name] for name in [*valid, *sorted(injected - {*valid})]}, valid)
