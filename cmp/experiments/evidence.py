"""What the published studies found, for the planner: where their runs ended, and by how much one
setting differs from another."""

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from cmp import config
from cmp.config import RunConfig
from cmp.errors import CmpError
from cmp.experiments import results, store
from cmp.experiments.claims import AGGREGATES, final_scores, paired_difference, t_interval

if TYPE_CHECKING:
    from cmp.experiments.planner import PlanRequest

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
        return paired_difference(frame[frame["setting"].isin([one, other])], one, other)

    def scores(self, study: str, setting: str) -> tuple[pd.DataFrame, int]:
        """Where a setting ended, a row an aggregate, and over how many replicates."""
        frame = self.trajectories[study]
        ends, rows = final_scores(frame[frame["setting"] == setting]), {}
        for name in AGGREGATES:
            mean, _, half = t_interval(ends[name].to_numpy())
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
            (
                "samples of full fine-tuning in all",
                samples,
                [_sample_counts(each) for each in like],
            ),
        ):
            if not min(stored) / SLACK <= own <= max(stored) * SLACK:
                low, high = min(stored), max(stored)
                there = f"{low:,.0f}" if low == high else f"{low:,.0f} to {high:,.0f}"
                return f"stored runs of {run.model.name} have {there} {words}, this one {own:,.0f}"
        return ""

    def nearest(self, run: RunConfig, full_steps: float) -> Place | None:
        """Where the stored setting ended that is most like a run: first in its choices, then in its
        size. None where it differs in more than `FAR` choices."""
        own, samples = evidence_settings(run), run.stream.tasks * full_steps * run.training.batch
        found = []
        for (study, setting), each in self.runs.items():
            if each.model.name == run.model.name and not _joint(each):
                other = evidence_settings(each)
                differs = tuple(key for key in sorted(own) if own[key] != other[key])
                far = abs(np.log(_sample_counts(each) / samples))
                far += abs(np.log(each.stream.tasks / run.stream.tasks))
                count = len({"shares" if key in SHARES else key for key in differs})
                found.append((count, round(far, 3), study, setting, differs))
        if not found or min(found)[0] > FAR:
            return None
        _, _, study, setting, differs = min(found)
        scores, count = self.scores(study, setting)
        words = (f"{key}={own[key]} instead of {evidence_settings(self.runs[study, setting])[key]}"
                 for key in differs)  # fmt: skip
        return Place(study, setting, scores, count, tuple(words))


def evidence_settings(run: RunConfig) -> dict[str, object]:
    """How a run trains, by dotted key: all but its model, sizes, seeds and scoring. Which seeds a
    base has, and which stream, replicates vary."""
    leaves = config.flat_keys(run.to_dict())
    skipped = ("seeds.", "evaluation.", "model.name")
    return {k: v for k, v in leaves if not k.startswith(skipped) and k not in SIZES}


def _joint(run: RunConfig) -> bool:
    return run.stream.tasks == 1


def _sample_counts(run: RunConfig) -> float:
    """Of full fine-tuning, for what a run costs; `budget` is in multiples of that."""
    steps = run.training.steps * (run.training.budget or 1.0)
    return run.stream.tasks * steps * run.training.batch


def gather_evidence() -> Evidence:
    """What is published at this moment; read once, until a file changes."""
    stamps = []
    for study in CHAPTERS:
        if results.is_published(study):
            stamps.append((study, results.results_file(study).stat().st_mtime_ns))
    return _gather_evidence(tuple(stamps))


@functools.lru_cache(maxsize=2)
def _gather_evidence(stamps: tuple[tuple[str, int], ...]) -> Evidence:
    if not stamps:
        raise CmpError("no study is published; `cmpt study NN --publish` computes one")
    trajectories, runs = {}, {}
    for study, _ in stamps:
        published = results.published_metrics(study)
        trajectories[study] = store.trajectory(published)
        for setting, text in published.groupby("setting", sort=False)["config"].first().items():
            runs[study, setting] = config.parse(json.loads(text), f"results of chapter {study}")
    return Evidence(trajectories, runs)


Tree = dict[str, Any]
DIFFERENCE_WORDS = {1: "+", -1: "−", 0: "no difference that is seen"}


class Choice(NamedTuple):
    """A contrast of a study that shows what a choice does. when: whether a plan makes it."""

    words: str
    study: str
    setting: str
    against: str
    when: Callable[["PlanRequest", Tree], bool]


def _policy(tree: Tree) -> str:
    return tree["merging"]["policy"]


def _method(tree: Tree) -> str:
    return tree.get("method", {}).get("name", "full")


