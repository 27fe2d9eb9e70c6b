"""Report the results of a benchmark as a table and a JSON file."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    notes: list[str]

    def write(self) -> Path:
        """Write `bench/NAME.json` in the build folder, with the machine, and return its path."""
        path = build_folder() / "bench" / f"{self.name}.json"
        content = dataclasses.asdict(self) | {"machine": machine_record()}
        write_atomic(path, json.dumps(content, indent=1))
        return path
