"""What EWC and SI share: parameters are held where they were, the more so the more they matter.

`Learner.state` holds "importance/NAME" and "anchor/NAME" for each parameter NAME that trains, where
the network is, so that a penalty copies nothing.
"""

import torch
from torch import Tensor

from cmp.training import TrainState, trainable_parameters


def prepare(learner: TrainState) -> None:
    """Nothing matters yet; the anchor comes with the first task."""
    for name, parameter in trainable_parameters(learner.model).items():
        learner.state[f"importance/{name}"] = torch.zeros_like(parameter)


def set_anchor(learner: TrainState) -> None:
    """The weights that a task starts from are where they are held; those are the merged ones, where
    a policy merges."""
    for name, parameter in trainable_parameters(learner.model).items():
        learner.state[f"anchor/{name}"] = parameter.detach().clone()


class _QuadraticPenalty(torch.autograd.Function):
    """sum of importance * (theta - anchor)^2 over one parameter, at half of autograd's own work."""

    @staticmethod
    def forward(ctx, parameter: Tensor, importance: Tensor, anchor: Tensor) -> Tensor:
        moved = parameter - anchor
        pull = importance * moved
        ctx.save_for_backward(pull)
        return torch.dot(pull.flatten(), moved.flatten())

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        """2 importance * (theta - anchor)."""
        [pull] = ctx.saved_tensors
        return 2 * gradient * pull, None, None


def penalty(learner: TrainState) -> Tensor:
    """sum over parameters of importance * (theta - anchor)^2, in fp32."""
    state = learner.state
    terms = [
        _QuadraticPenalty.apply(parameter, state[f"importance/{name}"], state[f"anchor/{name}"])
        for name, parameter in trainable_parameters(learner.model).items()
    ]
    return torch.stack(terms).sum()
