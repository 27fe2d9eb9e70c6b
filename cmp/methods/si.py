"""SI: L + strength sum Omega (theta - theta_prev)^2. A parameter matters by what its way through a
task gave, Omega += max(w, 0) / ((theta - theta_prev)^2 + damping), where w is the path integral of
the loss: the sum over steps of -g dtheta (Zenke et al. 2017; spec 3).

g is the gradient after clipping, of the whole loss; dtheta is what the optimizer did with it. The
reference's lr g^2 is that of plain gradient descent, which nobody runs here.
"""

import torch
from torch import Tensor

from cmp.methods import importance
from cmp.training import ForwardOutput, ForwardStep, TrainState, UpdateMethod, trainable_parameters


def begin_task(learner: TrainState, task: int) -> None:
    """The way begins here."""
    importance.set_anchor(learner)
    for name, parameter in trainable_parameters(learner.model).items():
        learner.state[f"path/{name}"] = torch.zeros_like(parameter)


def losses(learner: TrainState, seen: ForwardOutput) -> dict[str, Tensor]:
    """The penalty on what mattered."""
    return {"si": learner.config.method.get("strength") * importance.penalty(learner)}


@torch.no_grad()
def step(learner: TrainState, optimizer: torch.optim.Optimizer) -> None:
    """A step of the optimizer, and of the path integral."""
    moving = {n: p for n, p in trainable_parameters(learner.model).items() if p.grad is not None}
    before = [p.detach().clone() for p in moving.values()]
    optimizer.step()
    for (name, parameter), old in zip(moving.items(), before, strict=True):
        learner.state[f"path/{name}"].addcmul_(parameter.grad, old.sub_(parameter))


@torch.no_grad()
def end_task(learner: TrainState, look: ForwardStep) -> None:
    """Add what mattered on this way."""
    state, damping = learner.state, learner.config.method.get("damping")
    for name, parameter in trainable_parameters(learner.model).items():
        gained = state[f"path/{name}"].clamp_min(0)
        moved = (parameter - state[f"anchor/{name}"]).square()
        state[f"importance/{name}"] += gained / (moved + damping)


METHOD = UpdateMethod(importance.prepare, begin_task, losses, step=step, end_task=end_task)
