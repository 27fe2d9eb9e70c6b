"""Find mistakes that tests would not see: `python -m tools.mutants cmp/mixtures.py`.

A mutant is a module with one small mistake: another comparison or operator, `or` for `and`, another
constant, `return None`, or a statement left out. Tests that fail kill it; a mutant that lives is a
line whose meaning no test holds. Some mutants mean the same as the original and live for ever.

A copy of the package takes each mutant as a file, so that the processes that tests start meet it,
too. What the tests import from elsewhere is imported once; each mutant has a fork, in which the
package and the tests are imported anew. Long tests are left out.
"""

import argparse
import ast
import contextlib
import importlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tools.nearest import ROOT, nearest_tests

COMPARISONS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
OPERATORS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip
ACTIONS = (ast.Expr, ast.AugAssign, ast.Raise, ast.Continue, ast.Break, ast.Delete)
"""Statements whose absence is not noticed as a missing name."""
TYPES = ("annotation", "returns", "decorator_list")
PYTEST = ("-q", "-x", "-p", "no:randomly", "-p", "no:cacheprovider", "-p", "no:unraisableexception",
          "-m", "not long", "--tb=no", "--no-header", "--hypothesis-seed=0")  # fmt: skip
LEFT_OUT = (".git", ".venv", ".hypothesis", ".*_cache", "_build", "node_modules")


class Mutant(NamedTuple):
    """A change of a module. line, begin, end: the bytes that `text` replaces; before: they."""

    line: int
    begin: int
    end: int
    before: str
    text: str


def variants(node: ast.AST) -> Iterator[ast.AST | None]:
    """Yield what may stand in place of a node; None for a statement that is left out."""
    match node:
        case ast.Compare():
            for place, operator in enumerate(node.ops):
                ops = [*node.ops[:place], COMPARISONS[type(operator)](), *node.ops[place + 1 :]]
                yield ast.Compare(node.left, ops, node.comparators)
        case ast.BinOp(op=operator) if type(operator) in OPERATORS:
            yield ast.BinOp(node.left, OPERATORS[type(operator)](), node.right)
        case ast.BoolOp():
            yield ast.BoolOp(OPERATORS[type(node.op)](), node.values)
        case ast.UnaryOp(op=ast.Not()):
            yield node.operand
        case ast.Constant(value=bool()):
            yield ast.Constant(not node.value)
        case ast.Constant(value=int() | float()):
            yield ast.Constant(node.value + 1)
        case ast.Return(value=ast.expr() as value):
            if not isinstance(value, ast.Constant) or value.value is not None:
                yield ast.Return(ast.Constant(None))
        case ast.Expr(value=ast.Constant() | ast.Yield() | ast.YieldFrom()):
            pass  # documentation, and what makes a function a generator
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            yield None
        case _ if isinstance(node, ACTIONS):
            yield None


