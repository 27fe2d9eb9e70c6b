"""Named, counter-based randomness.

Every random draw is a function of a name, a seed and counters (task, step, ...). Draws do not
depend on earlier draws, so a run can start at any step, and two seeds differ in every task.
"""

import contextlib
import hashlib
from collections.abc import Iterator

import numpy as np
import torch


def digest(*parts: str | int) -> bytes:
    """Return the SHA-256 of the parts, with separators so that ("a", "bc") and ("ab", "c")
    differ."""
    return hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()


def unit_interval(*parts: str | int) -> float:
    """Return a number in [0, 1) that depends only on the parts."""
    return int.from_bytes(digest(*parts)[:8], "big") / 2**64


def numpy_generator(name: str, seed: int, *counters: str | int) -> np.random.Generator:
    """Return a fresh Philox generator for this (name, seed, counters)."""
    key = int.from_bytes(digest(name, seed, *counters)[:16], "big")
    return np.random.Generator(np.random.Philox(key=key))


def torch_generator(name: str, seed: int, *counters: str | int) -> torch.Generator:
    """Return a fresh CPU generator for this (name, seed, counters)."""
    state = int.from_bytes(digest(name, seed, *counters)[:8], "big") >> 1
    return torch.Generator().manual_seed(state)


@contextlib.contextmanager
def seed_layers(device: torch.device, *parts: str | int) -> Iterator[None]:
    """Let layers that draw from torch's global generators, such as DropPath, draw from the parts
    instead; the generators continue afterwards as if nothing had been drawn.

    Args:
        device: The device of the layers.
        *parts: As in `digest`.
    """
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        seed = int.from_bytes(digest(*parts)[:8], "big") >> 1
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
