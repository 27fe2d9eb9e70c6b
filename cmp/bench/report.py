"""Report the results of a benchmark as a table and a JSON file."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from cmp.files import write_atomic
from cmp.project import build_folder
from cmp.runs.machine import machine_record


@dataclass(frozen=True)
class Report:
    """The results of a benchmark.

    Attributes:
        name: The benchmark.
        title: The table's title.
        columns: The table's columns.
        rows: One dict per row; missing cells stay empty.
        notes: Sentences to print below the table.
    """

    name: str
    title: str
    columns: tuple[str, ...]
    rows: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)

    def table(self) -> Table:
        """Return the rows as a table for the terminal."""
        table = Table(title=self.title, box=None)  # fits 80 characters
        for index, column in enumerate(self.columns):
            table.add_column(column, justify="right" if index else "left", no_wrap=True)
        for row in self.rows:
            table.add_row(*(_text(row.get(column, "")) for column in self.columns))
        return table

    def write(self) -> Path:
        """Write `bench/NAME.json` in the build folder, with the machine, and return its path."""
        path = build_folder() / "bench" / f"{self.name}.json"
        content = dataclasses.asdict(self) | {"machine": machine_record()}
        write_atomic(path, json.dumps(content, indent=1))
        return path


def _text(value: Any) -> str:
    """Return a number with three digits, or all digits of a large one."""
    if isinstance(value, int | float):
        return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
    return str(value)
