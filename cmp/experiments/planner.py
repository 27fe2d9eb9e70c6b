"""`cmpt plan`: from what one has and wants to a run's file, its costs, and the reasons for it."""

import bisect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pandas as pd
import yaml

from cmp import budgets, config, mixtures, models, values
from cmp.errors import CmpError, did_you_mean, name_choices
from cmp.experiments import evidence, forecast, results
from cmp.experiments.forecast import DEVICES, GIGA, USABLE_MEMORY
from cmp.experiments.guidelines import load_guidelines
from cmp.experiments.scores import AGGREGATES, level_in_words
from cmp.files import read_yaml

_WORDS = read_yaml(Path(__file__).with_name("planner.yaml"))
KEEP: dict[str, str] = _WORDS["keep"]
"""What must be kept of the model's zero-shot knowledge."""
NEW: dict[str, str] = _WORDS["new"]
"""What is new in the updates."""
PROBLEMS: dict[str, str] = _WORDS["problems"]
"""Why no run can fulfil a request, where that takes more than a line."""
NOTES: dict[str, str] = _WORDS["notes"]
"""What a reader of a plan must know, by the fact in which it arises, see `_notes`."""
CLASSES, ARRIVING = 522, 6375
"""The embedded stream: its classes, and the images of all its updates."""
FOMO = 1_760_000
"""Images of all updates of FoMo-in-Flux (spec 9.2)."""
MANY_STEPS = 80
"""From so many steps per update on, an average of embedded models takes half of each, else a
quarter: on the validation side a half was the better at 160 steps and a quarter at 20 and 40,
whatever the number of updates (studies `tuning-2` to `tuning-4`). Between, nothing was tuned."""
MERGED_PEAK = 0.0024
"""The peak of an embedded model whose updates are merged (study `tuning-2`)."""
MAX_PASSES = 20
"""Times that a plan of a real model shows an image in its own update, at most: about twice what
was measured. The paper's runs show it 2.8 times, and those of our study `scaling` 10.5 at most."""
TAGS = {"ViT-B-16": "laion2b_s34b_b88k", "ViT-B-32": "laion2b_s34b_b79k"}
"""Pretrained weights of the paper (spec 1.3); of another model those that open_clip lists first."""
REAL = config.profile("gpu")
"""Whose data, peak, optimiser and evaluation the plan of a real model has: the paper's."""
MIN_STEPS = 10
"""Steps of an update that a plan has at least: of fewer, warmup and cooldown take most."""
BATCHES = (512, 256, 128, 64, 32)
"""Batches of a real model: the largest that fits, at most the paper's."""
LINE_WIDTH = 98


MAX_COMPUTE = 1e15
"""GPU hours or memory-adjusted GFLOPs, more than there are."""


class ImpossibleRequest(CmpError):
    """No run can fulfil a request; the message says why, and what would have to change."""


@dataclass(frozen=True)
class PlanRequest:
    """What one has and wants.

    Attributes:
        model: An embedded model's or an open_clip name, or a place such as "hf-hub:ORG/NAME".
        updates: How many updates there will be.
        images: Images of each, on average; None for those of the embedded stream, or of
            FoMo-in-Flux.
        gpu_hours: Hours on `device` for training all updates; or
        gmafs: memory-adjusted GFLOPs in all, the paper's unit.
        device: One of `cmp.experiments.forecast.DEVICES`.
        keep: One of `KEEP`.
        new: One of `NEW`.
        pool: The part of the pool that is to be replayed, 0 to 1; None for half of an embedded
            model's, as in the studies, and all of a real one's, which is the user's own.
        other_pool: Whether there are only public data to replay, and no pretraining data.
        buffer: Images of earlier updates that can be kept; None for all.
        start: The weights to begin with, as in `model.start`; None for the usual ones.
    """

    model: str = "small"
    updates: int = 20
    images: int | None = None
    gpu_hours: float | None = None
    gmafs: float | None = None
    device: str = "h100"
    keep: str = "balance"
    new: str = "both"
    pool: float | None = None
    other_pool: bool = False
    buffer: int | None = None
    start: str | None = None

    @property
    def embedded(self) -> bool:
        """Whether the model, and so the stream, is of the embedded benchmark."""
        return self.model in models.family_names()

    @property
    def arriving(self) -> float:
        """Images of an update."""
        total = ARRIVING if self.embedded else FOMO
        return total / self.updates if self.images is None else float(self.images)

    @property
    def replay(self) -> float:
        """The part of the pool that is replayed; none of public data by an embedded model, which
        hardly retained more with these than without (chapter 07)."""
        if self.embedded and self.other_pool:
            return 0.0
        return (0.5 if self.embedded else 1.0) if self.pool is None else self.pool


