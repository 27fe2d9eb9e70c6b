"""Plan a run (`cmpt plan`): turn a request into a file for `cmpt run`, with costs and advice."""

import bisect
import contextlib
import functools
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import yaml

from cmp import budgets, config, mixtures, models, starts, streams, values
from cmp.embedded import packed
from cmp.errors import CmpError, did_you_mean, name_choices
from cmp.mixtures import MIN_STEPS
from cmp.parsing import read_yaml
from cmp.releases.sentences import count_of
from cmp.runs import forecast
from cmp.runs.forecast import DEVICES, GIGA, USABLE_MEMORY
from lab.evidence.guidelines import load_guidelines

_WORDS = read_yaml(Path(__file__).with_name("planner.yaml"))
KEEP: dict[str, str] = _WORDS["keep"]
"""How much of the model's zero-shot knowledge must be kept."""
PROBLEMS: dict[str, str] = _WORDS["problems"]
"""Longer explanations of why no run can fulfil a request."""
NOTES: dict[str, str] = _WORDS["notes"]
"""Notes for the reader of a plan, by the fact that they depend on, see `_notes`."""
CLASSES, ARRIVING = 522, 6375
"""The classes of the embedded stream, and the images of all its updates."""
FOMO = 1_760_000
"""The images of all updates of FoMo-in-Flux."""
MERGED_PEAK: float = config.UPDATES["embedded"]["schedule"]["peak"]
"""The peak of the recipe for an embedded model (study `recipe-tuning-3`)."""
MAX_PASSES = 20
"""How often a plan for a real model may show an image in its own update: about twice the measured
range. It is 2.8 times in the paper's runs and at most 10.5 in our study `scaling`."""
TAGS = {"ViT-B-16": "laion2b_s34b_b88k", "ViT-B-32": "laion2b_s34b_b79k"}
"""The paper's pretrained weights; for other models, the first that open_clip lists."""
REAL = config.profile("gpu")
"""The profile of the paper, whose data, peak, optimiser and evaluation a plan for a real model
uses."""
BATCHES = (512, 256, 128, 64, 32)
"""Batch sizes for a real model: the largest that fits is used, at most the paper's."""
LINE_WIDTH = 98


class ImpossibleRequest(CmpError):
    """An error for a request that no run can fulfil. The message says why, and what would have to
    change."""


@dataclass(frozen=True)
class PlanRequest:
    """The request for a plan.

    Attributes:
        model: The name of an embedded or open_clip model, or a location such as "hf-hub:ORG/NAME".
        updates: The number of updates.
        images: The mean number of images per update. If None, that of FoMo-in-Flux. An embedded
            model has the embedded stream, whatever is given.
        gpu_hours: The hours on `device` for training all updates; or
        gmafs: The total memory-adjusted GFLOPs, the paper's unit.
        device: One of `cmp.runs.forecast.DEVICES`.
        keep: One of `KEEP`.
        pool: The fraction of the pool to replay, 0 to 1. If None, half for an embedded model, as in
            the studies, and everything for a real one, with the user's own pool.
        other_pool: Whether only public data are available for replay, and no pretraining data.
        buffer: The number of images of earlier updates that can be kept; None for all.
        start: The starting weights, as in `model.start`; None for the default.
    """

    model: str = "small"
    updates: int = 20
    images: int | None = None
    gpu_hours: float | None = None
    gmafs: float | None = None
    device: str = "h100"
    keep: str = "balance"
    pool: float | None = None
    other_pool: bool = False
    buffer: int | None = None
    start: str | None = None

    @property
    def embedded(self) -> bool:
        """Whether the model, and so the stream, belongs to the embedded benchmark."""
        return self.model in starts.family_names()

    @property
    def arriving(self) -> float:
        """The number of images per update; the embedded stream has its own."""
        if self.embedded:
            return ARRIVING / self.updates
        return FOMO / self.updates if self.images is None else float(self.images)

    @property
    def replay(self) -> float:
        """The fraction of the pool that is replayed. An embedded model replays no public data,
        which hardly improved its retention (chapter 07)."""
        if self.embedded and self.other_pool:
            return 0.0
        return (0.5 if self.embedded else 1.0) if self.pool is None else self.pool


