"""SI: L + strength sum Omega (theta - theta_prev)^2 (Zenke et al. 2017; spec 3).

A parameter matters by what its movement through a task gave: Omega += max(w, 0) /
((theta - theta_prev)^2 + damping), where w is the path integral of the loss, the sum over steps of
-g dtheta. g is the gradient of the whole loss after clipping, dtheta the optimizer's change.
"""

import torch
from torch import Tensor

from cmp.methods import importance
from cmp.registry import register
from cmp.training import ForwardOutput, ForwardStep, TrainState, UpdateMethod, trainable_parameters


def begin_task(state: TrainState, task: int) -> None:
    """Set the anchor and start the path integral."""
    importance.set_anchor(state)
    for name, parameter in trainable_parameters(state.model).items():
        state.method_state[f"path/{name}"] = torch.zeros_like(parameter)


def losses(state: TrainState, output: ForwardOutput | None) -> dict[str, Tensor]:
    """Return the penalty on moving what mattered."""
    return {"si": state.config.method.get("strength") * importance.penalty(state)}


@torch.no_grad()
def step(state: TrainState, optimizer: torch.optim.Optimizer) -> None:
    """Take the optimizer's step and add it to the path integral."""
    moving = [
        (name, parameter, parameter.grad, parameter.detach().clone())
        for name, parameter in trainable_parameters(state.model).items()
        if parameter.grad is not None
    ]
    optimizer.step()
    for name, parameter, gradient, old in moving:
        state.method_state[f"path/{name}"].addcmul_(gradient, old.sub_(parameter))


@torch.no_grad()
def end_task(state: TrainState, forward_step: ForwardStep) -> None:
    """Add what mattered in this task to the importance."""
    kept, damping = state.method_state, state.config.method.get("damping")
    for name, parameter in trainable_parameters(state.model).items():
        gained = kept[f"path/{name}"].clamp_min(0)
        moved = (parameter - kept[f"anchor/{name}"]).square()
        kept[f"importance/{name}"] += gained / (moved + damping)


register("method", "si", {"strength": 0.5, "damping": 1.0})(
    UpdateMethod(importance.prepare, begin_task, losses, step=step, end_task=end_task)
)
