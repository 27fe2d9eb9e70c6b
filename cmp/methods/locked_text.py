"""Locked-text tuning: the image tower alone trains, neither text tower nor logit scale (spec 3)."""

from cmp.methods import Learner, Method


def prepare(learner: Learner) -> None:
    """Freeze all but the image tower."""
    learner.model.requires_grad_(False)
    learner.model.visual.requires_grad_(True)


METHOD = Method(prepare)
