"""Distillation in feature space, after ZSCL (Zheng et al. 2023): on the replayed samples of the
pretraining pool, images see the pretrained network's texts, and texts its images, as it sees them
itself.

L + strength (KL(p_teacher | p_student) of images against texts + the same of texts against images),
p the softmax of similarities at `temperature` times the pretrained network's own temperature.
"""

import copy

import torch
from torch import Tensor
from torch.nn import functional as F

from cmp import models
from cmp.training import ForwardOutput, TrainState, UpdateMethod, autocast


def prepare(learner: TrainState) -> None:
    """Put a copy of the network aside, as it is before the stream."""
    learner.aside["teacher"] = copy.deepcopy(learner.model).requires_grad_(False).eval()


@torch.no_grad()
def teacher_features(learner: TrainState, seen: ForwardOutput) -> tuple[Tensor, Tensor]:
    """What the pretrained network makes of the replayed samples, [P, E] each."""
    teacher, first = learner.aside["teacher"], len(seen.pixels) - seen.replayed
    tokens = seen.tokens[seen.place[first:].to(seen.tokens.device)]
    with autocast(learner.config.training.precision, seen.pixels.device):
        image = models.encode_image(teacher, seen.pixels[first:])
        text = models.encode_text(teacher, tokens)
    return image, text


def divergence(student: Tensor, teacher: Tensor, against: Tensor, scale: Tensor) -> Tensor:
    """Mean KL from a teacher's to a student's view of what it is seen against, all [P, E]."""
    ours = F.log_softmax(scale * student @ against.T, dim=1)
    theirs = F.log_softmax(scale * teacher @ against.T, dim=1)
    return F.kl_div(ours, theirs, reduction="batchmean", log_target=True)


def losses(learner: TrainState, seen: ForwardOutput) -> dict[str, Tensor]:
    """How far both towers have gone from the pretrained network's on the replayed samples."""
    settings = learner.config.method
    image, text = teacher_features(learner, seen)
    scale = learner.aside["teacher"].logit_scale.exp() / settings.get("temperature")
    first = len(seen.pixels) - seen.replayed
    far = divergence(seen.image[first:], image, text, scale)
    far = far + divergence(seen.text[first:], text, image, scale)
    return {"distillation": settings.get("strength") * far}


METHOD = UpdateMethod(
    prepare, losses=losses, whole=lambda settings: "looks at the pixels of the whole batch"
)
