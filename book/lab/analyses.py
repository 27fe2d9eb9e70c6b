"""Compute what chapters show of stored runs: final scores, schedules, mixtures.

A trajectory frame is the result of `cmp.runs.store.trajectory`: one row per (setting, replicate,
task) with `scope`, `A_KA`, `A_ZS` and `GM` in percent. Published metrics are the result of
`lab.evidence.results.published_metrics`.
"""

import contextlib
import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import open_clip
import pandas as pd
from pandas.api.types import union_categoricals
from torch import nn

from benchmark.pretraining import pretraining_config
from cmp import budgets, config, evaluation, mixtures, models, schedules, streams
from cmp.data import Corpus, load_data
from cmp.errors import CmpError
from cmp.files import SHORT_ID
from cmp.merging.rules import Weights
from cmp.methods import adapters
from cmp.parsing import read_yaml
from cmp.readers.manifest import MANIFESTS
from cmp.runs import forecast, identity, paper, store
from cmp.runs.runner import Observer, execute
from cmp.training import StepResult
from lab import chapters
from lab.evidence import claims, results, scores, studies, verdicts
from lab.evidence.claims import ClaimsFile, FrontOf, Term
from lab.evidence.scores import estimate_mean, planned_streams

MEANS = {"A_KA": "A_KA", "A_ZS": "A_ZS"}
POOL = 4751
"""Images of the embedded benchmark that bases were trained on."""
SCHEDULES = ("front", "rates", "rates-more")
MIXTURES = ("mixtures", "mixtures-more")
"""The studies shown by the explorers of schedules and mixtures."""
SUBSET = 64
"""Images per dataset that are scored after each update."""


def published_settings(*names: str) -> pd.DataFrame:
    """Return the published metrics of several studies in one table, leaving out unpublished studies
    and settings already in an earlier study. `study` is the study of a setting, and `planned` the
    number of streams planned for it."""
    tables, seen = [], set[str]()
    for name in filter(results.is_published, names):
        table = results.published_metrics(name)
        table = table[~table["setting"].isin(seen)]
        planned = {each: planned_streams(name, each) for each in table["setting"].unique()}
        tables.append(table.assign(study=name, planned=table["setting"].map(planned)))
        seen |= {*table["setting"].unique()}
    if not tables:
        raise CmpError(
            f"none of the studies {', '.join(names)} is published; publish one with `cmpt study "
            "NAME --publish`"
        )
    # with the same categories, `pd.concat` does not turn these long texts into strings
    texts = union_categoricals([table["config"] for table in tables]).categories
    same = [x.assign(config=x["config"].cat.set_categories(texts)) for x in tables]
    return pd.concat(same, ignore_index=True)


def front_points(front: FrontOf) -> pd.DataFrame:
    """Return the mean `peak`, `A_KA` and `A_ZS` of the settings of a front, by increasing peak."""
    scores = verdicts.published_scores(front.study)[1].loc[[*front.settings]]
    return scores.groupby("setting")[["peak", "A_KA", "A_ZS"]].mean().sort_values("peak")


def changes_since_start(study: str, settings: Sequence[str]) -> pd.DataFrame:
    """Return each setting's `peak` and the mean changes of `A_KA` and `A_ZS` over a stream, by
    increasing peak."""
    scores = verdicts.published_scores(study)[1].loc[[*settings]]
    changes = scores[["A_KA", "A_ZS"]] - scores[["start A_KA", "start A_ZS"]].to_numpy()
    means = changes.assign(peak=scores["peak"]).groupby("setting").mean()
    return means.sort_values("peak")


