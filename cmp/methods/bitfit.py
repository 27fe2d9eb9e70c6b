"""BitFit: in both towers, only biases train, those of norms and SigLIP's `logit_bias` included
(Ben Zaken et al. 2022)."""

from cmp.methods.parameters import train_only
from cmp.registry import register
from cmp.training import TrainState


@register("method", "bitfit")
def prepare(state: TrainState) -> None:
    """Freeze all parameters except biases, which are found by name."""
    names = [name for name, _ in state.model.named_parameters()]
    train_only(state.model, [name for name in names if name.endswith("bias")])
