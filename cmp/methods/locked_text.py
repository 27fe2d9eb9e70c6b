"""Locked-text tuning: only the image tower trains, neither text tower nor logit scale (spec 3)."""

from cmp.registry import register
from cmp.training import TrainState


@register("method", "locked-text")
def prepare(state: TrainState) -> None:
    """Freeze everything but the image tower."""
    state.model.requires_grad_(False)
    state.model.visual.requires_grad_(True)
