"""How `data_manifests/traits/embedded-pool.parquet` was made: what a base measures of each pool."""

import numpy as np
import pandas as pd
from scipy.cluster.vq import kmeans2
from torch import nn

from cmp import evaluation
from cmp.config import POOL_DATA_ROLES
from cmp.data import Corpus
from cmp.readers.class_statistics import PRECISION
from cmp.seeds import numpy_generator

CLUSTERS = 64


def measure_pool(model: nn.Module, name: str, corpus: Corpus) -> pd.DataFrame:
    """Return what a model measures of every image of the pools.

    Args:
        model: The model.
        name: Its name, for its tokenizer.
        corpus: The data.

    Returns:
        A row per image: its `dataset` and `place` in it, `alignment` (mean cosine between it and
        its captions) and `cluster` of its features among those of its role.
    """
    tables = []
    for role in POOL_DATA_ROLES:
        rows = np.flatnonzero(corpus.table["dataset"].isin(corpus.by_role(role)))
        if not len(rows):
            continue
        image = evaluation.image_features(model, corpus, rows, PRECISION)
        spans = [slice(*corpus.caption_starts[row : row + 2]) for row in rows]
        ids = np.unique(np.concatenate([corpus.caption_ids[span] for span in spans]))
        texts = [corpus.texts[index] for index in ids]
        text = evaluation.text_features(model, name, texts, PRECISION)
        alignment = [
            (text[np.searchsorted(ids, corpus.caption_ids[span])] @ own).mean().item()
            for span, own in zip(spans, image, strict=True)
        ]
        datasets = corpus.table["dataset"].iloc[rows].astype(str)
        table = pd.DataFrame({"dataset": datasets, "alignment": alignment})
        table["cluster"] = cluster_features(image.cpu().numpy())
        table["place"] = table.groupby("dataset").cumcount()
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def cluster_features(features: np.ndarray) -> np.ndarray:
    """Return the k-means cluster [N] of features [N, E], of at most `CLUSTERS`."""
    count, rng = min(CLUSTERS, len(features)), numpy_generator("clusters", 0)
    return kmeans2(features.astype(np.float64), count, iter=50, minit="++", rng=rng)[1]
