"""Kinds of values that a config holds."""

import dataclasses
import difflib
import json
import math
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass

from cmp.errors import CmpError
from cmp.files import parse_yaml

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
MAX_COUNT = 2**31 - 1
"""The largest count."""
Count = Annotated[int, Field(ge=1, le=MAX_COUNT)]
Steps = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]{0,99}$")]
Data = Annotated[str, Field(pattern=r"^[^\x00-\x1f]{1,1000}$")]
"""A collection that comes with the package, or the path of a folder of manifests."""
ModelName = Annotated[
    str,
    Field(
        pattern=r"^([A-Za-z0-9][A-Za-z0-9._+-]{0,99}|(hf-hub|local-dir):[A-Za-z0-9._~/+@-]{1,500})$"
    ),
]
"""A name of open_clip's, or where a model lies."""
Start = Annotated[str, Field(pattern=r"^[^\x00-\x1f]{1,1000}$")]
"""A base, a pretrained tag of the model, or a file's path."""

_WITH_COOLDOWN = ("rsqrt", "wsd", "wsd-sqrt", "infinite")
_WITH_WARMUP = ("linear", "cosine", *_WITH_COOLDOWN)
CURVE_SETTINGS = {
    "warmup": _WITH_WARMUP, "warmup_steps": _WITH_WARMUP, "cooldown": _WITH_COOLDOWN, "cooldown_steps": _WITH_COOLDOWN,
    "shift": ("rsqrt",), "level": ("infinite",),
}  # fmt: skip
META_SETTINGS = {"decay": ("geometric",), "peaks": ("free",)}
"""Which schedules, and which meta schedules, a key is for."""
META_CURVES = {"cosine-dynamic": "cosine", "rsqrt-recovered": "rsqrt"}
"""Meta schedules that change the curve within a task, and the one that they change."""
DEFAULT_SHARES = {"warmup": 0.1, "cooldown": 0.25}
"""Of a task, where a schedule says nothing."""


@checked_dataclass(frozen=True, config=STRICT)
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
        for key, names in (CURVE_SETTINGS | META_SETTINGS).items():
            chosen = self.meta if key in META_SETTINGS else self.name
            default = type(self).__dataclass_fields__[key].default
            if getattr(self, key) != default and chosen not in names:
                raise ValueError(f"{key}: {chosen!r} has none, only {', '.join(names)}")
        for kind in DEFAULT_SHARES:
            share, steps = getattr(self, kind), getattr(self, f"{kind}_steps")
            if share is not None and steps is not None:
                raise ValueError(f"{kind} {share:g} and {kind}_steps {steps}: one says it all")
        if META_CURVES.get(self.meta, self.name) != self.name:
            raise ValueError(
                f"meta {self.meta!r} changes {META_CURVES[self.meta]!r}, not {self.name!r}"
            )
        if self.name == "infinite" and self.meta != "none":
            raise ValueError(f"meta {self.meta!r}: 'infinite' is one curve over the whole stream")

    def durations(self, steps: int) -> tuple[int, int]:
        """Steps of warmup and of cooldown in a task of `steps` steps; shares are rounded up.

        `ValueError` if they are longer than the task; rounding alone never makes them so.
        """
        found = []
        for kind, default in DEFAULT_SHARES.items():
            share, exact = getattr(self, kind), getattr(self, f"{kind}_steps")
            share = (
                0.0
                if self.name not in CURVE_SETTINGS[kind]
                else default
                if share is None
                else share
            )
            found.append(math.ceil(share * steps - 1e-9) if exact is None else exact)
        warmup, cooldown = found
        rounded = self.warmup_steps is None and self.cooldown_steps is None
        if warmup + cooldown > steps + rounded:
            raise ValueError(f"warmup {warmup} + cooldown {cooldown} steps in a task of {steps}")
        if self.name == "infinite" and cooldown >= steps:
            raise ValueError(f"cooldown {cooldown} steps: 'infinite' has nothing to go on from")
        return warmup, min(cooldown, steps - warmup)