def _problems(request: PlanRequest) -> Iterator[str]:
    """Yield why no run can fulfil a request; each holds for a request that passed those before."""
    for key, names in (("device", DEVICES), ("keep", KEEP), ("new", NEW)):
        if (value := getattr(request, key)) not in names:
            yield f"{key} {value!r}{name_choices(value, [*names])}"
    is_hub = models.is_hub(request.model)
    if is_hub:
        models.check_start(request.model, request.start or models.HUB)
        models.create_on_meta(request.model)  # which says why it cannot be made
    elif not request.embedded and request.model not in (names := open_clip.list_models()):
        near = did_you_mean(request.model, names)
        words = f"embedded are {', '.join(models.family_names())}{near}"
        yield f"model {request.model!r}: open_clip knows no such model; {words}"
    if (request.gpu_hours is None) == (request.gmafs is None):
        yield "give the compute in one unit: GPU hours, or memory-adjusted GFLOPs"
    compute = request.gmafs if request.gpu_hours is None else request.gpu_hours
    if not 0 < compute <= MAX_COMPUTE:
        yield f"compute {compute:g}: without any, nothing can be trained; at most {MAX_COMPUTE:g}"
    if not 1 <= request.updates <= values.MAX_COUNT:
        yield PROBLEMS["updates"].format(updates=request.updates, most=values.MAX_COUNT)
    if not 0 <= request.replay <= 1:
        yield f"pool {request.replay:g}: the part of the pool that is replayed is 0 to 1"
    if request.embedded and request.updates > CLASSES:
        yield PROBLEMS["classes"].format(updates=request.updates, classes=CLASSES)
    if not 2 <= request.arriving <= values.MAX_COUNT:
        yield PROBLEMS["images"].format(images=request.arriving)
    if request.buffer is not None and not 0 <= request.buffer <= values.MAX_COUNT:
        yield f"buffer {request.buffer}: a number of images, 0 if none can be kept"
    if request.keep == "all" and request.replay == 0:
        yield PROBLEMS["keep all"]
    needs_tag = not (request.embedded or request.start or is_hub)
    if needs_tag and not open_clip.list_pretrained_tags_by_model(request.model):
        yield PROBLEMS["no weights"].format(model=request.model)


def plan_costs(request: PlanRequest, run: config.RunConfig) -> dict[str, float]:
    """Return what a run's training costs on the request's device, by quantity; scoring excluded."""
    flops = forecast.training_flops(run)
    return {
        "FLOPs": flops,
        "memory-adjusted GFLOPs": flops / GIGA * _memory_multiplier(run),
        f"hours on {request.device}": flops / DEVICES[request.device].speed / 3600,
        "GB of memory": forecast.step_memory(run) / GIGA,
        "GB of disk": forecast.checkpoint_bytes(run) / GIGA,
    }


def _memory_multiplier(run: config.RunConfig) -> float:
    return budgets.method_cost(run).memory / budgets.full_cost(run).memory


@dataclass(frozen=True)
class Plan:
    """A planned run.

    Attributes:
        request: What it is for.
        tree: Its settings that differ from the defaults, as a file for `cmpt run` has them.
        run: Its config.
        costs: What it costs, by quantity, see `plan_costs`.
        place: Where stored runs like it ended, or None.
        outside: Why there is no place.
        effects: What each choice did in the stored runs, largest first: `choice`, `A_KA` and `A_ZS`
            in words, and the `study`.
        rejected: Why each alternative was rejected; of embedded models alone, whose runs tell.
        advice: What the guidelines say, of other models.
        notes: Sentences that a reader must know.
    """

    request: PlanRequest
    tree: dict[str, Any]
    run: config.RunConfig
    costs: dict[str, float]
    place: evidence.Place | None
    outside: str
    effects: pd.DataFrame
    rejected: dict[str, str]
    advice: dict[str, str]
    notes: tuple[str, ...]


