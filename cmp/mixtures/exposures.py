"""How often samples are seen over a run: counted from its batches, or expected in the mean."""

import numpy as np
import pandas as pd

from cmp import mixtures, streams
from cmp.config import Mixture, RunConfig
from cmp.data.corpus import Corpus
from cmp.errors import CmpError
from cmp.mixtures.replay import replay_pool

PARTS = ("pretraining pool", "update", "buffer")
"""The parts of a batch, P, D and B."""


def counted(config: RunConfig, corpus: Corpus) -> np.ndarray:
    """How often each task shows each image of the corpus, [tasks, images], in its very batches."""
    mixture, seed, training = config.mixture, config.seeds.data, config.training
    found = np.zeros((config.stream.tasks, len(corpus.table)), np.int64)
    for task, pools in enumerate(mixtures.task_pools(config, corpus)):
        for step in range(training.steps):
            rows = mixtures.batch_rows(pools, mixture, training.batch, seed, task, step)
            np.add.at(found[task], rows, 1)
    return found


def report(config: RunConfig, corpus: Corpus) -> pd.DataFrame:
    """A row a task (index `task`, from 1): `classes`, `datasets` and `images` that arrive, `buffer`
    (images in it) and `passes` (how often the task goes over its own images)."""
    rows = []
    blocks = streams.blocks(corpus, config.stream, config.seeds.stream)
    pools = mixtures.task_pools(config, corpus)
    for block, pool in zip(blocks, pools, strict=True):
        update = mixtures.parts(config.mixture, config.training.batch, len(pool.buffer) == 0)[1]
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
    labels = pd.factorize(streams.names(corpus, np.arange(len(corpus.table))))[0]
    kept = replay_pool(corpus, config.mixture, config.seeds.data)
    updates = streams.task_rows(corpus, config.stream, config.seeds.stream)
    union = np.concatenate([kept, *updates])
    wanted = np.bincount(labels[union], minlength=labels.max() + 1) / len(union)
    shown = np.stack([np.bincount(labels, each) for each in counted(config, corpus)])
    return np.abs(shown / shown.sum(axis=1, keepdims=True) - wanted).sum(axis=1) / 2


def expected(
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
    first, later = (mixtures.parts(mixture, batch, empty) for empty in (True, False))
    each = pd.DataFrame([first] + [later] * (tasks - 1), columns=list(PARTS))
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
