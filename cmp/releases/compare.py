"""Compare two models on the same images: scores, names lost and gained, and a stored index."""

import functools
import itertools
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from cmp import evaluation, models, starts, streams
from cmp.data import Corpus
from cmp.errors import CmpError, name_choices
from cmp.evaluation import ENCODE_BLOCK, ROLES, EncodedSets, Scores
from cmp.models import Network
from cmp.releases.candidates import Candidate, find_candidate, find_release, folder_candidate
from cmp.releases.index import RECALL_AT, measure_index
from cmp.releases.intervals import mean_interval, share_interval
from cmp.releases.ledger import is_among, update_label
from cmp.releases.release import Release
from cmp.scale.devices import check_device

SMALL_SIDE = 64
"""Pixels per side up to which a CPU encodes a whole block of `cmp.evaluation` at once."""
NAMING, TO_TEXT, TO_IMAGE = "name", "image to text", "text to image"
"""The kinds of question."""
ALL = "all"
"""The row of `Comparison.summary` where all sets count equally."""
DIFFERENCES = {
    "change", "loses", "low", "high", "lost_share", "lost_low", "lost_high",
    "gained_share", "gained_low", "gained_high",
}  # fmt: skip
"""The columns of tables that are 0 for two models with the same features."""


@dataclass(frozen=True, eq=False)
class Comparison:
    """Two models on the same images. Scores, shares and intervals are in percent. The 95% intervals
    are paired and over groups of images that are hit or missed together.

    Attributes:
        old: The old model's title.
        new: The new model's title.
        corpus: The data.
        split: The split that is scored.
        sets: A row per dataset: `role`, `metric`, `questions`, `old`, `new`, `change` with `low`
            and `high`; `lost`, the number of right answers that became wrong, and `lost_share` of
            the right answers, with `lost_low` and `lost_high`; the same for `gained`, among the
            wrong answers.
        summary: The same columns for A_KA, A_ZS and "all", where datasets count equally.
        updates: The same columns, and `label` and `images`, for the scored images of each update,
            by its name, where images count equally, and both directions of retrieval; no row where
            the data have no updates. The label of a release's update begins with its number.
        flips: A row per question whose answer became wrong (`kind` "lost") or right ("gained"):
            `dataset`, `row` (the corpus position of the image), `asked` ("name", "image to text"
            or "text to image"), `concept`, and the answers `said_old` and `said_new`, "" in
            retrieval.
        concepts: A row per dataset and class: `questions`, `old`, `new`, `change`, `lost`,
            `gained`, and `became`, the name that the new model gives most of the lost ones. Within
            a dataset, sorted by images lost minus images gained, then by images lost, with classes
            of a single image last.
        retrieval: A row per dataset with captions, `asked` and `k`: recall@k as `old`, `new`,
            `change`, `low`, `high`, and `questions`.
        index: The recall of a stored index, see `cmp.releases.index.measure_index`.
        is_same: Whether both models have bitwise the same features, so no interval is needed.
        scores: The evaluation of the old model, and of the new one.
    """

    old: str
    new: str
    corpus: Corpus
    split: str
    sets: pd.DataFrame
    summary: pd.DataFrame
    updates: pd.DataFrame
    flips: pd.DataFrame
    concepts: pd.DataFrame
    retrieval: pd.DataFrame
    index: pd.DataFrame
    is_same: bool
    scores: tuple[Scores, Scores]

    def worst_concepts(self, count: int = 20, each: bool = True) -> pd.DataFrame:
        """Return concepts that got worse, as in `concepts`.

        Args:
            count: Up to how many.
            each: Whether `count` is per dataset. Otherwise it is for all datasets together, and
                those that lost most images, less those gained, come first.
        """
        worse = self.concepts[self.concepts["change"] < 0]
        if each:
            return worse.groupby("dataset", sort=False).head(count)
        return worse.iloc[np.lexsort(_badness(worse))].head(count)


