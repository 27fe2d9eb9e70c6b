"""Locked-text tuning: only the image tower trains, not the text tower or the logit scale."""

from cmp.registry import register
from cmp.training import TrainState


@register("method", "locked-text")
def prepare(state: TrainState) -> None:
    """Freeze everything except the image tower; parameters that the user froze there stay
    frozen."""
    for name, parameter in state.model.named_parameters():
        if not name.startswith("visual."):
            parameter.requires_grad_(False)