def loss_parts(control: str) -> pd.DataFrame:
    """Split the change of A_ZS over a stream into parts, from study `protection` and its
    counterparts.

    The parts add up: from A_ZS before the stream, to the end of training on only the pool, to the
    end of training on thirds, to the end of EMA-Merge.

    Args:
        control: The setting of study `protection` that trains on only the pool.

    Returns:
        One row per part: its `value` in points, `half`, the half-width of its interval, the number
        of streams `n`, and `preliminary`, such as "2 of 20 streams".
    """
    trajectory = scores.study_trajectory("protection").query("setting == @control")
    start = trajectory.query("task == 0 and scope == 'full'").set_index("replicate")["A_ZS"]
    alone = verdicts.setting_scores("protection", control)
    thirds = verdicts.setting_scores("mixtures", "thirds")["A_ZS"]
    end = verdicts.setting_scores("merging", "EMA")["A_ZS"]
    parts = {
        "before the stream": start,
        "training on the pool alone": alone["A_ZS"] - start,
        "thirds, beyond that": thirds - alone["A_ZS"],
        "EMA-Merge": end - thirds,
    }
    planned = planned_streams("protection", control)
    estimates = {
        name: estimate_mean(values.loc[alone.index], alone["base"], planned)
        for name, values in parts.items()
    }
    rows = {
        name: {"value": x.value, "half": x.half, "n": x.streams, "preliminary": x.progress}
        for name, x in estimates.items()
    }
    return pd.DataFrame.from_dict(rows, orient="index")


def runs_of_size(
    profile: str, study: str, live: Mapping[tuple[str, int], config.RunConfig] | None = None
) -> pd.DataFrame:
    """Return the final scores of runs of a profile's size, one row per run: `setting`, `A_KA` and
    `A_ZS` on the fixed subset.

    Args:
        profile: "quick", "cpu" or "gpu".
        study: The study with published runs; for `quick`, its band, see
            `lab.evidence.studies.band_of`.
        live: Computed runs by (setting, replicate), used if none are published.
    """
    name = {"quick": f"{studies.BAND}{study}", "cpu": study}.get(profile, "")
    if name and results.is_published(name):
        return ends_on_subset(results.published_metrics(name))
    if live:
        return ends_on_subset(collect_metrics(live))
    return pd.DataFrame(columns=["setting", "A_KA", "A_ZS"])


def ends_on_subset(metrics: pd.DataFrame) -> pd.DataFrame:
    """Return the final scores of runs on the fixed subset, or on the whole test if there is no
    subset: `setting`, `A_KA` and `A_ZS`, one row per run."""
    table = store.trajectory(metrics)
    scope = "subset" if (table["scope"] == "subset").any() else "full"
    ends = store.after_last_task(table[table["scope"] == scope])
    return ends[["setting", "A_KA", "A_ZS"]].reset_index(drop=True)


def mean_scores(
    settings: Mapping[Any, str], columns: Mapping[str, str] = MEANS, shared: bool = False
) -> pd.DataFrame:
    """Return the mean scores of published settings over their replicates.

    Args:
        settings: The name of each here -> its study/setting.
        columns: Columns of `lab.evidence.verdicts.run_scores` -> their names here.
        shared: Whether to use only replicates that all these settings have.

    Returns:
        One row per setting: the means, "NAME half", the half-widths of their intervals at the level
        of the claims (NaN if there is none yet), `streams`, the number of streams, and
        `preliminary`, such as "2 of 20 streams".
    """
    rows, places = {}, {words: place.split("/", 1) for words, place in settings.items()}
    replicates = shared_replicates(places.values()) if shared else slice(None)
    planned = {words: planned_streams(*place) for words, place in places.items()}
    for words, place in places.items():
        scores, rows[words] = verdicts.setting_scores(*place).loc[replicates], {}
        count = min(planned.values()) if shared else planned[words]
        for key, name in columns.items():
            mean = estimate_mean(scores[key], scores["base"], count)
            rows[words] |= {name: mean.value, f"{name} half": mean.half}
            rows[words] |= {"streams": mean.streams, "preliminary": mean.progress}
    return pd.DataFrame.from_dict(rows, orient="index")


def spread_over_tasks(study: str, groups: Mapping[str, Sequence[str]]) -> pd.DataFrame:
    """Return the spread of the settings of each group after each update.

    Args:
        study: A published study that scored the whole test after every update.
        groups: The name of a group -> its settings.

    Returns:
        One column per group, indexed by task: the standard deviation of A_KA over the group's
        settings in points, averaged over replicates.
    """
    table = store.trajectory(results.published_metrics(study)).query("scope == 'full'")
    spreads = {}
    for words, names in groups.items():
        rows = table[table["setting"].isin(names)]
        spreads[words] = rows.groupby(["task", "replicate"])["A_KA"].std().groupby("task").mean()
    return pd.DataFrame(spreads)