def _problems(request: PlanRequest) -> Iterator[str]:
    """Yield the reasons why no run can fulfil a request. Each check assumes that the earlier ones
    passed."""
    for key, names in (("device", DEVICES), ("keep", KEEP)):
        if (value := getattr(request, key)) not in names:
            yield f"{key} {value!r}{name_choices(value, [*names])}"
    is_hub = starts.is_hub(request.model)
    if is_hub:
        starts.check_start(request.model, request.start or starts.HUB)
        models.create_on_meta(request.model)  # raises an error that says why
    elif not request.embedded and request.model not in (names := open_clip.list_models()):
        near = did_you_mean(request.model, names)
        words = f"the embedded models are {', '.join(starts.family_names())}{near}"
        yield f"model {request.model!r}: not an open_clip model; {words}"
    # a path may name a file that is still to come, but a single word names weights
    elif re.fullmatch(r"[\w-]+", start := request.start or "") and not Path(start).exists():
        names = [*config.STARTS] if request.embedded else ["random"]
        names += open_clip.list_pretrained_tags_by_model(request.model)
        if start not in names and not starts.pretrained_tag(request.model, start):
            there_are = f"for {request.model} there are"
            yield f"start {start!r}: no such file{name_choices(start, names, there_are)}"
    if (request.gpu_hours is None) == (request.gmafs is None):
        yield "give the compute either in GPU hours or in memory-adjusted GFLOPs"
    compute = request.gmafs if request.gpu_hours is None else request.gpu_hours
    if not 0 < compute <= values.MAX_COMPUTE:
        yield f"compute {compute:g}: must be above 0, and at most {values.MAX_COMPUTE:g}"
    if not 1 <= request.updates <= values.MAX_COUNT:
        yield PROBLEMS["updates"].format(updates=request.updates, most=values.MAX_COUNT)
    if not 0 <= request.replay <= 1:
        yield f"pool {request.replay:g}: give the fraction of the pool to replay, from 0 to 1"
    if request.embedded and request.updates > CLASSES:
        yield PROBLEMS["classes"].format(updates=request.updates, classes=CLASSES)
    if not 2 <= request.arriving <= values.MAX_COUNT:
        yield PROBLEMS["images"].format(images=request.arriving)
    if request.buffer is not None and not 0 <= request.buffer <= values.MAX_COUNT:
        yield f"buffer {request.buffer}: give a number of images, 0 if none can be kept"
    if request.keep == "all" and request.replay == 0:
        yield PROBLEMS["keep all"]
    needs_tag = not (request.embedded or request.start or is_hub)
    if needs_tag and not open_clip.list_pretrained_tags_by_model(request.model):
        yield PROBLEMS["no weights"].format(model=request.model)


def plan_costs(request: PlanRequest, run: config.RunConfig) -> dict[str, float]:
    """Return the costs of a run's training on the request's device by quantity, without
    evaluation."""
    steps = sum(run.steps)
    flops = steps * forecast.step_flops(run)
    seconds = forecast.estimate_step(run, request.device).seconds
    return {
        "FLOPs": flops,
        "memory-adjusted GFLOPs": flops / GIGA * _memory_multiplier(run),
        f"hours on {request.device}": steps * seconds / 3600,
        "GB of memory": forecast.step_memory(run) / GIGA,
        "GB of disk": forecast.checkpoint_bytes(run) / GIGA,
    }


def _memory_multiplier(run: config.RunConfig) -> float:
    return budgets.method_cost(run).memory / budgets.full_cost(run).memory


@dataclass(frozen=True)
class Plan:
    """A planned run.

    Attributes:
        request: The request.
        tree: The settings that differ from the defaults, in the form of a file for `cmpt run`.
        run: The config.
        costs: The costs by quantity, see `plan_costs`.
        notes: Notes for the reader, by what the request says.
        advice: The advice of each guideline.
    """

    request: PlanRequest
    tree: dict[str, Any]
    run: config.RunConfig
    costs: dict[str, float]
    notes: tuple[str, ...]
    advice: dict[str, str]


def make_plan(request: PlanRequest) -> Plan:
    """Return the run that the studies suggest for a request.

    Raises:
        ImpossibleRequest: No run can fulfil the request.
    """
    for problem in _problems(request):
        raise ImpossibleRequest(problem)
    tree, bought = _choose_sizes(request, choose_settings(request))
    run = config.parse(tree, "plan")
    notes = _notes(request, run, bought)
    advice = {name: guideline.advice for name, guideline in load_guidelines().items()}
    return Plan(request, tree, run, plan_costs(request, run), notes, advice)


