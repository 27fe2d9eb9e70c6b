"""What a device does in an hour, as stated assumptions: a plan is no better than these."""

from typing import NamedTuple

GIGA = 1e9


class Device(NamedTuple):
    """peak: FLOP/s of dense products in bf16, by its maker; utilisation: the part of it that
    training reaches, assumed; memory: bytes; about: where the numbers come from."""

    peak: float
    utilisation: float
    memory: float
    about: str

    @property
    def speed(self) -> float:
        """FLOP/s that training is assumed to reach."""
        return self.peak * self.utilisation


DEVICES = {
    "h100": Device(989e12, 0.4, 80e9, "H100 SXM, 989 TFLOP/s and 80 GB by its maker, 40% assumed"),
    "a100": Device(312e12, 0.4, 80e9, "A100, 312 TFLOP/s and 80 GB by its maker, 40% assumed"),
    "rtx-4090": Device(165e12, 0.4, 24e9, "165 TFLOP/s and 24 GB by its maker, 40% assumed"),
    "l4": Device(121e12, 0.3, 24e9, "L4, 121 TFLOP/s and 24 GB by its maker, 30% assumed"),
    "core": Device(
        8e10,
        1.0,
        4e9,
        "a core of a server: a `cpu` run, 1.85 TFLOPs, takes 23 s, scored",
    ),
}
"""By name. 40% of an H100 is 4e14 FLOP/s, by which spec 1.2 tells the paper's budget in hours."""
SPARE = 0.9
"""The part of a device's memory that a plan fills at most."""
