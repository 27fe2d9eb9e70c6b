"""SI: L + strength sum Omega (theta - theta_prev)^2 (Zenke et al. 2017).

A parameter's importance is how much its movement during tasks reduced the loss: Omega += max(w, 0)
/ ((theta - theta_prev)^2 + damping), where w is the path integral of the loss, the sum over steps
of -g dtheta. g is the gradient of the loss without SI's own penalty, before clipping, and dtheta is
the optimiser's change.
"""

import torch
from torch import Tensor

from cmp.methods import importance
from cmp.registry import register
from cmp.training import EncodeFurther, Features, TrainState, UpdateMethod, trainable_parameters


def begin_task(state: TrainState, task: int) -> None:
    """Set the anchor and start the path integral."""
    importance.set_anchor(state)
    for name, parameter in trainable_parameters(state.model).items():
        state.method_state[f"path/{name}"] = torch.zeros_like(parameter)


def losses(state: TrainState, output: Features) -> dict[str, Tensor]:
    """Return the penalty on moving important parameters."""
    return {"si": state.config.method.get("strength") * importance.penalty(state)}


@torch.no_grad()
def after_backward(state: TrainState) -> None:
    """Keep the gradient of the loss without the penalty."""
    strength = state.config.method.get("strength")
    for name, parameter in trainable_parameters(state.model).items():
        if parameter.grad is not None:
            pull = strength * importance.penalty_gradient(state, name, parameter)
            state.method_state[f"gradient/{name}"] = parameter.grad - pull


@torch.no_grad()
def step(state: TrainState, optimizer: torch.optim.Optimizer) -> None:
    """Take the optimiser's step and add it to the path integral."""
    kept, parameters = state.method_state, trainable_parameters(state.model)
    gradients = {name: kept.pop(f"gradient/{name}", None) for name in parameters}
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    optimizer.step()
    for name, gradient in gradients.items():
        if gradient is not None:
            kept[f"path/{name}"].addcmul_(gradient, before[name].sub_(parameters[name]))


@torch.no_grad()
def end_task(state: TrainState, encode_further: EncodeFurther) -> None:
    """Add this task's importance to the total."""
    kept, damping = state.method_state, state.config.method.get("damping")
    for name, parameter in trainable_parameters(state.model).items():
        gained = kept[f"path/{name}"].clamp_min(0)
        moved = (parameter - kept[f"anchor/{name}"]).square()
        kept[f"importance/{name}"] += gained / (moved + damping)


register("method", "si", {"strength": 1000.0, "damping": 1.0})(
    UpdateMethod(
        importance.prepare,
        begin_task,
        losses,
        whole_batch_reason=lambda section: "",  # the penalty depends only on weights
        after_backward=after_backward,
        step=step,
        end_task=end_task,
    )
)
