"""The config of a run: everything that determines its result, and nothing else.

It is a tree of frozen dataclasses and parsed strictly: an unknown key, a wrong type or an
impossible value raises an error that names the key. Names of options come from `cmp.registry`.

The section `schedule` is defined in `cmp.schedules`, beside the options that it names.
"""

import copy
import dataclasses
import functools
import json
import operator
import os
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from cmp import registry, schedules
from cmp.errors import CmpError, find_closest
from cmp.parsing import explain_fault, first_fault, parse_yaml, raise_cmp_errors, read_yaml
from cmp.registry import check_name
from cmp.schedules import Schedule
from cmp.sources import sources_digest
from cmp.values import (
    MAX_COUNT,
    STRICT,
    Count,
    Location,
    ModelName,
    Multiple,
    Name,
    NotNegative,
    Positive,
    Seed,
    Share,
)

MethodName = Annotated[str, AfterValidator(partial(check_name, "method"))]
RuleName = Annotated[str, AfterValidator(partial(check_name, "merge_rule"))]
PolicyName = Annotated[str, AfterValidator(partial(check_name, "merge_policy"))]
OrderName = Annotated[str, AfterValidator(partial(check_name, "order"))]
BufferName = Annotated[str, AfterValidator(partial(check_name, "buffer"))]
STARTS = ("annealed", "unannealed", "cosine", "random")
"""Values of `model.start` that need no file from the user: a base of an embedded model, or random
weights. "cosine" bases were pretrained with another schedule; `cmpt pretrain` makes them."""
MAX_TASKS = 2**20
"""Largest `stream.tasks`: the steps of every task are listed."""
POOL_DATA_ROLES = ("pool", "substitute")
"""Roles of datasets that are replayed and never scored: the bases' pretraining data, and possible
substitutes for it."""
NAMING_KEYS = {"stream": "order"} | dict.fromkeys(("mixture", "merging"), "policy")
NAMING_KEYS |= dict.fromkeys(("model", "method", "schedule"), "name")
"""For each section, the key that names its option."""
NAMES_ELSEWHERE = {
    "lr": ["schedule.peak"],
    "learning_rate": ["schedule.peak"],
    "batch_size": ["training.batch"],
    "epochs": ["training.passes"],
    "merge": ["merging.policy", "merging.rule"],
}
"""The keys here for what other libraries call differently."""


@raise_cmp_errors
@dataclass(frozen=True, config=STRICT)
class Method:
    """The update method: what trains, and what is added to the loss; see `cmp.methods`.

    A key that is null takes the method's own default.

    Attributes:
        name: The method.
        rank: Rank of an adapter or of a projected gradient.
        scale: Factor applied to the output of an adapter or to a projected gradient's step.
        targets: Layers that get adapters, as parts of their names such as "q_proj"; if empty, those
            of `cmp.methods.adapters.DEFAULT_TARGETS` and all convolutions.
        fold: Whether adapters are folded into the weights after each task and then start afresh.
        gap: Steps between new projections in "galore". [steps]
        strength: Weight of the term that the method adds to the loss.
        gamma: Fraction of the old Fisher information that "ewc" keeps after a task.
        fisher: Whether "ewc" squares the gradient of each sample or of a batch.
        batches: How many batches the Fisher information is measured on. [batches]
        damping: Constant that "si" adds to the squared displacement it divides by.
        temperature: Temperature of "distillation", as a multiple of the pretrained model's.
        layer_decay: Factor on the learning rate from each block of a tower to the block before it.
            If None, all blocks have the same rate.
        unlock: How many of the last blocks of a locked tower to train, with all that follows.
            [blocks]
        views: For "locked-image", how many views of each image are encoded once and stored, in
            place of encoding images at every step. The first is not augmented. [views]
        lock_from: For "locked-image" with stored views, the first task with a locked tower; in
            earlier ones, everything trains. [tasks]
        image_rate: For "full", the learning rate of the image tower as a multiple of that of the
            rest.

    Example:
        >>> cmp.Method("lora").get("rank")  # its default
        5
    """

    name: MethodName = "full"
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
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = None
    unlock: Count | None = None
    views: Count | None = None
    lock_from: Count | None = None
    image_rate: Positive | None = None

    def __post_init__(self) -> None:
        registry.check_settings("method", self.name, self)
        if self.views and self.unlock:
            raise ValueError("unlock trains blocks of the image tower, so views cannot be stored")
        if self.lock_from and not self.views:
            raise ValueError("lock_from needs stored views; set method.views=1")

    def get(self, key: str) -> Any:
        """Return a key's value, or the method's default if the config does not set it."""
        value = getattr(self, key)
        return registry.get_option("method", self.name).settings[key] if value is None else value

    @property
    def has_adapters(self) -> bool:
        """Whether the method trains adapters and freezes the weights."""
        return registry.get_option("method", self.name).facts["adapters"]


