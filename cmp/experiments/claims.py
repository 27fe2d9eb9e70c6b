"""Claims and their verdicts: what runs came to, paired differences, and Holm's correction."""

import itertools
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
from pydantic import Field
from pydantic.dataclasses import dataclass as checked_dataclass
from scipy import stats

from cmp.config import STRICT
from cmp.errors import CmpError
from cmp.experiments.studies import Study
from cmp.readers.files import check_record

LEVEL = 0.95
ALPHA = 0.05
AGGREGATES = ("A_KA", "A_ZS", "GM")
RUN_KEYS = ["setting", "replicate"]
MIN_RANKED = 3
"""Settings that a ranking must have to say anything."""
MAX_CORRELATION = 0.994
"""What a perfect agreement counts as: among ten settings, one off by half a swap of neighbours."""
SUPPORTED, REFUTED, UNDECIDED = "supported", "not supported", "undecided"


def t_interval(values: np.ndarray) -> tuple[float, float, float]:
    """Return the mean of independent values, its standard error, and half its t-interval's width.

    A single value says nothing about spread: the last two are NaN then, and all are without values.
    """
    count, unknown = len(values), float("nan")
    mean = float(np.mean(values)) if count else unknown
    if count < 2:
        return mean, unknown, unknown
    error = float(np.std(values, ddof=1) / np.sqrt(count))
    return mean, error, error * float(stats.t.ppf((1 + LEVEL) / 2, count - 1))


