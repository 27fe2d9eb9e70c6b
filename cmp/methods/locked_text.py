"""Locked-text tuning: only the image tower trains, neither text tower nor logit scale."""

from cmp.registry import register
from cmp.training import TrainState


@register("method", "locked-text")
def prepare(state: TrainState) -> None:
    """Freeze everything but the image tower, of which what the user froze stays frozen."""
    for name, parameter in state.model.named_parameters():
        if not name.startswith("visual."):
            parameter.requires_grad_(False)
