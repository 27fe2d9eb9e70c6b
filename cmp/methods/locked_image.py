"""LiT: the text tower learns to read a frozen image tower (Zhai et al. 2022)."""

from cmp.registry import register
from cmp.training import TrainState


@register("method", "locked-image")
def prepare(state: TrainState) -> None:
    """Freeze the image tower; none of its activations are kept for a backward pass then."""
    state.model.visual.requires_grad_(False)
