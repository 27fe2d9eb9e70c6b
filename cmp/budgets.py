"""Compare update methods at equal compute: what a step costs, and how many steps a budget allows.

The unit is memory-adjusted FLOPs (MAFs): the FLOPs of a step times its peak memory divided by that
of full fine-tuning. Both are counted on torch's meta device, which computes nothing. Every caption
is encoded once at the model's full length, so a cost depends on (model, batch, method) and not on
the data. As in the paper, matrix products and convolutions count, including those of attention;
elementwise work does not.
"""

import contextlib
import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from cmp import config, mixtures, models, training
from cmp.config import Method, Model, RunConfig
from cmp.data import Corpus, load_data
from cmp.errors import CmpError, first_line
from cmp.losses import model_loss
from cmp.models import Network
from cmp.registry import Option, get_option
from cmp.sources import is_own
from cmp.training import ForwardOutput, TrainState, UpdateMethod

SLACK = 1e-9
"""Relative rounding error of a sum that does not yet count as an overrun."""


@dataclass(frozen=True)
class Cost:
    """What a method costs.

    Attributes:
        step: FLOPs of one step, forward, backward and optimiser.
        end: FLOPs at the end of each task.
        memory: Bytes at the peak of a step, in fp32.

    Example:
        >>> cost = cmp.step_cost("small", batch=64)
        >>> cost.step > 1e9 and cost.end == 0
        True
    """

    step: float
    end: float
    memory: float


@dataclass(frozen=True)
class Budget:
    """The budget of a task and the costs it pays for, in memory-adjusted FLOPs.

    Attributes:
        allowed: The budget per task.
        step: The cost per step.
        end: The cost at the end of each task.
        multiplier: The memory multiplier applied to the FLOPs.
    """

    allowed: float
    step: float
    end: float
    multiplier: float

    @property
    def steps(self) -> int:
        """Steps per task that fit within the budget after the cost at its end, possibly 0."""
        return max(0, math.floor((self.allowed * (1 + SLACK) - self.end) / self.step))

    def used(self, tasks: int) -> float:
        """Return the cost of a number of tasks with `self.steps` steps each."""
        return tasks * (self.steps * self.step + self.end)


def make_budget(allowed: float, cost: Cost, full: Cost) -> Budget:
    """Return a task's budget.

    Args:
        allowed: Memory-adjusted FLOPs per task.
        cost: What the method costs.
        full: What full fine-tuning costs.
    """
    multiplier = cost.memory / full.memory
    return Budget(allowed, cost.step * multiplier, cost.end * multiplier, multiplier)


def steps_for(budget: float, cost: Cost, full: Cost | None = None) -> int:
    """Return how many steps of a task a budget buys.

    Args:
        budget: Memory-adjusted FLOPs per task.
        cost: What the method costs, see `step_cost`.
        full: What full fine-tuning costs; its memory is the unit. If None, `cost` itself.

    Example:
        >>> full = cmp.step_cost("small", batch=64)
        >>> locked = cmp.step_cost("small", batch=64, method="locked-image")
        >>> cmp.steps_for(40 * full.step, locked, full) > 40
        True
    """
    return make_budget(budget, cost, full or cost).steps


def step_cost(model: str, batch: int, method: str = "full", **settings: Any) -> Cost:
    """Return the cost of a training step, computed from shapes alone.

    Args:
        model: An embedded model, any open_clip architecture, or a model from a hub.
        batch: Samples per step.
        method: The update method.
        **settings: Settings of the method, such as `rank=8`.

    Raises:
        CmpError: The network or the method cannot be created, or a run cannot have this batch.

    Example:
        >>> full = cmp.step_cost("small", batch=64)
        >>> lora = cmp.step_cost("small", batch=64, method="lora", rank=8)
        >>> lora.memory < full.memory
        True
    """
    if not isinstance(model, str):
        raise CmpError("step_cost: model: give a name, such as 'small'")
    tree = {
        "model": {"name": model},
        "training": {"batch": batch},
        "method": {"name": method, **settings},
    }
    return method_cost(config.parse(tree, "step_cost"))


