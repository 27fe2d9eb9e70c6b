"""Measure a small study with two processes against one, from the start until all runs are
stored."""

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from cmp import config
from cmp.bench import timing
from cmp.bench.report import Report
from cmp.config import RunConfig
from cmp.data import Corpus
from cmp.experiments import studies
from cmp.project import build_folder

COLUMNS = ("model", "1 / 2 jobs", "1 job s", "2 jobs s", "first s")
RUNS = 8
ROUNDS = 3
"""Most rounds; one takes a minute."""
BATCH = 32
"""Samples per batch, as in the `quick` profile."""


def study(names: list[str], corpus: Corpus, rounds: int, batch: int | None) -> Report:
    """Measure the wall-clock time of `RUNS` runs in new build folders.

    Each alternative runs once before the rounds, and the very first run starts the server that
    forks workers.
    """
    rows = []
    for name in names:
        configs = [_make_config(name, batch or BATCH, seed) for seed in range(RUNS)]
        started = time.perf_counter()
        _make_study(configs[:1], 1)()
        first = time.perf_counter() - started
        jobs = {count: _make_study(configs, int(count)) for count in "12"}
        seconds = timing.interleaved(jobs, min(rounds, ROUNDS), clock=time.perf_counter)
        rows.append(
            {
                "model": name,
                "1 / 2 jobs": timing.times_faster(seconds["1"], seconds["2"]),
                "1 job s": float(np.median(seconds["1"])),
                "2 jobs s": float(np.median(seconds["2"])),
                "first s": first,
            }
        )
    notes = ["first s: a single run, including the start of everything that workers need"]
    return Report("study", f"a study of {RUNS} runs", COLUMNS, rows, notes)


def _make_config(name: str, batch: int, seed: int) -> RunConfig:
    """Return a run of the `quick` profile with half as many steps."""
    settings = [f"model.name={name}", "model.start=random", "training.steps=10"]
    settings += [f"training.batch={batch}", f"seed={seed}"]
    return config.parse(config.override(config.profile("quick"), settings), "benchmark")


def _make_study(configs: list[RunConfig], jobs: int) -> Callable[[], None]:
    """Return a function that computes a study in a new build folder with the data."""

    def compute() -> None:
        data, before = build_folder().absolute() / "data", os.environ.get("CMP_BUILD")
        with tempfile.TemporaryDirectory(prefix="cmp-bench-") as folder:
            (Path(folder) / "data").symlink_to(data)
            os.environ["CMP_BUILD"] = folder
            try:
                studies.compute_runs(configs, jobs)
            finally:
                os.environ["CMP_BUILD"] = before or str(data.parent)

    return compute
