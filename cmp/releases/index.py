"""How well a stored index serves a new model: the recall of new queries against old features."""

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from cmp import evaluation
from cmp.data import Corpus
from cmp.evaluation import RETRIEVAL_K, EncodedSets
from cmp.releases.intervals import mean_interval

RECALL_AT = (1, RETRIEVAL_K)
KNOWN, NEW = "known", "new"
"""The names of the two parts of an index."""
GALLERIES = ("before", "reencoded", "as_is", "new_first")
"""The columns of recall, see `measure_index`."""


def measure_index(
    corpus: Corpus, old: EncodedSets, new: EncodedSets, is_new: np.ndarray
) -> pd.DataFrame:
    """Return how often queries find what they ask for in one index of all scored images.

    A query is either a text, that is a class's prompt or a caption, which asks for any of its
    images; or an image, which asks for another one of its class. A text with both known and new
    images is queried twice, once for each.

    Args:
        corpus: The data.
        old: The features by which images were indexed.
        new: The features of the model that will answer queries.
        is_new: Whether each scored image is new to the index, bool [N], in the order of the
            features.

    Returns:
        A row per content ("known", "new"), query ("text", "picture") and `k`: `queries`; recall@k
        in percent, of old queries on the old index (`before`), and of new queries on an index that
        is wholly `reencoded`, on the old one `as_is`, and on the old one with only new images
        encoded again (`new_first`); and `loses`, reencoded minus as_is, with the ends `low` and
        `high` of its 95% interval. NaN where there is no such query.
    """
    picture, text = _pairs(corpus, new)
    columns: dict[str, tuple[Tensor, Tensor, Tensor]] = {  # gallery, text and image queries
        "before": (old.image, old.text, old.image),
        "reencoded": (new.image, new.text, new.image),
    }
    if old.image.shape[1] == new.image.shape[1]:
        columns["as_is"] = (old.image, new.text, new.image)
        if 0 < is_new.sum() < len(is_new):
            is_new_row = torch.from_numpy(is_new).to(new.image.device)[:, None]
            columns["new_first"] = (new.image.where(is_new_row, old.image), new.text, new.image)
    nearest = {
        key: (_neighbours(texts, gallery), _neighbours(pictures, gallery, skip_self=True))
        for key, (gallery, texts, pictures) in columns.items()
    }
    labelled = _of_classes(new)
    rows = np.concatenate([test_set.rows for test_set in new.test_sets])
    group = pd.factorize(corpus.table["group"].array[rows])[0]
    tables = []
    for content, chosen in ((KNOWN, ~is_new), (NEW, is_new)):
        pairs = chosen[picture]
        queries = np.unique(text[pairs])
        hits_by_gallery = {
            key: _text_hits(texts[queries], queries, picture[pairs], text[pairs], len(rows))
            for key, (texts, _) in nearest.items()
        }
        groups = np.arange(len(queries))
        tables += _recall_rows(content, "text", hits_by_gallery, groups)
        queries, label = _picture_queries(picture, text, chosen & labelled)
        hits_by_gallery = {
            key: label[near[queries]] == label[queries, None] for key, (_, near) in nearest.items()
        }
        tables += _recall_rows(content, "picture", hits_by_gallery, group[queries])
    return pd.DataFrame(tables)


def _pairs(corpus: Corpus, features: EncodedSets) -> tuple[np.ndarray, np.ndarray]:
    """Return each pair of an image and a text of it, as positions among the features."""
    place = {text: index for index, text in enumerate(features.texts)}
    pictures, texts, first = [], [], 0
    for test_set in features.test_sets:
        own = np.array([place[text] for text in test_set.texts])
        if test_set.owner is None:
            labels = pd.Index(corpus.classes[test_set.dataset.name])
            own = own[labels.get_indexer(corpus.table["label"].iloc[test_set.rows].astype(str))]
            pictures.append(first + np.arange(len(test_set.rows)))
        else:
            pictures.append(first + test_set.owner)
        texts.append(own)
        first += len(test_set.rows)
    return np.concatenate(pictures), np.concatenate(texts)


def _of_classes(features: EncodedSets) -> np.ndarray:
    """Return whether each image is of a set with classes."""
    sets = features.test_sets
    return np.repeat([x.owner is None for x in sets], [len(x.rows) for x in sets])


def _neighbours(queries: Tensor, gallery: Tensor, skip_self: bool = False) -> np.ndarray:
    """Return the positions of the nearest entries of a gallery, [queries, the largest k]."""
    return evaluation.nearest(queries, gallery, max(RECALL_AT), skip_self).cpu().numpy()


def _text_hits(
    nearest: np.ndarray, queries: np.ndarray, picture: np.ndarray, text: np.ndarray, count: int
) -> np.ndarray:
    """Return whether each of the nearest images belongs to its text, [texts, k]."""
    return np.isin(queries[:, None] * count + nearest, text * count + picture)


def _picture_queries(
    picture: np.ndarray, text: np.ndarray, chosen: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the images whose class has another one in the same part of the index, and a number
    per image that those of one class and part share."""
    label = np.full(len(chosen), -1)
    label[picture] = text  # one per image: captions, of which there may be several, are no queries
    label[~chosen] = -1 - np.arange(len(chosen))[~chosen]  # equal to no other
    counts = pd.Series(label).map(pd.Series(label).value_counts()).to_numpy()
    return np.flatnonzero(chosen & (counts > 1)), label


def _recall_rows(
    content: str, query: str, nearest: dict[str, np.ndarray], group: np.ndarray
) -> list[dict[str, object]]:
    """Return a row of `measure_index` for each k, or none without queries.

    Args:
        content: "known" or "new".
        query: "text" or "picture".
        nearest: By column, whether each of a query's nearest entries is right, bool [queries, k].
        group: The group of each query.
    """
    rows: list[dict[str, object]] = []
    for k in RECALL_AT if len(group) else ():
        hits = {key: near[:, :k].any(1).astype(float) for key, near in nearest.items()}
        row = {"content": content, "query": query, "k": k, "queries": len(group)}
        row |= {key: 100 * hits[key].mean() if key in hits else np.nan for key in GALLERIES}
        ends = (np.nan,) * 3
        if "as_is" in hits:
            even, one = np.full(len(group), 1 / len(group)), np.zeros(len(group), int)
            ends = mean_interval(hits["reencoded"] - hits["as_is"], even, one, group)
        ends = {key: 100 * end for key, end in zip(("loses", "low", "high"), ends, strict=True)}
        rows.append(row | ends)
    return rows