@raise_cmp_errors
@dataclass(frozen=True, config=STRICT)
class Merging:
    """Which weights the next task starts from, which are deployed, and how they are merged.

    Attributes:
        policy: Which weights are merged, see `cmp.merging.policies`.
        rule: The merge rule, see `cmp.merging.rules`.
        weight: Weight of the newer of two models in an interpolation or slerp.
        shares: How an interpolation weights the models of all tasks.
        power: Exponent for `shares` "power".
        reverse: Whether to reverse the shares, so that the oldest model gets the newest one's.
        zero: Whether the weights from before the stream count as one of the models.
        scale: Factor of the merged task vector. If None, 1 / the number of models for rules that
            sum task vectors, else 1.
        density: Fraction of a task vector's entries that is kept.
        outliers: Fraction of a task vector's entries, the largest ones, that is dropped. Tensors
            that no model changed do not count if it would drop all that changed.
        alpha: For LiNeS, the factor of the first block.
        beta: For LiNeS, how much the factor grows from the first block to the last.
        protect: For OPCM, the leading directions of earlier models that later ones must not change,
            as a fraction of the sum of singular values.
        decay: Decay per step of the average that policy "step-ema" keeps.
        window: The last part of a task, over which policies "wsm" and "wsm-last" average the
            weights.

    Example:
        >>> cmp.RunConfig(merging=cmp.Merging("ema", weight=0.25)).changes()
        {'merging.policy': 'ema', 'merging.weight': 0.25}
    """

    policy: PolicyName = "none"
    rule: RuleName = "interpolation"
    weight: Share = 0.5
    shares: Literal["equal", "newest", "power", "exponential", "log"] = "equal"
    power: Annotated[float, Field(gt=0, le=100)] = 1.0
    reverse: bool = False
    zero: bool = False
    scale: Positive | None = None
    density: Annotated[float, Field(gt=0, le=1)] = 0.3
    outliers: Annotated[float, Field(ge=0, lt=1)] = 0.01
    alpha: NotNegative = 0.5
    beta: NotNegative = 0.5
    protect: Share = 0.5
    decay: Annotated[float, Field(ge=0, lt=1)] = 0.999
    window: Annotated[float, Field(gt=0, le=1)] = 0.25

    def __post_init__(self) -> None:
        merges = registry.get_option("merge_policy", self.policy).facts["merges"]
        rule = registry.get_option("merge_rule", self.rule)
        if self.rule != "interpolation" and not merges:
            raise ValueError(
                f"rule {self.rule!r}: policy {self.policy!r} uses no merge rule; set "
                "merging.policy=ema, or another policy that merges"
            )
        registry.check_settings("merge_rule", self.rule, self)
        registry.check_settings("merge_policy", self.policy, self)
        if check := rule.facts["check"]:
            check(self)
        if rule.facts["count"] and "all" in merges:
            raise ValueError(
                f"rule {self.rule!r} merges {rule.facts['count']} models; policy {self.policy!r} "
                "merges all: choose another"
            )
        if self.weight != 0.5 and "two" not in merges and self.shares != "newest":
            fix = "use shares 'newest' to weight the newest model"
            if "all" not in merges:
                fix = "leave it out, or choose policy 'ema' or another that does"
            raise ValueError(
                f"weight {self.weight:g}: policy {self.policy!r} does not merge two models; {fix}"
            )
        if self.power != 1 and self.shares != "power":
            raise ValueError(f"power {self.power:g}: only shares 'power' uses it")
        if self.reverse and self.shares in ("equal", "newest"):
            raise ValueError(f"reverse: shares {self.shares!r} cannot be reversed")


