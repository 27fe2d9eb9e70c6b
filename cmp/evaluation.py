"""Zero-shot classification and retrieval, A_KA, A_ZS and their geometric mean.

Every score is a mean of hits, so one table of hits contains them all. Standard errors come from the
spread of hits between independent `group`s: all drawings of one emoji tend to be hit or missed
together, so they count as one observation.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from cmp import models
from cmp.arithmetic import autocast
from cmp.config import POOL_DATA_ROLES
from cmp.data import Corpus, DatasetInfo, normalise, stored_images, to_rgb
from cmp.errors import CmpError
from cmp.models import Network
from cmp.seeds import unit_interval

RETRIEVAL_K = 5
ROLES = {"A_KA": "adapt", "A_ZS": "eval"}
ENCODE_BLOCK = 256
"""Images, texts or rows per block; activations of larger blocks would not fit the caches."""
SIMILARITIES = 2**24
"""Similarities of images and class names that are in memory at a time, at most."""


ShareRows = Callable[[Any, Callable[[Any], Tensor]], Tensor]
"""A function that returns the features of all items, [items, E], given one that encodes some of
them."""


@dataclass(frozen=True)
class ScoredSet:
    """The images of a dataset, and the texts to choose from.

    Attributes:
        dataset: The dataset.
        rows: The corpus positions of the images, [N].
        texts: The prompts of the classes, or for retrieval the M captions of the images.
        owner: For retrieval, the image that each text describes, as a position in `rows`, [M].
    """

    dataset: DatasetInfo
    rows: np.ndarray
    texts: list[str]
    owner: np.ndarray | None = None


@dataclass(frozen=True)
class EncodedSets:
    """A network's features of the images and texts of several test sets.

    Attributes:
        test_sets: The test sets.
        image: Unit features of the images of all test sets in order, [N, E].
        texts: The distinct texts of all test sets.
        text: Unit features of the texts, [M, E].
    """

    test_sets: list[ScoredSet]
    image: Tensor
    texts: list[str]
    text: Tensor

    def by_set(self) -> Iterator[tuple[ScoredSet, Tensor, Tensor]]:
        """Yield each test set with the features of its images and of its texts."""
        place = {text: index for index, text in enumerate(self.texts)}
        parts = self.image.split([len(test_set.rows) for test_set in self.test_sets])
        for test_set, image in zip(self.test_sets, parts, strict=True):
            yield test_set, image, self.text[[place[text] for text in test_set.texts]]

    def equals(self, other: "EncodedSets") -> bool:
        """Return whether another network's features are bitwise equal."""
        return torch.equal(self.image, other.image) and torch.equal(self.text, other.text)


@dataclass(frozen=True)
class Scores:
    """The result of an evaluation.

    Attributes:
        hits: One row per question: `dataset`; `row`, the corpus position of the image, or of the
            image that a text describes; `group`; `answer`, the predicted class, empty in retrieval;
            `hit`, 0 or 1; `weight` in the dataset's score; the weights of a dataset sum to 1.
        datasets: One row per dataset: `role`, `metric`; `score`, `standard_error` and `chance` in
            percent; `images`, `classes`.
    """

    hits: pd.DataFrame
    datasets: pd.DataFrame

    def aggregate(self, name: str) -> tuple[float, float]:
        """Return (value, standard error) of "A_KA" or "A_ZS" in percent; datasets count equally."""
        chosen = self.datasets.loc[self.datasets["role"] == ROLES[name]]
        return aggregate(self.hits, list(chosen.index))

    def summary(self) -> dict[str, float]:
        """Return A_KA, A_ZS and their geometric mean GM in percent, leaving out what was not
        scored.

        This is the definition of the three scores. `cmp.runs.store.trajectory` gives the same from
        stored metrics, and `cmp.releases.compare` with intervals of paired differences."""
        scored = [name for name in ROLES if ROLES[name] in set(self.datasets["role"])]
        summary = {name: self.aggregate(name)[0] for name in scored}
        if len(summary) == len(ROLES):
            summary["GM"] = float(np.sqrt(summary["A_KA"] * summary["A_ZS"]))
        return summary


