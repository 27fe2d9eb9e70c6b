"""Time alternatives in turn within one process, and compare them round by round.

Other work on a machine changes its speed by tens of percent from minute to minute, but affects all
alternatives of a round equally. So times are compared within rounds, and the result is the median
of these ratios. Milliseconds are given only for orientation.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm


@dataclass(frozen=True)
class Ratio:
    """How many times faster something is.

    Attributes:
        median: The median over rounds.
        low: The 10% quantile.
        high: The 90% quantile.
    """

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


def clock() -> float:
    """Return a time in seconds: CPU time of this process on one thread, or wall-clock time on
    several threads or with a GPU.

    On one thread, both are the same on a quiet machine, and CPU time excludes other processes.
    """
    if torch.get_num_threads() > 1 or torch.cuda.is_available():
        return time.perf_counter()
    return time.process_time()


def interleaved(
    alternatives: Mapping[str, Callable[[], object]], rounds: int
) -> dict[str, np.ndarray]:
    """Return the seconds of each alternative in each round, [rounds].

    Each is first called once without timing. The order rotates by one every round, so that none
    always follows the same one.

    Args:
        alternatives: The functions to call, by name.
        rounds: The number of rounds.
    """
    names = list(alternatives)
    for call in alternatives.values():
        call()
    seconds = {name: np.empty(rounds) for name in names}
    for index in tqdm(range(rounds), desc="rounds", leave=False, disable=None):
        first = index % len(names)
        for name in [*names[first:], *names[:first]]:
            started = clock()
            alternatives[name]()
            seconds[name][index] = clock() - started
    return seconds


def times_faster(base: np.ndarray, other: np.ndarray) -> Ratio:
    """Return how many times faster `other` is, from the seconds of both in the same rounds."""
    low, median, high = np.quantile(base / other, [0.1, 0.5, 0.9])
    return Ratio(float(median), float(low), float(high))
