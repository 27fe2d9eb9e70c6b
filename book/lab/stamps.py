"""Stamp notebooks with what they were made from, so that one is stale when what it shows changes.

A stamp has a digest of the chapter's text; of each file of the book that the chapter read when it
ran, such as results, claims and advice; and, for each module, of the definitions that the chapter
reaches and that word or draw what it shows. What runs compute has no part in it, since their ids
cover that.
"""

import ast
import contextlib
import fnmatch
import hashlib
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from cmp.files import cached_by_file, file_digest
from cmp.parsing import read_yaml
from lab import chapters, reads

ROOT = chapters.BOOK.parent
FOLDERS = ("book", "cmp")
SUFFIXES = (".parquet", ".yaml", ".csv", ".bib")
"""The files that count. A saved notebook contains none of the explorers' scripts and styles."""
NAMED = re.compile(r"'([\w-]+\.(?:yaml|csv|bib))'")
"""A file that code names."""
SHOWING = re.compile(
    r"cmp$|lab\b(?!\.evidence\.(workers|cluster)$)|cmp\.releases\b|benchmark\b"
    r"|cmp\.runs\.(forecast|preflight|paper)$|cmp\.readers\.class_statistics$"
)
"""The modules that count. All others compute, as workers and the cluster do."""
PACKAGES = {"cmp": "", "lab": "book", "benchmark": "book"}
"""The project's packages, and the folder of each."""
ALWAYS = ("cmp.NUMERICS", "lab.run.drop_widgets", "lab.run.stable_notebook",
          "lab.values.fill_notebook")  # fmt: skip
"""Definitions that make every notebook what it is."""
MARKED = {"lab.values._claim": "{{verdict ", "lab.values._value": "{{(?!diagram|caption|ref)\\w"}
"""A definition that fills in marks -> a pattern of these marks. Without them it is not used."""


def make_stamp(source: Path) -> dict[str, str]:
    """Return the stamp of a chapter, part -> digest, without the files that it reads."""
    return {"text": digest_text(source)} | digest_code(source)


def digest_text(source: Path) -> str:
    """Return the digest of a chapter's text."""
    return _digest(chapters.source_text(source))


def changed_parts(stamp: dict[str, str], now: dict[str, str]) -> list[str]:
    """Return the parts of a stamp that have changed since it was made, by their names.

    Digests are compared whatever their names are, so a file or module may have moved.

    Args:
        stamp: The stamp, with the files that the chapter read, see `digest_files`.
        now: What `make_stamp` returns now.
    """
    now = now | digest_files(name for name in stamp if name.endswith(SUFFIXES))
    pairs = ((stamp, {*now.values()}), (now, {*stamp.values()}))
    return sorted({name for one, other in pairs for name in one if one[name] not in other})


def read_names() -> list[str]:
    """Return the names of the book's files that this process opened or failed to find, and the
    patterns that it searched for."""
    paths = (os.path.realpath(path) for path in reads.PATHS if path.endswith(SUFFIXES))
    return sorted({Path(x).name for x in paths if Path(x).is_relative_to(chapters.BOOK)})


def digest_files(names: Iterable[str]) -> dict[str, str]:
    """Return name -> digest of a file's content, in which comments of YAML do not count. For a
    pattern or a missing file, it is that of the names that match."""
    paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
    known = {path.name: path for path in paths if path.suffix in SUFFIXES}
    matches = {name: sorted(fnmatch.filter(known, name)) for name in names}
    return {
        name: _content(known[name]) if found == [name] else _digest(repr(found))
        for name, found in matches.items()
    }


@cached_by_file
def _content(path: Path) -> str:
    is_yaml = path.suffix == ".yaml"
    return _digest(json.dumps(read_yaml(path))) if is_yaml else file_digest(path)[:16]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def digest_code(source: Path) -> dict[str, str]:
    """Return module -> digest of its definitions that a chapter reaches, by the names that its
    cells and these definitions use, and the digests of files that they name. Comments, docstrings
    and formatting do not count.

    Args:
        source: The chapter.
    """
    text, todo = chapters.source_text(source), [*ALWAYS]
    cells = [c.source for c in chapters.notebook(source).cells if c.cell_type == "code"]
    with contextlib.suppress(SyntaxError):  # of which running it will tell
        for uses in _survey("\n".join(cells), "").uses.values():
            todo += uses
    seen = {name for name, mark in MARKED.items() if not re.search(mark, text)}
    found: dict[str, dict[str, str]] = defaultdict(dict)
    while todo:
        if (wanted := todo.pop()) in seen:
            continue
        seen.add(wanted)
        module, name, known = _locate(wanted)
        if known and name not in found[module]:
            for each in {name, ""} & known.shapes.keys():  # what defines nothing always runs
                found[module][each] = known.shapes[each]
                todo += known.uses[each]
    shapes = {name: "\n".join(sorted(each.values())) for name, each in found.items()}
    named = {name for text in shapes.values() for name in NAMED.findall(text)}
    return {name: _digest(text) for name, text in shapes.items()} | digest_files(named)


