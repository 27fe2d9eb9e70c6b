"""Count lines of code per part of the project: `python -m tools.lines [CHECKOUT...]`.

A line counts if a token other than a comment touches it, unless it belongs to a string that stands
alone as a statement. Docstrings are such strings, and so are the explanations below constants and
attributes. Blank lines therefore never count, except within strings that are values.

Figures of 0.3.0 (`git archive v0.3.0 | tar -x -C FOLDER`, then `python -m tools.lines FOLDER`):

    part              lines   files
    core              5,249      48
    scale, runs, cli  3,946      34
    releases          3,645      19
    readers           2,011      15
    embedded            953       9
    experiments       3,151      20
    bench               509       9
    cmp in all       19,464     154
    book/lab          3,828      27
    tests            31,673     138
"""

import argparse
import ast
import io
import tokenize
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("cmp", "book/lab", "book/benchmark", "tests", "tools")
CORE = ("methods", "merging")
PROCESSES = ("scale", "runs", "cli")
ORDER = ("core", ", ".join(PROCESSES), "releases", "readers", "embedded", "experiments", "bench")
"""The parts of `cmp` in the order in which they are printed; others follow."""
TOTAL = "cmp in all"
SILENT = {
    *(tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE),
    *(tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER),
}


def documentation_lines(text: str) -> set[int]:
    """Return the numbers of the lines of docstrings, those below a constant included."""
    return {
        line
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
        for line in range(node.lineno, node.end_lineno + 1)
    }


def code_lines(text: str) -> set[int]:
    """Return the numbers of the lines of code."""
    touched = {
        line
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type not in SILENT
        for line in range(token.start[0], token.end[0] + 1)
    }
    return touched - documentation_lines(text)


def part_of(path: Path) -> str:
    """Return the part of the project that a file belongs to.

    Args:
        path: The file's path within the checkout.
    """
    if path.parts[0] != "cmp":
        return next(folder for folder in FOLDERS if path.is_relative_to(folder))
    room = path.parts[1] if len(path.parts) > 2 else ""
    if room in PROCESSES:
        return ORDER[1]
    return "core" if room in ("", *CORE) else room


def count(root: Path) -> dict[str, tuple[int, int]]:
    """Return the number of lines and of files of each part of a checkout, in printing order."""
    lines: Counter[str] = Counter()
    files: Counter[str] = Counter()
    for path in sorted(path for folder in FOLDERS for path in (root / folder).rglob("*.py")):
        where = path.relative_to(root)
        found = len(code_lines(path.read_text(encoding="utf-8")))
        for name in (part_of(where), *([TOTAL] if where.parts[0] == "cmp" else [])):
            lines[name] += found
            files[name] += 1
    names = [*ORDER, *sorted(lines.keys() - {*ORDER, TOTAL, *FOLDERS}), TOTAL, *FOLDERS]
    return {name: (lines[name], files[name]) for name in names if name in lines}


def main() -> None:
    """Print a table for each checkout."""
    parser = argparse.ArgumentParser(description="Count lines of code per part of the project.")
    parser.add_argument("checkout", nargs="*", type=Path, default=[ROOT])
    for root in parser.parse_args().checkout:
        counted = count(root)
        if not counted:
            parser.error(f"{root}: not a checkout: it has none of {', '.join(FOLDERS)}")
        print(f"{root!s:<17} {'lines':>7} {'files':>7}")
        for name, (lines, files) in counted.items():
            print(f"{name:<17} {lines:>7,} {files:>7,}")


if __name__ == "__main__":
    main()
