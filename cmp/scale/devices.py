"""GPUs as their makers specify them, and what is assumed until a run is measured."""

import functools
import time
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch

from cmp import arithmetic, starts
from cmp.errors import CmpError, first_line


class Device(NamedTuple):
    """The assumed properties of a device.

    Attributes:
        peak: FLOP/s of dense bf16 products, as stated by its maker. A T4 has no units for bf16, so
            for it this is the rate of fp32.
        utilisation: The fraction of the peak that training is assumed to reach.
        memory: The memory in bytes.
        about: The device, and the source of the numbers.
    """

    peak: float
    utilisation: float
    memory: float
    about: str

    @property
    def speed(self) -> float:
        """The FLOP/s that training is assumed to reach."""
        return self.peak * self.utilisation


_CSV = pd.read_csv(Path(__file__).with_name("devices.csv"), index_col="name")
DEVICES = {row[0]: Device(*row[1:]) for row in _CSV.itertuples()}
"""Devices by name. 40% of an H100 is 4e14 FLOP/s, the rate for which the paper states its budget in
hours."""


def check_device(device: str) -> None:
    """Raise `CmpError` if torch cannot use a device, such as "cuda" without a GPU."""
    starts.check_device_name(device)
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = first_line(error)
        raise CmpError(f"device {device!r}: cannot be used here ({reason}); choose cpu") from error


def is_present(device: str) -> bool:
    """Return whether this machine has a device of this kind.

    Raises:
        CmpError: It has GPUs, but fewer than the device's number says.
    """
    if device == "cpu":
        return True
    if not torch.cuda.is_available():
        return False
    count, number = torch.cuda.device_count(), torch.device(device).index
    if number is not None and number >= count:
        raise CmpError(
            f"device {device!r}: the GPUs here have numbers below {count}; choose one of them, "
            "or cuda"
        )
    return True


def device_name(device: str) -> str:
    """Return the name of a device in a run's provenance: "cpu", or the name of the GPU, which is ""
    if there is none."""
    if device == "cpu":
        return "cpu"
    return torch.cuda.get_device_name(device) if is_present(device) else ""


def find_device(device: str) -> Device | None:
    """Return the properties of a device: a core, or the GPU of this name; None if it is not
    listed."""
    if device == "cpu":
        return DEVICES["core"]
    name = f"-{device_name(device).lower().replace(' ', '-')}-"  # an L40 is not an L4
    return next((facts for key, facts in DEVICES.items() if f"-{key}-" in name), None)


SIDE = {"cpu": 2048, "cuda": 8192}
"""Size of the square matrices whose product defines the peak."""


@functools.cache
def product_rate(dtype: torch.dtype, device: str = "cpu") -> float:
    """Return the best FLOP/s of several products of square matrices.

    Args:
        dtype: The type of the matrices. Where a device has no kernels for bf16, products are
            computed in fp32, as in training.
        device: The device; on a CPU, all of torch's threads are used.
    """
    kind = torch.device(device).type
    if dtype == torch.bfloat16 and arithmetic.lacks_bf16_kernels(kind):
        dtype = torch.float32
    noise, side, seconds = torch.Generator().manual_seed(0), SIDE[kind], []
    a, b = (torch.rand(side, side, generator=noise).to(device, dtype) for _ in range(2))
    for _ in range(6):
        started = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for the device
        seconds.append(time.perf_counter() - started)
    return 2 * side**3 / min(seconds)
