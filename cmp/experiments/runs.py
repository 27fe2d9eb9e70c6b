"""Runs from a notebook: made from keywords, looked up if they are stored, else computed."""

import fcntl
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from torch import nn
from tqdm.auto import tqdm

from cmp import budgets, checkpoints, config, models
from cmp.checkpoints import Progress, latest_progress
from cmp.config import RunConfig
from cmp.data import Corpus
from cmp.errors import CmpError
from cmp.experiments import store, workers
from cmp.files import SHORT_ID, build_folder
from cmp.merging.rules import Weights
from cmp.methods import adapters
from cmp.readers.files import read_yaml
from cmp.runner import Observer, execute
from cmp.training import StepResult


def run(
    profile: str = "quick", device: str | None = None, progress: bool = True, **settings: Any
) -> store.StoredRun:
    """Take a model through a stream of updates: train, evaluate, store.

    A run that is stored is looked up; one that was stopped goes on from its last checkpoint.

    Args:
        profile: "quick", "cpu" or "gpu", or a file of settings, NAME.yaml.
        device: "cpu" or "cuda"; where None, the CPU for an embedded model and a card for others.
        progress: Whether a progress bar is shown.
        **settings: Sections of the config, as a dict or by the name of their option, or single
            keys: `method="lora"`, `schedule={"name": "wsd", "peak": 0.01}`, `peak=0.01`, `seed=1`.

    Returns:
        The finished run; its `metrics` are a DataFrame with a row per (task, scope, dataset).

    Raises:
        CmpError: A setting is unknown or impossible.

    Example:
        >>> finished = cmp.run("quick", stream={"tasks": 2}, steps=2, batch=8, progress=False)
        >>> sorted(set(finished.metrics["role"]))
        ['adapt', 'eval', 'transfer']
    """
    run_config = from_keywords(profile, settings)
    device = models.default_device(run_config.model.name, device)
    store.fetch_start(run_config)
    is_stored = store.is_stored(store.run_id_of(run_config))
    total = budgets.total_steps(run_config)
    with tqdm(total=total, unit=" steps", disable=is_stored or not progress) as bar:
        observer = Observer(
            step=lambda task, step, result, model: bar.update() and None,
            resumed=lambda steps: bar.update(steps) and None,
        )
        return workers.run_one(run_config, observer, device)


def read_settings(what: str) -> dict[str, Any]:
    """Return the settings of a profile, or of a file NAME.yaml such as `cmpt plan` writes."""
    return read_yaml(Path(what)) if what.endswith((".yaml", ".yml")) else config.profile(what)


def from_keywords(what: str, settings: Mapping[str, Any]) -> RunConfig:
    """Return a config from a profile and keyword settings, as `cmp.run` takes them.

    Args:
        what: A profile, or a file of settings, NAME.yaml.
        settings: Sections as dicts, or as the text of their `cmp.config.NAMING_KEYS`; single keys
            whose name no two sections share; `seed`, `recipe` and `data`.

    Raises:
        CmpError: A key is unknown, or several sections have it.
    """
    tree = read_settings(what)
    if "recipe" in settings:
        tree = config.overlay(tree, config.recipe_tree(settings["recipe"]))
    for key, value in settings.items():
        if key in ("seed", "data"):
            tree[key] = value
        elif isinstance(value, Mapping):
            tree = config.overlay(tree, {key: dict(value)})
        elif key in config.NAMING_KEYS:
            tree = config.overlay(tree, {key: {config.NAMING_KEYS[key]: value}})
        elif key != "recipe":
            full = [name for name in config.defaults() if name.rpartition(".")[2] == key]
            if len(full) > 1:
                raise CmpError(f"{key}: several sections have it ({', '.join(full)}); name one")
            section, _, leaf = (full or [key])[0].rpartition(".")
            tree = config.overlay(tree, {section: {leaf: value}} if section else {leaf: value})
    return config.parse(tree, f"run {what!r}")


def changes_to_cpu(run_config: RunConfig) -> dict[str, Any]:
    """Return what a run changes in the profile `cpu`, by dotted key."""
    usual = dict(config.flat_keys(config.parse(config.profile("cpu"), "cpu").to_dict()))
    return {k: value for k, value in config.flat_keys(run_config.to_dict()) if value != usual[k]}


def joint_training(run_config: RunConfig) -> RunConfig:
    """Return the upper bound of a run: all its classes in one task of as many steps.

    Raises:
        CmpError: The task would have too many steps.
    """
    tree = run_config.to_dict()
    steps, most = run_config.stream.tasks * run_config.training.steps, config.MAX_COUNT
    if steps > most:
        raise CmpError(f"training.steps: {steps} in the one task of joint training; at most {most}")
    tree["mixture"] |= {"pretraining": 1 / 3, "update": 2 / 3, "buffer": 0.0}
    tree["training"]["steps"], tree["stream"]["tasks"] = steps, 1
    return config.parse(tree, "joint training")


