"""What EWC and SI share: parameters are held where they were, the more they matter.

`TrainState.method_state` holds "importance/NAME" and "anchor/NAME" for each parameter NAME that
trains, on the network's device.
"""

import torch
from torch import Tensor

from cmp.training import TrainState, trainable_parameters


def prepare(state: TrainState) -> None:
    """Start with importance zero; the anchor comes with the first task."""
    for name, parameter in trainable_parameters(state.model).items():
        state.method_state[f"importance/{name}"] = torch.zeros_like(parameter)


def set_anchor(state: TrainState) -> None:
    """Hold parameters where a task starts: at the merged weights, where a policy merges."""
    for name, parameter in trainable_parameters(state.model).items():
        state.method_state[f"anchor/{name}"] = parameter.detach().clone()


class _QuadraticPenalty(torch.autograd.Function):
    """sum of importance * (theta - anchor)^2 over one parameter, at half of autograd's work."""

    @staticmethod
    def forward(ctx, parameter: Tensor, importance: Tensor, anchor: Tensor) -> Tensor:
        moved = parameter - anchor
        pull = importance * moved
        ctx.save_for_backward(pull)
        return torch.dot(pull.flatten(), moved.flatten())

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        """Return 2 importance * (theta - anchor)."""
        [pull] = ctx.saved_tensors
        return 2 * gradient * pull, None, None


def penalty_gradient(state: TrainState, name: str, parameter: Tensor) -> Tensor:
    """Return the gradient of `penalty` with respect to one parameter."""
    kept = state.method_state
    return 2 * kept[f"importance/{name}"] * (parameter - kept[f"anchor/{name}"])


def penalty(state: TrainState) -> Tensor:
    """Return the sum over parameters of importance * (theta - anchor)^2, in fp32."""
    kept = state.method_state
    terms = [
        _QuadraticPenalty.apply(parameter, kept[f"importance/{name}"], kept[f"anchor/{name}"])
        for name, parameter in trainable_parameters(state.model).items()
    ]
    return torch.stack(terms).sum()
