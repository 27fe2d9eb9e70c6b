"""Distillation in feature space, after ZSCL (Zheng et al. 2023).

On replayed samples of the pretraining pool, the similarities between images and texts stay close to
those of the pretrained network: L + strength (KL(p_teacher | p_student) of images against texts +
the same of texts against images), where p is the softmax of similarities at `temperature` times the
pretrained network's own temperature.
"""

import copy

import torch
from torch import Tensor
from torch.nn import functional as F

from cmp import models
from cmp.arithmetic import autocast
from cmp.registry import register
from cmp.training import ForwardOutput, TrainState, UpdateMethod


def prepare(state: TrainState) -> None:
    """Keep a frozen copy of the network from before the stream."""
    state.frozen_models["teacher"] = copy.deepcopy(state.model).requires_grad_(False).eval()


def divergence(student: Tensor, teacher: Tensor, targets: Tensor, scale: Tensor) -> Tensor:
    """Return the mean KL divergence between a teacher's and a student's similarities to targets.

    Args:
        student: Features, [P, E].
        teacher: The teacher's features of the same samples, [P, E].
        targets: The features that both are compared with, [P, E].
        scale: The inverse temperature.
    """
    student_log = F.log_softmax(scale * student @ targets.T, dim=1)
    teacher_log = F.log_softmax(scale * teacher @ targets.T, dim=1)
    return F.kl_div(student_log, teacher_log, reduction="batchmean", log_target=True)


def losses(state: TrainState, output: ForwardOutput) -> dict[str, Tensor]:
    """Return the divergence of both towers from the pretrained network on replayed samples."""
    section, teacher = state.config.method, state.frozen_models["teacher"]
    first = len(output.pixels) - output.replayed
    tokens = output.tokens[output.place[first:].to(output.tokens.device)]
    with torch.no_grad(), autocast(state.config.training.precision, output.pixels.device):
        image = models.encode_image(teacher, output.pixels[first:])  # [P, E]
        text = models.encode_text(teacher, tokens)  # [P, E]
    scale = teacher.logit_scale.exp() / section.get("temperature")
    distance = divergence(output.image[first:], image, text, scale)
    distance = distance + divergence(output.text[first:], text, image, scale)
    return {"distillation": section.get("strength") * distance}


register("method", "distillation", {"strength": 1.0, "temperature": 2.0}, needs_pool=True)(
    UpdateMethod(
        prepare,
        losses=losses,
        whole_batch_reason=lambda section: "needs the pixels of the whole batch",
    )
)
