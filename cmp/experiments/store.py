"""Finished runs by id: a run that is stored is never computed again.

A run's id is the hash of what decides its result: config, data, starting weights and `NUMERICS`.
What else may move its last bits (versions, processor, threads) is stored beside the result.

A run is a folder with `run.json`, `metrics.parquet`, `hits.safetensors` where whole test sets were
scored, and `weights.safetensors` where they were kept. `run.json` has the sha256 of each of the
others, of itself, and what the id was made from; all are checked when they are read.
"""

import datetime
import functools
import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from open_clip import factory
from pydantic.dataclasses import dataclass as checked_dataclass
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import cmp
from cmp import budgets, config, distributed, mixtures, models, registry, streams, training
from cmp.config import STARTS, STRICT, Method, RunConfig
from cmp.data import Corpus, load_data, named_sources
from cmp.errors import CmpError, explain_errors
from cmp.evaluation import ROLES
from cmp.files import (
    SHORT_ID,
    WEIGHTS,
    atomic_folder,
    build_folder,
    child_path,
    file_digest,
    parse_record,
)
from cmp.models import RUN_PREFIX
from cmp.readers.files import parse_json, read_table
from cmp.registry import Option
from cmp.runner import NO_OBSERVER, Observer, RunResult, execute, machine_differences
from cmp.training import batch_norms

METRIC_COLUMNS = {"task": int, "scope": str, "dataset": str, "role": str, "score": float}
"""Columns that the metrics of every run have."""
METRIC_KEYS = ["task", "scope", "dataset"]
RUN_KEYS = ["setting", "replicate"]
"""What tells the runs of a study apart."""
RUN_FORMAT = 3
METRICS, HITS = "metrics.parquet", "hits.safetensors"
"""Files of a run beside its record and its weights."""
FILES = ("run.json", METRICS, HITS, WEIGHTS)
"""All that is stored of a run."""
COUNTS = "counts"
"""The key in the header of `HITS` that says how many questions each dataset asks."""
PLACEHOLDERS = {"data": "a folder", "model.start": "file"}
"""What stands in an id for a path, whose content counts and not where it lies."""
RERUN = "; delete the folder and rerun"
TOLERANCE = 3.0
"""Points by which A_KA or A_ZS may move, anywhere on a trajectory, on another machine. Rounding
differs there from the first step on: a second thread alone moved two runs by 1.5 and by 2.0, which
is all that was measured. So this is a convention, not a bound."""


@checked_dataclass(frozen=True, config=STRICT)
class RunRecord:
    """The content of `run.json`.

    Attributes:
        format: Version of the layout.
        id: The run's id.
        identity: What the id is the hash of, see `run_identity`.
        config: The config as a tree.
        weights_sha256: Hash of the final weights, see `cmp.models.weights_digest`.
        provenance: Where, when and in how many seconds the run was computed.
        files: The sha256 of each file beside the record.
    """

    format: Literal[RUN_FORMAT]
    id: str
    identity: dict[str, Any]
    config: dict[str, Any]
    weights_sha256: str
    provenance: dict[str, Any]
    files: dict[str, str]

    def __post_init__(self) -> None:
        if json_digest(self.identity) != self.id:
            raise ValueError("identity: not what the id was made from")
        for key, kind in (("seconds", int | float), ("threads", int)):
            if not isinstance(self.provenance.get(key), kind):
                raise ValueError(f"provenance.{key}: must be a number")


@dataclass(frozen=True)
class StoredRun:
    """A finished run.

    Attributes:
        id: The run's id.
        config: Its config.
        provenance: Where, when and in how many seconds it was computed.
        metrics: A row per (task, scope, dataset), see `cmp.runner.RunResult`.
        weights: Hash of the final weights, see `cmp.models.weights_digest`.
        identity: What the id is the hash of; empty for a published run.
        hits: Which questions of whole test sets were answered right, see `cmp.runner.RunResult`;
            empty for a published run.
    """

    id: str
    config: RunConfig
    provenance: dict[str, Any]
    metrics: pd.DataFrame
    weights: str
    identity: dict[str, Any] = field(default_factory=dict)
    hits: dict[str, np.ndarray] = field(default_factory=dict)


