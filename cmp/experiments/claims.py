"""Estimates: what a run came to, and paired differences of settings over replicates."""

import itertools
import json
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass
from scipy import stats

from cmp.config import STRICT
from cmp.errors import CmpError
from cmp.experiments.studies import Study

LEVEL = 0.95
AGGREGATES = ("A_KA", "A_ZS", "GM")


def check_settings(settings: Iterable[str], names: Iterable[str], source: str) -> None:
    """`CmpError` for a name that is no setting."""
    there = list(dict.fromkeys(settings))
    for name in names:
        if name not in there:
            raise CmpError(f"{source}: no setting {name!r}; there are {', '.join(there)}")


def t_interval(values: np.ndarray, level: float = LEVEL) -> tuple[float, float, float]:
    """(mean, standard error, half the width of the t-interval) of independent values.

    With a single value the last two are NaN, for one replicate says nothing about spread; with no
    value all three are.
    """
    count, unknown = len(values), float("nan")
    mean = float(np.mean(values)) if count else unknown
    if count < 2:
        return mean, unknown, unknown
    error = float(np.std(values, ddof=1) / np.sqrt(count))
    return mean, error, error * float(stats.t.ppf((1 + level) / 2, count - 1))


def _widest_scope(trajectory: pd.DataFrame) -> pd.DataFrame:
    """The rows of the widest test that was scored."""
    wide = "full" if (trajectory["scope"] == "full").any() else "subset"
    return trajectory[trajectory["scope"] == wide]


def final_scores(trajectory: pd.DataFrame) -> pd.DataFrame:
    """The rows of each (setting, replicate) after its last task, on the widest test scored."""
    chosen = _widest_scope(trajectory)
    last = chosen.groupby(["setting", "replicate"], sort=False)["task"].transform("max")
    return chosen[chosen["task"] == last]


def score_change(trajectory: pd.DataFrame) -> pd.DataFrame:
    """A row a (setting, replicate): each aggregate at the end of the stream minus before it, on the
    widest test scored. Models that start from different scores can be compared by it."""
    keys, chosen = ["setting", "replicate"], _widest_scope(trajectory)
    before = chosen[chosen["task"] == 0].set_index(keys)[list(AGGREGATES)]
    after = final_scores(trajectory).set_index(keys)[list(AGGREGATES)]
    return (after - before).reset_index()


def mean_over_tasks(trajectory: pd.DataFrame) -> pd.DataFrame:
    """A row a (setting, replicate): each aggregate's mean over the tasks of the stream, on the
    subset that is scored after every task; the area under its trajectory, per task. `CmpError` if
    no subset was scored."""
    chosen = trajectory[(trajectory["scope"] == "subset") & (trajectory["task"] > 0)]
    if not len(chosen):
        raise CmpError("trajectory: an area takes the scores after each task, scope 'subset'")
    keys = ["setting", "replicate"]
    return chosen.groupby(keys, sort=False)[list(AGGREGATES)].mean().reset_index()


MEASURES = {"end": final_scores, "area": mean_over_tasks, "change": score_change}
"""What a run comes to, by name: a row a (setting, replicate) with its aggregates."""


def setting_means(trajectory: pd.DataFrame, at: str = "end") -> pd.DataFrame:
    """A row a setting: the mean of each aggregate by one of `MEASURES`, and half the width of its
    interval, as "A_KA half"."""
    groups = MEASURES[at](trajectory).groupby("setting", sort=False)[list(AGGREGATES)]
    half = groups.agg(lambda values: t_interval(values.to_numpy())[2])
    return groups.mean().join(half.add_suffix(" half"))


def end_table(trajectory: pd.DataFrame) -> pd.DataFrame:
    """A row a setting: each aggregate at the end of the stream, as "mean ± half the interval"."""
    rows = final_scores(trajectory).groupby("setting", sort=False)
    table = rows[list(AGGREGATES)].agg(
        lambda values: "{:.1f} ± {:.1f}".format(*_mean_and_half(values))
    )
    return table.assign(replicates=rows.size())


