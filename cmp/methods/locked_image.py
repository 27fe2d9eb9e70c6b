"""LiT: the text tower is trained against a frozen image tower (Zhai et al. 2022)."""

from cmp.registry import register
from cmp.training import TrainState


@register("method", "locked-image")
def prepare(state: TrainState) -> None:
    """Freeze the image tower, so that none of its activations are kept for a backward pass."""
    state.model.visual.requires_grad_(False)
