"""The losses that models are pretrained with, on unit features of images and texts."""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cmp.models import Network


def model_loss(model: Network, image: Tensor, text: Tensor) -> Tensor:
    """Return the loss that a network was pretrained with, on unit features [B, E]."""
    if uses_sigmoid_loss(model):
        return sigmoid_loss(image, text, model.logit_scale, cast(Tensor, model.logit_bias))
    return contrastive_loss(image, text, model.logit_scale)


def contrastive_loss(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """Return the symmetric InfoNCE loss of CLIP (Radford et al. 2021, Figure 3).

    Args:
        image: Unit image features, [B, E].
        text: Unit text features of the same samples, [B, E].
        logit_scale: Log of the inverse temperature.
    """
    logits = logit_scale.exp() * image @ text.T  # [B, B]
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def sigmoid_loss(image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
    """Return SigLIP's loss, which treats every image-text pair separately (Zhai et al. 2023,
    section 3.2).

    Args:
        image: Unit image features, [B, E].
        text: Unit text features of the same samples, [B, E].
        logit_scale: Log of the inverse temperature.
        logit_bias: Added to every logit.
    """
    logits = logit_scale.exp() * image @ text.T + logit_bias  # [B, B]
    sign = 2 * torch.eye(len(logits), device=logits.device) - 1
    return -F.logsigmoid(sign * logits).sum() / len(logits)


def uses_sigmoid_loss(model: nn.Module) -> bool:
    """Return whether a network uses `sigmoid_loss`: then it has a logit bias as well as a scale."""
    return getattr(model, "logit_bias", None) is not None
