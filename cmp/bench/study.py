"""A small study on two processes against one, from nothing to all runs stored."""

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
"""Rounds at most; one takes a minute."""
BATCH = 32
"""Samples per batch, as in the `quick` profile."""


def study(names: list[str], corpus: Corpus, rounds: int, batch: int | None) -> Report:
    """Measure the wall clock of `RUNS` runs in fresh build folders.

    Before the rounds each alternative runs once, and the first of them all starts the server that
    workers come from.
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
    notes = ["first s: one run alone, with the start of all that workers need"]
    return Report("study", f"a study of {RUNS} runs", COLUMNS, rows, notes)


def _make_config(name: str, batch: int, seed: int) -> RunConfig:
    """Return a run of the `quick` profile, of half as many steps."""
    settings = [f"model.name={name}", "model.start=random", "training.steps=10"]
    settings += [f"training.batch={batch}", f"seed={seed}"]
    return config.parse(config.override(config.profile("quick"), settings), "benchmark")


def _make_study(configs: list[RunConfig], jobs: int) -> Callable[[], None]:
    """Return a function that computes a study in a fresh build folder, which has the data."""

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
