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

from cmp import evaluation, mixtures, streams
from cmp.config import Mixture, RunConfig
from cmp.data import POOL_DATA_ROLES, Corpus
from cmp.errors import CmpError
from cmp.mixtures import replay_pool
from cmp.seeds import numpy_generator

CLUSTERS = 64
PRECISION = "fp32"


def measure_classes(
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
        found = _image_decisions(
            image, text, target.to(image.device), model.logit_scale.exp().item()
        )
        found["entry"] = streams.class_names(corpus, rows)
        table = found.groupby("entry").mean().reindex([f"{dataset}+++{each}" for each in labels])
        table["year"] = np.nan if about.year is None else float(about.year)
        table["embedding"] = [each.cpu().numpy() for each in text]
        tables.append(table.assign(label=labels))
    table = pd.concat(tables).sort_index().rename_axis("entry").reset_index()
    counts = counts or class_frequencies(table["label"], pool_captions(corpus))
    if lacking := [label for label in table["label"] if label not in counts]:
        raise CmpError(f"counts: none of {lacking[0]!r}; every class needs one, 0 at least")
    return table.assign(frequency=table.pop("label").map(counts).astype(int))


def _image_decisions(
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


def class_frequencies(labels: pd.Series, texts: list[str]) -> dict[str, int]:
    """How many of the texts name each class: its words in a row, upper or lower case."""
    words = [f" {' '.join(re.findall(r'[a-z0-9]+', text.lower()))} " for text in texts]
    every = "\n".join(words)
    asked = {label: " ".join(re.findall(r"[a-z0-9]+", label.lower())) for label in set(labels)}
    return {label: len(re.findall(f"^.* {name} ", every, re.M)) for label, name in asked.items()}


def measure_pool(model: nn.Module, name: str, corpus: Corpus) -> pd.DataFrame:
    """A row a training image of the pools: its `dataset` and `place` in it; `alignment`, mean
    cosine between it and its captions; `cluster`, of its features among those of its role.
    """
    tables = []
    for role in POOL_DATA_ROLES:
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
        table = pd.DataFrame(found).assign(cluster=cluster_features(image.cpu().numpy()))
        table["place"] = table.groupby("dataset").cumcount()
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def cluster_features(features: np.ndarray) -> np.ndarray:
    """k-means of features [N, E] into at most `CLUSTERS` groups: the group of each, [N]."""
    rng = numpy_generator("clusters", 0)
    count = min(CLUSTERS, len(features))
    return kmeans2(features.astype(np.float64), count, iter=50, minit="++", rng=rng)[1]


BATCH_PARTS = ("pretraining pool", "update", "buffer")
"""The parts of a batch, P, D and B."""


def sample_counts(config: RunConfig, corpus: Corpus) -> np.ndarray:
    """How often each task shows each image of the corpus, [tasks, images], in its very batches."""
    mixture, seed, training = config.mixture, config.seeds.data, config.training
    found = np.zeros((config.stream.tasks, len(corpus.table)), np.int64)
    for task, pools in enumerate(mixtures.task_pools(config, corpus)):
        for step in range(training.steps):
            rows = mixtures.batch_rows(pools, mixture, training.batch, seed, task, step)
            np.add.at(found[task], rows, 1)
    return found


def stream_report(config: RunConfig, corpus: Corpus) -> pd.DataFrame:
    """A row a task (index `task`, from 1): `classes`, `datasets` and `images` that arrive, `buffer`
    (images in it) and `passes` (how often the task goes over its own images)."""
    rows = []
    blocks = streams.task_classes(corpus, config.stream, config.seeds.stream)
    pools = mixtures.task_pools(config, corpus)
    for block, pool in zip(blocks, pools, strict=True):
        update = mixtures.batch_counts(
            config.mixture, config.training.batch, len(pool.buffer) == 0
        )[1]
        passes = config.training.steps * update / max(len(pool.update), 1)
        datasets = len({entry.partition("+++")[0] for entry in block})
        rows.append((len(block), datasets, len(pool.update), len(pool.buffer), passes))
    index = pd.RangeIndex(1, len(rows) + 1, name="task")
    return pd.DataFrame(rows, index, ["classes", "datasets", "images", "buffer", "passes"])


def distance_to_union(config: RunConfig, corpus: Corpus) -> np.ndarray:
    """How far each task's batches are from independent draws from all data, [tasks], 0 to 1.

    The total variation distance between the classes of the samples that a task shows and those of
    the union of the kept pool and of every update, each image once.
    """
    labels = pd.factorize(streams.class_names(corpus, np.arange(len(corpus.table))))[0]
    kept = replay_pool(corpus, config.mixture, config.seeds.data)
    updates = streams.task_rows(corpus, config.stream, config.seeds.stream)
    union = np.concatenate([kept, *updates])
    wanted = np.bincount(labels[union], minlength=labels.max() + 1) / len(union)
    shown = np.stack([np.bincount(labels, each) for each in sample_counts(config, corpus)])
    return np.abs(shown / shown.sum(axis=1, keepdims=True) - wanted).sum(axis=1) / 2


def expected_counts(
    mixture: Mixture, batch: int, tasks: int, steps: int, pool_size: float, task_size: float
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What a batch is made of, and how often an image is seen over the stream, on average.

    pool_size: images of the pool that are kept for replay; task_size: images that arrive in each
    task. The buffer of a task holds all earlier tasks' images, drawn uniformly. Returns (parts,
    passes) as `plot_inputs.batch_mixture` takes them; `passes` has another column, `images`: what
    is seen times how many there are adds up to batch * steps * tasks.
    """
    if min(pool_size, task_size) <= 0:
        raise CmpError(f"exposures: sizes must be positive, not {pool_size} and {task_size}")
    first, later = (mixtures.batch_counts(mixture, batch, empty) for empty in (True, False))
    each = pd.DataFrame([first] + [later] * (tasks - 1), columns=list(BATCH_PARTS))
    # what a task's buffer part adds to each earlier image, summed over the tasks that follow
    replay = [0.0] + [steps * later[2] / (task_size * earlier) for earlier in range(1, tasks)]
    passes = pd.DataFrame(
        {
            "pretraining pool": [steps * each["pretraining pool"].sum() / pool_size]
            + [0.0] * tasks,
            "update": [0.0, *steps * each["update"] / task_size],
            "buffer": [0.0, *[sum(replay[task:]) for task in range(1, tasks + 1)]],
            "images": [pool_size] + [task_size] * tasks,
        },
        index=pd.RangeIndex(tasks + 1, name="arrives"),
    )
    names = ["first task", "later tasks"][: min(tasks, 2)]
    return each.iloc[: len(names)].set_axis(names), passes
