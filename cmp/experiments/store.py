"""Finished runs by id: a run that is stored is never computed again.

A run's id is the hash of what decides its result: config, data, starting weights, `NUMERICS`.
Beside the result stands what else may matter for its last bits: versions, processor, threads.
"""

import datetime
import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as checked_dataclass
from torch import nn

from cmp import NUMERICS, budgets, config, mixtures, models, streams
from cmp.config import STARTS, RunConfig
from cmp.data import Corpus, named_sources
from cmp.embedded.packages import sha256
from cmp.errors import CmpError
from cmp.files import SHORT_ID, atomic_folder, build_folder, child_path, parse_record, read_table
from cmp.runner import NO_OBSERVER, Observer, RunResult, execute, machine_differences

METRIC_COLUMNS = {"task": int, "scope": str, "dataset": str, "role": str, "score": float}
"""What the metrics of a run hold at least."""

RUN_FORMAT = 2


@checked_dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True))
class RunRecord:
    """What `run.json` says."""

    format: Literal[RUN_FORMAT]
    id: str
    config: dict[str, Any]
    weights_sha256: str
    provenance: dict[str, Any]

    def __post_init__(self) -> None:
        for key, kind in (("seconds", int | float), ("threads", int)):
            if not isinstance(self.provenance.get(key), kind):
                raise ValueError(f"provenance.{key}: must be a number")


@dataclass(frozen=True)
class StoredRun:
    """A finished run. metrics: a row a (task, scope, dataset), see `cmp.runs.Result`; weights: the
    hash of the final weights, see `cmp.models.digest`."""

    id: str
    config: RunConfig
    provenance: dict[str, Any]
    metrics: pd.DataFrame
    weights: str


def run_id_of(run_config: RunConfig, corpus: Corpus) -> str:
    """The id of a run: sha256 over everything that decides its result. A folder of data counts by
    what is in it, wherever it lies."""
    start, weights = start_identity(run_config)
    unused = () if run_config.mixture.pool == "substitute" else corpus.by_role("substitute")
    is_path = run_config.data not in named_sources()
    located = {"data": "a folder"} if is_path else {}
    content = {
        "config": run_config.changes() | located | start,
        "data": {name: x for name, x in corpus.hashes.items() if name not in unused},
        "weights": weights,
        "numerics": NUMERICS,
    }
    if options := run_config.option_record():  # another definition is another run
        content["options"] = {name: record["sha256"] for name, record in options.items()}
    if run_config.training.budget is not None:  # another way of counting is another run
        content["steps"] = budgets.apply_budget(run_config).training.steps
    if run_config.stream.order != "random":  # what traits decide counts, not the tables themselves
        content["order"] = streams.order_digest(corpus, run_config.stream, run_config.seeds.stream)
    if run_config.mixture.select != "random":
        content["replay"] = mixtures.replay_digest(
            corpus, run_config.mixture, run_config.seeds.data
        )
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def start_identity(run_config: RunConfig) -> tuple[dict[str, str], str]:
    """What stands for a run's starting weights in its id: changes to the config, and their hash.

    A file counts by its content, wherever it lies; weights that are not here by their name.
    """
    model, seed = run_config.model, run_config.seeds.init
    own = model.start in STARTS
    path = models.start_file(model, seed)
    if path is None or not path.exists():
        return {}, model.start
    found = _file_hash(path, path.stat().st_mtime_ns, path.stat().st_size)
    is_file = (
        not own and model.start != models.HUB and not models.pretrained_tag(model.name, model.start)
    )
    return {"model.start": "file"} if is_file else {}, found


@functools.lru_cache(maxsize=64)
def _file_hash(path: Path, *stamp: int) -> str:
    """sha256 of a file, read once for as long as it does not change."""
    return sha256(path)


def run_folder(run_id: str) -> Path:
    """Where a run is stored."""
    return child_path(build_folder() / "runs", run_id[:SHORT_ID])


