"""Define and compute studies: grids of settings and replicates, with each run computed once.

`book/studies/NAME.yaml` defines the grid: what each setting changes in the profile (`joint: true`
makes it joint training on all updates, `replicates: n` gives a sweep fewer replicates, `draw: k`
uses another stream of the same data), the number of replicates, and which settings are `live`, that
is, recomputed in `quick`. Settings are paired: replicate r of each uses the same base and stream. A
study that `explores` or tunes uses bases 0 and 1 and separate streams. All others use bases 2 to 11
in turn.

A setting may contain `product` or `zip` with lists of values for keys. It is expanded to every
combination of them, or to the first values, the second values and so on, and each is named after
its values: `full` with `product: {schedule.peak: [0.001, 0.002]}` becomes "full, peak 0.001" and
"full, peak 0.002".

`common` contains changes shared by all settings. `recipe: NAME` in a setting stands for the keys of
a recipe in `cmp/profiles.yaml`, and `data: first-real` for the folder that `lab.evidence.real`
prepares. Choices, such as that of a learning rate, are made in separate exploring studies on the
validation split. The claims about settings are in `book/claims.yaml`, see
`lab.evidence.verdicts`.
"""

import contextlib
import dataclasses
import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import AfterValidator, Field
from pydantic.dataclasses import dataclass as checked_dataclass
from tqdm.auto import tqdm

from cmp import config, values
from cmp.config import FOREIGN_MODEL_PROFILES, PROFILES, RunConfig
from cmp.errors import CmpError
from cmp.files import SHORT_ID, cached_by_file, child_path
from cmp.parsing import check_record, read_yaml
from cmp.runs import forecast, identity, lookup, store
from cmp.runs.checkpoints import StopRequest
from cmp.scale import devices
from cmp.values import STRICT
from lab.evidence import BOOK, cluster, real, workers

STUDIES = BOOK / "studies"
MAX_LIVE = 4
MAX_REPLICATES = 1000
EXPLORING, CONFIRMING = (0, 2), (2, 10)
"""The first base of replicates that explore or confirm, and the number of bases used in turn."""
FIRST_EXPLORING_SEED = 1000
"""The first seed of streams, batches and augmentation for exploring. Confirming seeds start at 0,
so the two never overlap."""
DRAW = 10_000
"""Added by `draw: 1` to a stream's seed, which gives streams that no replicate uses."""
BAND, BAND_RUNS = "quick-", 10
"""Prefix of the name of a `band_of` a study, and the number of runs of each of its settings."""
BACKENDS = {"local": workers.run_locally, "ray": cluster.run_on_ray}
"""Functions of (configs, jobs, device, callback for each run, recorded signals) that return why
runs failed."""


def _check_profile(name: str) -> str:
    if name not in PROFILES:
        raise ValueError(f"{name!r:.60}: choose from {', '.join(PROFILES)}")
    return name


ProfileName = Annotated[str, AfterValidator(_check_profile)]


@checked_dataclass(frozen=True, config=STRICT)
class Study:
    """A study, with the keys of its file; see the module's docstring.

    Attributes:
        question: What the study asks.
        replicates: The default number of replicates of a setting.
        live: The settings that are recomputed in `quick`.
        settings: Changes to the profile by setting, including `joint` and the like. `load_study`
            expands `common` and lists of values.
        common: Changes shared by all settings.
        explores: Whether the study explores or tunes, on bases and streams that no claim uses.
        profile: The profile for which its values are written.
        name: The name of its file, such as "orders".
    """

    question: str
    replicates: Annotated[int, Field(ge=1, le=MAX_REPLICATES)]
    live: Annotated[tuple[str, ...], Field(max_length=MAX_LIVE)]
    settings: dict[str, dict[str, Any] | None]
    common: dict[str, Any] = dataclasses.field(default_factory=dict)
    explores: bool = False
    profile: ProfileName = "cpu"
    name: str = dataclasses.field(kw_only=True)

    @property
    def counts(self) -> dict[str, int]:
        """The number of replicates of each setting."""
        settings = self.settings.items()
        return {name: changes.get("replicates", self.replicates) for name, changes in settings}

    def configs(
        self, profile: str, replicates: int | None = None, live_only: bool = False
    ) -> dict[tuple[str, int], RunConfig]:
        """Return the configs by (setting, replicate), with settings in the order of the grid.

        Args:
            profile: A profile's name. A profile with another model leaves out settings that name an
                embedded model, and translates the others, see `translate_changes`.
            replicates: The number of replicates of every setting, instead of the grid's numbers.
            live_only: Whether to return only live settings.
        """
        names = self.live if live_only else self.settings
        if profile != self.profile:
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
        if changes.get("data") == real.STUDY:
            changes["data"] = str(real.data_folder())
        assignments = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
        tree = config.override(config.profile(profile), assignments)
        run_config = config.parse(tree, f"study {self.name}, setting {name!r}")
        return joint_training(run_config) if joint else run_config

    def _seeds(self, profile: str, replicate: int) -> dict[str, int]:
        """Return the seeds of a replicate; `quick` starts from the base included in every wheel."""
        first, count = EXPLORING if self.explores else CONFIRMING
        seed = replicate + FIRST_EXPLORING_SEED * self.explores
        base = 0 if profile == "quick" else first + replicate % count
        return {"seed": seed, "seeds.init": base}


