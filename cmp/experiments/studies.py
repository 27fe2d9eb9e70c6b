"""A study: a grid of settings and replicates, each run computed once and then looked up.

`book/studies/NAME.yaml` states its grid: what each setting changes in the profile (`joint: true`
makes it the joint upper bound, `replicates: n` gives a sweep fewer replicates, `draw: k` takes
another stream of the same data), how many replicates there are, and which settings are `live`, that
is, recomputed in `quick`. Settings are paired: replicate r of each takes the same base and stream.
A study that `explores` or tunes has bases 0 and 1 and streams of its own; all others have bases 2
to 11, in turn.

A setting may hold `product` or `zip`, keys with lists of values: it stands for every combination of
them, or for the first values, the second values and so on. Each is named after its values: `full`
with `product: {schedule.peak: [0.001, 0.002]}` becomes "full, peak 0.001" and "full, peak 0.002".

`common` holds changes that all settings share. Choices, such as of a learning rate, are studies of
their own that explore, on the validation split; what is claimed of settings stands in
`book/claims.yaml`, see `cmp.experiments.verdicts`.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import pandas as pd
from pydantic import Field
from pydantic.dataclasses import dataclass as checked_dataclass
from tqdm.auto import tqdm

from cmp import config, values
from cmp.config import FOREIGN_MODEL_PROFILES, PROFILES, RunConfig, Stream, Training
from cmp.errors import CmpError
from cmp.experiments import cluster, forecast, workers
from cmp.files import SHORT_ID, check_record, child_path, read_yaml
from cmp.project import book_folder
from cmp.runs import identity, store
from cmp.runs.checkpoints import StopRequest
from cmp.values import STRICT

STUDIES = book_folder() / "studies"
MAX_LIVE = 4
MAX_REPLICATES = 1000
EXPLORING, CONFIRMING = (0, 2), (2, 10)
"""The first base of replicates that explore or confirm, and how many bases they take in turn."""
FIRST_EXPLORING_SEED = 1000
"""Of streams, batches and augmentation; those that confirm begin at 0, so that no two meet."""
DRAW = 10_000
"""What `draw: 1` adds to a stream's seed: other streams than those of any replicate."""
BAND, BAND_RUNS = "quick-", 10
"""What the name of a `band_of` a study begins with, and the runs of each of its settings."""
BACKENDS = {"local": workers.run_locally, "ray": cluster.run_on_ray}
"""Functions of (configs, jobs, device, called with each run, noted signals) that return why runs
failed."""


@checked_dataclass(frozen=True, config=STRICT)
class Study:
    """A study: the keys of its file, see the module's docstring.

    Attributes:
        question: What the study asks.
        replicates: Replicates of a setting that has no number of its own.
        live: The settings that are recomputed in `quick`.
        settings: Changes to the profile by setting, with `joint` and the like; `load_study`
            writes out `common` and lists of values in them.
        common: Changes that all settings share.
        explores: Whether the study explores or tunes, on bases and streams that no claim rests on.
        profile: The profile that its values are written for.
        name: The name of its file, such as "orders".
    """

    question: str
    replicates: Annotated[int, Field(ge=1, le=MAX_REPLICATES)]
    live: Annotated[tuple[str, ...], Field(max_length=MAX_LIVE)]
    settings: dict[str, dict[str, Any] | None]
    common: dict[str, Any] = dataclasses.field(default_factory=dict)
    explores: bool = False
    profile: Literal["cpu", "gpu"] = "cpu"
    name: str = dataclasses.field(kw_only=True)

    @property
    def counts(self) -> dict[str, int]:
        """How many replicates each setting has."""
        settings = self.settings.items()
        return {name: changes.get("replicates", self.replicates) for name, changes in settings}

    def configs(
        self, profile: str, replicates: int | None = None, live_only: bool = False
    ) -> dict[tuple[str, int], RunConfig]:
        """Return the configs by (setting, replicate), settings in the order of the grid.

        Args:
            profile: A profile's name; one with a model of its own leaves out settings that name an
                embedded model, and translates the others, see `translate_changes`.
            replicates: Replicates of every setting, in place of the grid's numbers.
            live_only: Whether to return the live settings only.
        """
        names = self.live if live_only else self.settings
        names = [name for name in names if is_translatable(self.settings[name], profile)]
        counts = dict.fromkeys(names, replicates) if replicates else self.counts
        return {
            (name, replicate): self._config(profile, name, replicate)
            for replicate in range(max((counts[name] for name in names), default=0))
            for name in names
            if replicate < counts[name]
        }

    def _config(self, profile: str, name: str, replicate: int) -> RunConfig:
        changes = dict(self.settings[name])
        joint = changes.pop("joint", False)
        changes.pop("replicates", None)
        seeds = self._seeds(profile, replicate)
        if draw := changes.pop("draw", 0):
            seeds["seeds.stream"] = seeds["seed"] + DRAW * draw
        if profile != self.profile:
            changes = translate_changes(changes, profile)
        changes = seeds | changes
        assignments = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
        tree = config.override(config.profile(profile), assignments)
        run_config = config.parse(tree, f"study {self.name}, setting {name!r}")
        return joint_training(run_config) if joint else run_config

    def _seeds(self, profile: str, replicate: int) -> dict[str, int]:
        """Return the seeds of a replicate; `quick` starts from the base that every wheel has."""
        first, count = EXPLORING if self.explores else CONFIRMING
        seed = replicate + FIRST_EXPLORING_SEED * self.explores
        base = 0 if profile == "quick" else first + replicate % count
        return {"seed": seed, "seeds.init": base}


