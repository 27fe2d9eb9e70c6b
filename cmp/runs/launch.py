"""Start runs from Python: build a config from keywords, resolve what it leaves open, and load or
compute the run."""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tqdm.auto import tqdm

from cmp import budgets, config, models, starts
from cmp.config import RunConfig
from cmp.data import Corpus, load_data
from cmp.errors import CmpError
from cmp.runs import identity, lookup, store
from cmp.runs.checkpoints import LOCK, CheckpointManager, refuse_unfinished, run_folder
from cmp.runs.logs import RunLog, log_path
from cmp.runs.runner import NO_OBSERVER, Observer, advance_bar, execute
from cmp.scale import processes
from cmp.scale.devices import check_device
from cmp.scale.execution import ExecutionConfig


def run(
    profile: str | os.PathLike[str] = "quick",
    device: str | None = None,
    progress: bool = True,
    **settings: Any,
) -> store.StoredRun:
    """Train a model on a stream of updates, evaluate it, and store the run.

    A stored run is loaded instead of computed. A stopped run resumes from its last checkpoint.

    Args:
        profile: "quick", "cpu" or "gpu", or a file of settings, NAME.yaml.
        device: "cpu" or "cuda". If None, the CPU for an embedded model and a GPU for others.
        progress: Whether to show a progress bar.
        **settings: Sections of the config, as a dict or the name of an option, or single keys:
            `method="lora"`, `schedule={"name": "wsd", "peak": 0.01}`, `peak=0.01`, `seed=1`.

    Returns:
        The finished run. Its `metrics` is a DataFrame with one row per (task, scope, dataset).

    Raises:
        CmpError: A setting is unknown or invalid.

    Example:
        >>> finished = cmp.run("quick", stream={"tasks": 2}, steps=2, batch=8, progress=False)
        >>> sorted(set(finished.metrics["role"]))
        ['adapt', 'eval', 'transfer']
    """
    run_config = from_keywords(os.fspath(profile), settings)
    device = starts.default_device(run_config.model.name, device)
    try:
        check_device(device)
    except CmpError:
        if not _is_stored(run_config):
            raise
    resolved = resolve_run(run_config)
    is_stored = store.is_stored(resolved.id)
    with tqdm(total=resolved.steps, unit=" steps", disable=is_stored or not progress) as bar:
        return compute(resolved, advance_bar(bar), device)


def _is_stored(run_config: RunConfig) -> bool:
    """Return whether a run is stored, without downloading anything; False if that is unknown."""
    try:
        return store.is_stored(identity.known_id(run_config))
    except CmpError:  # such as for missing data
        return False


def from_keywords(what: str, settings: Mapping[str, Any]) -> RunConfig:
    """Return the config for a profile and keyword settings, see `cmp.run`.

    Args:
        what: A profile, or a file of settings, NAME.yaml.
        settings: Sections, as dicts, as config sections such as `cmp.Method`, or as the value of
            their key in `cmp.config.NAMING_KEYS`; single keys whose name is unique to one section;
            `seed`, `recipe` and `data`.

    Raises:
        CmpError: A key is unknown, or not unique to one section.
    """
    tree = config.read_settings(what)
    if "recipe" in settings:
        tree = config.overlay(tree, config.recipe_tree(settings["recipe"]))
    if "seed" in settings:
        if isinstance(settings.get("seeds"), config.Seeds):
            raise CmpError("seed: seeds=cmp.Seeds(...) sets all four seeds; give one of the two")
        tree.pop("seeds", None)
    sections = config.RunConfig.__dataclass_fields__
    # sections first, since a whole one would replace the single keys
    for key, value in sorted(settings.items(), key=lambda pair: pair[0] not in sections):
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            value = dataclasses.asdict(value)  # a section, such as cmp.Method("lora", rank=8)
        if key in ("seed", "data"):
            tree[key] = value
        elif isinstance(value, Mapping):
            tree = config.overlay(tree, {key: dict(value)})
        elif key in config.NAMING_KEYS:
            tree = config.overlay(tree, {key: {config.NAMING_KEYS[key]: value}})
        elif key != "recipe":
            full = [name for name in config.defaults() if name.rpartition(".")[2] == key]
            if len(full) > 1:
                raise CmpError(f"{key}: ambiguous between {' and '.join(full)}; give the section")
            section, _, leaf = (full or [key])[0].rpartition(".")
            tree = config.overlay(tree, {section: {leaf: value}} if section else {leaf: value})
    return config.parse(tree, f"run {what!r}")


