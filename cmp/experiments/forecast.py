"""How long runs will take, from what such runs took, or from a few steps measured now."""

import dataclasses
import importlib.metadata
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import open_clip
import torch
from torch import nn

from cmp import budgets, evaluation, mixtures, models
from cmp.config import (
    STARTS,
    Method,
    Mixture,
    Model,
    Optimizer,
    RunConfig,
    Schedule,
    Seeds,
    Stream,
    parse,
)
from cmp.data import Corpus, load_corpus
from cmp.embedded import models as embedded_models
from cmp.embedded import packed
from cmp.errors import CmpError
from cmp.experiments import paper, store
from cmp.files import build_folder, project_folder
from cmp.runner import evaluation_sizes
from cmp.training import make_train_state, train_task

MEASURED_STEPS = 4
"""Steps that are measured where no such run is stored; the first is not counted."""

CARD, CARD_FLOPS, CARD_UTILISATION = "H100", 989e12, 0.4
"""A card, the bf16 FLOP/s of its data sheet, and the share of them that a training step is taken to
reach where nothing is measured."""

CLOCKS = {"cpu": time.process_time}
"""On one thread the processor's own time, which the work of others does not prolong; else wall."""


def card_seconds(config: RunConfig) -> float:
    """An estimate of a run's training in seconds of one `CARD`, from its FLOPs alone, evaluations
    apart: nothing is measured, and nothing need be here."""
    config = budgets.apply_budget(config)
    cost = budgets.method_cost(config)
    flops = config.stream.tasks * (config.training.steps * cost.step + cost.end)
    return flops / (CARD_FLOPS * CARD_UTILISATION)


def forecast_seconds(configs: list[RunConfig], device: str = "cpu") -> list[float]:
    """The forecast of each run, in seconds of one core (or of the device)."""
    known = _known_timings(device)
    found = []
    for each in configs:
        kind = _timing_kind(each)
        if kind not in known:
            known[kind] = _measure_step(each, device)
        found.append(known[kind] * _total_steps(each))
    return found


def _total_steps(config: RunConfig) -> int:
    return config.stream.tasks * budgets.apply_budget(config).training.steps


def _timing_kind(config: RunConfig) -> RunConfig:
    """The same without what does not move the time of a step, evaluations shared out."""
    return dataclasses.replace(
        config,
        model=Model(config.model.name),
        stream=Stream(tasks=config.stream.tasks),
        mixture=Mixture(),
        schedule=Schedule(),
        optimizer=Optimizer(),
        seeds=Seeds(),
    )


def _known_timings(device: str) -> dict[RunConfig, float]:
    """Seconds a step of stored runs on one thread, by kind: the median."""
    found: dict[RunConfig, list[float]] = {}
    for run_id in store.stored_ids():
        try:
            stored, run_config = store.load_record(run_id)
        except CmpError:  # damaged or of an older format: it says nothing, and is in nobody's way
            continue
        made = stored.provenance
        if made["threads"] == 1 and (made.get("device") == "cpu") == (device == "cpu"):
            found.setdefault(_timing_kind(run_config), []).append(
                made["seconds"] / _total_steps(run_config)
            )
    return {kind: float(np.median(times)) for kind, times in found.items()}


def _measure_step(config: RunConfig, device: str) -> float:
    """Seconds a step of such a run on one thread, all else shared out, from a few of its steps
    and one evaluation of each size; random weights take as long as any."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model = models.create_model(config.model.name).to(device)
        clock = CLOCKS.get(device, time.perf_counter)
        (step, end), asked = _step_seconds(config, model, clock), evaluation_sizes(config)
        rest = end * config.stream.tasks
        rest += sum(
            count * _evaluation_seconds(config, model, size, clock) for size, count in asked
        )
        return step + rest / _total_steps(config)
    finally:
        torch.set_num_threads(threads)


def _step_seconds(
    config: RunConfig, model: nn.Module, clock: Callable[[], float]
) -> tuple[float, float]:
    """A step of the last task, the mean of a few; and what the method does at the task's end."""
    ends = []
    short = dataclasses.replace(
        config, training=dataclasses.replace(config.training, steps=MEASURED_STEPS, budget=None)
    )
    learner = make_train_state(short, load_corpus(config), model)
    pools = mixtures.task_pools(short, learner.corpus)
    train_task(
        learner, pools[-1], len(pools) - 1,
        after_step=lambda step, loss: ends.append((loss.item(), clock())),
    )  # fmt: skip
    last = ends[-1][1]
    return (last - ends[0][1]) / (MEASURED_STEPS - 1), clock() - last


def _evaluation_seconds(
    config: RunConfig, model: nn.Module, size: int | None, clock: Callable[[], float]
) -> float:
    """One evaluation on so many images a dataset, none for all."""
    started = clock()
    corpus, precision = load_corpus(config), config.training.precision
    evaluation.evaluate(model, config.model.name, corpus, subset=size, precision=precision)
    return clock() - started


