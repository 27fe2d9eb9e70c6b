"""GaLore: AdamW on a low-rank projection of each matrix's gradient (Zhao et al. 2024).

A gradient G [long, short], transposed if necessary, is projected to R = G P [long, rank]. P [short,
rank] spans the leading singular directions of a gradient and is recomputed every `gap` steps.
Moments are kept for R, so they are small, and the step is projected back through P. Convolutions
are treated as matrices.

Singular vectors are unique only up to sign, at best, so old moments would not fit a new basis. Each
new basis is therefore rotated within its span to be as close as possible to the old one.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from cmp import config as configs
from cmp.methods.parameters import check_rank
from cmp.registry import register
from cmp.training import TrainState, UpdateMethod, trainable_parameters


def leading_directions(gradient: Tensor, rank: int) -> Tensor:
    """Return the leading right singular vectors of a gradient [long, short], [short, rank]."""
    return torch.linalg.eigh(gradient.T @ gradient).eigenvectors[:, -rank:]  # ascending


def align(basis: Tensor, old: Tensor) -> Tensor:
    """Return the orthonormal basis of the same span that is closest to an old one (Procrustes)."""
    left, _, right = torch.linalg.svd(basis.T @ old)
    return basis @ (left @ right)


class ProjectedAdamW(torch.optim.Optimizer):
    """AdamW with projected matrices. Vectors take AdamW's own step, and decay applies to the
    weights."""

    def __init__(self, groups: Any, rank: int, gap: int, scale: float, **defaults: Any):
        """Prepare the optimiser.

        Args:
            groups: Parameter groups.
            rank: The number of directions per matrix.
            gap: Steps between new projections.
            scale: Factor applied to a matrix's step.
            **defaults: AdamW's own arguments.
        """
        super().__init__(groups, defaults)
        self.rank, self.gap, self.scale = rank, gap, scale

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Take a step along the gradients."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        count = int(state.get("step", 0))  # on the CPU unless restored from a checkpoint
        projected = is_matrix(parameter)
        wide = projected and len(parameter) < parameter[0].numel()
        if projected:
            gradient = gradient.flatten(1).T if wide else gradient.flatten(1)
            if count % self.gap == 0:
                basis = leading_directions(gradient, self.rank)
                state["basis"] = align(basis, state["basis"]) if count else basis.contiguous()
            gradient = gradient @ state["basis"]
        if not count:
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(gradient)
            state["exp_avg_sq"] = torch.zeros_like(gradient)
        state["step"] += 1
        update = adam_update(state, gradient, count + 1, group["betas"], group["eps"])
        if projected:
            update = self.scale * update @ state["basis"].T  # [long, short]
            update = (update.T if wide else update).reshape(parameter.shape)
        parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])


def is_matrix(parameter: Tensor) -> bool:
    """Return whether a parameter is projected. One with a single row, such as the positions [1, N,
    W] of timm's towers, counts as a vector."""
    return parameter.ndim > 1 and len(parameter) > 1


def adam_update(
    state: dict[str, Tensor], gradient: Tensor, count: int, betas: tuple[float, float], eps: float
) -> Tensor:
    """Update Adam's moments at step `count` and return the direction of the step."""
    mean = state["exp_avg"].lerp_(gradient, 1 - betas[0])
    square = state["exp_avg_sq"].mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
    root = (square / (1 - betas[1] ** count)).sqrt_().add_(eps)
    return mean.div(1 - betas[0] ** count).div_(root)


def prepare(state: TrainState) -> None:
    """Train everything; raise `CmpError` for a rank that a matrix cannot have."""
    matrices = {name: p for name, p in trainable_parameters(state.model).items() if is_matrix(p)}
    check_rank(
        state.config.method.get("rank"), matrices, " for 'galore', which projects all matrices"
    )


def optimizer(section: configs.Method) -> functools.partial:
    """Return `ProjectedAdamW` with the settings of a config."""
    rank, gap, scale = (section.get(key) for key in ("rank", "gap", "scale"))
    return functools.partial(ProjectedAdamW, rank=rank, gap=gap, scale=scale)


register("method", "galore", {"rank": 8, "scale": 2.0, "gap": 200})(
    UpdateMethod(prepare, optimizer=optimizer)
)