def evaluate(
    model: Network,
    name: str,
    corpus: Corpus,
    split: str = "test",
    subset: int | None = None,
    precision: str = "bf16",
    share_rows: ShareRows = lambda items, encode: encode(items),
) -> Scores:
    """Score a network on every dataset of a corpus with images in a split.

    Each image and each distinct text is encoded once. The network's training mode does not change.

    Args:
        model: The network.
        name: Its name, for the tokenizer.
        corpus: The data.
        split: "test" or "validation".
        subset: Images per dataset; None for all.
        precision: "bf16" or "fp32".
        share_rows: (items, encode) -> the features of all items, for example when several processes
            encode a share each (`cmp.scale.processes.share_rows`).

    Raises:
        CmpError: There is nothing to score, or features are not finite, which would make the
            nearest prompt arbitrary. The network does not take images of this size, or is neither
            in fp32 nor, with precision "bf16", in bf16.

    Example:
        >>> model = cmp.load_model(cmp.RunConfig().model, seed=0)
        >>> scores = cmp.evaluate(model, "small", cmp.load_data("embedded"), subset=4)
        >>> list(scores.summary())
        ['A_KA', 'A_ZS', 'GM']
    """
    return score(corpus, encode(model, name, corpus, split, subset, precision, share_rows))


def encode(
    model: Network,
    name: str,
    corpus: Corpus,
    split: str,
    subset: int | None,
    precision: str,
    share_rows: ShareRows = lambda items, encode: encode(items),
) -> EncodedSets:
    """Return a network's features of all images and texts in an evaluation.

    Args:
        model: The network; its training mode does not change.
        name: Its name, for the tokenizer.
        corpus: The data.
        split: "test" or "validation".
        subset: Images per dataset; None for all.
        precision: "bf16" or "fp32".
        share_rows: As in `evaluate`.

    Raises:
        CmpError: There is nothing to score, or features are not finite, which would make the
            nearest prompt arbitrary. The network does not take images of this size, or is neither
            in fp32 nor, with precision "bf16", in bf16.
    """
    corpus.check_side(models.preprocessing(model).size, name)
    _check_types(model, precision)
    test_sets = make_test_sets(corpus, split, subset)
    texts = list(dict.fromkeys(text for test_set in test_sets for text in test_set.texts))
    rows = np.concatenate([test_set.rows for test_set in test_sets])
    with evaluation_mode(model):
        image = share_rows(rows, lambda part: image_features(model, corpus, part, precision))
        text = share_rows(texts, lambda part: text_features(model, name, part, precision))
    if not (image.isfinite().all() and text.isfinite().all()):
        raise CmpError(
            "evaluation: features are not finite; check that the weights belong to this model"
        )
    return EncodedSets(test_sets, image, texts, text)


def _check_types(model: Network, precision: str) -> None:
    """Raise `CmpError` if a network has parameters of a type that does not fit the images, which
    are in fp32, or in bf16 with autocast."""
    accepted = {torch.float32, *([torch.bfloat16] if precision == "bf16" else [])}
    if others := {x.dtype for x in model.parameters()} - accepted:
        name = str(others.pop()).removeprefix("torch.")
        raise CmpError(f"evaluation: the network is in {name}; call .float() first")


def score(corpus: Corpus, features: EncodedSets) -> Scores:
    """Return the scores of a network from its features.

    Args:
        corpus: The data.
        features: The result of `encode`.
    """
    scored = [_score(corpus, *of_set) for of_set in features.by_set()]
    hits, datasets = zip(*scored, strict=True)
    return Scores(pd.concat(hits, ignore_index=True), pd.DataFrame(datasets).set_index("dataset"))


@contextlib.contextmanager
def evaluation_mode(model: Network) -> Iterator[None]:
    """Put a network into evaluation mode, and restore the mode of every layer afterwards."""
    modes = {layer: layer.training for layer in model.modules()}  # frozen norms differ
    model.eval()
    try:
        yield
    finally:
        for layer, mode in modes.items():
            layer.training = mode


@functools.lru_cache(maxsize=4)
def list_questions(corpus: Corpus) -> pd.DataFrame:
    """Return the questions that an evaluation of the whole test split asks any model.

    Returns:
        One row per question, in the order of `Scores.hits`, with the columns that do not depend on
        answers, and the `role` of its dataset. Callers share the table and must not change it.
    """
    sets = make_test_sets(corpus, "test", None)
    parts = [_questions(corpus, each).assign(role=each.dataset.role) for each in sets]
    return pd.concat(parts, ignore_index=True)


