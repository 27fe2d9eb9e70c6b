"""Train on batches in parts: micro-batches, or parts in several processes.

A contrastive loss compares every sample with every other, so it is not a sum over parts of a batch.
But it depends on the weights only through the features (GradCache, Gao et al. 2021). So first the
features of all parts are computed without a graph, then the loss and its gradient with respect to
the features, and then each part again, with a backward pass from that gradient.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from cmp.data import Batch
from cmp.errors import CmpError
from cmp.models import Network, is_random
from cmp.scale import processes
from cmp.training import Features, TrainState, encode_batch

FeaturePair = tuple[Tensor, Tensor]
"""The features of images and of texts."""


@dataclass(frozen=True)
class DetachedFeatures(Features):
    """The features of a whole batch, detached from the graphs of its parts.

    Attributes:
        image: Unit image features of all processes, [B, E].
        text: Unit text features of all processes, [B, E].
        model: The network.
        parts: The samples of each part in this process.
        encode: Computes the features of a part.
        whole: The features of the only part, with their graph; None if there are several parts.
    """

    model: Network
    parts: list[slice]
    encode: Callable[[slice], FeaturePair]
    whole: FeaturePair | None

    def finish_backward(self) -> None:
        """Backpropagate the gradients of the features through each part, and sum the gradients of
        the weights over all processes."""
        is_first = processes.rank() == 0
        if not is_first:  # gradients that do not go through features count once over all processes
            self.model.zero_grad(set_to_none=False)
        for rows in self.parts:
            towers = self.whole or self.encode(rows)
            gradients = [cast(Tensor, x.grad)[rows] for x in (self.image, self.text)]
            trained = [
                pair for pair in zip(towers, gradients, strict=True) if pair[0].requires_grad
            ]
            parameters = self.model.parameters() if rows is self.parts[-1] else ()
            with processes.all_reduce_gradients(parameters):
                if trained:  # both towers may be frozen
                    torch.autograd.backward([x for x, _ in trained], [x for _, x in trained])


def encode_in_parts(
    state: TrainState, batch: Batch, task: int, step: int, own: slice, size: int
) -> DetachedFeatures:
    """Return the features of a batch, computed part by part.

    Args:
        state: The network and its run.
        batch: All samples, with the images of this process's own.
        task: The task's number, from 0.
        step: The step within the task, from 0.
        own: This process's samples.
        size: Samples per part.
    """
    starts = range(own.start, own.stop, size)
    parts = [slice(start, min(start + size, own.stop)) for start in starts]

    def encode(rows: slice) -> FeaturePair:
        """Return the features of a part, augmented as in the whole batch."""
        images = batch.images[rows.start - own.start : rows.stop - own.start]
        part = Batch(batch.rows[rows], images, batch.texts[rows])
        output = encode_batch(state, part, task, step, (rows.start, len(batch.rows)))
        return output.image, output.text

    with torch.set_grad_enabled(len(parts) == 1):
        outputs = [encode(rows) for rows in parts]
    image, text = (
        processes.all_gather(torch.cat(tower).detach(), len(batch.rows)).requires_grad_()
        for tower in zip(*outputs, strict=True)
    )
    whole = outputs[0] if len(parts) == 1 else None
    return DetachedFeatures(image, text, state.model, parts, encode, whole)


def check_divisible(model: nn.Module, name: str) -> None:
    """Check that a network processes each sample independently of its batch.

    Raises:
        CmpError: A layer normalises over the batch or is random.
    """
    for where, layer in model.named_modules():
        if is_random(layer) or isinstance(layer, nn.modules.batchnorm._BatchNorm):
            what = "is random in training" if is_random(layer) else "normalises over the batch"
            raise CmpError(
                f"model.name: {where} of {name!r} is a {type(layer).__name__}, which {what}, so "
                "splitting a batch changes the result; leave out --micro-batch and use one process"
            )