ORDER_CLAIM = "orders differ during the stream"
"""The claim with five orders and five random streams as terms."""
ON_WAY = (0.25, 0.75)
"""The part of a stream that counts as "way" for a spread, see `verdicts.run_scores`."""
IDEAL_STREAMS = 5


WHEN = {"during the stream": "way", "at the end": "end"}
"""When orders are compared -> the same for `lab.evidence.claims.Term`."""


def order_spreads() -> pd.DataFrame:
    """Tabulate the spreads of orders and of random streams during the stream and at the end.

    A spread is the standard deviation of A_KA over five settings of one replicate, as in the claims
    of the guideline.

    Returns:
        Rows "five orders", "five random streams", "difference", "orders beyond chance" (the root of
        the difference of squares, since variances add) and both for "a perfect learner"; columns
        "during the stream" and "at the end", in points, with intervals at the level of the claims.
    """
    study, orders, draws = _compared_orders()
    columns = {}
    for words, at in WHEN.items():
        found = order_estimates(words)
        columns[words] = {
            "five orders": found["five orders"].in_words(""),
            "five random streams": found["five random streams"].in_words(""),
            "difference": found["difference"].in_words(),
            "orders beyond chance": found["difference of squares"].in_words(convert=_signed_root),
            "a perfect learner, five orders": f"{ideal_spread(study, orders, at):.1f}",
            "a perfect learner, five random streams": f"{ideal_spread(study, draws, at):.1f}",
        }
    return pd.DataFrame(columns)


def order_estimates(when: str) -> dict[str, scores.Estimate]:
    """Return the spreads of five orders and of five random streams, and their difference.

    Args:
        when: "during the stream" or "at the end".

    Returns:
        Name -> estimate in points, for "difference of squares" in points squared.

    Raises:
        CmpError: `when` is neither.
    """
    if when not in WHEN:
        raise CmpError(f"{when!r}: choose from {', '.join(WHEN)}")
    study, orders, draws = _compared_orders()
    planned = min(planned_streams(study, name) for name in (*orders, *draws))
    (own, bases), (other, _) = (
        verdicts.spread_of(study, Term(each, at=WHEN[when])) for each in (orders, draws)
    )
    spreads = {
        "five orders": own,
        "five random streams": other,
        "difference": (own - other).dropna(),
        "difference of squares": (own**2 - other**2).dropna(),
    }
    return {name: estimate_mean(each, bases, planned) for name, each in spreads.items()}


def _compared_orders() -> tuple[str, Sequence[str], Sequence[str]]:
    """Return the study of the claim on orders, its five orders and its five random streams."""
    [claim] = [each for each in claims.load_claims().claims if each.name == ORDER_CLAIM]
    orders, draws = (term.of for term in claim.terms)
    return claim.study, orders, draws


def _signed_root(value: float) -> float:
    return float(np.copysign(np.sqrt(abs(value)), value))


def ideal_spread(study: str, settings: Sequence[str], at: str) -> float:
    """Return the spread of A_KA over settings that a perfect learner would have.

    It correctly answers all questions on classes that have arrived and no others, so its scores
    depend only on the streams.

    Args:
        study: The study.
        settings: Settings that differ in their streams.
        at: "way" or "end", see `lab.evidence.claims.Term`.

    Returns:
        The standard deviation over settings in points, averaged over `IDEAL_STREAMS` replicates.
    """
    runs, spreads = studies.load_study(study).configs("cpu", IDEAL_STREAMS), []
    for replicate in range(IDEAL_STREAMS):
        scores = []
        for name in settings:
            known = _ideal_accumulation(runs[name, replicate])
            low, high = (len(known) * share for share in ON_WAY)
            scores.append(known.loc[low:high].mean() if at == "way" else known.iloc[-1])
        spreads.append(np.std(scores, ddof=1))
    return float(np.mean(spreads))