def choose_settings(request: PlanRequest) -> dict[str, Any]:
    """Return the recipe for a request, without sizes.

    Where nothing may be lost, the average takes a tenth of each update instead of half.
    """
    tree: dict[str, Any] = {} if request.embedded else {"data": REAL["data"]}
    usual = starts.HUB if starts.is_hub(request.model) else TAGS.get(request.model)
    start = request.start or usual
    if not (start or request.embedded):
        start = open_clip.list_pretrained_tags_by_model(request.model)[0]
    tree["model"] = {"name": request.model} | ({"start": start} if start else {})
    tree["stream"] = {"tasks": request.updates}
    tree["mixture"] = _choose_mixture(request)
    recipe = config.recipe_tree("default")
    tree["merging"] = recipe["merging"] | ({"weight": 0.1} if request.keep == "all" else {})
    if request.embedded:
        peak = MERGED_PEAK if request.keep == "balance" else MERGED_PEAK / 2
        tree["schedule"] = recipe["schedule"] | {"peak": peak}
    else:
        tree |= {key: REAL[key] for key in ("optimizer", "evaluation")}
        tree["schedule"] = recipe["schedule"] | REAL["schedule"]
    return tree


def _choose_mixture(request: PlanRequest) -> dict[str, Any]:
    """Return a mixture of the available data in the recipe's proportions, and what to keep of the
    pool: for the embedded pool, half of the names, as in the studies.

    The stream of a single update has no earlier ones; the user's own pool contains them.
    """
    has_earlier = request.buffer != 0 and not (request.embedded and request.updates == 1)
    is_available = {"pretraining": request.replay > 0, "update": True, "buffer": has_earlier}
    shares = config.recipe_tree("default")["mixture"]
    total = sum(shares[name] for name in is_available if is_available[name])
    mixture: dict[str, Any] = {
        name: shares[name] / total if is_there else 0.0 for name, is_there in is_available.items()
    }
    if request.updates == 1:
        mixture |= {"pretraining": mixture["pretraining"] + mixture["buffer"], "buffer": 0.0}
    if mixture["pretraining"] > 0:
        mixture["replay"] = float(request.replay or 1)
        mixture["select"] = "concepts" if request.embedded and request.replay <= 0.5 else "random"
    if mixture["buffer"] and (request.buffer or np.inf) < request.updates * request.arriving:
        mixture |= {"policy": "reservoir", "capacity": request.buffer}
    return mixture