def make_stored_run(run_id: str, run_config: RunConfig, result: RunResult) -> StoredRun:
    """What is stored of a result."""
    options = run_config.option_record()
    about = (
        result.provenance
        | ({"options": options} if options else {})
        | {
            "seconds": round(result.seconds, 2),
            "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
    )
    return StoredRun(run_id, run_config, about, result.metrics, models.weights_digest(result.model))


def weights_path(run_id: str) -> Path:
    """Where a run's final weights are, if they were kept."""
    return run_folder(run_id) / "weights.safetensors"


def save_run(run: StoredRun, model: nn.Module | None = None) -> None:
    """Store a finished run, whole or not at all. model: its network, where its weights are kept."""
    content = {
        "format": RUN_FORMAT,
        "id": run.id,
        "config": run.config.to_dict(),
        "weights_sha256": run.weights,
        "provenance": run.provenance,
    }
    with atomic_folder(run_folder(run.id)) as target:
        run.metrics.to_parquet(target / "metrics.parquet", index=False)
        (target / "run.json").write_text(json.dumps(content, indent=1))
        if model is not None:
            models.export_weights(model, target / weights_path(run.id).name)


def final_model(run: StoredRun) -> nn.Module:
    """The network that a stored run ended in; `CmpError` if its weights were not kept, or are
    damaged."""
    path = weights_path(run.id)
    if not path.exists():
        raise CmpError(
            f"run {run.id[:SHORT_ID]}: its weights were not kept; the same `cmpt run` with "
            "--keep-weights computes it again and keeps them"
        )
    model = models.load_from_file(run.config.model.name, path)
    if models.weights_digest(model) != run.weights:
        raise CmpError(f"{path}: damaged: not the weights that run {run.id[:SHORT_ID]} ended in")
    return model


def load_run(run_id: str) -> StoredRun:
    """Read a stored run; `CmpError` if it is missing or damaged."""
    stored, run_config = load_record(run_id)
    try:
        metrics = read_table(run_folder(run_id) / "metrics.parquet", METRIC_COLUMNS)
    except (OSError, ValueError) as error:
        raise _unreadable_run(run_folder(run_id), error) from error
    return StoredRun(stored.id, run_config, stored.provenance, metrics, stored.weights_sha256)


def load_record(run_id: str) -> tuple[RunRecord, RunConfig]:
    """What is stored of a run beside its metrics; `CmpError` as in `load`."""
    place = run_folder(run_id)
    try:
        stored = parse_record((place / "run.json").read_text(), RunRecord)
    except (OSError, ValueError) as error:
        raise _unreadable_run(place, error) from error
    if not stored.id.startswith(run_id):
        raise CmpError(f"{place}: holds run {stored.id[:SHORT_ID]}, not {run_id[:SHORT_ID]}")
    return stored, config.parse(stored.config, str(place))


def _unreadable_run(place: Path, error: Exception) -> CmpError:
    return CmpError(f"{place}: no readable run ({error}); delete the folder and rerun")


def is_stored(run_id: str) -> bool:
    """Whether a run of this id is finished."""
    return (run_folder(run_id) / "run.json").exists()


def stored_ids() -> list[str]:
    """The short ids of all finished runs, oldest first."""
    found = (build_folder() / "runs").glob("[0-9a-f]*/run.json")
    return [path.parent.name for path in sorted(found, key=lambda path: path.stat().st_mtime)]


def find_run(prefix: str) -> StoredRun:
    """The one stored run whose id starts with `prefix`; else `CmpError`."""
    matching = [name for name in stored_ids() if name.startswith(prefix[:SHORT_ID])]
    if len(matching) != 1:
        problem = "no stored run" if not matching else f"{len(matching)} stored runs"
        raise CmpError(f"{prefix!r}: {problem} of this id; `cmpt results ls` shows them all")
    run = load_run(matching[0])
    if not run.id.startswith(prefix):
        raise CmpError(f"{prefix!r}: no stored run of this id; the nearest is {run.id}")
    return run


def trajectory(metrics: pd.DataFrame) -> pd.DataFrame:
    """A_KA, A_ZS and GM a (task, scope), with whatever other columns tell runs apart.

    metrics: as in `Run`, or several runs side by side told apart by `setting` and `replicate`.
    """
    keys = [key for key in ("setting", "replicate") if key in metrics] + ["task", "scope"]
    means = metrics.groupby([*keys, "role"], sort=False)["score"].mean().unstack()
    table = means.rename(columns={"adapt": "A_KA", "eval": "A_ZS"})[["A_KA", "A_ZS"]]
    table["GM"] = np.sqrt(table["A_KA"] * table["A_ZS"])
    return table.rename_axis(columns=None).reset_index()


TOLERANCE = 3.0
"""Points by which A_KA or A_ZS may move, anywhere on a trajectory, on another machine. Rounding
differs there from the first step on: a second thread alone moved two runs by 1.5 and by 2.0, which
is all that was measured. So this is a convention, not a bound."""

METRIC_KEYS = ["task", "scope", "dataset"]


@dataclass(frozen=True)
class Verdict:
    """answer: "bitwise equal", "within tolerance" or "different"; sentence: that in words, with
    where the two part."""

    answer: str
    sentence: str


def verify_run(run: StoredRun, corpus: Corpus, observer: Observer = NO_OBSERVER) -> Verdict:
    """Compute a run again, with as many threads as then, and compare."""
    before = torch.get_num_threads()
    torch.set_num_threads(run.provenance["threads"])
    try:
        again = execute(run.config, corpus, observer)
    finally:
        torch.set_num_threads(before)
    elsewhere = machine_differences(run.provenance, again.provenance)
    if "began" in run.provenance:
        elsewhere = elsewhere or "the run was computed in two places"
    equal_weights = models.weights_digest(again.model) == run.weights
    return compare_metrics(run.metrics, again.metrics, equal_weights, elsewhere)


def _pair_scores(stored: pd.DataFrame, again: pd.DataFrame) -> pd.DataFrame:
    """Both scores of each row, NaN where one of them is missing."""
    return stored.set_index(METRIC_KEYS)[["role", "score"]].join(
        again.set_index(METRIC_KEYS)["score"].rename("again"), how="outer"
    )


def score_changes(stored: pd.DataFrame, again: pd.DataFrame) -> pd.DataFrame:
    """A row a (task, scope, aggregate): `stored`, `now` and how far it `moved`, in points."""
    means = (
        _pair_scores(stored, again).groupby([*METRIC_KEYS[:2], "role"])[["score", "again"]].mean()
    )
    means = means[means.index.get_level_values("role") != "transfer"]
    means = means.rename(columns={"score": "stored", "again": "now"})
    means = means.rename(index={"adapt": "A_KA", "eval": "A_ZS"}, level="role")
    means.index.names = [*METRIC_KEYS[:2], "aggregate"]
    return means.assign(moved=means["now"] - means["stored"]).reset_index()


def compare_metrics(
    stored: pd.DataFrame, again: pd.DataFrame, weights: bool, elsewhere: str
) -> Verdict:
    """The verdict on two runs of one config.

    weights: whether the final weights agree to the bit. elsewhere: where the machines differ; if
    they do not, only bitwise equality will do.
    """
    pair = _pair_scores(stored, again)
    order = pair.reindex(pd.MultiIndex.from_frame(stored[METRIC_KEYS]))
    apart = order[order["score"] != order["again"]]
    complete = len(pair) == len(stored) and pair["again"].notna().all()
    if apart.empty and weights and complete:
        return Verdict("bitwise equal", f"{len(stored)} scores and the final weights are equal")
    if apart.empty:
        where = "the scores are equal, the final weights are not"
    else:
        task, scope, dataset = apart.index[0]
        old, new = apart.iloc[0][["score", "again"]]
        where = (
            f"{len(apart)} of {len(stored)} scores differ, first {dataset} ({scope}) after "
            f"{task} tasks: stored {old:.2f}, now {new:.2f}"
        )
    drift = score_changes(stored, again)["moved"].abs().max()
    where += f"; A_KA and A_ZS move by at most {drift:.2f} points"
    if not elsewhere:
        return Verdict("different", f"{where}, though nothing else differs")
    inside = complete and drift <= TOLERANCE
    answer = "within tolerance" if inside else "different"
    return Verdict(answer, f"{where}, against {TOLERANCE:g} allowed where {elsewhere} differ")
