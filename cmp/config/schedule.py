"""What a config says of the learning rate; `cmp.schedules` has the formulas."""

import math
from typing import Literal

from pydantic.dataclasses import dataclass

from cmp.config.fields import STRICT, Positive, Share, Steps

COOLED = ("rsqrt", "wsd", "wsd-sqrt", "infinite")
WARMED = ("linear", "cosine", *COOLED)
OF_NAMES = {
    "warmup": WARMED, "warmup_steps": WARMED, "cooldown": COOLED, "cooldown_steps": COOLED,
    "shift": ("rsqrt",), "level": ("infinite",),
}  # fmt: skip
OF_METAS = {"decay": ("geometric",), "peaks": ("free",)}
"""Which schedules, and which meta schedules, a key is for."""
BASES = {"cosine-dynamic": "cosine", "rsqrt-recovered": "rsqrt"}
"""Meta schedules that change the curve within a task, and the one that they change."""
SHARES = {"warmup": 0.1, "cooldown": 0.25}
"""Of a task, where a schedule says nothing."""


@dataclass(frozen=True, config=STRICT)
class Schedule:
    """The learning rate at (task, step); `cmp.schedules` has the formulas.

    name: the curve within a task, up to `peak`. meta: each task's peak, by its number. warmup and
    cooldown: shares of a task, or numbers of steps as `warmup_steps` and `cooldown_steps`; `SHARES`
    where neither is given. shift: steps after which `rsqrt` takes up its decay. level: `infinite`'s
    constant phase, in peaks. decay: of `geometric`, a task. peaks: of `free`, each task's, in
    multiples of `peak`.
    """

    name: Literal["constant", "linear", "cosine", "rsqrt", "wsd", "wsd-sqrt", "infinite"] = "cosine"
    meta: Literal[
        "none", "cosine", "cosine-dynamic", "rsqrt", "rsqrt-continued", "rsqrt-recovered",
        "geometric", "free",
    ] = "none"  # fmt: skip
    peak: Positive = 1e-3
    warmup: Share | None = None
    warmup_steps: Steps | None = None
    cooldown: Share | None = None
    cooldown_steps: Steps | None = None
    shift: Steps = 0
    level: Share = 0.5
    decay: Share = 0.5
    peaks: tuple[Share, ...] = ()

    def __post_init__(self) -> None:
        for key, names in (OF_NAMES | OF_METAS).items():
            chosen = self.meta if key in OF_METAS else self.name
            default = type(self).__dataclass_fields__[key].default
            if getattr(self, key) != default and chosen not in names:
                raise ValueError(f"{key}: {chosen!r} has none, only {', '.join(names)}")
        for kind in SHARES:
            share, steps = getattr(self, kind), getattr(self, f"{kind}_steps")
            if share is not None and steps is not None:
                raise ValueError(f"{kind} {share:g} and {kind}_steps {steps}: one says it all")
        if BASES.get(self.meta, self.name) != self.name:
            raise ValueError(f"meta {self.meta!r} changes {BASES[self.meta]!r}, not {self.name!r}")
        if self.name == "infinite" and self.meta != "none":
            raise ValueError(f"meta {self.meta!r}: 'infinite' is one curve over the whole stream")

    def durations(self, steps: int) -> tuple[int, int]:
        """Steps of warmup and of cooldown in a task of `steps` steps; shares are rounded up.

        `ValueError` if they are longer than the task; rounding alone never makes them so.
        """
        found = []
        for kind, default in SHARES.items():
            share, exact = getattr(self, kind), getattr(self, f"{kind}_steps")
            share = 0.0 if self.name not in OF_NAMES[kind] else default if share is None else share
            found.append(math.ceil(share * steps - 1e-9) if exact is None else exact)
        warmup, cooldown = found
        rounded = self.warmup_steps is None and self.cooldown_steps is None
        if warmup + cooldown > steps + rounded:
            raise ValueError(f"warmup {warmup} + cooldown {cooldown} steps in a task of {steps}")
        if self.name == "infinite" and cooldown >= steps:
            raise ValueError(f"cooldown {cooldown} steps: 'infinite' has nothing to go on from")
        return warmup, min(cooldown, steps - warmup)