def load_study(name: str) -> Study:
    """Return a study; "quick-NAME" is the band of study NAME, see `band_of`.

    Raises:
        CmpError: There is no such study, or its file is not well-formed; names file and key.
    """
    if name.startswith(BAND):
        return band_of(load_study(name.removeprefix(BAND)))
    path = child_path(STUDIES, name, ".yaml")
    if not path.exists():
        names = ", ".join(sorted(file.stem for file in STUDIES.glob("*.yaml")))
        raise CmpError(f"{path}: no such study; there are {names or 'none'}")
    status = path.stat()
    return _read_study(path, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=64)
def _read_study(path: Path, *stamp: int) -> Study:
    """Return the study of a file, read once for as long as the file's stamp stays."""
    *keys, _ = Study.__dataclass_fields__
    tree, remedy = read_yaml(path), f"; the keys of a study are {', '.join(keys)}"
    if "name" in tree:
        raise CmpError(f"{path}: name: is the file's name{remedy}")
    study = check_record(tree | {"name": path.stem}, Study, f"{path}: ", remedy)
    settings = {}
    for name, changes in study.settings.items():
        source, changes = f"{path}: settings: {name}", study.common | (changes or {})
        count = changes.get("replicates", 1)
        if type(count) is not int or not 1 <= count <= MAX_REPLICATES:
            raise CmpError(f"{source}: replicates: must be 1 to {MAX_REPLICATES}")
        expanded = expand_setting(name, changes, source)
        if twice := settings.keys() & expanded.keys():
            raise CmpError(f"{source}: {min(twice)!r} stands there already")
        settings |= expanded
    if unknown := [name for name in study.live if name not in settings]:
        raise CmpError(
            f"{path}: live: {unknown[0]!r} is no setting; there are {', '.join(settings)}"
        )
    study = dataclasses.replace(study, settings=settings)
    study.configs(
        "quick" if study.profile == "cpu" else study.profile, 1
    )  # refuses impossible settings
    return study


def band_of(study: Study) -> Study:
    """Return the study of what readers compute in `quick`, with more seeds: among these runs, a
    reader's own is compared with runs of its size."""
    sizes = dict(config.flat_keys(PROFILES["quick"])) | {"seeds.init": 0}
    settings = {
        name: sizes | study.settings[name] | {"replicates": BAND_RUNS} for name in study.live
    }
    name = f"{BAND}{study.name}"
    return dataclasses.replace(study, settings=settings, explores=False, name=name)


def expand_setting(name: str, changes: dict[str, Any], source: str) -> dict[str, dict[str, Any]]:
    """Return the settings that a setting's `product` or `zip` stands for, by name.

    Args:
        name: The setting's name.
        changes: Its keys; without `product` and `zip` it stands for itself.
        source: What errors call it.

    Raises:
        CmpError: Its lists cannot be combined.
    """
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
    if swept == ["zip"] and len({len(values) for values in lists.values()}) > 1:
        raise CmpError(f"{source}: zip: all lists must be of one length")
    combine = zip if swept == ["zip"] else itertools.product
    rows = [dict(zip(lists, row, strict=True)) for row in combine(*lists.values())]
    words = [[f"{key.rpartition('.')[2]} {value}" for key, value in row.items()] for row in rows]
    expanded = {
        ", ".join([name, *parts]): fixed | row for parts, row in zip(words, rows, strict=True)
    }
    if len(expanded) < len(rows):
        raise CmpError(f"{source}: {swept[0]}: the same values stand there twice")
    return expanded


class StudyPlan(NamedTuple):
    """What computing a study takes.

    Attributes:
        runs: Number of runs of the grid.
        todo: The runs that are not stored, each with its forecast in seconds of one core.
    """

    runs: int
    todo: dict[RunConfig, float]

    @property
    def seconds(self) -> float:
        """The forecast of all, in seconds of one core."""
        return sum(self.todo.values())

    def __str__(self) -> str:
        todo, hours = len(self.todo), self.seconds / 3600
        stored = self.runs - todo
        return f"{self.runs} runs, {stored} stored, {todo} to compute: {hours:.2f} core-hours"


def plan_study(configs: list[RunConfig], device: str = "cpu") -> StudyPlan:
    """Return what computing some runs takes; raise `CmpError` for a device that is not here."""
    forecast.check_device(device)
    todo = missing_runs(configs)
    seconds = forecast.forecast_seconds(todo, device)
    return StudyPlan(len(set(configs)), dict(zip(todo, seconds, strict=True)))