_ADAPTER_SETTINGS = {"rank": 5, "scale": 1.0, "targets": (), "fold": True}
METHOD_SETTINGS: dict[str, dict[str, Any]] = {
    "lora": _ADAPTER_SETTINGS,
    "dora": _ADAPTER_SETTINGS,
    "vera": _ADAPTER_SETTINGS,
    "galore": {"rank": 8, "scale": 2.0, "gap": 200},
    "ewc": {"strength": 1.0, "gamma": 1.0, "fisher": "sample", "batches": 4},
    "si": {"strength": 0.5, "damping": 1.0},
    "distillation": {"strength": 1.0, "temperature": 2.0},
}
"""Which keys a method has, and what each is where a config says nothing (spec 3). A method that is
left out has none; a default that changes is a new `NUMERICS`."""
ADAPTERS = tuple(name for name, keys in METHOD_SETTINGS.items() if "fold" in keys)


@checked_dataclass(frozen=True, config=STRICT)
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
            owners = [name for name, keys in METHOD_SETTINGS.items() if key in keys]
            changed = key != "name" and getattr(self, key) != field.default
            if changed and self.name not in owners:
                raise ValueError(f"{key}: {self.name!r} has none, only {', '.join(owners)}")

    def get(self, key: str) -> Any:
        """A key's value, or the method's default where the config leaves it open."""
        value = getattr(self, key)
        return METHOD_SETTINGS[self.name][key] if value is None else value

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


SUM_RULES = ("task-arithmetic", "lines")
"""Rules that add up task vectors."""
TASK_VECTOR_RULES = (
    *SUM_RULES, "model-stock", "magmax", "random", "ties", "dare", "dare-ties", "breadcrumbs",
    "breadcrumbs-ties",
)  # fmt: skip
"""Rules on task vectors, which need the weights that those start from."""
PAIR_RULES = ("slerp",)
"""Rules for two models, no more and no fewer."""
TRIMMING_RULES = ("ties", "dare", "dare-ties", "breadcrumbs", "breadcrumbs-ties")
RULE_SETTINGS = {
    "weight": ("interpolation", "slerp"),
    "shares": ("interpolation",), "power": ("interpolation",), "reverse": ("interpolation",),
    "scale": tuple(name for name in TASK_VECTOR_RULES if name != "model-stock"),
    "density": TRIMMING_RULES, "outliers": ("breadcrumbs", "breadcrumbs-ties"),
    "alpha": ("lines",), "beta": ("lines",),
}  # fmt: skip
PAIR_POLICIES = (
    "ema", "zs", "ft", "ft-last", "zero-unrolled", "last-unrolled", "all-unrolled", "unrolled-all",
    "unrolled-last",
)  # fmt: skip
"""Policies that merge two models at a time."""
ALL_POLICIES = ("zero-all", "last-all", "all-all", "all-last", "all-unrolled", "unrolled-all")
"""Policies that merge the ends of all tasks at once."""
POLICY_SETTINGS = {
    "shares": ALL_POLICIES,
    "power": ALL_POLICIES,
    "reverse": ALL_POLICIES,
    "zero": ALL_POLICIES,
    "decay": ("step-ema",),
}
"""Which rules, and which policies, a key is for; "none" and "step-ema" have no rule."""


@checked_dataclass(frozen=True, config=STRICT)
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
        for table, kind in ((RULE_SETTINGS, "rule"), (POLICY_SETTINGS, "policy")):
            for key, names in table.items():
                default = type(self).__dataclass_fields__[key].default
                if getattr(self, key) != default and getattr(self, kind) not in names:
                    raise ValueError(
                        f"{key}: {kind} {getattr(self, kind)!r} has none, only {', '.join(names)}"
                    )
        self._check_lists()
        if self.rule in RULE_SETTINGS["outliers"] and self.outliers + self.density > 1:
            raise ValueError(
                f"density {self.density:g} + outliers {self.outliers:g} are more than all entries"
            )

    def _check_lists(self) -> None:
        """`ValueError` for keys of a merge of two, or of all, that this policy never makes."""
        if self.rule in PAIR_RULES and self.policy in ALL_POLICIES:
            raise ValueError(
                f"rule {self.rule!r} is of two models; policy {self.policy!r} merges all"
            )
        if self.weight != 0.5 and self.policy not in PAIR_POLICIES and self.shares != "newest":
            raise ValueError(
                f"weight {self.weight:g}: policy {self.policy!r} merges no two models; it takes "
                "shares 'newest' for a weight of the newest"
            )
        if self.power != 1 and self.shares != "power":
            raise ValueError(f"power {self.power:g}: only shares 'power' has one")
        if self.reverse and self.shares in ("equal", "newest"):
            raise ValueError(f"reverse: shares {self.shares!r} have no other end")


