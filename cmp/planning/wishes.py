"""What one may ask of the planner, and what nobody can be given."""

from dataclasses import dataclass
from math import isfinite

import open_clip

from cmp import models
from cmp.config import MOST
from cmp.errors import CmpError
from cmp.planning.devices import DEVICES

KEEP = {
    "balance": "as much of both as can be had",
    "most": "retention before accumulation",
    "all": "nothing that it knows, whatever is not learned for it",
}
"""What must be kept of the model's zero-shot knowledge."""
NEW = {"both": "names and looks", "names": "names, of things that look like what it knows"}
"""What is new in the updates."""
CLASSES, ARRIVING = 522, 6375
"""The embedded stream: its classes, and the images of all its updates."""
FOMO = 1_760_000
"""Images of all updates of FoMo-in-Flux (spec 9.2)."""


class Impossible(CmpError):
    """A wish that no run can fulfil; the message says why, and what would have to give."""


@dataclass(frozen=True)
class Wish:
    """What one has and wants.

    model: an embedded model's or an open_clip name. updates: how many; images: of each, on average;
    those of the embedded stream, or of FoMo-in-Flux, where left out. gpu_hours: on `device`, for
    training all updates; or gmafs: memory-adjusted GFLOPs in all, the paper's unit. keep: one of
    `KEEP`; new: one of `NEW`. pool: the part of the pretraining data that can be replayed, 0 if
    none; other_pool: whether public data would stand in for it. buffer: images of earlier updates
    that can be kept; all where left out, 0 if none.
    """

    model: str = "tiny"
    updates: int = 8
    images: int | None = None
    gpu_hours: float | None = None
    gmafs: float | None = None
    device: str = "h100"
    keep: str = "balance"
    new: str = "both"
    pool: float = 0.1
    other_pool: bool = False
    buffer: int | None = None

    @property
    def embedded(self) -> bool:
        """Whether the model, and so the stream, is of the embedded benchmark."""
        return self.model in models.EMBEDDED

    @property
    def arriving(self) -> float:
        """Images of an update."""
        every = ARRIVING if self.embedded else FOMO
        return every / self.updates if self.images is None else float(self.images)


def check(wish: Wish) -> None:
    """`Impossible`, a sentence, for a wish that cannot be."""
    for key, value, known in (
        ("device", wish.device, DEVICES), ("keep", wish.keep, KEEP), ("new", wish.new, NEW),
    ):  # fmt: skip
        if value not in known:
            raise Impossible(f"{key} {value!r}: there are {', '.join(known)}")
    if not wish.embedded and wish.model not in open_clip.list_models():
        raise Impossible(
            f"model {wish.model!r}: open_clip knows no such model; embedded are "
            f"{', '.join(models.EMBEDDED)}"
        )
    _check_amounts(wish)
    _check_data(wish)
    if wish.keep == "all" and wish.pool == 0:
        raise Impossible(
            "nothing may be lost, and nothing that the model learned from can be replayed: every "
            "update that learns something forgets something then. Keep some of the pretraining "
            "data, or allow some loss (keep: most)"
        )


def _check_amounts(wish: Wish) -> None:
    """Compute there must be, in one unit, and an update at least."""
    if (wish.gpu_hours is None) == (wish.gmafs is None):
        raise Impossible("give the compute in one unit: GPU hours, or memory-adjusted GFLOPs")
    compute = wish.gmafs if wish.gpu_hours is None else wish.gpu_hours
    if not isfinite(compute) or compute <= 0:
        raise Impossible(f"compute {compute:g}: without any, nothing can be trained")
    if not 1 <= wish.updates <= MOST:
        raise Impossible(f"updates {wish.updates}: a stream has one at least, and {MOST:,} at most")
    if not (isfinite(wish.pool) and 0 <= wish.pool <= 1):
        raise Impossible(f"pool {wish.pool:g}: it is a part of the pretraining data, 0 to 1")


def _check_data(wish: Wish) -> None:
    """Images there must be, and no more updates than there is to learn."""
    if wish.embedded and wish.updates > CLASSES:
        raise Impossible(
            f"updates {wish.updates}: the embedded stream has {CLASSES} classes, and an update "
            "brings one at least"
        )
    if not 1 <= wish.arriving <= MOST:
        raise Impossible(
            f"images {wish.arriving:.3g} of an update: it brings one at least; with more updates "
            "than images there is nothing to learn in some of them"
        )
    if wish.buffer is not None and not 0 <= wish.buffer <= MOST:
        raise Impossible(f"buffer {wish.buffer}: a number of images, 0 if none can be kept")
