"""What a method's step costs, counted on shapes alone: on torch's meta device nothing is computed.

A step is that of `cmp.training`, every caption at the model's full length and encoded once: a
function of (model, batch, method), not of the data. Matrix products and convolutions count, those
of attention too; elementwise work does not, as in the paper.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from cmp import config, methods, mixtures, models, steps
from cmp.budgets.rules import Cost
from cmp.config import Method, RunConfig
from cmp.methods import Learner
from cmp.steps import Seen


def cost(run_config: RunConfig) -> Cost:
    """FLOPs and memory of a run's method, in fp32; `CmpError` for what cannot be made."""
    size, mixture = run_config.training.batch, run_config.mixture
    replayed, _, _ = mixtures.parts(mixture, size, empty_buffer=False)
    # of all others a method's cost does not depend on what the mixture is
    replayed = replayed if run_config.method.name == "distillation" else 0
    return _cost(run_config.model.name, size, run_config.method, replayed)


@functools.cache
def _cost(name: str, batch: int, method: Method, replayed: int) -> Cost:
    found = learner(name, method, models.blank(name))
    look = functools.partial(empty_look, found, batch, replayed)
    flops = counted(lambda: step(found, look))
    memory = sum(account(found, look).values())
    return Cost(flops + optimizer_flops(found), end_flops(name, method, batch), memory)


def learner(name: str, method: Method, model: nn.Module) -> Learner:
    """A network that is ready for its first step, but has no data."""
    run_config = config.parse({"model": {"name": name, "start": "random"}}, "cmp budget")
    run_config = dataclasses.replace(run_config, method=method)
    found = Learner(run_config, None, model.train(), torch.empty(0))
    methods.of(run_config).prepare(found)
    methods.of(run_config).begin_task(found, 0)
    return found


def empty_look(found: Learner, batch: int, replayed: int = 0) -> Seen:
    """A batch of shapes, or on another device of zeros, through the network."""
    model, device = found.model, found.model.logit_scale.device
    side = model.visual.image_size
    height, width = side if isinstance(side, tuple) else (side, side)
    pixels = torch.zeros(batch, 3, height, width, device=device)
    length = models.context_length(model)
    tokens = torch.zeros(batch, length, dtype=torch.int64, device=device)
    image = models.encode_image(model, pixels)
    text = models.encode_one_by_one(model, tokens)
    place = torch.arange(batch, device=device)
    return Seen(pixels, tokens, place, image, text, replayed)


def loss(found: Learner, seen: Seen) -> Tensor:
    """The loss of a batch, all terms."""
    terms = methods.of(found.config).losses(found, seen)
    contrastive = steps.objective(found.model, seen.image, seen.text)
    return sum(terms.values(), contrastive)


def step(found: Learner, look: Callable[[], Seen]) -> None:
    """Forward and backward."""
    loss(found, look()).backward()


def counted(call: Callable[[], object]) -> int:
    """FLOPs of what is called."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def own_optimizer(found: Learner) -> torch.optim.Optimizer | None:
    """The method's own optimizer; none where that is AdamW, which multiplies no matrices."""
    own = methods.of(found.config).optimizer(found.config.method) is not steps.ADAMW
    return methods.optimizer(found) if own else None


def optimizer_flops(found: Learner) -> float:
    """Of the optimizer's step, from gradients at hand; what it does at times only is shared out."""
    optimizer = own_optimizer(found)
    if optimizer is None:
        return 0.0
    first, later = counted(optimizer.step), counted(optimizer.step)
    return later + (first - later) / found.config.method.get("gap")


def end_flops(name: str, method: Method, batch: int) -> float:
    """After a task, once: of one sample, times samples; the few products between samples are left
    out."""
    measures = "batches" in config.OF_METHODS.get(method.name, {})
    batches = method.get("batches") if measures else 1
    one = dataclasses.replace(method, batches=1) if measures else method
    found = learner(name, one, models.blank(name))
    look = functools.partial(empty_look, found, 1)
    end = methods.of(found.config).end_task
    if end is methods.Method.end_task:
        return 0.0
    return batches * batch * counted(lambda: end(found, lambda number: (None, look())))


def account(found: Learner, look: Callable[[], Seen]) -> dict[str, int]:
    """Bytes that a step holds at its peak, by what they are for: when the next loss has been
    computed, and the gradients of the step before are not yet given up."""
    trainable = list(methods.trainable(found.model).values())
    held = [*found.model.parameters(), *found.model.buffers()]
    beside = list(found.state.values())
    for network in found.aside.values():
        beside += [*network.parameters(), *network.buffers()]
    kept = activations(lambda: loss(found, look()), [*held, *beside])
    gradients = size(trainable)
    return {
        "weights": size(held),
        "gradients": gradients,
        "optimizer": moments(found, gradients),
        "method": size(beside),
        "activations": kept,
    }


def size(tensors: Iterable[Tensor]) -> int:
    """Bytes of the memory behind some tensors, each piece counted once."""
    pieces = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors}
    return sum(pieces.values())


def moments(found: Learner, gradients: int) -> int:
    """Bytes of the optimizer's state: two of AdamW's for each that trains, or the method's own."""
    optimizer = own_optimizer(found)
    if optimizer is None:
        return 2 * gradients
    for parameter in methods.trainable(found.model).values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return size(x for state in optimizer.state.values() for x in state.values())


def activations(compute: Callable[[], Tensor], held: list[Tensor]) -> int:
    """Bytes that a computation keeps for its backward pass, beside what is held anyway."""
    kept: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    with saved_tensors_hooks(keep, lambda x: x):
        result = compute()  # alive, and with it all that it keeps
    known = {x.untyped_storage()._cdata for x in held}
    found = size(x for x in kept if x.untyped_storage()._cdata not in known)
    del result
    return found