@raise_cmp_errors
@dataclass(frozen=True, config=STRICT)
class Model:
    """The network, and the weights that it starts from.

    Attributes:
        name: An embedded model, an open_clip name, or a location such as "hf-hub:ORG/NAME".
        start: For an embedded model, a base: "annealed", "unannealed" or "cosine". For any model,
            "random" weights, a pretrained tag of open_clip, the path of a safetensors file or
            open_clip checkpoint, or "run:ID" for the final weights of a finished run. For a model
            from a hub, also "hub" for the weights stored with it.

    Example:
        >>> cmp.RunConfig(model=cmp.Model("ViT-B-16", "laion2b_s34b_b88k")).model.name
        'ViT-B-16'
    """

    name: ModelName = "small"
    start: Location = "annealed"


@raise_cmp_errors
@dataclass(frozen=True, config=STRICT)
class Stream:
    """The order of the adaptation classes, and how they are split into tasks; see `cmp.streams`.

    Attributes:
        order: How classes are ordered.
        reverse: Whether the order is reversed.
        equal: Whether tasks have the same number of classes, or about the same number of images.
        tasks: The number of tasks. [tasks]
        traits: The table of class statistics that orders such as "similarity" read.

    Example:
        >>> cmp.RunConfig(stream=cmp.Stream(tasks=20)).changes()
        {'stream.tasks': 20}
    """

    order: OrderName = "random"
    reverse: bool = False
    equal: Literal["classes", "images"] = "classes"
    tasks: Annotated[int, Field(ge=1, le=MAX_TASKS)] = 8
    traits: Name = "embedded"

    def __post_init__(self) -> None:
        facts = registry.get_option("order", self.order).facts
        if self.traits != "embedded" and not facts["statistics"]:
            raise ValueError(
                f"traits {self.traits!r}: order {self.order!r} reads no statistics; choose an "
                "order that does, such as 'similarity'"
            )
        if self.equal != "classes" and facts["updates"]:
            raise ValueError(
                f"equal {self.equal!r}: order {self.order!r} takes the updates that the data define"
            )


@raise_cmp_errors
@dataclass(frozen=True, config=STRICT)
class Mixture:
    """How much of a batch comes from the pretraining pool, the update and the buffer, summing to
    one.

    Attributes:
        pretraining: Share of the pretraining pool.
        update: Share of the current update.
        buffer: Share of the buffer, which holds images of earlier updates.
        last: The three shares in the last task, if they change; in between they change linearly.
        replay: Fraction of the pool that is kept for replay.
        pool: Which images are replayed: the pretraining set, fresh images of the same kind that no
            base was trained on, or a substitute.
        select: How the kept part is chosen, see `cmp.mixtures.choose_replay`.
        policy: What the buffer keeps, and how samples are drawn from it.
        capacity: Size limit of the buffer. [images]

    Example:
        >>> mixture = cmp.Mixture(last=(0.5, 0.25, 0.25))
        >>> mixture.at(task=7, tasks=8).pretraining  # of the last of eight tasks
        0.5
    """

    pretraining: Share = 1 / 3
    update: Share = 1 / 3
    buffer: Share = 1 / 3
    last: tuple[Share, Share, Share] | None = None
    replay: Annotated[float, Field(gt=0, le=1)] = 0.1
    pool: Literal["pretraining", "fresh", "substitute"] = "pretraining"
    select: Literal["random", "concepts", "clustered", "aligned"] = "random"
    policy: BufferName = "unlimited"
    capacity: Count | None = None

    def __post_init__(self) -> None:
        sums = {"pretraining + update + buffer": self.shares, "the sum of last": self.last}
        for words, shares in sums.items():
            if shares is not None and abs(sum(shares) - 1) > 1e-6:
                raise ValueError(f"{words} must be 1, not {sum(shares):g}")
        capacity = registry.get_option("buffer", self.policy).facts["capacity"]
        if capacity == "required" and self.capacity is None:
            raise ValueError(
                f"policy {self.policy!r} needs a capacity, the number of images that it holds"
            )
        if capacity == "none" and self.capacity is not None:
            raise ValueError(
                f"capacity {self.capacity}: {self.policy!r} has none; use 'reservoir' for a fixed "
                "size"
            )

    @property
    def shares(self) -> tuple[float, float, float]:
        """The shares of the pool, the update and the buffer in the first task."""
        return self.pretraining, self.update, self.buffer

    def at(self, task: int, tasks: int) -> "Mixture":
        """Return the mixture of one task, with constant shares."""
        if self.last is None:
            return self
        passed = task / max(tasks - 1, 1)
        ways = zip(self.shares, self.last, strict=True)
        p, d, b = ((1 - passed) * first + passed * last for first, last in ways)
        return dataclasses.replace(self, pretraining=p, update=d, buffer=b, last=None)


