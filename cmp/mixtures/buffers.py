"""What the buffer keeps of earlier updates, and whether it is drawn from evenly."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from cmp.mixtures.choice import lowest, ranks
from cmp.seeds import numpy_generator


@dataclass(frozen=True)
class Past:
    """All n images of earlier updates: their positions in the corpus, sorted, and the numbers of
    their updates and of their classes, [n] each."""

    rows: np.ndarray
    task: np.ndarray
    label: np.ndarray


Held = tuple[np.ndarray, np.ndarray | None]
"""Which of the past's images are kept, as sorted positions in it; and of each the number of its
group, where groups are drawn from equally often."""


def unlimited(past: Past, capacity: int | None, seed: int) -> Held:
    """All that arrived; every image is drawn equally often."""
    return np.arange(len(past.rows)), None


def reservoir(past: Past, capacity: int | None, seed: int) -> Held:
    """A uniform sample of all that arrived, of a fixed size; every image is drawn equally often."""
    return lowest([_numbers("buffer", seed, past.rows)], capacity), None


def class_balanced(past: Past, capacity: int | None, seed: int) -> Held:
    """As many of each class as fit, or all; every class is drawn equally often."""
    return _balanced(past, past.label, capacity, seed)


def task_balanced(past: Past, capacity: int | None, seed: int) -> Held:
    """As many of each update as fit, or all; every update is drawn equally often."""
    return _balanced(past, past.task, capacity, seed)


def _balanced(past: Past, groups: np.ndarray, capacity: int | None, seed: int) -> Held:
    """Every group's first image, then every group's second, and so on."""
    place = ranks(groups, _numbers("buffer", seed, past.rows))
    held = lowest([_numbers("buffer/groups", seed, groups), place], capacity)
    return held, groups[held]


def _numbers(name: str, seed: int, items: np.ndarray) -> np.ndarray:
    """A random number for each item that depends on the item, the name and the seed alone."""
    return numpy_generator(name, seed).random(int(items.max(initial=0)) + 1)[items]


BUFFERS: dict[str, Callable[[Past, int | None, int], Held]] = {
    "unlimited": unlimited, "reservoir": reservoir, "class-balanced": class_balanced,
    "task-balanced": task_balanced,
}  # fmt: skip
"""By `mixture.policy`, a function of (the past, `mixture.capacity`, data seed). A buffer never
holds again what it once dropped, since it chooses by `choice.lowest`."""
