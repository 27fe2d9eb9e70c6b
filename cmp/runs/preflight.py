"""Check before a run starts that everything it needs is available, and describe what it would
do."""

import dataclasses
import importlib.metadata
import math
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import open_clip
import torch
from packaging.requirements import Requirement

from cmp import budgets, mixtures, models, starts
from cmp.config import STARTS, RunConfig
from cmp.data import Corpus, load_data
from cmp.errors import CmpError
from cmp.evaluation import ENCODE_BLOCK
from cmp.project import DISTRIBUTION, build_folder
from cmp.runs import forecast, identity, lookup, paper
from cmp.runs.forecast import DEVICES, GIGA, USABLE_MEMORY
from cmp.scale import devices, processes
from cmp.scale.decoding import worker_count
from cmp.scale.execution import ExecutionConfig
from cmp.scale.micro_batches import check_divisible
from cmp.training import whole_batch_reason

PRESENT, MISSING, DAMAGED, OPTIONAL = "here", "missing", "damaged", "optional"
TO_FETCH = "to fetch"
"""The state of something that a run downloads itself."""
SHARED_MEMORY, AHEAD = Path("/dev/shm"), 2
"""Where decoding processes pass on images, and the number of batches that each prepares."""


class Check(NamedTuple):
    """The check of something that is needed.

    Attributes:
        what: What is checked.
        state: `PRESENT`, `MISSING`, `DAMAGED`, `OPTIONAL` or `TO_FETCH`.
        sentence: What was found, or how to get it.
    """

    what: str
    state: str
    sentence: str


def load_run_data(run_config: RunConfig) -> Corpus:
    """Return the data of a run; raise `CmpError` if its model takes images of a different size."""
    corpus, name = load_data(run_config.data), run_config.model.name
    if not corpus.in_files:
        corpus.check_side(models.preprocessing(models.create_on_meta(name)).size, name)
    return corpus


def check_setup() -> list[Check]:
    """Check what the embedded benchmark needs, and what is optional."""
    card = _check_card("cuda")
    if card.state == MISSING:
        card = card._replace(state=OPTIONAL)
    return [_check_packages(), _check_data(RunConfig()), _check_bases(), _check_disk(None), card]


def check_run(
    run_config: RunConfig, device: str, execution: ExecutionConfig
) -> tuple[list[Check], Corpus | None, RunConfig]:
    """Check what a run needs, whether a step fits the GPU and checkpoints fit the disk, and how
    long the run may take.

    Returns:
        The checks; the run's data, or None if they cannot be loaded; and the config that is
        actually run, see `cmp.budgets.settle`, if there are data.
    """
    memory = check_memory(run_config, device, execution)
    checks = [*check_needs(run_config, device), memory, _check_disk(run_config)]
    corpus, fitted = None, run_config
    if checks[0].state == PRESENT:
        corpus = load_run_data(run_config)
        checks.insert(1, _check_batches(run_config, corpus))
        fitted = budgets.settle(run_config, corpus)
    time = _describe_time(run_config, fitted, device, execution, corpus)
    if run_config.model.name not in starts.family_names():
        checks.append(_check_shared_memory(run_config, device))
    return [*checks, Check("time", PRESENT, time)], corpus, fitted


def _describe_time(
    run_config: RunConfig,
    fitted: RunConfig,
    device: str,
    execution: ExecutionConfig,
    corpus: Corpus | None,
) -> str:
    """Return how long all steps of a run may take, and how that was found.

    Args:
        run_config: The config as given, on which the run's id depends.
        fitted: The config that is actually run.
        device: "cpu" or "cuda".
        execution: How steps are computed.
        corpus: The run's data, or None if they cannot be loaded.
    """
    run_id = identity.known_id(run_config, corpus) if corpus else ""
    step = forecast.estimate_step(fitted, device, execution, corpus, run_id)
    return forecast.describe_forecast(step, sum(budgets.apply_budget(fitted).steps))


def check_needs(run_config: RunConfig, device: str) -> list[Check]:
    """Check the data, the starting weights and the device of a run."""
    return [_check_data(run_config), _check_weights(run_config), _check_card(device)]