class _Survey(NamedTuple):
    """The top level of a module. Statements that define nothing are under "".

    Attributes:
        shapes: Name -> what its definitions do, as text.
        uses: Name -> the dotted names that its definitions use.
        imports: Name -> the dotted name that is imported as it, if it is this project's.
    """

    shapes: dict[str, str]
    uses: dict[str, set[str]]
    imports: dict[str, str]


def _locate(dotted: str) -> tuple[str, str, _Survey | None]:
    """Return the module and the name of a definition, and the module's survey. The survey is None
    if the module does not count, or a name is that of a module."""
    parts = dotted.split(".")
    for count in range(len(parts) - 1, 0, -1):
        module, name = ".".join(parts[:count]), parts[count]
        place = ROOT.joinpath(PACKAGES.get(parts[0], ""), *parts[:count])
        for path in (place.with_suffix(".py"), place / "__init__.py", place / "__init__.pyi"):
            if SHOWING.match(module) and path.is_file():
                known = _read_module(path, module)
                if name in known.shapes:
                    return module, name, known
                if name in known.imports:
                    return _locate(".".join([known.imports[name], *parts[count + 1 :]]))
    return "", "", None


@cached_by_file
def _read_module(path: Path, module: str) -> _Survey:
    return _survey(path.read_text(encoding="utf-8"), module)


def _survey(text: str, module: str) -> _Survey:
    flags = ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT  # cells may await
    tree, imports = compile(text, module, "exec", flags), dict[str, str]()
    statements: dict[str, list[ast.stmt]] = defaultdict(list)
    for node in filter(_is_own_import, ast.walk(tree)):
        for alias in node.names:
            name, root = alias.asname or alias.name, alias.name.partition(".")[0]
            if isinstance(node, ast.ImportFrom):  # a relative one is in the stub of a package
                origin = [module] * node.level + [node.module] * bool(node.module)
                imports[name] = ".".join([*origin, alias.name])
            else:
                imports[alias.asname or root] = alias.name if alias.asname else root
    for statement in tree.body:
        for name in _defined_names(statement) or {""}:
            statements[name].append(statement)
    uses = {
        name: {
            f"{imports[root]}{dot}{rest}" if root in imports else f"{module}.{root}"
            for statement in defining
            for root, dot, rest in (_dotted(node).partition(".") for node in ast.walk(statement))
            if root in imports or root in statements
        }
        for name, defining in statements.items()
    }
    return _Survey({name: repr(_shape(x)) for name, x in statements.items()}, uses, imports)


def _is_own_import(node: Any) -> bool:
    roots = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
    roots += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
    is_stub = isinstance(node, ast.ImportFrom) and node.level > 0
    return is_stub or any(name.partition(".")[0] in PACKAGES for name in roots)


def _defined_names(statement: ast.stmt) -> set[str]:
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {statement.name}
    if isinstance(statement, ast.Import | ast.ImportFrom):
        names = [alias.asname or alias.name.partition(".")[0] for alias in statement.names]
        return set() if _is_own_import(statement) else {*names}
    inside = [node for node in ast.walk(statement) if isinstance(node, ast.Name)]
    return {node.id for node in inside if isinstance(node.ctx, ast.Store)}


def _dotted(node: ast.AST) -> str:
    """Return a name such as `figures.plot_ends`, or ""."""
    if isinstance(node, ast.Attribute):
        before = _dotted(node.value)
        return f"{before}.{node.attr}" if before else ""
    return node.id if isinstance(node, ast.Name) else ""


def _shape(node: Any) -> Any:
    """Return what code does, in the same form in each version of Python."""
    if isinstance(node, list):
        return [_shape(each) for each in node if not _is_silent(each)]
    if not isinstance(node, ast.AST):
        return node
    if isinstance(node, ast.JoinedStr):  # Python 3.12 appends an empty text to some of them
        node.values = [each for each in node.values if getattr(each, "value", None) != ""]
    ignored = ("ctx", "kind", "type_comment")
    fields = [(name, value) for name, value in ast.iter_fields(node) if name not in ignored]
    held = [(name, _shape(value)) for name, value in fields if value is not None and value != []]
    return [type(node).__name__, *held]


def _is_silent(node: Any) -> bool:
    """Return whether a statement is a docstring or imports from this project."""
    is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return is_text or _is_own_import(node)