def _choose_sizes(request: PlanRequest, settings: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """Add a batch that fits and the steps that the compute allows to the settings, and return them
    with the steps that the compute buys.

    If the chosen method does not fit, the image tower is locked, which takes less memory.
    """
    memory, parse = DEVICES[request.device].memory, config.parse
    fits = lambda tree: forecast.step_memory(parse(tree)) <= USABLE_MEMORY * memory  # noqa: E731
    most = _largest_batch(request, config.Mixture(**settings["mixture"]))
    batches = [size for size in BATCHES if size <= most and not request.embedded] or [most]
    for part in ({}, {"method": {"name": "locked-image"}}):
        trees = [settings | {"training": {"batch": size, "steps": 1}} | part for size in batches]
        first = bisect.bisect_left(trees, True, key=fits)  # each check takes half a second
        if first < len(trees):
            run = parse(trees[first])
            steps = bought = _affordable_steps(request, run)
            if not request.embedded:
                steps = min(bought, int(MAX_PASSES * request.arriving / _update_share(run)))
            trees[first]["training"]["steps"] = steps
            return trees[first], bought
    size = {"model": request.model, "device": request.device, "memory": memory / GIGA}
    raise ImpossibleRequest(PROBLEMS["too large"].format(batch=BATCHES[-1], **size))


def _usual_batch(request: PlanRequest) -> int:
    return 64 if request.embedded else BATCHES[0]


def _largest_batch(request: PlanRequest, mixture: config.Mixture) -> int:
    """Return the largest batch, at most the usual one, that an update and the buffer can fill,
    assuming a large enough pool."""
    usual = _usual_batch(request)
    first = least = int(request.arriving)
    if request.embedded:
        with contextlib.suppress(CmpError):  # a plan needs no data, and then counts on the mean
            first, least = _update_sizes(request.updates)
    pool, buffer = np.empty(usual), np.empty(min(usual, first))[: request.buffer]
    pools = [
        mixtures.Pools(pool, np.empty(min(usual, first)), buffer[:0]),
        mixtures.Pools(pool, np.empty(min(usual, least)), buffer),
    ]
    return min(mixtures.largest_batch(each, mixture, usual) for each in pools)


@functools.cache
def _update_sizes(updates: int) -> tuple[int, int]:
    """Return the images of the first and of the smallest update of a plan's embedded stream."""
    stream, seed = config.Stream(tasks=updates), config.Seeds().stream
    sizes = [len(rows) for rows in streams.task_rows(packed.load_embedded(), stream, seed)]
    return sizes[0], min(sizes)


def _affordable_steps(request: PlanRequest, run: config.RunConfig) -> int:
    """Return the steps per update that the compute buys."""
    cost = budgets.method_cost(run)
    if request.gmafs is not None:
        total, unit = request.gmafs * GIGA, budgets.full_cost(run)
    else:
        steps = request.gpu_hours * 3600 / forecast.estimate_step(run, request.device).seconds
        total, unit = steps * forecast.step_flops(run), cost
    budget = budgets.make_budget(total / request.updates, cost, unit)
    if (steps := budget.steps) < MIN_STEPS:
        most = int(request.updates * budget.allowed / (MIN_STEPS * budget.step + budget.end))
        facts = {"updates": request.updates, "model": request.model, "batch": run.training.batch}
        facts |= {"steps": count_of(steps, "step") if steps else "no step", "least": MIN_STEPS}
        facts["most"] = f"at most {count_of(most, 'update')}" if most else "not even one update"
        raise ImpossibleRequest(PROBLEMS["few steps"].format(**facts))
    if budget.steps > values.MAX_COUNT:
        raise ImpossibleRequest(f"{budget.steps:.3g} steps per update are more than a run can have")
    return budget.steps


def _update_share(run: config.RunConfig) -> int:
    """Return how many images of a batch come from the update, once there is a buffer."""
    return mixtures.batch_counts(run.mixture, run.training.batch, empty_buffer=False)[1]


def _notes(request: PlanRequest, run: config.RunConfig, bought: int) -> tuple[str, ...]:
    """Return the notes for the reader of a plan whose compute buys so many steps."""
    steps = run.training.steps
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
        "keep most": request.keep == "most" and not request.embedded,
        "forced lock": run.method.name == "locked-image",
        "small updates": _largest_batch(request, run.mixture) < _usual_batch(request),
        "always": True,
        "capped": bought > steps,
        "real images": not request.embedded and request.images is None,
        "own images": request.embedded and request.images is not None,
    }
    return tuple(text.format(**numbers) for fact, text in NOTES.items() if facts[fact])


def plan_as_yaml(plan: Plan, comments: bool = True) -> str:
    """Return a plan as a file for `cmpt run`, with its costs and advice in comments at the top."""
    text = yaml.safe_dump(plan.tree, sort_keys=False)
    if not comments:
        return text
    costs = ", ".join(f"{amount:.3g} {what}" for what, amount in plan.costs.items())
    by = forecast.estimate_step(plan.run, plan.request.device).by
    paragraphs = [
        plan_summary(plan),
        f"Training takes {costs}, {by}; scoring takes additional time.",
        *(f"Note: {note}" for note in plan.notes),
        *(f"Advice on {name}: {advice}" for name, advice in plan.advice.items()),
    ]
    parts = [" ".join(part.split()) for part in paragraphs]  # a name may have line breaks
    lines = [line for part in parts for line in textwrap.wrap(part, LINE_WIDTH)]
    return "".join(f"# {line}\n" for line in lines) + text


def plan_summary(plan: Plan) -> str:
    """Return a summary of a plan in one sentence."""
    run, mixture, method = plan.run, plan.run.mixture, plan.run.method.name
    trained = "everything trained" if method == "full" else f"trained by {method}"
    tasks, steps, batch = run.stream.tasks, run.training.steps, run.training.batch
    return (
        f"{run.model.name}: {count_of(tasks, 'update')} of {count_of(steps, 'step')} at batch "
        f"{batch}, {trained}; batches of "
        f"{mixture.pretraining:.0%} pool, {mixture.update:.0%} update, {mixture.buffer:.0%} "
        f"earlier updates; EMA-Merge, {run.merging.weight:g} of each update."
    )
