"""Publish results as one Parquet file per study, with one row per (run, task, scope, dataset).

Rows of scope "full" at both ends of a stream contain, as packed bits, which questions were answered
correctly, in the order of `cmp.evaluation.list_questions`. Rows of two more scopes are derived from
them: A_ZS on class names that replay "kept", and on those that it was "lacking".

The chapters are based on these results. The config, weights hash and provenance of each run are
stored in its rows, so anyone can compute it again and compare.
"""

import dataclasses
import functools
import json
import warnings
from pathlib import Path

import numpy as np
import pandas as pd

import cmp
from cmp import config
from cmp.data import Corpus, load_data
from cmp.errors import CmpError, explain_errors
from cmp.evaluation import ROLES, list_questions
from cmp.files import check_digest, child_path, listed_file
from cmp.mixtures import is_kept_concept
from cmp.parsing import read_table
from cmp.runs import identity, lookup, store, verify
from cmp.runs.runner import NO_OBSERVER, Observer
from cmp.runs.store import METRIC_COLUMNS, METRIC_KEYS, RUN_KEYS, StoredRun
from cmp.runs.verify import Verdict
from cmp.scale import devices
from cmp.scale.execution import ExecutionConfig
from cmp.seeds import numpy_generator
from lab.evidence import BOOK, studies

RESULTS = BOOK / "results"
MAX_BYTES = 2_000_000
KEPT, LACKING = "kept", "lacking"
RUN_COLUMNS = {"run": str, "weights": str, "config": pd.Categorical, "provenance": pd.Categorical}
"""Columns with the same value in every row of a run: its id, the hash of its final weights, and two
JSON texts."""


def results_file(name: str) -> Path:
    """Return the path of a study's published results, which may not exist."""
    return child_path(RESULTS, name, ".parquet")


def is_published(name: str) -> bool:
    """Return whether a study has published results, for any `NUMERICS`."""
    return any(RESULTS.glob(results_file(name).name))  # recorded, so chapters see it appear


def published_metrics(name: str) -> pd.DataFrame:
    """Return the published metrics of a study, with settings in the order of its grid.

    Returns:
        The metrics, with `setting`, `replicate`, `run` (the id) and `config` (a JSON text); see the
        module's docstring for `hits` and for what `scope` may be.

    Raises:
        CmpError: There are none, or they are stale because they have another `NUMERICS`.
    """
    frame = _read_results(name)
    numerics = {json.loads(text)["numerics"] for text in frame["provenance"].unique()}
    if numerics != {cmp.NUMERICS}:
        raise CmpError(
            f"results of study {name}: computed with NUMERICS "
            f"{', '.join(map(str, sorted(numerics)))}, not {cmp.NUMERICS}; run `cmpt "
            f"study {name} --publish` to compute them again"
        )
    order = {name: number for number, name in enumerate(studies.load_study(name).settings)}
    frame = frame.drop(columns=["weights", "provenance"])
    return frame.sort_values("setting", key=lambda names: names.map(order), kind="stable")


def _read_results(name: str) -> pd.DataFrame:
    path = results_file(name)
    remedy = f"write it with `cmpt study {name} --publish`"
    if not path.exists():
        raise CmpError(f"{path}: not published; use a checkout of the project, or {remedy}")
    check_digest(path, remedy)
    errors = (LookupError, TypeError, RecursionError)
    with explain_errors(f"{path}: cannot be read", f"; {remedy}", *errors):
        frame = read_table(path, {"setting": str, "replicate": int} | RUN_COLUMNS | METRIC_COLUMNS)
        for text in frame["provenance"].unique():
            provenance = json.loads(text)
            for key in ("numerics", "threads"):
                if not isinstance(provenance[key], int):
                    raise ValueError(f"provenance: {key}: must be a number")
    return frame


def setting_configs(published: pd.DataFrame) -> dict[str, config.RunConfig]:
    """Return the config of one run of each setting.

    Args:
        published: The result of `published_metrics`.
    """
    one = published.drop_duplicates("setting")
    trees = zip(one["setting"], one["config"], strict=True)
    return {name: config.parse(json.loads(tree), f"setting {name!r}") for name, tree in trees}