def aggregate(hits: pd.DataFrame, datasets: list[str]) -> tuple[float, float]:
    """Return the mean score over datasets and its cluster-robust standard error.

    The influence of a group is the sum of its weighted deviations from the scores of the datasets
    it appears in. The standard error is the root of the sum of squared influences.

    Args:
        hits: As in `Scores`.
        datasets: The datasets' names.

    Returns:
        Both in percent; NaN if there are no datasets.
    """
    if not datasets:
        return float("nan"), float("nan")
    chosen = hits.loc[hits["dataset"].isin(datasets)]
    weight, hit = chosen["weight"].to_numpy(), chosen["hit"].to_numpy()
    dataset, group = (pd.factorize(chosen[column])[0] for column in ("dataset", "group"))
    scores = np.bincount(dataset, weight * hit)
    influence = np.bincount(group, weight * (hit - scores[dataset])) / len(datasets)
    return 100 * float(scores.sum()) / len(datasets), 100 * float(np.linalg.norm(influence))


def evaluation_rows(
    corpus: Corpus, dataset: str, split: str = "test", size: int | None = None
) -> np.ndarray:
    """Return the corpus positions of a dataset's evaluation images, sorted.

    A subset takes images from each class in turn, in an order that depends only on the dataset. It
    is the same at every evaluation, and larger subsets contain smaller ones.

    Args:
        corpus: The data.
        dataset: The dataset's name.
        split: The split.
        size: Images in the subset; None for all.
    """
    rows = corpus.rows(split, dataset=dataset)
    if size is None or size >= len(rows):
        return rows
    label = pd.factorize(corpus.table["label"].array[rows])[0]
    key = np.array(_subset_keys(dataset, split, len(rows)))
    turn = pd.Series(key).groupby(label).rank()
    return np.sort(rows[np.lexsort((key, turn))[:size]])


@functools.lru_cache(maxsize=256)
def _subset_keys(dataset: str, split: str, count: int) -> tuple[float, ...]:
    """Return a number per image that depends only on its dataset, split and position."""
    return tuple(unit_interval("evaluation subset", dataset, split, n) for n in range(count))


def image_features(model: Network, corpus: Corpus, rows: np.ndarray, precision: str) -> Tensor:
    """Return unit features of stored images, [len(rows), E].

    Args:
        model: The network.
        corpus: The data.
        rows: Corpus positions of the images.
        precision: "bf16" or "fp32".
    """
    return encode_blocks(model, image_blocks(model, corpus, rows), precision)


def image_blocks(model: Network, corpus: Corpus, rows: np.ndarray) -> Iterator[Tensor]:
    """Return an iterator over blocks of images prepared for a network, as RGB in [0, 1]; see
    `image_features`."""
    device = model.logit_scale.device
    blocks = stored_images(corpus, rows, ENCODE_BLOCK, models.preprocessing(model), device)
    return (to_rgb(block.to(device)) for block in blocks)


@torch.no_grad()
def encode_blocks(model: Network, blocks: Iterable[Tensor], precision: str) -> Tensor:
    """Return unit features of blocks of RGB images in [0, 1], [images, E]; see `image_features`."""
    device, features = model.logit_scale.device, []
    for x in blocks:
        x = normalise(x, model.visual.image_mean, model.visual.image_std)
        with autocast(precision, device):
            features.append(models.encode_image(model, x))
    return torch.cat(features)


@torch.no_grad()
def text_features(model: Network, name: str, texts: list[str], precision: str) -> Tensor:
    """Return unit features of texts, [len(texts), E].

    Texts are encoded by length, so that short ones are not padded to the longest.

    Args:
        model: The network.
        name: Its name, for the tokenizer.
        texts: The texts.
        precision: "bf16" or "fp32".
    """
    device, features = model.logit_scale.device, []
    tokens = models.tokenize(name, tuple(texts))  # on the CPU, where `encode_text` packs them
    by_length = tokens.argmax(dim=1).argsort(stable=True)
    for block in by_length.split(ENCODE_BLOCK):
        with autocast(precision, device):
            features.append(models.encode_text(model, tokens[block]))
    return torch.cat(features)[by_length.argsort().to(device)]


def retrieval_hits(
    image: Tensor, text: Tensor, owner: Tensor, k: int = RETRIEVAL_K
) -> tuple[np.ndarray, np.ndarray]:
    """Return which queries have a match among their k nearest targets (recall@k).

    Args:
        image: Image features, [N, E].
        text: Text features, [M, E].
        owner: The image that each text describes, [M].
        k: The number of nearest targets that count.

    Returns:
        Hits from image to text, bool [N], where any text of the image counts, and from text to
        image, bool [M].
    """
    owner, number = owner.to(image.device), torch.arange(len(image), device=image.device)
    to_text = owner[nearest(image, text, k)] == number[:, None]
    to_image = nearest(text, image, k) == owner[:, None]
    return to_text.any(1).cpu().numpy(), to_image.any(1).cpu().numpy()