def missing_needs(needs: list[Check]) -> list[str]:
    """Return one line for each thing that is missing or damaged; see `check_needs`."""
    words = {MISSING: "absent", TO_FETCH: "absent", DAMAGED: DAMAGED}
    faulty = [check for check in needs if check.state in words]
    return [f"{words[check.state]}: {check.what}: {check.sentence}" for check in faulty]


def _check_data(run_config: RunConfig) -> Check:
    """Check the data of a run."""
    try:
        corpus = load_run_data(run_config)
        fitted = mixtures.fit_mixture(run_config, corpus)
        mixtures.replay_pool(corpus, fitted.mixture, fitted.seeds.data)
    except CmpError as error:
        return Check("data", MISSING, str(error).removeprefix("data: "))
    return Check("data", PRESENT, f"{len(corpus.table)} images of {len(corpus.datasets)} datasets")


def _check_batches(run_config: RunConfig, corpus: Corpus) -> Check:
    """Check that no batch takes more from the pool, an update or the buffer than it holds."""
    try:
        pools = mixtures.task_pools(run_config, corpus)
    except CmpError as error:
        return Check("batches", MISSING, str(error).removeprefix("training.batch: "))
    sizes = [len(pool.update) for pool in pools]
    return Check("batches", PRESENT, f"updates have {min(sizes)} to {max(sizes)} images")


def _check_weights(run_config: RunConfig) -> Check:
    name, start = run_config.model.name, run_config.model.start
    try:
        starts.check_start(name, start)
        lookup.find_parent(run_config)
    except CmpError as error:
        return Check("weights", MISSING, str(error).removeprefix("model.start: "))
    sentence, tag = f"{start!r} of {name!r}", starts.pretrained_tag(name, start)
    if path := identity.start_file(run_config):
        return _check_base_files("weights", [path] if start in STARTS else [], sentence)
    if start == "random":
        return Check("weights", PRESENT, sentence)
    if start in STARTS:
        other = "only embedded models have bases; set model.start to a tag, a file, or random"
        command = f"run `cmpt pretrain {name} --seed {run_config.seeds.init}` to make them"
        sentence += f": {command if starts.family_of(name) else other}"
    elif start == starts.HUB or tag:
        sentence += f": the run downloads them from {tag.get('hf_hub', 'its URL') or name}"
        return Check("weights", TO_FETCH, sentence)
    else:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        sentence = (
            f"{start!r}: neither a file nor a tag of {name!r}; open_clip's tags for it: {tags}"
        )
    return Check("weights", MISSING, sentence)


def _check_card(device: str) -> Check:
    if device == "cpu":
        return Check("device", PRESENT, f"the CPU, {torch.get_num_threads()} threads")
    if not devices.is_present(device):
        return Check("device", MISSING, "torch finds no GPU, or was built without CUDA")
    count, card = torch.cuda.device_count(), torch.cuda.get_device_properties(device)
    kinds = {torch.cuda.get_device_name(number) for number in range(count)}
    if len(kinds) > 1:
        words = f"different kinds of GPU, {', '.join(sorted(kinds))}, differ in the last bits"
        return Check("device", OPTIONAL, f"{words} of results: choose with CUDA_VISIBLE_DEVICES")
    many = f"{count} times " if count > 1 else ""
    return Check("device", PRESENT, f"{many}{card.name}, {card.total_memory / GIGA:.0f} GB")


def check_memory(run_config: RunConfig, device: str, execution: ExecutionConfig) -> Check:
    """Compare the memory of a step in one process with that of the GPU or machine, and find what
    would fit, also with recomputed activations."""
    is_here = devices.is_present(device)
    if not is_here:
        card, memory = "an H100", DEVICES["h100"].memory
    elif device == "cpu":
        card, memory = "the machine", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    else:
        card, memory = "the card", torch.cuda.get_device_properties(device).total_memory
    usable = USABLE_MEMORY * memory
    batch = math.ceil(run_config.training.batch / processes.world_size())
    batch = min(execution.micro_batch or batch, batch)
    is_recomputed = execution.checkpoint_activations
    needed = _step_bytes(run_config, batch, is_recomputed)
    size = f"{needed / GIGA:.0f} GB" if needed >= GIGA else "less than 1 GB"
    words = f"a step needs {size} in {run_config.training.precision}"
    sentence = f"{words}, and {card} has {memory / GIGA:.0f} GB"
    if needed <= usable:
        return Check("memory", PRESENT, sentence)
    part = _largest_part(run_config, batch, usable, is_recomputed)
    is_known = forecast.recomputed_activations(run_config) is not None
    if is_known and not is_recomputed:
        part += ", and with --checkpoint-activations " + _largest_part(
            run_config, batch, usable, True
        )
    is_certain = is_here and (is_known or not is_recomputed)
    return Check("memory", MISSING if is_certain else OPTIONAL, f"{sentence}; {part}")


