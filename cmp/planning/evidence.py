"""What the published studies found, for the planner: where their runs ended, and by how much one
setting differs from another."""

import functools
import json
from dataclasses import dataclass

import numpy as np
import pandas as pd

from cmp import claims, config
from cmp.claims import AGGREGATES
from cmp.config import RunConfig
from cmp.errors import CmpError
from cmp.runs import store
from cmp.studies import results

CHAPTERS = ("01", "02", "03", "04", "05", "05-transfer", "06", "07", "08")
"""The studies that are looked at, as far as they are published; more than one may hold a run."""
SIZES = ("stream.tasks", "training.steps", "training.budget", "training.batch")
"""How much is trained; all else but seeds and scoring is how."""
SLACK = 1.1
"""Factor by which a plan may lie beyond the smallest and largest stored runs and be inside."""
SHARES = ("mixture.pretraining", "mixture.update", "mixture.buffer")
"""Three keys, and one choice."""
FAR = 2
"""Choices in which the nearest stored setting may differ and still stand for a plan."""


@dataclass(frozen=True)
class Place:
    """Where the nearest stored setting ended. scores: a row an aggregate, `mean`, `low` and `high`
    (95% t-interval over its `n` replicates); differs: the choices in which a plan is another."""

    study: str
    setting: str
    scores: pd.DataFrame
    n: int
    differs: tuple[str, ...]


@dataclass(frozen=True)
class Evidence:
    """trajectories: study -> its frame; runs: (study, setting) -> the config of one replicate."""

    trajectories: dict[str, pd.DataFrame]
    runs: dict[tuple[str, str], RunConfig]

    def difference(self, study: str, one: str, other: str) -> pd.DataFrame | None:
        """`one` minus `other`, see `cmp.claims.paired_difference`; none if it is not published."""
        frame = self.trajectories.get(study)
        if frame is None or not {one, other} <= set(frame["setting"]):
            return None
        return claims.paired_difference(frame[frame["setting"].isin([one, other])], one, other)

    def scores(self, study: str, setting: str) -> tuple[pd.DataFrame, int]:
        """Where a setting ended, a row an aggregate, and over how many replicates."""
        frame = self.trajectories[study]
        ends, rows = claims.final(frame[frame["setting"] == setting]), {}
        for name in AGGREGATES:
            mean, _, half = claims.t_interval(ends[name].to_numpy())
            rows[name] = {"mean": mean, "low": mean - half, "high": mean + half}
        return pd.DataFrame.from_dict(rows, orient="index"), len(ends)

    def outside(self, run: RunConfig, full_steps: float) -> str:
        """Why stored runs say nothing of the size of this one; empty if they do.

        full_steps: what an update of it costs, in steps of full fine-tuning.
        """
        like = [each for each in self.runs.values() if each.model.name == run.model.name]
        if not like:
            return f"no study has runs of {run.model.name}"
        samples = run.stream.tasks * full_steps * run.training.batch
        for words, own, stored in (
            ("updates", run.stream.tasks, [each.stream.tasks for each in like if not _joint(each)]),
            ("samples of full fine-tuning in all", samples, [_samples(each) for each in like]),
        ):
            if not min(stored) / SLACK <= own <= max(stored) * SLACK:
                low, high = min(stored), max(stored)
                there = f"{low:,.0f}" if low == high else f"{low:,.0f} to {high:,.0f}"
                return f"stored runs of {run.model.name} have {there} {words}, this one {own:,.0f}"
        return ""

    def nearest(self, run: RunConfig, full_steps: float) -> Place | None:
        """Where the stored setting ended that is most like a run: first in its choices, then in its
        size. None where it differs in more than `FAR` choices."""
        own, samples = choices(run), run.stream.tasks * full_steps * run.training.batch
        found = []
        for (study, setting), each in self.runs.items():
            if each.model.name == run.model.name and not _joint(each):
                other = choices(each)
                differs = tuple(key for key in sorted(own) if own[key] != other[key])
                far = abs(np.log(_samples(each) / samples))
                far += abs(np.log(each.stream.tasks / run.stream.tasks))
                count = len({"shares" if key in SHARES else key for key in differs})
                found.append((count, round(far, 3), study, setting, differs))
        if not found or min(found)[0] > FAR:
            return None
        _, _, study, setting, differs = min(found)
        scores, count = self.scores(study, setting)
        words = (f"{key}={own[key]} instead of {choices(self.runs[study, setting])[key]}"
                 for key in differs)  # fmt: skip
        return Place(study, setting, scores, count, tuple(words))


def choices(run: RunConfig) -> dict[str, object]:
    """How a run trains, by dotted key: all but its model, sizes, seeds and scoring. Which seeds a
    base has, and which stream, replicates vary."""
    leaves = config.flat_keys(run.to_dict())
    skipped = ("seeds.", "evaluation.", "model.name")
    return {k: v for k, v in leaves if not k.startswith(skipped) and k not in SIZES}


def _joint(run: RunConfig) -> bool:
    return run.stream.tasks == 1


def _samples(run: RunConfig) -> float:
    """Of full fine-tuning, for what a run costs; `budget` is in multiples of that."""
    steps = run.training.steps * (run.training.budget or 1.0)
    return run.stream.tasks * steps * run.training.batch


def gather() -> Evidence:
    """What is published at this moment; read once, until a file changes."""
    stamps = []
    for study in CHAPTERS:
        if results.is_published(study):
            stamps.append((study, results.file_of(study).stat().st_mtime_ns))
    return _gather(tuple(stamps))


@functools.lru_cache(maxsize=2)
def _gather(stamps: tuple[tuple[str, int], ...]) -> Evidence:
    if not stamps:
        raise CmpError("no study is published; `cmp study NN --publish` computes one")
    trajectories, runs = {}, {}
    for study, _ in stamps:
        published = results.published(study)
        trajectories[study] = store.trajectory(published)
        for setting, text in published.groupby("setting", sort=False)["config"].first().items():
            runs[study, setting] = config.parse(json.loads(text), f"results of chapter {study}")
    return Evidence(trajectories, runs)
