"""Zero-shot classification and retrieval, A_KA, A_ZS and their geometric mean (spec 2).

Every score is a mean of hits, so one table of hits carries them all, and its standard errors come
from the spread of hits between independent `group`s: all drawings of one emoji rise and fall
together, so they count as one observation.
"""

import functools
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from cmp import images, models
from cmp.data.corpus import Corpus
from cmp.data.manifest import Dataset
from cmp.seeds import unit
from cmp.training import autocast

RETRIEVAL_K = 5
ROLES = {"A_KA": "adapt", "A_ZS": "eval"}
BLOCK = 512


@dataclass(frozen=True)
class Scores:
    """What an evaluation found.

    hits: a row a question: `dataset`, `row` (the image's or, for text to image, its owner's
        position in the corpus), `group`, `answer` (the class that was chosen, empty in retrieval),
        `hit` (0 or 1), `weight` (of the question in its dataset's score; they sum to one).
    datasets: a row a dataset: `role`, `metric`, `score`, `standard_error`, `chance` (all three in
        percent), `images`, `classes`.
    """

    hits: pd.DataFrame
    datasets: pd.DataFrame

    def aggregate(self, name: str) -> tuple[float, float]:
        """(value, standard error) in percent of "A_KA" or "A_ZS": datasets count equally."""
        chosen = self.datasets.index[self.datasets["role"] == ROLES[name]]
        return aggregate(self.hits, list(chosen))

    def summary(self) -> dict[str, float]:
        """A_KA, A_ZS and their geometric mean, in percent, of those that were evaluated."""
        found = {
            name: self.aggregate(name)[0]
            for name, role in ROLES.items()
            if (self.datasets["role"] == role).any()
        }
        if len(found) == len(ROLES):
            found["GM"] = float(np.sqrt(found["A_KA"] * found["A_ZS"]))
        return found


def forgotten(before: Scores, after: Scores) -> pd.DataFrame:
    """The questions of classification that `before` answered rightly and `after` wrongly.

    Both must come from the same evaluation images. A row a question: `dataset`, `role`, `row` (the
    image's position in the corpus), `answer` (what is said now).
    """
    keys = ["dataset", "row"]
    old = before.hits[before.hits["answer"] != ""].set_index(keys)
    new = after.hits[after.hits["answer"] != ""].set_index(keys)
    lost = new[(old["hit"] == 1) & (new["hit"] == 0)].reset_index()
    return lost.assign(role=lost["dataset"].map(after.datasets["role"]))[[*keys, "role", "answer"]]


def aggregate(hits: pd.DataFrame, datasets: list[str]) -> tuple[float, float]:
    """Mean over datasets of their scores, in percent, with its cluster-robust standard error.

    A group's influence is the sum of its weighted deviations from its datasets' scores, over all
    datasets that it appears in; the error is the root of the sum of their squares.
    """
    if not datasets:
        return float("nan"), float("nan")
    chosen = hits[hits["dataset"].isin(datasets)]
    weight, hit = chosen["weight"] / len(datasets), chosen["hit"]
    score = (chosen["weight"] * hit).groupby(chosen["dataset"]).transform("sum")
    influence = (weight * (hit - score)).groupby(chosen["group"]).sum()
    return 100 * float((weight * hit).sum()), 100 * float(np.sqrt((influence**2).sum()))


def evaluation_rows(
    corpus: Corpus, dataset: str, split: str = "test", size: int | None = None
) -> np.ndarray:
    """Positions of a dataset's evaluation images: all, or a fixed choice of `size`.

    The choice goes through the classes in turn, in an order that depends on nothing but the
    dataset: it is the same at every evaluation, and nothing is ever cut in place.
    """
    rows = corpus.rows(split, dataset=dataset)
    if size is None or size >= len(rows):
        return rows
    place = [unit("evaluation subset", dataset, split, index) for index in range(len(rows))]
    table = pd.DataFrame({"label": corpus.table["label"].iloc[rows].astype(str), "place": place})
    table["turn"] = table.groupby("label")["place"].rank()
    return np.sort(rows[np.lexsort((table["place"], table["turn"]))[:size]])


@torch.no_grad()
def image_features(model: nn.Module, corpus: Corpus, rows: np.ndarray, precision: str) -> Tensor:
    """Unit features of stored images, [len(rows), E]."""
    device = model.logit_scale.device
    features = []
    for block in torch.from_numpy(rows).split(BLOCK):
        x = images.plain(corpus.images[block].to(device))
        x = images.normalise(x, model.visual.image_mean, model.visual.image_std)
        with autocast(precision, device):
            features.append(models.encode_image(model, x))
    return torch.cat(features)