def load_study(name: str) -> Study:
    """Return a study; "quick-NAME" is the band of study NAME, see `band_of`.

    Raises:
        CmpError: There is no such study, or its file is invalid; the message names file and key.
    """
    if name.startswith(BAND):
        return band_of(load_study(name.removeprefix(BAND)))
    path = child_path(STUDIES, name, ".yaml")
    if not path.exists():
        names = ", ".join(sorted(file.stem for file in STUDIES.glob("*.yaml")))
        raise CmpError(f"{path}: no such study; the studies are {names or 'none'}")
    return _read_study(path)


@cached_by_file
def _read_study(path: Path) -> Study:
    """Return the study in a file."""
    *keys, _ = Study.__dataclass_fields__
    tree, remedy = read_yaml(path), f"; the keys of a study are {', '.join(keys)}"
    if "name" in tree:
        raise CmpError(f"{path}: name: the study is named by its file; leave it out{remedy}")
    study = check_record(tree | {"name": path.stem}, Study, f"{path}: ", remedy)
    settings = {}
    for name, changes in study.settings.items():
        source, changes = f"{path}: settings: {name}", study.common | (changes or {})
        expanded = expand_setting(name, changes, source)
        if twice := settings.keys() & expanded.keys():
            raise CmpError(f"{source}: {min(twice)!r} is defined twice; rename one")
        for each, own in expanded.items():  # after a product, which may list values of both
            _check_own_keys(own, f"{path}: settings: {each}")
        settings |= expanded
    if unknown := [name for name in study.live if name not in settings]:
        raise CmpError(
            f"{path}: live: {unknown[0]!r} is not a setting; the settings are {', '.join(settings)}"
        )
    study = dataclasses.replace(study, settings=settings)
    study.configs(
        "quick" if study.profile == "cpu" else study.profile, 1
    )  # raises an error for invalid settings
    return study


def _check_own_keys(changes: dict[str, Any], source: str) -> None:
    """Raise `CmpError` for an invalid value of a key that a study has beside those of a run."""
    count = changes.get("replicates", 1)
    if type(count) is not int or not 1 <= count <= MAX_REPLICATES:
        raise CmpError(f"{source}: replicates: must be 1 to {MAX_REPLICATES}")
    if type(joint := changes.get("joint", False)) is not bool:  # `no` is text in YAML 1.2
        raise CmpError(f"{source}: joint: must be true or false, not {joint!r:.80}")
    draw = changes.get("draw", 0)
    if type(draw) is not int or draw < 0:
        raise CmpError(f"{source}: draw: must be an integer of at least 0, not {draw!r:.80}")


def band_of(study: Study) -> Study:
    """Return a study of the runs that readers compute in `quick`, with more seeds, so that a
    reader's run can be compared with runs of its size."""
    sizes = dict(config.flat_keys(PROFILES["quick"])) | {"seeds.init": 0}
    settings = {
        name: sizes | study.settings[name] | {"replicates": BAND_RUNS} for name in study.live
    }
    name = f"{BAND}{study.name}"
    return dataclasses.replace(study, settings=settings, explores=False, name=name)


def expand_setting(name: str, changes: dict[str, Any], source: str) -> dict[str, dict[str, Any]]:
    """Expand a setting's `product` or `zip`, and return the resulting settings by name.

    Args:
        name: The setting's name.
        changes: The setting's keys. Without `product` and `zip`, it is returned unchanged.
        source: The name of the setting in error messages.

    Raises:
        CmpError: The lists cannot be combined.
    """
    swept = [key for key in ("product", "zip") if key in changes]
    if not swept:
        return {name: dict(changes)}
    fixed = {key: value for key, value in changes.items() if key not in swept}
    lists = changes[swept[0]]
    if len(swept) == 2 or not isinstance(lists, dict) or not lists:
        raise CmpError(
            f"{source}: {swept[-1]}: give only one of product and zip, with lists of values by key"
        )
    if not all(isinstance(values, list) and values for values in lists.values()):
        raise CmpError(f"{source}: {swept[0]}: every key must have a list of values")
    if twice := sorted(fixed.keys() & lists.keys()):
        raise CmpError(f"{source}: {swept[0]}: {twice[0]}: also set outside it; remove one")
    if swept == ["zip"] and len({len(values) for values in lists.values()}) > 1:
        raise CmpError(f"{source}: zip: all lists must have the same length")
    combine = zip if swept == ["zip"] else itertools.product
    rows = [dict(zip(lists, row, strict=True)) for row in combine(*lists.values())]
    words = [[f"{key.rpartition('.')[2]} {value}" for key, value in row.items()] for row in rows]
    expanded = {
        ", ".join([name, *parts]): fixed | row for parts, row in zip(words, rows, strict=True)
    }
    if len(expanded) < len(rows):
        raise CmpError(f"{source}: {swept[0]}: the same values occur twice; remove one")
    return expanded


