"""Find evidence for a plan in the published studies: scores of similar runs, and effects of
choices."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from pydantic.dataclasses import dataclass as checked_dataclass

from cmp import config, values
from cmp.parsing import check_record, read_yaml
from lab.evidence import BOOK, results, scores, studies

CHOICES_FILE = BOOK / "choices.yaml"
SIZES = ("stream.tasks", "training.steps", "training.budget", "training.batch")
"""Keys for how much is trained. All others except seeds and evaluation set how."""
SLACK = 1.1
"""Factor by which a plan may exceed the range of stored runs and still count as inside."""
SHARES = ("mixture.pretraining", "mixture.update", "mixture.buffer")
"""Three keys that count as a single choice."""
MAX_DIFFERENCES = 2
"""Number of choices in which the nearest stored setting may differ from a plan."""
SIGNS = {1: "+", -1: "−", 0: "no detectable difference"}
UNSEEN = "not decided yet"
"""The text used instead of a sign if there is no interval."""


@dataclass(frozen=True)
class Place:
    """The final scores of the stored setting nearest to a plan.

    Attributes:
        study: The study of the setting.
        setting: The name of the setting.
        scores: One row per aggregate: `mean`, `low` and `high` (a t-interval over bases, NaN if
            there is none yet), and `words`, a text with all of them.
        n: The number of streams.
        differs: The choices in which the plan differs, as text.
    """

    study: str
    setting: str
    scores: pd.DataFrame
    n: int
    differs: tuple[str, ...]


@dataclass(frozen=True)
class Evidence:
    """The published runs.

    Attributes:
        trajectory: The trajectories of all studies, see `lab.evidence.scores.study_trajectory`,
            with settings named study/setting.
        runs: The config of one replicate of each study/setting.
    """

    trajectory: pd.DataFrame
    runs: dict[str, config.RunConfig]

    @functools.cached_property
    def differences(self) -> Callable[[str, str], dict[str, scores.Estimate]]:
        """A function of two settings that returns the first minus the second, by aggregate, like
        `lab.evidence.scores.paired_differences`, and caches the result."""
        return functools.cache(functools.partial(scores.paired_differences, self.trajectory))

    def outside(self, run: config.RunConfig, full_steps: float) -> str:
        """Return why stored runs are no evidence for a run of this size, or "" if they are.

        Args:
            run: The run.
            full_steps: The cost of an update of the run, in steps of full fine-tuning.
        """
        if not self.runs:
            return "no studies are published here, so effects and advice are left out"
        similar = [each for each in self.runs.values() if each.model.name == run.model.name]
        tasks = [each.stream.tasks for each in similar if each.stream.tasks > 1]
        if not tasks:
            return f"no study has runs of {run.model.name}"
        samples = [_full_samples(each) for each in similar]
        for words, own, stored in (
            ("updates", run.stream.tasks, tasks),
            ("samples of full fine-tuning in all", _full_samples(run, full_steps), samples),
        ):
            low, high = min(stored), max(stored)
            if not low / SLACK <= own <= high * SLACK:
                span = f"{low:,.0f}" if low == high else f"{low:,.0f} to {high:,.0f}"
                return (
                    f"stored runs of {run.model.name} have {span} {words}, and this one {own:,.0f}"
                )
        return ""

    def nearest(self, run: config.RunConfig, full_steps: float) -> Place | None:
        """Return the final scores of the stored setting most similar to a run.

        Settings are compared first by their choices and then by their size.

        Args:
            run: The run.
            full_steps: The cost of an update of the run, in steps of full fine-tuning.

        Returns:
            The place, or None if every setting differs in more than `MAX_DIFFERENCES` choices.
        """
        own, samples, candidates = training_choices(run), _full_samples(run, full_steps), []
        for name, stored in self.runs.items():
            if stored.model.name == run.model.name and stored.stream.tasks > 1:  # no joint
                other = training_choices(stored)
                keys = [key for key in sorted(own) if own[key] != other[key]]
                distance = abs(np.log(_full_samples(stored) / samples))
                distance += abs(np.log(stored.stream.tasks / run.stream.tasks))
                count = len({"shares" if key in SHARES else key for key in keys})
                words = tuple(f"{key}={own[key]} instead of {other[key]}" for key in keys)
                candidates.append((count, round(distance, 3), name, words))
        count, _, name, words = min(candidates, default=(np.inf, 0, "", ()))
        if count > MAX_DIFFERENCES:
            return None
        rows = self.trajectory[self.trajectory["setting"] == name]
        estimates = scores.setting_estimates(rows, name)
        table = pd.DataFrame(
            {"mean": each.value, "low": each.low, "high": each.high, "words": each.in_words("")}
            for each in estimates.values()
        ).set_axis([*estimates])
        study, _, setting = name.partition("/")
        return Place(study, setting, table, rows["replicate"].nunique(), words)


def training_choices(run: config.RunConfig) -> dict[str, object]:
    """Return how a run trains, by dotted key: everything except its model, sizes, seeds and
    evaluation."""
    ignored = ("seeds.", "evaluation.", "model.name", *SIZES)
    leaves = config.flat_keys(run.to_dict())
    return {key: value for key, value in leaves if not key.startswith(ignored)}


def _full_samples(run: config.RunConfig, full_steps: float | None = None) -> float:
    """Return the samples of full fine-tuning that a run's compute buys."""
    if full_steps is None:  # `budget` is in multiples of the cost of full fine-tuning
        full_steps = run.training.steps * (run.training.budget or 1.0)
    return run.stream.tasks * full_steps * run.training.batch