def changes_to_cpu(run_config: RunConfig) -> dict[str, Any]:
    """Return the settings in which a run differs from the profile `cpu`, by dotted key."""
    usual = dict(config.flat_keys(config.parse(config.profile("cpu"), "cpu").to_dict()))
    return {k: value for k, value in config.flat_keys(run_config.to_dict()) if value != usual[k]}


@dataclass(frozen=True)
class ResolvedRun:
    """A run with its data loaded and its starting weights on this machine.

    Attributes:
        config: The config as given, with the full id of the run that it starts from.
        fitted: The config that is actually run, see `cmp.budgets.settle`.
        corpus: The data.
        identity: Everything that determines the result, see `cmp.runs.identity.run_identity`.
    """

    config: RunConfig
    fitted: RunConfig
    corpus: Corpus
    identity: dict[str, Any]

    @functools.cached_property
    def id(self) -> str:
        """The run's id."""
        return identity.json_digest(self.identity)

    @property
    def steps(self) -> int:
        """The number of steps over all tasks."""
        return sum(self.fitted.steps)


def resolve_run(run_config: RunConfig) -> ResolvedRun:
    """Load what a run needs, and determine what its config leaves open.

    With several processes, all of them call this. The first downloads and decodes, and the others
    use the files that it leaves.

    Args:
        run_config: The run's config.

    Raises:
        CmpError: The data or starting weights are not available, or contradict the config.
    """
    run_config = lookup.fetch_start(run_config)
    with processes.first_process_first():
        corpus = load_data(run_config.data)
        models.tokenizer(run_config.model.name)
    fitted = budgets.settle(run_config, corpus)
    try:
        config.check_schedule(fitted, 0)
    except ValueError as error:
        raise CmpError(f"schedule: {error}") from error
    return ResolvedRun(run_config, fitted, corpus, identity.run_identity(run_config, corpus))


def run_one(
    run_config: RunConfig,
    observer: Observer = NO_OBSERVER,
    device: str = "cpu",
    **options: Any,
) -> store.StoredRun:
    """Resolve a run, and load or compute it; `compute` explains the arguments."""
    return compute(resolve_run(run_config), observer, device, **options)


def compute(
    run: ResolvedRun,
    observer: Observer = NO_OBSERVER,
    device: str = "cpu",
    wait: bool = False,
    execution: ExecutionConfig | None = None,
    keep: bool = False,
    boards: Mapping[str, str] | None = None,
) -> store.StoredRun:
    """Return a run from the store, or compute it in this process.

    An unfinished run resumes from its last checkpoint. With several processes
    (`cmp.scale.processes`), all of them call this.

    Args:
        run: The run.
        observer: Receives the progress; with several processes, only that of the first.
        device: "cpu" or "cuda".
        wait: Whether to wait for another process that computes the run, instead of raising an
            error.
        execution: How steps are computed.
        keep: Whether to store the final weights, which always happens for models that are not
            embedded. A run that was stored without them is computed again.
        boards: By name, a folder for "tensorboard", and a project for "wandb".

    Raises:
        CmpError: The run cannot be computed, or another process is computing it.
        Interrupted: SIGINT, SIGTERM or SIGHUP was received; the run's state is saved.
    """
    execute_run = functools.partial(
        execute, run.config, run.corpus, device=device, execution=execution, fitted=run.fitted
    )
    if processes.rank():
        [is_stored] = processes.all_reduce_max(0)  # the first process says whether it is
        if not is_stored:
            execute_run()
    elif is_kept(run.id, keep):
        processes.all_reduce_max(1)
        # a kill may have come between `save_run` and `remove` below; but if another process
        # computes the run again for its weights, that one needs its checkpoints
        if (run_folder(run.id) / LOCK).exists():
            with contextlib.suppress(CmpError), CheckpointManager(run.id) as manager:
                manager.remove()
    else:
        refuse_unfinished(run.id)
        on_gpu = device != "cpu"
        with CheckpointManager(run.id, wait=wait, in_background=on_gpu) as manager:
            stored = is_kept(run.id, keep)  # another process may have been faster
            processes.all_reduce_max(stored)
            if not stored:
                path = log_path(run.id)
                with RunLog(path, run.id, run.fitted, device, boards) as log:
                    result = execute_run(observer=log.observe(observer), manager=manager)
                keep = keep or run.config.model.name not in starts.family_names()
                made = store.make_stored_run(run.config, result, run.identity)
                store.save_run(made, result.model if keep else None)
            manager.remove()
    processes.barrier()
    return store.load_run(run.id)


def is_kept(run_id: str, weights: bool) -> bool:
    """Return whether a run is stored, including its final weights if `weights` is true."""
    return store.is_stored(run_id) and (not weights or store.weights_path(run_id).exists())