def compare(
    old: str | os.PathLike[str] | Release | Candidate | tuple[str, Network],
    new: str | os.PathLike[str] | Release | Candidate | tuple[str, Network],
    corpus: Corpus,
    *,
    arrived: Collection[str] | None = None,
    split: str = "test",
    subset: int | None = None,
    precision: str | None = None,
    device: str | None = None,
    progress: bool = False,
) -> Comparison:
    """Compare two models on the same images: what the new one now gets right, and what wrong.

    Every image is decoded and encoded once for each model, by its own preprocessing; only
    features are kept. Both models are loaded before any image is. Right-to-wrong
    answers are the negative flips of Yan et al. (2020, arXiv 2011.09161), here as a share of what
    was right.

    Args:
        old: The model that is served: "NAME:START", "run:ID", "hf-hub:ORG/NAME" or a folder in
            open_clip's layout; or a release; or the name of an open_clip model, which chooses the
            tokenizer, and a network.
        new: The model that may replace it.
        corpus: The data.
        arrived: What an index of the old model lacks: names of datasets or of updates. If
            None, the updates between two releases that are in the data; otherwise the datasets of
            the role "adapt", or none if the data have no dataset of the role "eval" or "transfer".
        split: "test" or "validation".
        subset: Images per dataset; None for all.
        precision: "bf16" or "fp32". If None, the new model's if it is a release, so that scores
            match its card; otherwise "bf16".
        device: "cpu" or "cuda". If None, the CPU for embedded models and a GPU for others.
        progress: Whether to show a progress bar on standard error.

    Returns:
        A `Comparison` with pandas tables: `sets` and `summary` (scores, change, lost and gained
        answers, with intervals), `flips` (a row per answer that changed between right and wrong),
        `concepts`, `retrieval`, and `index` (what the old model's index is worth to the new one).

    Raises:
        CmpError: A model cannot be loaded, does not take images of this size or is of another type
            than `cmp.evaluate` takes; torch cannot use the device; or nothing is scored.

    Example:
        >>> corpus = cmp.load_data("embedded")
        >>> tables = cmp.compare("small:annealed", "small:unannealed", corpus, subset=8)
        >>> list(tables.summary.columns)[:4]
        ['sets', 'questions', 'old', 'new']
    """
    old, new = (
        (isinstance(x, str | os.PathLike) and find_release(os.fspath(x))) or x for x in (old, new)
    )
    candidates = [as_candidate(model) for model in (old, new)]
    target = common_device([candidate.name for candidate in candidates], device)
    if arrived is None and isinstance(old, Release) and isinstance(new, Release):
        arrived = _updates_between(old, new, corpus)
    if precision is None:
        precision = new.config.training.precision if isinstance(new, Release) else "bf16"
    is_new = arrived_images(corpus, arrived)
    for candidate in candidates:  # either may be refused, so before minutes of encoding
        corpus.check_side(models.preprocessing(candidate.network).size, candidate.name)
    features = [
        _encode(candidate, corpus, split, subset, precision, target, role if progress else "")
        for candidate, role in zip(candidates, ("old", "new"), strict=True)
    ]
    old_scores, new_scores = (evaluation.score(corpus, each) for each in features)
    questions = _pair_questions(corpus, features[0], old_scores, new_scores)
    is_same = features[0].equals(features[1])
    sets, summary = _summaries(questions, old_scores.datasets)
    rows = np.concatenate([test_set.rows for test_set in features[0].test_sets])
    updates = _compare_updates(corpus, questions).reindex(columns=["label", "images", *sets])
    sets = old_scores.datasets[["role", "metric", "images", "chance"]].join(sets)
    retrieval = _compare_retrieval(corpus, features)
    index = measure_index(corpus, *features, is_new[rows])
    if is_same:  # nothing can differ, not even on other images
        for table in (sets, summary, updates, retrieval, index):
            table[[column for column in table if column in DIFFERENCES]] = 0.0
    return Comparison(
        old=candidates[0].title,
        new=candidates[1].title,
        corpus=corpus,
        split=split,
        sets=sets,
        summary=summary,
        updates=updates,
        flips=_list_flips(questions),
        concepts=_compare_concepts(questions),
        retrieval=retrieval,
        index=index,
        is_same=is_same,
        scores=(old_scores, new_scores),
    )


def as_candidate(
    model: str | os.PathLike[str] | Release | Candidate | tuple[str, Network],
) -> Candidate:
    """Return a model in the form that `compare` uses, loading it if necessary."""
    if isinstance(model, Release):
        title = os.path.basename(os.path.abspath(model.folder))  # the folder may be "."
        return folder_candidate(model.folder)._replace(title=title)
    if isinstance(model, str | os.PathLike):
        return find_candidate(os.fspath(model))
    if isinstance(model, Candidate):
        return model
    name, network = model
    return Candidate(name, name, network)


