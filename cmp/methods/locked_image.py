"""Locked-image tuning: the text tower learns to read a frozen image tower (LiT; spec 3)."""

from cmp.training import TrainState, UpdateMethod


def prepare(learner: TrainState) -> None:
    """Freeze the image tower; nothing of its forward pass is kept for a backward pass then."""
    learner.model.visual.requires_grad_(False)


METHOD = UpdateMethod(prepare)
