"""A study: a grid of settings and replicates, each run computed once and then looked up.

`book/studies/NN.yaml` states a chapter's grid: for each setting what it changes in the profile
(`joint: true` makes it the joint upper bound, `replicates: n` gives a sweep fewer of them), how
many replicates, and which settings are `live`, that is, recomputed in `quick`. Replicate r takes
base r and stream r, paired across settings.

A setting may hold `product` or `zip`, keys with lists of values: it stands for every combination of
them, or for the first values, the second values and so on. Each is named after its values: `full`
with `product: {schedule.peak: [0.001, 0.002]}` becomes "full, peak 0.001" and "full, peak 0.002".

`common` holds changes that every setting shares. What the chapter claims of its settings may stand
there too, under `claims`; see `cmp.claims`. What a chapter chooses, such as a learning rate, is a
study of its own, `NN-tuning`, on the validation split.
"""

import itertools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

from cmp import config
from cmp.config import RunConfig
from cmp.data import load_corpus
from cmp.errors import CmpError
from cmp.experiments import cluster, forecast, store, workers
from cmp.files import SHORT_ID, child_path, project_folder, read_yaml
from cmp.runner import check_device, joint_training

STUDIES = project_folder() / "book" / "studies"
MAX_LIVE = 4
MAX_REPLICATES = 1000
MAX_RUNS, MAX_CORE_HOURS = 180, 2.5
"""A chapter's budget in the `cpu` profile."""

BACKENDS = {"local": workers.run_locally, "ray": cluster.run_on_ray}
"""Where runs are computed: (configs, jobs, device, called after each) -> why which failed."""


@dataclass(frozen=True)
class Study:
    """A chapter's grid. settings: name -> assignments to the profile, `joint` and `replicates`.

    claims: as they stand in the file; `cmp.claims.of` reads them, strictly.
    """

    chapter: str
    question: str
    replicates: int
    live: tuple[str, ...]
    settings: dict[str, dict[str, Any]]
    claims: list[Any]

    def configs(
        self, profile: str, replicates: int | None = None, live_only: bool = False
    ) -> dict[tuple[str, int], RunConfig]:
        """(setting, replicate) -> config, settings in the order of the grid. replicates: of every
        setting; as the grid says where left out. A profile with a model of its own takes no setting
        that names an embedded one; of others see `config.translated`."""
        names = self.live if live_only else self.settings
        names = [name for name in names if config.is_translatable(self.settings[name], profile)]
        own = {name: self.settings[name].get("replicates", self.replicates) for name in names}
        return {
            (name, replicate): self._config(profile, name, replicate)
            for replicate in range(replicates or max(own.values()))
            for name in names
            if replicates or replicate < own[name]
        }

    def _config(self, profile: str, name: str, replicate: int) -> RunConfig:
        changes = dict(self.settings[name])
        joint = changes.pop("joint", False)
        changes.pop("replicates", None)
        changes = config.translate_changes(changes, profile)
        tree = config.profile(profile)
        settings = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
        tree = config.override(tree, [*settings, f"seed={replicate}"])
        run_config = config.parse(tree, f"study {self.chapter}, setting {name!r}")
        return joint_training(run_config) if joint else run_config


def load_study(chapter: str) -> Study:
    """Read a chapter's grid; `CmpError` with file and key if it is not well-formed."""
    path = child_path(STUDIES, chapter, ".yaml").with_stem(chapter.zfill(2))
    if not path.exists():
        known = ", ".join(sorted(each.stem for each in STUDIES.glob("*.yaml")))
        raise CmpError(f"{path}: no such study; there are {known or 'none'}")
    tree = {"claims": [], "common": {}} | read_yaml(path)
    _check_grid(path, tree)
    settings = {}
    for name, changes in tree["settings"].items():
        found = expand_setting(name, tree["common"] | (changes or {}), f"{path}: settings: {name}")
        if twice := settings.keys() & found.keys():
            raise CmpError(f"{path}: settings: {name}: {min(twice)!r} stands there already")
        settings |= found
    if unknown := [name for name in tree["live"] if name not in settings]:
        raise CmpError(
            f"{path}: live: {unknown[0]!r} is no setting; there are {', '.join(settings)}"
        )
    live, claims = tuple(tree["live"]), tree["claims"]
    study = Study(path.stem, tree["question"], tree["replicates"], live, settings, claims)
    study.configs("quick", 1)  # refuses impossible settings now
    return study


def _check_grid(path: Path, tree: dict[str, Any]) -> None:
    """Refuse a grid that is not well-formed."""
    wanted = {"question": str, "replicates": int, "live": list, "settings": dict, "claims": list}
    wanted |= {"common": dict}
    for key in [*wanted, *tree]:
        if key not in wanted:
            raise CmpError(f"{path}: {key}: no such key; there are {', '.join(wanted)}")
        if not isinstance(tree.get(key), wanted[key]):
            raise CmpError(f"{path}: {key}: must be given, as {wanted[key].__name__}")
    settings = tree["settings"].items()
    for name, changes in settings:
        if not isinstance(name, str) or not isinstance(changes, dict | None):
            raise CmpError(f"{path}: settings: {name}: must be a name, with its changes as keys")
    own = {f"settings: {n}: ": c["replicates"] for n, c in settings if "replicates" in (c or {})}
    for where, count in ({"": tree["replicates"]} | own).items():
        if type(count) is not int or not 1 <= count <= MAX_REPLICATES:
            raise CmpError(f"{path}: {where}replicates: must be 1 to {MAX_REPLICATES}")
    if not all(isinstance(name, str) for name in tree["live"]):
        raise CmpError(f"{path}: live: must be names of settings")
    if len(tree["live"]) > MAX_LIVE:
        raise CmpError(f"{path}: live: at most {MAX_LIVE} settings, not {len(tree['live'])}")