def _updates_between(old: Release, new: Release, corpus: Corpus) -> set[str] | None:
    """Return the updates of a corpus that arrived in one release and not in another, or None if the
    corpus has no images of their updates.

    Updates of another stream, or after a branch, are new if they have an image that the old release
    lacks.
    """
    known = set(corpus.table["update"].unique())
    arrivals = new.record.arrivals
    labels = [update_label(arrival) for arrival in arrivals]
    if known.isdisjoint({*labels} - {""}):
        return None
    pairs = zip(old.record.updates, new.record.updates, strict=False)
    shared = len([*itertools.takewhile(lambda pair: pair[0].id == pair[1].id, pairs)])
    pictures = new.ledger().used
    lacking = pictures["arrival"][~is_among(pictures, old.ledger().used)].unique()
    return known & {labels[n] for n in lacking if arrivals[n].update > shared}


def common_device(names: Collection[str], device: str | None) -> str:
    """Return the given device or, by default, the one on which both models are encoded: a GPU if
    one of the models of these names would be computed there.

    Raises:
        CmpError: torch cannot use this device.
    """
    usual = {starts.default_device(name, device) for name in names}
    check_device(device := device or ("cuda" if "cuda" in usual else "cpu"))
    return device


def arrived_images(corpus: Corpus, arrived: Collection[str] | None) -> np.ndarray:
    """Return whether each image of a corpus is new to an index of the old model, bool [images].

    Args:
        corpus: The data.
        arrived: As in `compare`.

    Raises:
        CmpError: A name is neither a dataset's nor an update's.
    """
    table = corpus.table
    if arrived is None:
        adapted = corpus.by_role("adapt")
        scored = [x for x in corpus.datasets if corpus.datasets[x].role in ("eval", "transfer")]
        return table["dataset"].isin(adapted if scored else []).to_numpy()
    names = shown_updates(corpus)
    known = [*corpus.datasets, *names.values()]
    for name in arrived:
        if name not in known and name not in names:
            raise CmpError(
                f"arrived, or --new: no dataset and no update is called {name!r:.80}"
                f"{name_choices(name, known)}"
            )
    updates = [label for label, name in names.items() if {label, name} & set(arrived)]
    return (table["dataset"].isin(list(arrived)) | table["update"].isin(updates)).to_numpy()


def _encode(
    candidate: Candidate,
    corpus: Corpus,
    split: str,
    subset: int | None,
    precision: str,
    device: str,
    progress: str,
) -> EncodedSets:
    """Return a model's features of the scored images; `progress` names the progress bar, "" for
    none."""
    _, name, network = candidate
    side = models.preprocessing(network).size
    network, corpus = network.to(device), corpus.on(device)
    sets = evaluation.make_test_sets(corpus, split, subset)
    total = sum(len(each.rows) for each in sets)
    with tqdm(
        total=total, desc=f"encode {progress}", unit=" images", disable=not progress, delay=1
    ) as bar:
        share = functools.partial(_in_blocks, bar, _block_size(side, device))
        return evaluation.encode(network, name, corpus, split, subset, precision, share)


def _block_size(side: int, device: str) -> int:
    """Return how many images of a size are encoded between two updates of the progress bar. A GPU
    gets many, since decoding processes are started again for each block. A CPU gets fewer large
    ones, whose pixels and activations would otherwise take half a gigabyte."""
    if device != "cpu":
        return 8 * ENCODE_BLOCK
    return ENCODE_BLOCK if side <= SMALL_SIDE else ENCODE_BLOCK // 8


def _in_blocks(bar: tqdm, size: int, items: Any, encode: Callable[[Any], Tensor]) -> Tensor:
    """Encode images block by block, moving the progress bar after each, and texts at once, since
    they are packed by length."""
    if not isinstance(items, np.ndarray):
        return encode(items)
    features = []
    for start in range(0, len(items), size):
        features.append(encode(items[start : start + size]))
        bar.update(len(features[-1]))
    return torch.cat(features)