@raise_cmp_errors
@dataclass(frozen=True, config=STRICT)
class Optimizer:
    """AdamW. Weight decay applies to matrices only, and gradients are clipped by their global norm.

    Attributes:
        carry: Whether the moments carry over from task to task, or each task starts without any. If
            None, they carry over where they can, see `RunConfig.carries_moments`.
        beta1: Decay per step of the running mean of gradients.
        beta2: Decay per step of the running mean of squared gradients.
        eps: Added by AdamW to its divisor, the root mean square gradient.
        weight_decay: The fraction of each weight that a step removes, as a multiple of the learning
            rate.
        clip: The largest gradient norm; longer gradients are scaled down to it.

    Example:
        >>> cmp.RunConfig(optimizer=cmp.Optimizer(carry=False)).carries_moments
        False
    """

    carry: bool | None = None
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.98
    eps: Positive = 1e-8
    weight_decay: NotNegative = 0.1
    clip: Positive = 1.0


@raise_cmp_errors
@dataclass(frozen=True, config=STRICT)
class Training:
    """How long each task is trained, and in which precision.

    Attributes:
        steps: Optimiser steps per task. [steps]
        passes: How often a task shows each of its new images, on average. It replaces `steps` and
            gives each task its own number of steps, see `cmp.mixtures.fit_steps`.
        task_steps: The steps of each task, instead of `steps`; with `passes`, the steps of the
            first tasks. [steps]
        batch: Samples per step. [samples]
        precision: The precision of the forward pass.
        augment: Whether images are augmented; if not, they are prepared as for evaluation.
        budget: What a task may cost, as a multiple of `steps` of full fine-tuning. It determines
            the method's number of steps, see `cmp.budgets`.

    Example:
        >>> cmp.RunConfig(training=cmp.Training(steps=100, batch=128)).changes()
        {'training.steps': 100, 'training.batch': 128}
    """

    steps: Count = 40
    passes: Annotated[float, Field(gt=0, le=100)] | None = None
    task_steps: tuple[Count, ...] = ()
    batch: Annotated[int, Field(ge=2, le=MAX_COUNT)] = 64
    precision: Literal["bf16", "fp32"] = "bf16"
    augment: bool = True
    budget: Multiple | None = None

    def __post_init__(self) -> None:
        if self.budget is not None and (self.passes or self.task_steps):
            key = "passes" if self.passes else "task_steps"
            raise ValueError(f"budget and {key} both set the number of steps; give one")


@raise_cmp_errors
@dataclass(frozen=True, config=STRICT)
class Evaluation:
    """What is scored, and on which images.

    Attributes:
        split: "test", or "validation" for choices such as the learning rate.
        subset: Images per dataset after each task; None for all. [images]
        full: Whether the whole split is also scored before and after the stream.

    Example:
        >>> tuning = cmp.Evaluation(split="validation", full=False)
        >>> sorted(cmp.RunConfig(evaluation=tuning).changes())
        ['evaluation.full', 'evaluation.split']
    """

    split: Literal["test", "validation"] = "test"
    subset: Count | None = 64
    full: bool = True


@raise_cmp_errors
@dataclass(frozen=True, config=STRICT)
class Seeds:
    """One seed per source of randomness.

    Attributes:
        stream: The order of the classes, and so the content of each task.
        init: Random initial weights, or the number of a base.
        data: The batches, and what is kept for replay.
        augment: The crops of files and the changes to drawings, and the noise of random layers such
            as DropPath.

    Example:
        >>> cmp.RunConfig(seeds=cmp.Seeds(stream=3)).changes()
        {'seeds.stream': 3}
    """

    stream: Seed = 0
    init: Seed = 0
    data: Seed = 0
    augment: Seed = 0


