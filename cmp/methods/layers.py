"""Treat the blocks of a tower differently: train only the last ones, or those near the input at
lower rates."""

from collections.abc import Callable

from torch import nn

from cmp.errors import CmpError
from cmp.towers import tower_blocks
from cmp.training import TrainState

_LAST = ("ln_post", "ln_final", "proj", "text_projection", "logit_scale", "logit_bias", "norm")
_LAST += ("head", "fc_norm", "attn_pool", "attnpool", "pooler", "final_norm")
"""Names of what follows the blocks of a tower, in open_clip and timm."""
_TOWERS = ("visual", "trunk", "text", "transformer")
"""Names of towers, as prefixes of their parts."""


def layers_from_top(model: nn.Module) -> dict[str, int]:
    """Return how far below the output of its tower each parameter is.

    Everything after the blocks, such as a projection, is 0. Of L blocks, the last is 1 and the
    first is L. The stem and embeddings are L + 1.
    """
    names = [name for name, _ in model.named_parameters()]
    blocks, distances = tower_blocks(names), {}
    counts = {name.startswith("visual."): count for name, (_, count) in blocks.items()}
    for name in names:
        parts = [part for part in name.split(".") if part not in _TOWERS]
        if name in blocks:
            number, count = blocks[name]
            distances[name] = count - number
        else:
            is_last = parts[0] in _LAST
            distances[name] = 0 if is_last else counts.get(name.startswith("visual."), 0) + 1
    return distances


def rate_multiples(state: TrainState) -> dict[str, float]:
    """Return the multiple of the learning rate of each parameter: `layer_decay` to the power of its
    distance from the output (Dong et al. 2022, section 3.1)."""
    decay = state.config.method.layer_decay
    if decay is None:
        return {}
    return {name: decay**layer for name, layer in layers_from_top(state.model).items()}


def lock(state: TrainState, is_locked: Callable[[str], bool]) -> None:
    """Freeze a tower, except its last `unlock` blocks and what follows them.

    Args:
        state: The network, changed in place, and its run.
        is_locked: Whether a parameter belongs to the tower, by its name.

    Raises:
        CmpError: The tower has no more blocks than `unlock`, so none would stay locked.
    """
    unlocked = state.config.method.unlock
    layers = layers_from_top(state.model)
    tower = {name: layer for name, layer in layers.items() if is_locked(name)}
    if unlocked and unlocked >= (count := max(tower.values(), default=1) - 1):
        raise CmpError(
            f"method.unlock: {unlocked} unlocks all {count} blocks of this tower; unlock "
            "fewer, or use method.name=full"
        )
    for name, parameter in state.model.named_parameters():
        if name in tower and not (unlocked and tower[name] <= unlocked):
            parameter.requires_grad_(False)
