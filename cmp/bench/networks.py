"""Build what benchmarks train: a model, real batches, and the pieces of the fast path.

`bench-nano`, `bench-micro` and `bench-mid` are plain vision transformers used only here. Importing
this module registers them with open_clip.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import open_clip
import torch
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from cmp import config, mixtures, models, starts
from cmp.arithmetic import autocast
from cmp.bench import compact
from cmp.config import RunConfig
from cmp.data import Batch, Corpus, augment, normalise
from cmp.errors import CmpError
from cmp.losses import contrastive_loss
from cmp.mixtures import Pools
from cmp.seeds import torch_generator
from cmp.training import TrainState, build_adamw

CONFIGS = Path(__file__).resolve().parent / "model_configs"
open_clip.add_model_config(CONFIGS)

BENCH = tuple(sorted(path.stem for path in CONFIGS.glob("*.json")))
LARGE = "ViT-B-16"
"""A real model, which needs a GPU."""
MODELS = (*starts.family_names(), *BENCH, LARGE)
SIZES = {"bench-mid": 64, LARGE: 512}
"""Samples per step, if not `SIZE`."""
SIZE = 128
FULL_VOCABULARY = 49408
TASK = 1
"""The first task with a buffer, in which each pool gives a third of the batch."""
RATE = 1e-4


@dataclass(frozen=True)
class Pieces:
    """The pieces of the fast path that a step uses; without any, it is plain open_clip.

    Attributes:
        compact: Only the used vocabulary.
        split: Attention as two plain products.
        paired: Two texts per row, which needs split attention.
        distinct: Each caption is encoded once.
        fused: A single call for all of AdamW.
        bf16: Products in bfloat16.
    """

    compact: bool = False
    split: bool = False
    paired: bool = False
    distinct: bool = False
    fused: bool = False
    bf16: bool = False

    @property
    def precision(self) -> str:
        """The precision, as an argument of `cmp.arithmetic.autocast`."""
        return "bf16" if self.bf16 else "fp32"


PLAIN = Pieces()
FP32 = Pieces(compact=True, split=True, paired=True, distinct=True, fused=True)
BF16 = dataclasses.replace(FP32, bf16=True)


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

    def distinct_captions(self) -> float:
        """Return the mean number of distinct captions in a batch, over eight batches."""
        counts = [len(batch.texts.unique()) for batch in itertools.islice(self.batches(), 8)]
        return sum(counts) / len(counts)


def enlarge(x: Tensor, side: int) -> Tensor:
    """Resize uint8 images [B, 4, H, W] to [B, 4, side, side] unless they have that size."""
    return x if x.shape[-1] == side else F.interpolate(x, size=(side, side))


def setting(name: str, corpus: Corpus, batch: int | None = None, steps: int = 1) -> Setting:
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


def network(setting: Setting, pieces: Pieces) -> tuple[nn.Module, Tensor]:
    """Return a model with random weights, and the tokens of all captions [texts, L].

    Without the compact vocabulary, a model has all rows of CLIP's vocabulary and uses its tokens.
    """
    model = models.create_fused_model(setting.name)
    tokens = models.tokenizer(setting.name)(setting.corpus.texts)
    if setting.name in starts.family_names() and not pieces.compact:
        width = model.token_embedding.embedding_dim
        model.token_embedding = nn.Embedding(FULL_VOCABULARY, width)
        tokens = SimpleTokenizer(context_length=model.context_length)(setting.corpus.texts)
    elif setting.name not in starts.family_names() and pieces.compact:
        used = compact.used_ids(tokens)
        model, tokens = compact.shrink(model, used), compact.to_compact(tokens, used)
    return models.split_attention(model) if pieces.split else model, tokens


def train_state(setting: Setting, pieces: Pieces) -> TrainState:
    """Return the model of `network` as a state for `training.train_task`."""
    return TrainState(setting.config, setting.corpus, *network(setting, pieces))


def loss_of(
    model: nn.Module,
    batch: Batch,
    tokens: Tensor,
    generator: torch.Generator,
    pieces: Pieces,
) -> Tensor:
    """Return the loss of a batch, computed with the given pieces; all give the same value.

    Args:
        model: The network.
        batch: The batch.
        tokens: Tokens of all captions, [texts, L].
        generator: The randomness of the augmentation.
        pieces: The pieces of the fast path.
    """
    x = augment(batch.images, generator)
    x = normalise(x, model.visual.image_mean, model.visual.image_std)
    if pieces.distinct:
        texts, place = batch.texts.unique(return_inverse=True)
        with autocast(pieces.precision, x.device):
            image, text = models.encode_image(model, x), models.encode_text(model, tokens[texts])
        return contrastive_loss(image, text[place], model.logit_scale)
    if pieces.paired:
        image, text = models.encode_image(model, x), models.encode_text(model, tokens[batch.texts])
        return contrastive_loss(image, text, model.logit_scale)
    output = model(x, tokens[batch.texts])
    return open_clip.ClipLoss()(
        output["image_features"], output["text_features"], output["logit_scale"]
    )


def stepper(setting: Setting, pieces: Pieces) -> Callable[[], None]:
    """Return a function that takes the next training step.

    A step makes and augments a batch, computes its loss and gradients, clips them, takes a step of
    AdamW, and clamps the logit scale.

    Args:
        setting: The model and its batches.
        pieces: The pieces of the fast path.
    """
    model, tokens = network(setting, pieces)
    model.train()
    parameters = list(model.parameters())
    if pieces.fused:
        optimizer = build_adamw(model, setting.config.optimizer)
    else:
        optimizer = torch.optim.AdamW(parameters)
    for group in optimizer.param_groups:
        group["lr"] = RATE
    numbered = enumerate(setting.batches())

    def step() -> None:
        number, batch = next(numbered)
        generator = torch_generator("augment", 0, TASK, number)
        loss = loss_of(model, batch, tokens, generator, pieces)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, setting.config.optimizer.clip)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, models.MAX_LOGIT_SCALE)

    return step


def step_flops(setting: Setting, pieces: Pieces) -> int:
    """Return the FLOPs of a step's products and convolutions, forward and backward.

    Attention is always counted as split, since torch's counter misses fused attention on a CPU.
    """
    pieces = dataclasses.replace(pieces, split=True, bf16=False)
    model, tokens = network(setting, pieces)
    generator = torch_generator("augment", 0, TASK, 0)
    with FlopCounterMode(display=False) as counter:
        loss_of(model, next(setting.batches()), tokens, generator, pieces).backward()
    return counter.get_total_flops()