def _mean_and_half(values: pd.Series) -> tuple[float, float]:
    mean, _, half = t_interval(values.to_numpy())
    return mean, half


def by_replicate(trajectory: pd.DataFrame, at: str = "end") -> pd.DataFrame:
    """What all runs came to, by one of `MEASURES`: a row a replicate, columns (aggregate, setting),
    sorted; NaN where a run is missing. `CmpError` if a run is there twice, for it would count as
    two replicates."""
    rows = MEASURES[at](trajectory)
    if (twice := rows.duplicated(["setting", "replicate"])).any():
        setting, replicate = rows.loc[twice, ["setting", "replicate"]].iloc[0]
        raise CmpError(f"trajectory: replicate {replicate} of {setting!r} is there twice")
    table = rows.set_index(["replicate", "setting"])[list(AGGREGATES)].unstack("setting")
    every = [AGGREGATES, sorted(trajectory["setting"].unique())]
    return table.reindex(
        index=sorted(trajectory["replicate"].unique()), columns=pd.MultiIndex.from_product(every)
    )


def paired_difference(
    trajectory: pd.DataFrame, one: str, other: str, at: str = "end"
) -> pd.DataFrame:
    """`one` minus `other` by one of `MEASURES`, paired by replicate: a row an aggregate.

    Columns: `difference`, `standard_error`, `low` and `high` (the 95% interval, for looking: it
    knows of no other comparison), `errors` (the difference in standard errors), `replicates`.
    """
    check_settings(trajectory["setting"], (one, other), "paired difference")
    table, rows = by_replicate(trajectory, at), {}
    for name in AGGREGATES:
        differences = (table[name, one] - table[name, other]).dropna()
        mean, error, half = t_interval(differences.to_numpy())
        rows[name] = {
            "difference": mean,
            "standard_error": error,
            "low": mean - half,
            "high": mean + half,
            "errors": mean / error if error else float("nan"),
            "replicates": len(differences),
        }
    return pd.DataFrame.from_dict(rows, orient="index")


MIN_RANKED = 3
"""Settings that a ranking must have to say anything."""


def family_members(settings: Iterable[str], family: str) -> dict[str, str]:
    """The settings of a family, "tiny: full" and so on of "tiny", by what follows its name."""
    start = f"{family}: "
    return {name.removeprefix(start): name for name in settings if name.startswith(start)}


def common_settings(
    settings: Iterable[str], one: str, other: str, source: str
) -> list[tuple[str, str]]:
    """The settings that two families share, as pairs; `CmpError` if they are too few to rank."""
    first, second = (family_members(list(settings), family) for family in (one, other))
    found = [(first[name], second[name]) for name in first if name in second]
    if len(found) < MIN_RANKED:
        raise CmpError(
            f"{source}: {one!r} and {other!r} share {len(found)} settings, as in '{one}: NAME'; "
            f"a ranking takes {MIN_RANKED}"
        )
    return found


def rank_agreement(table: pd.DataFrame, one: str, other: str) -> pd.Series:
    """Spearman's correlation, in each replicate, of the scores of two families' common settings.

    table: a row a replicate, a column a setting. NaN for a replicate that lacks a run.
    """
    pairs = common_settings(table.columns, one, other, "agreement")
    left, right = (table[list(names)] for names in zip(*pairs, strict=True))
    found = {
        replicate: float(stats.spearmanr(left.loc[replicate], right.loc[replicate]).statistic)
        for replicate in table.index
    }
    return pd.Series(found).reindex(table.index)


def rank_repeatability(table: pd.DataFrame, family: str) -> pd.Series:
    """Spearman's correlation of a family's ranking in one replicate with that in another, each
    pair of replicates once. table: a row a replicate, a column a setting."""
    scores = table[list(family_members(table.columns, family).values())].dropna()
    pairs = itertools.combinations(scores.index, 2)
    return pd.Series(
        {
            pair: float(stats.spearmanr(*scores.loc[list(pair)].to_numpy()).statistic)
            for pair in pairs
        }
    )


