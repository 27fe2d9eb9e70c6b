"""Locked-text tuning: the image tower alone trains, neither text tower nor logit scale (spec 3)."""

from cmp.training import TrainState, UpdateMethod


def prepare(learner: TrainState) -> None:
    """Freeze all but the image tower."""
    learner.model.requires_grad_(False)
    learner.model.visual.requires_grad_(True)


METHOD = UpdateMethod(prepare)