def gather_evidence() -> Evidence:
    """Return the currently published runs, possibly none. Files are read again only if one has
    changed."""
    files = sorted(results.RESULTS.glob("*.parquet"))
    return _gather(tuple((file.stem, file.stat().st_mtime_ns) for file in files))


@functools.lru_cache(maxsize=2)
def _gather(stamps: tuple[tuple[str, int], ...]) -> Evidence:
    tables, runs = [], {}
    for study, _ in stamps:
        if study.startswith(studies.BAND) or studies.load_study(study).explores:
            continue
        published = results.published_metrics(study)
        table = scores.study_trajectory(study, published)
        tables.append(table.assign(setting=f"{study}/" + table["setting"]))
        runs |= {f"{study}/{key}": run for key, run in results.setting_configs(published).items()}
    return Evidence(pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(), runs)


@checked_dataclass(frozen=True, config=values.STRICT)
class Choice:
    """A contrast of published settings that shows the effect of a choice.

    Attributes:
        words: The choice as text.
        setting: The setting that makes the choice, as study/setting.
        against: The setting that it is compared with.
        fact: The fact of a plan for which the choice is relevant, see `plan_facts`.
        reason: The text on a rejected choice, besides its numbers.
    """

    words: str
    setting: str
    against: str
    fact: str
    reason: str = ""


@functools.cache
def load_choices() -> dict[str, tuple[Choice, ...]]:
    """Return the choices that a plan may make ("chosen") and reject ("rejected").

    Raises:
        CmpError: The file is missing or invalid.
    """
    return check_record(read_yaml(CHOICES_FILE), dict[str, tuple[Choice, ...]], f"{CHOICES_FILE}: ")


def plan_facts(run: config.RunConfig, other_pool: bool) -> dict[str, bool]:
    """Return which of the facts that choices depend on hold for a plan.

    Args:
        run: The planned run.
        other_pool: Whether public data replace the pretraining data.
    """
    mixture, merging, has_pool = run.mixture, run.merging, run.mixture.pretraining > 0
    is_ema, tenth = merging.policy == "ema", merging.weight == 0.1
    return {
        "always": True,
        "buffer": mixture.buffer > 0,
        "pool": has_pool and not other_pool,
        "other pool": other_pool,
        "replay": mixture.update < 1,
        "no replay": mixture.update == 1,
        "carry": run.carries_moments,
        "EMA with pool": is_ema and has_pool and not tenth,
        "EMA of a tenth": is_ema and tenth,
        "EMA without pool": is_ema and not has_pool,
        "locked image": run.method.name == "locked-image",
        "full": run.method.name == "full",
    }


def effects_of(
    choices: tuple[Choice, ...], facts: dict[str, bool], known: Evidence, numbers: bool
) -> pd.DataFrame:
    """Return the effects, in stored runs, of the choices that are relevant for a plan.

    Args:
        choices: The choices from `load_choices`.
        facts: The facts of the plan, see `plan_facts`.
        known: The published runs. Choices with unpublished settings are left out.
        numbers: Whether stored runs have the size of the plan; otherwise only signs are given.

    Returns:
        One row per choice: its fields, the difference in each aggregate as text, `study`, and
        `size`, the magnitude of the difference in the geometric mean.
    """
    rows = []
    for choice in choices:
        pair = choice.setting, choice.against
        if facts[choice.fact] and {*pair} <= known.runs.keys():
            change = known.differences(*pair)
            words = {name: describe_difference(each, numbers) for name, each in change.items()}
            about = {"study": choice.setting.partition("/")[0], "size": abs(change["GM"].value)}
            rows.append(vars(choice) | words | about)
    columns = [*Choice.__dataclass_fields__, "study", *scores.AGGREGATES, "size"]
    return pd.DataFrame(rows, columns=columns)


def describe_difference(change: scores.Estimate, numbers: bool) -> str:
    """Return a difference as text, with its interval or only its sign."""
    if numbers:
        return change.in_words()
    if np.isnan(change.half):
        return UNSEEN
    return SIGNS[int(change.low > 0) - int(change.high < 0)]