PRESENT, MISSING, OPTIONAL = "here", "missing", "optional"
GIGA = 1e9
CARD_MEMORY = 80e9  # of `forecast.CARD`
USABLE_MEMORY = 0.9  # of a card's memory that a step may take
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@dataclass(frozen=True)
class Check:
    """One thing that is needed, its state (`HERE`, `MISSING` or `OPTIONAL`) and a sentence."""

    what: str
    state: str
    sentence: str


def data_for(run_config: RunConfig) -> Corpus:
    """The data of a run; `CmpError` where there are none of the size that its model takes."""
    corpus = load_corpus(run_config)
    corpus.check_side(required_side(run_config.model.name), run_config.model.name)
    return corpus


def required_side(name: str) -> int:
    """Pixels of the images that a model takes; none of its weights are needed."""
    known = open_clip.get_model_config(name) or {}
    side = (
        known.get("vision_cfg", {}).get("image_size")
        or models.create_on_meta(name).visual.image_size
    )
    return side[0] if isinstance(side, tuple) else side


def check_run(run_config: RunConfig, device: str = "cuda") -> list[Check]:
    """What `needs` says, whether a step fits the card's memory, and how long the run may take."""
    return [
        *check_needs(run_config, device),
        _check_memory(run_config, device),
        Check("time", PRESENT, forecast_sentence(run_config)),
    ]


def check_needs(run_config: RunConfig, device: str = "cuda") -> list[Check]:
    """Data, weights and card of a run."""
    return [_check_data(run_config), _check_weights(run_config), _check_card(device)]


def _check_data(run_config: RunConfig) -> Check:
    try:
        corpus = data_for(run_config)
    except CmpError as error:
        return Check("data", MISSING, str(error).removeprefix("data: "))
    return Check("data", PRESENT, f"{len(corpus.table)} images of {len(corpus.datasets)} datasets")


def _check_weights(run_config: RunConfig) -> Check:
    name, start = run_config.model.name, run_config.model.start
    if models.has_start(run_config):
        return Check("weights", PRESENT, f"{start!r} of {name!r}")
    if start in STARTS:
        return Check(
            "weights", MISSING, f"{start!r} of {name!r}: `cmpt pretrain {name}` makes them"
        )
    if start != models.HUB and not models.pretrained_tag(name, start):
        return Check("weights", MISSING, f"{start!r}: neither a file nor a tag of {name!r}")
    where = (
        name
        if start == models.HUB
        else models.pretrained_tag(name, start).get("hf_hub", "its address")
    )
    return Check("weights", MISSING, f"{start!r} of {name!r}: the run fetches them from {where}")


def _check_card(device: str) -> Check:
    if device == "cpu":
        return Check("device", PRESENT, f"the CPU, {torch.get_num_threads()} threads")
    if not torch.cuda.is_available():
        return Check("device", MISSING, "torch finds no CUDA card, or is built without CUDA")
    found = torch.cuda.get_device_properties(device)
    return Check("device", PRESENT, f"{found.name}, {found.total_memory / GIGA:.0f} GB")


def _check_memory(run_config: RunConfig, device: str) -> Check:
    """What a step holds, by account in fp32, against the card's; and micro-batches that fit."""
    card = device != "cpu" and torch.cuda.is_available()
    there = torch.cuda.get_device_properties(device).total_memory if card else CARD_MEMORY
    of = "the card" if card else f"a {CARD}"
    size = run_config.training.batch
    fits, needed = {}, 0.0
    while size >= 2:
        needed = _step_bytes(run_config, size)
        fits[size] = needed
        if needed <= USABLE_MEMORY * there:
            break
        size //= 2
    whole = fits[run_config.training.batch]
    said = f"a step holds {whole / GIGA:.0f} GB at once in fp32, {of} has {there / GIGA:.0f} GB"
    if size == run_config.training.batch:
        return Check("memory", PRESENT, said)
    advice = f"--micro-batch {size} holds {needed / GIGA:.0f} GB"
    return Check("memory", OPTIONAL, f"{said}; in bf16 activations take about half, and {advice}")


def _step_bytes(run_config: RunConfig, batch: int) -> float:
    tree = run_config.to_dict()
    tree["training"] |= {"batch": batch, "budget": None}
    return budgets.method_cost(parse(tree, "memory")).memory


def forecast_sentence(run_config: RunConfig) -> str:
    """How long a run's training may take on a named card, and that this is an estimate."""
    hours = card_seconds(run_config) / 3600
    return (
        f"{hours:.2g} hours of training on one {CARD}: an estimate from FLOPs at "
        f"{CARD_UTILISATION:.0%} of its {CARD_FLOPS / 1e12:.0f} TFLOP/s in bf16, not measured; "
        "reading images and evaluations come on top"
    )


def check_setup() -> list[Check]:
    """The embedded benchmark: packages, data, bases, disk; and what is optional."""
    return [
        *_check_packages(),
        _check_embedded(),
        _check_bases(),
        _check_disk(),
        _check_browser(),
        _check_optional_card(),
    ]


