"""Store finished runs by id, so that they are never computed again.

A run's id is the hash of what determines its result: config, data, starting weights and `NUMERICS`.
Everything else that may affect its last bits (versions, processor, threads) is stored with the
result.

Everything about a run is in one folder, `runs/ID` of the build folder. While it is computed, this
contains:

* `lock`, by which one process at a time computes the run;
* the last two checkpoints, `task-T-step-S-HASH.safetensors`, see `cmp.runs.checkpoints`, whose
  headers say what the run is: its config, its machine with versions, and the sources of options of
  the user's own;
* `model-T-HASH.safetensors`, the model deployed after the last task, and `base-S-HASH.safetensors`,
  the base before the cooldown of a pretraining;
* `log.jsonl`, see `cmp.runs.logs`, and `diverged.json` if training diverged.

At the end come `metrics.parquet`, `hits.safetensors` if whole test sets were scored,
`weights.safetensors` if the weights are kept, and last `run.json`, which marks the run as finished.
It contains what the id is the hash of, and the sha256 of the other three and of itself. All of
these are checked when a run is read. Version 0.3 left finished runs in the same files.

Once `run.json` is on the disk, the checkpoints and the lock are deleted, and the log stays. If the
process is killed before that, the next call for this run deletes them. `cmpt results rm ID` deletes
a run, finished or not, but keeps files that a user has put into its folder.

There is no index of runs. A run is found by the start of its id, which is the name of its folder,
and only the files of this run are opened: among 4,000 runs, this takes 0.2 seconds.
"""

import contextlib
import datetime
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from pydantic.dataclasses import dataclass as checked_dataclass
from safetensors import SafetensorError, safe_open

from cmp import config, models, registry
from cmp.config import RunConfig
from cmp.errors import CmpError, explain_errors
from cmp.evaluation import ROLES
from cmp.files import (
    SHORT_ID,
    WEIGHTS,
    file_digest,
    partial_folder,
    report_disk_errors,
    save_tensors,
    sync_to_disk,
)
from cmp.parsing import parse_json, parse_record, read_json, read_table, refuse_later
from cmp.project import build_folder
from cmp.runs.checkpoints import run_folder
from cmp.runs.identity import PLACEHOLDERS, json_digest
from cmp.runs.runner import RunResult
from cmp.starts import RUN_PREFIX
from cmp.values import STRICT

METRIC_COLUMNS = {"task": int, "scope": str, "dataset": str, "role": str, "score": float}
"""Columns in the metrics of every run."""
METRIC_KEYS = ["task", "scope", "dataset"]
RUN_KEYS = ["setting", "replicate"]
"""Columns that distinguish the runs of a study."""
RUN_FORMAT = 3
RECORD, METRICS, HITS = "run.json", "metrics.parquet", "hits.safetensors"
"""Files of a run besides its weights."""
FILES = (RECORD, METRICS, HITS, WEIGHTS)
"""All files of a finished run. The record comes last when they are written, and first when they are
deleted."""
COUNTS = "counts"
"""The key in the header of `HITS` with the number of questions of each dataset."""
RERUN = "; delete the folder and rerun"


@checked_dataclass(frozen=True, config=STRICT)
class RunRecord:
    """The content of `run.json`.

    Attributes:
        format: The version of the layout.
        id: The run's id.
        identity: What the id is the hash of, see `run_identity`.
        config: The config as a tree.
        weights_sha256: The hash of the final weights, see `cmp.models.weights_digest`.
        provenance: Where and when the run was computed, and how many seconds it took.
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
            raise ValueError("identity: does not match the id")


@dataclass(frozen=True)
class StoredRun:
    """A finished run.

    Attributes:
        id: The run's id.
        config: The run's config.
        provenance: Where and when it was computed, and how many seconds it took.
        metrics: One row per (task, scope, dataset), see `cmp.runs.runner.RunResult`.
        weights: The hash of the final weights, see `cmp.models.weights_digest`.
        identity: What the id is the hash of; empty for a published run.
        hits: Which questions of whole test sets were answered correctly, see
            `cmp.runs.runner.RunResult`.
    """

    id: str
    config: RunConfig
    provenance: dict[str, Any]
    metrics: pd.DataFrame
    weights: str
    identity: dict[str, Any] = field(default_factory=dict)
    hits: dict[str, np.ndarray] = field(default_factory=dict)


def weights_path(run_id: str) -> Path:
    """Return the path of a run's final weights, which exists only if they were kept."""
    return run_folder(run_id) / WEIGHTS


