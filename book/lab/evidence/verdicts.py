"""Judge the primary claims of the book from the results of their runs.

The claims (`lab.evidence.claims`) form one family. Each has one interval, a t-interval over the
ten bases that were not used for tuning, at the level of `claims_level`, like every other interval
of a measured value. `read_interval` defines how it is read.

A second, crossed interval also treats the concepts of the test as a sample. The verdict is about
this test set; statements about other concepts are based on the crossed interval.
"""

import functools
import json
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from scipy import stats
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from cmp.data import Corpus, load_data
from cmp.errors import CmpError
from cmp.evaluation import ROLES, list_questions
from cmp.files import cached_by_file
from cmp.releases.sentences import signed
from cmp.runs import store
from cmp.runs.store import RUN_KEYS
from lab.evidence import fronts, results, studies
from lab.evidence.claims import GAINS, MATTERS, REPLICATES, Claim, ClaimsFile, FrontOf, Term
from lab.evidence.scores import (
    FAMILY,
    MEASURES,
    PARTS,
    Estimate,
    claims_level,
    estimate_from_bases,
    level_in_words,
    part_scores,
    planned_streams,
    run_bases,
    t_factor,
    t_interval,
)

HELPS, HURTS, SAME = "helps", "hurts", "no difference that matters"
HELPS_OPEN, HURTS_OPEN, OPEN = "helps, size open", "hurts, size open", "open"
NOT_COMPUTED, NOT_COVERED, NO_FRONT = "not computed yet", "outside the front", "no front"


def read_interval(low: float, high: float) -> str:
    """Return the reading of an interval, testing in this order: beyond a point, within a point,
    beyond zero, or open."""
    if low > MATTERS or high < -MATTERS:
        return HELPS if low > 0 else HURTS
    if low >= -MATTERS and high <= MATTERS:
        return SAME
    if low > 0 or high < 0:
        return HELPS_OPEN if low > 0 else HURTS_OPEN
    return OPEN


def reading_in_words(row: Mapping[str, Any]) -> str:
    """Return the reading of a row of `judge_claims` as text. A spread, a difference of geometric
    means or one between networks is larger or smaller instead of helping or hurting."""
    if row["measure"] not in ("spread", "GM", "gain from the start"):
        return row["reading"]
    return row["reading"].replace(HELPS, "larger").replace(HURTS, "smaller")


def run_scores(published: pd.DataFrame) -> pd.DataFrame:
    """Return the scores of each run of a study.

    Args:
        published: As `lab.evidence.results.published_metrics` returns it.

    Returns:
        One row per (setting, replicate): the final `MEASURES` on the whole test; A_ZS on
        the names that replay `kept` and was `lacking`; `start A_KA` and `start A_ZS`, those of the
        base; `way`, the mean A_KA over the middle half of the updates, NaN if the whole test was
        scored only at the ends; `peak` and `base`; and `kind`, what runs must share for a gain.
    """
    table = store.trajectory(published)
    table = table.join(part_scores(published), on=[*RUN_KEYS, "task", "scope"])
    table["progress"] = table["task"] / table.groupby(RUN_KEYS)["task"].transform("max")
    ends = table[table["progress"] == 1].set_index([*RUN_KEYS, "scope"])
    by_names = ends["A_ZS"].unstack("scope").filter([results.KEPT, results.LACKING])
    scores = ends.xs("full", level="scope")[[*MEASURES]].join(by_names)
    starts = table[(table["scope"] == "full") & (table["task"] == 0)].set_index(RUN_KEYS)
    scores = scores.join(starts[["A_KA", "A_ZS"]].add_prefix("start "))
    on_way = table[(table["scope"] == "full") & table["progress"].between(0.25, 0.75)]
    middle = on_way.groupby(RUN_KEYS)["A_KA"]
    scores["way"] = middle.mean()[middle.size() > 1]
    trees = published.groupby(RUN_KEYS)["config"].first().astype(str).map(json.loads)
    scores["base"] = run_bases(published)
    scores["peak"] = trees.map(lambda tree: tree["schedule"]["peak"])
    scores["kind"] = trees.map(_describe_kind)
    return scores


def _describe_kind(tree: Mapping[str, Any]) -> str:
    """Return what runs must share for a gain, such as "small, 20 updates, batches of 64"."""
    updates, batch = tree["stream"]["tasks"], tree["training"]["batch"]
    return f"{tree['model']['name']}, {updates} updates, batches of {batch}"