def _check_packages() -> list[Check]:
    """Those of requirements.txt that are not installed, or one line that all are."""
    lines = (project_folder() / "requirements.txt").read_text().splitlines()
    names = [re.split(r"[<>=~!\[; ]", x)[0] for x in lines if x and x[0] not in "#-"]
    absent = []
    for name in names:
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            absent.append(name)
    if absent:
        return [Check("packages", MISSING, f"{', '.join(absent)}: `make study` installs them")]
    said = f"all {len(names)}, torch {torch.__version__}, open_clip {open_clip.__version__}"
    return [Check("packages", PRESENT, said)]


def _check_embedded() -> Check:
    try:
        corpus = packed.load_embedded()
    except CmpError as error:
        return Check("data", MISSING, str(error).removeprefix("data: "))
    return Check("data", PRESENT, f"{len(corpus.table)} images of {len(corpus.datasets)} datasets")


def _check_bases() -> Check:
    counts = {name: len(embedded_models.base_seeds(name)) for name in models.family_names()}
    said = ", ".join(f"{count} of {name}" for name, count in counts.items() if count)
    return Check("bases", PRESENT if counts.get("tiny") else MISSING, said or "none")


def _check_disk() -> Check:
    folder = next(p for p in [build_folder(), *build_folder().absolute().parents] if p.exists())
    free = shutil.disk_usage(folder).free / GIGA
    return Check(
        "disk", PRESENT if free > 1 else MISSING, f"{free:.0f} GB free at {build_folder()}"
    )


def _check_browser() -> Check:
    found = next((name for name in BROWSERS if shutil.which(name)), None)
    said = found or "none; the tests that open the explorers in a browser are skipped"
    return Check("browser", PRESENT if found else OPTIONAL, said)


def _check_optional_card() -> Check:
    found = _check_card("cuda")
    return Check("card", found.state if found.state == PRESENT else OPTIONAL, found.sentence)


PLAN_GIGA = 1e9
ABSENT = "absent"


def describe_run(run_config: RunConfig, device: str = "cuda") -> list[str]:
    """Tasks, steps, batch parts, cost and forecast of a run; then what of it is not here."""
    checks = check_needs(run_config, device)
    absent = [each for each in checks if each.state == MISSING]
    return [
        describe_steps(run_config),
        describe_batch(run_config),
        describe_cost(run_config),
        f"forecast: {forecast_sentence(run_config)}",
        *(f"{ABSENT}: {each.what}: {each.sentence}" for each in absent),
    ]


def describe_steps(run_config: RunConfig) -> str:
    """How many, and how many the paper's table has for the same model, batch and method."""
    own, tasks = budgets.apply_budget(run_config).training.steps, run_config.stream.tasks
    found = paper_step_count(run_config)
    theirs = f" (the paper's rule gives {found})" if found else ""
    return f"{tasks} tasks of {own} steps{theirs}, {tasks * own} in all"


def paper_step_count(run_config: RunConfig) -> int | None:
    """Steps a task by the paper's own numbers, if its table has such a run, of its budget."""
    if run_config.training.budget != 1:
        return None
    same = (run_config.model.name, run_config.training.batch) == (
        paper.TABLE4_MODEL,
        paper.TABLE4_BATCH,
    )
    if not same or run_config.method != Method(run_config.method.name, rank=run_config.method.rank):
        return None
    rank = f",rank={run_config.method.rank}" if run_config.method.rank else ""
    for row in paper.TABLE4.values():
        if row.method.partition(",fisher")[0] == f"{run_config.method.name}{rank}":
            tasks = run_config.stream.tasks
            return budgets.paper_steps(paper.TABLE4_TOTAL, tasks, row.gflops, row.multiplier)
    return None


def describe_batch(run_config: RunConfig) -> str:
    """Whose samples make a batch."""
    size, mixture = run_config.training.batch, run_config.mixture
    p, d, b = mixtures.batch_counts(mixture, size, empty_buffer=False)
    first = mixtures.batch_counts(mixture, size, empty_buffer=True)
    return (
        f"batches of {size}: {p} of the pretraining pool, {d} of the update, {b} of the buffer; "
        f"{first[0]} and {first[1]} in the first task, which has none"
    )


def describe_cost(run_config: RunConfig) -> str:
    """Memory-adjusted GFLOPs of a step and in all, as `cmp.budgets` counts them."""
    full, own = budgets.full_cost(run_config), budgets.method_cost(run_config)
    found = budgets.make_budget(0.0, own, full)
    applied = budgets.apply_budget(run_config)
    total = applied.stream.tasks * (applied.training.steps * found.step + found.end)
    return (
        f"{found.step / PLAN_GIGA:.6g} memory-adjusted GFLOPs a step (memory multiplier "
        f"{found.multiplier:.4f}), {total / PLAN_GIGA:.4g} in all"
    )


def describe_study(configs: dict[tuple[str, int], RunConfig], device: str) -> list[str]:
    """Setting by setting what a study would compute; then what of it is not here."""
    lines, absent = [f"runs: {len(configs)}"], {}
    for (setting, replicate), run_config in configs.items():
        found = describe_run(run_config, device)
        lines.append(f"{setting}, replicate {replicate}")
        lines += [f"  {line}" for line in found if not line.startswith(ABSENT)]
        absent |= dict.fromkeys(line for line in found if line.startswith(ABSENT))
    return [*lines, *absent]
