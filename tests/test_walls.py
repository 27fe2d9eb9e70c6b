"""The house keeps its shape: imports run one way, public names are explained."""

import ast
import graphlib
import subprocess
import sys
from collections import Counter
from pathlib import Path

import cmp
from tools.lines import code_lines

PACKAGE = Path(cmp.__file__).parent
BOOK = PACKAGE.parent / "book"

MAY_IMPORT = {
    "core": {"core"},
    "scale": {"core", "scale"},
    "runs": {"core", "scale", "runs"},
    "readers": {"core", "scale", "readers"},
    "embedded": {"core", "scale", "readers", "embedded"},
    "releases": {"core", "scale", "runs", "readers", "releases"},
}
MAY_IMPORT["bench"] = MAY_IMPORT["cli"] = {*MAY_IMPORT["releases"], "embedded", "bench", "cli"}
MAY_IMPORT["benchmark"] = MAY_IMPORT["cli"] | {"benchmark"}
MAY_IMPORT["lab"] = MAY_IMPORT["benchmark"] | {"lab"}
"""The rooms that a room's modules may import from. `cmp` imports nothing of the book."""

MAX_REPEATED = 6

SOURCES = [
    path
    for folder in (PACKAGE, BOOK / "lab", BOOK / "benchmark")
    for path in sorted(folder.rglob("*.py"))
]


def room_of(module: str) -> str:
    """The room of a module by its dotted name, such as `cmp.merging.rules`."""
    first, *parts = module.split(".")
    if first in ("lab", "benchmark"):
        return first
    if parts and parts[0] == "__main__":
        return "cli"
    return parts[0] if parts and parts[0] in MAY_IMPORT else "core"


def module_of(path: Path) -> str:
    """The dotted name under which a file is imported."""
    parts = path.relative_to(BOOK if path.is_relative_to(BOOK) else PACKAGE.parent).parts
    return ".".join(parts).removesuffix(".py").removesuffix(".__init__")


def parse_source(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def label(path: Path) -> str:
    return str(path.relative_to(PACKAGE.parent))


def own_modules(node: ast.AST) -> list[str]:
    """The modules of this project that an import statement may load."""
    names = []
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and node.module:
        names = [f"{node.module}.{alias.name}" for alias in node.names]
    return [name for name in names if name.split(".")[0] in ("cmp", "lab", "benchmark")]


def test_imports_run_one_way():
    for path in SOURCES:
        room, nodes = room_of(module_of(path)), ast.walk(parse_source(path))
        wrong = {room_of(name) for node in nodes for name in own_modules(node)} - MAY_IMPORT[room]
        assert not wrong, f"{label(path)}, in {room}, imports from {sorted(wrong)}"


def test_no_files_import_in_a_circle():
    """Imports inside functions count, too."""
    modules = {module_of(path): path for path in SOURCES}
    imports = {
        name: {
            module
            for node in ast.walk(parse_source(path))
            for target in own_modules(node)
            for module in (target, target.rpartition(".")[0])
            if module in modules and module not in (name, "cmp", "lab", "benchmark")
        }
        for name, path in modules.items()
    }
    graphlib.TopologicalSorter(imports).prepare()  # raises CycleError, which names the files


def public_names(tree: ast.Module) -> list[tuple[str, ast.AST]]:
    """Functions and classes that others may use, and the public methods of those classes."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    names = [(node.name, node) for node in tree.body if isinstance(node, kinds)]
    for name, node in list(names):
        if isinstance(node, ast.ClassDef):
            names += [
                (f"{name}.{part.name}", part) for part in node.body if isinstance(part, kinds)
            ]
    shown = [(name, node) for name, node in names if "_" not in (name[0], name.split(".")[-1][0])]
    return [(name, node) for name, node in shown if not name.endswith(".forward")]  # torch's own


def test_public_names_are_explained():
    for path in SOURCES:
        tree = parse_source(path)
        assert ast.get_docstring(tree) or not tree.body, f"{label(path)}: what is this module?"
        for name, node in public_names(tree):
            assert ast.get_docstring(node), f"{label(path)}: {name}"


def test_no_lines_stand_twice():
    """Six lines of code in a row, anywhere in the project, imports apart."""
    windows: Counter[tuple[str, ...]] = Counter()
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        lines = [text.splitlines()[number - 1].strip() for number in sorted(code_lines(text))]
        lines = [line for line in lines if not line.startswith(("import ", "from "))]
        for start in range(len(lines) - MAX_REPEATED):
            windows[tuple(lines[start : start + MAX_REPEATED])] += 1
    repeated = [window for window, count in windows.items() if count > 1]
    assert not repeated, "\n".join(repeated[0])


def test_configs_are_read_without_torch():
    """So that `cmpt data list` and completion answer at once."""
    code = "import sys, cmp.config; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "False\n"