def json_digest(tree: dict[str, Any]) -> str:
    """Return the sha256 of a tree, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def run_id_of(run_config: RunConfig, corpus: Corpus | None = None) -> str:
    """Return a run's id, the hash of `run_identity`."""
    return json_digest(run_identity(run_config, corpus))


def known_id(run_config: RunConfig) -> str:
    """Return a run's id, "" as long as the weights that it starts from are not on this machine."""
    return run_id_of(run_config) if has_start(run_config) else ""


def run_identity(run_config: RunConfig, corpus: Corpus | None = None) -> dict[str, Any]:
    """Return everything that decides a run's result.

    A folder of data counts by its content, wherever it lies, and so do weights: `fetch_start` comes
    before this.

    Args:
        run_config: The run's config.
        corpus: Its data; they are loaded where None.

    Raises:
        CmpError: The weights that it starts from are not on this machine.
    """
    corpus = corpus or load_data(run_config.data)
    start, weights = start_identity(run_config)
    is_named = run_config.data in named_sources()
    location = {} if is_named else {"data": PLACEHOLDERS["data"]}
    unused = () if run_config.mixture.pool == "substitute" else corpus.by_role("substitute")
    content = {
        "config": run_config.changes() | location | start,
        "data": {name: digest for name, digest in corpus.hashes.items() if name not in unused},
        "weights": weights,
        "numerics": cmp.NUMERICS,
    }
    if options := run_config.option_record():  # another definition is another run
        content["options"] = {name: record["sha256"] for name, record in options.items()}
    if run_config.training.budget is not None:  # another way of counting is another run
        content["steps"] = budgets.apply_budget(run_config).training.steps
    if run_config.stream.order != "random":  # the order counts, not the table that it comes from
        order = streams.class_order(corpus, run_config.stream, run_config.seeds.stream)
        content["order"] = hashlib.sha256("\n".join(order).encode()).hexdigest()
    if run_config.mixture.select != "random":
        fitted = mixtures.fit_mixture(run_config, corpus)
        _, kept = mixtures.choose_replay(corpus, fitted.mixture, fitted.seeds.data)
        content["replay"] = hashlib.sha256(kept.astype("<i8").tobytes()).hexdigest()
    option = registry.get_option("method", run_config.method.name)
    if _holds_statistics(run_config.model.name, run_config.method, option):
        content["batch_norm"] = "held"  # in 0.2 these statistics moved
    if scaled := [n for n, x in corpus.noted.items() if "grey16" in x and n not in unused]:
        content["scaled"] = scaled  # sets of which pictures were white before they were scaled
    return content


@functools.cache
def _holds_statistics(name: str, method: Method, option: Option) -> bool:
    """Return whether a method leaves running statistics of a network alone that a step in training
    mode would move: those of what it freezes, or all of them while it measures.

    Args:
        name: The network.
        method: The config section.
        option: The method itself, which may be defined anew.
    """
    if not _has_batch_norm(name):
        return False
    if option.sources or "batches" in option.settings:  # a user's may freeze and measure anything
        return True
    state = budgets.shape_state(name, method, models.create_on_meta(name))
    training.set_train_mode(state.model)
    return not all(layer.training for layer in batch_norms(state.model))


@functools.cache
def _has_batch_norm(name: str) -> bool:
    """Return whether a network keeps running statistics."""
    return bool(batch_norms(models.create_on_meta(name)))


def start_identity(run_config: RunConfig) -> tuple[dict[str, str], str]:
    """Return how a run's starting weights enter its id.

    Returns:
        Changes to the flat config, and the hash of the weights. A file counts by its tensors,
        wherever it lies.

    Raises:
        CmpError: The weights are not on this machine.
    """
    model, path = run_config.model, start_file(run_config)
    if model.start == "random":
        return {}, model.start
    if path is None:  # an id by their name would change once they are here
        words = "are not on this machine, and a run's id counts their content"
        raise CmpError(f"model.start: the weights {model.start!r} of {model.name!r} {words}")
    is_base, is_hub = model.start in STARTS, model.start == models.HUB
    digest = _start_digest(path, is_base, path.stat().st_mtime_ns, path.stat().st_size)
    is_named = is_base or is_hub or models.pretrained_tag(model.name, model.start)
    return {} if is_named else {"model.start": PLACEHOLDERS["model.start"]}, digest


