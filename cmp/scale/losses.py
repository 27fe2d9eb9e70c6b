"""Compute the loss of a batch in parts, each process for its own samples: with several processes,
or for a large batch in micro-batches.

The losses of `cmp.losses` need the logits of every image with every text, which take 4.3 GB in fp32
for a batch of 32,768. Here each process computes only the rows of its own images and of its own
texts, some columns at a time, and computes them again for the gradient. Processes exchange three
numbers per sample and no gradients of features, because a gradient needs no more than these numbers
and the features that all of them have.

Both losses have the form mean_i(r_i - l_ii), with logits l. For InfoNCE, r_i is the mean of the
logarithms of two sums of exponentials, over row i and column i; for SigLIP, it is the sum of
softplus(l_ij) over j.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from cmp.losses import uses_sigmoid_loss
from cmp.models import Network
from cmp.scale import processes

ENTRIES = 2**26
"""The most logits that a process computes at a time: 268 MB in fp32."""


def is_large(batch: int) -> bool:
    """Return whether the logits of a batch are too many to compute at once, or are shared between
    processes."""
    return processes.world_size() > 1 or batch**2 > ENTRIES


def shared_loss(model: Network, image: Tensor, text: Tensor, own: slice) -> Tensor:
    """Return the loss that a network was pretrained with, computed by all processes together.

    The loss, its gradient for the logit scale and bias, and its gradient for a process's own
    features equal those of `cmp.losses.model_loss` up to rounding. Gradients for the features of
    other processes are zero.

    Args:
        model: The network.
        image: Unit image features of the whole batch, [B, E].
        text: Unit text features of the whole batch, [B, E].
        own: This process's samples.
    """
    bias = model.logit_bias if uses_sigmoid_loss(model) else None
    return _SharedLoss.apply(image, text, model.logit_scale, bias, own)


class _SharedLoss(torch.autograd.Function):
    """`shared_loss`, with a backward pass that recomputes the logits."""

    @staticmethod
    def forward(
        ctx: Any, image: Tensor, text: Tensor, logit_scale: Tensor, bias: Tensor | None, own: slice
    ) -> Tensor:
        """Return the loss, which has the same bits in every process."""
        scale, shift = logit_scale.exp(), 0.0 if bias is None else bias
        reduce = torch.logsumexp if bias is None else _sum_of_softplus
        rows = _reduce(reduce, image[own], text, scale, shift)
        columns = _reduce(reduce, text[own], image, scale, shift)
        matches = scale * (image[own] * text[own]).sum(1) + shift
        statistics = torch.stack([rows, columns, matches], 1)
        statistics = processes.all_gather(statistics, len(image))  # [B, 3]
        ctx.save_for_backward(image, text, scale, bias, statistics)
        ctx.own = own
        rows, columns, matches = statistics.T
        rest = (rows + columns) / 2  # with a sigmoid, the sums over rows and over columns agree
        return (rest - matches).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the features, the logit scale and the bias."""
        image, text, scale, bias, statistics = ctx.saved_tensors
        own, count = ctx.own, len(image)
        shift = 0.0 if bias is None else bias
        rows, columns, matches = statistics.T
        towers, cosines = [], matches[own] - shift  # times the scale
        sums = -torch.stack([cosines, torch.ones_like(cosines)]).sum(1)
        pairs = ((image, text, rows, columns), (text, image, columns, rows))
        for number, (one, other, along, across) in enumerate(pairs):
            ours = torch.zeros_like(one[own])
            for part, logits in _logits(one[own], other, scale, shift):
                if bias is None:
                    weights = (logits - along[own, None]).exp() + (logits - across[part]).exp()
                    weights /= 2
                else:
                    weights = logits.sigmoid()
                ours += weights @ other[part]
                if number == 0:
                    sums += torch.stack([(weights * (logits - shift)).sum(), weights.sum()])
            gradient = torch.zeros_like(one)
            gradient[own] = (ours - other[own]) * (scale / count * gradients[0])
            towers.append(gradient)
        of_scale, of_bias = processes.all_gather(sums[None]).sum(0) / count * gradients[0]
        return (
            *towers,
            of_scale.view_as(scale),
            None if bias is None else of_bias.view_as(bias),
            None,
        )


def _logits(
    one: Tensor, other: Tensor, scale: Tensor, shift: Tensor | float
) -> Iterator[tuple[slice, Tensor]]:
    """Yield the logits of some features with all others, some columns at a time, and the
    columns."""
    size = max(1, ENTRIES // len(one))
    for start in range(0, len(other), size):
        part = slice(start, min(start + size, len(other)))
        yield part, scale * one @ other[part].T + shift


def _reduce(
    reduce: Any, one: Tensor, other: Tensor, scale: Tensor, shift: Tensor | float
) -> Tensor:
    """Return the logits of some features, each row reduced to a number, [n]."""
    parts = [reduce(logits, 1) for _, logits in _logits(one, other, scale, shift)]
    columns = torch.stack(parts, 1)
    return columns.logsumexp(1) if reduce is torch.logsumexp else columns.sum(1)


def _sum_of_softplus(logits: Tensor, axis: int) -> Tensor:
    return F.softplus(logits).sum(axis)
