"""What a config says of the update method; the modules of `cmp.methods` have the formulas."""

from typing import Any, Literal

from pydantic.dataclasses import dataclass

from cmp.config.fields import STRICT, Count, Name, NotNegative, Positive, Share

_ADAPTER = {"rank": 5, "scale": 1.0, "targets": (), "fold": True}
OF_METHODS: dict[str, dict[str, Any]] = {
    "lora": _ADAPTER,
    "dora": _ADAPTER,
    "vera": _ADAPTER,
    "galore": {"rank": 8, "scale": 2.0, "gap": 200},
    "ewc": {"strength": 1.0, "gamma": 1.0, "fisher": "sample", "batches": 4},
    "si": {"strength": 0.5, "damping": 1.0},
    "distillation": {"strength": 1.0, "temperature": 2.0},
}
"""Which keys a method has, and what each is where a config says nothing (spec 3). A method that is
left out has none; a default that changes is a new `NUMERICS`."""
ADAPTERS = tuple(name for name, keys in OF_METHODS.items() if "fold" in keys)


@dataclass(frozen=True, config=STRICT)
class Method:
    """What trains and what is added to the loss: a module of `cmp.methods`.

    Keys that are `None` are what `OF_METHODS` says. rank, scale: of an adapter or of a projected
    gradient. targets: the layers that get adapters, as parts of their names, such as "q_proj" or
    "visual.transformer"; all that `cmp.methods.adapters` lists where empty. fold: adapters are
    folded into the weights after each task and begin anew; else they go on from task to task. gap:
    steps between two projections of `galore`. strength: of what is added to the loss. gamma: what
    stays of the old Fisher information; fisher: of each sample's gradient or of a batch's;
    batches: that it is measured on after a task. damping: xi of `si`. temperature: of
    `distillation`, in multiples of the pretrained model's own.
    """

    name: Literal[
        "full", "locked-image", "locked-text", "bitfit", "lnfit", "lora", "dora", "vera", "galore",
        "ewc", "si", "distillation",
    ] = "full"  # fmt: skip
    rank: Count | None = None
    scale: Positive | None = None
    targets: tuple[Name, ...] = ()
    fold: bool = True
    gap: Count | None = None
    strength: NotNegative | None = None
    gamma: Share | None = None
    fisher: Literal["sample", "batch"] = "sample"
    batches: Count | None = None
    damping: Positive | None = None
    temperature: Positive | None = None

    def __post_init__(self) -> None:
        for key, field in type(self).__dataclass_fields__.items():
            owners = [name for name, keys in OF_METHODS.items() if key in keys]
            changed = key != "name" and getattr(self, key) != field.default
            if changed and self.name not in owners:
                raise ValueError(f"{key}: {self.name!r} has none, only {', '.join(owners)}")

    def get(self, key: str) -> Any:
        """A key's value, or the method's default where the config leaves it open."""
        value = getattr(self, key)
        return OF_METHODS[self.name][key] if value is None else value

    def check(self, policy: str, carry: bool, pretraining: float) -> None:
        """`ValueError` if the method makes no sense with this merging policy, with moments that
        are carried across tasks, or with this share of the pretraining pool."""
        if self.name in ADAPTERS and not self.fold and policy != "none":
            raise ValueError(
                f"method.fold false with merging.policy {policy!r}: adapters that go on fit the "
                "weights that they were trained on, not merged ones; set method.fold=true"
            )
        if self.name in ADAPTERS and policy == "step-ema":
            raise ValueError(
                f"merging.policy 'step-ema' with method {self.name!r}: it averages weights after "
                "every step, and an adapter's are folded in at the end of a task only"
            )
        if self.name in ADAPTERS and self.fold and carry:
            raise ValueError(
                "optimizer.carry true with method.fold true: adapters begin anew with each task, "
                "so there are no moments to go on from; set method.fold=false"
            )
        if self.name == "distillation" and pretraining == 0:
            raise ValueError(
                "mixture.pretraining 0: 'distillation' works on replayed images of the "
                "pretraining pool, and there are none in a batch"
            )
