"""The programs that count lines and try mutants count what they say."""

from pathlib import Path

import pytest

from tools import lines, nearest

CODE = '''"""A module."""

import sys  # why

LIMIT = 3
"""What it limits."""


def name(
    value,
):
    """Say it."""
    # a comment
    return f"""one

{value}"""
'''


def test_a_line_of_code_has_a_token_and_is_no_documentation():
    assert lines.code_lines(CODE) == {3, 5, 9, 10, 11, 14, 15, 16}


def test_every_module_is_counted_once(tmp_path):
    for name in ("cmp/a.py", "cmp/merging/b.py", "cmp/runs/c.py", "cmp/new/d.py", "book/lab/e.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    assert lines.count(tmp_path) == {
        "core": (2, 2), "scale, runs, cli": (1, 1), "new": (1, 1), "cmp in all": (4, 4),
        "book/lab": (1, 1),
    }  # fmt: skip


def test_every_module_has_tests_near_it():
    modules = sorted((nearest.ROOT / "cmp").rglob("*.py"))
    for module in (path for path in modules if not path.name.startswith("__")):
        for path in nearest.nearest_tests(module):
            assert path.exists(), f"{module}: tools/nearest.py names {path.name}"
    for name in nearest.NEAREST:
        assert (nearest.ROOT / name).exists(), f"tools/nearest.py: no {name}"
    with pytest.raises(KeyError):
        nearest.nearest_tests(Path("setup.py"))