def missing_runs(configs: list[RunConfig]) -> list[RunConfig]:
    """Return the configs whose run is not stored, each once: two settings may come to the same."""
    ids = {each: identity.known_id(each) for each in configs}
    return [each for each, run_id in ids.items() if not run_id or not store.is_stored(run_id)]


def compute_runs(
    configs: list[RunConfig],
    jobs: int = 1,
    device: str = "cpu",
    backend: str = "local",
    finished: Callable[[RunConfig], Any] | None = None,
    stop: StopRequest | None = None,
) -> None:
    """Compute the runs that are missing, with a progress bar.

    Finished runs are stored at once and unfinished ones have checkpoints, so a study that is
    stopped or killed goes on where it was. A run that fails stops no other.

    Args:
        configs: The runs.
        jobs: How many are computed at a time.
        device: "cpu" or "cuda".
        backend: One of `BACKENDS`.
        finished: Called with each run that is done, in place of a bar over these runs.
        stop: Notes signals; by default they are noted here, which only the main thread can.

    Raises:
        Interrupted: A signal came; unfinished runs are saved.
        CmpError: At the end, if runs failed; says which and why.
    """
    for run_config in {(each.model, each.seeds.init): each for each in configs}.values():
        with contextlib.suppress(CmpError):  # its runs fail, and say why
            store.fetch_start(run_config)
    todo = missing_runs(configs)
    if not todo:
        return
    with tqdm(total=len(todo), desc="runs", unit=" runs", disable=finished is not None) as bar:
        report = finished or (lambda _: bar.update())
        with contextlib.nullcontext(stop) if stop else StopRequest() as request:
            failures = BACKENDS[backend](todo, jobs, device, report, request)
    if failures:
        names = [identity.known_id(each)[:SHORT_ID] or "a run without weights" for each in failures]
        lines = map("  {}: {}".format, names, failures.values())
        raise CmpError("\n".join([f"{len(failures)} of {len(todo)} runs failed:", *lines]))


def shard_runs(configs: list[RunConfig], text: str) -> list[RunConfig]:
    """Return part i of n of some runs.

    Every part is fixed by the grid, not by what is stored, so parts that are computed at the same
    time share nothing.

    Args:
        configs: The runs.
        text: "i/n", with i from 1 to n.

    Raises:
        CmpError: The text is another.
    """
    match = re.fullmatch(r"(\d{1,4})/(\d{1,4})", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise CmpError(f"shard {text!r}: expected i/n with i from 1 to n, such as 2/8")
    return configs[int(match[1]) - 1 :: int(match[2])]


def collect_metrics(configs: dict[tuple[str, int], RunConfig]) -> pd.DataFrame:
    """Return the metrics of stored runs in one table, with `setting`, `replicate` and `run`."""
    frames = []
    for (setting, replicate), run_config in configs.items():
        run = store.load_run(identity.run_id_of(run_config))
        short = run.id[:SHORT_ID]
        frames.append(run.metrics.assign(setting=setting, replicate=replicate, run=short))
    return pd.concat(frames, ignore_index=True)


def is_translatable(changes: dict[str, Any], name: str) -> bool:
    """Return whether a study's changes can be asked of a profile.

    A profile with a model of its own takes no embedded model by name.
    """
    names_model = any(key.startswith("model.") for key in changes)
    return not (names_model and name in FOREIGN_MODEL_PROFILES)


def translate_changes(changes: dict[str, Any], name: str) -> dict[str, Any]:
    """Return a study's changes in a profile's own terms.

    Studies are written for `cpu`. For a profile with a model of its own, a peak, steps and tasks
    stay the same multiples of the profile's.

    Args:
        changes: Values by dotted key.
        name: The profile.
    """
    if name not in FOREIGN_MODEL_PROFILES:
        return changes
    translated, own, cpu = dict(changes), PROFILES[name], PROFILES["cpu"]
    if "schedule.peak" in translated:
        peak = translated["schedule.peak"] / cpu["schedule"]["peak"] * own["schedule"]["peak"]
        translated["schedule.peak"] = float(f"{peak:.3g}")
    for key, default in (("training.steps", Training.steps), ("stream.tasks", Stream.tasks)):
        if key in translated:
            section, leaf = key.split(".")
            usual = cpu.get(section, {}).get(leaf, default)
            translated[key] = round(translated[key] * own[section][leaf] / usual)
    return translated


def joint_training(run_config: RunConfig) -> RunConfig:
    """Return the upper bound of a run: all its classes in one task of as many steps.

    Raises:
        CmpError: The task would have too many steps.
    """
    tree = run_config.to_dict()
    steps, most = run_config.stream.tasks * run_config.training.steps, values.MAX_COUNT
    if steps > most:
        raise CmpError(f"training.steps: {steps} in the one task of joint training; at most {most}")
    tree["mixture"] |= {"pretraining": 1 / 3, "update": 2 / 3, "buffer": 0.0}
    tree["training"]["steps"], tree["stream"]["tasks"] = steps, 1
    return config.parse(tree, "joint training")
