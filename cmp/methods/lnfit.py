"""LNFit: only the gains and biases of LayerNorms and GroupNorms train, in both towers."""

import warnings

from torch import Tensor, nn

from cmp.methods.parameters import train_only
from cmp.registry import register
from cmp.training import TrainState

NORMS = (nn.LayerNorm, nn.GroupNorm)


@register("method", "lnfit")
def prepare(state: TrainState) -> None:
    """Freeze all parameters except those of norms, which are found by type, not by name.

    BatchNorms stay frozen; warn if the image tower has no other norms.
    """
    norms = [(n, m) for n, m in state.model.named_modules() if isinstance(m, NORMS)]
    if not any(name.startswith("visual.") for name, _ in norms):
        warnings.warn(
            "method.name: 'lnfit' trains no norm of this image tower, which has no LayerNorm and "
            "no GroupNorm",
            stacklevel=2,
        )
    train_only(state.model, [f"{n}.{key}" for n, m in norms for key, _ in m.named_parameters()])
    for _, module in norms:
        if isinstance(module, nn.GroupNorm) and module.weight.device.type == "cpu":
            module.register_forward_pre_hook(_require_input_gradient)


def _require_input_gradient(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    """Make the input of the first norm, behind frozen layers, require a gradient.

    Without it, torch 2.13 crashes with a segmentation fault in the backward pass of a trained
    GroupNorm with channels_last on a CPU.
    """
    [x] = inputs
    return (x if x.requires_grad else x.detach().requires_grad_(),)
