"""Kill small runs at random moments: each, however often it died, must end in the same bits.

`make kill-test` is 300 kills of runs of every option, a fifth of them while a result is stored; the
tests do fewer.
"""

import argparse
import dataclasses
import itertools
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import options
from forked import (
    Child,
    Family,
    Outcome,
    compute,
    families,
    leftovers,
    server,
    small_corpus,
)
from tqdm import tqdm

from cmp.files import PARTIAL_PREFIX
from cmp.runs import identity

LANES = 2
"""Children at the same time."""
STORING_SHARE, STORING_SPAN = 0.2, 0.08
"""The share of kills that wait until a result is stored, and the seconds within which they come."""
MOST_KILLS = 4
"""Kills of one run; then it ends."""
References = dict[Family | None, tuple[Outcome, float]]


@dataclass
class Campaign:
    """Runs that are killed until `kills` children have died before their run was finished.

    references: how each family of runs ends if nobody kills it, and its seconds; writing: how many
    left a half written checkpoint behind; storing: how many died while their result was stored;
    differences: each run that did not end as its reference did.
    """

    references: References
    kills: int
    folder: Path
    random: random.Random
    tick: Callable[[], object] = lambda: None
    killed: int = 0
    writing: int = 0
    storing: int = 0
    runs: int = 0
    differences: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        families = list(self.references)
        self.random.shuffle(families)
        self.turns = itertools.cycle(families)

    def go(self) -> None:
        """Kill, restart and compare, in `LANES` lanes."""
        lanes = [_Lane(self) for _ in range(LANES)]
        while lanes:
            lanes = [lane for lane in lanes if lane.turn()]
            time.sleep(0.001)

    def compare(self, build: Path, end: Outcome, said: str, family: Family | None = None) -> None:
        """Note where a run did not end as its reference did, or left something behind."""
        self.runs += 1
        reference, name = self.references[family][0], f"{build.name} {family or ''}"
        run_id = family and identity.run_id_of(options.small(*family.settings), small_corpus())
        if end.status != 0 or end.weights is None:
            self.differences.append(f"{name}: status {end.status} {end.error}: {said[-2000:]}")
        elif (end.weights, end.hits) != (reference.weights, reference.hits):
            self.differences.append(f"{name}: weights {end.weights}")
        elif not end.metrics.equals(reference.metrics):
            self.differences.append(f"{name}: metrics\n{end.metrics}")
        if left := leftovers(build, run_id):
            self.differences.append(f"{name}: leftovers {left}")
        shutil.rmtree(build)


class _Lane:
    """One run after another, each in a build folder of its own."""

    def __init__(self, campaign: Campaign):
        self.campaign = campaign
        self._next_run()

    def _next_run(self) -> None:
        self.build = Path(tempfile.mkdtemp(dir=self.campaign.folder, prefix="run-"))
        self.family = next(self.campaign.turns)
        self.kills = self.campaign.random.randint(1, MOST_KILLS)
        self._next_child()

    def _next_child(self) -> None:
        self.child, self.deadline = Child(self.build, compute, "", 1, self.family), None
        self.span = self.campaign.references[self.family][1]
        self.awaits_storing = self.campaign.random.random() < STORING_SHARE

    def turn(self) -> bool:
        """Do what is due; false once there is nothing left to do."""
        campaign = self.campaign
        while self.child.hear():
            pass
        is_awaited = self.child.is_storing if self.awaits_storing else self.child.has_begun
        if is_awaited and self.deadline is None:
            span = STORING_SPAN if self.awaits_storing else self.span
            self.deadline = time.monotonic() + campaign.random.uniform(0, span)
        if not self.child.alive():
            return self._ended(self.child.outcome())
        due = self.deadline is not None and time.monotonic() > self.deadline and self.kills
        if due and campaign.killed < campaign.kills:
            self.child.signal(signal.SIGKILL)
            return self._ended(self.child.outcome())
        return True

    def _ended(self, end: Outcome) -> bool:
        campaign = self.campaign
        if end.status == -signal.SIGKILL and end.weights is None:
            campaign.killed += 1
            campaign.storing += self.child.is_storing
            self.kills -= 1
            campaign.writing += any(self.build.glob(f"runs/*/{PARTIAL_PREFIX}*/tensors"))
            campaign.tick()
            self._next_child()
            return True
        finished = end if end.weights is None else dataclasses.replace(end, status=0)
        campaign.compare(self.build, finished, self.child.said(), self.family)
        if campaign.killed >= campaign.kills or len(campaign.differences) > LANES:
            return False
        self._next_run()
        return True


def uninterrupted(folder: Path, *families: Family | None) -> References:
    """Runs as they end if nobody kills them, and their seconds with `LANES` at the same time."""
    references: References = {}
    for first in range(0, len(families), LANES):
        group = families[first : first + LANES]
        builds = [Path(tempfile.mkdtemp(dir=folder, prefix="reference-")) for _ in group]
        pairs = zip(builds, group, strict=True)
        children = [Child(build, compute, "", 1, family) for build, family in pairs]
        for child in children:
            child.await_run()
        started = time.monotonic()
        for build, family, child in zip(builds, group, children, strict=True):
            end = child.outcome()
            assert end.status == 0 and not end.error, (family, end.error, child.said())
            known = references.setdefault(family, (end, time.monotonic() - started))[0]
            assert (known.weights, known.hits) == (end.weights, end.hits)
            shutil.rmtree(build)
    return references


def main() -> None:
    """Print how many kills made how many differences; any makes the exit status 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    server()
    with tempfile.TemporaryDirectory() as name, tqdm(total=arguments.kills, unit=" kills") as bar:
        folder = Path(name)
        references = uninterrupted(folder, None, None, *families())
        campaign = Campaign(
            references, arguments.kills, folder, random.Random(arguments.seed), bar.update
        )
        campaign.go()
    for difference in campaign.differences:
        print(difference)
    print(
        f"{campaign.killed} kills, {len(campaign.differences)} differences "
        f"({campaign.runs} runs of {len(references)} families; {campaign.writing} kills in the "
        f"middle of a checkpoint, {campaign.storing} while a result was stored)"
    )
    sys.exit(bool(campaign.differences))


if __name__ == "__main__":
    main()