@functools.lru_cache(maxsize=64)
def _ideal_accumulation(run: config.RunConfig) -> pd.Series:
    """Return the A_KA of a perfect learner after each update, from 1, in percent."""
    corpus = load_data(run.data)
    questions = evaluation.list_questions(corpus).query("role == @evaluation.ROLES['A_KA']")
    names = pd.Series(streams.class_names(corpus, questions["row"].to_numpy()))
    blocks = streams.task_classes(corpus, run.stream, run.seeds.stream)
    arrival = {entry: task for task, block in enumerate(blocks, start=1) for entry in block}
    share = questions["weight"] / questions["dataset"].nunique()
    learned = share.groupby(names.map(arrival).to_numpy()).sum()
    return 100 * learned.reindex(range(1, len(blocks) + 1), fill_value=0.0).cumsum()


def regime_table(runs: dict[str, config.RunConfig], corpus: Corpus) -> pd.DataFrame:
    """Tabulate the training regime of runs beside the paper's (`book/regime.yaml`).

    Args:
        runs: Runs of embedded models, by the name of their column.
        corpus: The embedded benchmark.

    Returns:
        One row per measure.
    """
    columns = {"the paper": read_yaml(chapters.BOOK / "regime.yaml")}
    for name, run in runs.items():
        pretraining = pretraining_config(run.model.name, 0)
        rates, before = (
            learning_rates(each.schedule, each.stream.tasks, each.training.steps)
            for each in (run, pretraining)
        )
        pools, counts = mixtures.task_pools(run, corpus), sample_counts(run, corpus)
        own = [counts[task, pool.update].mean() for task, pool in enumerate(pools)]
        drawn = counts.sum(axis=0)[pools[0].pretraining]
        pool = len(mixtures.replay_pool(corpus, pretraining.mixture, 0))
        share = run.schedule.peak / pretraining.schedule.peak
        seen = pretraining.training.steps * pretraining.training.batch / pool
        numbers = {
            "updates": run.stream.tasks,
            "steps of an update": run.training.steps,
            "sum of learning rates": rates.sum(),
            "sum, per cent of pretraining's sum": 100 * rates.sum() / before.sum(),
            "peak, per cent of pretraining's peak": 100 * share,
            "passes over an update's images": np.median(own),
            "draws of a replayed image, in all": drawn.mean(),
            "passes of pretraining over its data": seen,
        }
        columns[name] = {key: f"{value:.3g}" for key, value in numbers.items()}
        columns[name]["moments"] = "carried" if run.carries_moments else "begun anew"
    return pd.DataFrame(columns)


# names, costs and sizes: the first chapters


@dataclasses.dataclass(frozen=True, eq=False)
class Predictions:
    """A model's predictions for test images before a stream and after each update.

    Attributes:
        old: One row per old image, indexed by corpus position: `truth`, and predictions in columns
            0, 1, ...
        new: The same for images of the kinds that the updates bring.
        scores: A_KA and A_ZS at each of these times.
    """

    old: pd.DataFrame
    new: pd.DataFrame
    scores: list[dict[str, float]]


def predict_names(ends: Iterable[Weights], name: str, corpus: Corpus) -> Predictions:
    """Return a model's predictions before a stream and after each update.

    Args:
        ends: The model's weights at these times.
        name: The model's name.
        corpus: The embedded benchmark.
    """
    network, hits, scores = models.create_model(name), list[pd.DataFrame](), []
    for weights in ends:
        network.load_state_dict(weights)
        scored = evaluation.evaluate(network, name, corpus, subset=SUBSET)
        hits.append(scored.hits[scored.hits["answer"] != ""])
        scores.append({key: round(scored.summary()[key], 1) for key in ("A_KA", "A_ZS")})
    tables = {}
    for score, role in evaluation.ROLES.items():
        kinds = corpus.by_role(role)
        answers = [each[each["dataset"].isin(kinds)].set_index("row")["answer"] for each in hits]
        tables[score] = table = pd.DataFrame(dict(enumerate(answers)))
        table.insert(0, "truth", corpus.table["label"].iloc[table.index].astype(str).to_numpy())
    return Predictions(tables["A_ZS"], tables["A_KA"], scores)


def named_by_one(one: pd.DataFrame, other: pd.DataFrame, update: int, count: int = 7) -> list[int]:
    """Choose images that exactly one of two models names rightly.

    Args:
        one: The `old` or `new` of `predict_names` for a model.
        other: The same for another model.
        update: The column to compare.
        count: The number of images for each model.

    Returns:
        Corpus positions: first the images that `one` names rightly, then those of `other`, from
        different parts of the tests.
    """
    first, second = (table[update] == table["truth"] for table in (one, other))
    chosen = []
    for found in (one.index[first & ~second], one.index[second & ~first]):
        places = np.linspace(0, len(found) - 1, min(count, len(found))).round().astype(int)
        chosen += found[places].tolist()
    return chosen


