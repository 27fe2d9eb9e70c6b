"""What one may ask of the planner, and what nobody can be given."""

import functools
import textwrap
from dataclasses import dataclass
from math import isfinite
from typing import Any, NamedTuple

import open_clip
import pandas as pd
import yaml

from cmp import budgets, config, mixtures, models
from cmp.budgets import Budget
from cmp.config import MAX_COUNT, Method, RunConfig
from cmp.errors import CmpError
from cmp.experiments import evidence
from cmp.experiments.evidence import AGGREGATES, Evidence, Place

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


class ImpossibleRequest(CmpError):
    """A wish that no run can fulfil; the message says why, and what would have to give."""


@dataclass(frozen=True)
class PlanRequest:
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
        return self.model in models.family_names()

    @property
    def arriving(self) -> float:
        """Images of an update."""
        every = ARRIVING if self.embedded else FOMO
        return every / self.updates if self.images is None else float(self.images)


def check_request(wish: PlanRequest) -> None:
    """`Impossible`, a sentence, for a wish that cannot be."""
    for key, value, known in (
        ("device", wish.device, DEVICES), ("keep", wish.keep, KEEP), ("new", wish.new, NEW),
    ):  # fmt: skip
        if value not in known:
            raise ImpossibleRequest(f"{key} {value!r}: there are {', '.join(known)}")
    if not wish.embedded and wish.model not in open_clip.list_models():
        raise ImpossibleRequest(
            f"model {wish.model!r}: open_clip knows no such model; embedded are "
            f"{', '.join(models.family_names())}"
        )
    _check_compute(wish)
    _check_data(wish)
    if wish.keep == "all" and wish.pool == 0:
        raise ImpossibleRequest(
            "nothing may be lost, and nothing that the model learned from can be replayed: every "
            "update that learns something forgets something then. Keep some of the pretraining "
            "data, or allow some loss (keep: most)"
        )


def _check_compute(wish: PlanRequest) -> None:
    """Compute there must be, in one unit, and an update at least."""
    if (wish.gpu_hours is None) == (wish.gmafs is None):
        raise ImpossibleRequest(
            "give the compute in one unit: GPU hours, or memory-adjusted GFLOPs"
        )
    compute = wish.gmafs if wish.gpu_hours is None else wish.gpu_hours
    if not isfinite(compute) or compute <= 0:
        raise ImpossibleRequest(f"compute {compute:g}: without any, nothing can be trained")
    if not 1 <= wish.updates <= MAX_COUNT:
        raise ImpossibleRequest(
            f"updates {wish.updates}: a stream has one at least, and {MAX_COUNT:,} at most"
        )
    if not (isfinite(wish.pool) and 0 <= wish.pool <= 1):
        raise ImpossibleRequest(f"pool {wish.pool:g}: it is a part of the pretraining data, 0 to 1")


def _check_data(wish: PlanRequest) -> None:
    """Images there must be, and no more updates than there is to learn."""
    if wish.embedded and wish.updates > CLASSES:
        raise ImpossibleRequest(
            f"updates {wish.updates}: the embedded stream has {CLASSES} classes, and an update "
            "brings one at least"
        )
    if not 1 <= wish.arriving <= MAX_COUNT:
        raise ImpossibleRequest(
            f"images {wish.arriving:.3g} of an update: it brings one at least; with more updates "
            "than images there is nothing to learn in some of them"
        )
    if wish.buffer is not None and not 0 <= wish.buffer <= MAX_COUNT:
        raise ImpossibleRequest(f"buffer {wish.buffer}: a number of images, 0 if none can be kept")


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

COPIES = {"none": 0, "ema": 2, "last-unrolled": 2}
"""Networks that a merging policy keeps beside the one that trains; see `cmp.merging.policies`."""
SAVES = 3
"""Checkpoints on the disk at once: the last two, and the next while it is written."""


@dataclass(frozen=True)
class Forecast:
    """Of training alone: scoring comes on top. flops: of all updates; gmafs: memory-adjusted
    GFLOPs; hours: on the device; memory: bytes at the peak of a step; disk: bytes of checkpoints;
    allowed: what of `flops` or `gmafs` the wish allowed, in that unit."""

    flops: float
    gmafs: float
    hours: float
    memory: float
    disk: float
    allowed: float


@functools.cache
def memory_use(name: str, batch: int, method: Method, half: bool) -> tuple[float, float, float]:
    """Bytes at the peak of a step, of the weights, and of the optimizer. half: in bf16, where what
    is kept for the backward pass takes half; ViT-B-16 at batch 512 then comes to 46.9 GB, and
    Table 4 has 46.6."""
    found = budgets.shape_state(name, method, models.create_on_meta(name))
    parts = budgets.memory_account(found, functools.partial(budgets.forward_shapes, found, batch))
    total = sum(parts.values()) - half * parts["activations"] / 2
    return total, parts["weights"], parts["optimizer"]


