"""`python -m tests.bench NAME [MODEL ...]`: measure evaluation, checkpoints or merging.

Like `cmpt bench`, but outside the package, since they serve its development only.
"""

import argparse
import importlib

import torch

from cmp.cli import shared
from cmp.embedded import packed

MODELS = {"evaluate": ["small"], "checkpoint": ["small"], "merge": ["ViT-B-16"]}
"""The default models by benchmark, a module of this folder with a function of its name."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=MODELS)
    parser.add_argument("models", nargs="*")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int)
    given = parser.parse_args()
    torch.set_num_threads(1)
    measure = getattr(importlib.import_module(f"tests.bench.{given.name}"), given.name)
    names = given.models or MODELS[given.name]
    report = measure(names, packed.load_embedded(), given.rounds, given.batch)
    rows = [[row.get(column, "") for column in report.columns] for row in report.rows]
    shared.print_table(report.columns, rows, report.title)
    print(*report.notes, f"written: {report.write()}", sep="\n")


if __name__ == "__main__":
    main()
