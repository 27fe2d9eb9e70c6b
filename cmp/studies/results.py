"""Published results: one Parquet file a chapter, a row a (run, task, scope, dataset).

Chapters argue from these. Each run's config, weights' hash and provenance stand beside its rows, so
anyone can compute it again and compare.
"""

import json
from pathlib import Path

import pandas as pd

from cmp import NUMERICS, config, models, runs, studies
from cmp.data import corpus as corpora
from cmp.errors import CmpError
from cmp.files import whole_file
from cmp.paths import ROOT, named
from cmp.runs import Observer, provenance, store, verification
from cmp.runs.store import Run
from cmp.runs.verification import Verdict
from cmp.seeds import numpy_generator
from cmp.studies import Study
from cmp.tables import METRICS, read_table

RESULTS = ROOT / "book" / "results"
MAX_BYTES = 2_000_000
KEYS = ["setting", "replicate", "task", "scope", "dataset"]
ABOUT = {"run": str, "weights": str, "config": str, "provenance": str}
"""What stands in every row of a run: its id, its final weights' hash, and two JSON texts."""


def published(chapter: str) -> pd.DataFrame:
    """The published metrics of a chapter's study, settings in the order of its grid; with `run`,
    the id, and `config`, a JSON text.

    `CmpError` if there are none, or they are of another `NUMERICS`: stale results are computed
    again, never used.
    """
    frame = _read(chapter)
    numerics = {json.loads(text)["numerics"] for text in frame["provenance"].unique()}
    if numerics != {NUMERICS}:
        found = ", ".join(map(str, sorted(numerics)))
        raise CmpError(
            f"results of chapter {chapter}: of NUMERICS {found}, but this is {NUMERICS}; "
            f"`cmp study {chapter} --publish` computes them again"
        )
    order = {name: place for place, name in enumerate(studies.load(chapter).settings)}
    frame = frame.drop(columns=["weights", "provenance"])
    return frame.sort_values("setting", key=lambda names: names.map(order), kind="stable")


def file_of(chapter: str) -> Path:
    """Where a study's published results are, or would be."""
    return named(RESULTS, chapter, ".parquet")


def is_published(chapter: str) -> bool:
    """Whether a study has published results, of whatever `NUMERICS`."""
    return file_of(chapter).exists()


def _read(chapter: str) -> pd.DataFrame:
    path = file_of(chapter)
    again = f"`cmp study {chapter} --publish` writes it"
    if not path.exists():
        raise CmpError(f"{path}: not published yet; {again}")
    try:
        frame = read_table(path, {"setting": str, "replicate": int} | ABOUT | METRICS)
        for text in frame["provenance"].unique():
            about = json.loads(text)
            for key in ("numerics", "threads"):
                if not isinstance(about[key], int):
                    raise ValueError(f"provenance: {key}: must be a number")
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise CmpError(f"{path}: cannot be read ({error}); {again}") from error
    return frame


def publish(study: Study, profile: str = "cpu") -> Path:
    """Write a study's metrics to `book/results/NN.parquet`, sorted; every run must be there.

    Runs that are not in the store are taken over from what was published, if they are the same.
    """
    path = file_of(study.chapter)
    configs = study.configs(profile).items()
    grid = {key: store.identify(each, corpora.of(each)) for key, each in configs}
    found = {each: store.load(each) for each in set(grid.values()) if store.is_stored(each)}
    if found.keys() != set(grid.values()) and path.exists():
        found = {run.id: run for run in runs_of(study.chapter)} | found
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
        _tidy(found[run_id]).assign(setting=setting, replicate=replicate)
        for (setting, replicate), run_id in grid.items()
    ]
    table = pd.concat(frames).sort_values(KEYS)
    table = table[KEYS + [name for name in table if name not in KEYS]]
    with whole_file(path) as partial:
        table.to_parquet(partial, index=False)
        if (size := partial.stat().st_size) > MAX_BYTES:
            raise CmpError(
                f"{path}: {size / 1e6:.1f} MB, more than {MAX_BYTES / 1e6:g}: cut the grid"
            )
    return path


def _tidy(run: Run) -> pd.DataFrame:
    about = (run.id, run.weights, json.dumps(run.config.to_dict()), json.dumps(run.provenance))
    frame = run.metrics.assign(**dict(zip(ABOUT, about, strict=True)))
    frame.attrs.clear()
    return frame


def runs_of(chapter: str) -> list[Run]:
    """The published runs of a chapter, by setting and replicate."""
    found = []
    for run_id, rows in _read(chapter).groupby("run", sort=False):
        weights, tree, about = rows.iloc[0][["weights", "config", "provenance"]]
        run_config = config.parse(json.loads(tree), f"results of chapter {chapter}")
        # two settings that come to the same are one run, and its rows stand there for each
        metrics = rows.drop(columns=["setting", "replicate", *ABOUT]).drop_duplicates(
            ["task", "scope", "dataset"], ignore_index=True
        )
        found.append(Run(run_id, run_config, json.loads(about), metrics, weights))
    return found


def all_runs() -> list[Run]:
    """Every published run of the book."""
    chapters = sorted(path.stem for path in RESULTS.glob("*.parquet"))
    return [run for chapter in chapters for run in runs_of(chapter)]


def sample(count: int, seed: int) -> list[Run]:
    """Some published runs of those that can be computed here, drawn anew for every seed: a base
    that does not ship may be missing."""
    everything = [each for each in all_runs() if models.has_start(each.config)]
    order = numpy_generator("sample of results", seed).permutation(len(everything))
    return [everything[place] for place in order[:count]]


def compare(run: Run) -> tuple[Verdict, pd.DataFrame]:
    """A published run against the one in the store: the verdict, as of `verify`, and the rows of
    `cmp.runs.verification.moved` that are not equal. A run that is not stored is "missing"."""
    if not store.is_stored(run.id):
        return Verdict("missing", "it is not in the store"), pd.DataFrame()
    again = store.load(run.id)
    elsewhere = provenance.differences(run.provenance, again.provenance)
    if "began" in run.provenance or "began" in again.provenance:
        elsewhere = elsewhere or "a run was computed in two places"
    equal = again.weights == run.weights
    rows = verification.moved(run.metrics, again.metrics)
    verdict = verification.compare(run.metrics, again.metrics, equal, elsewhere)
    return verdict, rows[rows["moved"] != 0]


def verify(run: Run, observer: Observer = runs.SILENT) -> Verdict:
    """Compute a run again and compare; one of another `NUMERICS` or other data is different."""
    corpus = corpora.of(run.config)
    if store.identify(run.config, corpus) != run.id:
        reason = "its id is of another NUMERICS, other data or other starting weights: it is stale"
        return Verdict("different", reason)
    return verification.verify(run, corpus, observer)
