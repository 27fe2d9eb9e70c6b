"""What a study says: paired differences over replicates, and claims with verdicts.

A replicate is a base and a stream together, the same in every setting: it is the only unit that
counts as independent. Tasks and datasets are averaged away before and never raise `n`.

A chapter's claims stand in `book/studies/NN.yaml` beside the grid, under `claims`, so margins are
committed before a study is computed. How a verdict comes about, `judge` says once for all.
"""

import json
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from scipy import stats

from cmp.config import STRICT
from cmp.errors import CmpError
from cmp.studies import Study

LEVEL = 0.95
ALPHA = 0.05
AGGREGATES = ("A_KA", "A_ZS", "GM")
SUPPORTED, REFUTED, UNDECIDED = "supported", "not supported", "undecided"
Text = Annotated[str, Field(min_length=1)]


@dataclass(frozen=True, config=STRICT)
class Claim:
    """What is claimed of `setting` minus `against` on one aggregate, at the end of the stream or,
    with `at: area`, in the mean over its tasks (of the subset that is scored after each).

    superiority: the difference lies beyond `margin` on the side of `direction`; equivalence: it
    lies within ± `margin`. The margin is in points: what the reader of a chapter would care about.
    """

    name: Text
    sentence: Text
    setting: str
    against: str
    aggregate: Literal["A_KA", "A_ZS", "GM"]
    direction: Literal["higher", "lower"] = "higher"
    margin: Annotated[float, Field(ge=0)] = 2.0
    kind: Literal["superiority", "equivalence"] = "superiority"
    at: Literal["end", "area"] = "end"

    def __post_init__(self) -> None:
        if self.setting == self.against:
            raise ValueError(f"{self.name!r} holds {self.setting!r} against itself")
        if self.kind == "equivalence" and (self.direction == "lower" or self.margin == 0):
            raise ValueError(f"{self.name!r}: equivalence has no direction, and a margin above 0")

    @property
    def region(self) -> tuple[float, float]:
        """The open interval of differences, in points, of which the claim is true."""
        if self.kind == "equivalence":
            return -self.margin, self.margin
        return (self.margin, np.inf) if self.direction == "higher" else (-np.inf, -self.margin)


def of(study: Study) -> tuple[Claim, ...]:
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
        _check(study.settings, claim.setting, claim.against, f"{source}: {claim.name!r}")
    return found


def _check(known: Iterable[str], setting: str, against: str, source: str) -> None:
    known = list(dict.fromkeys(known))
    for name in (setting, against):
        if name not in known:
            raise CmpError(f"{source}: no setting {name!r}; there are {', '.join(known)}")


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


def final(trajectory: pd.DataFrame) -> pd.DataFrame:
    """The rows of each (setting, replicate) after its last task, on the widest test scored."""
    wide = "full" if (trajectory["scope"] == "full").any() else "subset"
    chosen = trajectory[trajectory["scope"] == wide]
    last = chosen.groupby(["setting", "replicate"], sort=False)["task"].transform("max")
    return chosen[chosen["task"] == last]


def area(trajectory: pd.DataFrame) -> pd.DataFrame:
    """A row a (setting, replicate): each aggregate's mean over the tasks of the stream, on the
    subset that is scored after every task; the area under its trajectory, per task. `CmpError` if
    no subset was scored."""
    chosen = trajectory[(trajectory["scope"] == "subset") & (trajectory["task"] > 0)]
    if not len(chosen):
        raise CmpError("trajectory: an area takes the scores after each task, scope 'subset'")
    keys = ["setting", "replicate"]
    return chosen.groupby(keys, sort=False)[list(AGGREGATES)].mean().reset_index()


def ends(trajectory: pd.DataFrame) -> pd.DataFrame:
    """A row a setting: each aggregate at the end of the stream, as "mean ± half the interval"."""
    rows = final(trajectory).groupby("setting", sort=False)
    table = rows[list(AGGREGATES)].agg(lambda values: "{:.1f} ± {:.1f}".format(*_ends(values)))
    return table.assign(replicates=rows.size())