ClaimText = Annotated[str, Field(min_length=1)]


@checked_dataclass(frozen=True, config=STRICT)
class Claim:
    """What is claimed of `setting` minus `against` on one aggregate: at the end of the stream, or
    with `at: change` of what the stream did to it, or with `at: area` in the mean over its tasks
    (of the subset that is scored after each).

    superiority: the difference lies beyond `margin` on the side of `direction`; equivalence: it
    lies within ± `margin`. The margin is in points: what the reader of a chapter would care about.
    beyond: two more settings, first minus second; claimed is how far the difference exceeds theirs.
    ranks: `setting` and `against` are families of settings, such as "tiny" of "tiny: full", and
    claimed is that the rank correlation of what they share lies above `margin`.
    """

    name: ClaimText
    sentence: ClaimText
    setting: str
    against: str
    aggregate: Literal["A_KA", "A_ZS", "GM"]
    direction: Literal["higher", "lower"] = "higher"
    margin: Annotated[float, Field(ge=0)] = 2.0
    kind: Literal["superiority", "equivalence", "ranks"] = "superiority"
    at: Literal["end", "area", "change"] = "end"
    beyond: tuple[str, str] | None = None

    def __post_init__(self) -> None:
        if self.setting == self.against:
            raise ValueError(f"{self.name!r} holds {self.setting!r} against itself")
        if self.kind == "equivalence" and (self.direction == "lower" or self.margin == 0):
            raise ValueError(f"{self.name!r}: equivalence has no direction, and a margin above 0")
        if self.kind == "ranks" and (self.direction == "lower" or self.margin >= 1 or self.beyond):
            raise ValueError(
                f"{self.name!r}: ranks have no direction, a margin below 1, and nothing beyond"
            )

    @property
    def unit(self) -> str:
        """What its margin and its interval are in."""
        return "rank correlation" if self.kind == "ranks" else "points"

    @property
    def settings(self) -> tuple[str, ...]:
        """Those whose runs it is of; of ranks the two families."""
        return (self.setting, self.against, *(self.beyond or ()))

    def check(self, settings: Iterable[str], source: str) -> None:
        """`CmpError` if it is of settings that are not there."""
        if self.kind == "ranks":
            common_settings(settings, self.setting, self.against, source)
        else:
            check_settings(settings, self.settings, source)

    def names(self, settings: Iterable[str]) -> list[str]:
        """The settings whose runs it is of, of those that there are."""
        if self.kind != "ranks":
            return [*self.settings]
        pairs = common_settings(settings, self.setting, self.against, f"claim {self.name!r}")
        return [name for pair in pairs for name in pair]

    def measured(self, table: pd.DataFrame) -> pd.Series:
        """What is claimed, in each replicate. table: a row a replicate, a column a setting."""
        if self.kind == "ranks":
            return rank_agreement(table, self.setting, self.against)
        differences = table[self.setting] - table[self.against]
        if self.beyond:
            differences -= table[self.beyond[0]] - table[self.beyond[1]]
        return differences

    @property
    def region(self) -> tuple[float, float]:
        """The open interval of values, in its unit, of which the claim is true."""
        if self.kind == "equivalence":
            return -self.margin, self.margin
        return (self.margin, np.inf) if self.direction == "higher" else (-np.inf, -self.margin)


