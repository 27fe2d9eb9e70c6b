"""`RunConfig`: everything that decides a run's result, and nothing else.

A tree of frozen dataclasses, parsed strictly: an unknown key, a wrong type or an impossible value
is refused with the key's name and the nearest valid one.
"""

import dataclasses
import difflib
import json
import math
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from cmp.errors import CmpError
from cmp.files import parse_yaml

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
MOST = 2**31 - 1
"""The largest count."""
Count = Annotated[int, Field(ge=1, le=MOST)]
Steps = Annotated[int, Field(ge=0, le=MOST)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]{0,99}$")]


@dataclass(frozen=True, config=STRICT)
class Model:
    """Which network, and the weights it starts from: a base or random ones. A `cosine` base is of
    another pretraining schedule; it does not ship, `cmp pretrain` makes it."""

    name: Name = "tiny"
    start: Literal["annealed", "unannealed", "cosine", "random"] = "annealed"


@dataclass(frozen=True, config=STRICT)
class Stream:
    """The order of the adaptation classes, cut into `tasks` blocks of equal class count."""

    order: Literal["random"] = "random"
    tasks: Count = 8


@dataclass(frozen=True, config=STRICT)
class Mixture:
    """Shares of a batch: pretraining pool, update pool, buffer. They sum to one.

    replay: the part of the pretraining set that may be replayed; nobody keeps all of it. policy:
    what the buffer keeps of earlier updates, see `cmp.mixtures.BUFFERS`.
    """

    pretraining: Share = 1 / 3
    update: Share = 1 / 3
    buffer: Share = 1 / 3
    replay: Annotated[float, Field(gt=0, le=1)] = 0.1
    policy: Literal["unlimited"] = "unlimited"

    def __post_init__(self) -> None:
        total = self.pretraining + self.update + self.buffer
        if abs(total - 1) > 1e-6:
            raise ValueError(f"pretraining + update + buffer must be 1, not {total:g}")


COOLED = ("rsqrt", "wsd", "wsd-sqrt", "infinite")
WARMED = ("linear", "cosine", *COOLED)
NAMES = {
    "warmup": WARMED, "warmup_steps": WARMED, "cooldown": COOLED, "cooldown_steps": COOLED,
    "shift": ("rsqrt",), "level": ("infinite",),
}  # fmt: skip
METAS = {"decay": ("geometric",), "peaks": ("free",)}
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
        for key, names in (NAMES | METAS).items():
            chosen = self.meta if key in METAS else self.name
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
            share = 0.0 if self.name not in NAMES[kind] else default if share is None else share
            found.append(math.ceil(share * steps - 1e-9) if exact is None else exact)
        warmup, cooldown = found
        rounded = self.warmup_steps is None and self.cooldown_steps is None
        if warmup + cooldown > steps + rounded:
            raise ValueError(f"warmup {warmup} + cooldown {cooldown} steps in a task of {steps}")
        if self.name == "infinite" and cooldown >= steps:
            raise ValueError(f"cooldown {cooldown} steps: 'infinite' has nothing to go on from")
        return warmup, min(cooldown, steps - warmup)


@dataclass(frozen=True, config=STRICT)
class Optimizer:
    """AdamW; weight decay acts on matrices only, gradients are clipped once by global norm.

    carry: the moments go on from task to task; else each task begins with none.
    """

    carry: bool = False
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.98
    eps: Positive = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    clip: Positive = 1.0


@dataclass(frozen=True, config=STRICT)
class Method:
    """What trains and what is added to the loss: a module of `cmp.methods`."""

    name: Literal["full", "locked-image", "locked-text"] = "full"


@dataclass(frozen=True, config=STRICT)
class Merging:
    """Which weights are trained on from and deployed after a task, `cmp.merging.policies`, and how
    they are combined, `cmp.merging.rules`. weight: of the newest weights in an interpolation."""

    policy: Literal["none", "ema"] = "none"
    rule: Literal["interpolation"] = "interpolation"
    weight: Share = 0.5


@dataclass(frozen=True, config=STRICT)
class Training:
    """Steps of `batch` samples in each task, and the arithmetic of the forward pass."""

    steps: Count = 40
    batch: Annotated[int, Field(ge=2, le=MOST)] = 64
    precision: Literal["bf16", "fp32"] = "bf16"


@dataclass(frozen=True, config=STRICT)
class Evaluation:
    """Images a dataset in the evaluation after each task, `None` for all; and whether the whole
    split is scored as well, before the stream and after it. split: "validation" is for choices,
    such as of a learning rate, and is never published."""

    split: Literal["test", "validation"] = "test"
    subset: Count | None = 64
    full: bool = True


@dataclass(frozen=True, config=STRICT)
class Seeds:
    """One seed a source of randomness: stream order, weights, batches, augmentation."""

    stream: Seed = 0
    init: Seed = 0
    data: Seed = 0
    augment: Seed = 0


