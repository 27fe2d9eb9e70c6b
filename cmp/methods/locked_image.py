"""LiT: the text tower is trained against a frozen image tower (Zhai et al. 2022)."""

from cmp.methods import layers
from cmp.registry import register
from cmp.training import TrainState, UpdateMethod


def prepare(state: TrainState) -> None:
    """Freeze the image tower, so that none of its activations are kept for a backward pass; with
    `unlock`, its last blocks train."""
    layers.lock(state, lambda name: name.startswith("visual."))


register("method", "locked-image", ["layer_decay", "unlock"])(
    UpdateMethod(prepare=prepare, rates=layers.rate_multiples)
)
