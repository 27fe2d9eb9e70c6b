"""The house keeps its shape: imports run one way, rooms stay small, public names are explained."""

import ast
import itertools
from collections import Counter
from pathlib import Path

import pytest

import cmp

PACKAGE = Path(cmp.__file__).parent

ROOMS = """
    errors paths seeds tables
    files config
    data
    streams
    mixtures
    schedules merging models
    steps methods
    budgets training
    evaluation runs
    pretraining studies reference
    claims analyses planning
    plots widgets
    book
    bench cli __main__
"""
"""From left to right as data flow; the rooms of one line may see each other, and none a later one.
`cmp` itself holds two constants."""

PLACE = {room: place for place, line in enumerate(ROOMS.split("\n")) for room in line.split()}
SOURCES = sorted(PACKAGE.rglob("*/*.py")) + sorted(PACKAGE.glob("[!_]*.py"))
MAX_MODULE, MAX_FUNCTION, MAX_TWICE = 300, 40, 6


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(tree: ast.Module) -> set[str]:
    """The rooms of this package that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "cmp":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cmp."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("cmp.")}
    return {name for name in found if name.islower() and not name.startswith("_")}


def test_every_room_has_its_place():
    rooms = {room_of(path) for path in SOURCES}
    assert rooms <= PLACE.keys()


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    here = room_of(path)
    for other in imported(parsed(path)) - {here}:
        assert PLACE[other] <= PLACE.get(here, 0), f"{here} sees {other}, which is further right"


def test_no_two_rooms_of_one_line_see_each_other():
    sees = {}
    for path in SOURCES:
        sees.setdefault(room_of(path), set()).update(imported(parsed(path)))
    for one, other in itertools.combinations(sees, 2):
        assert not (other in sees[one] and one in sees[other]), f"{one} and {other}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_rooms_and_functions_are_small(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_MODULE
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < MAX_FUNCTION, node.name


def public(tree: ast.Module) -> list[tuple[str, ast.AST]]:
    """Functions and classes that others may use, and the public methods of those classes."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    found = [(node.name, node) for node in tree.body if isinstance(node, kinds)]
    for name, node in list(found):
        if isinstance(node, ast.ClassDef):
            found += [(f"{name}.{n.name}", n) for n in node.body if isinstance(n, kinds)]
    shown = [(name, node) for name, node in found if "_" not in (name[0], name.split(".")[-1][0])]
    return [(name, node) for name, node in shown if not name.endswith(".forward")]  # torch's own


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_public_names_are_explained(path):
    tree = parsed(path)
    assert ast.get_docstring(tree), "the module says what it is"
    for name, node in public(tree):
        assert ast.get_docstring(node), name


def test_no_lines_stand_twice():
    """Six lines of code in a row, anywhere in the package, imports apart."""
    windows: Counter[tuple[str, ...]] = Counter()
    for path in SOURCES:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        lines = [each for each in lines if each and not each.startswith(("#", "import ", "from "))]
        windows.update({tuple(lines[at : at + MAX_TWICE]) for at in range(len(lines) - MAX_TWICE)})
    twice = [window for window, count in windows.items() if count > 1]
    assert not twice, "\n".join(twice[0])
