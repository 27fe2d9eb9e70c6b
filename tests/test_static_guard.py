"""What the package's code never does beside what the linter bans (pyproject.toml): read or write
pickles under another name, unpack archives to disk, make code, or draw from a global state."""

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import cmp
from tests import lock

ROOT = Path(cmp.__file__).parents[1]
SOURCES = [path for room in ("cmp", "book/lab") for path in sorted((ROOT / room).rglob("*.py"))]
CODE = {"compile", "__import__"}
METHODS = {"to_pickle", "extract"}
DRAWS = {
    *("rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial", "poisson"),
    *("rand_like", "randn_like", "randint_like"),
}
IN_PLACE = {
    *("uniform_", "normal_", "random_", "bernoulli_", "exponential_", "geometric_", "cauchy_"),
}
EXCEPTIONS = {
    ("cmp/sources.py", "compile"): "compiles a file that was imported, and runs nothing",
    ("book/lab/stamps.py", "compile"): "parses cells that may await, and runs nothing",
    ("cmp/embedded/models.py", "randn"): "initial weights, only made under fork_rng",
}
"""(file, call): why this one is right."""


def offences(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """The name and the line of each call that the package must not make."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        given = {each.arg: ast.unparse(each.value) for each in node.keywords}
        called = ast.unparse(node.func)
        module, _, name = called.rpartition(".")
        draws = name in IN_PLACE or (module == "torch" and name in DRAWS)
        if (
            called in CODE
            or (module and name in METHODS)
            or given.get("allow_pickle", "False") != "False"
            or (called == "np.load" and len(node.args) > 2)
            or (draws and given.get("generator", "None") == "None")
        ):
            yield name, node.lineno


def test_the_package_does_none_of_it_but_for_exceptions_that_are_still_needed():
    found = {}
    for path in SOURCES:
        where = path.relative_to(ROOT).as_posix()
        for name, line in offences(ast.parse(path.read_text(encoding="utf-8"))):
            found[where, name] = line
    assert found.keys() == EXCEPTIONS.keys(), found


@pytest.mark.parametrize(
    "code",
    [
        "np.load('x', allow_pickle=True)", "np.load('x', None, True)", "table.to_pickle('x')",
        "archive.extract('x')", "compile(text, 'x', 'exec')", "torch.rand(3)",
        "torch.randn_like(x, generator=None)", "weights.uniform_(-1, 1)",
    ],
)  # fmt: skip
def test_an_offence_is_seen(code):
    assert len(list(offences(ast.parse(code)))) == 1


def test_every_seed_is_set_within_a_fork_that_puts_the_state_back():
    seeds, inside = 0, 0
    for path in SOURCES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        seeds += ast.unparse(tree).count("default_generator.manual_seed(")
        for node in ast.walk(tree):
            if isinstance(node, ast.With) and "fork_rng" in " ".join(map(ast.unparse, node.items)):
                inside += ast.unparse(node).count("default_generator.manual_seed(")
    assert inside == seeds > 0


def test_every_third_party_is_pinned_by_version_and_sha256():
    """All that pyproject.toml and the Makefile install; an install refuses what is not listed."""
    entries = lock.read_lock(lock.LOCK.read_text())
    tree = tomllib.loads((lock.ROOT / "pyproject.toml").read_text())
    project = tree["project"]
    needs = [*tree["build-system"]["requires"], *lock.TOOLS.split(), *project["dependencies"]]
    needs += [need for extra in project["optional-dependencies"].values() for need in extra]
    for need in map(Requirement, needs):
        version, _, hashes = entries[canonicalize_name(need.name)]
        assert need.specifier.contains(version), need
        assert hashes, need
    assert all(hashes for _, _, hashes in entries.values())
    makefile = (lock.ROOT / "Makefile").read_text()
    installs = [line for line in makefile.splitlines() if line.startswith("\t$(PIP_INSTALL)")]
    assert all("--require-hashes" in line or "--no-deps" in line for line in installs)
