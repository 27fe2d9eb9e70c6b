"""Shared by EWC and SI: a penalty on moving parameters that grows with their importance.

`TrainState.method_state` contains "importance/NAME" and "anchor/NAME" for each trainable parameter
NAME, on the network's device.
"""

import torch
from torch import Tensor

from cmp.training import TrainState, trainable_parameters


def prepare(state: TrainState) -> None:
    """Set importance to zero; the first task sets the anchor."""
    for name, parameter in trainable_parameters(state.model).items():
        state.method_state[f"importance/{name}"] = torch.zeros_like(parameter)


def set_anchor(state: TrainState) -> None:
    """Anchor parameters at the weights a task starts from, which are merged ones if a policy
    merges."""
    for name, parameter in trainable_parameters(state.model).items():
        state.method_state[f"anchor/{name}"] = parameter.detach().clone()


class _QuadraticPenalty(torch.autograd.Function):
    """The sum of importance * (theta - anchor)^2 over one parameter, at half of autograd's cost."""

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