def publish_study(study: studies.Study, profile: str = "cpu") -> Path:
    """Write a study's metrics to `book/results/NAME.parquet`, sorted.

    A replicate is published once all settings have it. Runs that are not in the store are taken
    from the previously published file, if they are the same.

    Raises:
        CmpError: No replicate is complete, the study mixes validation with other splits, or the
            file is too large.
    """
    path, configs = results_file(study.name), study.configs(profile)
    grid = {key: identity.run_id_of(each) for key, each in configs.items()}
    ids = set(grid.values())
    runs = {run_id: store.load_run(run_id) for run_id in ids if store.is_stored(run_id)}
    if runs.keys() != ids and path.exists():
        runs = {run.id: run for run in published_runs(study.name) if run.id in ids} | runs
    splits = {run_config.evaluation.split for run_config in configs.values()}
    if "validation" in splits and len(splits) > 1:
        raise CmpError(
            f"study {study.name}: validation scores justify a choice, and must be in a study of "
            "their own"
        )
    missing = {key: run_id for key, run_id in grid.items() if run_id not in runs}
    incomplete = {replicate for _, replicate in missing}
    grid = {key: run_id for key, run_id in grid.items() if key[1] not in incomplete}
    if not grid:
        count = len(set(missing.values()))
        raise CmpError(f"study {study.name}: {count} runs are missing; compute them first")
    tables, frames = {run_id: _metrics_with_hits(run) for run_id, run in runs.items()}, []
    for (setting, replicate), run_id in grid.items():
        run = runs[run_id]
        texts = json.dumps(run.config.to_dict()), json.dumps(run.provenance)
        columns = dict(zip(RUN_COLUMNS, (run_id, run.weights, *texts), strict=True))
        frames.append(tables[run_id].assign(setting=setting, replicate=replicate, **columns))
    table = pd.concat(frames).set_index([*RUN_KEYS, *METRIC_KEYS]).sort_index().reset_index()
    with listed_file(path) as partial:
        table.to_parquet(partial, index=False, compression="zstd", compression_level=19)
        if (size := partial.stat().st_size) > MAX_BYTES:
            raise CmpError(
                f"{path}: {size / 1e6:.1f} MB, more than {MAX_BYTES / 1e6:g}: reduce the grid"
            )
    return path


def _metrics_with_hits(run: StoredRun) -> pd.DataFrame:
    """Return a run's metrics with a column `hits` and, if only half of the pool's names are
    replayed, the scores on these names and on the others."""
    ends = {f"{task}/" for task in (0, run.config.stream.tasks)}
    hits = {name: x for name, x in run.hits.items() if name.startswith(tuple(ends))}
    if not hits or run.config.evaluation.split != "test":
        return run.metrics
    keys = run.metrics["task"].astype(str) + "/" + run.metrics["dataset"]
    packed = {name: np.packbits(x).tobytes() for name, x in hits.items()}
    is_full = run.metrics["scope"] == "full"
    metrics = run.metrics.assign(hits=keys.map(packed).where(is_full, None))
    if run.config.mixture.select != "concepts":
        return metrics
    corpus = load_data(run.config.data)
    questions, parts = list_questions(corpus), [metrics]
    for scope, chosen in name_groups(corpus, run.config.seeds.data).items():
        rows = metrics[is_full & (metrics["role"] == ROLES["A_ZS"]) & keys.isin(hits)]
        scores = []
        for key, name in zip(keys[rows.index], rows["dataset"], strict=True):
            of_dataset = (questions["dataset"] == name).to_numpy()
            weights = questions["weight"].to_numpy()[of_dataset] * chosen[of_dataset]
            scores.append(100 * float(weights @ hits[key] / weights.sum()))
        columns = ["task", "dataset", "role", "metric", "chance"]
        parts.append(rows[columns].assign(scope=scope, score=scores))
    return pd.concat(parts, ignore_index=True)


@functools.lru_cache(maxsize=4)
def question_counts(corpus: Corpus) -> dict[str, int]:
    """Return the number of test questions of each dataset, in the order of `list_questions`."""
    return list_questions(corpus).groupby("dataset", sort=False).size().to_dict()


@functools.lru_cache(maxsize=64)
def name_groups(corpus: Corpus, seed: int) -> dict[str, np.ndarray]:
    """Return which test questions are about class names that replay "kept" or was "lacking".

    Names that also arrive in an update are in neither group.

    Args:
        corpus: The data.
        seed: The data seed of a run, see `cmp.mixtures.is_kept_concept`.
    """
    labels = corpus.table["label"].iloc[list_questions(corpus)["row"]]
    new = {name for each in corpus.by_role("adapt") for name in corpus.classes[each]}
    is_new = labels.isin(new).to_numpy()
    is_kept = is_kept_concept(labels, seed)
    return {KEPT: is_kept & ~is_new, LACKING: ~is_kept & ~is_new}


