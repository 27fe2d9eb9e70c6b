"""LNFit: the gains and biases of norms alone train, in both towers (spec 3)."""

from torch import Tensor, nn

from cmp.methods import train_only
from cmp.training import TrainState, UpdateMethod

NORMS = (nn.LayerNorm, nn.GroupNorm)


def prepare(learner: TrainState) -> None:
    """Freeze all but the norms, found by what they are and not by what they are called."""
    norms = [(n, m) for n, m in learner.model.named_modules() if isinstance(m, NORMS)]
    train_only(learner.model, [f"{n}.{key}" for n, m in norms for key, _ in m.named_parameters()])
    for _, module in norms:
        if isinstance(module, nn.GroupNorm):
            module.register_forward_pre_hook(_require_input_gradient)


def _require_input_gradient(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    """Let a first norm, behind frozen layers, have a gradient for its input too.

    Without one torch 2.13 ends in a segmentation fault, in the backward pass of a trained GroupNorm
    over channels_last on a CPU.
    """
    [x] = inputs
    return (x if x.requires_grad else x.detach().requires_grad_(),)


METHOD = UpdateMethod(prepare)