def _ends(values: pd.Series) -> tuple[float, float]:
    mean, _, half = t_interval(values.to_numpy())
    return mean, half


def by_replicate(trajectory: pd.DataFrame, at: str = "end") -> pd.DataFrame:
    """The ends of all runs, or with at="area" their means over tasks: a row a replicate, columns
    (aggregate, setting), sorted; NaN where a run is missing. `CmpError` if a run is there twice,
    for it would count as two replicates."""
    rows = area(trajectory) if at == "area" else final(trajectory)
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
    """`one` minus `other` at the end of the stream, or with at="area" in the mean over its tasks,
    paired by replicate: a row an aggregate.

    Columns: `difference`, `standard_error`, `low` and `high` (the 95% interval, for looking: it
    knows of no other comparison), `errors` (the difference in standard errors), `replicates`.
    """
    _check(trajectory["setting"], one, other, "paired difference")
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
    sentence), `setting`, `against`, `aggregate`, `at`, `above` and `below` (the claim is true of
    differences between these), `n` (replicates that hold both settings; the others are dropped,
    and `sentence` says which), `estimate` (setting minus against, points) and those of `judge`.
    Raises `CmpError` for a setting that the trajectory lacks.
    """
    tables = {at: by_replicate(trajectory, at) for at in dict.fromkeys(c.at for c in claims)}
    rows, lacking = [], []
    for claim in claims:
        known = trajectory["setting"]
        _check(known, claim.setting, claim.against, f"claim {claim.name!r}")
        both = tables[claim.at][claim.aggregate]
        differences = both[claim.setting] - both[claim.against]
        mean, error, _ = t_interval(differences.dropna().to_numpy())
        above, below = claim.region
        rows.append((claim.name, claim.sentence, claim.setting, claim.against, claim.aggregate,
                     claim.at, above, below, differences.notna().sum(), mean, error))  # fmt: skip
        lacking.append(list(differences.index[differences.isna()]))
    names = ["claim", "claimed", "setting", "against", "aggregate", "at", "above", "below", "n"]
    frame = pd.DataFrame(rows, columns=[*names, "estimate", "error"]).set_index("claim")
    numbers = [frame[name].to_numpy() for name in ("estimate", "error", "n")]
    frame = frame.drop(columns="error").assign(**judge(*numbers, claims))
    told = zip(frame.to_dict("records"), lacking, strict=True)
    return frame.assign(sentence=[_tell(row, dropped) for row, dropped in told])


def _tell(row: dict[str, Any], dropped: list[int]) -> str:
    """A verdict in words."""
    one, other, count = row["setting"], row["against"], row["n"]
    word = "replicate" if len(dropped) == 1 else "replicates"
    left_out = f" Left out, as not in both: {word} {', '.join(map(str, dropped))}."
    if count < 2:
        found = "no replicate holds" if count == 0 else "only one replicate holds"
        text = f"Undecided: {found} both {one!r} and {other!r}, and an interval takes two or more."
        return text + left_out * bool(dropped)
    bounds = [f"{word} {row[word]:g}" for word in ("above", "below") if np.isfinite(row[word])]
    mean = " in the mean over tasks" if row["at"] == "area" else ""
    p = "< 0.001" if row["p_adjusted"] < 0.001 else f"= {row['p_adjusted']:.3f}"
    return (
        f"{row['verdict'].capitalize()}: on {row['aggregate']}{mean}, {one!r} minus {other!r} is "
        f"{row['estimate']:.1f} points ({100 * row['level']:.3g}% interval {row['low']:.1f} to "
        f"{row['high']:.1f}); claimed is {' and '.join(bounds)} (adjusted p {p}, n = {count})."
        + left_out
        * bool(dropped)
    )
