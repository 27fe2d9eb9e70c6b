"""`RunConfig`: everything that decides a run's result, and nothing else.

A tree of frozen dataclasses, parsed strictly: an unknown key, a wrong type or an impossible value
is refused with the key's name and the nearest valid one.
"""

import dataclasses
import difflib
import json
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from cmp.config.assignments import override
from cmp.config.fields import MOST, STRICT, Count, Data, Name, Positive, Seed, Share
from cmp.config.merging import Merging
from cmp.config.method import ADAPTERS, OF_METHODS, Method
from cmp.config.model import STARTS, Model
from cmp.config.profiles import (
    OWN_MODEL,
    PRETRAINING,
    PRETRAINING_OF,
    PROFILES,
    RECIPES,
    expanded,
    profile,
    translated,
    translates,
)
from cmp.config.schedule import BASES, COOLED, OF_METAS, OF_NAMES, SHARES, WARMED, Schedule
from cmp.errors import CmpError

__all__ = [
    "ADAPTERS",
    "BASES",
    "COOLED",
    "DEFAULTS",
    "MOST",
    "OF_METAS",
    "OF_METHODS",
    "OF_NAMES",
    "OWN_MODEL",
    "PRETRAINING",
    "PRETRAINING_OF",
    "PROFILES",
    "RECIPES",
    "SHARES",
    "STARTS",
    "STRICT",
    "WARMED",
    "Evaluation",
    "Merging",
    "Method",
    "Mixture",
    "Model",
    "Optimizer",
    "RunConfig",
    "Schedule",
    "Seeds",
    "Stream",
    "Training",
    "choices",
    "flat_keys",
    "override",
    "parse",
    "profile",
    "translated",
    "translates",
]  # fmt: skip


@dataclass(frozen=True, config=STRICT)
class Stream:
    """The order of the adaptation classes, cut into `tasks` blocks.

    order: see `cmp.streams.orders`; reverse: read from its end. equal: whether the blocks are of
    equal class count or of about equal image count. traits: the table that every order but random
    goes by, in `data_manifests/traits` or made by `cmp stream`.
    """

    order: Literal[
        "random", "easy-accuracy", "easy-loss", "easy-alignment", "frequency", "similarity",
        "dataset", "time", "listed",
    ] = "random"  # fmt: skip
    reverse: bool = False
    equal: Literal["classes", "images"] = "classes"
    tasks: Count = 8
    traits: Name = "embedded"


@dataclass(frozen=True, config=STRICT)
class Mixture:
    """Shares of a batch: pretraining pool, update pool, buffer. They sum to one.

    pool: what is replayed for the sake of retention, the pretraining set or a substitute for it;
    replay: the part of it that is kept, for nobody keeps all of it; select: which part, see
    `cmp.mixtures.SELECTIONS`. policy: what the buffer keeps of earlier updates and how evenly it is
    drawn from, see `cmp.mixtures.BUFFERS`; capacity: how many images it holds at most.
    """

    pretraining: Share = 1 / 3
    update: Share = 1 / 3
    buffer: Share = 1 / 3
    replay: Annotated[float, Field(gt=0, le=1)] = 0.1
    pool: Literal["pretraining", "substitute"] = "pretraining"
    select: Literal["random", "clustered", "aligned"] = "random"
    policy: Literal["unlimited", "reservoir", "class-balanced", "task-balanced"] = "unlimited"
    capacity: Count | None = None

    def __post_init__(self) -> None:
        total = self.pretraining + self.update + self.buffer
        if abs(total - 1) > 1e-6:
            raise ValueError(f"pretraining + update + buffer must be 1, not {total:g}")
        if (self.policy == "reservoir") > (self.capacity is not None):
            raise ValueError("policy 'reservoir' wants a capacity, the images that it holds")
        if self.policy == "unlimited" and self.capacity is not None:
            raise ValueError(
                f"capacity {self.capacity}: 'unlimited' has none; 'reservoir' is of fixed size"
            )


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
class Training:
    """Steps of `batch` samples in each task, and the arithmetic of the forward pass.

    budget: what a task may cost, in multiples of what `steps` of full fine-tuning cost; a method's
    steps follow from it, see `cmp.budgets`. Set by whoever compares methods at equal compute.
    """

    steps: Count = 40
    batch: Annotated[int, Field(ge=2, le=MOST)] = 64
    precision: Literal["bf16", "fp32"] = "bf16"
    budget: Positive | None = None


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
    """One run: a model is taken through a stream of tasks. data: the embedded benchmark, or what
    else `cmp.data.filesets.folders` finds by name or path."""

    data: Data = "embedded"
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
        carry, pretraining = self.optimizer.carry, self.mixture.pretraining
        self.method.check(self.merging.policy, carry, pretraining)
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
    """Every key that takes one of some names, or true and false, and what it takes; of where a run
    starts, what needs no file."""
    found: dict[str, tuple] = {}
    for field in dataclasses.fields(of or RunConfig):
        key = f"{prefix}{field.name}"
        if dataclasses.is_dataclass(field.type):
            found |= choices(field.type, f"{key}.")
        elif key == "model.start":
            found[key] = STARTS
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

    `seed: n` at the top sets all four seeds that are not set by name, and `recipe: NAME` all that a
    recipe says of keys that are not: both are short for what they stand for, and no part of it.
    Raises `CmpError` with the key, what was found, and the nearest valid key.
    """
    if not isinstance(tree, Mapping):
        raise CmpError(f"{source}: expected a mapping of keys, found {tree!r:.60}")
    tree = expanded(tree)
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
        where = f"{source}: {key}" if key else source
        if fault["type"] == "value_error":  # of several keys: it names them and their values
            raise CmpError(f"{where}: {message}") from error
        raise CmpError(f"{where}: {message} (found {fault['input']!r:.80})") from error
    except (TypeError, ValueError, RecursionError) as error:  # of json.dumps
        raise CmpError(f"{source}: {error}") from error