CHOICES = (
    Choice("replay of earlier updates", "01", "thirds", "pool only",
           lambda wish, tree: tree["mixture"]["buffer"] > 0),
    Choice("replay of pretraining data", "01", "thirds", "buffer only",
           lambda wish, tree: wish.pool > 0),
    Choice("no replay at all", "01", "update only", "thirds",
           lambda wish, tree: tree["mixture"]["update"] == 1),
    Choice("half of a batch from the buffer", "07",
           "triangle, pretraining 0.25, update 0.25, buffer 0.5", "thirds",
           lambda wish, tree: tree["mixture"]["buffer"] == 0.5 and wish.pool > 0),
    Choice("moments carried across updates", "04", "cosine carried", "cosine",
           lambda wish, tree: tree.get("optimizer", {}).get("carry", False)),
    Choice("an average deployed, training goes on", "03", "policy, policy last-unrolled",
           "no merging", lambda wish, tree: _policy(tree) == "last-unrolled"),
    Choice("EMA-Merge", "03", "EMA", "no merging",
           lambda wish, tree: _policy(tree) == "ema" and wish.pool > 0 and wish.keep != "all"),
    Choice("EMA-Merge, a tenth of each update", "03", "EMA by weight, weight 0.1", "no merging",
           lambda wish, tree: wish.keep == "all"),
    Choice("EMA-Merge without replay", "03", "no replay, EMA", "no replay",
           lambda wish, tree: _policy(tree) == "ema" and wish.pool == 0),
    Choice("the image tower locked", "02", "locked-image", "full",
           lambda wish, tree: _method(tree) == "locked-image"),
)  # fmt: skip
"""What a plan may choose."""

ALTERNATIVES = (
    Choice("new data alone", "01", "update only", "thirds",
           lambda wish, tree: tree["mixture"]["update"] < 1),
    Choice("public data in place of the pretraining data", "07", "other pool", "buffer only",
           lambda wish, tree: wish.other_pool),
    Choice("a buffer drawn evenly by class", "07", "buffer: by class", "thirds",
           lambda wish, tree: tree["mixture"]["buffer"] > 0),
    Choice("half the learning rate", "03", "lower rate", "no merging",
           lambda wish, tree: True),
    Choice("a meta schedule, against a lower peak", "04", "meta-cosine", "lower cosine",
           lambda wish, tree: True),
    Choice("LoRA", "02", "lora", "full", lambda wish, tree: _method(tree) == "full"),
    Choice("the image tower locked, where looks are new, too", "02", "locked-image", "full",
           lambda wish, tree: _method(tree) == "full"),
    Choice("EMA-Merge, against deploying an average", "03", "EMA", "policy, policy last-unrolled",
           lambda wish, tree: _policy(tree) == "last-unrolled"),
    Choice("deploying an average without training from it", "03", "policy, policy last-unrolled",
           "EMA", lambda wish, tree: _policy(tree) == "ema"),
    Choice("every update from the weights before the stream", "03", "zero-all", "EMA",
           lambda wish, tree: True),
    Choice("an order of similar classes", "06", "similarity", "random",
           lambda wish, tree: True),
)  # fmt: skip
"""What a plan may reject."""

WHY = {
    "the image tower locked, where looks are new, too": (
        "it rests on looks that the model knows; ask for it by new: names"
    ),
    "EMA-Merge, against deploying an average": "ask for it by keep: most",
    "deploying an average without training from it": "what must be kept comes first here",
    "half the learning rate": "a trade, and merging makes it at a better price",
    "an order of similar classes": "arrange nothing where you replay",
}
"""What is to say beside the numbers."""


def difference_sign(row: pd.Series) -> int:
    """Which side of zero a difference lies on by its 95% interval: 1, -1, or 0 for neither."""
    return int(row["low"] > 0) - int(row["high"] < 0)


def describe_effect(row: pd.Series, numbers: bool) -> str:
    """A difference in words: with numbers, or its sign alone."""
    sign = DIFFERENCE_WORDS[difference_sign(row)]
    if not numbers:
        return sign
    text = f"{row['difference']:+.1f} ({row['low']:.1f} to {row['high']:.1f})"
    return text.replace("-", "−")


def describe_effects(
    wish: "PlanRequest", tree: Tree, known: Evidence, numbers: bool
) -> pd.DataFrame:
    """A row a choice of the plan, largest first by what it did to the geometric mean: `A_KA` and
    `A_ZS` in words, and its `study`. numbers: whether the stored runs are of this size."""
    rows, sizes = [], []
    for choice in CHOICES:
        if choice.when(wish, tree):
            found = known.difference(choice.study, choice.setting, choice.against)
            if found is not None:
                scores = {
                    name: describe_effect(found.loc[name], numbers) for name in ("A_KA", "A_ZS")
                }
                rows.append({"choice": choice.words} | scores | {"study": choice.study})
                sizes.append(abs(found.loc["GM", "difference"]))
    order = np.argsort(-np.array(sizes), kind="stable")
    return pd.DataFrame([rows[place] for place in order], columns=["choice", *NAMES])


NAMES = ("A_KA", "A_ZS", "study")


def rejected_alternatives(
    wish: "PlanRequest", tree: Tree, known: Evidence, numbers: bool
) -> dict[str, str]:
    """Alternative -> what it did in the stored runs, and why it is none; with its chapter."""
    found = {}
    for choice in ALTERNATIVES:
        if not choice.when(wish, tree):
            continue
        frame = known.difference(choice.study, choice.setting, choice.against)
        if frame is not None:
            scores = [
                f"{name} {describe_effect(frame.loc[name], numbers)}"
                for name in ("A_KA", "A_ZS", "GM")
            ]
            why = f"; {WHY[choice.words]}" if choice.words in WHY else ""
            pair = f"{choice.setting!r} minus {choice.against!r}"
            found[choice.words] = f"{pair}: {', '.join(scores)} (chapter {choice.study}){why}"
    return found
