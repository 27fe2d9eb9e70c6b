"""Kill small runs at random moments: each, however often it died, must end in the same bits.

`make kill-test` is 200 kills; the tests do fewer.
"""

import argparse
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from forked import Child, Outcome, leftovers, server
from tqdm import tqdm

from cmp.files import PARTIAL_PREFIX

LANES = 2
"""Children at the same time."""


@dataclass
class Campaign:
    """Runs that are killed until `kills` children have died before their run was finished.

    writing: how many of them left a half written checkpoint behind; differences: each run that did
    not end as `reference` did.
    """

    reference: Outcome
    span: float
    kills: int
    folder: Path
    random: random.Random
    tick: Callable[[], object] = lambda: None
    killed: int = 0
    writing: int = 0
    runs: int = 0
    differences: list[str] = field(default_factory=list)

    def go(self) -> None:
        """Kill, restart and compare, in `LANES` lanes."""
        lanes = [_Lane(self) for _ in range(LANES)]
        while lanes:
            lanes = [lane for lane in lanes if lane.turn()]
            time.sleep(0.001)

    def compare(self, build: Path, end: Outcome, said: str) -> None:
        """Note where a run did not end as the reference did, or left something behind."""
        self.runs += 1
        name = build.name
        if end.status != 0 or end.weights is None:
            self.differences.append(f"{name}: status {end.status} {end.error}: {said[-2000:]}")
        elif end.weights != self.reference.weights:
            self.differences.append(f"{name}: weights {end.weights}")
        elif not end.metrics.equals(self.reference.metrics):
            self.differences.append(f"{name}: metrics\n{end.metrics}")
        if left := leftovers(build):
            self.differences.append(f"{name}: leftovers {left}")
        shutil.rmtree(build)


class _Lane:
    """One run after another, each in a build folder of its own."""

    def __init__(self, campaign: Campaign):
        self.campaign = campaign
        self._next_run()

    def _next_run(self) -> None:
        self.build = Path(tempfile.mkdtemp(dir=self.campaign.folder, prefix="run-"))
        self._next_child()

    def _next_child(self) -> None:
        self.child, self.deadline = Child(self.build), None

    def turn(self) -> bool:
        """Do what is due; false once there is nothing left to do."""
        campaign = self.campaign
        while self.child.hear():
            pass
        if self.child.has_begun and self.deadline is None:
            self.deadline = time.monotonic() + campaign.random.uniform(0, campaign.span)
        if not self.child.alive():
            return self._ended(self.child.outcome())
        due = self.deadline is not None and time.monotonic() > self.deadline
        if due and campaign.killed < campaign.kills:
            self.child.signal(signal.SIGKILL)
            return self._ended(self.child.outcome())
        return True

    def _ended(self, end: Outcome) -> bool:
        campaign = self.campaign
        if end.status == -signal.SIGKILL and end.weights is None:
            campaign.killed += 1
            campaign.writing += any(self.build.glob(f"checkpoints/*/{PARTIAL_PREFIX}*/*"))
            campaign.tick()
            self._next_child()
            return True
        finished = end if end.weights is None else Outcome(0, end.weights, end.metrics)
        campaign.compare(self.build, finished, self.child.said())
        if campaign.killed >= campaign.kills or len(campaign.differences) > LANES:
            return False
        self._next_run()
        return True


def uninterrupted(folder: Path) -> tuple[Outcome, float]:
    """The run as it ends if nobody kills it, and its seconds with `LANES` at the same time."""
    children = [Child(folder / f"reference-{lane}") for lane in range(LANES)]
    for child in children:
        child.await_run()
    started = time.monotonic()
    ends = [child.outcome() for child in children]
    assert all(end.status == 0 for end in ends), [child.said() for child in children]
    assert len({end.weights for end in ends}) == 1
    return ends[0], time.monotonic() - started


def main() -> None:
    """Print how many kills made how many differences; any makes the exit status 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    server()
    with tempfile.TemporaryDirectory() as name, tqdm(total=arguments.kills, unit=" kills") as bar:
        folder = Path(name)
        reference, seconds = uninterrupted(folder)
        campaign = Campaign(
            reference, seconds, arguments.kills, folder, random.Random(arguments.seed), bar.update
        )
        campaign.go()
    for difference in campaign.differences:
        print(difference)
    print(
        f"{campaign.killed} kills, {len(campaign.differences)} differences "
        f"({campaign.runs} runs; {campaign.writing} kills in the middle of a write)"
    )
    sys.exit(bool(campaign.differences))


if __name__ == "__main__":
    main()