@functools.lru_cache(maxsize=64)
def _start_digest(path: Path, is_base: bool, *stamp: int) -> str:
    """Return the hash of starting weights, read once for as long as the file's stamp stays.

    A base counts by its file, which is known by its sha256. Other files count by their tensors,
    whatever the format that they are in.
    """
    if is_base:
        return file_digest(path)
    try:
        read = np.load if path.suffix == ".npz" else factory.load_state_dict  # of tensors alone
        return models.tensors_digest({n: torch.as_tensor(x) for n, x in read(str(path)).items()})
    except Exception as error:  # whatever readers raise at what is no checkpoint
        raise CmpError(f"{path}: {models.unreadable_checkpoint(error)}") from error


def run_folder(run_id: str) -> Path:
    """Return the folder that a run is stored in."""
    return child_path(build_folder() / "runs", run_id[:SHORT_ID])


def weights_path(run_id: str) -> Path:
    """Return the file of a run's final weights, which exists only if they were kept."""
    return run_folder(run_id) / WEIGHTS


def make_stored_run(
    run_config: RunConfig, result: RunResult, identity: dict[str, Any]
) -> StoredRun:
    """Return what is stored of a run's result; `identity` is that of `run_identity`."""
    provenance = result.provenance | {
        "seconds": round(result.seconds, 2),
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    if options := run_config.option_record():
        provenance["options"] = options
    if run_config.model.start.startswith(RUN_PREFIX):
        provenance["parent"] = run_config.model.start.removeprefix(RUN_PREFIX)
    weights = models.weights_digest(result.model)
    run_id = json_digest(identity)
    return StoredRun(run_id, run_config, provenance, result.metrics, weights, identity, result.hits)


def save_run(run: StoredRun, model: models.Network | None = None) -> None:
    """Store a finished run, whole or not at all.

    Args:
        run: The run.
        model: Its network, if its final weights are to be kept.
    """
    with atomic_folder(run_folder(run.id)) as folder:
        run.metrics.to_parquet(folder / METRICS, index=False)
        if run.hits:
            bits = {name: torch.from_numpy(np.packbits(hits)) for name, hits in run.hits.items()}
            counts = {name: len(hits) for name, hits in run.hits.items()}
            # one key, since safetensors writes several in any order
            save_file(bits, folder / HITS, {COUNTS: json.dumps(counts, sort_keys=True)})
        if model is not None:
            models.export_weights(model, folder / WEIGHTS)
        files = {path.name: file_digest(path) for path in folder.iterdir()}
        tree = run.config.to_dict()
        content = (run.id, run.identity, tree, run.weights, run.provenance, files)
        record = asdict(RunRecord(RUN_FORMAT, *content))
        record["sha256"] = json_digest(record)
        (folder / "run.json").write_text(json.dumps(record, indent=1))


def final_model(run: StoredRun) -> models.Network:
    """Return the network that a stored run ended in.

    Raises:
        CmpError: The weights were not kept, or they are damaged.
    """
    path = kept_path(run)
    model = models.load_from_file(run.config.model.name, path)
    if models.weights_digest(model) != run.weights:
        raise CmpError(f"{path}: damaged: not the weights that run {run.id[:SHORT_ID]} ended in")
    return model


def kept_path(run: StoredRun) -> Path:
    """Return the file of a stored run's final weights.

    Raises:
        CmpError: They were not kept, or the file is damaged.
    """
    path = weights_path(run.id)
    if not path.exists():
        raise CmpError(
            f"run {run.id[:SHORT_ID]}: its weights were not kept; the same `cmpt run` with "
            "--keep-weights computes it again and keeps them"
        )
    with explain_errors(f"{path.parent}: no readable run", RERUN):
        _check_file(load_record(run.id)[0], path)
    return path


def load_run(run_id: str) -> StoredRun:
    """Return a stored run; raise `CmpError` if it is missing or damaged."""
    record, run_config = load_record(run_id)
    folder, hits = run_folder(run_id), {}
    with explain_errors(f"{folder}: no readable run", RERUN, SafetensorError):
        _check_file(record, folder / METRICS)
        metrics = read_table(folder / METRICS, METRIC_COLUMNS)
        if metrics.empty:
            raise ValueError(f"{METRICS}: holds no scores")
        if HITS in record.files:
            _check_file(record, folder / HITS)
            with safe_open(folder / HITS, framework="np") as file:
                counts = file.metadata()
                if COUNTS in counts:  # 0.2.0 wrote a key for each dataset
                    counts = parse_json(counts[COUNTS])
                for name, count in counts.items():
                    hits[name] = np.unpackbits(file.get_tensor(name), count=int(count)) == 1
    content = (record.provenance, metrics, record.weights_sha256, record.identity, hits)
    return StoredRun(record.id, run_config, *content)


def _check_file(record: RunRecord, path: Path) -> None:
    """Raise `ValueError` unless a file of a run is what was stored."""
    if file_digest(path) != record.files.get(path.name):
        raise ValueError(f"{path.name} is damaged: not what was stored")


def load_record(run_id: str) -> tuple[RunRecord, RunConfig]:
    """Return what is stored of a run beside its metrics; raise `CmpError` as `load_run` does."""
    folder = run_folder(run_id)
    with explain_errors(f"{folder}: no readable run", RERUN):
        record = _read_record(folder / "run.json")
        if not record.id.startswith(run_id):
            raise CmpError(f"{folder}: holds run {record.id[:SHORT_ID]}, not {run_id[:SHORT_ID]}")
        check_sources(record.id, record.provenance.get("options", {}), digests=False)
        run_config = config.parse(record.config, str(folder))
        stored, changes = record.identity.get("config", {}), run_config.changes()
        paths = {k: x for k, x in PLACEHOLDERS.items() if k in changes and stored.get(k) == x}
        if json_digest(changes | paths) != json_digest(stored):
            words = "not what the id was made from, or of a version with other defaults"
            raise ValueError(f"config: {words}")
    return record, run_config


def _read_record(path: Path) -> RunRecord:
    """Return the content of `run.json`; raise `ValueError` if it is not what was written."""
    tree = parse_json(path.read_text(encoding="utf-8"))
    if not isinstance(tree, dict) or tree.get("format") != RUN_FORMAT:
        raise ValueError(f"run.json is not of format {RUN_FORMAT}: another version wrote it")
    if tree.pop("sha256", "") != json_digest(tree):
        raise ValueError("run.json is damaged: its sha256 is another one")
    return parse_record(json.dumps(tree), RunRecord)


def check_sources(run_id: str, options: dict[str, dict[str, Any]], digests: bool = True) -> None:
    """Check that the options of a run that are not the package's own are registered.

    Args:
        run_id: The run's id.
        options: Their record by "kind:name", see `cmp.config.RunConfig.option_record`.
        digests: Whether their source must be the one that the run was computed with.

    Raises:
        CmpError: One is not registered, or its source is another one.
    """
    for name, recorded in options.items():
        kind, _, option = name.partition(":")
        run, words = f"run {run_id[:SHORT_ID]}", f"{kind.replace('_', ' ')} {option!r}"
        if option not in registry.option_names(kind):
            raise CmpError(
                f"{run} uses the {words}, which is not registered here; `cmpt --plugin FILE ...` "
                "runs the file that does so"
            )
        if digests and registry.get_option(kind, option).digest != recorded["sha256"]:
            raise CmpError(
                f"{run} was computed with another source of the {words}, which is stored with it"
            )


def is_stored(run_id: str) -> bool:
    """Return whether a run of this id is finished."""
    return (run_folder(run_id) / "run.json").exists()


def stored_ids() -> list[str]:
    """Return the short ids of all finished runs, oldest first."""
    records = (build_folder() / "runs").glob("[0-9a-f]*/run.json")
    return [path.parent.name for path in sorted(records, key=lambda path: path.stat().st_mtime)]


def find_run(prefix: str) -> StoredRun:
    """Return the one stored run whose id starts with `prefix`; raise `CmpError` otherwise."""
    matching = [name for name in stored_ids() if name.startswith(prefix[:SHORT_ID])]
    if len(matching) != 1:
        problem = "no stored run" if not matching else f"{len(matching)} stored runs"
        raise CmpError(f"{prefix!r}: {problem} of this id; `cmpt results ls` shows them all")
    run = load_run(matching[0])
    if not run.id.startswith(prefix):
        raise CmpError(f"{prefix!r}: no stored run of this id; the nearest is {run.id}")
    return run


def trajectory(metrics: pd.DataFrame) -> pd.DataFrame:
    """Return the aggregate scores of runs over their streams.

    Args:
        metrics: As in `StoredRun`, or of several runs told apart by `setting` and `replicate`.

    Returns:
        A row per (task, scope), and per setting and replicate where there are several: `A_KA`,
        `A_ZS` and their geometric mean `GM`, in percent; NaN where no set of that role was scored.
    """
    keys = [key for key in RUN_KEYS if key in metrics] + ["task", "scope"]
    means = metrics.groupby([*keys, "role"], sort=False)["score"].mean().unstack()
    table = means.reindex(columns=[*ROLES.values()]).set_axis([*ROLES], axis=1)
    table["GM"] = np.sqrt(table["A_KA"] * table["A_ZS"])
    return table.rename_axis(columns=None).reset_index()


def after_last_task(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of each run after its last task.

    Args:
        table: Metrics, or a trajectory of them; of several runs told apart by `setting` and
            `replicate`.
    """
    keys = [key for key in RUN_KEYS if key in table]
    last = table.groupby(keys)["task"].transform("max") if keys else table["task"].max()
    return table[table["task"] == last]


def final_scores(trajectory: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of a `trajectory` after each run's last task, on the widest test of all that
    were scored."""
    wide = "full" if (trajectory["scope"] == "full").any() else "subset"
    return after_last_task(trajectory[trajectory["scope"] == wide])


def scores_on_way(run: StoredRun) -> pd.DataFrame:
    """Return `A_KA`, `A_ZS` and `GM` of a run before its stream and after each task, on the widest
    test that was scored then; index task."""
    table = trajectory(run.metrics)
    widest = table.sort_values("scope").drop_duplicates("task")  # "full" comes before "subset"
    return widest.set_index("task").sort_index()[["A_KA", "A_ZS", "GM"]]


class Verdict(NamedTuple):
    """How two computations of one run compare.

    Attributes:
        answer: "bitwise equal", "within tolerance" or "different".
        sentence: The reason in words, with the first score that differs.
    """

    answer: str
    sentence: str


def verify_run(
    run: StoredRun, corpus: Corpus, observer: Observer = NO_OBSERVER, device: str = "cpu"
) -> Verdict:
    """Compute a run again, with as many threads as before, and compare the two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(run.provenance["threads"])
    try:
        result = execute(run.config, corpus, observer, device=device)
    finally:
        torch.set_num_threads(threads)
    return compare_runs(run, make_stored_run(run.config, result, run.identity))


def compare_runs(stored: StoredRun, again: StoredRun) -> Verdict:
    """Compare two computations of one run; on a card and where machines differ, so may scores."""
    machines = machine_differences(stored.provenance, again.provenance)
    if not machines and ("began" in stored.provenance or "began" in again.provenance):
        machines = "the machines that the run was begun and finished on"
    if not machines and stored.provenance.get("device", "cpu") != "cpu":
        machines = "sums on a card"
    now, count = again.metrics[[*METRIC_KEYS, "score"]], len(stored.metrics)
    pairs = stored.metrics.merge(now, "left", METRIC_KEYS, suffixes=("", "_now"))
    complete = len(now) == count and pairs["score_now"].notna().all()
    different = pairs[pairs["score"] != pairs["score_now"]]
    if different.empty and again.weights == stored.weights and complete:
        return Verdict("bitwise equal", f"{count} scores and the final weights are equal")
    reason = "the scores are equal, the final weights are not"
    if len(different):
        row = different.iloc[0]
        reason = (
            f"{len(different)} of {count} scores differ, first {row['dataset']} "
            f"({row['scope']}) after {row['task']} tasks: stored {row['score']:.2f}, now "
            f"{row['score_now']:.2f}"
        )
    pairs["aggregate"] = pairs["role"].map({role: name for name, role in ROLES.items()})
    means = pairs.groupby(["task", "scope", "aggregate"])[["score", "score_now"]].mean()
    drift = (means["score_now"] - means["score"]).abs().max() if len(means) else 0.0
    reason += f"; A_KA and A_ZS move by at most {drift:.2f} points"
    if not machines:
        return Verdict("different", f"{reason}, though nothing else differs")
    answer = "within tolerance" if complete and drift <= TOLERANCE else "different"
    reason += f", against {TOLERANCE:g} allowed where {machines} differ"
    return Verdict(answer, reason)


def start_file(run_config: RunConfig) -> Path | None:
    """Return the file of the weights that a run starts from; nothing is downloaded.

    Returns:
        The file; None for random weights, and where the file is not on this machine.
    """
    config = run_config.model
    if config.start == "random":
        return None
    if config.start not in STARTS:
        return models.cached_weights(config.name, config.start)
    family = models.family_of(config.name)
    path = family and family.base_path(config.name, config.start, run_config.seeds.init)
    return path if path and path.exists() else None


def has_start(run_config: RunConfig) -> bool:
    """Return whether the weights that a run starts from are on this machine."""
    return run_config.model.start == "random" or start_file(run_config) is not None


def fetch_start(run_config: RunConfig) -> RunConfig:
    """Have the weights that a run starts from on this machine: its id counts their content.

    Of several processes (`cmp.distributed`) all call this, and the first downloads.

    Returns:
        The config, with the whole id of the run that it goes on from, if it does.

    Raises:
        CmpError: The weights are missing, and cannot be downloaded; or see `find_parent`.
    """
    parent = find_parent(run_config)
    with distributed.first_process_first():
        models.fetch_weights(run_config.model, run_config.seeds.init)
    if parent is None:
        return run_config
    return replace(run_config, model=replace(run_config.model, start=f"{RUN_PREFIX}{parent.id}"))


def find_parent(run_config: RunConfig) -> StoredRun | None:
    """Return the finished run whose final weights a run starts from; None if it starts otherwise.

    Raises:
        CmpError: There is no such run, it is of another model, or its weights were not kept or are
            damaged.
    """
    name, start = run_config.model.name, run_config.model.start
    if not start.startswith(RUN_PREFIX):
        return None
    prefix = start.removeprefix(RUN_PREFIX)
    unfinished = [folder.name for folder in (build_folder() / "checkpoints").glob("*/")]
    unfinished = [x for x in unfinished if x.startswith(prefix[:SHORT_ID]) and not is_stored(x)]
    try:
        if not prefix.isalnum():
            raise CmpError(f"{start!r}: give at least the first digits of a run's id, run:ID")
        if unfinished:
            words = f"is not finished; `cmpt resume {unfinished[0]}` goes on with it"
            raise CmpError(
                f"run {unfinished[0]} {words}, `cmpt export` gives its last task's weights"
            )
        parent = find_run(prefix)
        if parent.config.model.name != name:
            words = f"is of {parent.config.model.name!r}, not of {name!r}: set model.name to that"
            raise CmpError(f"run {parent.id[:SHORT_ID]} {words}")
        kept_path(parent)
    except CmpError as error:
        raise CmpError(f"model.start: {error}") from error
    return parent
