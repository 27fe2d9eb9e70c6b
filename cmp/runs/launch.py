"""Runs from a notebook: made from keywords, looked up if they are stored, else computed."""

import contextlib
import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from cmp import budgets, config, models
from cmp.config import RunConfig
from cmp.data import Corpus
from cmp.errors import CmpError
from cmp.files import delete_leftovers, read_yaml
from cmp.merging.rules import Weights
from cmp.methods import adapters
from cmp.runs import store
from cmp.runs.checkpoints import CheckpointManager, checkpoint_folder
from cmp.runs.logs import RunLog
from cmp.runs.resolve import ResolvedRun, resolve_run
from cmp.runs.runner import NO_OBSERVER, Observer, execute
from cmp.scale import processes
from cmp.scale.execution import ExecutionConfig
from cmp.training import StepResult

_IS_STORED = "stored"
"""What the first of several processes tells the others of a run that need not be computed."""


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
    resolved = resolve_run(run_config)
    is_stored = store.is_stored(resolved.id)
    with tqdm(total=resolved.steps, unit=" steps", disable=is_stored or not progress) as bar:
        observer = Observer(
            step=lambda task, step, result, model: bar.update() and None,
            resumed=lambda steps: bar.update(steps) and None,
        )
        return compute(resolved, observer, device)


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


def task_end_weights(config: RunConfig, corpus: Corpus) -> list[Weights]:
    """Return the weights before the stream and at the end of each task, on the CPU.

    They are of a run that is computed for this alone, and not stored.
    """
    weights: list[Weights] = [models.load_model(config.model, config.seeds.init).state_dict()]
    steps = budgets.settle(config, corpus).steps

    def keep(task: int, step: int, result: StepResult, model: nn.Module) -> None:
        if step == steps[task] - 1:
            merged = adapters.merged_state_dict(model)
            weights.append({name: x.cpu().clone() for name, x in merged.items()})

    execute(config, corpus, Observer(keep))
    return weights


def run_one(run_config: RunConfig, *arguments: Any, **options: Any) -> store.StoredRun:
    """Resolve a run and return it, see `compute` for the other arguments."""
    return compute(resolve_run(run_config), *arguments, **options)


def compute(
    run: ResolvedRun,
    observer: Observer = NO_OBSERVER,
    device: str = "cpu",
    wait: bool = False,
    execution: ExecutionConfig | None = None,
    keep: bool = False,
    board: Path | None = None,
) -> store.StoredRun:
    """Return a run from the store; compute it in this process if it is missing.

    An unfinished run goes on from its last checkpoint. Of several processes
    (`cmp.scale.processes`) all call this.

    Args:
        run: The run.
        observer: Hears of the progress; of several processes that of the first.
        device: "cpu" or "cuda".
        wait: Whether to wait for another process that computes the run, instead of an error.
        execution: How a step is computed.
        keep: Whether to store the final weights, as is always done for models that are not
            embedded; a run that is stored without them is computed again.
        board: A folder for TensorBoard.

    Raises:
        CmpError: The run cannot be computed, or another process computes it.
        Interrupted: SIGINT or SIGTERM came; the run's state is saved.
    """
    delete_leftovers(store.run_folder(run.id).parent)
    execute_run = functools.partial(
        execute, run.config, run.corpus, device=device, execution=execution, fitted=run.fitted
    )
    if processes.rank():
        if processes.broadcast("") != _IS_STORED:
            execute_run()
    elif is_kept(run.id, keep):
        processes.broadcast(_IS_STORED)
        # a kill may have come between the last two lines below; or another process computes the run
        # for its weights, and needs its checkpoints
        if checkpoint_folder(run.id).exists():
            with contextlib.suppress(CmpError), CheckpointManager(run.id) as manager:
                manager.remove()
    else:
        with CheckpointManager(run.id, wait=wait) as manager:
            manager.launch = launch_options(execution or ExecutionConfig(), keep, board)
            stored = is_kept(run.id, keep)  # another process may have been faster
            processes.broadcast(_IS_STORED if stored else "")
            if not stored:
                with RunLog(run.id, run.fitted, device, board) as log:
                    result = execute_run(observer=log.observe(observer), manager=manager)
                keep = keep or run.config.model.name not in models.family_names()
                made = store.make_stored_run(run.config, result, run.identity)
                store.save_run(made, result.model if keep else None)
            manager.remove()
    processes.barrier()
    return store.load_run(run.id)


def launch_options(
    execution: ExecutionConfig, keep: bool, board: Path | None
) -> dict[str, bool | int | str]:
    """Return the options of a command as `cmp.runs.checkpoints.Progress.launch` has them;
    those that have their default are left out."""
    options: dict[str, Any] = execution.settings() | {
        "keep_weights": keep,
        "tensorboard": board and str(board),
    }
    options["workers"] = os.environ.get("CMP_WORKERS")
    return {name: value for name, value in options.items() if value}


def take_launch(options: dict[str, bool | int | str]) -> tuple[ExecutionConfig, bool, Path | None]:
    """Return what `launch_options` was made from; processes that decode images are as many as then,
    unless this environment names a number."""
    options = {**options}
    keep, board = bool(options.pop("keep_weights", False)), options.pop("tensorboard", None)
    if decoders := options.pop("workers", None):
        os.environ.setdefault("CMP_WORKERS", str(decoders))
    execution: Any = options
    return ExecutionConfig(**execution), keep, Path(str(board)) if board else None


def is_kept(run_id: str, weights: bool) -> bool:
    """Return whether a run is stored, with its final weights where `weights` asks for them."""
    return store.is_stored(run_id) and (not weights or store.weights_path(run_id).exists())
