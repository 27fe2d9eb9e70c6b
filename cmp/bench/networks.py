"""Build what benchmarks train: a model and real batches.

`bench-nano`, `bench-micro` and `bench-mid` are plain vision transformers used only here. Importing
this module registers them with open_clip.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import open_clip
from torch import Tensor
from torch.nn import functional as F

from cmp import config, mixtures, models, starts
from cmp.config import RunConfig
from cmp.data import Batch, Corpus
from cmp.errors import CmpError
from cmp.mixtures import Pools
from cmp.training import TrainState

CONFIGS = Path(__file__).resolve().parent / "model_configs"
open_clip.add_model_config(CONFIGS)

BENCH = tuple(sorted(path.stem for path in CONFIGS.glob("*.json")))
LARGE = "ViT-B-16"
"""A real model, which needs a GPU."""
MODELS = (*starts.family_names(), *BENCH, LARGE)
SIZES = {"bench-mid": 64, LARGE: 512}
"""Samples per step, if not `SIZE`."""
SIZE = 128
TASK = 1
"""The first task with a buffer, in which each pool gives a third of the batch."""


@dataclass(frozen=True)
class Setting:
    """A model and its training batches.

    Attributes:
        name: The model's name.
        config: The run's config.
        corpus: The run's data.
        pools: The pools that the task's batches draw from.
    """

    name: str
    config: RunConfig
    corpus: Corpus
    pools: Pools

    @property
    def side(self) -> int:
        """Pixels per side of the images that the model takes."""
        return open_clip.get_model_config(self.name)["vision_cfg"]["image_size"]

    def batches(self) -> Iterator[Batch]:
        """Yield the batches of the task endlessly, with images enlarged to the model's size."""
        for step in itertools.count():
            batch = mixtures.make_batch(self.config, self.corpus, self.pools, TASK, step)
            yield batch._replace(images=enlarge(batch.images, self.side))

    def tokens(self) -> Tensor:
        """Return the tokens of all captions, [texts, L]."""
        return models.tokenizer(self.name)(self.corpus.texts)

    def distinct_captions(self) -> float:
        """Return the mean number of distinct captions in a batch, over eight batches."""
        counts = [len(batch.texts.unique()) for batch in itertools.islice(self.batches(), 8)]
        return sum(counts) / len(counts)


def enlarge(x: Tensor, side: int) -> Tensor:
    """Resize uint8 images [B, 4, H, W] to [B, 4, side, side] unless they have that size."""
    return x if x.shape[-1] == side else F.interpolate(x, size=(side, side))


def setting(name: str, corpus: Corpus, batch: int | None, steps: int = 1) -> Setting:
    """Return a model's setting, with batches of the `cpu` profile and a third from each pool.

    Args:
        name: One of `MODELS`. For the large one, the whole pool is replayed, to fill its batch.
        corpus: The data.
        batch: Samples per batch; if None, the value in `SIZES`.
        steps: Steps per task.

    Raises:
        CmpError: The model is unknown.
    """
    if name not in MODELS:
        raise CmpError(
            f"--model: {name!r} is not a benchmark model; choose from {', '.join(MODELS)}"
        )
    size = batch or SIZES.get(name, SIZE)
    settings = [f"model.name={name}", f"training.batch={size}", f"training.steps={steps}"]
    if name == LARGE:
        settings.append("mixture.replay=1.0")
    run_config = config.parse(config.override(config.profile("cpu"), settings), "benchmark")
    return Setting(name, run_config, corpus, mixtures.task_pools(run_config, corpus)[TASK])


def train_state(setting: Setting, precision: str) -> TrainState:
    """Return a network with random weights and its run, as a state for `training.train_task`.

    `training.make_train_state` would refuse a network whose images are larger than the data's.

    Args:
        setting: The model and its run.
        precision: The precision of products, "fp32" or "bf16".
    """
    training = dataclasses.replace(setting.config.training, precision=precision)
    run_config = dataclasses.replace(setting.config, training=training)
    model = models.split_attention(models.create_fused_model(setting.name))
    return TrainState(run_config, setting.corpus, model, setting.tokens())
