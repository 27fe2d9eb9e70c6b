"""What a config says of merging; `cmp.merging` has the policies and the rules (spec 4)."""

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from cmp.config.fields import STRICT, Positive, Share

SUMS = ("task-arithmetic", "lines")
"""Rules that add up task vectors."""
VECTORS = (
    *SUMS, "model-stock", "magmax", "random", "ties", "dare", "dare-ties", "breadcrumbs",
    "breadcrumbs-ties",
)  # fmt: skip
"""Rules on task vectors, which need the weights that those start from."""
PAIRS = ("slerp",)
"""Rules for two models, no more and no fewer."""
TRIMMED = ("ties", "dare", "dare-ties", "breadcrumbs", "breadcrumbs-ties")
OF_RULES = {
    "weight": ("interpolation", "slerp"),
    "shares": ("interpolation",), "power": ("interpolation",), "reverse": ("interpolation",),
    "scale": tuple(name for name in VECTORS if name != "model-stock"),
    "density": TRIMMED, "outliers": ("breadcrumbs", "breadcrumbs-ties"),
    "alpha": ("lines",), "beta": ("lines",),
}  # fmt: skip
TWOS = (
    "ema", "zs", "ft", "ft-last", "zero-unrolled", "last-unrolled", "all-unrolled", "unrolled-all",
    "unrolled-last",
)  # fmt: skip
"""Policies that merge two models at a time."""
ALL = ("zero-all", "last-all", "all-all", "all-last", "all-unrolled", "unrolled-all")
"""Policies that merge the ends of all tasks at once."""
OF_POLICIES = {"shares": ALL, "power": ALL, "reverse": ALL, "zero": ALL, "decay": ("step-ema",)}
"""Which rules, and which policies, a key is for; "none" and "step-ema" have no rule."""


@dataclass(frozen=True, config=STRICT)
class Merging:
    """Which weights are trained on from and deployed after a task, `cmp.merging.policies`, and how
    they are combined, `cmp.merging.rules`.

    weight: of the newer of two models in an interpolation or slerp. shares: of the models in an
    interpolation of all, see `cmp.merging.rules.SHARES`; power: of their number, in shares "power";
    reverse: the oldest gets the newest's. zero: the weights before the stream are one of all.
    scale: of the merged task vector; where left out 1 / the number of models for rules that add
    them up, 1 for those that choose or average. density: of a task vector's entries that are kept;
    outliers: share of its largest that are dropped. alpha, beta: factors of the first block and
    from there to the last. decay: of a per-step average, a step.
    """

    policy: Literal[
        "none", "ema", "zs", "ft", "ft-last", "zero-all", "zero-unrolled", "last-all",
        "last-unrolled", "all-all", "all-last", "all-unrolled", "unrolled-all", "unrolled-last",
        "step-ema",
    ] = "none"  # fmt: skip
    rule: Literal[
        "interpolation", "slerp", "task-arithmetic", "lines", "model-stock", "magmax", "random",
        "ties", "dare", "dare-ties", "breadcrumbs", "breadcrumbs-ties",
    ] = "interpolation"  # fmt: skip
    weight: Share = 0.5
    shares: Literal["equal", "newest", "power", "exponential", "log"] = "equal"
    power: Positive = 1.0
    reverse: bool = False
    zero: bool = False
    scale: Positive | None = None
    density: Annotated[float, Field(gt=0, le=1)] = 0.3
    outliers: Annotated[float, Field(ge=0, lt=1)] = 0.01
    alpha: Annotated[float, Field(ge=0)] = 0.5
    beta: Annotated[float, Field(ge=0)] = 0.5
    decay: Annotated[float, Field(ge=0, lt=1)] = 0.999

    def __post_init__(self) -> None:
        if self.rule != "interpolation" and self.policy in ("none", "step-ema"):
            raise ValueError(f"rule {self.rule!r}: policy {self.policy!r} merges by no rule")
        for table, kind in ((OF_RULES, "rule"), (OF_POLICIES, "policy")):
            for key, names in table.items():
                default = type(self).__dataclass_fields__[key].default
                if getattr(self, key) != default and getattr(self, kind) not in names:
                    raise ValueError(
                        f"{key}: {kind} {getattr(self, kind)!r} has none, only {', '.join(names)}"
                    )
        self._check_lists()
        if self.rule in OF_RULES["outliers"] and self.outliers + self.density > 1:
            raise ValueError(
                f"density {self.density:g} + outliers {self.outliers:g} are more than all entries"
            )

    def _check_lists(self) -> None:
        """`ValueError` for keys of a merge of two, or of all, that this policy never makes."""
        if self.rule in PAIRS and self.policy in ALL:
            raise ValueError(
                f"rule {self.rule!r} is of two models; policy {self.policy!r} merges all"
            )
        if self.weight != 0.5 and self.policy not in TWOS and self.shares != "newest":
            raise ValueError(
                f"weight {self.weight:g}: policy {self.policy!r} merges no two models; it takes "
                "shares 'newest' for a weight of the newest"
            )
        if self.power != 1 and self.shares != "power":
            raise ValueError(f"power {self.power:g}: only shares 'power' has one")
        if self.reverse and self.shares in ("equal", "newest"):
            raise ValueError(f"reverse: shares {self.shares!r} have no other end")