def method_cost(run_config: RunConfig) -> Cost:
    """Return the cost of a run's method; raise `CmpError` if it cannot be created."""
    name, method = run_config.model.name, run_config.method
    option = get_option("method", method.name)
    batch, replayed = run_config.training.batch, replayed_samples(run_config)
    return _method_cost(name, batch, method, replayed, option, option.digest)


def replayed_samples(run_config: RunConfig) -> int:
    """Return how many samples of a run's batch its method takes from the pool: at least one if it
    needs the pool, otherwise 0."""
    batch, option = run_config.training.batch, get_option("method", run_config.method.name)
    replayed, _, _ = mixtures.batch_counts(run_config.mixture, batch, empty_buffer=False)
    return max(1, replayed) * option.facts["needs_pool"]


@functools.cache
def _method_cost(
    name: str, batch: int, method: Method, replayed: int, option: Option, digest: str
) -> Cost:
    """Return the cost of a method. The last two arguments tell redefined methods apart."""
    model = models.create_on_meta(name)
    spare = copy.deepcopy(model)
    state = shape_state(name, method, model)
    with _explain_uncounted(method):
        with FlopCounterMode(display=False) as counter:  # one forward pass, for FLOPs and memory
            loss, activations = _count_saved(
                lambda: total_loss(state, forward_shapes(state, batch, replayed)), _held(state)
            )
            loss.backward()
        optimizer_flops, optimizer_bytes = _optimizer_cost(state)
        step = counter.get_total_flops() + optimizer_flops
        memory = activations + sum(_fixed_account(state, optimizer_bytes).values())
        return Cost(step, _end_flops(spare, name, method, batch), memory)


@contextlib.contextmanager
def _explain_uncounted(method: Method) -> Iterator[None]:
    """Turn the errors of a method from outside the package that needs more than shapes into a
    `CmpError`."""
    try:
        yield
    except (AttributeError, TypeError, RuntimeError) as error:
        if is_own(get_option("method", method.name).module):
            raise
        raise CmpError(
            f"method.name: {method.name!r}: its cost cannot be counted without data "
            f"({first_line(error)}); if it reads `state.corpus` or `state.tokens`, let it do so in "
            "a step, not in `prepare` or `begin_task`, and read no values of tensors, as by "
            "`.item()` or a boolean index"
        ) from error


def shape_state(name: str, method: Method, model: Network) -> TrainState:
    """Return the state of a network that is ready for its first step but has no data.

    Args:
        name: The network's name in the config.
        method: The config section.
        model: The network, prepared in place.

    Raises:
        CmpError: A method from outside the package reads data or values when it is prepared.
    """
    run_config = RunConfig(model=Model(name, "random"), method=method)
    no_data: Any = None  # a step on shapes never reads it
    state = TrainState(run_config, no_data, model.train(), torch.empty(0))
    with _explain_uncounted(method):
        state.method.prepare(state)
        state.method.begin_task(state, 0)
    return state


def forward_shapes(state: TrainState, batch: int, replayed: int = 0) -> ForwardOutput:
    """Run the forward pass on a batch of shapes, or of zeros on a device other than meta."""
    model, device = state.model, state.model.logit_scale.device
    side = model.visual.image_size
    height, width = side if isinstance(side, tuple) else (side, side)
    pixels = torch.zeros(batch, 3, height, width, device=device)
    tokens = torch.zeros(batch, model.context_length, dtype=torch.int64, device=device)
    text = models.encode_text_unpacked(model, tokens)
    has_features = state.method.views(state, 0)
    image = torch.zeros_like(text) if has_features else models.encode_image(model, pixels)
    place = torch.arange(batch, device=device)
    return ForwardOutput(image, text, pixels, tokens, place, replayed)


