"""Benchmarks, which compare the speed of alternatives in turn within one process.

A benchmark is a function of (names, rounds, batch): the models, how often each alternative runs,
and the samples per batch, or None for the default. It returns a `cmp.bench.report.Report`.
"""

import importlib

from cmp.errors import CmpError

BENCHMARKS = {
    "step": ("small", "tiny-vit", "bench-nano", "bench-micro", "bench-mid"),
    "features": ("small", "ViT-B-32", "ViT-B-16"),
    "gpu": ("small", "bench-mid", "ViT-B-16"),
}
"""Name -> default models. A module of this package has that name, and a function in it, too."""


def run_benchmark(name: str, models: list[str] | None, rounds: int, batch: int | None):
    """Run a benchmark.

    Args:
        name: One of `BENCHMARKS`.
        models: The models; if None, the benchmark's default.
        rounds: The number of times that each alternative runs.
        batch: The samples per step; if None, the benchmark's default.

    Returns:
        A `cmp.bench.report.Report`.

    Raises:
        CmpError: There is no such benchmark, or it cannot be run.
    """
    if name not in BENCHMARKS:
        raise CmpError(f"no benchmark is called {name!r}; choose from {', '.join(BENCHMARKS)}")
    measure = getattr(importlib.import_module(f"cmp.bench.{name}"), name)
    return measure(models or list(BENCHMARKS[name]), rounds, batch)
