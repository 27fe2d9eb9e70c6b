"""A run: tasks in order, evaluated after each. Pretraining and joint training are runs too."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from torch import Tensor, nn

from cmp import evaluation, mixtures, models, streams, training
from cmp.config import Mixture, RunConfig
from cmp.data.corpus import Corpus
from cmp.errors import CmpError
from cmp.mixtures import Pools


@dataclass(frozen=True)
class Observer:
    """What is told of a run's progress; every hook may be left out.

    step: (task, step, loss, model) after each step; the model must not be changed. task: (number of
    tasks done, scores) after each evaluation, with 0 for the one before the stream.
    """

    step: Callable[[int, int, Tensor, nn.Module], None] = lambda task, step, loss, model: None
    task: Callable[[int, evaluation.Scores], None] = lambda done, scores: None


SILENT = Observer()


@dataclass(frozen=True)
class Result:
    """metrics: a row a (task, dataset): tasks done, `scope` ("subset" or "full"), and the columns
    of `evaluation.Scores.datasets`; model: the network after the last task."""

    metrics: pd.DataFrame
    model: nn.Module


def task_pools(config: RunConfig, corpus: Corpus) -> list[Pools]:
    """What each task may draw from; `CmpError` if a batch would take a sample of a pool twice."""
    train = corpus.rows("train")
    in_pool = corpus.table["dataset"].iloc[train].isin(corpus.by_role("pool")).to_numpy()
    mixture = config.mixture
    replay = mixtures.replay_pool(train[in_pool], mixture.replay, config.seeds.data)
    if mixture.update + mixture.buffer == 0:
        updates = [train[:0]] * config.stream.tasks
    else:
        updates = streams.task_rows(corpus, config.stream, config.seeds.stream)
    pools = [
        Pools(replay, update, np.sort(np.concatenate([train[:0], *updates[:task]])))
        for task, update in enumerate(updates)
    ]
    batch = config.training.batch
    largest = min(mixtures.largest_batch(each, mixture, batch) for each in pools)
    if largest < batch:
        raise CmpError(
            f"training.batch: {batch} takes more samples of a pool than it holds; the largest that "
            f"fits this stream and mixture is {largest}"
        )
    return pools


def joint(config: RunConfig) -> RunConfig:
    """The upper bound of a run: all its classes in one task of as many steps, one schedule."""
    steps = config.stream.tasks * config.training.steps
    return dataclasses.replace(
        config,
        stream=dataclasses.replace(config.stream, tasks=1),
        mixture=Mixture(1 / 3, 2 / 3, 0.0, config.mixture.replay),
        training=dataclasses.replace(config.training, steps=steps),
    )


def run(
    config: RunConfig,
    corpus: Corpus,
    observer: Observer = SILENT,
    model: nn.Module | None = None,
    device: str = "cpu",
) -> Result:
    """Take a model through the stream of `config`.

    model: starting weights, trained in place; those that `config.model` names where left out.
    device: where the network lives, "cpu" or "cuda"; it decides no more than the last bits.
    """
    pools = task_pools(config, corpus)
    model = (model or models.load(config.model, config.seeds.init)).to(device)
    tokens = models.tokenizer(config.model.name)(corpus.texts)
    metrics: list[pd.DataFrame] = []

    def evaluate(done: int) -> None:
        sizes = [config.evaluation.subset]
        if config.evaluation.full and done in (0, len(pools)) and sizes != [None]:
            sizes.append(None)
        for size in sizes:
            scores = evaluation.evaluate(
                model, config.model.name, corpus, subset=size, precision=config.training.precision
            )
            scope = "full" if size is None else "subset"
            metrics.append(scores.datasets.reset_index().assign(task=done, scope=scope))
        observer.task(done, scores)

    evaluate(0)
    for task, pool in enumerate(pools):
        training.train_task(
            model, config, corpus, tokens, pool, task,
            lambda step, loss, task=task: observer.step(task, step, loss, model),
        )  # fmt: skip
        evaluate(task + 1)
    return Result(pd.concat(metrics, ignore_index=True), model)
