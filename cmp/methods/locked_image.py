"""LiT: the text tower is trained against a frozen image tower (Zhai et al. 2022)."""

from cmp.methods import layers
from cmp.registry import register
from cmp.training import TrainState, UpdateMethod


def prepare(state: TrainState) -> None:
    """Freeze the image tower, so that none of its activations are kept for a backward pass; with
    `unlock`, its last blocks train. With `lock_from`, it is the stored features that lock the tower
    in later tasks: no step runs it, so it has no gradients."""
    if not state.config.method.lock_from:
        layers.lock(state, lambda name: name.startswith("visual."))


def views(state: TrainState, task: int) -> int:
    """Return how many views of each image are stored for the steps of a task."""
    method = state.config.method
    return (method.views or 0) if task >= (method.lock_from or 0) else 0


register("method", "locked-image", ["layer_decay", "unlock", "views", "lock_from"])(
    UpdateMethod(prepare=prepare, views=views, rates=layers.rate_multiples)
)
