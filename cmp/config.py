"""`RunConfig`: everything that decides a run's result, and nothing else.

A tree of frozen dataclasses, parsed strictly: an unknown key, a wrong type or an impossible value
is refused with the key's name and the nearest valid one.
"""

import dataclasses
import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

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
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]{0,99}$")]


@dataclass(frozen=True, config=STRICT)
class Model:
    """Which network, and the weights it starts from: a shipped base, or random ones."""

    name: Name = "tiny"
    start: Literal["annealed", "unannealed", "random"] = "annealed"


@dataclass(frozen=True, config=STRICT)
class Stream:
    """The order of the adaptation classes, cut into `tasks` blocks of equal class count."""

    order: Literal["random"] = "random"
    tasks: Count = 8


@dataclass(frozen=True, config=STRICT)
class Mixture:
    """Shares of a batch: pretraining pool, update pool, buffer. They sum to one.

    `replay`: the part of the pretraining set that may be replayed; nobody keeps all of it.
    """

    pretraining: Share = 1 / 3
    update: Share = 1 / 3
    buffer: Share = 1 / 3
    replay: Annotated[float, Field(gt=0, le=1)] = 0.1

    def __post_init__(self) -> None:
        total = self.pretraining + self.update + self.buffer
        if abs(total - 1) > 1e-6:
            raise ValueError(f"pretraining + update + buffer must be 1, not {total:g}")


@dataclass(frozen=True, config=STRICT)
class Schedule:
    """Learning rate within a task; `warmup` and `cooldown` are fractions of the task's steps."""

    name: Literal["warmup-cosine", "constant", "warmup-constant-cooldown"] = "warmup-cosine"
    peak: Positive = 1e-3
    warmup: Share = 0.1
    cooldown: Share = 0.25


@dataclass(frozen=True, config=STRICT)
class Optimizer:
    """AdamW; weight decay acts on matrices only, gradients are clipped once by global norm."""

    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.98
    eps: Positive = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    clip: Positive = 1.0


@dataclass(frozen=True, config=STRICT)
class Training:
    """Steps of `batch` samples in each task, and the arithmetic of the forward pass."""

    steps: Count = 40
    batch: Annotated[int, Field(ge=2, le=MOST)] = 64
    precision: Literal["bf16", "fp32"] = "bf16"


@dataclass(frozen=True, config=STRICT)
class Evaluation:
    """Images a dataset in the evaluation after each task, `None` for all; and whether the whole
    test is scored as well, before the stream and after it."""

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
    schedule: Schedule = Schedule()
    optimizer: Optimizer = Optimizer()
    training: Training = Training()
    evaluation: Evaluation = Evaluation()
    seeds: Seeds = Seeds()

    def to_dict(self) -> dict[str, Any]:
        """The tree as plain dicts."""
        return dataclasses.asdict(self)

    def digest(self) -> str:
        """sha256 of the canonical JSON."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


_ADAPTER = TypeAdapter(RunConfig)


def flat_keys(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """("schedule.peak", 0.001), ... for the leaves of a tree."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flat_keys(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


KEYS = tuple(key for key, _ in flat_keys(RunConfig().to_dict()))


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
            near = difflib.get_close_matches(key, KEYS, n=1, cutoff=0.0)[0]
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
        "name": "warmup-constant-cooldown", "peak": 2e-3, "warmup": 0.04, "cooldown": 0.25,
    },
    "training": {"steps": 2600, "batch": 128},
    "evaluation": {"subset": None},
}  # fmt: skip
"""Pretraining is a run: one task, the pool alone, random weights."""

PRETRAINING_OF: dict[str, tuple[str, ...]] = {"tiny-vit": ("training.steps=4000",)}
"""Where a model's pretraining differs from `PRETRAINING`, as key=value."""