def make_plan(request: PlanRequest, known: evidence.Evidence) -> Plan:
    """Return the run that the studies advise.

    Args:
        request: What one has and wants.
        known: The published runs, see `cmp.experiments.evidence.gather_evidence`.

    Raises:
        ImpossibleRequest: There is no such run.
        CmpError: The model is embedded, and no study is published.
    """
    for problem in _problems(request):
        raise ImpossibleRequest(problem)
    if request.embedded and not known.runs:
        raise CmpError(PROBLEMS["no study"].format(folder=results.RESULTS))
    tree = _choose_sizes(request, choose_settings(request))
    run = config.parse(tree, "plan")
    step = budgets.method_cost(run).step * _memory_multiplier(run)
    full_steps = run.training.steps * step / budgets.full_cost(run).step
    outside = known.outside(run, full_steps)
    place = None if outside else known.nearest(run, full_steps)
    facts = evidence.plan_facts(run, request.other_pool)
    choices = evidence.load_choices() if known.runs else {}  # of the same book
    guidelines = load_guidelines() if known.runs and not request.embedded else {}
    chosen, rejected = (
        evidence.effects_of(choices.get(kind, ()), facts, known, numbers=not outside)
        for kind in ("chosen", "rejected")
    )
    effects = chosen.sort_values("size", ascending=False, kind="stable", ignore_index=True)
    return Plan(
        request, tree, run, plan_costs(request, run), place,
        outside or ("" if place else "no stored setting is like this plan"),
        effects.rename(columns={"words": "choice"})[["choice", "A_KA", "A_ZS", "study"]],
        {row.words: _rejection(row) for row in rejected.itertuples()} if request.embedded else {},
        {name: guideline.advice for name, guideline in guidelines.items()},
        _notes(request, run),
    )  # fmt: skip


def _rejection(row: Any) -> str:
    """Return what a rejected choice did, where that was measured, and the reason."""
    words = f"{row.setting!r} minus {row.against!r}: A_KA {row.A_KA}, A_ZS {row.A_ZS}, GM {row.GM}"
    return f"{words} (study {row.study}){'; ' if row.reason else ''}{row.reason}"


def choose_settings(request: PlanRequest) -> dict[str, Any]:
    """Return the settings that the studies advise, without sizes.

    An average takes half of each update, the default of the paper's code, where no study chose.
    """
    tree: dict[str, Any] = {} if request.embedded else {"data": REAL["data"]}
    usual = models.HUB if models.is_hub(request.model) else TAGS.get(request.model)
    start = request.start or usual
    if not (start or request.embedded):
        start = open_clip.list_pretrained_tags_by_model(request.model)[0]
    tree["model"] = {"name": request.model} | ({"start": start} if start else {})
    tree["stream"] = {"tasks": request.updates}
    tree["mixture"] = _choose_mixture(request)
    tree["merging"] = {"policy": "ema", "weight": 0.1 if request.keep == "all" else 0.5}
    if request.embedded:
        peak = MERGED_PEAK if request.keep == "balance" else MERGED_PEAK / 2
        tree["schedule"] = {"name": "wsd", "peak": peak}
    else:
        tree |= {key: REAL[key] for key in ("optimizer", "schedule", "evaluation")}
    return tree