def _pair_questions(
    corpus: Corpus, features: EncodedSets, old: Scores, new: Scores
) -> pd.DataFrame:
    """Return a row per question with its kind and both models' hits and answers."""
    table = old.hits.rename(columns={"hit": "hit_old", "answer": "said_old"})
    table = table.assign(hit_new=new.hits["hit"], said_new=new.hits["answer"])
    asked, concept = [], []
    for test_set in features.test_sets:
        labels = corpus.table["label"].iloc[test_set.rows].astype(str).to_numpy()
        if test_set.owner is None:
            asked += [NAMING] * len(test_set.rows)
            concept.append(labels)
        else:
            captions = np.array(test_set.texts, object)
            first = np.searchsorted(test_set.owner, np.arange(len(test_set.rows)))
            first = first.clip(max=len(captions) - 1)
            asked += [TO_TEXT] * len(test_set.rows) + [TO_IMAGE] * len(captions)
            concept += [captions[first], captions]
    return table.assign(asked=asked, concept=np.concatenate(concept))


def _summaries(
    questions: pd.DataFrame, datasets: pd.DataFrame
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return `Comparison.sets` as far as they follow from the questions, and the summary."""
    roles = {name: list(datasets.index[datasets["role"] == role]) for name, role in ROLES.items()}
    chosen = {name: members for name, members in roles.items() if members}
    chosen |= {ALL: list(datasets.index)}
    summary = {
        name: {"sets": len(members), **_summarise_sets(questions, members)}
        for name, members in chosen.items()
    }
    sets = {name: _summarise_sets(questions, [name]) for name in datasets.index}
    return _frame(sets, "dataset"), _frame(summary, "sets of")


def shown_updates(corpus: Corpus, rows: np.ndarray | None = None) -> dict[str, str]:
    """Return the names of a corpus's updates by their labels, in order of arrival. Names from a
    ledger omit their numbers, see `cmp.releases.ledger.update_label`, unless two updates have the
    same name.

    Args:
        corpus: The data.
        rows: Positions of images; None for all.
    """
    column = corpus.table["update"].astype(str)
    every = sorted({*column} - {""}, key=streams.update_key)
    present = {*column.iloc[slice(None) if rows is None else rows]}
    labels = names = [label for label in every if label in present]
    # a user's own name may begin with a number, too, such as that of a year
    if all(label.startswith(f"{number} ") for number, label in enumerate(every, start=1)):
        names = [label.partition(" ")[2] for label in labels]
    shown = {
        label: name if names.count(name) == 1 else label
        for label, name in zip(labels, names, strict=True)
    }
    is_unique = len({*shown.values()}) == len(shown)  # one may be called "1 a", as is the first "a"
    return shown if is_unique else {label: label for label in labels}


def _compare_updates(corpus: Corpus, questions: pd.DataFrame) -> pd.DataFrame:
    """Return `Comparison.updates`."""
    arrived = questions[questions["dataset"].isin(corpus.by_role("adapt"))]
    label = corpus.table["update"].astype(str).to_numpy()[arrived["row"]]
    rows = {}
    for update, name in shown_updates(corpus, arrived["row"].to_numpy()).items():
        chosen = arrived[label == update]
        images = chosen["row"].nunique()
        weight = _image_weights(chosen) / images
        rows[name] = {"label": update, "images": images, **_summarise(chosen, weight)}
    return _frame(rows, "update")


def _image_weights(questions: pd.DataFrame) -> np.ndarray:
    """Return the weight of each question if all images of its dataset count 1, half of it in each
    direction of retrieval."""
    of_set, of_kind = (questions.groupby(x) for x in ("dataset", ["dataset", "asked"]))
    images, kinds = of_set["row"].transform("nunique"), of_set["asked"].transform("nunique")
    return (images / kinds / of_kind["row"].transform("size")).to_numpy()


def _frame(rows: dict[str, dict[str, Any]], index: str) -> pd.DataFrame:
    return pd.DataFrame(list(rows.values()), index=pd.Index(list(rows), name=index))


def _summarise_sets(questions: pd.DataFrame, datasets: list[str]) -> dict[str, float]:
    """Return scores, change and flips over datasets, which count equally."""
    chosen = questions[questions["dataset"].isin(datasets)]
    return _summarise(chosen, chosen["weight"].to_numpy() / len(datasets))


def _summarise(chosen: pd.DataFrame, weight: np.ndarray) -> dict[str, float]:
    """Return scores, change and flips over questions, with weights that sum to 1."""
    part, group = (pd.factorize(chosen[column])[0] for column in ("dataset", "group"))
    was, now = (chosen[column].to_numpy() > 0 for column in ("hit_old", "hit_new"))
    ends = {
        "change low high": mean_interval(now * 1.0 - was, weight, part, group),
        "lost_share lost_low lost_high": share_interval(~now, was, weight, part, group),
        "gained_share gained_low gained_high": share_interval(now, ~was, weight, part, group),
    }
    change, lost, gained = (
        dict(zip(names.split(), (100 * value for value in values), strict=True))
        for names, values in ends.items()
    )
    return {
        "questions": len(chosen),
        "old": 100 * float(weight @ was),
        "new": 100 * float(weight @ now),
        **change,
        "lost": int((was & ~now).sum()),
        **lost,
        "gained": int((now & ~was).sum()),
        **gained,
    }


def _list_flips(questions: pd.DataFrame) -> pd.DataFrame:
    """Return `Comparison.flips`."""
    chosen = questions[questions["hit_old"] != questions["hit_new"]]
    kind = np.where(chosen["hit_old"] > 0, "lost", "gained")
    columns = ["dataset", "row", "asked", "concept", "said_old", "said_new"]
    return chosen[columns].assign(kind=kind).reset_index(drop=True)


def _compare_concepts(questions: pd.DataFrame) -> pd.DataFrame:
    """Return `Comparison.concepts`."""
    named = questions[questions["asked"] == NAMING]
    lost = (named["hit_old"] > 0) & (named["hit_new"] == 0)
    gained = (named["hit_old"] == 0) & (named["hit_new"] > 0)
    rows = named.assign(lost=lost, gained=gained)
    by_concept = rows.groupby(["dataset", "concept"], sort=False)
    table = by_concept.agg(
        questions=("row", "size"), old=("hit_old", "mean"), new=("hit_new", "mean"),
        lost=("lost", "sum"), gained=("gained", "sum"),
    ).reset_index()  # fmt: skip
    keys = ["dataset", "concept"]
    answers = rows[lost].groupby([*keys, "said_new"], sort=False, observed=True).size()
    usual = answers.sort_values(ascending=False, kind="stable").reset_index().drop_duplicates(keys)
    became = usual.set_index(keys)["said_new"].reindex(pd.MultiIndex.from_frame(table[keys]))
    table["became"] = became.fillna("").astype(str).to_numpy()
    table[["old", "new"]] *= 100
    table.insert(5, "change", table["new"] - table["old"])
    place = {name: number for number, name in enumerate(questions["dataset"].unique())}
    order = np.lexsort((*_badness(table), table["dataset"].map(place)))
    return table.iloc[order].reset_index(drop=True)


def _badness(concepts: pd.DataFrame) -> tuple[pd.Series, ...]:
    """Return the keys by which concepts are sorted from the worst, the last key first."""
    net = concepts["gained"] - concepts["lost"]
    return concepts["change"], concepts["questions"] == 1, -concepts["lost"], net


def _compare_retrieval(corpus: Corpus, features: list[EncodedSets]) -> pd.DataFrame:
    """Return `Comparison.retrieval`."""
    rows: list[dict[str, object]] = []
    for (test_set, *old), (_, *new) in zip(*(each.by_set() for each in features), strict=True):
        if test_set.owner is None:
            continue
        owner, images = torch.from_numpy(test_set.owner), test_set.rows
        group = [corpus.table["group"].array[part] for part in (images, images[test_set.owner])]
        for k in RECALL_AT:
            hits = [evaluation.retrieval_hits(*pair, owner, k) for pair in (old, new)]
            for number, asked in enumerate((TO_TEXT, TO_IMAGE)):
                was, now = (each[number].astype(float) for each in hits)
                even, one = np.full(len(was), 1 / len(was)), np.zeros(len(was), int)
                ends = mean_interval(now - was, even, one, pd.factorize(group[number])[0])
                change, low, high = (100 * end for end in ends)
                row = {"dataset": test_set.dataset.name, "asked": asked, "k": k}
                row |= {"questions": len(was), "old": 100 * was.mean(), "new": 100 * now.mean()}
                rows.append(row | {"change": change, "low": low, "high": high})
    names = ["dataset", "asked", "k", "questions", "old", "new", "change", "low", "high"]
    return pd.DataFrame(rows, columns=names)