def unpack_hits(packed: bytes, count: int) -> np.ndarray:
    """Return the hits of a dataset, bool, from the packed bits in a row of published metrics.

    Args:
        packed: The bits.
        count: The number of questions of the dataset, see `question_counts`.
    """
    return np.unpackbits(np.frombuffer(packed, np.uint8), count=count).astype(bool)


def published_runs(name: str) -> list[StoredRun]:
    """Return the published runs of a study, by setting and replicate."""
    runs = []
    for run_id, rows in _read_results(name).groupby("run", sort=False):
        weights, tree, provenance = rows.iloc[0][["weights", "config", "provenance"]]
        run_config = config.parse(json.loads(tree), f"results of study {name}")
        # two settings with the same config are one run, with rows for each
        rows = rows[~rows["scope"].isin([KEPT, LACKING])]
        metrics = rows.drop(columns=[*RUN_KEYS, *RUN_COLUMNS])
        metrics = metrics.drop_duplicates(METRIC_KEYS, ignore_index=True)
        rows = metrics.dropna(subset="hits") if "hits" in metrics else metrics[:0]
        counts = question_counts(load_data(run_config.data)) if len(rows) else {}
        hits = {
            f"{row.task}/{row.dataset}": unpack_hits(row.hits, counts[row.dataset])
            for row in rows.itertuples()
        }
        metrics = metrics.drop(columns="hits", errors="ignore")
        content = (run_config, json.loads(provenance), metrics, weights)
        runs.append(StoredRun(run_id, *content, hits=hits))
    return runs


def restore_runs(study: studies.Study, profile: str, dry_run: bool = False) -> int:
    """Store published runs of a study that are neither in the store nor stale, so that they need
    not be computed here.

    Runs are published in the study's own profile, and some in `quick`, see
    `lab.evidence.studies.band_of`. If the file cannot be read, warn.

    Args:
        study: The study.
        profile: The profile in which its runs are needed.
        dry_run: Whether to only count the runs.

    Returns:
        The number of these runs.
    """
    band = f"{studies.BAND}{study.name.removeprefix(studies.BAND)}"
    name = {"quick": band, study.profile: study.name}.get(profile)
    try:
        published = published_runs(name) if name and is_published(name) else []
    except CmpError as error:
        warnings.warn(f"{error}; its runs are computed again", stacklevel=2)
        return 0
    count = 0
    for run in published:
        if store.is_stored(run.id) or not identity.has_start(run.config):
            continue
        content = identity.run_identity(run.config)
        if identity.json_digest(content) == run.id:
            count += 1
            if not dry_run:
                store.save_run(dataclasses.replace(run, identity=content))
    return count


def find_run(prefix: str) -> StoredRun:
    """Return the only run, published or stored, whose id starts with a prefix; raise `CmpError`
    otherwise."""
    studies_of = {
        run_id: path.stem
        for path in RESULTS.glob("*.parquet")
        for run_id in pd.read_parquet(path, columns=["run"])["run"].unique()
        if run_id.startswith(prefix)
    }
    if len(studies_of) != 1:
        return lookup.find_run(prefix)
    [(run_id, name)] = studies_of.items()
    return next(run for run in published_runs(name) if run.id == run_id)


def sample_published(count: int, seed: int) -> list[StoredRun]:
    """Return a random sample of published runs with starting weights on this machine.

    Args:
        count: The largest number of runs.
        seed: The seed of the sample.
    """
    names = sorted(path.stem for path in RESULTS.glob("*.parquet"))
    published = [run for name in names for run in published_runs(name)]
    runs = [run for run in published if identity.has_start(run.config)]
    order = numpy_generator("sample of results", seed).permutation(len(runs))
    return [runs[number] for number in order[:count]]


def verify_published(
    run: StoredRun,
    observer: Observer = NO_OBSERVER,
    device: str = "cpu",
    execution: ExecutionConfig | None = None,
) -> Verdict:
    """Compute a run again and compare. A run with another `NUMERICS` or other data counts as
    different."""
    devices.check_device(device)
    store.check_sources(run.id, run.provenance.get("options", {}))
    corpus = load_data(run.config.data)
    if identity.run_id_of(run.config, corpus) != run.id:
        reason = "it is stale: its NUMERICS, data or starting weights have changed"
        return Verdict("different", reason)
    return verify.verify_run(run, corpus, observer, device, execution)