def chance_of_recall(owner: np.ndarray) -> float:
    """Return recall@`RETRIEVAL_K` under random similarities, averaged over both directions.

    Args:
        owner: The image that each of M texts describes, [M].
    """
    texts, images = len(owner), len(np.unique(owner))
    drawn = min(RETRIEVAL_K, texts)
    captions = np.bincount(owner, minlength=images).tolist()
    missed = [math.comb(texts - count, drawn) / math.comb(texts, drawn) for count in captions]
    return (1 - sum(missed) / images + min(1, RETRIEVAL_K / images)) / 2


def nearest(queries: Tensor, targets: Tensor, k: int, skip_self: bool = False) -> Tensor:
    """Return the positions of the k targets nearest to each query, or of all if there are fewer.

    Only a block of similarities is in memory at a time.

    Args:
        queries: Unit features, [Q, E].
        targets: Unit features, [T, E].
        k: How many to return.
        skip_self: Whether the queries are the targets, and none is its own neighbour.

    Returns:
        The positions, [Q, k], nearest first.
    """
    k, positions = min(k, len(targets) - skip_self), []
    for start in range(0, len(queries), ENCODE_BLOCK):
        similarity = queries[start : start + ENCODE_BLOCK] @ targets.T
        if skip_self:
            own = torch.arange(len(similarity), device=similarity.device)
            similarity[own, start + own] = -torch.inf
        positions.append(similarity.topk(k, dim=1).indices)
    return torch.cat(positions)


def make_test_sets(corpus: Corpus, split: str, subset: int | None) -> list[ScoredSet]:
    """Return a test set for each scored dataset with images in the split."""
    if subset is not None and subset < 1:
        raise CmpError(f"evaluation: subset: {subset}: give a positive number, or None for all")
    test_sets = []
    for name, dataset in corpus.datasets.items():
        rows = evaluation_rows(corpus, name, split, subset)
        if dataset.role in POOL_DATA_ROLES or not len(rows):
            continue
        if dataset.task == "classification":
            prompts = [dataset.prompt.format(label) for label in corpus.classes[name]]
            test_sets.append(ScoredSet(dataset, rows, prompts))
        else:
            captions = [corpus.captions(row) for row in rows]
            owner = np.repeat(np.arange(len(rows)), [len(texts) for texts in captions])
            texts = [text for texts in captions for text in texts]
            test_sets.append(ScoredSet(dataset, rows, texts, owner))
    if not test_sets:
        raise CmpError(
            f"evaluation: no dataset of this corpus has images in {split!r}; name another "
            "split, or assign images to this one by a table or a folder of that name"
        )
    return test_sets


def _questions(corpus: Corpus, test_set: ScoredSet) -> pd.DataFrame:
    """Return the questions of a test set. Retrieval asks in both directions, each with half the
    weight."""
    rows, owner = test_set.rows, test_set.owner
    parts = [rows] if owner is None else [rows, rows[owner]]
    row = np.concatenate(parts)
    weight = [np.full(len(part), 1 / len(parts) / len(part)) for part in parts]
    columns = {
        "dataset": test_set.dataset.name,
        "row": row,
        "group": corpus.table["group"].array[row],
        "weight": np.concatenate(weight),
    }
    return pd.DataFrame(columns)


def _score(
    corpus: Corpus, test_set: ScoredSet, image: Tensor, text: Tensor
) -> tuple[pd.DataFrame, dict[str, object]]:
    """Return the hits of a test set, from the features of its images and texts, and its row in the
    table of scores."""
    name, rows, owner = test_set.dataset.name, test_set.rows, test_set.owner
    if owner is None:
        metric, chance = "top-1", 1 / len(test_set.texts)
        blocks = image.split(max(1, SIMILARITIES // len(text)))
        best = torch.cat([(block @ text.T).argmax(dim=1) for block in blocks])
        answer = np.array(corpus.classes[name])[best.cpu().numpy()]
        hits = answer == corpus.table["label"].iloc[rows].to_numpy().astype(str)
    else:
        metric, chance, answer = f"R@{RETRIEVAL_K}", chance_of_recall(owner), ""
        hits = np.concatenate(retrieval_hits(image, text, torch.from_numpy(owner)))
    table = _questions(corpus, test_set).assign(answer=answer, hit=hits.astype(float))
    score, error = aggregate(table, [name])
    return table, {
        "dataset": name,
        "role": test_set.dataset.role,
        "metric": metric,
        "score": score,
        "standard_error": error,
        "chance": 100 * chance,
        "images": len(test_set.rows),
        "classes": len(corpus.classes[name]),
    }
