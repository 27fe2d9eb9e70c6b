"""One step's arithmetic: what the network sees and makes of it, the loss, the optimizer."""

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cmp import models
from cmp.config import Optimizer
from cmp.mixtures import Batch
from cmp.steps import images

ADAMW = functools.partial(torch.optim.AdamW, fused=True)


@dataclass(frozen=True)
class Seen:
    """A batch as the network saw it, and what it made of it.

    pixels: [B, 3, H, W], augmented and normalised; tokens: [D, L] of the distinct captions, and
    place: [B], each sample's among them; image, text: unit features [B, E]. replayed: so many
    samples at the end are of the pretraining pool.
    """

    pixels: Tensor
    tokens: Tensor
    place: Tensor
    image: Tensor
    text: Tensor
    replayed: int = 0


def contrastive_loss(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """Symmetric InfoNCE over unit features [B, E] (spec 1.3)."""
    logits = logit_scale.exp() * image @ text.T
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def sigmoid_loss(image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
    """Every pair of an image and a text by itself, matching or not (SigLIP, Zhai et al. 2023); unit
    features [B, E]."""
    logits = logit_scale.exp() * image @ text.T + logit_bias
    sign = 2 * torch.eye(len(logits), device=logits.device) - 1
    return -F.logsigmoid(sign * logits).sum() / len(logits)


def is_sigmoid(model: nn.Module) -> bool:
    """Whether a network was made for `sigmoid_loss`: it then has a bias beside its logit scale."""
    return getattr(model, "logit_bias", None) is not None


def objective(model: nn.Module, image: Tensor, text: Tensor) -> Tensor:
    """The contrastive loss that a network was made for; unit features [B, E]."""
    if is_sigmoid(model):
        return sigmoid_loss(image, text, model.logit_scale, model.logit_bias)
    return contrastive_loss(image, text, model.logit_scale)


@torch.no_grad()
def bound_scale(model: nn.Module) -> None:
    """Keep the logit scale where CLIP has it, in place; a sigmoid's has no such bound."""
    if not is_sigmoid(model):
        model.logit_scale.clamp_(0, models.MAX_LOGIT_SCALE)


def make_optimizer(
    model: nn.Module, config: Optimizer, kind: Callable[..., torch.optim.Optimizer] = ADAMW
) -> torch.optim.Optimizer:
    """AdamW over what trains; it decays matrices only, not biases, norms, or the logit scale.

    kind: another optimizer of AdamW's arguments, for a method that has its own.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return kind(groups, lr=0.0, betas=(config.beta1, config.beta2), eps=config.eps)


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager:
    """The arithmetic of a forward pass: "bf16" by autocast, "fp32" as it is."""
    if device.type == "meta":  # has no arithmetic
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def see(
    model: nn.Module,
    batch: Batch,
    tokens: Tensor,
    generator: torch.Generator,
    precision: str,
    replayed: int = 0,
    of: tuple[int, int] | None = None,
) -> Seen:
    """A batch through both towers, images augmented.

    tokens: [texts, L], every caption of the corpus; each distinct one is encoded once and then
    gathered. generator: of the augmentation, on the CPU. precision: "bf16" or "fp32". of: as in
    `images.augmented`.
    """
    device = model.logit_scale.device
    x = images.augmented(batch.images.to(device, non_blocking=True), generator, of)
    x = images.normalise(x, model.visual.image_mean, model.visual.image_std)
    distinct, place = batch.texts.unique(return_inverse=True)
    distinct, place = tokens[distinct], place.to(device, non_blocking=True)
    with autocast(precision, device):
        image = models.encode_image(model, x)
        text = models.encode_text(model, distinct)[place]
    return Seen(x, distinct, place, image, text, replayed)


def features(
    model: nn.Module, batch: Batch, tokens: Tensor, generator: torch.Generator, precision: str
) -> tuple[Tensor, Tensor]:
    """Unit features of a batch's images, augmented, and of its captions, [B, E] each; see `see`."""
    seen = see(model, batch, tokens, generator, precision)
    return seen.image, seen.text