class StudyPlan(NamedTuple):
    """The work that computing a study takes.

    Attributes:
        runs: The number of runs in the grid.
        todo: The runs that are not stored, each with its forecast in seconds of one core.
    """

    runs: int
    todo: dict[RunConfig, float]

    @property
    def seconds(self) -> float:
        """The total forecast, in seconds of one core."""
        return sum(self.todo.values())

    def __str__(self) -> str:
        todo, hours = len(self.todo), self.seconds / 3600
        stored = self.runs - todo
        return f"{self.runs} runs, {stored} stored, {todo} to compute: {hours:.2f} core-hours"


def plan_study(configs: list[RunConfig], device: str = "cpu") -> StudyPlan:
    """Return the work that computing runs takes; raise `CmpError` if the device is not
    available."""
    devices.check_device(device)
    todo = missing_runs(configs)
    seconds = forecast.forecast_seconds(todo, device)
    return StudyPlan(len(set(configs)), dict(zip(todo, seconds, strict=True)))


def missing_runs(configs: list[RunConfig]) -> list[RunConfig]:
    """Return the configs of runs that are not stored, without duplicates, since settings may
    coincide."""
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
    """Compute the missing runs, with a progress bar.

    Finished runs are stored immediately and unfinished ones have checkpoints, so a stopped or
    killed study continues where it was. A failed run does not stop the others.

    Args:
        configs: The runs.
        jobs: The number of runs at a time.
        device: "cpu" or "cuda".
        backend: One of `BACKENDS`.
        finished: Called with each finished run, instead of a progress bar over these runs.
        stop: Records signals. By default, they are recorded here, which works only in the main
            thread; a chapter computes its runs in another.

    Raises:
        Interrupted: A signal was received; unfinished runs are saved.
        CmpError: At the end, if runs failed; the message says which and why.
    """
    for run_config in {(each.model, each.seeds.init): each for each in configs}.values():
        with contextlib.suppress(CmpError):  # its runs fail and say why
            lookup.fetch_start(run_config)
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
    """Return part i of n of a list of runs.

    Parts depend only on the grid and not on stored runs, so parts computed at the same time do not
    overlap.

    Args:
        configs: The runs.
        text: "i/n", with i from 1 to n.

    Raises:
        CmpError: The text has another form.
    """
    match = re.fullmatch(r"(\d{1,4})/(\d{1,4})", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise CmpError(f"shard {text!r}: expected i/n with i from 1 to n, such as 2/8")
    return configs[int(match[1]) - 1 :: int(match[2])]


def is_translatable(changes: dict[str, Any], name: str) -> bool:
    """Return whether a study's changes can be applied to a profile.

    A profile with another model does not allow an embedded model by name.
    """
    names_model = any(key.startswith("model.") for key in changes)
    return not (names_model and name in FOREIGN_MODEL_PROFILES)


def translate_changes(changes: dict[str, Any], name: str) -> dict[str, Any]:
    """Return a study's changes, translated for a profile.

    Studies are written for `cpu`. For a profile with another model, peaks, steps and tasks are
    scaled to the same multiples of the profile's values.

    Args:
        changes: Values by dotted key.
        name: The profile.
    """
    if name not in FOREIGN_MODEL_PROFILES:
        return changes
    translated, usual = dict(changes), config.defaults()
    own, cpu = (usual | dict(config.flat_keys(PROFILES[each])) for each in (name, "cpu"))
    for key in changes.keys() & {"schedule.peak", "training.steps", "stream.tasks"}:
        scaled = changes[key] * own[key] / cpu[key]
        translated[key] = float(f"{scaled:.3g}") if key == "schedule.peak" else round(scaled)
    return translated


def joint_training(run_config: RunConfig) -> RunConfig:
    """Return joint training for a run: all its classes in one task with as many steps in total.

    Raises:
        CmpError: The task would have too many steps.
    """
    tree = run_config.to_dict()
    steps, most = run_config.stream.tasks * run_config.training.steps, values.MAX_COUNT
    if steps > most:
        raise CmpError(
            f"training.steps: joint training would have {steps} in one task; at most {most} are "
            "allowed"
        )
    tree["mixture"] |= {"pretraining": 1 / 3, "update": 2 / 3, "buffer": 0.0}
    tree["training"]["steps"], tree["stream"]["tasks"] = steps, 1
    return config.parse(tree, "joint training")