@cached_by_file
def _published(path: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the metrics in a file of published results and their `run_scores`."""
    published = results.published_metrics(path.stem)
    return published, run_scores(published)


def published_scores(study: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the published metrics of a study and its `run_scores`, cached until the file
    changes."""
    return _published(results.results_file(study))


class NotComputed(CmpError):
    """An error for a value with planned runs that are not published yet."""


def setting_scores(study: str, setting: str) -> pd.DataFrame:
    """Return the rows of `run_scores` of a setting, by replicate.

    Raises:
        NotComputed: The setting is not published yet.
        CmpError: There is no such study or setting.
    """
    if results.is_published(study):
        scores = published_scores(study)[1]
        if setting in scores.index.unique("setting"):
            return scores.loc[setting]
    planned_streams(study, setting)
    raise NotComputed(f"{setting!r} of study {study} is not published yet")


def gain_of(
    study: str,
    setting: str,
    front: FrontOf,
    names: str = "all",
    less: float = 0.0,
    replicates: pd.Index | None = None,
    from_start: bool = False,
) -> fronts.Gain:
    """Return the gain of a published setting, see `lab.evidence.fronts.measure_gain`.

    Args:
        study: The study.
        setting: The setting.
        front: The front.
        names: The class names for A_ZS, see `Claim`.
        less: Points of A_KA to subtract from the setting, to compare it where the front is less
            steep.
        replicates: The replicates to use; all by default.
        from_start: Compare the changes of both scores since the start of the stream.

    Raises:
        NotComputed: Runs of the setting or of the front are not published yet.
        CmpError: The front does not cover the setting, or its runs have another network, number of
            updates or size of batches.
    """
    scores = setting_scores(study, setting)
    own, kind = _compared_scores(scores, names, from_start), scores["kind"].iloc[0]
    own["A_KA"] -= less
    if replicates is not None:
        own = own.loc[replicates]
    peaks, tables = {}, {}
    for each in front.settings:
        scores = setting_scores(front.study, each)
        if not own.index.isin(scores.index).all():
            raise NotComputed(f"{each!r} of study {front.study} has fewer streams than {setting!r}")
        other = scores["kind"].iloc[0]
        if kind != other and not from_start:
            raise CmpError(
                f"{setting!r} of study {study} ({kind}) has no gain over {each!r} of study "
                f"{front.study} ({other}); choose a front of the same kind"
            )
        peaks[each] = float(scores["peak"].iloc[0])
        tables[each] = _compared_scores(scores, names, from_start)
    return fronts.measure_gain(own, tables, peaks, setting, front.local, front.least)


def estimate_gain(
    study: str, setting: str, gain: fronts.Gain, planned: int | None = None
) -> Estimate:
    """Return a gain of `gain_of` with its interval at the level of the claims.

    Args:
        study: The study.
        setting: The setting.
        gain: The gain.
        planned: The planned number of streams; if None, the study's.
    """
    value, streams = float(gain.values.mean()), len(gain.values)
    planned = planned_streams(study, setting) if planned is None else planned
    return estimate_from_bases(value, gain.pseudo, streams, planned)


def _compared_scores(scores: pd.DataFrame, names: str, from_start: bool) -> pd.DataFrame:
    """Return the base, A_KA and A_ZS of each replicate, the latter on some class names only, or
    both since the start of the stream."""
    column = "A_ZS" if names == "all" else names
    table = scores[["A_KA", column, "base"]].set_axis(["A_KA", "A_ZS", "base"], axis=1)
    if from_start:
        table["A_KA"] -= scores["start A_KA"]
        table["A_ZS"] -= scores["start A_ZS"]
    return table


class Part(NamedTuple):
    """A setting in a contrast.

    Attributes:
        study: The study.
        setting: The setting.
        retention: The weight of its A_ZS.
        accumulation: The weight of its A_KA.
        at: Whether its scores are those at the end or at the start of the stream.
    """

    study: str
    setting: str
    retention: float
    accumulation: float
    at: Literal["end", "start"] = "end"


@dataclass(frozen=True)
class Contrast:
    """The result of a contrast, or of one of its terms.

    Attributes:
        values: The value of each replicate.
        pseudo: The pseudo-value of each base, independent of each other.
        bound: 1 if the estimate is a lower bound because a gain in it is, -1 if it is an upper
            bound because such a gain is subtracted, and otherwise 0.
        parts: The settings in it.
    """

    values: pd.Series
    pseudo: pd.Series
    bound: int
    parts: list[Part]


def measure_claim(claim: Claim, known: ClaimsFile) -> Contrast:
    """Return the sum of a claim's terms."""
    terms = [
        _measure_gain(claim, term, known.fronts[term.front])
        if claim.measure in GAINS
        else _measure_scores(claim, term)
        for term in claim.terms
    ]
    bounds = {term.bound for term in terms if term.bound}
    if len(bounds) > 1:
        raise fronts.OutsideFrontError("it adds one lower bound of a gain and subtracts another")
    return Contrast(
        functools.reduce(operator.add, (term.values for term in terms)),
        functools.reduce(operator.add, (term.pseudo for term in terms)),
        sum(bounds),
        [part for term in terms for part in term.parts],
    )


def _measure_gain(claim: Claim, term: Term, front: FrontOf) -> Contrast:
    """Return a gain. Its concept error is that of the setting and the front's nearest peak."""
    [setting], times, study = term.of, term.times, claim.study_of(term)
    from_start = claim.measure == "gain from the start"
    gain = gain_of(study, setting, front, claim.names, from_start=from_start)
    parts = [
        Part(study, setting, times, -times * gain.slope),
        Part(front.study, gain.nearest, -times, times * gain.slope),
    ]
    if from_start:  # each start has the opposite weight of its end
        parts += [Part(p.study, p.setting, -p.retention, -p.accumulation, "start") for p in parts]
    bound = int(np.sign(times)) * gain.is_bound
    return Contrast(times * gain.values, times * gain.pseudo, bound, parts)


def _measure_scores(claim: Claim, term: Term) -> Contrast:
    """Return a score, or the spread of A_KA over settings; the spread and the parts of A_KA have no
    concept error."""
    times, study = term.times, claim.study_of(term)
    if claim.measure == "spread":
        values, base = spread_of(study, term)
        return Contrast(times * values, times * values.groupby(base).mean(), 0, [])
    [setting] = term.of
    scores = setting_scores(study, setting)
    values = scores[claim.measure if claim.names == "all" else claim.names]
    bases = values.groupby(scores["base"]).mean()
    if claim.measure in PARTS:
        return Contrast(times * values, times * bases, 0, [])
    slope = float(np.sqrt(scores["A_KA"].mean() / scores["A_ZS"].mean()))  # 2 dGM/dA_ZS
    weights = {"A_ZS": (1.0, 0.0), "A_KA": (0.0, 1.0), "GM": (slope / 2, 1 / slope / 2)}
    retention, accumulation = weights[claim.measure]
    part = Part(study, setting, times * retention, times * accumulation)
    return Contrast(times * values, times * bases, 0, [part])


def spread_of(study: str, term: Term) -> tuple[pd.Series, pd.Series]:
    """Return the standard deviation of A_KA over the settings of a term, and the base, for each
    replicate that all settings have."""
    column = "way" if term.at == "way" else "A_KA"
    tables = {name: setting_scores(study, name) for name in term.of}
    values = pd.DataFrame({name: table[column] for name, table in tables.items()}).dropna()
    return values.std(axis=1), tables[term.of[0]]["base"]


def judge_claims(known: ClaimsFile) -> pd.DataFrame:
    """Return the verdict on every primary claim, from the published results.

    Args:
        known: The claims.

    Returns:
        One row per claim, by name: `guideline`, `study`, `source`, `claimed` (its sentence),
        `measure`, `expected`, `reading`, `agrees` (whether the reading was expected; empty if
        open), `n`, `estimate`, `low` and `high` (over bases, in points), `p` (of a
        two-sided t-test over bases) and `p holm` (adjusted by Holm's method over the family),
        `low crossed` and `high crossed` (at the same level), `planned` and `half` (half-widths),
        `bound` (1: lower, -1: upper, 0: none), `seen` (see `Claim`), `estimate later` (without
        those replicates, on the same front), and `sentence`.

    Raises:
        CmpError: Published runs use bases that tuned the claim's settings.
    """
    rows = {claim.name: _judge(claim, known) for claim in known.claims}
    judged = pd.DataFrame.from_dict(rows, orient="index").rename_axis("claim")
    if "p" in judged:
        judged["p holm"] = adjust_by_holm(judged["p"], max(FAMILY, len(judged)))
    return judged


def adjust_by_holm(p_values: pd.Series, count: int) -> pd.Series:
    """Return p-values adjusted by Holm's method.

    If signs with an adjusted value below 0.05 are called decided, the probability that any of them
    is wrong is at most 0.05.

    Args:
        p_values: The p-values; NaN if a claim is not measured yet.
        count: The size of the family.
    """
    ordered = p_values.dropna().sort_values()
    factors = count - np.arange(len(ordered))
    return (ordered * factors).clip(upper=1.0).cummax().reindex(p_values.index)


def _judge(claim: Claim, known: ClaimsFile) -> dict[str, Any]:
    level = claims_level()
    row: dict[str, Any] = {
        "guideline": claim.guideline,
        "study": claim.study,
        "source": claim.source,
        "claimed": claim.sentence,
        "measure": claim.measure,
        "expected": claim.expected,
        "planned": claim.half_width,
    }
    if words := describe_missing(claim, known):
        sentence = f"Not computed yet: {words}."
        return row | {"reading": NOT_COMPUTED, "agrees": "", "sentence": sentence}
    try:
        contrast = measure_claim(claim, known)
    except CmpError as error:
        reading = NOT_COVERED if isinstance(error, fronts.OutsideFrontError) else NO_FRONT
        return row | {"reading": reading, "agrees": "", "sentence": f"Not measured: {error}."}
    estimate = float(contrast.values.mean())
    row |= {"n": len(contrast.values), "estimate": estimate, "bound": contrast.bound}
    later = contrast.values.drop([*range(claim.seen)], errors="ignore")
    row |= {"seen": claim.seen, "estimate later": float(later.mean())}
    _, error, half = t_interval(contrast.pseudo.to_numpy(), level)
    crossed = np.nan
    if contrast.parts:
        concepts = concept_error(contrast.parts, claim.names)
        crossed = t_factor(len(contrast.pseudo), level) * float(np.hypot(error, concepts))
    row |= {"half": half, "low": estimate - half, "high": estimate + half}
    # without any error, as of two terms whose settings coincide, a zero is certain
    size = abs(estimate) / error if error else np.inf if estimate else 0.0
    row["p"] = 2 * float(stats.t.sf(size, len(contrast.pseudo) - 1))
    if contrast.bound * estimate < 0:  # a bound is no evidence against values beyond it
        row["p"] = 1.0
    row |= {"low crossed": estimate - crossed, "high crossed": estimate + crossed}
    low = -np.inf if contrast.bound < 0 else row["low"]
    high = np.inf if contrast.bound > 0 else row["high"]
    row["reading"] = read_interval(low, high)
    row["agrees"] = _agrees(row["reading"], claim.expected, low, high)
    return row | {"sentence": _sentence(row, claim)}


def describe_missing(claim: Claim, known: ClaimsFile) -> str:
    """Return a text on a claim's runs that are not published yet, or "".

    Raises:
        CmpError: The published runs cannot confirm the claim.
    """
    used = [(claim.study_of(term), setting) for term in claim.terms for setting in term.of]
    if claim.measure in GAINS:
        lines = [known.fronts[term.front] for term in claim.terms]
        used += [(front.study, setting) for front in lines for setting in front.settings]
    first, count = studies.CONFIRMING
    for study, setting in dict.fromkeys(used):
        if not results.is_published(study):
            return f"study {study} is not published"
        scores = published_scores(study)[1]
        rows = scores.loc[[setting]] if setting in scores.index.unique("setting") else scores[:0]
        if not rows["base"].between(first, first + count - 1).all():
            raise CmpError(
                f"claim {claim.name!r}: {setting!r} of study {study}: its runs use bases that "
                "tuned the setting, so they cannot confirm the claim"
            )
        if len(rows) < REPLICATES:
            return f"{len(rows)} of {REPLICATES} replicates of {setting!r} are published"
    return ""


def _agrees(reading: str, expected: str, low: float, high: float) -> str:
    is_small = {"above 0": low > 0, "below 0": high < 0}.get(expected, False)
    if reading == OPEN or (reading == SAME and is_small):  # a small effect with the expected sign
        return ""
    signs = {HELPS: "above 0", HELPS_OPEN: "above 0", HURTS: "below 0", HURTS_OPEN: "below 0"}
    return "yes" if signs.get(reading, "no difference") == expected else "no"


def _sentence(row: dict[str, Any], claim: Claim) -> str:
    """Return a verdict as a sentence."""
    what = {
        "gain": "points of A_ZS at equal A_KA",
        "gain from the start": "points of A_ZS at an equal increase of A_KA",
        "spread": "points of spread",
    }
    unit, at_least = what.get(claim.measure, f"points of {claim.measure}"), ""
    if claim.names != "all":
        words = {"kept": "in the pool", "lacking": "left out of the pool"}
        unit += f", on names {words[claim.names]}"
    if row["bound"]:
        at_least = "at least " if row["bound"] > 0 else "at most "
        unit += ", because a front ends below that A_KA"
    size = others = ""
    own = _range_in_words(row["low"], row["high"], row["bound"])
    reading = reading_in_words(row)
    if reading == SAME and (row["low"] > 0 or row["high"] < 0):
        size = ", a small gain" if row["low"] > 0 else ", a small loss"
    if np.isfinite(row["low crossed"]):
        crossed = _range_in_words(row["low crossed"], row["high crossed"], row["bound"])
        others = f"; on other concepts {crossed}"
    return (
        f"{reading.capitalize()}{size}: {at_least}{signed(row['estimate'])} {unit} "
        f"({level_in_words()} interval {own}{others}; n = {row['n']})."
    )


def _range_in_words(low: float, high: float, bound: int) -> str:
    """Return an interval as text, without the end that a bound leaves open."""
    words = f"{low:.1f} to {high:.1f}"
    if bound:
        words = f"from {low:.1f} up" if bound > 0 else f"up to {high:.1f}"
    return words.replace("-", "−")


def concept_error(parts: list[Part], names: str = "all") -> float:
    """Return the standard error that concepts add to a contrast if they are a sample.

    The influence of a concept is the sum of its questions' weighted differences, minus their
    dataset's mean, averaged over replicates. The error is the root of the sum of squared
    influences.

    Args:
        parts: The settings.
        names: The class names for A_ZS, see `Claim`.
    """
    total, weights = 0.0, 0.0
    for part in parts:
        corpus, hits, seeds = _hits_at(part)
        questions = _weigh_questions(corpus, seeds, names)
        factors = np.where(questions["is_retention"], part.retention, part.accumulation)
        total = total + factors * (questions["weights"] * hits).mean(axis=0)
        weights = questions["weights"].mean(axis=0)
    dataset, concept = questions["dataset"], questions["concept"]
    means = np.bincount(dataset, total) / np.maximum(np.bincount(dataset, weights), 1e-12)
    return 100 * float(np.linalg.norm(np.bincount(concept, total - weights * means[dataset])))


@functools.lru_cache(maxsize=4)
def concepts_of(corpus: Corpus) -> np.ndarray:
    """Return the concept number of each test question. Questions that share a class or a group,
    such as drawings of one emoji in several datasets, have the same concept."""
    questions = list_questions(corpus)
    names = corpus.table["label"].astype(str).to_numpy()[questions["row"]]
    group = pd.factorize(questions["group"])[0]
    name = pd.factorize(questions["dataset"].astype(str) + "/" + names)[0] + group.max() + 1
    edges = coo_array((np.ones(len(group)), (group, name)), shape=(name.max() + 1,) * 2)
    return connected_components(edges, directed=False)[1][group]


def _hits_at(part: Part) -> tuple[Corpus, np.ndarray, tuple[int, ...]]:
    """Return the data, the hits [replicates, questions] and the data seeds of a part."""
    published = published_scores(part.study)[0]
    rows = published[(published["setting"] == part.setting) & (published["scope"] == "full")]
    rows = rows[rows["task"] == 0] if part.at == "start" else store.after_last_task(rows)
    tree = [json.loads(text) for text in rows.groupby("replicate")["config"].first()]
    corpus, bits = load_data(tree[0]["data"]), []
    counts = results.question_counts(corpus)
    for _, row in rows.pivot(index="replicate", columns="dataset", values="hits").iterrows():
        bits.append(np.concatenate([results.unpack_hits(row[n], counts[n]) for n in counts]))
    return corpus, np.array(bits), tuple(each["seeds"]["data"] for each in tree)


@functools.lru_cache(maxsize=8)
def _weigh_questions(corpus: Corpus, seeds: tuple[int, ...], names: str) -> dict[str, np.ndarray]:
    """Return for each question the numbers of its dataset and concept, whether it counts in A_ZS,
    and its `weights` in the aggregates, [seeds, questions]."""
    questions = list_questions(corpus)
    dataset, concept = pd.factorize(questions["dataset"])[0], concepts_of(corpus)
    is_retention = (questions["role"] == ROLES["A_ZS"]).to_numpy()
    is_scored = questions["role"].isin(list(ROLES.values())).to_numpy()
    weight = questions["weight"].to_numpy() * is_scored
    for role in ROLES.values():
        of_role = (questions["role"] == role).to_numpy()
        weight[of_role] /= questions.loc[of_role, "dataset"].nunique()
    rows = []
    for seed in seeds:
        own = weight.copy()
        if names != "all":
            part = np.where(is_retention, own * results.name_groups(corpus, seed)[names], own)
            scale = np.bincount(dataset, own) / np.maximum(np.bincount(dataset, part), 1e-12)
            own = part * scale[dataset]
        rows.append(own)
    return {"dataset": dataset, "concept": concept, "is_retention": is_retention,
            "weights": np.array(rows)}  # fmt: skip