def _largest_part(run_config: RunConfig, batch: int, usable: float, recomputed: bool) -> str:
    """Return in words which part of a batch fits into some bytes of memory."""
    size = batch
    while size >= 4 and _step_bytes(run_config, size, recomputed) > usable:
        size //= 2
    needed = _step_bytes(run_config, size, recomputed)
    if needed > usable:
        return f"not even a batch of {size} fits"
    key = "--micro-batch " if _can_split(run_config) else "training.batch="
    return f"{f'{key}{size}' if size < batch else 'the same batch'} needs {needed / GIGA:.0f} GB"


def _step_bytes(run_config: RunConfig, batch: int, recomputed: bool) -> float:
    training = dataclasses.replace(run_config.training, batch=batch, budget=None)
    run_config = dataclasses.replace(run_config, training=training)
    return forecast.step_memory(run_config, recomputed)


def _can_split(run_config: RunConfig) -> bool:
    """Return whether the network and the method of a run work with micro-batches."""
    name = run_config.model.name
    state = budgets.shape_state(name, run_config.method, models.create_on_meta(name))
    try:
        check_divisible(state.model, name)
    except CmpError:
        return False
    return not whole_batch_reason(state)


def _check_shared_memory(run_config: RunConfig, device: str) -> Check:
    """Check that images decoded ahead, of batches or for scoring, fit into shared memory."""
    free = shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.exists() else math.inf
    side = models.preprocessing(models.create_on_meta(run_config.model.name)).size
    batch = 3 * side * side * max(run_config.training.batch, ENCODE_BLOCK)
    workers = worker_count(torch.device(device))
    needed = AHEAD * workers * batch
    words = f"{workers} decoding processes need {needed / GIGA:.1f} GB in {SHARED_MEMORY}"
    if needed < free:
        return Check("decoding", PRESENT, words)
    most = int(free / AHEAD / batch)
    return Check(
        "decoding", MISSING, f"{words}, which has {free / GIGA:.1f} free: set CMP_WORKERS={most}"
    )


def _check_packages() -> Check:
    """Check the packages that the installed distribution requires, without extras."""
    try:
        requirements = map(Requirement, importlib.metadata.requires(DISTRIBUTION) or [])
    except importlib.metadata.PackageNotFoundError:
        return Check("packages", MISSING, f"{DISTRIBUTION}: run `pip install -e .`")
    core = [each for each in requirements if not each.marker or each.marker.evaluate({"extra": ""})]
    missing = [str(requirement) for requirement in core if not _is_installed(requirement)]
    if missing:
        return Check("packages", MISSING, f"{', '.join(missing)}: use `pip install`")
    versions = f"torch {torch.__version__}, open_clip {open_clip.__version__}"
    return Check("packages", PRESENT, f"all {len(core)}, {versions}")


def _is_installed(requirement: Requirement) -> bool:
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return requirement.specifier.contains(version, prereleases=True)


def _check_bases() -> Check:
    embedded = starts.family_of("small")
    counts = {name: len(embedded.base_seeds(name)) for name in embedded.NAMES}
    sentence = ", ".join(f"{count} of {name}" for name, count in counts.items() if count)
    if not counts.get("small"):
        return Check("bases", MISSING, sentence or "none: run `cmpt pretrain small` to make one")
    folders = embedded.base_folders()
    paths = [path for folder in folders for path in folder.glob("*.safetensors")]
    return _check_base_files("bases", paths, sentence)