def task_end_weights(config: RunConfig, corpus: Corpus) -> list[Weights]:
    """Return the weights before the stream and at the end of each task, on the CPU.

    They are of a run that is computed for this alone, and not stored.
    """
    weights: list[Weights] = [models.load_model(config.model, config.seeds.init).state_dict()]
    last = budgets.apply_budget(config).training.steps - 1

    def keep(task: int, step: int, result: StepResult, model: nn.Module) -> None:
        if step == last:
            merged = adapters.merged_state_dict(model)
            weights.append({name: x.cpu().clone() for name, x in merged.items()})

    execute(config, corpus, Observer(keep))
    return weights


def unfinished_runs(prefix: str = "") -> list[Progress]:
    """Return how far each unfinished run has come whose id starts with a prefix."""
    folders = sorted((build_folder() / "checkpoints").glob("*/"))
    named = [folder for folder in folders if folder.name.startswith(prefix[:SHORT_ID])]
    found = filter(None, map(latest_progress, named))
    return [progress for progress in found if progress.run.startswith(prefix)]


def recorded_threads(progress: Progress) -> int:
    """Return the torch threads where a run began; raise `CmpError` if it does not say."""
    threads = progress.machine.get("threads")
    if not isinstance(threads, int) or threads < 1:
        raise CmpError(f"checkpoint of run {progress.run}: machine.threads: must be a number")
    return threads


def find_unfinished(prefix: str) -> Progress:
    """Return the one unfinished run whose id starts with a prefix; raise `CmpError` otherwise."""
    matching = unfinished_runs(prefix)
    if len(matching) != 1:
        names = ", ".join(progress.run[:SHORT_ID] for progress in unfinished_runs()) or "none"
        raise CmpError(f"{prefix!r}: not the id of one unfinished run; there are: {names}")
    return matching[0]


def runs_in_progress() -> int:
    """Return how many runs of this build folder are being computed, by whatever process."""
    count = 0
    for path in (build_folder() / "checkpoints").glob("*/lock"):
        try:
            with path.open() as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            count += 1
        except OSError:  # the run has just ended
            continue
    return count


def find_model(prefix: str) -> tuple[store.StoredRun, models.Network]:
    """Return the one run whose id starts with a prefix, and its model.

    Returns:
        A stored run, or an unfinished one as if its last finished task had been the last of all:
        its metrics end there.
        The final network, or what was deployed after that task.

    Raises:
        CmpError: There is no such run, its weights were not kept, or none of its tasks is finished.
    """
    if (progress := _progress_of(prefix)) is None:
        run = store.find_run(prefix)
        return run, store.final_model(run)
    name = f"run {progress.run[:SHORT_ID]}"
    folder = checkpoints.checkpoint_folder(progress.run)
    numbers = {checkpoints.file_number(path): path for path in checkpoints.model_files(folder)}
    done = max((number for number in numbers if number <= progress.task), default=0)
    if not done:
        words = f"none of its tasks is finished; `cmpt resume {progress.run[:SHORT_ID]}` goes on"
        raise CmpError(f"{name}: {words}")
    checkpoints.check_content(numbers[done])
    run = run_so_far(progress, done)
    return run, models.load_from_file(run.config.model.name, numbers[done])


def find_any_run(prefix: str) -> store.StoredRun:
    """Return the one run whose id starts with a prefix, stored or as far as it has come; raise
    `CmpError` otherwise."""
    progress = _progress_of(prefix)
    return run_so_far(progress, progress.task) if progress else store.find_run(prefix)


def _progress_of(prefix: str) -> Progress | None:
    """Return the one unfinished run whose id starts with a prefix, None where stored runs have it;
    raise `CmpError` where there is neither."""
    if any(name.startswith(prefix[:SHORT_ID]) for name in store.stored_ids()):
        return None
    if not unfinished_runs(prefix):
        raise CmpError(f"{prefix!r}: no run of this id; `cmpt results ls` shows them all")
    return find_unfinished(prefix)


def run_so_far(progress: Progress, done: int) -> store.StoredRun:
    """Return an unfinished run as if it had ended after `done` tasks, with no weights."""
    run_config = config.parse(progress.config, f"checkpoint of run {progress.run[:SHORT_ID]}")
    rows = pd.DataFrame(progress.metrics).query("task <= @done")
    scopes = rows[rows["task"] == done]["scope"]  # the full test is scored at the ends alone
    rows = rows[rows["scope"].isin(scopes)]
    provenance = progress.machine | {"seconds": progress.seconds}
    return store.StoredRun(progress.run, run_config, provenance, rows, "")