def make_stored_run(
    run_config: RunConfig, result: RunResult, identity: dict[str, Any]
) -> StoredRun:
    """Return a run's result in the form that is stored; `identity` comes from `run_identity`."""
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
    """Store a finished run atomically.

    A run that is stored again, since its weights were not kept before, is unfinished for a moment.
    If a kill comes then, it is finished from its last checkpoint.

    Args:
        run: The run.
        model: The run's network, if its final weights should be kept.

    Raises:
        CmpError: Writing failed; the checkpoints are unchanged.
    """
    target = run_folder(run.id)
    with (
        report_disk_errors(f"{target}:", "its checkpoints are kept"),
        partial_folder(target) as folder,
    ):
        run.metrics.to_parquet(folder / METRICS, index=False)
        if run.hits:
            bits = {name: torch.from_numpy(np.packbits(hits)) for name, hits in run.hits.items()}
            counts = {name: len(hits) for name, hits in run.hits.items()}
            # a single key, since safetensors writes several in random order
            save_tensors(bits, folder / HITS, {COUNTS: json.dumps(counts, sort_keys=True)})
        if model is not None:
            models.export_weights(model, folder / WEIGHTS)
        files = {path.name: file_digest(path) for path in folder.iterdir()}
        tree = run.config.to_dict()
        content = (run.id, run.identity, tree, run.weights, run.provenance, files)
        record = asdict(RunRecord(RUN_FORMAT, *content))
        record["sha256"] = json_digest(record)
        (folder / RECORD).write_text(json.dumps(record, indent=1))
        for path in folder.iterdir():
            sync_to_disk(path)
        for name in FILES:
            (target / name).unlink(missing_ok=True)
        for name in files:
            os.replace(folder / name, target / name)
        sync_to_disk(target)  # a record on the disk means that the other files are there, too
        os.replace(folder / RECORD, target / RECORD)
        sync_to_disk(target)


def final_model(run: StoredRun) -> models.Network:
    """Return the final network of a stored run.

    Raises:
        CmpError: The weights were not kept, or are damaged.
    """
    return models.load_from_file(run.config.model.name, kept_path(run))


def kept_path(run: StoredRun) -> Path:
    """Return the file of a stored run's final weights.

    Raises:
        CmpError: The weights were not kept, or the file is damaged.
    """
    path = weights_path(run.id)
    if not path.exists():
        raise CmpError(
            f"run {run.id[:SHORT_ID]}: its weights were not kept; run the same `cmpt run` with "
            "--keep-weights"
        )
    with explain_errors(f"{path.parent}: cannot be read as a run", RERUN):
        _check_file(load_record(run.id)[0], path)
    return path


def load_run(run_id: str) -> StoredRun:
    """Return a stored run; raise `CmpError` if it is missing or damaged."""
    record, run_config = load_record(run_id)
    folder, hits = run_folder(run_id), {}
    with explain_errors(f"{folder}: cannot be read as a run", RERUN, SafetensorError):
        _check_file(record, folder / METRICS)
        metrics = read_table(folder / METRICS, METRIC_COLUMNS)
        if metrics.empty:
            raise ValueError(f"{METRICS}: contains no scores")
        if HITS in record.files:
            _check_file(record, folder / HITS)
            with safe_open(folder / HITS, framework="np") as file:
                counts = file.metadata()
                if COUNTS in counts:  # 0.2.0 wrote one key per dataset
                    counts = parse_json(counts[COUNTS])
                for name, count in counts.items():
                    hits[name] = np.unpackbits(file.get_tensor(name), count=int(count)) == 1
    content = (record.provenance, metrics, record.weights_sha256, record.identity, hits)
    return StoredRun(record.id, run_config, *content)


def _check_file(record: RunRecord, path: Path) -> None:
    """Raise `ValueError` if a file of a run is damaged."""
    if file_digest(path) != record.files.get(path.name):
        raise ValueError(f"{path.name} is damaged: it does not match its hash")


def load_record(run_id: str) -> tuple[RunRecord, RunConfig]:
    """Return a stored run's record and config; raise `CmpError` as `load_run` does."""
    folder = run_folder(run_id)
    with explain_errors(f"{folder}: cannot be read as a run", RERUN):
        record = _read_record(folder / RECORD)
        if not record.id.startswith(run_id):
            raise CmpError(
                f"{folder}: contains run {record.id[:SHORT_ID]}, not {run_id[:SHORT_ID]}"
            )
        check_sources(record.id, record.provenance.get("options", {}), digests=False)
        run_config = config.parse(record.config, str(folder))
        stored, changes = record.identity.get("config", {}), run_config.changes()
        paths = {k: x for k, x in PLACEHOLDERS.items() if k in changes and stored.get(k) == x}
        if json_digest(changes | paths) != json_digest(stored):
            raise ValueError(
                "config: does not match the id, or comes from a version with other defaults"
            )
    return record, run_config


