"""Measure class statistics with a base, describe the stream of a run, and read files of streams.

The same base is used for all replicates, so an order depends only on the stream's seed.
"""

import collections
import re
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cmp import budgets, evaluation, mixtures, streams
from cmp.config import RunConfig
from cmp.data import Corpus
from cmp.errors import CmpError, explain_errors
from cmp.files import listed_file
from cmp.parsing import read_json
from cmp.readers import class_tables
from cmp.readers.manifest import STATISTICS

PRECISION = "fp32"


def measure_classes(
    model: nn.Module, name: str, corpus: Corpus, counts: dict[str, int] | None = None
) -> pd.DataFrame:
    """Return statistics of every class of the adaptation datasets, measured with a model.

    Args:
        model: The model.
        name: Its name, for its tokenizer.
        corpus: The data; statistics are of training images.
        counts: How many texts of a text corpus name each class; if None, counted in the pool's
            captions.

    Returns:
        One row per class, sorted by `entry`: zero-shot `accuracy` in percent, `loss` (mean
        cross-entropy among the classes of its dataset, in nats), `alignment` (mean cosine between
        image and prompt), `frequency`, `year` of its dataset (NaN if unknown), and `embedding` of
        its prompt, with unit length.

    Raises:
        CmpError: No dataset is adapted to, or names cannot be counted: `counts` lacks a class, or
            there is neither a pool nor `counts`.
    """
    if not corpus.by_role("adapt"):
        raise CmpError("no dataset has the role adapt, whose classes form a stream; add one")
    if counts is None and not corpus.by_role("pool"):
        raise CmpError("counts: there is no pool to count names in; give them in a file (--counts)")
    tables = []
    for dataset in corpus.by_role("adapt"):
        labels, info = corpus.classes[dataset], corpus.datasets[dataset]
        rows = corpus.rows("train", dataset=dataset)
        target = torch.tensor(pd.Index(labels).get_indexer(corpus.table["label"].iloc[rows]))
        image = evaluation.image_features(model, corpus, rows, PRECISION)
        prompts = [info.prompt.format(label) for label in labels]
        text = evaluation.text_features(model, name, prompts, PRECISION)
        scale = model.logit_scale.exp().item()
        decisions = _image_decisions(image, text, target.to(image.device), scale)
        decisions["entry"] = streams.class_names(corpus, rows)
        means = decisions.groupby("entry").mean()
        table = means.reindex([f"{dataset}+++{label}" for label in labels])
        table["year"] = np.nan if info.year is None else float(info.year)
        table["embedding"] = list(text.cpu().numpy())
        tables.append(table.assign(label=labels))
    table = pd.concat(tables).sort_index().rename_axis("entry").reset_index()
    if counts is None:
        rows = [corpus.rows("train", dataset=name) for name in corpus.by_role("pool")]
        captions = [text for row in np.concatenate(rows) for text in corpus.captions(row)]
        counts = class_frequencies(table["label"], captions)
    if missing := [label for label in table["label"] if label not in counts]:
        raise CmpError(f"counts: no count of {missing[0]!r}; give one for every class, possibly 0")
    return table.assign(frequency=table.pop("label").map(counts).astype(int))


def _image_decisions(image: Tensor, text: Tensor, target: Tensor, scale: float) -> pd.DataFrame:
    """Return `accuracy`, `loss` and `alignment` of images [N, E] with classes `target` [N] among
    texts [C, E].
    """
    cosine = image @ text.T  # [N, C]
    columns = {
        "accuracy": (cosine.argmax(dim=1) == target).float() * 100,
        "loss": F.cross_entropy(scale * cosine, target, reduction="none"),
        "alignment": cosine.gather(1, target[:, None]).squeeze(1),
    }
    return pd.DataFrame({key: x.detach().cpu().double().numpy() for key, x in columns.items()})


def class_frequencies(labels: pd.Series, texts: list[str]) -> dict[str, int]:
    """Return how many texts contain the name of each class, ignoring case.

    Raises:
        CmpError: A name has no letters a to z or digits, which are what is compared.
    """
    if wordless := [label for label in labels if not _words(label)]:
        raise CmpError(
            f"counts: {wordless[0]!r:.80} has no letters a to z or digits, so texts that name it "
            "cannot be counted; give the number of texts for every class in a file with --counts"
        )
    lines = "\n".join(f" {_words(text)} " for text in texts)
    patterns = {label: f"^.* {_words(label)} " for label in set(labels)}
    return {label: len(re.findall(pattern, lines, re.M)) for label, pattern in patterns.items()}


def _words(text: str) -> str:
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


def stream_report(config: RunConfig, corpus: Corpus) -> pd.DataFrame:
    """Return a summary of what arrives in each task of a run.

    Returns:
        One row per task, from 1: `classes`, `datasets` and `images` that arrive, `buffer` (images
        in it) and `passes` (how often the task goes over its own images).
    """
    rows, config = [], budgets.settle(config, corpus)
    blocks = streams.task_classes(corpus, config.stream, config.seeds.stream)
    pools_of = mixtures.task_pools(config, corpus)
    for task, (block, pools) in enumerate(zip(blocks, pools_of, strict=True)):
        passes = config.steps[task] * pools.counts[1] / max(len(pools.update), 1)
        datasets = len({entry.partition("+++")[0] for entry in block})
        rows.append((len(block), datasets, len(pools.update), len(pools.buffer), passes))
    index = pd.RangeIndex(1, len(rows) + 1, name="task")
    return pd.DataFrame(rows, index, ["classes", "datasets", "images", "buffer", "passes"])


def read_stream_file(path: Path) -> list[str]:
    """Return the classes in a stream file of the published reference, in order of arrival.

    Args:
        path: A JSON list of distinct "DATASET+++class" entries.

    Raises:
        CmpError: The file has another format; the message names the entry.
    """
    with explain_errors(f"{path}: cannot be read as a stream"):
        entries = read_json(path)
    if not isinstance(entries, list) or not entries:
        raise CmpError(f'{path}: must be a JSON list of "DATASET+++class", not {entries!r:.60}')
    first: dict[str, int] = {}
    for number, entry in enumerate(entries, start=1):
        parts = entry.split("+++") if isinstance(entry, str) else []
        if len(parts) != 2 or not all(parts):
            raise CmpError(f'{path}: entry {number}: {entry!r:.60} is not "DATASET+++class"')
        if first.setdefault(entry, number) != number:
            raise CmpError(f"{path}: entry {number}: {entry!r} is the same as entry {first[entry]}")
    return entries


def new_statistics_path(name: str) -> Path:
    """Return the path for a new table of class statistics.

    Raises:
        CmpError: The name is invalid, or belongs to a table of this package, which takes
            precedence.
    """
    path = class_tables.statistics_path(name)
    if path.parent == STATISTICS:
        raise CmpError(f"{name!r}: the package has a table with this name; choose another name")
    return path


def write_statistics(table: pd.DataFrame, name: str) -> Path:
    """Write a table of class statistics with its sha256 beside it, and return its path."""
    path = new_statistics_path(name)
    with listed_file(path) as partial:
        table.to_parquet(partial, index=False)
    return path


def class_counts(tasks: list[list[str]]) -> pd.DataFrame:
    """Return the number of classes per dataset (columns) and task (index `task`, from 1)."""
    rows = [collections.Counter(entry.split("+++")[0] for entry in task) for task in tasks]
    index = pd.RangeIndex(1, len(tasks) + 1, name="task")
    return pd.DataFrame(rows, index=index).fillna(0).astype(int)
