"""What each of many models weighs in an interpolation (spec 4, offline weightings): (how many,
settings) -> shares, newest first, not yet normalised."""

import math
from collections.abc import Callable

from cmp.config import Merging


def equal(count: int, merging: Merging) -> list[float]:
    """All the same: their mean."""
    return [1.0] * count


def newest(count: int, merging: Merging) -> list[float]:
    """`weight` for the newest, and what is left in equal shares for the others."""
    rest = (1 - merging.weight) / max(count - 1, 1)
    return [merging.weight, *[rest] * (count - 1)] if count > 1 else [1.0]


def power(count: int, merging: Merging) -> list[float]:
    """i to the `power`, i from 1 for the oldest."""
    return [float(number) ** merging.power for number in range(count, 0, -1)]


def exponential(count: int, merging: Merging) -> list[float]:
    """Each twice as much as the one before it."""
    return [0.5**age for age in range(count)]


def log(count: int, merging: Merging) -> list[float]:
    """log(i + 1), i from 1 for the oldest."""
    return [math.log(number + 1) for number in range(count, 0, -1)]


SHARES: dict[str, Callable[[int, Merging], list[float]]] = {
    "equal": equal,
    "newest": newest,
    "power": power,
    "exponential": exponential,
    "log": log,
}
"""By `merging.shares`."""


def of(merging: Merging, count: int) -> list[float]:
    """The shares of so many models, newest first, sum 1; with `reverse` the oldest has the
    newest's."""
    shares = SHARES[merging.shares](count, merging)
    shares = shares[::-1] if merging.reverse else shares
    return [share / sum(shares) for share in shares]


def running(merging: Merging) -> bool:
    """Whether the shares of older models only shrink in proportion as one is added, so that a
    running mean is all that has to be kept."""
    return merging.shares != "newest" and not merging.reverse