def _read_record(path: Path) -> RunRecord:
    """Return the content of `run.json`; raise `ValueError` if it is damaged, and `CmpError` if a
    later version wrote it."""
    tree = read_json(path)
    refuse_later(tree, "format", RUN_FORMAT, path)
    if not isinstance(tree, dict) or tree.get("format") != RUN_FORMAT:
        raise ValueError(f"run.json does not have format {RUN_FORMAT}: another version wrote it")
    if tree.pop("sha256", "") != json_digest(tree):
        raise ValueError("run.json is damaged: it does not match its hash")
    return parse_record(json.dumps(tree), RunRecord)


def check_sources(run_id: str, options: dict[str, dict[str, Any]], digests: bool = True) -> None:
    """Check that all options of a run from outside the package are registered.

    Args:
        run_id: The run's id.
        options: The record of these options by "kind:name", see
            `cmp.config.RunConfig.option_record`.
        digests: Whether their sources must be the same as in the run.

    Raises:
        CmpError: An option is not registered, or its source differs.
    """
    for name, recorded in options.items():
        kind, _, option = name.partition(":")
        run, words = f"run {run_id[:SHORT_ID]}", f"{kind.replace('_', ' ')} {option!r}"
        if option not in registry.option_names(kind):
            raise CmpError(
                f"{run} uses the {words}, which is not registered; use `cmpt --plugin FILE ...` "
                "with the file that registers it"
            )
        if digests and registry.get_option(kind, option).digest != recorded["sha256"]:
            raise CmpError(
                f"{run} was computed with a different source of the {words}; see the stored one"
            )


def is_stored(run_id: str) -> bool:
    """Return whether a run with this id is finished."""
    return (run_folder(run_id) / RECORD).exists()


def stored_ids() -> list[str]:
    """Return the short ids of all finished runs, oldest first."""
    saved_at = {}
    for path in (build_folder() / "runs").glob(f"[0-9a-f]*/{RECORD}"):
        with contextlib.suppress(FileNotFoundError):  # it has just been deleted
            saved_at[path.parent.name] = path.stat().st_mtime
    return sorted(saved_at, key=lambda name: saved_at[name])


def trajectory(metrics: pd.DataFrame) -> pd.DataFrame:
    """Return the aggregate scores of runs over their streams, as `Scores.summary` defines them.

    Args:
        metrics: As in `StoredRun`, or of several runs distinguished by `setting` and `replicate`.

    Returns:
        One row per (task, scope), and per setting and replicate if there are several: `A_KA`,
        `A_ZS` and their geometric mean `GM`, in percent, or NaN if no dataset with that role was
        scored.
    """
    keys = [key for key in RUN_KEYS if key in metrics] + ["task", "scope"]
    means = metrics.groupby([*keys, "role"], sort=False)["score"].mean().unstack()
    table = means.reindex(columns=[*ROLES.values()]).set_axis([*ROLES], axis=1)
    table["GM"] = np.sqrt(table["A_KA"] * table["A_ZS"])
    return table.rename_axis(columns=None).reset_index()


def after_last_task(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of each run after its last task.

    Args:
        table: Metrics or a trajectory; several runs are distinguished by `setting` and `replicate`.
    """
    keys = [key for key in RUN_KEYS if key in table]
    last = table.groupby(keys)["task"].transform("max") if keys else table["task"].max()
    return table[table["task"] == last]


def final_scores(trajectory: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of a `trajectory` after each run's last task, on the largest test that was
    scored then.

    Raises:
        CmpError: Only some of the runs were scored on the full test, so they cannot be compared.
    """
    last = after_last_task(trajectory)  # first, as an update may score less than those before it
    is_full = last["scope"] == "full"
    if not is_full.any():
        return last[last["scope"] == "subset"]
    if keys := [key for key in RUN_KEYS if key in last]:
        has_full = is_full.groupby([last[key] for key in keys]).transform("any")
        if not has_full.all():
            names = ", ".join(map(repr, last.loc[~has_full, keys[0]].unique()))
            raise CmpError(
                f"trajectory: {keys[0]} {names}: scored on a subset, and others on the full test; "
                "compare them by themselves, or compute them again with evaluation.full=true"
            )
    return last[is_full]
