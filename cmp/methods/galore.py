"""GaLore: AdamW in a few directions of each matrix's gradient (Zhao et al. 2024; spec 3).

A gradient G [m, n] is seen as R = P G with P [rank, m], or G P with P [n, rank] where n is the
smaller side: the leading singular directions of a gradient, found anew every `gap` steps. Moments
are of R, so they are small; the step goes back through P. Convolutions are read as matrices.
"""

import functools

import torch
from torch import Tensor

from cmp import config
from cmp.methods import check_rank
from cmp.training import TrainState, UpdateMethod, trainable_parameters


def leading_directions(gradient: Tensor, rank: int) -> Tensor:
    """Orthonormal columns [min(m, n), rank]: the leading singular vectors on the smaller side."""
    wide = gradient.shape[0] < gradient.shape[1]
    gram = gradient @ gradient.T if wide else gradient.T @ gradient
    return torch.linalg.eigh(gram).eigenvectors[:, -rank:].contiguous()  # ascending


def project(gradient: Tensor, basis: Tensor) -> Tensor:
    """A matrix as its directions see it: [rank, n] where it is wide, else [m, rank]."""
    wide = gradient.shape[0] < gradient.shape[1]
    return basis.T @ gradient if wide else gradient @ basis


def project_back(low: Tensor, basis: Tensor, wide: bool) -> Tensor:
    """The matrix [m, n] that `down` would give so."""
    return basis @ low if wide else low @ basis.T


class ProjectedAdamW(torch.optim.Optimizer):
    """AdamW, with matrices projected; a vector's step is AdamW's own.

    rank, gap, scale: of the projection; decay acts on the weights themselves.
    """

    def __init__(self, groups, rank: int, gap: int, scale: float, **defaults):
        super().__init__(groups, defaults)
        self.rank, self.gap, self.scale = rank, gap, scale

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step along the gradients at hand."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, group)

    def _move(self, parameter: Tensor, group: dict) -> None:
        state, gradient = self.state[parameter], parameter.grad
        count = int(state.get("step", 0))  # on the CPU until it comes from a checkpoint
        if parameter.ndim > 1:
            gradient = gradient.flatten(1)
            if count % self.gap == 0:
                state["basis"] = leading_directions(gradient, self.rank)
            seen = project(gradient, state["basis"])
        else:
            seen = gradient
        if not count:
            state["step"] = torch.zeros(())
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(seen), torch.zeros_like(seen)
        state["step"] += 1
        move = adam_update(state, seen, count + 1, group["betas"], group["eps"])
        if parameter.ndim > 1:
            wide = gradient.shape[0] < gradient.shape[1]
            move = self.scale * project_back(move, state["basis"], wide).view_as(parameter)
        parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(move, alpha=-group["lr"])


def adam_update(
    state: dict[str, Tensor], gradient: Tensor, count: int, betas: tuple[float, float], eps: float
) -> Tensor:
    """Adam's direction at its `count`-th step; moves the moments on."""
    mean = state["exp_avg"].lerp_(gradient, 1 - betas[0])
    square = state["exp_avg_sq"].mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
    root = (square / (1 - betas[1] ** count)).sqrt_().add_(eps)
    return mean.div(1 - betas[0] ** count).div_(root)


def prepare(learner: TrainState) -> None:
    """Everything trains; `CmpError` for a rank that a matrix cannot have."""
    matrices = {name: p for name, p in trainable_parameters(learner.model).items() if p.ndim > 1}
    check_rank(
        learner.config.method.get("rank"), matrices, " for 'galore', which projects them all"
    )


def optimizer(settings: config.Method) -> functools.partial:
    """`ProjectedAdamW` as a config sets it."""
    rank, gap, scale = (settings.get(key) for key in ("rank", "gap", "scale"))
    return functools.partial(ProjectedAdamW, rank=rank, gap=gap, scale=scale)


METHOD = UpdateMethod(prepare, optimizer=optimizer)