@dataclass(frozen=True, config=STRICT)
class RunConfig:
    """One run: a model is taken through a stream of tasks."""

    model: Model = Model()
    stream: Stream = Stream()
    mixture: Mixture = Mixture()
    method: Method = Method()
    merging: Merging = Merging()
    schedule: Schedule = Schedule()
    optimizer: Optimizer = Optimizer()
    training: Training = Training()
    evaluation: Evaluation = Evaluation()
    seeds: Seeds = Seeds()

    def to_dict(self) -> dict[str, Any]:
        """The tree as plain dicts and lists, as JSON has them."""
        return _ADAPTER.dump_python(self, mode="json")

    def __post_init__(self) -> None:
        self.schedule.durations(self.training.steps)
        if self.schedule.name == "infinite" and self.merging.policy != "none":
            raise ValueError(
                f"merging.policy {self.merging.policy!r}: with schedule 'infinite' training goes "
                "on from its constant phase, not from merged weights"
            )
        if self.schedule.meta == "free" and len(self.schedule.peaks) < self.stream.tasks:
            peaks, tasks = len(self.schedule.peaks), self.stream.tasks
            raise ValueError(f"schedule.peaks: {peaks} peaks for {tasks} tasks")

    def changes(self) -> dict[str, Any]:
        """What differs from the defaults, by dotted key: what identifies a config, so that a new
        field leaves those alone that do not use it."""
        leaves = flat_keys(self.to_dict())
        return {key: value for key, value in leaves if value != DEFAULTS[key]}


_ADAPTER = TypeAdapter(RunConfig)


def choices(of: type | None = None, prefix: str = "") -> dict[str, tuple]:
    """Every key that takes one of some names, or true and false, and what it takes."""
    found: dict[str, tuple] = {}
    for field in dataclasses.fields(of or RunConfig):
        key = f"{prefix}{field.name}"
        if dataclasses.is_dataclass(field.type):
            found |= choices(field.type, f"{key}.")
        elif get_origin(field.type) is Literal:
            found[key] = get_args(field.type)
        elif field.type is bool:
            found[key] = (False, True)
    return found


def flat_keys(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """("schedule.peak", 0.001), ... for the leaves of a tree."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flat_keys(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


DEFAULTS = dict(flat_keys(RunConfig().to_dict()))
"""Every key and its default. A default that changes is a new `NUMERICS`."""


def parse(tree: Mapping[str, Any], source: str = "config") -> RunConfig:
    """A `RunConfig` from nested dicts; what is left out keeps its default.

    `seed: n` at the top sets all four seeds that are not set by name.
    Raises `CmpError` with the key, what was found, and the nearest valid key.
    """
    if not isinstance(tree, Mapping):
        raise CmpError(f"{source}: expected a mapping of keys, found {tree!r:.60}")
    tree = dict(tree)
    if "seed" in tree:
        every = dict.fromkeys(Seeds().__dataclass_fields__, tree.pop("seed"))
        named = tree.get("seeds") or {}
        if not isinstance(named, Mapping):
            raise CmpError(f"{source}: seeds: expected seeds by name, found {named!r:.60}")
        tree["seeds"] = every | dict(named)
    try:
        return _ADAPTER.validate_json(json.dumps(tree))
    except ValidationError as error:
        fault = error.errors()[0]
        key = ".".join(map(str, fault["loc"]))
        message = fault["msg"].removeprefix("Value error, ")
        if fault["type"] == "unexpected_keyword_argument":
            near = difflib.get_close_matches(key, DEFAULTS, n=1, cutoff=0.0)[0]
            raise CmpError(f"{source}: {key}: no such key; the nearest is {near!r}") from error
        raise CmpError(f"{source}: {key}: {message} (found {fault['input']!r:.80})") from error
    except (TypeError, ValueError, RecursionError) as error:  # of json.dumps
        raise CmpError(f"{source}: {error}") from error


def override(tree: dict[str, Any], assignments: Iterable[str]) -> dict[str, Any]:
    """A copy of a tree with "key=value" assignments applied; values are read as YAML."""
    result = json.loads(json.dumps(tree))
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise CmpError(f"{assignment!r}: expected key=value, such as schedule.peak=0.0004")
        *parents, leaf = key.split(".")
        node = result
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise CmpError(f"{key}: {parent!r} holds a value, not further keys")
        try:
            node[leaf] = parse_yaml(text)
        except ValueError as error:
            raise CmpError(f"{key}: {text!r} cannot be read: {error}") from error
    return result


PROFILES: dict[str, dict[str, Any]] = {
    "quick": {
        "stream": {"tasks": 4},
        "training": {"steps": 20, "batch": 32},
        "evaluation": {"subset": 64, "full": False},
    },
    "cpu": {
        "stream": {"tasks": 8},
        "training": {"steps": 40, "batch": 64},
        "evaluation": {"subset": 64},
    },
}
"""Sizes of a run, by profile."""


def profile(name: str) -> dict[str, Any]:
    """The tree of a profile; `CmpError` for an unknown one."""
    if name not in PROFILES:
        raise CmpError(f"profile {name!r}: there are {', '.join(PROFILES)}")
    return json.loads(json.dumps(PROFILES[name]))


PRETRAINING: dict[str, Any] = {
    "model": {"start": "random"},
    "stream": {"tasks": 1},
    "mixture": {"pretraining": 1.0, "update": 0.0, "buffer": 0.0, "replay": 1.0},
    "schedule": {
        "name": "wsd", "peak": 2e-3, "warmup": 0.04, "cooldown": 0.25,
    },
    "training": {"steps": 2600, "batch": 128},
    "evaluation": {"subset": None},
}  # fmt: skip
"""Pretraining is a run: one task, the pool alone, random weights."""

PRETRAINING_OF: dict[str, tuple[str, ...]] = {"tiny-vit": ("training.steps=4000",)}
"""Where a model's pretraining differs from `PRETRAINING`, as key=value."""
