"""Treat the blocks of a tower differently: train only the last ones, or those near the input at
lower rates."""

from collections.abc import Callable

from cmp.errors import CmpError
from cmp.towers import layers_from_top
from cmp.training import TrainState


def rate_multiples(state: TrainState) -> dict[str, float]:
    """Return the multiple of the learning rate of each parameter: `layer_decay` to the power of its
    distance from the output (Dong et al. 2022, section 3.1), and in the image tower, `image_rate`
    times that."""
    method = state.config.method
    decay, image_rate = method.layer_decay or 1.0, method.image_rate or 1.0
    return {
        name: decay**layer * (image_rate if name.startswith("visual.") else 1.0)
        for name, layer in layers_from_top(state.model).items()
    }


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
