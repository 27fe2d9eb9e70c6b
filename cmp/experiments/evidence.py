"""What the published studies say of a plan: where runs like it ended, and what each choice does."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from pydantic.dataclasses import dataclass as checked_dataclass

from cmp import config, values
from cmp.experiments import results, scores, studies
from cmp.files import check_record, read_yaml
from cmp.project import book_folder

CHOICES_FILE = book_folder() / "choices.yaml"
SIZES = ("stream.tasks", "training.steps", "training.budget", "training.batch")
"""Keys that say how much is trained; all others but seeds and scoring say how."""
SLACK = 1.1
"""Factor by which a plan may lie beyond the smallest and largest stored runs and be inside."""
SHARES = ("mixture.pretraining", "mixture.update", "mixture.buffer")
"""Three keys that count as one choice."""
MAX_DIFFERENCES = 2
"""Choices in which the nearest stored setting may differ and still stand for a plan."""
SIGNS = {1: "+", -1: "−", 0: "no difference that is seen"}
UNSEEN = "not decided yet"
"""What is said in place of a sign where there is no interval."""


@dataclass(frozen=True)
class Place:
    """Where the stored setting ended that is nearest to a plan.

    Attributes:
        study: Its study.
        setting: Its name.
        scores: A row per aggregate: `mean`, `low` and `high` (a t-interval over bases, NaN where
            there is none yet), and all in `words`.
        n: Number of streams.
        differs: The choices in which the plan differs, in words.
    """

    study: str
    setting: str
    scores: pd.DataFrame
    n: int
    differs: tuple[str, ...]


@dataclass(frozen=True)
class Evidence:
    """Published runs.

    Attributes:
        trajectory: Of all studies, see `cmp.experiments.scores.study_trajectory`; a setting is
            called study/setting.
        runs: The config of one replicate, by study/setting.
    """

    trajectory: pd.DataFrame
    runs: dict[str, config.RunConfig]

    @functools.cached_property
    def differences(self) -> Callable[[str, str], dict[str, scores.Estimate]]:
        """A function of two settings that returns the first minus the second, by aggregate, as
        `cmp.experiments.scores.paired_differences` does. It computes each pair once."""
        return functools.cache(functools.partial(scores.paired_differences, self.trajectory))

    def outside(self, run: config.RunConfig, full_steps: float) -> str:
        """Return why stored runs say nothing of a run of this size; empty if they do.

        Args:
            run: The run.
            full_steps: What an update of it costs, in steps of full fine-tuning.
        """
        if not self.runs:
            return "no study is published here, so effects and advice are left out"
        similar = [each for each in self.runs.values() if each.model.name == run.model.name]
        if not similar:
            return f"no study has runs of {run.model.name}"
        tasks = [each.stream.tasks for each in similar if each.stream.tasks > 1]
        samples = [_full_samples(each) for each in similar]
        for words, own, stored in (
            ("updates", run.stream.tasks, tasks),
            ("samples of full fine-tuning in all", _full_samples(run, full_steps), samples),
        ):
            low, high = min(stored), max(stored)
            if not low / SLACK <= own <= high * SLACK:
                span = f"{low:,.0f}" if low == high else f"{low:,.0f} to {high:,.0f}"
                return f"stored runs of {run.model.name} have {span} {words}, this one {own:,.0f}"
        return ""

    def nearest(self, run: config.RunConfig, full_steps: float) -> Place | None:
        """Return where the stored setting ended that is most like a run.

        Settings are compared by their choices first, then by their size.

        Args:
            run: The run.
            full_steps: What an update of it costs, in steps of full fine-tuning.

        Returns:
            None if every setting differs in more than `MAX_DIFFERENCES` choices.
        """
        own, samples, candidates = training_choices(run), _full_samples(run, full_steps), []
        for name, stored in self.runs.items():
            if stored.model.name == run.model.name and stored.stream.tasks > 1:  # not joint
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
    """Return how a run trains, by dotted key: all but its model, sizes, seeds and scoring."""
    ignored = ("seeds.", "evaluation.", "model.name", *SIZES)
    leaves = config.flat_keys(run.to_dict())
    return {key: value for key, value in leaves if not key.startswith(ignored)}


def _full_samples(run: config.RunConfig, full_steps: float | None = None) -> float:
    """Return the samples of full fine-tuning that a run's compute buys."""
    if full_steps is None:  # `budget` is in multiples of full fine-tuning's cost
        full_steps = run.training.steps * (run.training.budget or 1.0)
    return run.stream.tasks * full_steps * run.training.batch


def gather_evidence() -> Evidence:
    """Return what is published at this moment, which may be nothing; files are read again only if
    one has changed."""
    files = sorted(results.RESULTS.glob("*.parquet"))
    return _gather(tuple((file.stem, file.stat().st_mtime_ns) for file in files))


@functools.lru_cache(maxsize=2)
def _gather(stamps: tuple[tuple[str, int], ...]) -> Evidence:
    tables, runs = [], {}
    for study, _ in stamps:
        if study.startswith(studies.BAND) or studies.load_study(study).explores:
            continue
        published, table = results.published_metrics(study), scores.study_trajectory(study)
        tables.append(table.assign(setting=f"{study}/" + table["setting"]))
        runs |= {f"{study}/{key}": run for key, run in results.setting_configs(published).items()}
    return Evidence(pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(), runs)


@checked_dataclass(frozen=True, config=values.STRICT)
class Choice:
    """A contrast of published settings that shows what a choice does.

    Attributes:
        words: The choice.
        setting: The setting that makes the choice, as study/setting.
        against: The setting that it is compared with.
        fact: The fact of a plan in which the choice arises, see `plan_facts`.
        reason: What is said of a rejected choice beside its numbers.
    """

    words: str
    setting: str
    against: str
    fact: str
    reason: str = ""


@functools.cache
def load_choices() -> dict[str, tuple[Choice, ...]]:
    """Return what a plan may choose ("chosen") and reject ("rejected").

    Raises:
        CmpError: The file is missing or not well-formed.
    """
    return check_record(read_yaml(CHOICES_FILE), dict[str, tuple[Choice, ...]], f"{CHOICES_FILE}: ")


def plan_facts(run: config.RunConfig, other_pool: bool) -> dict[str, bool]:
    """Return whether the facts that choices depend on hold of a plan.

    Args:
        run: The planned run.
        other_pool: Whether public data would stand in for the pretraining data.
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
    """Return what those choices that arise in a plan did in the stored runs.

    Args:
        choices: Of `load_choices`.
        facts: The plan's, see `plan_facts`.
        known: The published runs; a choice of a setting that is not published is left out.
        numbers: Whether the stored runs are of the plan's size; otherwise signs are given alone.

    Returns:
        A row per choice: what it holds, the difference in each aggregate in words, `study`, and
        `size`, the magnitude of that in the geometric mean.
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
    """Return a difference in words: with its interval, or its sign alone."""
    if numbers:
        return change.in_words()
    if np.isnan(change.half):
        return UNSEEN
    return SIGNS[int(change.low > 0) - int(change.high < 0)]
