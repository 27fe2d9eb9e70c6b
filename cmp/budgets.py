"""Budgets as arithmetic on plain numbers: memory-adjusted FLOPs and the steps that they allow.

MAFs of a step = its FLOPs x (its peak memory / full fine-tuning's) (spec 1.2).
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from cmp import config, mixtures, models
from cmp.config import Method, RunConfig, parse
from cmp.errors import CmpError
from cmp.training import (
    ADAMW,
    ForwardOutput,
    TrainState,
    UpdateMethod,
    create_optimizer,
    method_of,
    model_loss,
    trainable_parameters,
)

SLACK = 1e-9
"""Relative: what rounding may add to a sum before it counts as overrun."""


@dataclass(frozen=True)
class Cost:
    """What a method costs. step: FLOPs of one step; end: FLOPs after a task, once; memory: bytes at
    the peak."""

    step: float
    end: float
    memory: float


@dataclass(frozen=True)
class Budget:
    """What a task may cost and what a method's steps cost of it, all in memory-adjusted FLOPs.

    allowed: a task; step: each; end: once a task, after its steps. multiplier: that the FLOPs were
    adjusted by.
    """

    allowed: float
    step: float
    end: float
    multiplier: float

    @property
    def steps(self) -> int:
        """Steps a task: the most that fit beside what comes at its end; 0 if none does."""
        return max(0, math.floor((self.allowed * (1 + SLACK) - self.end) / self.step))

    def used(self, tasks: int, steps: int = 0) -> float:
        """What so many whole tasks of `self.steps`, and so many steps of the next, have cost."""
        return tasks * (self.steps * self.step + self.end) + steps * self.step

    def check(self, steps: int) -> None:
        """`CmpError` if so many steps of a task, and its end, overrun what is allowed."""
        if (cost := steps * self.step + self.end) > self.allowed * (1 + SLACK):
            raise CmpError(
                f"training.budget: {steps} steps cost {cost:.4g} memory-adjusted FLOPs a task, "
                f"allowed are {self.allowed:.4g}: at most {self.steps} steps"
            )


def make_budget(allowed: float, cost: Cost, full: Cost) -> Budget:
    """A task's budget. allowed: in memory-adjusted FLOPs; full: what full fine-tuning costs."""
    multiplier = cost.memory / full.memory
    return Budget(allowed, cost.step * multiplier, cost.end * multiplier, multiplier)


def paper_steps(total: float, tasks: int, flops: float, multiplier: float) -> int:
    """Steps a task by the paper's rule: rounded, and with whatever comes after a task charged to
    each of its steps. total, flops: in the same unit."""
    return round(total / (tasks * flops * multiplier))


def method_cost(run_config: RunConfig) -> Cost:
    """FLOPs and memory of a run's method, in fp32; `CmpError` for what cannot be made."""
    size, mixture = run_config.training.batch, run_config.mixture
    replayed, _, _ = mixtures.batch_counts(mixture, size, empty_buffer=False)
    # of all others a method's cost does not depend on what the mixture is
    replayed = replayed if run_config.method.name == "distillation" else 0
    return _method_cost(run_config.model.name, size, run_config.method, replayed)


@functools.cache
def _method_cost(name: str, batch: int, method: Method, replayed: int) -> Cost:
    found = shape_state(name, method, models.create_on_meta(name))
    look = functools.partial(forward_shapes, found, batch, replayed)
    flops = count_flops(lambda: forward_backward(found, look))
    memory = sum(memory_account(found, look).values())
    return Cost(flops + optimizer_flops(found), end_flops(name, method, batch), memory)


def shape_state(name: str, method: Method, model: nn.Module) -> TrainState:
    """A network that is ready for its first step, but has no data."""
    run_config = config.parse({"model": {"name": name, "start": "random"}}, "cmpt budget")
    run_config = dataclasses.replace(run_config, method=method)
    found = TrainState(run_config, None, model.train(), torch.empty(0))
    method_of(run_config).prepare(found)
    method_of(run_config).begin_task(found, 0)
    return found


def forward_shapes(found: TrainState, batch: int, replayed: int = 0) -> ForwardOutput:
    """A batch of shapes, or on another device of zeros, through the network."""
    model, device = found.model, found.model.logit_scale.device
    side = model.visual.image_size
    height, width = side if isinstance(side, tuple) else (side, side)
    pixels = torch.zeros(batch, 3, height, width, device=device)
    length = models.context_length(model)
    tokens = torch.zeros(batch, length, dtype=torch.int64, device=device)
    image = models.encode_image(model, pixels)
    text = models.encode_text_unpacked(model, tokens)
    place = torch.arange(batch, device=device)
    return ForwardOutput(pixels, tokens, place, image, text, replayed)


def total_loss(found: TrainState, seen: ForwardOutput) -> Tensor:
    """The loss of a batch, all terms."""
    terms = method_of(found.config).losses(found, seen)
    contrastive = model_loss(found.model, seen.image, seen.text)
    return sum(terms.values(), contrastive)


def forward_backward(found: TrainState, look: Callable[[], ForwardOutput]) -> None:
    """Forward and backward."""
    total_loss(found, look()).backward()