@raise_cmp_errors
@dataclass(frozen=True, config=STRICT)
class RunConfig:
    """The config of one run, which trains a model through a stream of tasks.

    Attributes:
        data: A named data source, or the path of a folder of manifests; see `cmp.data.load_data`.

    Example:
        >>> config = cmp.RunConfig(method=cmp.Method("lora", rank=8))
        >>> config.changes()
        {'method.name': 'lora', 'method.rank': 8}
    """

    data: Location = "embedded"
    model: Model = dataclasses.field(default_factory=Model)
    stream: Stream = dataclasses.field(default_factory=Stream)
    mixture: Mixture = dataclasses.field(default_factory=Mixture)
    method: Method = dataclasses.field(default_factory=Method)
    merging: Merging = dataclasses.field(default_factory=Merging)
    schedule: Schedule = dataclasses.field(default_factory=Schedule)
    optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
    training: Training = dataclasses.field(default_factory=Training)
    evaluation: Evaluation = dataclasses.field(default_factory=Evaluation)
    seeds: Seeds = dataclasses.field(default_factory=Seeds)

    def __post_init__(self) -> None:
        _check_steps(self)
        _check_method(self)
        if self.schedule.is_over_stream and self.merging.policy != "none":
            raise ValueError(
                f"merging.policy {self.merging.policy!r}: with schedule {self.schedule.name!r} "
                "each task starts from the constant phase; set merging.policy=none"
            )
        reads_peaks = "peaks" in registry.get_option("meta_schedule", self.schedule.meta).settings
        if reads_peaks and len(self.schedule.peaks) < self.stream.tasks:
            peaks, tasks = len(self.schedule.peaks), self.stream.tasks
            raise ValueError(f"schedule.peaks: {peaks} peaks for {tasks} tasks")
        # past updates may have had other settings; `resolve_run` checks all tasks of a stream
        is_by_update = registry.get_option("order", self.stream.order).facts["updates"]
        check_schedule(self, self.stream.tasks - 1 if is_by_update else 0)

    @property
    def steps(self) -> tuple[int, ...]:
        """Steps of each task. With `training.passes`, only those of the first tasks are known until
        `cmp.mixtures.fit_steps` fills in the rest."""
        section = self.training
        if section.task_steps or section.passes is not None:
            return section.task_steps
        return (section.steps,) * self.stream.tasks

    @property
    def carries_moments(self) -> bool:
        """Whether the optimiser's moments carry over from task to task.

        They do by default, unless adapters start afresh with each task.
        """
        begins_anew = self.method.has_adapters and self.method.fold
        return not begins_anew if self.optimizer.carry is None else self.optimizer.carry

    def to_dict(self) -> dict[str, Any]:
        """Return the tree as plain dicts and lists, ready for JSON."""
        return _ADAPTER.dump_python(self, mode="json")

    def changes(self) -> dict[str, Any]:
        """Return the values that differ from the defaults, by dotted key.

        They identify a config, so a new key does not affect configs that do not use it.
        """
        return dict(flat_keys(_ADAPTER.dump_python(self, mode="json", exclude_defaults=True)))

    def option_record(self) -> dict[str, dict[str, Any]]:
        """Return the `sha256` and `sources` of options from outside the package, by kind and name.
        They are stored with a run and never executed."""
        names = {kind: operator.attrgetter(of.key)(self) for kind, of in registry.KINDS.items()}
        options = [registry.get_option(kind, name) for kind, name in names.items()]
        return {
            f"{option.kind}:{option.name}": {"sha256": sources_digest(sources), "sources": sources}
            for option in options
            if (sources := option.sources)
        }


def check_schedule(config: RunConfig, first: int) -> None:
    """Raise `ValueError` if a task, from task `first` on, has too few steps for the schedule."""
    schedule, every = config.schedule, config.steps
    for steps in sorted({*every[first:]}):
        schedule.durations(steps)
    idle = schedules.idle_task(schedule, every, first)
    if idle is not None:
        raise ValueError(
            f"schedule {schedule.name!r} with meta {schedule.meta!r}: the learning rate is zero at "
            f"every step of task {idle}, of {every[idle]} steps; give tasks more steps, or choose "
            "another schedule"
        )


