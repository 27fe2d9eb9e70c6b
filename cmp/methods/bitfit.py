"""BitFit: only biases train, those of norms too, in both towers (Ben Zaken et al. 2022)."""

from cmp.methods.parameters import train_only
from cmp.registry import register
from cmp.training import TrainState


@register("method", "bitfit")
def prepare(state: TrainState) -> None:
    """Freeze all parameters but those that are called a bias."""
    names = [name for name, _ in state.model.named_parameters()]
    train_only(state.model, [name for name in names if name.endswith("bias")])