def _choose_mixture(request: PlanRequest) -> dict[str, Any]:
    """Return equal shares of what there is, and what of it is kept: of the embedded pool, half of
    the names, as in the studies.

    A single update has no earlier ones in its stream: a pool of the user's own holds these.
    """
    has_earlier = request.buffer != 0 and not (request.embedded and request.updates == 1)
    sources = {"pretraining": request.replay > 0, "update": True, "buffer": has_earlier}
    parts = sum(sources.values())
    mixture: dict[str, Any] = {name: is_there / parts for name, is_there in sources.items()}
    if request.updates == 1:
        mixture |= {"pretraining": mixture["pretraining"] + mixture["buffer"], "buffer": 0.0}
    if mixture["pretraining"] > 0:
        mixture["replay"] = float(request.replay or 1)
        mixture["select"] = "concepts" if request.embedded and request.replay <= 0.5 else "random"
    if mixture["buffer"] and (request.buffer or np.inf) < request.updates * request.arriving:
        mixture |= {"policy": "reservoir", "capacity": request.buffer}
    return mixture


def _choose_sizes(request: PlanRequest, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings with a batch that fits, the steps that the compute allows, and the weight
    of an average that goes with these.

    Where the chosen method does not fit, the image tower is locked, which takes less memory.
    """
    memory, parse = DEVICES[request.device].memory, config.parse
    fits = lambda tree: forecast.step_memory(parse(tree)) <= USABLE_MEMORY * memory  # noqa: E731
    most = _largest_batch(request, config.Mixture(**settings["mixture"]))
    batches = [size for size in BATCHES if size <= most and not request.embedded] or [most]
    for part in ({}, {"method": {"name": "locked-image"}}):
        trees = [settings | {"training": {"batch": size, "steps": 1}} | part for size in batches]
        first = bisect.bisect_left(trees, True, key=fits)  # an account takes half a second
        if first < len(trees):
            run = parse(trees[first])
            steps, limit = _affordable_steps(request, run), values.MAX_COUNT
            if not request.embedded:
                limit = int(MAX_PASSES * request.arriving / _update_share(run))
            trees[first]["training"]["steps"] = steps = min(steps, limit)
            if request.embedded and request.keep != "all" and steps < MANY_STEPS:
                trees[first]["merging"] = settings["merging"] | {"weight": 0.25}
            return trees[first]
    size = {"model": request.model, "device": request.device, "memory": memory / GIGA}
    raise ImpossibleRequest(PROBLEMS["too large"].format(batch=BATCHES[-1], **size))


def _usual_batch(request: PlanRequest) -> int:
    return 64 if request.embedded else BATCHES[0]


def _largest_batch(request: PlanRequest, mixture: config.Mixture) -> int:
    """Return the largest batch, up to the usual one, that takes no more of an update or of the
    buffer than these hold; the pool is taken to be large enough."""
    usual = _usual_batch(request)
    pool, update = np.empty(usual), np.empty(min(usual, int(request.arriving)))
    pools = [mixtures.Pools(pool, update, update[:size]) for size in (0, request.buffer)]
    return min(mixtures.largest_batch(each, mixture, usual) for each in pools)


def _affordable_steps(request: PlanRequest, run: config.RunConfig) -> int:
    """Return the steps per update that the compute buys."""
    cost = budgets.method_cost(run)
    if request.gmafs is not None:
        total, unit = request.gmafs * GIGA, budgets.full_cost(run)
    else:
        total, unit = request.gpu_hours * 3600 * DEVICES[request.device].speed, cost
    budget = budgets.make_budget(total / request.updates, cost, unit)
    if (steps := budget.steps) < MIN_STEPS:
        most = int(request.updates * budget.allowed / (MIN_STEPS * budget.step + budget.end))
        facts = {"updates": request.updates, "model": request.model, "batch": run.training.batch}
        facts |= {"steps": f"{steps or 'no'} step{'s' * (steps > 1)}", "least": MIN_STEPS}
        facts["most"] = (
            f"{most:,} update{'s' * (most > 1)} at most" if most else "not even one update"
        )
        raise ImpossibleRequest(PROBLEMS["few steps"].format(**facts))
    if budget.steps > values.MAX_COUNT:
        raise ImpossibleRequest(f"{budget.steps:.3g} steps per update: more than a run can count")
    return budget.steps


def _update_share(run: config.RunConfig) -> int:
    """Return how many images of a batch are of the update, once there is a buffer."""
    return mixtures.batch_counts(run.mixture, run.training.batch, empty_buffer=False)[1]


def _notes(request: PlanRequest, run: config.RunConfig) -> tuple[str, ...]:
    """Return the sentences that a reader of a plan must know."""
    steps = run.training.steps
    bought = steps if request.embedded else _affordable_steps(request, run)
    passes_per_step = _update_share(run) / request.arriving
    passes, most = (f"{float(f'{count * passes_per_step:.2g}'):,g}" for count in (steps, bought))
    numbers = {"request": request, "run": run, "passes": passes, "bought": bought, "most": most}
    facts = {
        "no pool": request.replay == 0,
        "public data, embedded": request.embedded and request.other_pool,
        "public data": not request.embedded and request.other_pool and request.replay > 0,
        "no buffer": request.buffer == 0,
        "one update": request.updates == 1 and request.buffer != 0 and not request.embedded,
        "keep all": request.keep == "all",
        "real data": not request.embedded,
        "real peak": not request.embedded,
        "forced lock": run.method.name == "locked-image",
        "only names": request.new == "names" and run.method.name == "full",
        "small updates": _largest_batch(request, run.mixture) < _usual_batch(request),
        "always": True,
        "capped": bought > steps,
        "real images": not request.embedded and request.images is None,
        "own images": request.embedded and request.images is not None,
    }
    return tuple(text.format(**numbers) for fact, text in NOTES.items() if facts[fact])


def plan_as_yaml(plan: Plan, comments: bool = True) -> str:
    """Return a plan's file for `cmpt run`; what it costs and why stands in comments above."""
    text = yaml.safe_dump(plan.tree, sort_keys=False)
    if not comments:
        return text
    costs = ", ".join(f"{amount:.3g} {what}" for what, amount in plan.costs.items())
    paragraphs = [
        plan_summary(plan),
        f"Training takes {costs} ({DEVICES[plan.request.device].about}); scoring comes on top.",
        place_sentence(plan),
        *(f"Note: {note}" for note in plan.notes),
        *(
            f"Effect of {row.choice}: A_KA {row.A_KA}, A_ZS {row.A_ZS} (study {row.study})."
            for row in plan.effects.itertuples()
        ),
        *(f"Rejected: {name}. {reason}." for name, reason in plan.rejected.items()),
        *(f"Advice on {name}: {advice}" for name, advice in plan.advice.items()),
    ]
    lines = [line for part in paragraphs for line in textwrap.wrap(part, LINE_WIDTH)]
    return "".join(f"# {line}\n" for line in lines) + text


def plan_summary(plan: Plan) -> str:
    """Return a plan in a sentence."""
    run, mixture, method = plan.run, plan.run.mixture, plan.run.method.name
    trained = "everything trained" if method == "full" else f"trained by {method}"
    tasks, steps, batch = run.stream.tasks, run.training.steps, run.training.batch
    return (
        f"{run.model.name}: {tasks:,} update{'s' * (tasks > 1)} of {steps:,} "
        f"step{'s' * (steps > 1)} at batch {batch}, {trained}; batches of "
        f"{mixture.pretraining:.0%} pool, {mixture.update:.0%} update, {mixture.buffer:.0%} "
        f"earlier updates; EMA-Merge, {run.merging.weight:g} of each update."
    )


def place_sentence(plan: Plan) -> str:
    """Return where stored runs like a plan ended, or that there are none."""
    if plan.place is None:
        signs = f" {_WORDS['signs']}" * (len(plan.effects) > 0)
        return _WORDS["no place"].format(reason=plan.outside) + signs
    rows = plan.place.scores.loc[list(AGGREGATES)]
    scores = ", ".join(f"{name} {words}" for name, words in rows["words"].items())
    over = f": {level_in_words()} t-intervals over bases, {plan.place.n} streams"
    over *= bool(rows["low"].notna().all())
    differs = f" It differs in {', '.join(plan.place.differs)}." if plan.place.differs else ""
    return (
        f"The nearest stored runs, {plan.place.setting!r} of study {plan.place.study}, ended, in "
        f"per cent, at {scores}{over}.{differs}"
    )