def _widest_scope(trajectory: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of the widest test that was scored."""
    wide = "full" if (trajectory["scope"] == "full").any() else "subset"
    return trajectory[trajectory["scope"] == wide]


def final_scores(trajectory: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of each run after its last task, on the widest test that was scored.

    Args:
        trajectory: As `cmp.experiments.store.trajectory` returns it, of several settings and
            replicates; so for the other functions of this module.
    """
    rows = _widest_scope(trajectory)
    last = rows.groupby(RUN_KEYS, sort=False)["task"].transform("max")
    return rows[rows["task"] == last]


def score_change(trajectory: pd.DataFrame) -> pd.DataFrame:
    """Return the aggregates at the end of the stream minus before it, a row per run.

    Models that start from different scores can be compared by it.
    """
    rows = _widest_scope(trajectory)
    before = rows[rows["task"] == 0].set_index(RUN_KEYS)[list(AGGREGATES)]
    after = final_scores(trajectory).set_index(RUN_KEYS)[list(AGGREGATES)]
    return (after - before).reset_index()


def mean_over_tasks(trajectory: pd.DataFrame) -> pd.DataFrame:
    """Return the mean of the aggregates over the tasks of the stream, a row per run.

    Raises:
        CmpError: No subset was scored, which is what is scored after every task.
    """
    rows = trajectory[(trajectory["scope"] == "subset") & (trajectory["task"] > 0)]
    if not len(rows):
        raise CmpError("trajectory: an area takes the scores after each task, scope 'subset'")
    return rows.groupby(RUN_KEYS, sort=False)[list(AGGREGATES)].mean().reset_index()


MEASURES = {"end": final_scores, "area": mean_over_tasks, "change": score_change}
"""What a run came to: functions of a trajectory that return a row per run with its aggregates."""


def setting_means(trajectory: pd.DataFrame, at: str = "end") -> pd.DataFrame:
    """Return the mean of each aggregate over replicates, a row per setting.

    Args:
        trajectory: The runs.
        at: One of `MEASURES`.

    Returns:
        The means, and half the width of their 95% intervals as "A_KA half" and so on.
    """
    groups = MEASURES[at](trajectory).groupby("setting", sort=False)[list(AGGREGATES)]
    half = groups.agg(lambda values: t_interval(values.to_numpy())[2])
    return groups.mean().join(half.add_suffix(" half"))


def end_table(trajectory: pd.DataFrame) -> pd.DataFrame:
    """Return the aggregates at the end as "mean ± half the 95% interval", a row per setting."""

    def as_text(values: pd.Series) -> str:
        mean, _, half = t_interval(values.to_numpy())
        return f"{mean:.1f} ± {half:.1f}"

    groups = final_scores(trajectory).groupby("setting", sort=False)
    return groups[list(AGGREGATES)].agg(as_text).assign(replicates=groups.size())


def by_replicate(trajectory: pd.DataFrame, at: str = "end") -> pd.DataFrame:
    """Return what all runs came to, a row per replicate.

    Args:
        trajectory: The runs.
        at: One of `MEASURES`.

    Returns:
        Columns (aggregate, setting), sorted; NaN where a run is missing.

    Raises:
        CmpError: A run is there twice; it would count as two replicates.
    """
    rows = MEASURES[at](trajectory)
    if (twice := rows.duplicated(RUN_KEYS)).any():
        setting, replicate = rows.loc[twice, RUN_KEYS].iloc[0]
        raise CmpError(f"trajectory: replicate {replicate} of {setting!r} is there twice")
    table = rows.set_index(["replicate", "setting"])[list(AGGREGATES)].unstack("setting")
    columns = pd.MultiIndex.from_product([AGGREGATES, sorted(trajectory["setting"].unique())])
    return table.reindex(index=sorted(trajectory["replicate"].unique()), columns=columns)


def paired_difference(
    trajectory: pd.DataFrame, one: str, other: str, at: str = "end"
) -> pd.DataFrame:
    """Return one setting minus another, paired by replicate, a row per aggregate.

    Args:
        trajectory: The runs.
        one: A setting.
        other: The setting that is subtracted.
        at: One of `MEASURES`.

    Returns:
        `difference`, `standard_error`, `low` and `high` (the 95% interval, not corrected for other
        comparisons), `errors` (the difference in standard errors) and `replicates`.

    Raises:
        CmpError: A setting is not there.
    """
    _check_settings(trajectory["setting"], (one, other), "paired difference")
    table, rows = by_replicate(trajectory, at), []
    for name in AGGREGATES:
        differences = (table[name, one] - table[name, other]).dropna()
        mean, error, half = t_interval(differences.to_numpy())
        errors = mean / error if error else float("nan")
        rows.append((mean, error, mean - half, mean + half, errors, len(differences)))
    columns = ["difference", "standard_error", "low", "high", "errors", "replicates"]
    return pd.DataFrame(rows, list(AGGREGATES), columns)


def _check_settings(settings: Iterable[str], names: Iterable[str], source: str) -> None:
    known = list(dict.fromkeys(settings))
    if missing := [name for name in names if name not in known]:
        raise CmpError(f"{source}: no setting {missing[0]!r}; there are {', '.join(known)}")


def _family_members(settings: Iterable[str], family: str) -> dict[str, str]:
    """Return the settings of a family, such as "tiny: full" of "tiny", by the rest of the name."""
    start = f"{family}: "
    return {name.removeprefix(start): name for name in settings if name.startswith(start)}


def _common_settings(
    settings: Iterable[str], one: str, other: str, source: str
) -> list[tuple[str, str]]:
    """Return the settings that two families share, as pairs; raise `CmpError` for too few."""
    settings = list(settings)
    first, second = _family_members(settings, one), _family_members(settings, other)
    pairs = [(first[name], second[name]) for name in first if name in second]
    if len(pairs) < MIN_RANKED:
        raise CmpError(
            f"{source}: {one!r} and {other!r} share {len(pairs)} settings, as in '{one}: NAME'; "
            f"a ranking takes {MIN_RANKED}"
        )
    return pairs


def rank_agreement(table: pd.DataFrame, one: str, other: str) -> pd.Series:
    """Return Spearman's correlation of two families' scores of the settings that they share.

    Args:
        table: A row per replicate, a column per setting.
        one: A family, such as "tiny" of the setting "tiny: full".
        other: Another.

    Returns:
        A value per replicate; NaN where a run is missing.
    """
    pairs = _common_settings(table.columns, one, other, "agreement")
    left, right = (table[list(names)] for names in zip(*pairs, strict=True))
    values = [_spearman(left.loc[row], right.loc[row]) for row in table.index]
    return pd.Series(values, table.index, dtype=float)


def rank_repeatability(table: pd.DataFrame, family: str) -> pd.Series:
    """Return Spearman's correlation of a family's ranking in one replicate with that in another.

    Args:
        table: A row per replicate, a column per setting.
        family: A family, such as "tiny" of the setting "tiny: full".

    Returns:
        A value per pair of replicates.
    """
    scores = table[list(_family_members(table.columns, family).values())].dropna()
    pairs = itertools.combinations(scores.index, 2)
    return pd.Series({(a, b): _spearman(scores.loc[a], scores.loc[b]) for a, b in pairs})


def _spearman(one: pd.Series, other: pd.Series) -> float:
    return float(stats.spearmanr(one, other).statistic)


ClaimText = Annotated[str, Field(min_length=1)]


@checked_dataclass(frozen=True, config=STRICT)
class Claim:
    """What a chapter claims of `setting` minus `against` on one aggregate.

    Attributes:
        name: A short name.
        sentence: The claim in words.
        setting: A setting, or a family of settings, such as "tiny" of "tiny: full", for ranks.
        against: What it is compared with.
        aggregate: "A_KA", "A_ZS" or "GM".
        direction: The side of zero on which a superiority claim lies.
        margin: The smallest difference that a reader would care about, in points; of ranks, the
            correlation that is exceeded.
        kind: "superiority": the difference lies beyond the margin on the side of `direction`;
            "equivalence": it lies within ± margin; "ranks": the rank correlation of what the two
            families share lies above the margin.
        at: "end" of the stream, "change" from before the stream to its end, or "area", the mean
            over its tasks.
        beyond: Two more settings; claimed is how far the difference exceeds theirs, first minus
            second.
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
            words = "ranks have no direction, a margin below 1, and nothing beyond"
            raise ValueError(f"{self.name!r}: {words}")

    @property
    def unit(self) -> str:
        """The unit of the margin and of the interval."""
        return "rank correlation" if self.kind == "ranks" else "points"

    @property
    def region(self) -> tuple[float, float]:
        """The open interval of values, in the claim's unit, of which it is true."""
        if self.kind == "equivalence":
            return -self.margin, self.margin
        return (self.margin, np.inf) if self.direction == "higher" else (-np.inf, -self.margin)

    @property
    def comparison(self) -> str:
        """What is measured, in symbols."""
        if self.kind == "ranks":
            return f"{self.setting} as {self.against}"
        pair = f"{self.setting} − {self.against}"
        return f"({pair}) − ({self.beyond[0]} − {self.beyond[1]})" if self.beyond else pair

    def required_settings(self, settings: Iterable[str], source: str) -> list[str]:
        """Return the settings whose runs the claim needs.

        Args:
            settings: The settings that there are.
            source: What errors call the claim.

        Raises:
            CmpError: A setting is missing.
        """
        if self.kind == "ranks":
            pairs = _common_settings(settings, self.setting, self.against, source)
            return list(itertools.chain.from_iterable(pairs))
        names = [self.setting, self.against, *(self.beyond or ())]
        _check_settings(settings, names, source)
        return names

    def measured(self, table: pd.DataFrame) -> pd.Series:
        """Return what is claimed in each replicate; `table` has a column per setting."""
        if self.kind == "ranks":
            return rank_agreement(table, self.setting, self.against)
        differences = table[self.setting] - table[self.against]
        if self.beyond:
            differences -= table[self.beyond[0]] - table[self.beyond[1]]
        return differences


def claims_of(study: Study) -> tuple[Claim, ...]:
    """Return the claims of a study; raise `CmpError` that names the claim and the key at fault."""
    source = f"study {study.chapter}: claims"
    remedy = f"; the keys of a claim are {', '.join(Claim.__dataclass_fields__)}"
    claims = check_record(study.claims, tuple[Claim, ...], f"{source}.", remedy)
    names = [claim.name for claim in claims]
    if twice := [name for name in names if names.count(name) > 1]:
        raise CmpError(f"{source}: two are named {twice[0]!r}")
    for claim in claims:
        claim.required_settings(study.settings, f"{source}: {claim.name!r}")
    return claims


def holm(p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return p-values adjusted by Holm's (1979) step-down, and the divisors of `ALPHA`.

    The k-th smallest of m is held against `ALPHA / (m - k + 1)`, and after the first that fails so
    do all that follow; their divisor is that of the first. NaN counts in m and never passes.

    Args:
        p: The p-values of a family along the last axis.
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
    """Return the verdicts of a chapter's claims, which are corrected as one family.

    `p` tests whether the difference lies on the claim's nearest margin. Superiority: two-sided, as
    its interval is. Equivalence: one-sided, the larger p of two one-sided tests (Schuirmann 1987).
    Holm's correction gives `p_adjusted` and the step's share of `ALPHA`; the interval is widened
    to that share: `level` is 1 - ALPHA/divisor, for equivalence 1 - 2 ALPHA/divisor (95% and 90%
    where a claim stands alone). The verdict rests on this one interval:

    * supported: it lies within the claim's region, that is, beyond the margin on the claimed side
      or, for equivalence, between both margins;
    * not supported: it lies wholly outside the region;
    * undecided: it holds a margin, or there is no interval (fewer than two replicates).

    A verdict is supported or not supported exactly where `p_adjusted` < `ALPHA`. The chance that a
    chapter holds any wrong one is about `ALPHA` at most (simulated in the tests; of a single
    superiority claim, half of that).

    Correlations of ranks are judged as Fisher's z, so that no interval goes beyond 1.

    Args:
        estimate: Means of the paired differences, or of the z of ranks, [..., claims].
        error: Their standard errors.
        count: Numbers of differences.
        claims: The claims.

    Returns:
        Arrays [..., claims]: `low`, `high`, `level`, `p`, `p_adjusted` and `verdict`.
    """
    above, below = np.array([claim.region for claim in claims], float).reshape(-1, 2).T
    sides = np.array([1 if claim.kind == "equivalence" else 2 for claim in claims])
    ranks = np.array([claim.kind == "ranks" for claim in claims], bool)
    start = np.where(ranks, np.arctanh(np.where(ranks, above, 0)), above)
    gap = np.minimum(estimate - start, below - estimate)
    with np.errstate(divide="ignore", invalid="ignore"):
        distance = np.where(gap == 0, 0 * error, np.abs(gap) / error)
    p = sides * stats.t.sf(distance, count - 1)
    adjusted, divisor = holm(p)
    tail = ALPHA / (sides * divisor)
    half = error * stats.t.isf(tail, count - 1)
    low, high = (np.where(ranks, np.tanh(x), x) for x in (estimate - half, estimate + half))
    verdict = np.select(
        [(above < low) & (high < below), (high < above) | (below < low)],
        [SUPPORTED, REFUTED],
        UNDECIDED,
    )
    adjusted = np.where(np.isnan(p), np.nan, adjusted)
    numbers = {"low": low, "high": high, "level": 1 - 2 * tail, "p": p, "p_adjusted": adjusted}
    return numbers | {"verdict": verdict}


def verdicts(trajectory: pd.DataFrame, claims: Sequence[Claim]) -> pd.DataFrame:
    """Return the verdicts of a chapter's claims, with estimates and sentences.

    Args:
        trajectory: The runs.
        claims: All claims of the chapter, for they are corrected together.

    Returns:
        A row per claim (index: its name): `claimed` (its sentence), `setting`, `against`, `what`
        (the two in symbols, and what they are held beyond), `aggregate`, `at`, `unit`, `above` and
        `below` (the claim is true of values between these), `n` (replicates that hold all its
        settings; the others are dropped, and `sentence` names them), `estimate` (in its unit), the
        columns of `judge`, and `sentence`.

    Raises:
        CmpError: The trajectory lacks a setting.
    """
    tables = {at: by_replicate(trajectory, at) for at in dict.fromkeys(c.at for c in claims)}
    settings, rows, dropped = trajectory["setting"].unique(), [], []
    for claim in claims:
        names = claim.required_settings(settings, f"claim {claim.name!r}")
        values = claim.measured(tables[claim.at][claim.aggregate])
        known = values.dropna().to_numpy()
        is_rank = claim.kind == "ranks"
        z = np.arctanh(known.clip(-MAX_CORRELATION, MAX_CORRELATION)) if is_rank else known
        rows.append((claim.name, claim.sentence, claim.setting, claim.against, claim.comparison,
                     claim.aggregate, claim.at, claim.unit, *claim.region, values.notna().sum(),
                     t_interval(known)[0], *t_interval(z)[:2]))  # fmt: skip
        partial = set(trajectory.loc[trajectory["setting"].isin(names), "replicate"])
        dropped.append([number for number in values.index[values.isna()] if number in partial])
    columns = ["claim", "claimed", "setting", "against", "what", "aggregate", "at", "unit", "above",
               "below", "n", "estimate", "centre", "error"]  # fmt: skip
    frame = pd.DataFrame(rows, columns=columns).set_index("claim")
    numbers = [frame[name].to_numpy() for name in ("centre", "error", "n")]
    frame = frame.drop(columns=["centre", "error"]).assign(**judge(*numbers, claims))
    pairs = zip(frame.to_dict("records"), dropped, strict=True)
    return frame.assign(sentence=[_verdict_sentence(row, replicates) for row, replicates in pairs])


MEASURE_WORDS = {
    "end": "",
    "area": " in the mean over tasks",
    "change": " as the stream changed it",
}


def _verdict_sentence(row: dict[str, Any], dropped: list[int]) -> str:
    """Return a verdict in words."""
    count, form = row["n"], ".2f" if row["unit"] == "rank correlation" else ".1f"
    left_out = ""
    if dropped:
        word = "replicate" if len(dropped) == 1 else "replicates"
        left_out = f" Left out, as runs are missing: {word} {', '.join(map(str, dropped))}."
    if count < 2:
        holders = "no replicate holds" if count == 0 else "only one replicate holds"
        return f"Undecided: {holders} {row['what']!r}, and an interval takes two or more.{left_out}"
    bounds = [f"{word} {row[word]:g}" for word in ("above", "below") if np.isfinite(row[word])]
    p = "< 0.001" if row["p_adjusted"] < 0.001 else f"= {row['p_adjusted']:.3f}"
    low, high, mean = (format(row[name], form) for name in ("low", "high", "estimate"))
    measure = f"{row['aggregate']}{MEASURE_WORDS[row['at']]}"
    return (
        f"{row['verdict'].capitalize()}: on {measure}, {row['what']!r} is {mean} {row['unit']} "
        f"({100 * row['level']:.3g}% interval {low} to {high}); claimed is {' and '.join(bounds)} "
        f"(adjusted p {p}, n = {count}).{left_out}"
    )
