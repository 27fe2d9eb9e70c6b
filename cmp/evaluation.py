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

from cmp import models
from cmp.data import POOL_DATA_ROLES, Corpus, normalise, stored_images, to_rgb
from cmp.embedded.manifest import Dataset
from cmp.errors import CmpError
from cmp.seeds import unit_interval
from cmp.training import autocast

RETRIEVAL_K = 5
ROLES = {"A_KA": "adapt", "A_ZS": "eval"}
ENCODE_BLOCK = 256  # images, texts or rows at a time; activations of more leave the caches


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


def forgotten_answers(before: Scores, after: Scores) -> pd.DataFrame:
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
    place = _places(dataset, split, len(rows))
    table = pd.DataFrame({"label": corpus.table["label"].iloc[rows].astype(str), "place": place})
    table["turn"] = table.groupby("label")["place"].rank()
    return np.sort(rows[np.lexsort((table["place"], table["turn"]))[:size]])


@functools.lru_cache(maxsize=256)
def _places(dataset: str, split: str, count: int) -> tuple[float, ...]:
    """A number an image that depends on its dataset, split and place in it alone."""
    return tuple(
        unit_interval("evaluation subset", dataset, split, index) for index in range(count)
    )


@torch.no_grad()
def image_features(model: nn.Module, corpus: Corpus, rows: np.ndarray, precision: str) -> Tensor:
    """Unit features of stored images, [len(rows), E]."""
    device = model.logit_scale.device
    features = []
    for block in stored_images(corpus, rows, ENCODE_BLOCK, models.image_side(model), device):
        x = to_rgb(block.to(device))
        x = normalise(x, model.visual.image_mean, model.visual.image_std)
        with autocast(precision, device):
            features.append(models.encode_image(model, x))
    return torch.cat(features)


@torch.no_grad()
def text_features(model: nn.Module, name: str, texts: list[str], precision: str) -> Tensor:
    """Unit features of texts, [len(texts), E]; `name` is the model's, for its tokenizer.

    Texts go through the model by length, so that short ones are not padded to the longest.
    """
    device = model.logit_scale.device
    tokens = models.tokenize(name, texts)  # on the CPU, as `models.encode_text` likes them
    by_length = tokens.argmax(dim=1).argsort(stable=True)
    features = []
    for block in by_length.split(ENCODE_BLOCK):
        with autocast(precision, device):
            features.append(models.encode_text(model, tokens[block]))
    return torch.cat(features)[by_length.argsort().to(device)]


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
            image.split(ENCODE_BLOCK),
            torch.arange(len(image), device=image.device).split(ENCODE_BLOCK),
            strict=True,
        )
    ]
    to_image = [
        ((block @ image.T).topk(min(k, len(image)), dim=1).indices == target[:, None]).any(1)
        for block, target in zip(text.split(ENCODE_BLOCK), owner.split(ENCODE_BLOCK), strict=True)
    ]
    return torch.cat(to_text).cpu().numpy(), torch.cat(to_image).cpu().numpy()


@dataclass(frozen=True)
class _Question:
    """What is asked of a dataset: images at `rows`, and the texts to choose from. owner: for
    retrieval, the position in `rows` of the image that each text describes."""

    dataset: Dataset
    rows: np.ndarray
    texts: list[str]
    owner: np.ndarray | None = None


def _ask(corpus: Corpus, dataset: Dataset, rows: np.ndarray) -> _Question:
    if dataset.task == "classification":
        labels = corpus.classes[dataset.name]
        return _Question(dataset, rows, [dataset.prompt.format(label) for label in labels])
    captions = [corpus.captions(row) for row in rows]
    owner = np.repeat(np.arange(len(rows)), [len(texts) for texts in captions])
    return _Question(dataset, rows, [text for texts in captions for text in texts], owner)


def _answer(corpus: Corpus, question: _Question, image: Tensor, text: Tensor) -> pd.DataFrame:
    """The hits of one dataset, from the features of its images and of its texts."""
    rows = question.rows
    if question.owner is None:
        answer = np.array(corpus.classes[question.dataset.name])[classify(image, text)]
        hit = answer == corpus.table["label"].iloc[rows].to_numpy().astype(str)
        parts = [(rows, hit, answer)]
    else:
        to_text, to_image = retrieval_hits(image, text, torch.from_numpy(question.owner))
        parts = [(rows, to_text, ""), (rows[question.owner], to_image, "")]
    frames = [
        pd.DataFrame(
            {
                "dataset": question.dataset.name,
                "row": asked,
                "group": corpus.table["group"].to_numpy()[asked],
                "answer": answer,
                "hit": hit.astype(float),
                "weight": 1 / len(parts) / len(asked),
            }
        )
        for asked, hit, answer in parts
    ]
    return pd.concat(frames)


def _row(corpus: Corpus, question: _Question, found: pd.DataFrame) -> dict[str, object]:
    """A dataset's row in the table of scores."""
    dataset, images_asked = question.dataset, len(question.rows)
    classify_it = dataset.task == "classification"
    score, error = aggregate(found, [dataset.name])
    return {
        "dataset": dataset.name,
        "role": dataset.role,
        "metric": "top-1" if classify_it else f"R@{RETRIEVAL_K}",
        "score": score,
        "standard_error": error,
        "chance": 100 * min(1, (1 if classify_it else RETRIEVAL_K) / len(question.texts)),
        "images": images_asked,
        "classes": len(corpus.classes[dataset.name]),
    }


def _ask_all(corpus: Corpus, split: str, subset: int | None) -> list[_Question]:
    """What is asked of every dataset that is scored and has images in the split."""
    scored = [
        dataset for dataset in corpus.datasets.values() if dataset.role not in POOL_DATA_ROLES
    ]
    rows = [evaluation_rows(corpus, dataset.name, split, subset) for dataset in scored]
    found = [_ask(corpus, *pair) for pair in zip(scored, rows, strict=True) if len(pair[1])]
    if not found:
        raise CmpError(f"evaluation: no dataset of this corpus has images in {split!r}")
    return found


def evaluate(
    model: nn.Module,
    name: str,
    corpus: Corpus,
    split: str = "test",
    subset: int | None = None,
    precision: str = "bf16",
) -> Scores:
    """Score `model` on every dataset of the corpus that has images in `split`; some have no
    validation images.

    name: the model's, for its tokenizer. subset: images a dataset, or None for all. Each distinct
    text and each image is encoded once, however many datasets ask for it. The model's training
    mode and all randomness are left as they were. `CmpError` if there is nothing to score, or if
    features are not finite, whose nearest prompt would be an accident.
    """
    questions = _ask_all(corpus, split, subset)
    texts = list(dict.fromkeys(text for question in questions for text in question.texts))
    place = {text: index for index, text in enumerate(texts)}
    was_training = model.training
    model.eval()
    text = text_features(model, name, texts, precision)
    rows = np.concatenate([question.rows for question in questions])
    image = image_features(model, corpus, rows, precision)
    model.train(was_training)
    if not (image.isfinite().all() and text.isfinite().all()):
        raise CmpError("evaluation: features are not finite: are the weights those of this model?")
    found = [
        _answer(corpus, question, mine, text[[place[text_] for text_ in question.texts]])
        for question, mine in zip(
            questions, image.split([len(question.rows) for question in questions]), strict=True
        )
    ]
    table = [_row(corpus, *each) for each in zip(questions, found, strict=True)]
    return Scores(pd.concat(found, ignore_index=True), pd.DataFrame(table).set_index("dataset"))