RETRAINED = ("ViT-B-32", "ViT-B-16", "ViT-L-14")
"""Models for which the cost of pretraining is computed; larger ones take too long."""


def retraining_costs() -> pd.DataFrame:
    """Tabulate the cost of pretraining real models and of the paper's stream of updates, on one
    H100.

    Samples are taken from the names of open_clip's LAION-2B weights, FLOPs are computed from
    shapes, and the speed is assumed, see `cmp.runs.forecast.DEVICES`.

    Returns:
        One row per model.
    """
    card, rows = forecast.DEVICES["h100"], {}
    updates = paper.TABLE4["full"].steps * paper.TABLE4_TASKS * paper.TABLE4_BATCH
    for name, about in paper.model_catalogue(RETRAINED).iterrows():
        tags = " ".join(open_clip.list_pretrained_tags_by_model(str(name)))
        samples = 1e9 * max(map(int, re.findall(r"laion2b_s(\d+)b_", tags)))
        hours = about["GFLOPs"] * forecast.GIGA / card.speed / 3600
        rows[name] = {
            "parameters (M)": f"{about['parameters']:.0f}",
            "pretraining samples": f"{samples / 1e9:.0f} billion",
            "pretraining time": f"{samples * hours / 24:,.0f} days",
            "samples of 20 updates": f"{updates / 1e6:.1f} million",
            "time of 20 updates": f"{updates * hours:.1f} hours",
        }
    return pd.DataFrame.from_dict(rows, orient="index")


DOMAINS = {
    "photographs": ("natural", "adversarial, natural"),
    "fine-grained photographs": ("finegrained, natural", "finegrained, object"),
    "small photographs, digits": ("natural, low-res", "b&w, low-res"),
    "sketches, paintings, diagrams": (
        "sketch", "paintings", "diagrams", "illustrations", "renditions (sketch, paintings)",
    ),
    "satellite images": ("remote sensing",),
    "rendered scenes": ("synthetic",),
    "images from a generator": ("generative",),
    "traffic signs": ("traffic signs", "finegrained, traffic signs"),
    "medical images": ("medical",),
    "industrial parts": ("high-resolution, industrial",),
    "textures": ("textural",),
}  # fmt: skip
"""Domain -> values of `images` in the manifests of FoMo-in-Flux."""


ROLES = {"adapt": "to adapt to", "eval": "to evaluate on"}
"""Role of a dataset -> its name in tables."""


def domain_table() -> pd.DataFrame:
    """Count the datasets, concepts and samples of FoMo-in-Flux by domain, from their manifests.

    Datasets of captions have no concepts, and datasets to evaluate on only count test images.

    Returns:
        One row per domain, and one for all.
    """
    domain = {images: name for name, kinds in DOMAINS.items() for images in kinds}
    rows = []
    for path in sorted((MANIFESTS / "fomo").glob("*.yaml")):
        about = read_yaml(path)
        counts, adapts = about["counts"], about["role"] == "adapt"
        row = {"title": about["title"], "role": ROLES[about["role"]]}
        row |= {"domain": domain[about["images"]]}
        row |= {"concepts": counts["classes"] if counts["classes"] > 1 else 0}
        rows.append(row | {"samples": counts["test"] + counts["train"] * adapts})
    table = pd.DataFrame(rows)
    groups = table.groupby("domain")
    counts = pd.crosstab(table["domain"], table["role"])
    counts = counts.join(groups[["concepts", "samples"]].sum()).reindex([*DOMAINS])
    counts.loc["all"] = counts.sum()
    first = groups["title"].agg(lambda titles: ", ".join(sorted(titles, key=str.lower)[:3]))
    return readable(counts).join(first.rename("such as")).fillna({"such as": ""})


