"""Published results: one Parquet file a chapter, a row a (run, task, scope, dataset).

Chapters argue from these. Each run's config, weights' hash and provenance stand beside its rows, so
anyone can compute it again and compare.
"""

import json
from pathlib import Path

import pandas as pd

from cmp import NUMERICS, config, models
from cmp.data import load_corpus
from cmp.errors import CmpError
from cmp.experiments import store, studies
from cmp.experiments.store import METRIC_COLUMNS, StoredRun, Verdict
from cmp.experiments.studies import Study
from cmp.files import atomic_file, child_path, project_folder, read_table
from cmp.runner import NO_OBSERVER, Observer, machine_differences
from cmp.seeds import numpy_generator

RESULTS = project_folder() / "book" / "results"
MAX_BYTES = 2_000_000
RESULT_KEYS = ["setting", "replicate", "task", "scope", "dataset"]
RUN_COLUMNS = {"run": str, "weights": str, "config": str, "provenance": str}
"""What stands in every row of a run: its id, its final weights' hash, and two JSON texts."""


def published_metrics(chapter: str) -> pd.DataFrame:
    """The published metrics of a chapter's study, settings in the order of its grid; with `run`,
    the id, and `config`, a JSON text.

    `CmpError` if there are none, or they are of another `NUMERICS`: stale results are computed
    again, never used.
    """
    frame = _read_results(chapter)
    numerics = {json.loads(text)["numerics"] for text in frame["provenance"].unique()}
    if numerics != {NUMERICS}:
        found = ", ".join(map(str, sorted(numerics)))
        raise CmpError(
            f"results of chapter {chapter}: of NUMERICS {found}, but this is {NUMERICS}; "
            f"`cmpt study {chapter} --publish` computes them again"
        )
    order = {name: place for place, name in enumerate(studies.load_study(chapter).settings)}
    frame = frame.drop(columns=["weights", "provenance"])
    return frame.sort_values("setting", key=lambda names: names.map(order), kind="stable")


def results_file(chapter: str) -> Path:
    """Where a study's published results are, or would be."""
    return child_path(RESULTS, chapter, ".parquet")


def is_published(chapter: str) -> bool:
    """Whether a study has published results, of whatever `NUMERICS`."""
    return results_file(chapter).exists()


def _read_results(chapter: str) -> pd.DataFrame:
    path = results_file(chapter)
    again = f"`cmpt study {chapter} --publish` writes it"
    if not path.exists():
        raise CmpError(f"{path}: not published yet; {again}")
    try:
        frame = read_table(path, {"setting": str, "replicate": int} | RUN_COLUMNS | METRIC_COLUMNS)
        for text in frame["provenance"].unique():
            about = json.loads(text)
            for key in ("numerics", "threads"):
                if not isinstance(about[key], int):
                    raise ValueError(f"provenance: {key}: must be a number")
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise CmpError(f"{path}: cannot be read ({error}); {again}") from error
    return frame


def publish_study(study: Study, profile: str = "cpu") -> Path:
    """Write a study's metrics to `book/results/NN.parquet`, sorted; every run must be there.

    Runs that are not in the store are taken over from what was published, if they are the same.
    """
    path = results_file(study.chapter)
    configs = study.configs(profile).items()
    grid = {key: store.run_id_of(each, load_corpus(each)) for key, each in configs}
    found = {each: store.load_run(each) for each in set(grid.values()) if store.is_stored(each)}
    if found.keys() != set(grid.values()) and path.exists():
        found = {run.id: run for run in published_runs(study.chapter)} | found
    splits = {each.evaluation.split for each in study.configs(profile).values()}
    if "validation" in splits and (len(splits) > 1 or study.claims):
        raise CmpError(
            f"study {study.chapter}: scores of a validation split are published by themselves, as "
            "the grounds of a choice, and bear no claims"
        )
    if lacking := set(grid.values()) - found.keys():
        raise CmpError(
            f"study {study.chapter}: {len(lacking)} runs are missing; compute them first"
        )
    frames = [
        _result_rows(found[run_id]).assign(setting=setting, replicate=replicate)
        for (setting, replicate), run_id in grid.items()
    ]
    table = pd.concat(frames).sort_values(RESULT_KEYS)
    table = table[RESULT_KEYS + [name for name in table if name not in RESULT_KEYS]]
    with atomic_file(path) as partial:
        table.to_parquet(partial, index=False)
        if (size := partial.stat().st_size) > MAX_BYTES:
            raise CmpError(
                f"{path}: {size / 1e6:.1f} MB, more than {MAX_BYTES / 1e6:g}: cut the grid"
            )
    return path


def _result_rows(run: StoredRun) -> pd.DataFrame:
    about = (run.id, run.weights, json.dumps(run.config.to_dict()), json.dumps(run.provenance))
    frame = run.metrics.assign(**dict(zip(RUN_COLUMNS, about, strict=True)))
    frame.attrs.clear()
    return frame


def published_runs(chapter: str) -> list[StoredRun]:
    """The published runs of a chapter, by setting and replicate."""
    found = []
    for run_id, rows in _read_results(chapter).groupby("run", sort=False):
        weights, tree, about = rows.iloc[0][["weights", "config", "provenance"]]
        run_config = config.parse(json.loads(tree), f"results of chapter {chapter}")
        # two settings that come to the same are one run, and its rows stand there for each
        metrics = rows.drop(columns=["setting", "replicate", *RUN_COLUMNS]).drop_duplicates(
            ["task", "scope", "dataset"], ignore_index=True
        )
        found.append(StoredRun(run_id, run_config, json.loads(about), metrics, weights))
    return found


def all_published_runs() -> list[StoredRun]:
    """Every published run of the book."""
    chapters = sorted(path.stem for path in RESULTS.glob("*.parquet"))
    return [run for chapter in chapters for run in published_runs(chapter)]


def sample_published(count: int, seed: int) -> list[StoredRun]:
    """Some published runs of those that can be computed here, drawn anew for every seed: a base
    that does not ship may be missing."""
    everything = [each for each in all_published_runs() if models.has_start(each.config)]
    order = numpy_generator("sample of results", seed).permutation(len(everything))
    return [everything[place] for place in order[:count]]


def compare_with_store(run: StoredRun) -> tuple[Verdict, pd.DataFrame]:
    """A published run against the one in the store: the verdict, as of `verify`, and the rows of
    `cmp.runs.verification.moved` that are not equal. A run that is not stored is "missing"."""
    if not store.is_stored(run.id):
        return Verdict("missing", "it is not in the store"), pd.DataFrame()
    again = store.load_run(run.id)
    elsewhere = machine_differences(run.provenance, again.provenance)
    if "began" in run.provenance or "began" in again.provenance:
        elsewhere = elsewhere or "a run was computed in two places"
    equal = again.weights == run.weights
    rows = store.score_changes(run.metrics, again.metrics)
    verdict = store.compare_metrics(run.metrics, again.metrics, equal, elsewhere)
    return verdict, rows[rows["moved"] != 0]


def verify_published(run: StoredRun, observer: Observer = NO_OBSERVER) -> Verdict:
    """Compute a run again and compare; one of another `NUMERICS` or other data is different."""
    corpus = load_corpus(run.config)
    if store.run_id_of(run.config, corpus) != run.id:
        reason = "its id is of another NUMERICS, other data or other starting weights: it is stale"
        return Verdict("different", reason)
    return store.verify_run(run, corpus, observer)
