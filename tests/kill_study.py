"""Kill a study and its workers at random moments, and start it again, until it is computed.

No finished run may be computed twice, and the tables must be those of a study that nobody kills.
`make study-kill-test` kills a study of 24 runs; the tests kill a smaller one.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import pytest
from forked import TIMEOUT, Child, await_true, server, small_corpus, study, workers_of
from tqdm import tqdm

from cmp.embedded import packed
from lab import analyses
from lab.evidence import studies

SIZES = {
    "stream.tasks": 3, "training.steps": 8, "training.batch": 8, "evaluation.subset": 2,
    "model.start": "random",
}  # fmt: skip
PEAKS = [0.0002, 0.0003, 0.0005, 0.0008]


@dataclass
class Campaign:
    """A study of `runs` runs, killed `parents` times itself, and its workers `workers` times.

    twice: the runs whose stored result changed after it was first seen.
    """

    folder: Path
    random: random.Random
    runs: int = 24
    parents: int = 5
    workers: int = 10
    tick: Callable[[], object] = lambda: None
    seen: dict[str, tuple] = field(default_factory=dict)
    twice: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        lists = {"schedule.peak": PEAKS[: self.runs // 6], "mixture.replay": [0.5, 1.0]}
        grid = {"question": "?", "replicates": 3, "live": []}
        grid["settings"] = {"a": SIZES | {"product": lists}}
        (self.folder / "77.yaml").write_text(json.dumps(grid))
        self.build = self.folder / "killed"

    def start(self, build: Path) -> Child:
        """The study in a process of its own, as the shell starts it."""
        arguments = ("77", "--profile", "quick", "--jobs", "2")
        return Child(build, study, self.folder, *arguments)

    def table(self, build: Path) -> pd.DataFrame:
        """What the study found."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("CMP_BUILD", str(build))
            patch.setattr(studies, "STUDIES", self.folder)
            patch.setattr(packed, "load_embedded", lambda *roles: small_corpus())
            configs = studies.load_study("77").configs("quick")
            assert len(configs) == self.runs
            return analyses.collect_metrics(configs)

    def look(self) -> int:
        """Runs that are stored; notes each that is another file than it was."""
        for path in self.build.glob("runs/[0-9a-f]*/run.json"):
            status = path.stat()
            file_state = (status.st_ino, status.st_mtime_ns)
            if self.seen.setdefault(path.parent.name, file_state) != file_state:
                self.twice.add(path.parent.name)
        return len(self.seen)

    def go(self) -> None:
        """Compute the study undisturbed, then with kills, and compare."""
        started = time.monotonic()
        reference = self.start(self.folder / "whole")
        assert reference.outcome().status == 0, reference.said()
        span = (time.monotonic() - started) / self.runs
        kinds = ["parent"] * self.parents + ["worker"] * self.workers
        self.random.shuffle(kinds)
        moments = sorted(self.random.randrange(self.runs // 3) for _ in kinds)
        child = self.start(self.build)
        for kind, moment in zip(kinds, moments, strict=True):
            self.watch(child, lambda moment=moment: self.look() >= moment)
            self.wait(child, self.random.uniform(0, span))
            child = self.kill(child, kind)
            self.tick()
        self.watch(child, lambda: not child.alive())
        self.judge(child)

    def watch(self, child: Child, condition: Callable[[], bool]) -> None:
        """Keep looking at the stored runs until something is so, or the study ends."""
        await_true(lambda: self.look() < 0 or condition() or not child.alive(), "so", 10 * TIMEOUT)

    def wait(self, child: Child, seconds: float) -> None:
        """Let some time pass, but no more than one run end in it."""
        until, count = time.monotonic() + seconds, self.look()
        self.watch(child, lambda: time.monotonic() > until or self.look() > count)

    def kill(self, child: Child, kind: str) -> Child:
        """Kill a worker, or the study's own process; that is started again, sometimes at once."""
        self.watch(child, lambda: bool(workers_of(self.build)))
        if not child.alive():
            self.problems.append(f"it ended before all kills: {child.outcome().status}")
            return child
        if kind == "worker":
            pid = self.random.choice(workers_of(self.build))
            signal_process(pid)
            return child
        child.signal(signal.SIGKILL)
        child.outcome()
        if self.random.random() < 0.5:
            await_true(lambda: not workers_of(self.build), "without orphans", 30)
        return self.start(self.build)

    def judge(self, child: Child) -> None:
        """Note all that is not as if nobody had killed anything."""
        if (status := child.outcome().status) != 0:
            self.problems.append(f"status {status}: {child.said()[-2000:]}")
        await_true(lambda: not workers_of(self.build), "without workers", 30)
        self.look()
        if left := [path.name for path in self.build.glob("runs/*/task-*")]:
            self.problems.append(f"checkpoints are left: {left}")
        self.compare(self.folder / "whole")

    def compare(self, reference: Path) -> None:
        """Note where the tables, or any final weights, are not those of the other folder."""
        tables = [self.table(build) for build in (reference, self.build)]
        weights = [
            {
                path.parent.name: json.loads(path.read_text())["weights_sha256"]
                for path in build.glob("runs/[0-9a-f]*/run.json")
            }
            for build in (reference, self.build)
        ]
        if not tables[0].equals(tables[1]):
            self.problems.append("the tables differ")
        if weights[0] != weights[1]:
            self.problems.append("final weights differ")

    def __str__(self) -> str:
        verdict = "; ".join(self.problems) or "tables equal"
        kills = f"{self.parents} kills of the parent, {self.workers} of workers"
        return f"{self.runs} runs, {kills}: {len(self.twice)} computed twice, {verdict}"


def signal_process(pid: int, number: int = signal.SIGKILL) -> None:
    """Send a signal to a process that may be gone."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def main() -> None:
    """Print what a campaign found; anything that is not as it should be makes the status 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    server()
    small_corpus()  # while the data are in sight
    with tempfile.TemporaryDirectory() as name, tqdm(total=15, unit=" kills") as bar:
        campaign = Campaign(Path(name), random.Random(arguments.seed), tick=bar.update)
        campaign.go()
    print(campaign)
    sys.exit(bool(campaign.problems or campaign.twice))


if __name__ == "__main__":
    main()