def readable(table: pd.DataFrame, digits: int = 1) -> pd.DataFrame:
    """Return a table formatted for a page, with commas for thousands and a dash for missing values.

    Args:
        table: A table of numbers and text.
        digits: The number of decimals of non-integer types.
    """

    def words(value: Any) -> Any:
        if isinstance(value, float | np.floating):
            return "–" if np.isnan(value) else f"{value:z,.{digits}f}".replace("-", "−")
        return f"{value:,}" if isinstance(value, int | np.integer) else value

    shown = table.astype(object).map(words).rename_axis(columns=None)
    return shown if table.index.nlevels > 1 else shown.rename_axis(index=None)


def drift_table() -> pd.DataFrame:
    """Tabulate by how many points final scores of published runs differ on another processor.

    `python -m tools.drift` measures this and writes `book/drift.yaml`.
    """
    rows = pd.DataFrame(read_yaml(chapters.BOOK / "drift.yaml")).T.set_index("setting")
    return readable(rows[["A_KA", "A_ZS"]].astype(float))


LENGTHS = {
    "plain fine-tuning": {
        20: "scaling-more/20 steps, peak 0.00063",
        40: "front/plain, peak 0.00063",
        80: "scaling-more/80 steps, peak 0.00048",
        160: "scaling/160 steps, peak 0.0004",
    },
    "EMA-Merge": {
        20: "scaling-more/20 steps, EMA",
        40: "scaling/40 steps, EMA",
        80: "scaling-more/80 steps, EMA",
        160: "scaling/160 steps, EMA",
    },
    "joint": {
        40: "scaling-more/joint",
        80: "scaling-more/joint, 80 steps",
        160: "scaling-more/joint, 160 steps",
    },
}
"""Steps per update -> study/setting. Peaks were tuned at 40 and 160 steps: 20 steps use the peak of
40, and 80 steps one in between."""


def scores_by_steps() -> pd.DataFrame:
    """Return `mean_scores` of `LENGTHS` over their common streams, with columns `group` and
    `steps`."""
    places = {(name, n): place for name, line in LENGTHS.items() for n, place in line.items()}
    return mean_scores(places, shared=True).rename_axis(["group", "steps"]).reset_index()


def steps_table() -> pd.DataFrame:
    """Tabulate the effect of more steps on plain fine-tuning and joint training, from
    `scores_by_steps`: one row per number of steps per update, in percent."""
    table = scores_by_steps().query("group != 'EMA-Merge'").pivot(index="steps", columns="group")
    table = table[[*MEANS]].swaplevel(axis=1).sort_index(axis=1, ascending=[False, True])
    table.columns = [", ".join(names) for names in table.columns]
    table.insert(1, "rise of A_KA", table["plain fine-tuning, A_KA"].diff())
    return table.rename_axis("steps per update").round(1)


def control_runs() -> pd.DataFrame:
    """Return the published runs of the replay-only control, as a trajectory frame."""
    control = scores.study_trajectory("protection").query("setting == 'pool alone'")
    return control.assign(setting="replay-only control")


def collect_metrics(configs: dict[tuple[str, int], config.RunConfig]) -> pd.DataFrame:
    """Return the metrics of stored runs in one table, with `setting`, `replicate` and `run`."""
    frames = []
    for (setting, replicate), run_config in configs.items():
        run = store.load_run(identity.run_id_of(run_config))
        short = run.id[:SHORT_ID]
        frames.append(run.metrics.assign(setting=setting, replicate=replicate, run=short))
    return pd.concat(frames, ignore_index=True)


def sample_counts(run: config.RunConfig, corpus: Corpus) -> np.ndarray:
    """Return how often each task of a run shows each image of the corpus, [tasks, images]."""
    run = budgets.settle(run, corpus)
    counts = np.zeros((run.stream.tasks, len(corpus.table)), np.int64)
    for task, pools in enumerate(mixtures.task_pools(run, corpus)):
        for step in range(run.steps[task]):
            rows = mixtures.batch_rows(pools, run.seeds.data, task, step)
            np.add.at(counts[task], rows, 1)
    return counts


def setting_means(trajectory: pd.DataFrame) -> pd.DataFrame:
    """Return the mean final value of each aggregate over replicates, one row per setting.

    Args:
        trajectory: The result of `cmp.runs.store.trajectory` for several settings and replicates.
    """
    ends = store.final_scores(trajectory)
    return ends.groupby("setting", sort=False)[list(scores.AGGREGATES)].mean()


