"""Compute published runs again with narrower vectors, as another kind of processor would.

`python -m tools.drift --runs 10` writes `book/drift.yaml`, which chapter A2 shows. The libraries
read the variables of `NARROW` when they are loaded, so that the runs are computed in a process of
their own.
"""

import argparse
import json
import os
import subprocess
import sys

import pandas as pd
import torch
import yaml

from cmp.budgets import apply_budget
from cmp.data import load_data
from cmp.project import project_folder
from cmp.runs import store
from cmp.runs.runner import execute
from lab import live_runs
from lab.evidence import results

PATH = project_folder() / "book" / "drift.yaml"
NARROW = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}
MAX_STEPS = 800
"""Of runs that are drawn; longer ones take minutes each."""


def measure(count: int, seed: int) -> dict[str, dict]:
    """Return by how much A_KA and A_ZS at the end differ from the published ones, in points."""
    runs = results.sample_published(10**6, seed)
    short = [
        run
        for run in runs
        if run.config.stream.tasks * apply_budget(run.config).training.steps <= MAX_STEPS
    ]
    studies = sorted(path.stem for path in results.RESULTS.glob("*.parquet"))
    published = pd.concat(results.published_metrics(name) for name in studies)
    settings = published.groupby("run")["setting"].first()
    rows = {}
    for run in short[:count]:
        torch.set_num_threads(run.provenance["threads"])
        corpus = load_data(run.config.data)
        again = store.make_stored_run(run.config, execute(run.config, corpus), run.identity)
        before, now = (live_runs.scores_on_way(each).iloc[-1] for each in (run, again))
        row = {"setting": str(settings[run.id]), "stored": run.provenance["cpu_capability"]}
        row["now"] = torch.backends.cpu.get_cpu_capability()
        row |= {name: round(float(now[name] - before[name]), 3) for name in ("A_KA", "A_ZS")}
        rows[run.id[:12]] = row
        print(json.dumps(row), file=sys.stderr, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if all(os.environ.get(name) == value for name, value in NARROW.items()):
        print(json.dumps(measure(arguments.runs, arguments.seed)))
        return
    command = [sys.executable, "-m", "tools.drift", *sys.argv[1:]]
    told = subprocess.run(command, env=os.environ | NARROW, stdout=subprocess.PIPE, check=True)
    rows = json.loads(told.stdout)
    said = "# Written by `python -m tools.drift`: ends of published runs, computed again.\n"
    PATH.write_text(said + yaml.safe_dump(rows, sort_keys=False))


if __name__ == "__main__":
    main()
