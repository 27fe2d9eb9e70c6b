"""Locked-text tuning: only the image tower trains, not the text tower or the logit scale."""

from cmp.methods import layers
from cmp.registry import register
from cmp.training import TrainState, UpdateMethod

SCALES = ("logit_scale", "logit_bias")


def prepare(state: TrainState) -> None:
    """Freeze everything except the image tower; parameters that the user froze there stay frozen.
    With `unlock`, the last blocks of the text tower train."""
    layers.lock(state, lambda name: not name.startswith("visual.") and name not in SCALES)
    for name in SCALES:
        if (scale := getattr(state.model, name, None)) is not None:
            scale.requires_grad_(False)


register("method", "locked-text", ["layer_decay", "unlock"])(
    UpdateMethod(prepare=prepare, rates=layers.rate_multiples)
)