def learning_rates(schedule: config.Schedule, tasks: int, steps: int) -> np.ndarray:
    """Return the learning rates of a stream of equally long tasks, [tasks, steps]."""
    every = (steps,) * tasks
    return np.array([schedules.task_rates(schedule, every, t) for t in range(tasks)])


def gains_table(
    front: FrontOf, settings: dict[str, Sequence[str]], shared: bool = False
) -> pd.DataFrame:
    """Return the gains of published settings.

    Intervals have the level of the claims, but only `judge_claims` gives verdicts.

    Args:
        front: The front.
        settings: The settings of each study.
        shared: Whether to use only replicates that all these settings have, so that rows are
            compared on the same streams.

    Returns:
        One row per setting, in the given order: `study`, `setting`, `A_KA`, `A_ZS`, `gain` with
        `low` and `high` (over bases, NaN if there is no interval yet), `mirror`, `is_bound`, `n`,
        `preliminary` (such as "2 of 20 streams", or "" if complete), and `reason` if there is no
        gain.
    """
    places = [(study, name) for study, names in settings.items() for name in names]
    rows, replicates = [], shared_replicates(places) if shared else None
    for study, name in places:
        row = {"study": study, "setting": name, "n": 0, "is_bound": False, "reason": ""}
        row |= dict.fromkeys(("A_KA", "A_ZS", "gain", "low", "high", "mirror"), np.nan)
        row["preliminary"] = ""
        rows.append(row)
        try:
            own = verdicts.setting_scores(study, name)
            own = own if replicates is None else own.loc[replicates]
            row |= {"n": len(own)} | own[["A_KA", "A_ZS"]].mean().to_dict()
            gain = verdicts.gain_of(study, name, front, replicates=replicates)
        except CmpError as error:
            row["reason"] = (
                verdicts.NOT_COMPUTED if isinstance(error, verdicts.NotComputed) else str(error)
            )
            continue
        estimate = verdicts.estimate_gain(study, name, gain, len(own) if shared else None)
        row |= {"gain": estimate.value, "mirror": gain.mirror, "is_bound": gain.is_bound}
        row |= {"low": estimate.low, "high": estimate.high, "preliminary": estimate.progress}
    return pd.DataFrame(rows)


def shared_replicates(places: Iterable[Sequence[str]]) -> pd.Index:
    """Return the replicates that all given settings have, each a study and a setting, ignoring
    unpublished ones."""
    replicates = []
    for study, name in places:
        with contextlib.suppress(verdicts.NotComputed):
            replicates.append(verdicts.setting_scores(study, name).index)
    return functools.reduce(pd.Index.intersection, replicates) if replicates else pd.Index([])


def claim_correlations(known: ClaimsFile) -> pd.DataFrame:
    """Tabulate the error correlations of claims on gains, which share a front; columns are the
    numbers of rows."""
    pseudo = {}
    for claim in known.claims:
        if claim.measure == "gain" and not verdicts.describe_missing(claim, known):
            with contextlib.suppress(CmpError):  # the setting is outside the front
                pseudo[claim.name] = verdicts.measure_claim(claim, known).pseudo
    table = pd.DataFrame(pseudo).corr().round(1) + 0.0  # and no -0.0
    table.index = [f"{number} {name}" for number, name in enumerate(table.index, 1)]
    return table.set_axis(range(1, len(table) + 1), axis=1)


def task_end_weights(run: config.RunConfig, corpus: Corpus) -> list[Weights]:
    """Return the weights before the stream and at the end of each task, on the CPU.

    The run is computed only for this, and not stored. It is scored on one image of each dataset,
    since nobody reads the scores.
    """
    run = dataclasses.replace(run, evaluation=config.Evaluation(subset=1, full=False))
    weights: list[Weights] = [models.load_model(run.model, run.seeds.init).state_dict()]
    steps = budgets.settle(run, corpus).steps

    def keep(task: int, step: int, result: StepResult, model: nn.Module) -> None:
        if step == steps[task] - 1:
            merged = adapters.merged_state_dict(model)
            weights.append({name: x.cpu().clone() for name, x in merged.items()})

    execute(run, corpus, Observer(keep))
    return weights