STARTS = ("annealed", "unannealed", "cosine", "random")
"""What `model.start` may be without any file of the reader's: a base of an embedded model, or
random weights. A `cosine` base is of another pretraining schedule; it does not ship, `cmpt pretrain`
makes it."""


@checked_dataclass(frozen=True, config=STRICT)
class Model:
    """Which network, and the weights it starts from.

    name: an embedded model, an open_clip name, or where a model lies, such as "hf-hub:ORG/NAME".
    start: one of `STARTS`; a pretrained tag that open_clip has for the name; the path of a
    safetensors file or of an open_clip checkpoint; "hub", the weights that lie beside a model of a
    hub.
    """

    name: ModelName = "tiny"
    start: Start = "annealed"


@checked_dataclass(frozen=True, config=STRICT)
class Stream:
    """The order of the adaptation classes, cut into `tasks` blocks.

    order: see `cmp.streams.orders`; reverse: read from its end. equal: whether the blocks are of
    equal class count or of about equal image count. traits: the table that every order but random
    goes by, in `data_manifests/traits` or made by `cmpt stream`.
    """

    order: Literal[
        "random", "easy-accuracy", "easy-loss", "easy-alignment", "frequency", "similarity",
        "dataset", "time", "listed",
    ] = "random"  # fmt: skip
    reverse: bool = False
    equal: Literal["classes", "images"] = "classes"
    tasks: Count = 8
    traits: Name = "embedded"


@checked_dataclass(frozen=True, config=STRICT)
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


@checked_dataclass(frozen=True, config=STRICT)
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


@checked_dataclass(frozen=True, config=STRICT)
class Training:
    """Steps of `batch` samples in each task, and the arithmetic of the forward pass.

    budget: what a task may cost, in multiples of what `steps` of full fine-tuning cost; a method's
    steps follow from it, see `cmp.budgets`. Set by whoever compares methods at equal compute.
    """

    steps: Count = 40
    batch: Annotated[int, Field(ge=2, le=MAX_COUNT)] = 64
    precision: Literal["bf16", "fp32"] = "bf16"
    budget: Positive | None = None


@checked_dataclass(frozen=True, config=STRICT)
class Evaluation:
    """Images a dataset in the evaluation after each task, `None` for all; and whether the whole
    split is scored as well, before the stream and after it. split: "validation" is for choices,
    such as of a learning rate, and is never published."""

    split: Literal["test", "validation"] = "test"
    subset: Count | None = 64
    full: bool = True


@checked_dataclass(frozen=True, config=STRICT)
class Seeds:
    """One seed a source of randomness: stream order, weights, batches, augmentation."""

    stream: Seed = 0
    init: Seed = 0
    data: Seed = 0
    augment: Seed = 0


@checked_dataclass(frozen=True, config=STRICT)
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
        return _CONFIG_ADAPTER.dump_python(self, mode="json")

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


_CONFIG_ADAPTER = TypeAdapter(RunConfig)


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
    tree = expand_recipe(tree)
    if "seed" in tree:
        every = dict.fromkeys(Seeds().__dataclass_fields__, tree.pop("seed"))
        named = tree.get("seeds") or {}
        if not isinstance(named, Mapping):
            raise CmpError(f"{source}: seeds: expected seeds by name, found {named!r:.60}")
        tree["seeds"] = every | dict(named)
    try:
        return _CONFIG_ADAPTER.validate_json(json.dumps(tree))
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


_DEFAULT_PEAK = Schedule().peak

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
    "gpu": {
        "data": "fomo",
        "model": {"name": "ViT-B-16", "start": "laion2b_s34b_b88k"},
        "stream": {"tasks": 20},
        "mixture": {"pretraining": 0.33, "update": 0.34, "buffer": 0.33},
        "schedule": {"peak": 1e-5},
        "optimizer": {"beta2": 0.999, "weight_decay": 0.2},
        "training": {"steps": 1428, "batch": 512, "budget": 1.0},
        "evaluation": {"subset": 1000},
    },
}
"""Sizes of a run, by profile. `gpu` is the paper's default (spec 1.2, 1.3): a cosine with a tenth
of warmup, gradients clipped at 1, and as many steps as 1.8e9 memory-adjusted GFLOPs buy by our
count; `replay` is a tenth of the pool, and decay acts on matrices only, as everywhere here."""

OWN_MODEL_PROFILES = ("gpu",)
"""Profiles of a model that is not embedded."""