def run_cost(run: RunConfig) -> float:
    """Bytes at the peak of one of a run's steps."""
    half = run.training.precision == "bf16"
    return memory_use(run.model.name, run.training.batch, run.method, half)[0]


def allowance(wish: PlanRequest, run: RunConfig) -> Budget:
    """What an update may cost, in the wish's own unit: of hours FLOPs, else memory-adjusted
    ones."""
    cost = budgets.method_cost(run)
    if wish.gmafs is not None:
        return budgets.make_budget(wish.gmafs * GIGA / wish.updates, cost, budgets.full_cost(run))
    allowed = wish.gpu_hours * 3600 * DEVICES[wish.device].speed
    return Budget(allowed / wish.updates, cost.step, cost.end, 1.0)


def forecast_cost(wish: PlanRequest, run: RunConfig) -> Forecast:
    """What a run costs."""
    cost, tasks = budgets.method_cost(run), run.stream.tasks
    flops = tasks * (run.training.steps * cost.step + cost.end)
    half = run.training.precision == "bf16"
    peak, weights, moments = memory_use(run.model.name, run.training.batch, run.method, half)
    copies = 1 + COPIES[run.merging.policy]
    allowed = tasks * allowance(wish, run).allowed
    return Forecast(
        flops=flops,
        gmafs=flops / GIGA * cost.memory / budgets.full_cost(run).memory,
        hours=flops / DEVICES[wish.device].speed / 3600,
        memory=peak,
        disk=SAVES * (copies * weights + moments),
        allowed=allowed / GIGA if wish.gmafs is not None else allowed,
    )


TAGS = {"ViT-B-16": "laion2b_s34b_b88k", "ViT-B-32": "laion2b_s34b_b79k"}
"""Pretrained weights of the paper (spec 1.3); of another model those that open_clip lists first."""
LIKE = config.profile("gpu")
"""Whose peak, optimizer and evaluation a real model's plan has: the paper's for ViT-B/16, with
AdamW at batch 512 (spec 1.3)."""
BATCHES = (512, 256, 128, 64, 32)
"""Of a real model: the largest that fits, at most the paper's."""


@dataclass(frozen=True)
class Plan:
    """tree: what differs from the defaults, as a file for `cmpt run` has it; run: the same, from
    random weights where its own are a file's. place: where stored runs ended that are like it, or
    `outside`, why there are none. effects: a row a choice, what it did to both aggregates in the
    stored runs. rejected: alternative -> why. notes: sentences that a reader must know."""

    wish: PlanRequest
    tree: dict[str, Any]
    run: RunConfig
    costs: Forecast
    place: Place | None
    outside: str
    effects: pd.DataFrame
    rejected: dict[str, str]
    notes: tuple[str, ...]


def make_plan(wish: PlanRequest, known: Evidence) -> Plan:
    """The run that the studies advise; `Impossible`, a sentence, where there is none.

    known: see `cmp.planning.gather`.
    """
    check_request(wish)
    tree, notes = choose_settings(wish)
    tree, more = _size_settings(wish, tree)
    run = count_costs(tree)
    full_steps = budgets.method_cost(run).step * _multiplier(run) / budgets.full_cost(run).step
    full_steps *= run.training.steps
    outside = known.outside(run, full_steps)
    place = None if outside else known.nearest(run, full_steps)
    return Plan(
        wish, tree, run, forecast_cost(wish, run), place,
        outside or ("" if place else "no stored setting is like this plan"),
        evidence.describe_effects(wish, tree, known, numbers=not outside),
        evidence.rejected_alternatives(wish, tree, known, numbers=not outside),
        (*notes, *more, *_remarks(wish, run)),
    )  # fmt: skip


def count_costs(tree: dict[str, Any]) -> RunConfig:
    """The run of a plan's tree; from random weights, for shapes cost the same and ask for no
    file."""
    model = tree["model"] | ({"start": "random"} if "start" in tree["model"] else {})
    return config.parse(tree | {"model": model}, "plan")


def _multiplier(run: RunConfig) -> float:
    return budgets.method_cost(run).memory / budgets.full_cost(run).memory


