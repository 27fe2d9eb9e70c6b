"""A study: a grid of settings and replicates, each run computed once and then looked up.

`book/studies/NN.yaml` states a chapter's grid: for each setting what it changes in the profile
(`joint: true` makes it the joint upper bound), how many replicates, and which settings are `live`,
that is, recomputed in `quick`. Replicate r takes base r and stream r, paired across settings.
"""

import concurrent.futures
import multiprocessing
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm.auto import tqdm

from cmp import config, runs, store
from cmp.checkpoints import Keeper
from cmp.config import RunConfig
from cmp.data import corpus as corpora
from cmp.errors import CmpError
from cmp.files import read_yaml
from cmp.paths import ROOT, SHORT

STUDIES = ROOT / "book" / "studies"
RESULTS = ROOT / "book" / "results"
MAX_LIVE = 4


@dataclass(frozen=True)
class Study:
    """A chapter's grid. settings: name -> (assignments to the profile, whether joint)."""

    chapter: str
    question: str
    replicates: int
    live: tuple[str, ...]
    settings: dict[str, dict[str, Any]]

    def configs(
        self, profile: str, replicates: int | None = None, live_only: bool = False
    ) -> dict[tuple[str, int], RunConfig]:
        """(setting, replicate) -> config, settings in the order of the grid."""
        names = self.live if live_only else self.settings
        count = self.replicates if replicates is None else replicates
        return {
            (name, replicate): self._config(profile, name, replicate)
            for replicate in range(count)
            for name in names
        }

    def _config(self, profile: str, name: str, replicate: int) -> RunConfig:
        changes = dict(self.settings[name])
        joint = changes.pop("joint", False)
        tree = config.profile(profile)
        settings = [f"{key}={value}" for key, value in changes.items()]
        tree = config.override(tree, [*settings, f"seed={replicate}"])
        run_config = config.parse(tree, f"study {self.chapter}, setting {name!r}")
        return runs.joint(run_config) if joint else run_config


def load(chapter: str) -> Study:
    """Read a chapter's grid; `CmpError` with file and key if it is not well-formed."""
    path = STUDIES / f"{chapter}.yaml"
    tree = read_yaml(path)
    wanted = {"question": str, "replicates": int, "live": list, "settings": dict}
    for key in [*wanted, *tree]:
        if key not in wanted:
            raise CmpError(f"{path}: {key}: no such key; there are {', '.join(wanted)}")
        if not isinstance(tree.get(key), wanted[key]):
            raise CmpError(f"{path}: {key}: must be given, as {wanted[key].__name__}")
    if unknown := [name for name in tree["live"] if name not in tree["settings"]]:
        raise CmpError(f"{path}: live: {unknown[0]!r} is no setting")
    if len(tree["live"]) > MAX_LIVE:
        raise CmpError(f"{path}: live: at most {MAX_LIVE} settings, not {len(tree['live'])}")
    settings = {name: dict(changes or {}) for name, changes in tree["settings"].items()}
    study = Study(chapter, tree["question"], tree["replicates"], tuple(tree["live"]), settings)
    study.configs("quick", 1)  # refuses impossible settings now
    return study


def run_one(
    run_config: RunConfig, observer: runs.Observer = runs.SILENT, device: str = "cpu"
) -> store.Run:
    """The stored run of a config; computed in this process if it is missing, from its last
    checkpoint on."""
    corpus = corpora.load()
    run_id = store.identify(run_config, corpus)
    if store.is_stored(run_id):
        Keeper(run_id).remove()  # a kill may have come between the last two lines below
        return store.load(run_id)
    with Keeper(run_id) as keeper:
        if not store.is_stored(run_id):  # else another process was faster
            result = runs.run(run_config, corpus, observer, device=device, keeper=keeper)
            store.save(run_id, run_config, result)
        keeper.remove()
    return store.load(run_id)


def missing(configs: list[RunConfig]) -> list[RunConfig]:
    """Those whose run is not stored."""
    corpus = corpora.load()
    return [each for each in configs if not store.is_stored(store.identify(each, corpus))]


def _work(run_config: RunConfig, device: str) -> str:
    torch.set_num_threads(1)
    return run_one(run_config, device=device).id


def compute(configs: list[RunConfig], jobs: int = 1, device: str = "cpu") -> None:
    """Compute the runs that are missing, in `jobs` one-thread processes, with a forecast.

    Finished runs are stored at once, so a study that is stopped goes on where it was.
    """
    todo = missing(configs)
    if not todo:
        return
    context = multiprocessing.get_context("spawn")
    with (
        concurrent.futures.ProcessPoolExecutor(min(jobs, len(todo)), mp_context=context) as pool,
        tqdm(total=len(todo), desc="runs", unit=" runs") as bar,
    ):
        for done in concurrent.futures.as_completed(
            pool.submit(_work, each, device) for each in todo
        ):
            done.result()
            bar.update()


def collect(configs: dict[tuple[str, int], RunConfig]) -> pd.DataFrame:
    """The metrics of stored runs side by side, with `setting`, `replicate` and `run` (the id)."""
    corpus, frames = corpora.load(), []
    for (setting, replicate), run_config in configs.items():
        run = store.load(store.identify(run_config, corpus))
        about = {"setting": setting, "replicate": replicate, "run": run.id[:SHORT]}
        frames.append(run.metrics.assign(**about))
    return pd.concat(frames, ignore_index=True)


def publish(study: Study, profile: str = "cpu") -> Path:
    """Write the whole study's metrics to `book/results/NN.parquet`; every run must be stored."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path, partial = RESULTS / f"{study.chapter}.parquet", RESULTS / f".{study.chapter}.partial"
    configs = study.configs(profile)
    if lacking := missing(list(configs.values())):
        raise CmpError(
            f"study {study.chapter}: {len(lacking)} runs are missing; compute them first"
        )
    frame = collect(configs).sort_values(["setting", "replicate", "task", "scope", "dataset"])
    frame.attrs.clear()
    frame.to_parquet(partial, index=False)
    os.replace(partial, path)
    return path


def published(chapter: str) -> pd.DataFrame:
    """The published metrics of a chapter's study, settings in the order of its grid."""
    path = RESULTS / f"{chapter}.parquet"
    if not path.exists():
        raise CmpError(f"{path}: not published yet; `cmp study {chapter} --publish` computes it")
    frame = pd.read_parquet(path)
    order = {name: place for place, name in enumerate(load(chapter).settings)}
    return frame.sort_values("setting", key=lambda names: names.map(order), kind="stable")