def _check_base_files(what: str, bases: list[Path], sentence: str) -> Check:
    """Check that bases are not damaged."""
    try:
        for path in bases:
            starts.family_of("small").check_base(path)
    except CmpError as error:
        return Check(what, DAMAGED, str(error))
    return Check(what, PRESENT, sentence)


def _check_disk(run_config: RunConfig | None) -> Check:
    """Check that something can be written to the build folder, and that there is a gigabyte free,
    or as much as a run's checkpoints and models take."""
    needed, target = GIGA, build_folder()
    if run_config:  # the models of the last two tasks, and the final one
        weights = forecast.memory_account(run_config)["weights"]
        needed += forecast.checkpoint_bytes(run_config) + 3 * weights
    existing = next(path for path in [target, *target.absolute().parents] if path.exists())
    if not os.access(existing, os.W_OK | os.X_OK):
        return Check("disk", MISSING, f"nothing can be written to {existing}")
    free = shutil.disk_usage(existing).free
    words = f"{free / GIGA:.0f} GB free at {target}"
    words += f", and checkpoints and weights take {needed / GIGA:.0f}" if run_config else ""
    return Check("disk", PRESENT if free > needed else MISSING, words)


def describe_run(given: RunConfig, fitted: RunConfig) -> list[str]:
    """Return lines that describe what a run would do: its steps, its batches and their cost.

    Args:
        given: The run's config. Only this one says whether the paper's rule sets its steps.
        fitted: The config that is actually run, see `check_run`.
    """
    run_config = budgets.apply_budget(fitted)  # without data, it still has its budget
    tasks, batch, steps = run_config.stream.tasks, run_config.training.batch, run_config.steps
    paper_steps = paper.table4_steps(given)
    is_paper = paper_steps and given.data == "fomo"
    rule = f" (the paper's rule gives {paper_steps})" if is_paper else ""
    pool, update, buffer = mixtures.batch_counts(run_config.mixture, batch, empty_buffer=False)
    first = mixtures.batch_counts(run_config.mixture, batch, empty_buffer=True)
    cost, full = budgets.method_cost(run_config), budgets.full_cost(run_config)
    adjusted = budgets.make_budget(0.0, cost, full)
    total = sum(each * adjusted.step + adjusted.end for each in steps)
    return [
        f"{tasks} tasks of {steps_in_words(steps)} steps{rule}, {sum(steps)} in total",
        f"batches of {batch}: {pool} from the pretraining pool, {update} from the update, "
        f"{buffer} from the buffer; {first[0]} and {first[1]} in the first task, which has no "
        "buffer",
        f"{adjusted.step / GIGA:.6g} memory-adjusted GFLOPs per step (memory multiplier "
        f"{adjusted.multiplier:.4f}), {total / GIGA:.4g} in total",
    ]


def steps_in_words(steps: tuple[int, ...]) -> str:
    """Return the steps of the tasks of a run as one number, or as "209 to 342" if they differ."""
    return " to ".join(map(str, sorted({min(steps), max(steps)}))) if steps else "some"


def count_images(corpus: Corpus) -> list[tuple[str, str, int, int, int, int]]:
    """Return the name, role, classes, and images per split of each dataset of a run."""
    rows = []
    for name, dataset in corpus.datasets.items():
        counts = (len(corpus.rows(x, dataset=name)) for x in ("train", "validation", "test"))
        rows.append((name, dataset.role, len(corpus.classes[name]), *counts))
    return rows


def describe_study(configs: dict[tuple[str, int], RunConfig], device: str) -> list[str]:
    """Return what a study would compute, setting by setting, followed by what is missing for it."""
    lines, missing = [f"runs: {len(configs)}"], {}
    for (setting, replicate), run_config in configs.items():
        lines.append(f"{setting}, replicate {replicate}")
        needs = check_needs(run_config, device)
        corpus = load_run_data(run_config) if needs[0].state == PRESENT else None
        fitted = budgets.settle(run_config, corpus) if corpus else run_config
        lines += [f"  {line}" for line in describe_run(run_config, fitted)]
        if run_config.model.name not in starts.family_names():
            sentence = _describe_time(run_config, fitted, device, ExecutionConfig(), corpus)
            lines.append(f"  forecast: {sentence}")
        missing |= dict.fromkeys(missing_needs(needs))
    return [*lines, *missing]