def total_loss(state: TrainState, output: ForwardOutput) -> Tensor:
    """Return the loss of a batch, summed over all terms."""
    loss = model_loss(state.model, output.image, output.text)
    return sum(state.method.losses(state, output).values(), loss)


def count_flops(call: Callable[[], object]) -> int:
    """Return the FLOPs of a call."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def _optimizer_cost(state: TrainState) -> tuple[float, int]:
    """Return the FLOPs of an optimiser step and the bytes of the optimiser's state.

    Work done every `optimizer.gap` steps, if the optimiser has a gap, is averaged over those steps.
    """
    parameters = training.trainable_parameters(state.model).values()
    if state.method.optimizer(state.config.method) is training.ADAMW:
        return 0.0, 2 * storage_bytes(parameters)  # two moments, and no matrix products
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer = training.create_optimizer(state)
    first, later = count_flops(optimizer.step), count_flops(optimizer.step)
    memory = storage_bytes(x for moments in optimizer.state.values() for x in moments.values())
    return later + (first - later) / getattr(optimizer, "gap", 1), memory


def _end_flops(model: Network, name: str, method: Method, batch: int) -> float:
    """Return the FLOPs at the end of a task: those of one sample times the number of samples. The
    few products between samples are ignored."""
    measures = "batches" in get_option("method", method.name).settings
    batches = method.get("batches") if measures else 1
    one = dataclasses.replace(method, batches=1) if measures else method
    state = shape_state(name, one, model)
    end = state.method.end_task
    if end is UpdateMethod.end_task:
        return 0.0
    flops = count_flops(lambda: end(state, lambda step: forward_shapes(state, 1)))
    return batches * batch * flops


def memory_account(state: TrainState, batch: int, replayed: int = 0) -> dict[str, int]:
    """Return the bytes that a step needs at its peak, by purpose.

    The peak comes once the next loss is computed, while the previous step's gradients still exist.

    Raises:
        CmpError: A method from outside the package reads values in a step.
    """
    with _explain_uncounted(state.config.method):
        _, activations = _count_saved(
            lambda: total_loss(state, forward_shapes(state, batch, replayed)), _held(state)
        )
        return _fixed_account(state, _optimizer_cost(state)[1]) | {"activations": activations}


def _weights(state: TrainState) -> list[Tensor]:
    return [*state.model.parameters(), *state.model.buffers()]


def _method_tensors(state: TrainState) -> list[Tensor]:
    """Return what a method holds beside the model."""
    networks = state.frozen_models.values()
    frozen = [x for each in networks for x in (*each.parameters(), *each.buffers())]
    return [*state.method_state.values(), *frozen]


def _held(state: TrainState) -> list[Tensor]:
    return [*_weights(state), *_method_tensors(state)]


def _fixed_account(state: TrainState, optimizer: int) -> dict[str, int]:
    """Return the bytes that do not depend on the batch, by purpose."""
    return {
        "weights": storage_bytes(_weights(state)),
        "gradients": storage_bytes(training.trainable_parameters(state.model).values()),
        "optimizer": optimizer,
        "method": storage_bytes(_method_tensors(state)),
    }


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of storage behind some tensors, counting shared storage once."""
    pieces = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors}
    return sum(pieces.values())


def _count_saved(compute: Callable[[], Tensor], held: list[Tensor]) -> tuple[Tensor, int]:
    """Return the result of a computation, and the bytes that it saves for its backward pass, other
    than those in `held`."""
    kept: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    with saved_tensors_hooks(keep, lambda x: x):
        result = compute()  # kept alive, along with all that it saves
    known = {x.untyped_storage()._cdata for x in held}
    return result, storage_bytes(x for x in kept if x.untyped_storage()._cdata not in known)