def claims_of(study: Study) -> tuple[Claim, ...]:
    """The claims of a chapter's study; `CmpError` names the claim and the key that are wrong."""
    source = f"study {study.chapter}: claims"
    try:
        found = TypeAdapter(tuple[Claim, ...]).validate_json(json.dumps(study.claims))
    except TypeError as error:
        raise CmpError(f"{source}: {error}") from error
    except ValidationError as error:
        fault = error.errors()[0]
        key, message = ".".join(map(str, fault["loc"])), fault["msg"].removeprefix("Value error, ")
        keys = ", ".join(Claim.__dataclass_fields__)
        message = f"{message} (found {fault['input']!r:.80}); the keys of a claim are {keys}"
        raise CmpError(f"{source}.{key}: {message}") from error
    names = [claim.name for claim in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise CmpError(f"{source}: two are named {twice[0]!r}")
    for claim in found:
        claim.check(study.settings, f"{source}: {claim.name!r}")
    return found


ALPHA = 0.05
SUPPORTED, REFUTED, UNDECIDED = "supported", "not supported", "undecided"


def holm(p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Holm's (1979) step-down over the last axis: (adjusted p, divisor of `ALPHA`).

    The k-th smallest of m is held against `ALPHA / (m - k + 1)`, and after the first that fails so
    do all that follow; their divisor is that of the first. NaN counts in m and never passes.
    """
    p = np.nan_to_num(np.asarray(p, float), nan=1.0)
    order = np.argsort(p, axis=-1, kind="stable")
    divisors = np.broadcast_to(p.shape[-1] - np.arange(p.shape[-1]), p.shape)
    scaled = np.take_along_axis(p, order, -1) * divisors
    stopped = np.maximum.accumulate(np.where(scaled < ALPHA, 0, divisors), axis=-1)
    adjusted, divisor = np.empty_like(p), np.empty_like(p)
    steps = np.minimum(np.maximum.accumulate(scaled, axis=-1), 1)
    np.put_along_axis(adjusted, order, steps, -1)
    np.put_along_axis(divisor, order, np.maximum(divisors, stopped), -1)
    return adjusted, divisor


def judge(
    estimate: np.ndarray, error: np.ndarray, count: np.ndarray, claims: Sequence[Claim]
) -> dict[str, np.ndarray]:
    """The verdicts of a chapter's claims, which are one family: arrays [..., claims].

    estimate, error, count: mean, standard error (points) and number of paired differences.
    `p` tests whether the difference lies on the claim's nearest margin. Superiority: two-sided, as
    its interval is. Equivalence: one-sided, the larger p of two one-sided tests (Schuirmann 1987).
    Holm's correction gives `p_adjusted` and the step's share of `ALPHA`; the interval is widened
    to that share: `level` is 1 - ALPHA/divisor, for equivalence 1 - 2 ALPHA/divisor (95% and 90%
    where a claim stands alone). Then, from this one interval and from nothing else:

    * supported: it lies within the claim's region, that is, beyond the margin on the claimed side
      or, for equivalence, between both margins;
    * not supported: it lies wholly outside the region;
    * undecided: it holds a margin, or there is no interval (fewer than two replicates).

    A verdict is supported or not supported exactly where `p_adjusted` < `ALPHA`. That a chapter
    holds any wrong one has a chance of about `ALPHA` at most (simulated in the tests; a single
    superiority claim: half of that).
    """
    above, below = np.array([claim.region for claim in claims], float).reshape(-1, 2).T
    sides = np.array([1 if claim.kind == "equivalence" else 2 for claim in claims])
    gap = np.minimum(estimate - above, below - estimate)
    with np.errstate(divide="ignore", invalid="ignore"):
        distance = np.where(gap == 0, 0 * error, np.abs(gap) / error)
    p = sides * stats.t.sf(distance, count - 1)
    adjusted, divisor = holm(p)
    tail = ALPHA / (sides * divisor)
    half = error * stats.t.isf(tail, count - 1)
    low, high = estimate - half, estimate + half
    verdict = np.select(
        [(above < low) & (high < below), (high < above) | (below < low)],
        [SUPPORTED, REFUTED],
        UNDECIDED,
    )
    adjusted = np.where(np.isnan(p), np.nan, adjusted)
    numbers = {"low": low, "high": high, "level": 1 - 2 * tail, "p": p, "p_adjusted": adjusted}
    return numbers | {"verdict": verdict}


def verdicts(trajectory: pd.DataFrame, claims: Sequence[Claim]) -> pd.DataFrame:
    """A row a claim (index: its name): estimate, interval, verdict, and a sentence for people.

    claims: all claims of the chapter, for they are corrected together. Columns: `claimed` (its
    sentence), `setting`, `against`, `what` (the two, and what they are held beyond), `aggregate`,
    `at`, `unit`, `above` and `below` (the claim is true of values between these), `n` (replicates
    that hold all its settings; the others are dropped, and `sentence` says which), `estimate` (in
    its unit: points, setting minus against, or rank correlation) and those of `judge`.
    Raises `CmpError` for a setting that the trajectory lacks.
    """
    tables = {at: by_replicate(trajectory, at) for at in dict.fromkeys(c.at for c in claims)}
    settings, rows, lacking = trajectory["setting"].unique(), [], []
    for claim in claims:
        claim.check(settings, f"claim {claim.name!r}")
        values = claim.measured(tables[claim.at][claim.aggregate])
        mean, error, _ = t_interval(values.dropna().to_numpy())
        rows.append((claim.name, claim.sentence, claim.setting, claim.against, _comparison(claim),
                     claim.aggregate, claim.at, claim.unit, *claim.region, values.notna().sum(),
                     mean, error))  # fmt: skip
        begun = trajectory.loc[trajectory["setting"].isin(claim.names(settings)), "replicate"]
        lacking.append([each for each in values.index[values.isna()] if each in set(begun)])
    names = ["claim", "claimed", "setting", "against", "what", "aggregate", "at", "unit", "above",
             "below", "n", "estimate", "error"]  # fmt: skip
    frame = pd.DataFrame(rows, columns=names).set_index("claim")
    numbers = [frame[name].to_numpy() for name in ("estimate", "error", "n")]
    frame = frame.drop(columns="error").assign(**judge(*numbers, claims))
    told = zip(frame.to_dict("records"), lacking, strict=True)
    return frame.assign(sentence=[_verdict_sentence(row, dropped) for row, dropped in told])


def _comparison(claim: Claim) -> str:
    """What is measured, in symbols."""
    if claim.kind == "ranks":
        return f"{claim.setting} as {claim.against}"
    pair = f"{claim.setting} − {claim.against}"
    return f"({pair}) − ({claim.beyond[0]} − {claim.beyond[1]})" if claim.beyond else pair


_MEASURE_WORDS = {
    "end": "",
    "area": " in the mean over tasks",
    "change": " as the stream changed it",
}
"""How a sentence says what is measured."""


def _verdict_sentence(row: dict[str, Any], dropped: list[int]) -> str:
    """A verdict in words."""
    count, form = row["n"], ".2f" if row["unit"] == "rank correlation" else ".1f"
    word = "replicate" if len(dropped) == 1 else "replicates"
    left_out = f" Left out, as runs are missing: {word} {', '.join(map(str, dropped))}." * bool(
        dropped
    )
    if count < 2:
        found = "no replicate holds" if count == 0 else "only one replicate holds"
        return f"Undecided: {found} {row['what']!r}, and an interval takes two or more.{left_out}"
    bounds = [f"{word} {row[word]:g}" for word in ("above", "below") if np.isfinite(row[word])]
    p = "< 0.001" if row["p_adjusted"] < 0.001 else f"= {row['p_adjusted']:.3f}"
    low, high, mean = (format(row[name], form) for name in ("low", "high", "estimate"))
    return (
        f"{row['verdict'].capitalize()}: on {row['aggregate']}{_MEASURE_WORDS[row['at']]}, {row['what']!r} is "
        f"{mean} {row['unit']} ({100 * row['level']:.3g}% interval {low} to {high}); claimed is "
        f"{' and '.join(bounds)} (adjusted p {p}, n = {count}).{left_out}"
    )