@torch.no_grad()
def text_features(model: nn.Module, name: str, texts: list[str], precision: str) -> Tensor:
    """Unit features of texts, [len(texts), E]; `name` is the model's, for its tokenizer."""
    device = model.logit_scale.device
    features = []
    for block in _tokens(name, tuple(texts)).split(BLOCK):
        with autocast(precision, device):
            features.append(models.encode_text(model, block.to(device)))
    return torch.cat(features)


@functools.lru_cache(maxsize=256)
def _tokens(name: str, texts: tuple[str, ...]) -> Tensor:
    return models.tokenizer(name)(list(texts))


def classify(image: Tensor, prompts: Tensor) -> np.ndarray:
    """The nearest prompt of each image. image: [N, E]; prompts: [classes, E] -> int [N]."""
    return (image @ prompts.T).argmax(dim=1).cpu().numpy()


def retrieval_hits(
    image: Tensor, text: Tensor, owner: Tensor, k: int = RETRIEVAL_K
) -> tuple[np.ndarray, np.ndarray]:
    """Recall@k hits, (image to text [N], text to image [M]).

    image: [N, E]; text: [M, E]; owner: [M], the image that each text describes. An image counts as
    found when any of its texts is among its k nearest. Works through blocks of rows.
    """
    owner = owner.to(image.device)
    to_text = [
        (owner[(block @ text.T).topk(min(k, len(text)), dim=1).indices] == rows[:, None]).any(1)
        for block, rows in zip(
            image.split(BLOCK),
            torch.arange(len(image), device=image.device).split(BLOCK),
            strict=True,
        )
    ]
    to_image = [
        ((block @ image.T).topk(min(k, len(image)), dim=1).indices == target[:, None]).any(1)
        for block, target in zip(text.split(BLOCK), owner.split(BLOCK), strict=True)
    ]
    return torch.cat(to_text).cpu().numpy(), torch.cat(to_image).cpu().numpy()


def _hits(
    corpus: Corpus, dataset: str, rows: np.ndarray, hit: np.ndarray, answer: object, share: float
) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "dataset": dataset,
            "row": rows,
            "group": corpus.table["group"].to_numpy()[rows],
            "answer": answer,
            "hit": hit.astype(float),
            "weight": share / len(rows),
        }
    )


def _evaluate_one(
    model: nn.Module, name: str, corpus: Corpus, dataset: Dataset, rows: np.ndarray, precision: str
) -> tuple[pd.DataFrame, float]:
    """(hits, chance in percent) of one dataset."""
    image = image_features(model, corpus, rows, precision)
    if dataset.task == "classification":
        classes = np.array(corpus.classes[dataset.name])
        prompts = [dataset.prompt.format(label) for label in classes]
        answer = classes[classify(image, text_features(model, name, prompts, precision))]
        hit = answer == corpus.table["label"].iloc[rows].to_numpy().astype(str)
        return _hits(corpus, dataset.name, rows, hit, answer, 1.0), 100 / len(classes)
    captions = [corpus.captions(row) for row in rows]
    owner = np.repeat(np.arange(len(rows)), [len(texts) for texts in captions])
    flat = [text for texts in captions for text in texts]
    text = text_features(model, name, flat, precision)
    to_text, to_image = retrieval_hits(image, text, torch.from_numpy(owner))
    both = [
        _hits(corpus, dataset.name, rows, to_text, "", 0.5),
        _hits(corpus, dataset.name, rows[owner], to_image, "", 0.5),
    ]
    return pd.concat(both), 100 * min(1.0, RETRIEVAL_K / len(rows))


def evaluate(
    model: nn.Module,
    name: str,
    corpus: Corpus,
    split: str = "test",
    subset: int | None = None,
    precision: str = "bf16",
) -> Scores:
    """Score `model` on every dataset of the corpus that has images in `split`.

    name: the model's, for its tokenizer. subset: images a dataset, or None for all.
    The model's training mode and all randomness are left as they were.
    """
    was_training = model.training
    model.eval()
    hits, rows_of = [], []
    for dataset in corpus.datasets.values():
        rows = evaluation_rows(corpus, dataset.name, split, subset)
        if dataset.role == "pool" or len(rows) == 0:
            continue
        found, chance = _evaluate_one(model, name, corpus, dataset, rows, precision)
        score, error = aggregate(found, [dataset.name])
        metric = "top-1" if dataset.task == "classification" else f"R@{RETRIEVAL_K}"
        classes = len(corpus.classes[dataset.name])
        hits.append(found)
        rows_of.append(
            (dataset.name, dataset.role, metric, score, error, chance, len(rows), classes)
        )
    model.train(was_training)
    columns = [
        "dataset",
        "role",
        "metric",
        "score",
        "standard_error",
        "chance",
        "images",
        "classes",
    ]
    table = pd.DataFrame(rows_of, columns=columns).set_index("dataset")
    return Scores(pd.concat(hits, ignore_index=True), table)