def _check_steps(config: RunConfig) -> None:
    """Raise `ValueError` if the steps of tasks contradict the rest of the config."""
    section, tasks, known = config.training, config.stream.tasks, len(config.training.task_steps)
    if known > tasks or (0 < known < tasks and section.passes is None):
        raise ValueError(f"training.task_steps: {known} numbers for {tasks} tasks; give one each")
    last = config.mixture.last or config.mixture.shares
    if section.passes is not None and 0 in (config.mixture.update, last[1]):
        share = "mixture.last" if config.mixture.update else "mixture.update"
        raise ValueError(f"training.passes counts new images, so {share} must be above 0 for them")


def _check_method(config: RunConfig) -> None:
    """Raise `ValueError` if the method contradicts the rest of the config."""
    method, policy = config.method, config.merging.policy
    if method.has_adapters and not method.fold and policy != "none":
        raise ValueError(
            f"method.fold false with merging.policy {policy!r}: unfolded adapters fit only the "
            "weights they were trained with; set method.fold=true"
        )
    if method.has_adapters and registry.get_option("merge_policy", policy).facts["step_share"]:
        raise ValueError(
            f"merging.policy {policy!r} averages weights after every step, but method "
            f"{method.name!r} folds adapters in once per task; choose another policy"
        )
    if method.has_adapters and method.fold and config.optimizer.carry:
        raise ValueError(
            "optimizer.carry true with method.fold true: adapters start afresh with each task, "
            "so there are no moments to carry over; set method.fold=false"
        )
    needs_pool = registry.get_option("method", method.name).facts["needs_pool"]
    mixture = config.mixture
    if needs_pool and 0 in (mixture.pretraining, (mixture.last or mixture.shares)[0]):
        raise ValueError(
            f"mixture.pretraining 0: {method.name!r} needs replayed images of the pretraining "
            "pool; raise it above 0"
        )


_ADAPTER = TypeAdapter(RunConfig)


@functools.cache
def defaults() -> dict[str, Any]:
    """Return every key and its default. Changing a default means a new `NUMERICS`."""
    return dict(flat_keys(RunConfig().to_dict()))


def flat_keys(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Yield the leaves of a tree with dotted keys: ("schedule.peak", 0.001), ..."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flat_keys(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def parse(tree: Mapping[str, Any], source: str = "config") -> RunConfig:
    """Return the config for a tree of nested dicts; missing keys take their defaults.

    At the top level, `seed: n` sets all seeds that are not set by name, and `recipe: NAME` sets all
    keys of the recipe that are not set.

    Args:
        tree: The nested dicts.
        source: The name of the tree in error messages.

    Raises:
        CmpError: A key is unknown or a value is invalid; the message names the key.
    """
    if not isinstance(tree, Mapping):
        raise CmpError(f"{source}: expected a mapping of keys, found {tree!r:.60}")
    tree = with_recipe(tree)
    if "seed" in tree:
        seeds = dict.fromkeys(Seeds.__dataclass_fields__, tree.pop("seed"))
        tree = overlay({"seeds": seeds}, tree)
    try:
        return _ADAPTER.validate_json(json.dumps(tree, default=_plain_value))
    except ValidationError as error:
        key, fault = first_fault(error)
        raise explain_fault(source, key, fault, _near_key(key, tree)) from error
    except (TypeError, ValueError, RecursionError) as error:  # of json.dumps
        raise CmpError(f"{source}: {error}") from error


def _plain_value(value: Any) -> Any:
    """Return a number of numpy or a path as JSON has it; raise `TypeError` for anything else."""
    import numpy as np  # imported by now if the value comes from it; a command starts without it

    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"{value!r:.80}: give a number, a text, a list or a mapping")


def _near_key(key: str, tree: Mapping[str, Any]) -> str:
    """Return a hint that suggests keys of a tree for an unknown one.

    It also knows a key without its section, a section for the key that names its option, and what
    other libraries call a key.
    """
    section, _, name = key.partition(".")
    if key in tree and key in defaults():
        return f"; write it as `{section}: {{{name}: ...}}`"
    meant: dict[str, list[str]] = {}
    for full in defaults():
        meant.setdefault(full.rpartition(".")[2], []).append(full)
    meant |= {each: [each] for each in (*defaults(), "seed", "recipe")}
    meant |= {each: [f"{each}.{naming}"] for each, naming in NAMING_KEYS.items()}
    meant |= NAMES_ELSEWHERE
    dotted = [each for each, _ in flat_keys(tree) if each.startswith(f"{key}.")]
    near = find_closest((dotted or [key])[0], meant)
    return f"; did you mean {' or '.join(map(repr, meant[near]))}?" if near else ""