def full_cost(run_config: RunConfig) -> Cost:
    """Return what full fine-tuning costs with the same model and batch."""
    return method_cost(dataclasses.replace(run_config, method=Method()))


def task_budget(run_config: RunConfig) -> Budget | None:
    """Return the budget per task that a config sets, or None."""
    section = run_config.training
    if section.budget is None:
        return None
    full = full_cost(run_config)
    allowed = section.budget * section.steps * full.step
    cost, method, tasks = method_cost(run_config), run_config.method, run_config.stream.tasks
    if method.lock_from:  # the mean step: tasks have as many steps before the tower locks as after
        first = min(method.lock_from, tasks) / tasks
        locked = dataclasses.replace(run_config, method=dataclasses.replace(method, lock_from=None))
        mean = first * cost.step + (1 - first) * method_cost(locked).step
        cost = dataclasses.replace(cost, step=mean)
    cost = dataclasses.replace(cost, end=cost.end + _encoding_flops(run_config))
    return make_budget(allowed, cost, full)


def _encoding_flops(run_config: RunConfig) -> float:
    """Return the FLOPs of encoding the images of a run once in each stored view, as a mean per
    task; 0 if no views are stored."""
    name, tasks = run_config.model.name, run_config.stream.tasks
    state = shape_state(name, run_config.method, models.create_on_meta(name))
    views = state.method.views(state, tasks - 1)
    if not views:
        return 0.0
    pools = mixtures.task_pools(run_config, load_data(run_config.data))
    images = len(np.unique(np.concatenate([each.rows for each in pools])))
    pixels = torch.zeros(1, 3, state.side, state.side, device="meta")
    with torch.no_grad():
        flops = count_flops(lambda: models.encode_image(state.model, pixels))
    return views * images * flops / tasks


def apply_budget(run_config: RunConfig) -> RunConfig:
    """Return the config with its budget replaced by the steps that the budget allows.

    Raises:
        CmpError: The budget does not pay for one step, or the schedule needs more steps.
    """
    multiple, name = run_config.training.budget, run_config.method.name
    budget = task_budget(run_config)
    if budget is None or multiple is None:
        return run_config
    if budget.steps < 1:
        least = multiple * (budget.end + budget.step) / budget.allowed
        raise CmpError(
            f"training.budget: {multiple:g} allows {budget.allowed:.4g} memory-adjusted "
            f"FLOPs per task; one step of {name!r} costs {budget.step:.4g} and the task's end "
            f"{budget.end:.4g}; set it to {_rounded_up(least):.4g} or more"
        )
    tree = run_config.to_dict()
    tree["training"] |= {"steps": budget.steps, "budget": None}
    return config.parse(tree, f"training.budget: {budget.steps} steps of {name!r}")


def _rounded_up(number: float) -> float:
    """Return a positive number rounded up to four digits."""
    unit = 10.0 ** (math.floor(math.log10(number)) - 3)
    return math.ceil(number / unit) * unit


def settle(run_config: RunConfig, corpus: Corpus) -> RunConfig:
    """Return the config that is actually run: with the steps that its budget or its passes give,
    and a mixture that its data can fill."""
    fitted = mixtures.fit_mixture(apply_budget(run_config), corpus)
    return mixtures.fit_steps(fitted, corpus)


def total_steps(run_config: RunConfig) -> int:
    """Return the number of steps of a run over all tasks; `training.passes` is resolved from its
    data."""
    if run_config.training.passes is not None:
        run_config = settle(run_config, load_data(run_config.data))
    return sum(apply_budget(run_config).steps)


def budget_spent(budget: Budget, tasks: int) -> dict[str, float | int]:
    """Return a run's allowed and used compute, in memory-adjusted GFLOPs, for its provenance."""
    return {
        "allowed_gflops": tasks * budget.allowed / 1e9,
        "used_gflops": budget.used(tasks) / 1e9,
        "steps_per_task": budget.steps,
        "memory_multiplier": budget.multiplier,
    }