def visible_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes that take part in a computation: no types, decorators or error messages,
    and nothing within f-strings, whose parts Python 3.11 does not place."""
    yield node
    if isinstance(node, ast.JoinedStr | ast.Raise):
        return
    for name, value in ast.iter_fields(node):
        if name not in TYPES:
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from visible_nodes(child)


def mutants_of(source: bytes) -> list[Mutant]:
    """Return all mutants of a module, in the order of their lines."""
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    found = []
    for node in visible_nodes(ast.parse(source)):
        for variant in variants(node):
            begin = starts[node.lineno - 1] + node.col_offset
            end = starts[node.end_lineno - 1] + node.end_col_offset
            text = "pass" if variant is None else ast.unparse(variant)
            if isinstance(variant, ast.expr):
                text = f"({text})"
            found.append(Mutant(node.lineno, begin, end, ast.unparse(node), text))
    return sorted(found)


def make_copy(folder: Path) -> None:
    """Copy the checkout and the built data into a folder, since a mutant may damage anything."""
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*LEFT_OUT), dirs_exist_ok=True)
    for name in ("data", "checked"):
        shutil.copytree(ROOT / "_build" / name, folder / "_build" / name)
    for path in (ROOT / ".git", ROOT / ".venv"):
        if path.exists():
            (folder / path.name).symlink_to(path)


def is_foreign(name: str) -> bool:
    """Return whether an imported module comes from outside the working folder."""
    file = getattr(sys.modules[name], "__file__", None)
    return not (file and Path(file).is_relative_to(Path.cwd())) and name != "__main__"


def run_tests(paths: list[str], seconds: float, modules: Path | None = None) -> int | None:
    """Run tests in a fork.

    Args:
        paths: The test files.
        seconds: When to stop waiting for them.
        modules: Where to list the modules that were imported from elsewhere.

    Returns:
        The status of pytest; None if the time ran out.
    """
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        handle = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        status = 70
        try:
            status = int(pytest.main([*PYTEST, *paths]))
            if modules:
                modules.write_text("\n".join(filter(is_foreign, sys.modules)))
        finally:
            os._exit(status)
    deadline = time.monotonic() + seconds
    while not (done := os.waitpid(pid, os.WNOHANG))[0]:
        if time.monotonic() > deadline:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return None
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)  # what the tests left behind
    return os.waitstatus_to_exitcode(done[1])


def try_mutants(module: Path, tests: list[str], mutants: list[Mutant]) -> list[Mutant]:
    """Run tests against mutants, in a copy of the checkout that is the working folder.

    Returns:
        The mutants that live.

    Raises:
        SystemExit: The tests fail without a mutant.
    """
    source, modules = module.read_bytes(), Path("modules.txt")
    began = time.monotonic()
    if run_tests(tests, 3600, modules):
        raise SystemExit(
            f"{' '.join(tests)}: fails without a mutant\n{Path('output.txt').read_text()}"
        )
    limit = 30 + 3 * (time.monotonic() - began)
    for name in modules.read_text().splitlines():
        with contextlib.suppress(Exception):  # some are made by others as they are imported
            importlib.import_module(name)
    living = []
    for number, mutant in enumerate(mutants):
        module.unlink()
        module.write_bytes(source[: mutant.begin] + mutant.text.encode() + source[mutant.end :])
        os.utime(module, (number, number))  # byte code of an earlier one must not pass for this
        status = run_tests(tests, limit)
        if status == 0:
            living.append(mutant)
        verdict = {0: "LIVES", None: "killed, as it hangs"}.get(status, "killed")
        print(f"{module}:{mutant.line}: {mutant.before} -> {mutant.text}: {verdict}", flush=True)
    return living


def main() -> None:
    """Try mutants of one module, and end with status 1 if any lives."""
    parser = argparse.ArgumentParser(description="Find mistakes that tests would not see.")
    parser.add_argument("file", type=Path, help="the module, such as cmp/mixtures.py")
    parser.add_argument(
        "--test", action="append", type=Path, help="a test file; by default nearest"
    )
    parser.add_argument("--at", type=int, help="only mutants of this line")
    parser.add_argument("--most", type=int, default=40, help="how many are drawn (default: 40)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (default: 0)")
    given = parser.parse_args()
    module = given.file.resolve().relative_to(ROOT)
    tests = given.test or nearest_tests(module)
    tests = [str(path.resolve().relative_to(ROOT)) for path in tests]
    mutants = [x for x in mutants_of(given.file.read_bytes()) if given.at in (None, x.line)]
    drawn = sorted(random.Random(given.seed).sample(mutants, min(given.most, len(mutants))))
    with tempfile.TemporaryDirectory() as folder:
        make_copy(Path(folder))
        os.chdir(folder)
        places = [folder, f"{folder}/book"]
        sys.path[:] = places + [
            each for each in sys.path if Path(each) not in (ROOT, ROOT / "book")
        ]
        os.environ["PYTHONPATH"] = os.pathsep.join(places)
        for name in ("PYTHONDONTWRITEBYTECODE", "CMP_BUILD"):
            os.environ.pop(name, None)
        living = try_mutants(module, tests, drawn)
    print(f"{module}: {len(living)} of {len(drawn)} live, of {len(mutants)} that there are")
    sys.exit(bool(living))


if __name__ == "__main__":
    main()
