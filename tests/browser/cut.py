"""Of a chapter, the notebook of its explorers: the cells that show them and what they rest on."""

import ast
import re
from pathlib import Path

import nbformat

from lab import chapters

EXPLORER = re.compile(r"^(?:(?:kernel_)?explorers|scrubber)\.(\w+_(?:explorer|calculator))\(", re.M)


def names(code: str) -> tuple[set[str], set[str]]:
    """(what a cell defines, what it uses)."""
    defined, used = set(), set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Name):
            (used if isinstance(node.ctx, ast.Load) else defined).add(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            defined |= {(each.asname or each.name).partition(".")[0] for each in node.names}
        elif isinstance(node, ast.FunctionDef):
            defined.add(node.name)
    return defined, used


def explorers(source: Path) -> list[str]:
    """The functions by which a chapter shows its explorers, in order."""
    return EXPLORER.findall("\n".join(code(source)))


def code(source: Path) -> list[str]:
    """A chapter's code cells."""
    return [cell.source for cell in chapters.notebook(source).cells if cell.cell_type == "code"]


def cells(source: Path) -> list[str]:
    """The chapter's parameters and explorers, and of the other cells those that define what these
    use, and so on."""
    parameters, *rest = code(source)
    kept, wanted = [], set()
    for cell in reversed(rest):
        defined, used = names(cell)
        if EXPLORER.search(cell) or defined & wanted:
            kept.append(cell)
            wanted = wanted - defined | used
    return [parameters, *reversed(kept)]


def notebook(code: list[str]) -> nbformat.NotebookNode:
    """A notebook of some cells."""
    made = [nbformat.v4.new_code_cell(cell) for cell in code]
    return nbformat.v4.new_notebook(cells=made, metadata={"kernelspec": chapters.KERNELSPEC})
