"""Verdicts: the claims of a chapter, corrected together and judged by one interval each."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from cmp.claims.replicates import by_replicate, t_interval
from cmp.claims.statements import Claim

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
        rows.append((claim.name, claim.sentence, claim.setting, claim.against, _what(claim),
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
    return frame.assign(sentence=[_tell(row, dropped) for row, dropped in told])


def _what(claim: Claim) -> str:
    """What is measured, in symbols."""
    if claim.kind == "ranks":
        return f"{claim.setting} as {claim.against}"
    pair = f"{claim.setting} − {claim.against}"
    return f"({pair}) − ({claim.beyond[0]} − {claim.beyond[1]})" if claim.beyond else pair


OF = {"end": "", "area": " in the mean over tasks", "change": " as the stream changed it"}
"""How a sentence says what is measured."""


def _tell(row: dict[str, Any], dropped: list[int]) -> str:
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
        f"{row['verdict'].capitalize()}: on {row['aggregate']}{OF[row['at']]}, {row['what']!r} is "
        f"{mean} {row['unit']} ({100 * row['level']:.3g}% interval {low} to {high}); claimed is "
        f"{' and '.join(bounds)} (adjusted p {p}, n = {count}).{left_out}"
    )