def override(tree: dict[str, Any], assignments: Iterable[str]) -> dict[str, Any]:
    """Return a copy of a tree with "key=value" assignments applied.

    The value of a key whose type is text is taken as it stands, unless it begins with a quote;
    other values are read as YAML. A recipe and `seed`, which sets all seeds, override the tree, and
    the other assignments override both.

    Raises:
        CmpError: An assignment is not "key=value", or its value cannot be read.
    """
    result = copy.deepcopy(tree)
    is_late = lambda text: not text.startswith(("recipe=", "seed="))  # noqa: E731
    for assignment in sorted(assignments, key=is_late):
        key, equals, text = assignment.partition("=")
        if not equals:
            raise CmpError(f"{assignment!r}: expected key=value, such as schedule.peak=0.0004")
        # YAML would cut "my pictures #2", split "my: pictures" and make a number of "2026"
        is_text = isinstance(defaults().get(key), str) and text[:1] not in ("'", '"')
        try:
            value = text if is_text else parse_yaml(text)
        except ValueError as error:
            raise CmpError(f"{key}: {text!r} cannot be read: {error}") from error
        if key == "recipe":
            result = overlay(result, recipe_tree(value))
            continue
        if key == "seed":
            result.pop("seeds", None)
        if key in NAMING_KEYS and not isinstance(value, Mapping):
            raise CmpError(f"{key} is a section; set {key}.{NAMING_KEYS[key]}={text}")
        *parents, leaf = key.split(".")
        node = result
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise CmpError(f"{key}: {parent!r} is a value and has no keys")
        if isinstance(value, Mapping) and isinstance(node.get(leaf), Mapping):
            value = {**node[leaf], **value}  # as in `overlay`: the section's other keys stay
        node[leaf] = value
    return result


_TREES = parse_yaml(Path(__file__).with_name("profiles.yaml").read_text(encoding="utf-8"))
PROFILES: dict[str, dict[str, Any]] = _TREES["profiles"]
"""Sizes of a run, by name."""
FOREIGN_MODEL_PROFILES = tuple(
    name
    for name, tree in PROFILES.items()
    if tree.get("model", {}).get("start", STARTS[0]) not in STARTS
)
"""Profiles whose model is not embedded, as it starts from other weights."""
RECIPES: dict[str, dict[str, Any]] = _TREES["recipes"]
"""Named settings that can be added to any profile."""


UPDATES: dict[str, dict[str, Any]] = _TREES["updates"]
"""The settings that `cmpt update` starts from, for "embedded" and "foreign" models."""


def profile(name: str) -> dict[str, Any]:
    """Return a copy of a profile's tree; raise `CmpError` if there is no such profile."""
    if name not in PROFILES:
        raise CmpError(f"profile {name!r}: unknown; the profiles are: {', '.join(PROFILES)}")
    return copy.deepcopy(PROFILES[name])


def read_settings(what: str) -> dict[str, Any]:
    """Return the settings of a profile, or of a file NAME.yaml such as `cmpt plan` writes."""
    return read_yaml(Path(what)) if what.endswith((".yaml", ".yml")) else profile(what)


def read_config(what: str, settings: Iterable[str] = ()) -> RunConfig:
    """Return the config of a profile or a file of settings, changed by "key=value" settings."""
    return parse(override(read_settings(what), settings), what)


def recipe_tree(name: str) -> dict[str, Any]:
    """Return a copy of a recipe's tree; raise `CmpError` if there is no such recipe."""
    if name not in list(RECIPES):
        raise CmpError(f"recipe: {name!r:.60}: unknown; the recipes are: {', '.join(RECIPES)}")
    return copy.deepcopy(RECIPES[name])


def with_recipe(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a tree with the keys of its `recipe`, as far as the tree does not set them;
    raise `CmpError` if there is no such recipe."""
    rest = {key: value for key, value in tree.items() if key != "recipe"}
    return overlay(recipe_tree(tree["recipe"]), rest) if "recipe" in tree else rest


def overlay(below: dict[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Return both trees merged; where both set a key, `above` wins."""
    result = below | dict(above)
    for key in below.keys() & above.keys():
        if isinstance(below[key], Mapping) and isinstance(above[key], Mapping):
            result[key] = {**below[key], **above[key]}
    return result
