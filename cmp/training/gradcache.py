"""The gradients of a batch too large to be seen at once (GradCache, Gao et al. 2021), or one that
several processes share.

A contrastive loss compares every sample with every other, so it does not fall into sums over parts.
But it depends on the weights through the features alone: features of all parts first, without what
a backward pass needs; then the loss and its gradient by the features; then each part again, with
that gradient sent back through it. Where a process has one part only, it is seen once.
"""

import torch
from torch import Tensor

from cmp import methods, steps
from cmp.methods import Learner
from cmp.mixtures import Batch, Pools
from cmp.seeds import torch_generator
from cmp.steps import distributed


def own(learner: Learner) -> slice:
    """What this process sees of a batch."""
    return distributed.mine(learner.config.training.batch)


def parts(learner: Learner) -> list[slice]:
    """The same, piece by piece."""
    start, stop = own(learner).start, own(learner).stop
    size = learner.execution.micro_batch or stop - start
    return [slice(first, min(first + size, stop)) for first in range(start, stop, size)]


def look(
    learner: Learner, batch: Batch, part: slice, task: int, step: int
) -> tuple[Tensor, Tensor]:
    """Unit features (image, text) of a part of a batch, augmented as in the whole."""
    config, start = learner.config, own(learner).start
    generator = torch_generator("augment", config.seeds.augment, task, step)
    images = batch.images[part.start - start : part.stop - start]  # they begin with this process's
    piece = Batch(batch.rows[part], images, batch.texts[part])
    seen = steps.see(
        learner.model, piece, learner.tokens, generator, config.training.precision,
        of=(part.start, len(batch.rows)),
    )  # fmt: skip
    return seen.image, seen.text


def backward(
    learner: Learner, pools: Pools, task: int, step: int
) -> tuple[Batch, dict[str, Tensor], Tensor]:
    """The batch at (task, step), the terms of its loss and their sum, whose gradients are added to
    those of the weights."""
    model, method = learner.model, methods.of(learner.config)
    batch, pieces = learner.loader.batch(pools, task, step, own(learner)), parts(learner)
    with torch.set_grad_enabled(len(pieces) == 1):
        seen = [look(learner, batch, part, task, step) for part in pieces]
    leaves = [
        distributed.gathered(torch.cat(tower).detach()).requires_grad_()
        for tower in zip(*seen, strict=True)
    ]
    terms = {"contrastive": steps.objective(model, *leaves)} | method.losses(learner, None)
    loss = sum(terms.values())
    loss.backward()
    if distributed.rank():  # what does not go through the features would count once a process
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.zero_()
    for part in pieces:
        towers = seen[0] if len(pieces) == 1 else look(learner, batch, part, task, step)
        pairs = [(x, leaf.grad[part]) for x, leaf in zip(towers, leaves, strict=True)]
        training = [pair for pair in pairs if pair[0].requires_grad]  # a tower may be frozen
        torch.autograd.backward(*zip(*training, strict=True))
    distributed.add_up(p.grad for p in model.parameters() if p.grad is not None)
    return batch, terms, loss
