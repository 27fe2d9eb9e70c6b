"""EWC: L + (strength / 2) sum F (theta - theta*)^2 (Kirkpatrick et al. 2017).

theta* are the weights that a task starts from. F is the diagonal of the Fisher information, with F
<- gamma F + F_new after each task. The Fisher pass uses the temperature of training, 1 /
exp(logit_scale), and reads the `batches` batches that would come next in the task.
"""

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from cmp import config as configs
from cmp import models, training
from cmp.arithmetic import autocast, bf16_products
from cmp.errors import CmpError
from cmp.losses import model_loss, uses_sigmoid_loss
from cmp.methods import importance
from cmp.registry import register
from cmp.training import EncodeFurther, Features, ForwardOutput, TrainState, UpdateMethod

Gradients = Iterator[tuple[Tensor, ...]]


def batch_gradients(state: TrainState, forward: Callable[[], ForwardOutput]) -> Gradients:
    """Yield the gradient of a batch's mean loss, which is what the reference implementation
    squares."""
    output = forward()
    yield gradients(state, model_loss(state.model, output.image, output.text))


def sample_gradients(state: TrainState, forward: Callable[[], ForwardOutput]) -> Gradients:
    """Yield the gradient of each sample, with the features of the others held fixed.

    This follows the definition of the Fisher information's diagonal, at the cost of another forward
    pass.
    """
    model, precision = state.model, state.config.training.precision
    with torch.no_grad():
        output = forward()
    for index in range(len(output.pixels)):
        place = output.place[index, None].to(output.tokens.device)
        with autocast(precision, output.pixels.device):
            image = models.encode_image(model, output.pixels[index, None])  # [1, E]
            text = models.encode_text_unpacked(model, output.tokens[place])  # [1, E]
        yield gradients(state, sample_loss(image, text, output, index, model.logit_scale))


FISHERS = {"sample": sample_gradients, "batch": batch_gradients}
"""For each `method.fisher`, the gradients of a batch whose squares are averaged."""


def sample_loss(
    image: Tensor, text: Tensor, output: ForwardOutput, index: int, logit_scale: Tensor
) -> Tensor:
    """Return one sample's contribution to the contrastive loss of its batch.

    Args:
        image: The sample's image feature, [1, E].
        text: Its text feature, [1, E].
        output: The batch.
        index: The sample's position in the batch.
        logit_scale: Log of the inverse temperature.
    """
    own = torch.arange(len(output.image), device=image.device)[:, None] == index
    target = torch.tensor([index], device=image.device)
    scale = logit_scale.exp()
    to_text = scale * image @ torch.where(own, text, output.text).T
    to_image = scale * text @ torch.where(own, image, output.image).T
    return (F.cross_entropy(to_text, target) + F.cross_entropy(to_image, target)) / 2


def gradients(state: TrainState, loss: Tensor) -> tuple[Tensor, ...]:
    """Return the gradients of trainable parameters, zero where the loss does not depend on them."""
    parameters = list(training.trainable_parameters(state.model).values())
    with bf16_products(state.config.training.precision, loss.device):
        return torch.autograd.grad(loss, parameters, materialize_grads=True)


def end_task(state: TrainState, encode_further: EncodeFurther) -> None:
    """Measure the Fisher information of this task and add it to that of earlier tasks."""
    config, total, count = state.config, None, 0
    for number in range(config.method.get("batches")):
        samples = FISHERS[config.method.fisher](state, functools.partial(encode_further, number))
        for gradient in samples:
            squares = [x.square() for x in gradient]
            total = [a + b for a, b in zip(total, squares, strict=True)] if total else squares
            count += 1
    for name, new in zip(training.trainable_parameters(state.model), total or [], strict=True):
        kept = config.method.get("gamma") * state.method_state[f"importance/{name}"]
        state.method_state[f"importance/{name}"] = kept + new / count


def losses(state: TrainState, output: Features) -> dict[str, Tensor]:
    """Return the penalty on moving important parameters."""
    return {"ewc": state.config.method.get("strength") / 2 * importance.penalty(state)}


def prepare(state: TrainState) -> None:
    """Set importance to zero; raise `CmpError` for sample-wise gradients of a sigmoid model."""
    if state.config.method.fisher == "sample" and uses_sigmoid_loss(state.model):
        raise CmpError(
            "method.fisher: 'sample' needs CLIP's softmax loss, but this model has a sigmoid "
            "loss; set method.fisher=batch"
        )
    importance.prepare(state)


def whole_batch_reason(section: configs.Method) -> str:
    """Return why the method needs the whole batch at once, if it does."""
    return "needs the gradient of a whole batch" if section.fisher == "batch" else ""


register("method", "ewc", {"strength": 1.0, "gamma": 1.0, "fisher": "sample", "batches": 4})(
    UpdateMethod(
        prepare,
        lambda state, task: importance.set_anchor(state),
        losses,
        whole_batch_reason=whole_batch_reason,
        end_task=end_task,
    )
)
