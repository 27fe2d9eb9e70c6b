"""Measuring traits: what a base finds of every class and of every image of the pools.

One base measures for all replicates, so that an order depends on the stream's seed alone.
"""

import re

import numpy as np
import pandas as pd
import torch
from scipy.cluster.vq import kmeans2
from torch import nn
from torch.nn import functional as F

from cmp import evaluation, streams
from cmp.data.corpus import Corpus
from cmp.data.manifest import POOLS
from cmp.errors import CmpError
from cmp.seeds import numpy_generator

CLUSTERS = 64
PRECISION = "fp32"


def classes(
    model: nn.Module, name: str, corpus: Corpus, counts: dict[str, int] | None = None
) -> pd.DataFrame:
    """A row a class of the adaptation datasets, sorted; of its training images:

    `accuracy`, zero-shot, in percent; `loss`, mean cross-entropy of the same decision among the
    classes of its dataset, in nats; `alignment`, mean cosine between image and prompt. Further
    `frequency`, see `frequencies` (counts: texts that name a class, by the class's own name, else
    by the pool's captions); `year` of its dataset, NaN if unknown; `embedding` of its prompt, unit
    length. name: the model's, for its tokenizer.
    """
    tables = []
    for dataset in corpus.by_role("adapt"):
        labels, about = corpus.classes[dataset], corpus.datasets[dataset]
        rows = corpus.rows("train", dataset=dataset)
        place = {label: number for number, label in enumerate(labels)}
        target = torch.tensor([place[each] for each in corpus.table["label"].iloc[rows]])
        image = evaluation.image_features(model, corpus, rows, PRECISION)
        prompts = [about.prompt.format(label) for label in labels]
        text = evaluation.text_features(model, name, prompts, PRECISION)
        found = _decisions(image, text, target.to(image.device), model.logit_scale.exp().item())
        found["entry"] = streams.names(corpus, rows)
        table = found.groupby("entry").mean().reindex([f"{dataset}+++{each}" for each in labels])
        table["year"] = np.nan if about.year is None else float(about.year)
        table["embedding"] = [each.cpu().numpy() for each in text]
        tables.append(table.assign(label=labels))
    table = pd.concat(tables).sort_index().rename_axis("entry").reset_index()
    counts = counts or frequencies(table["label"], pool_captions(corpus))
    if lacking := [label for label in table["label"] if label not in counts]:
        raise CmpError(f"counts: none of {lacking[0]!r}; every class needs one, 0 at least")
    return table.assign(frequency=table.pop("label").map(counts).astype(int))


def _decisions(
    image: torch.Tensor, text: torch.Tensor, target: torch.Tensor, scale: float
) -> pd.DataFrame:
    """`accuracy`, `loss` and `alignment` of each image. image: [N, E]; text: [classes, E]; target:
    [N], the number of its class."""
    cosine = image @ text.T
    own = cosine.gather(1, target[:, None]).squeeze(1)
    right = (cosine.argmax(dim=1) == target).float() * 100
    loss = F.cross_entropy(scale * cosine, target, reduction="none")
    columns = {"accuracy": right, "loss": loss, "alignment": own}
    return pd.DataFrame({key: x.detach().cpu().double().numpy() for key, x in columns.items()})


def pool_captions(corpus: Corpus) -> list[str]:
    """All captions of the pretraining pool, an image's each once."""
    rows = np.concatenate([corpus.rows("train", dataset=name) for name in corpus.by_role("pool")])
    return [caption for row in rows for caption in corpus.captions(row)]


def frequencies(labels: pd.Series, texts: list[str]) -> dict[str, int]:
    """How many of the texts name each class: its words in a row, upper or lower case."""
    words = [f" {' '.join(re.findall(r'[a-z0-9]+', text.lower()))} " for text in texts]
    every = "\n".join(words)
    asked = {label: " ".join(re.findall(r"[a-z0-9]+", label.lower())) for label in set(labels)}
    return {label: len(re.findall(f"^.* {name} ", every, re.M)) for label, name in asked.items()}


def pool(model: nn.Module, name: str, corpus: Corpus) -> pd.DataFrame:
    """A row a training image of the pools: its `dataset` and `place` in it; `alignment`, mean
    cosine between it and its captions; `cluster`, of its features among those of its role.
    """
    tables = []
    for role in POOLS:
        for_role = [corpus.rows("train", dataset=each) for each in corpus.by_role(role)]
        if not for_role:
            continue
        rows = np.concatenate(for_role)
        image = evaluation.image_features(model, corpus, rows, PRECISION)
        spans = [slice(*corpus.caption_starts[row : row + 2]) for row in rows]
        ids = np.unique(np.concatenate([corpus.caption_ids[span] for span in spans]))
        texts = [corpus.texts[index] for index in ids]
        text = evaluation.text_features(model, name, texts, PRECISION)
        mean = [
            (text[np.searchsorted(ids, corpus.caption_ids[span])] @ own).mean().item()
            for span, own in zip(spans, image, strict=True)
        ]
        found = {"dataset": corpus.table["dataset"].iloc[rows].astype(str), "alignment": mean}
        table = pd.DataFrame(found).assign(cluster=clusters(image.cpu().numpy()))
        table["place"] = table.groupby("dataset").cumcount()
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def clusters(features: np.ndarray) -> np.ndarray:
    """k-means of features [N, E] into at most `CLUSTERS` groups: the group of each, [N]."""
    rng = numpy_generator("clusters", 0)
    count = min(CLUSTERS, len(features))
    return kmeans2(features.astype(np.float64), count, iter=50, minit="++", rng=rng)[1]
