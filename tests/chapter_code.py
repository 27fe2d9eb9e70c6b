"""What chapters define in their own cells, to be tested like any other function."""

import ast
from typing import Any

from lab import chapters

KINDS = (ast.Import, ast.ImportFrom, ast.FunctionDef)


def definitions(number: str) -> dict[str, Any]:
    """Return what a chapter imports and the functions that it defines, by name."""
    [source] = chapters.select([number])
    cells = [cell.source for cell in chapters.notebook(source).cells if cell.cell_type == "code"]
    nodes = [node for cell in cells for node in ast.parse(cell).body if isinstance(node, KINDS)]
    namespace: dict[str, Any] = {}
    exec(compile(ast.Module(nodes, []), str(source), "exec"), namespace)
    return namespace