def choose_settings(wish: PlanRequest) -> tuple[dict[str, Any], list[str]]:
    """What the studies advise, without sizes; and what must be said of it."""
    tree: dict[str, Any] = {"model": _model_settings(wish), "stream": {"tasks": wish.updates}}
    tree["mixture"], notes = _mixture_settings(wish)
    careful = wish.keep != "balance" or wish.pool == 0
    if careful:
        tree["merging"] = {"policy": "ema"}
        if wish.keep == "all":
            tree["merging"]["weight"] = 0.1
            notes.append(
                "Nothing that was measured learns and loses nothing at all. An average that takes "
                "a tenth of each update came nearest."
            )
    else:
        tree |= {"merging": {"policy": "last-unrolled"}, "optimizer": {"carry": True}}
    if wish.new == "names":
        tree["method"] = {"name": "locked-image"}
    if not wish.embedded:
        tree, more = _real_settings(tree)
        notes += more
    return tree, notes


def _real_settings(tree: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The plan of a model that is not embedded: with data, a peak and an optimizer of that size."""
    peak = LIKE["schedule"]["peak"]
    notes = [
        "FoMo-in-Flux stands for your data: name the folder of their manifests under `data` "
        "(chapter A1).",
        f"The peak of {peak:g} is the paper's for ViT-B/16. Try a third and three times of it "
        "on a validation split first: the rate moved more than any schedule (chapter 04).",
    ]
    own = {key: dict(LIKE[key]) for key in ("schedule", "optimizer", "evaluation")}
    own["optimizer"] |= tree.get("optimizer", {})
    return {"data": LIKE["data"]} | tree | own, notes


def _model_settings(wish: PlanRequest) -> dict[str, str]:
    """Name and starting weights."""
    if wish.embedded:
        return {"name": wish.model}
    tags = open_clip.list_pretrained_tags_by_model(wish.model)
    if not tags:
        raise ImpossibleRequest(
            f"{wish.model}: open_clip has no pretrained weights of it, so there is nothing to keep"
        )
    return {"name": wish.model, "start": TAGS.get(wish.model, tags[0])}


def _mixture_settings(wish: PlanRequest) -> tuple[dict[str, Any], list[str]]:
    """Shares of a batch by what can be replayed."""
    replay, buffer, notes = wish.pool > 0, wish.buffer != 0, []
    shares = {
        (True, True): (0.25, 0.25, 0.5),
        (True, False): (0.5, 0.5, 0.0),
        (False, True): (0.0, 0.5, 0.5),
        (False, False): (0.0, 1.0, 0.0),
    }[replay, buffer]
    found = dict(zip(("pretraining", "update", "buffer"), shares, strict=True))
    if replay:
        found["replay"] = float(wish.pool)
    if buffer and wish.buffer is not None and wish.buffer < wish.updates * wish.arriving:
        found |= {"policy": "reservoir", "capacity": wish.buffer}
    if not replay:
        notes.append(
            "Without the pretraining data much of what the model knew will be lost; an average of "
            "weights saves a part of it (chapter 03)."
        )
    if not buffer:
        notes.append(
            "Without a buffer of earlier updates the model accumulates little: a few hundred "
            "images would do (chapter 07)."
        )
    return found, notes


def _size_settings(wish: PlanRequest, tree: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The same with a batch that fits and the steps that the compute allows; a method that takes
    less memory where the chosen one does not fit."""
    room = SPARE * DEVICES[wish.device].memory
    for method in (tree.get("method", {}), {"name": "locked-image"}):
        for batch in (64,) if wish.embedded else BATCHES:
            sized = tree | {"training": {"batch": batch, "steps": 1}}
            sized |= {"method": method} if method else {}
            run = count_costs(sized)
            if run_cost(run) <= room:
                sized["training"]["steps"] = _plan_steps(wish, run)
                switched = method != tree.get("method", {})
                words = (
                    f"Training everything does not fit into {wish.device}'s memory, so the image "
                    "tower stays as it is."
                )
                return sized, [words] * switched
    raise ImpossibleRequest(
        f"{wish.model} does not fit into {wish.device}, {DEVICES[wish.device].memory / GIGA:.0f} "
        f"GB, even at batch {BATCHES[-1]} with its image tower locked; choose a smaller model or a "
        "larger device"
    )


def _plan_steps(wish: PlanRequest, run: RunConfig) -> int:
    """Steps of an update."""
    allowed = allowance(wish, run)
    if allowed.steps < 1:
        most = int(wish.updates * allowed.allowed / (allowed.step + allowed.end))
        much = f"{most:,} at most" if most else "not even one"
        raise ImpossibleRequest(
            f"this compute buys no step in each of {wish.updates:,} updates of {wish.model} at "
            f"batch {run.training.batch}: {much}. Update less often, or give more compute"
        )
    if allowed.steps > MAX_COUNT:
        raise ImpossibleRequest(f"{allowed.steps:.3g} steps an update: more than a run can count")
    return allowed.steps


def _remarks(wish: PlanRequest, run: RunConfig) -> list[str]:
    """How often an image is seen, and small updates."""
    _, update, _ = mixtures.batch_counts(run.mixture, run.training.batch, empty_buffer=False)
    seen = run.training.steps * update / wish.arriving
    found = [
        f"In its own update an image is seen {seen:.2g} times; in most stored runs, about once."
    ]
    if run.training.steps < 10:
        found.append(
            f"{run.training.steps} steps an update are few: warmup and cooldown take most of them."
        )
    if not wish.embedded and wish.images is None:
        found.append("Images of an update are those of FoMo-in-Flux, 1.76 million in all.")
    if wish.embedded and wish.images is not None:
        found.append("The embedded stream brings its own images; the number given is not used.")
    return found


WIDTH = 98


def plan_as_yaml(plan: Plan, comments: bool = True) -> str:
    """The run's file; what it costs and why in comments above, if they are wanted."""
    text = yaml.safe_dump(plan.tree, sort_keys=False)
    if not comments:
        return text
    lines = [line for said in plan_paragraphs(plan) for line in textwrap.wrap(said, WIDTH)]
    return "".join(f"# {line}\n" for line in lines) + text


def plan_paragraphs(plan: Plan) -> list[str]:
    """What a plan is, costs and comes to; one sentence or two each."""
    found = [plan_summary(plan), cost_sentence(plan), place_sentence(plan)]
    found += [f"Note: {each}" for each in plan.notes]
    found += [
        f"Effect of {row.choice}: A_KA {row.A_KA}, A_ZS {row.A_ZS} (chapter {row.study})."
        for row in plan.effects.itertuples()
    ]
    return found + [f"Rejected: {name}. {why}." for name, why in plan.rejected.items()]


def plan_summary(plan: Plan) -> str:
    """The plan in a sentence."""
    run = plan.run
    mixture, method = run.mixture, run.method.name
    policy = {"ema": "EMA-Merge", "last-unrolled": "an average deployed, training goes on"}
    what = "everything trained" if method == "full" else f"trained by {method}"
    return (
        f"{run.model.name}: {run.stream.tasks:,} updates of {run.training.steps:,} steps at batch "
        f"{run.training.batch}, {what}; batches of {mixture.pretraining:.0%} pretraining "
        f"data, {mixture.update:.0%} update, {mixture.buffer:.0%} earlier updates; "
        f"{policy[run.merging.policy]}."
    )


def cost_sentence(plan: Plan) -> str:
    """What it costs, and by which assumptions."""
    costs, device = plan.costs, DEVICES[plan.wish.device]
    return (
        f"Training costs {costs.flops:.3g} FLOPs ({costs.gmafs:.3g} memory-adjusted GFLOPs), "
        f"{costs.hours:.3g} hours on {plan.wish.device} ({device.about}), "
        f"{costs.memory / GIGA:.3g} GB of memory as accounted for, and {costs.disk / GIGA:.3g} GB "
        "of disk for checkpoints; scoring comes on top."
    )


def place_sentence(plan: Plan) -> str:
    """Where stored runs like it ended, or that there are none."""
    if plan.place is None:
        return (
            f"No numbers for where it will end: {plan.outside}. Below stand the signs of effects "
            "in the stored runs, largest first; sizes do not carry over."
        )
    scores = ", ".join(
        f"{name} {row['mean']:.1f}% ({row['low']:.1f} to {row['high']:.1f})"
        for name, row in plan.place.scores.loc[list(AGGREGATES)].iterrows()
    )
    own = f" It differs in {', '.join(plan.place.differs)}." if plan.place.differs else ""
    return (
        f"The nearest stored runs, {plan.place.setting!r} of study {plan.place.study}, ended at "
        f"{scores}: 95% t-intervals over {plan.place.n} replicates.{own}"
    )


def costs_table(plan: Plan) -> pd.DataFrame:
    """The same numbers as a table of text, a row a quantity."""
    costs = plan.costs
    rows = {
        "FLOPs of training": f"{costs.flops:.3g}",
        "memory-adjusted GFLOPs": f"{costs.gmafs:.3g}",
        f"hours on {plan.wish.device}": f"{costs.hours:.3g}",
        "GB of memory": f"{costs.memory / GIGA:.3g}",
        "GB of disk": f"{costs.disk / GIGA:.3g}",
    }
    return pd.DataFrame({"what": list(rows), "amount": list(rows.values())})