def profile(name: str) -> dict[str, Any]:
    """The tree of a profile; `CmpError` for an unknown one."""
    if name not in PROFILES:
        raise CmpError(f"profile {name!r}: there are {', '.join(PROFILES)}")
    return json.loads(json.dumps(PROFILES[name]))


def is_translatable(changes: dict[str, Any], name: str) -> bool:
    """Whether what a study changes can be asked of a profile: not the embedded models by name of
    one that has a model of its own."""
    return name not in OWN_MODEL_PROFILES or not any(key.startswith("model.") for key in changes)


def translate_changes(changes: dict[str, Any], name: str) -> dict[str, Any]:
    """What a study changes, in a profile's own terms. Studies are written for `cpu`, so for a
    profile with a model of its own a peak is so many times that model's, and steps and tasks are so
    many times the profile's."""
    if name not in OWN_MODEL_PROFILES:
        return changes
    found, own, cpu = dict(changes), PROFILES[name], PROFILES["cpu"]
    if "schedule.peak" in found:
        peak = found["schedule.peak"] / _DEFAULT_PEAK * own["schedule"]["peak"]
        found["schedule.peak"] = float(f"{peak:.3g}")
    for key in ("training.steps", "stream.tasks"):
        if key in found:
            room, leaf = key.split(".")
            found[key] = round(found[key] * own[room][leaf] / cpu[room][leaf])
    return found


RECIPES: dict[str, dict[str, Any]] = {
    "default": {
        "mixture": {"pretraining": 0.25, "update": 0.25, "buffer": 0.5},
        "optimizer": {"carry": True},
        "merging": {"policy": "last-unrolled"},
    },
}
"""What chapter 08 recommends to begin with, on top of any profile."""


def expand_recipe(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a tree with all that its `recipe` says of keys that it does not set."""
    tree = dict(tree)
    return overlay(recipe_tree(tree.pop("recipe")), tree) if "recipe" in tree else tree


def recipe_tree(name: str) -> dict[str, Any]:
    """The tree of a recipe; `CmpError` for an unknown one."""
    if name not in list(RECIPES):
        raise CmpError(f"recipe: {name!r:.60}: there is {', '.join(RECIPES)}")
    return json.loads(json.dumps(RECIPES[name]))


def overlay(below: dict[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Both trees in one; where both set a key, as `above` has it."""
    result = below | dict(above)
    for key in below.keys() & above.keys():
        if isinstance(below[key], Mapping) and isinstance(above[key], Mapping):
            result[key] = {**below[key], **above[key]}
    return result


PRETRAINING: dict[str, Any] = {
    "model": {"start": "random"},
    "stream": {"tasks": 1},
    "mixture": {"pretraining": 1.0, "update": 0.0, "buffer": 0.0, "replay": 1.0},
    "schedule": {"name": "wsd", "peak": 2e-3, "warmup": 0.04},
    "training": {"steps": 2600, "batch": 128},
    "evaluation": {"subset": None},
}  # fmt: skip
"""Pretraining is a run: one task, the pool alone, random weights."""

PRETRAINING_OF: dict[str, tuple[str, ...]] = {
    "tiny-half": ("training.steps=5200",),
    "tiny-one": ("training.steps=5200",),
    "tiny-double": ("training.steps=5200", "schedule.peak=0.0014"),
    "tiny-quad": ("training.steps=5200", "schedule.peak=0.001"),
    "tiny-vit": ("training.steps=4000",),
}
"""Where a model's pretraining differs from `PRETRAINING`, as key=value."""


def override(tree: dict[str, Any], assignments: Iterable[str]) -> dict[str, Any]:
    """A copy of a tree with "key=value" assignments applied; values are read as YAML. A recipe goes
    over the tree, and the other assignments over the recipe."""
    result = json.loads(json.dumps(tree))
    for assignment in sorted(assignments, key=lambda each: not each.startswith("recipe=")):
        key, equals, text = assignment.partition("=")
        if not equals:
            raise CmpError(f"{assignment!r}: expected key=value, such as schedule.peak=0.0004")
        try:
            value = parse_yaml(text)
        except ValueError as error:
            raise CmpError(f"{key}: {text!r} cannot be read: {error}") from error
        if key == "recipe":
            result = overlay(result, recipe_tree(value))
            continue
        *parents, leaf = key.split(".")
        node = result
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise CmpError(f"{key}: {parent!r} holds a value, not further keys")
        node[leaf] = value
    return result