def expand_setting(name: str, changes: dict[str, Any], source: str) -> dict[str, dict[str, Any]]:
    """A setting by name, or those that its `product` or `zip` stands for; `CmpError` names the key
    of lists that cannot be combined."""
    swept = [key for key in ("product", "zip") if key in changes]
    if not swept:
        return {name: dict(changes)}
    fixed = {key: value for key, value in changes.items() if key not in swept}
    lists = changes[swept[0]]
    if len(swept) == 2 or not isinstance(lists, dict) or not lists:
        raise CmpError(
            f"{source}: {swept[-1]}: must stand alone and hold keys with lists of values"
        )
    if not all(isinstance(values, list) and values for values in lists.values()):
        raise CmpError(f"{source}: {swept[0]}: every key must hold a list of values")
    if twice := sorted(fixed.keys() & lists.keys()):
        raise CmpError(f"{source}: {swept[0]}: {twice[0]}: is set beside it, too")
    if swept == ["product"]:
        rows = list(itertools.product(*lists.values()))
    elif len({len(values) for values in lists.values()}) == 1:
        rows = list(zip(*lists.values(), strict=True))
    else:
        raise CmpError(f"{source}: zip: all lists must be of one length")
    found = {}
    for row in rows:
        pairs = dict(zip(lists, row, strict=True))
        words = [f"{key.rpartition('.')[2]} {value}" for key, value in pairs.items()]
        found[", ".join([name, *words])] = fixed | pairs
    if len(found) < len(rows):
        raise CmpError(f"{source}: {swept[0]}: the same values stand there twice")
    return found


@dataclass(frozen=True)
class StudyPlan:
    """What a study would do. runs: of the grid; todo: those that are not stored; seconds: on one
    core, forecast for those."""

    runs: int
    todo: list[RunConfig]
    seconds: float

    def __str__(self) -> str:
        todo, hours = len(self.todo), self.seconds / 3600
        stored = self.runs - todo
        return f"{self.runs} runs, {stored} stored, {todo} to compute: {hours:.2f} core-hours"

    def check_budget(self) -> None:
        """`CmpError` if this is more than a chapter may take."""
        if self.runs > MAX_RUNS or self.seconds > 3600 * MAX_CORE_HOURS:
            raise CmpError(
                f"{self}; a chapter may take {MAX_RUNS} runs and {MAX_CORE_HOURS} core-hours: cut "
                f"the grid, not the replicates, or force it"
            )


def plan_study(configs: list[RunConfig], device: str = "cpu") -> StudyPlan:
    """What is stored of these runs, and what computing the others would take; `CmpError` for a
    device that is not here."""
    check_device(device)
    todo = missing_runs(configs)
    return StudyPlan(len(set(configs)), todo, sum(forecast.forecast_seconds(todo, device)))


def missing_runs(configs: list[RunConfig]) -> list[RunConfig]:
    """Those whose run is not stored, each once, as two settings may come to the same."""
    distinct = dict.fromkeys(configs)
    ids = {each: store.run_id_of(each, load_corpus(each)) for each in distinct}
    return [each for each, run_id in ids.items() if not store.is_stored(run_id)]


def compute_runs(
    configs: list[RunConfig], jobs: int = 1, device: str = "cpu", backend: str = "local"
) -> None:
    """Compute the runs that are missing, `jobs` at a time, with progress and a forecast.

    Finished runs are stored at once and unfinished ones have checkpoints, so a study that is
    stopped or killed goes on where it was. A run that fails stops no other; `CmpError` at the end
    says which failed and why.
    """
    todo = missing_runs(configs)
    if not todo:
        return
    with tqdm(total=len(todo), desc="runs", unit=" runs") as bar:
        failures = BACKENDS[backend](todo, jobs, device, bar.update)
    if failures:
        lines = [
            f"  {store.run_id_of(each, load_corpus(each))[:SHORT_ID]}: {why}"
            for each, why in failures.items()
        ]
        raise CmpError("\n".join([f"{len(failures)} of {len(todo)} runs failed:", *lines]))


def shard_runs(configs: list[RunConfig], text: str) -> list[RunConfig]:
    """Part i of n of the runs, from "i/n": every part is fixed by the grid, not by what is stored,
    so parts that run at the same time share nothing. `CmpError` for another text."""
    match = re.fullmatch(r"(\d{1,4})/(\d{1,4})", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise CmpError(f"shard {text!r}: expected i/n with i from 1 to n, such as 2/8")
    return configs[int(match[1]) - 1 :: int(match[2])]


def collect_metrics(configs: dict[tuple[str, int], RunConfig]) -> pd.DataFrame:
    """The metrics of stored runs side by side, with `setting`, `replicate` and `run` (the id)."""
    frames = []
    for (setting, replicate), run_config in configs.items():
        run = store.load_run(store.run_id_of(run_config, load_corpus(run_config)))
        about = {"setting": setting, "replicate": replicate, "run": run.id[:SHORT_ID]}
        frames.append(run.metrics.assign(**about))
    return pd.concat(frames, ignore_index=True)
