"""How everything is timed: alternatives in turn within one process, compared round by round.

What else a machine does changes its speed by tens of percent from minute to minute, for all
alternatives of a round alike. So times are compared within rounds, and the median of those ratios
is the result; milliseconds are only given for orientation.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

SIDE = {"cpu": 2048, "cuda": 8192}
"""Rows and columns of the matrices whose product stands for the peak."""


@dataclass(frozen=True)
class Ratio:
    """How many times as fast something is.

    Attributes:
        median: The median over rounds.
        low: Their 10 % quantile.
        high: Their 90 % quantile.
    """

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


def clock() -> float:
    """Return seconds: of this process's work on one thread, of the wall on several or with a GPU.

    On one thread both are the same on a quiet machine; work of others then does not count.
    """
    if torch.get_num_threads() > 1 or torch.cuda.is_available():
        return time.perf_counter()
    return time.process_time()


def interleaved(
    alternatives: Mapping[str, Callable[[], object]],
    rounds: int,
    clock: Callable[[], float] = clock,
) -> dict[str, np.ndarray]:
    """Return the seconds of each alternative in each round, [rounds].

    Each is called once before, unmeasured. The order moves on by one every round, so that none
    always follows the same other.

    Args:
        alternatives: What to call, by name.
        rounds: How often.
        clock: Returns seconds; the wall clock where waiting for the disk counts.
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
    """Return how many times as fast `other` is, from the seconds of both in the same rounds."""
    low, median, high = np.quantile(base / other, [0.1, 0.5, 0.9])
    return Ratio(float(median), float(low), float(high))


def matmul_peak(dtype: torch.dtype, device: str = "cpu") -> float:
    """Return the FLOP/s of the best of some products of square matrices.

    Args:
        dtype: Their type.
        device: Where they are; on a CPU on the threads that torch has.
    """
    side = SIDE[device]
    noise = torch.Generator().manual_seed(0)
    a, b = (torch.rand(side, side, generator=noise).to(device, dtype) for _ in range(2))

    def product() -> None:
        a @ b
        if device == "cuda":
            torch.cuda.synchronize()

    return 2 * side**3 / float(interleaved({"product": product}, 5)["product"].min())