def count_flops(call: Callable[[], object]) -> int:
    """FLOPs of what is called."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def own_optimizer(found: TrainState) -> torch.optim.Optimizer | None:
    """The method's own optimizer; none where that is AdamW, which multiplies no matrices."""
    own = method_of(found.config).optimizer(found.config.method) is not ADAMW
    return create_optimizer(found) if own else None


def optimizer_flops(found: TrainState) -> float:
    """Of the optimizer's step, from gradients at hand; what it does at times only is shared out."""
    optimizer = own_optimizer(found)
    if optimizer is None:
        return 0.0
    first, later = count_flops(optimizer.step), count_flops(optimizer.step)
    return later + (first - later) / found.config.method.get("gap")


def end_flops(name: str, method: Method, batch: int) -> float:
    """After a task, once: of one sample, times samples; the few products between samples are left
    out."""
    measures = "batches" in config.METHOD_SETTINGS.get(method.name, {})
    batches = method.get("batches") if measures else 1
    one = dataclasses.replace(method, batches=1) if measures else method
    found = shape_state(name, one, models.create_on_meta(name))
    look = functools.partial(forward_shapes, found, 1)
    end = method_of(found.config).end_task
    if end is UpdateMethod.end_task:
        return 0.0
    return batches * batch * count_flops(lambda: end(found, lambda number: (None, look())))


def memory_account(found: TrainState, look: Callable[[], ForwardOutput]) -> dict[str, int]:
    """Bytes that a step holds at its peak, by what they are for: when the next loss has been
    computed, and the gradients of the step before are not yet given up."""
    trainable = list(trainable_parameters(found.model).values())
    held = [*found.model.parameters(), *found.model.buffers()]
    beside = list(found.state.values())
    for network in found.aside.values():
        beside += [*network.parameters(), *network.buffers()]
    kept = activation_bytes(lambda: total_loss(found, look()), [*held, *beside])
    gradients = storage_bytes(trainable)
    return {
        "weights": storage_bytes(held),
        "gradients": gradients,
        "optimizer": moment_bytes(found, gradients),
        "method": storage_bytes(beside),
        "activations": kept,
    }


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the memory behind some tensors, each piece counted once."""
    pieces = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors}
    return sum(pieces.values())


def moment_bytes(found: TrainState, gradients: int) -> int:
    """Bytes of the optimizer's state: two of AdamW's for each that trains, or the method's own."""
    optimizer = own_optimizer(found)
    if optimizer is None:
        return 2 * gradients
    for parameter in trainable_parameters(found.model).values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return storage_bytes(x for state in optimizer.state.values() for x in state.values())


def activation_bytes(compute: Callable[[], Tensor], held: list[Tensor]) -> int:
    """Bytes that a computation keeps for its backward pass, beside what is held anyway."""
    kept: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    with saved_tensors_hooks(keep, lambda x: x):
        result = compute()  # alive, and with it all that it keeps
    known = {x.untyped_storage()._cdata for x in held}
    found = storage_bytes(x for x in kept if x.untyped_storage()._cdata not in known)
    del result
    return found


def full_cost(config: RunConfig) -> Cost:
    """What full fine-tuning costs with the same model and batch."""
    return method_cost(dataclasses.replace(config, method=Method()))


def task_budget(config: RunConfig) -> Budget | None:
    """The budget that a config sets each task; none where it sets none."""
    training = config.training
    if training.budget is None:
        return None
    full = full_cost(config)
    allowed = training.budget * training.steps * full.step
    return make_budget(allowed, method_cost(config), full)


def apply_budget(config: RunConfig) -> RunConfig:
    """The config with the steps that its budget allows, and no budget; as it is without one.

    `CmpError`, with numbers, where not one step is allowed or the schedule wants more steps.
    """
    found = task_budget(config)
    if found is None:
        return config
    training, name = config.training, config.method.name
    if found.steps < 1:
        least = training.budget * (found.end + found.step) / found.allowed
        raise CmpError(
            f"training.budget: {training.budget:g} allows {found.allowed:.4g} memory-adjusted "
            f"FLOPs a task; one step of {name!r} costs {found.step:.4g} and the task's end "
            f"{found.end:.4g}, which takes a budget of {least:.4g}"
        )
    tree = config.to_dict()
    tree["training"] |= {"steps": found.steps, "budget": None}
    return parse(tree, f"training.budget: {found.steps} steps of {name!r}")


def budget_spent(found: Budget, tasks: int) -> dict[str, float | int]:
    """What a run of so many tasks was allowed and has used, for its provenance, in memory-adjusted
    GFLOPs."""
    return {
        "allowed_gflops": tasks * found.allowed / 1e9,
        "used_gflops": found.used(tasks) / 1e9,
        "steps_per_task": found.steps,
        "memory_multiplier": found.multiplier,
    }


def measured_memory(config: RunConfig) -> float:
    """Bytes at the peak of two steps on this machine's CUDA card, in fp32, as torch counts them."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    name, size = config.model.name, config.training.batch
    found = shape_state(name, config.method, models.create_model(name).cuda())
    replayed = size // 3 if config.method.name == "distillation" else 0
    optimizer = create_optimizer(found)
    for _ in range(2):
        value = total_loss(found, forward_shapes(found, size, replayed))
        optimizer.zero_grad()
        value.backward()
        method_of(found.config).step(found, optimizer)
    return torch.cuda.max_memory_allocated()
