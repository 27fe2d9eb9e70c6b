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
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as checked_dataclass
from torch import nn

from cmp import NUMERICS, budgets, config, models, streams
from cmp.config import STARTS, RunConfig
from cmp.data import filesets
from cmp.data.corpus import Corpus
from cmp.data.fetch import sha256
from cmp.errors import CmpError
from cmp.files import parse_record, whole_folder
from cmp.mixtures import replay
from cmp.models import foreign
from cmp.paths import SHORT, build_folder, named
from cmp.runs import Result
from cmp.tables import METRICS, read_table

FORMAT = 2


@checked_dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True))
class Stored:
    """What `run.json` says."""

    format: Literal[FORMAT]
    id: str
    config: dict[str, Any]
    weights_sha256: str
    provenance: dict[str, Any]

    def __post_init__(self) -> None:
        for key, kind in (("seconds", int | float), ("threads", int)):
            if not isinstance(self.provenance.get(key), kind):
                raise ValueError(f"provenance.{key}: must be a number")


@dataclass(frozen=True)
class Run:
    """A finished run. metrics: a row a (task, scope, dataset), see `cmp.runs.Result`; weights: the
    hash of the final weights, see `cmp.models.digest`."""

    id: str
    config: RunConfig
    provenance: dict[str, Any]
    metrics: pd.DataFrame
    weights: str


def identify(run_config: RunConfig, corpus: Corpus) -> str:
    """The id of a run: sha256 over everything that decides its result. A folder of data counts by
    what is in it, wherever it lies."""
    start, weights = started_from(run_config)
    unused = () if run_config.mixture.pool == "substitute" else corpus.by_role("substitute")
    is_path = run_config.data not in filesets.named_collections()
    located = {"data": "a folder"} if is_path else {}
    content = {
        "config": run_config.changes() | located | start,
        "data": {name: x for name, x in corpus.hashes.items() if name not in unused},
        "weights": weights,
        "numerics": NUMERICS,
    }
    if run_config.training.budget is not None:  # another way of counting is another run
        content["steps"] = budgets.applied(run_config).training.steps
    if run_config.stream.order != "random":  # what traits decide counts, not the tables themselves
        content["order"] = streams.digest(corpus, run_config.stream, run_config.seeds.stream)
    if run_config.mixture.select != "random":
        content["replay"] = replay.digest(corpus, run_config.mixture, run_config.seeds.data)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def started_from(run_config: RunConfig) -> tuple[dict[str, str], str]:
    """What stands for a run's starting weights in its id: changes to the config, and their hash.

    A file counts by its content, wherever it lies; weights that are not here by their name.
    """
    model, seed = run_config.model, run_config.seeds.init
    own = model.start in STARTS
    path = models.start_file(model, seed) if own else foreign.cached(model.name, model.start)
    if path is None or not path.exists():
        return {}, model.start
    found = _hash(path, path.stat().st_mtime_ns, path.stat().st_size)
    is_file = not own and model.start != foreign.HUB and not foreign.tag(model.name, model.start)
    return {"model.start": "file"} if is_file else {}, found


@functools.lru_cache(maxsize=64)
def _hash(path: Path, *stamp: int) -> str:
    """sha256 of a file, read once for as long as it does not change."""
    return sha256(path)


def folder(run_id: str) -> Path:
    """Where a run is stored."""
    return named(build_folder() / "runs", run_id[:SHORT])


def finished(run_id: str, run_config: RunConfig, result: Result) -> Run:
    """What is stored of a result."""
    about = result.provenance | {
        "seconds": round(result.seconds, 2),
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    return Run(run_id, run_config, about, result.metrics, models.digest(result.model))


def weights_path(run_id: str) -> Path:
    """Where a run's final weights are, if they were kept."""
    return folder(run_id) / "weights.safetensors"


def save(run: Run, model: nn.Module | None = None) -> None:
    """Store a finished run, whole or not at all. model: its network, where its weights are kept."""
    content = {
        "format": FORMAT,
        "id": run.id,
        "config": run.config.to_dict(),
        "weights_sha256": run.weights,
        "provenance": run.provenance,
    }
    with whole_folder(folder(run.id)) as target:
        run.metrics.to_parquet(target / "metrics.parquet", index=False)
        (target / "run.json").write_text(json.dumps(content, indent=1))
        if model is not None:
            models.export(model, target / weights_path(run.id).name)


def final_model(run: Run) -> nn.Module:
    """The network that a stored run ended in; `CmpError` if its weights were not kept, or are
    damaged."""
    path = weights_path(run.id)
    if not path.exists():
        raise CmpError(
            f"run {run.id[:SHORT]}: its weights were not kept; the same `cmp run` with "
            "--keep-weights computes it again and keeps them"
        )
    model = models.from_file(run.config.model.name, path)
    if models.digest(model) != run.weights:
        raise CmpError(f"{path}: damaged: not the weights that run {run.id[:SHORT]} ended in")
    return model


def load(run_id: str) -> Run:
    """Read a stored run; `CmpError` if it is missing or damaged."""
    stored, run_config = about(run_id)
    try:
        metrics = read_table(folder(run_id) / "metrics.parquet", METRICS)
    except (OSError, ValueError) as error:
        raise _unreadable(folder(run_id), error) from error
    return Run(stored.id, run_config, stored.provenance, metrics, stored.weights_sha256)


def about(run_id: str) -> tuple[Stored, RunConfig]:
    """What is stored of a run beside its metrics; `CmpError` as in `load`."""
    place = folder(run_id)
    try:
        stored = parse_record((place / "run.json").read_text(), Stored)
    except (OSError, ValueError) as error:
        raise _unreadable(place, error) from error
    if not stored.id.startswith(run_id):
        raise CmpError(f"{place}: holds run {stored.id[:SHORT]}, not {run_id[:SHORT]}")
    return stored, config.parse(stored.config, str(place))


def _unreadable(place: Path, error: Exception) -> CmpError:
    return CmpError(f"{place}: no readable run ({error}); delete the folder and rerun")


def is_stored(run_id: str) -> bool:
    """Whether a run of this id is finished."""
    return (folder(run_id) / "run.json").exists()


def stored_ids() -> list[str]:
    """The short ids of all finished runs, oldest first."""
    found = (build_folder() / "runs").glob("[0-9a-f]*/run.json")
    return [path.parent.name for path in sorted(found, key=lambda path: path.stat().st_mtime)]


def find(prefix: str) -> Run:
    """The one stored run whose id starts with `prefix`; else `CmpError`."""
    matching = [name for name in stored_ids() if name.startswith(prefix[:SHORT])]
    if len(matching) != 1:
        problem = "no stored run" if not matching else f"{len(matching)} stored runs"
        raise CmpError(f"{prefix!r}: {problem} of this id; `cmp results ls` shows them all")
    run = load(matching[0])
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
