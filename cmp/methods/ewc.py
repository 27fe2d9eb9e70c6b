"""EWC: L + (strength / 2) sum F (theta - theta*)^2, with theta* the weights that a task starts from
and F the diagonal of the Fisher information, F <- gamma F + F_new after each task (spec 3).

The Fisher pass sees the temperature that training sees, 1 / exp(logit_scale). It reads the batches
that would come next in the task: `batches` of them, at the task's end and only then.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from cmp import config, models
from cmp.errors import CmpError
from cmp.methods import importance
from cmp.training import (
    ForwardOutput,
    ForwardStep,
    TrainState,
    UpdateMethod,
    autocast,
    model_loss,
    trainable_parameters,
    uses_sigmoid_loss,
)

Gradients = Iterator[tuple[Tensor, ...]]


def batch_gradients(learner: TrainState, seen: Callable[[], ForwardOutput]) -> Gradients:
    """The gradient of a batch's mean loss, as the reference squares it."""
    found = seen()
    loss = model_loss(learner.model, found.image, found.text)
    yield gradients(learner, loss)


def sample_gradients(learner: TrainState, seen: Callable[[], ForwardOutput]) -> Gradients:
    """Each sample's own gradient, the features of the others held fixed: the diagonal that the
    Fisher information is defined by, at the cost of one more pass forward."""
    model, precision = learner.model, learner.config.training.precision
    with torch.no_grad():
        found = seen()
    for index in range(len(found.pixels)):
        place = found.place[index, None].to(found.tokens.device)
        with autocast(precision, found.pixels.device):
            image = models.encode_image(model, found.pixels[index, None])
            text = models.encode_text_unpacked(model, found.tokens[place])
        yield gradients(learner, sample_loss(image, text, found, index, model.logit_scale))


FISHERS = {"sample": sample_gradients, "batch": batch_gradients}
"""By `method.fisher`: the gradients whose squares are averaged, of one batch."""


def sample_loss(
    image: Tensor, text: Tensor, seen: ForwardOutput, index: int, logit_scale: Tensor
) -> Tensor:
    """What one sample adds to the contrastive loss of its batch, both ways; image, text: [1, E]."""
    mine = torch.arange(len(seen.image), device=image.device)[:, None] == index
    target = torch.tensor([index], device=image.device)
    scale = logit_scale.exp()
    to_text = scale * image @ torch.where(mine, text, seen.text).T
    to_image = scale * text @ torch.where(mine, image, seen.image).T
    return (F.cross_entropy(to_text, target) + F.cross_entropy(to_image, target)) / 2


def gradients(learner: TrainState, loss: Tensor) -> tuple[Tensor, ...]:
    """Of what trains, zeros where the loss does not depend on it."""
    parameters = list(trainable_parameters(learner.model).values())
    return torch.autograd.grad(loss, parameters, materialize_grads=True)


def end_task(learner: TrainState, look: ForwardStep) -> None:
    """Measure what mattered to this task, and add it to what mattered before."""
    config, found, count = learner.config, None, 0
    for step in range(config.training.steps, config.training.steps + config.method.get("batches")):
        for each in FISHERS[config.method.fisher](learner, lambda step=step: look(step)[1]):
            squares = [x.square() for x in each]
            found = squares if found is None else torch._foreach_add(found, squares)
            count += 1
    accumulate_fisher(learner, [x / count for x in found])


def accumulate_fisher(learner: TrainState, fisher: list[Tensor]) -> None:
    """F <- gamma F + F_new."""
    for name, new in zip(trainable_parameters(learner.model), fisher, strict=True):
        old = learner.state[f"importance/{name}"]
        learner.state[f"importance/{name}"] = learner.config.method.get("gamma") * old + new


def losses(learner: TrainState, seen: ForwardOutput) -> dict[str, Tensor]:
    """The penalty on what mattered."""
    return {"ewc": learner.config.method.get("strength") / 2 * importance.penalty(learner)}


def prepare(learner: TrainState) -> None:
    """Nothing matters yet; `CmpError` where a sample's own loss is not what `own_loss` says."""
    if learner.config.method.fisher == "sample" and uses_sigmoid_loss(learner.model):
        raise CmpError(
            "method.fisher: 'sample' is of CLIP's softmax loss, and this model has a sigmoid loss; "
            "set method.fisher=batch"
        )
    importance.prepare(learner)


def whole_batch_reason(settings: config.Method) -> str:
    """Why the method cannot do with a batch in parts."""
    return "takes the gradient of a whole batch" if settings.fisher == "batch" else ""


METHOD = UpdateMethod(
    prepare,
    lambda learner, task: importance.set_anchor(learner),
    losses,
    whole=whole_batch_reason,
    end_task=end_task,
)
