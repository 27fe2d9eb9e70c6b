"""Training: one step, the loop over a task, and what a step needs.

`train_step` is one optimisation step, top to bottom. `train_task` is the loop around it. What a
step needs is in a `TrainState`; an `UpdateMethod` changes a step by its hooks, and an `Execution`
says how it is computed: here one batch at a time, on one device. `cmp.scale` has other ways.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cmp import config as configs
from cmp import models, schedules
from cmp.arithmetic import autocast, bf16_products
from cmp.config import Optimizer, RunConfig
from cmp.data import WHOLE_BATCH, Batch, Corpus, augment, normalise, to_device
from cmp.errors import CmpError, Diverged
from cmp.losses import model_loss, uses_sigmoid_loss
from cmp.mixtures import BatchLoader, Pools
from cmp.models import Network, batch_norms, set_train_mode
from cmp.registry import get_option
from cmp.seeds import torch_generator


def train_step(
    state: TrainState,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    task: int,
    step: int,
    rate: float,
) -> StepResult:
    """Take one optimisation step and return its loss and gradient norm.

    Args:
        state: The network and all that belongs to it, changed in place.
        optimizer: The optimiser.
        batch: The batch of (task, step).
        task: The task's number, from 0.
        step: The step within the task, from 0.
        rate: The learning rate.

    Raises:
        Diverged: The loss or the gradient is not finite, and the weights are as before the step.
            Where checks are deferred, as on a card, it may be the step before that was not finite.

    Example:
        >>> state = cmp.make_train_state(cmp.RunConfig(), cmp.load_data("embedded"))
        >>> pools = cmp.task_pools(state.config, state.corpus)
        >>> batch, optimizer = state.loader.batch(pools[0], 0, 0), cmp.create_optimizer(state)
        >>> result = cmp.train_step(state, optimizer, batch, task=0, step=0, rate=1e-3)
    """
    model, method, execution = state.model, state.method, state.execution
    optimizer.zero_grad()
    seen = execution.encode(state, batch, task, step)  # both towers: unit features [B, E]
    terms = {"contrastive": model_loss(model, seen.image, seen.text)} | method.losses(state, seen)
    loss = functools.reduce(torch.add, terms.values())
    with bf16_products(loss.device):
        loss.backward()
        seen.finish_backward()
    method.after_backward(state)
    norm = nn.utils.clip_grad_norm_(model.parameters(), state.config.optimizer.clip)
    report = functools.partial(divergence_error, batch, task, step, terms, norm, rate)
    execution.check(optimizer, loss.isfinite() & norm.isfinite(), report)
    for group in optimizer.param_groups:
        group["lr"] = rate
    method.step(state, optimizer)
    clamp_logit_scale(model)
    return StepResult(loss.detach(), norm, rate)


def train_task(
    state: TrainState,
    pools: Pools,
    task: int,
    after_step: Callable[[int, StepResult], None] = lambda step, result: None,
    optimizer: torch.optim.Optimizer | None = None,
    first: int = 0,
) -> None:
    """Train a network in place through one task, or through what is left of it.

    Over all tasks in order this trains as `cmp.run` does, to the bit, where the config has no
    budget, merges no weights and its schedule is not one curve over the stream.

    Args:
        state: The network and all that belongs to it.
        pools: What the task may draw from.
        task: The task's number, from 0.
        after_step: Called with (step, result) after each step.
        optimizer: Another optimiser; where None the state's own, whose moments go on from task to
            task if the config says so.
        first: The step to go on from.

    Raises:
        Diverged: A loss or gradient is not finite, or the task ends in weights that are not.

    Example:
        >>> config = cmp.RunConfig(training=cmp.Training(steps=2, batch=8))
        >>> state = cmp.make_train_state(config, cmp.load_data("embedded"))
        >>> for task, pools in enumerate(cmp.task_pools(config, state.corpus)):
        ...     cmp.train_task(state, pools, task)
    """
    config, method, execution = state.config, state.method, state.execution
    steps = config.steps[task]
    rates = schedules.task_rates(config.schedule, config.steps, task)
    own_samples = execution.own_samples(sum(pools.counts))
    set_train_mode(state.model)
    if first == 0 and not config.carries_moments:
        vars(state).pop("optimizer", None)
    optimizer = optimizer or state.optimizer
    if first == 0:
        with execution.outside_steps():
            method.begin_task(state, task)
    for step in range(first, steps):
        batch = state.loader.batch(pools, task, step, own_samples)
        after_step(step, train_step(state, optimizer, batch, task, step, rates[step]))

    def encode_further(number: int) -> ForwardOutput:
        batch = state.loader.batch(pools, task, steps + number)
        return encode_batch(state, batch, task, steps + number)

    execution.wait()
    for layer in batch_norms(state.model):  # a measurement leaves their statistics alone
        layer.eval()
    with execution.outside_steps():
        method.end_task(state, encode_further)
    check_weights_finite(state, task, steps)


@dataclass(frozen=True)
class Features:
    """The features of a batch.

    Attributes:
        image: Unit image features, [B, E].
        text: Unit text features, [B, E].
    """

    image: Tensor
    text: Tensor

    def finish_backward(self) -> None:
        """Finish a backward pass through the features. Nothing is left to do where they are part of
        one graph with the weights."""


@dataclass(frozen=True)
class ForwardOutput(Features):
    """What the network saw of a batch, and the features it gave.

    Attributes:
        image: Unit image features, [B, E].
        text: Unit text features, [B, E].
        pixels: Augmented and normalised images, [B, 3, H, W].
        tokens: Tokens of the distinct captions, [D, L].
        place: Each sample's caption among them, [B].
        replayed: How many samples at the end come from the pretraining pool.

    Example:
        >>> def losses(state, output):  # of a method: keep features of replayed samples small
        ...     first = len(output.image) - output.replayed
        ...     return {"small": output.image[first:].square().mean()}
        >>> method = cmp.UpdateMethod(losses=losses)
    """

    pixels: Tensor
    tokens: Tensor
    place: Tensor
    replayed: int = 0


class StepResult(NamedTuple):
    """The numbers of one step; they stay on the device, so that nothing waits for it.

    Attributes:
        loss: Before the step.
        gradient_norm: Before clipping.
        rate: The learning rate.

    Example:
        >>> cmp.StepResult(torch.tensor(2.0), torch.tensor(0.5), rate=1e-3).rate
        0.001
    """

    loss: Tensor
    gradient_norm: Tensor
    rate: float


class Execution:
    """How steps are computed: a batch at a time, on one device, by one process.

    `cmp.scale.execution.ExecutionConfig` overrides what micro-batches, several processes, compiled
    towers and checks that wait for no card do differently.
    """

    sees_whole_batch = True
    """Whether a step sees its whole batch at once."""

    def prepare(self, state: TrainState) -> None:
        """Make a network ready, before its method prepares it.

        Raises:
            CmpError: Several processes compute this run; each would train by itself.
        """
        processes = torch.distributed
        is_shared = processes.is_available() and processes.is_initialized()
        if is_shared and processes.get_world_size() > 1:
            raise CmpError(
                "make_train_state: several processes compute this run; give "
                "execution=cmp.scale.execution.ExecutionConfig()"
            )

    def own_samples(self, batch: int) -> slice:
        """Return which of the samples of a batch this process loads."""
        return WHOLE_BATCH

    def encode(self, state: TrainState, batch: Batch, task: int, step: int) -> Features:
        """Return the features of a batch, from which its loss is computed."""
        return encode_batch(state, batch, task, step)

    def check(
        self, optimizer: torch.optim.Optimizer, finite: Tensor, report: Callable[[], Diverged]
    ) -> None:
        """Raise the error that `report` returns unless a step is finite, before it is taken."""
        if not finite:
            raise report()

    def wait(self) -> None:
        """Wait until the last step has been checked."""

    def outside_steps(self) -> contextlib.AbstractContextManager:
        """Return the context of all that is computed between training steps."""
        return contextlib.nullcontext()


EncodeFurther = Callable[[int], ForwardOutput]
OptimizerFactory = Callable[..., torch.optim.Optimizer]
ADAMW = functools.partial(torch.optim.AdamW, fused=True)


@dataclass(frozen=True)
class UpdateMethod:
    """An update method; a hook that is left out does nothing.

    Attributes:
        prepare: (state), once, before anything is restored: chooses what trains, adds to the
            network, fills `method_state`; draws by `cmp.seeds` only.
        begin_task: (state, task), before the task's first step, whatever weights it starts from.
        losses: (state, output), after each forward pass: terms by name that are added to the
            contrastive loss. When a batch is seen in parts, `output` has its features only.
        whole_batch_reason: (section) -> why the method needs the whole batch at once, or "". A
            method with `losses` that does not say is taken to need it.
        optimizer: (section) -> a function that takes AdamW's arguments.
        after_backward: (state), when the gradients are there, before they are clipped.
        step: (state, optimizer), when they are clipped.
        end_task: (state, encode_further), after the task's last step; `encode_further(n)` passes
            further batches of the task through the network, n = 0, 1, ... Batch norms use their
            statistics there and leave them alone.

    Example:
        >>> def freeze_text(state):
        ...     state.model.transformer.requires_grad_(False)
        >>> _ = cmp.register("method", "freeze-text")(cmp.UpdateMethod(prepare=freeze_text))
    """

    prepare: Callable[[TrainState], None] = lambda state: None
    begin_task: Callable[[TrainState, int], None] = lambda state, task: None
    losses: Callable[[TrainState, Any], dict[str, Tensor]] = lambda state, output: {}
    whole_batch_reason: Callable[[configs.Method], str] | None = None
    optimizer: Callable[[configs.Method], OptimizerFactory] = lambda section: ADAMW
    after_backward: Callable[[TrainState], None] = lambda state: None
    step: Callable[[TrainState, torch.optim.Optimizer], None] = lambda state, opt: opt.step()
    end_task: Callable[[TrainState, EncodeFurther], None] = lambda state, encode_further: None


@dataclass(frozen=True)
class TrainState:
    """A network as one run trains it.

    Attributes:
        config: The run's config.
        corpus: The run's data.
        model: The network.
        tokens: Tokens of every caption of the corpus, [texts, L].
        method_state: What the method carries from step to step beside weights and moments, by
            name. It is saved and restored with them, so it never holds views of weights.
        frozen_models: Other networks that the method looks at. They are functions of the weights
            that the run starts from, and so not saved.
        execution: How a step is computed.

    Example:
        >>> state = cmp.make_train_state(cmp.RunConfig(), cmp.load_data("embedded"))
        >>> state.config.method.name, state.method_state
        ('full', {})
    """

    config: RunConfig
    corpus: Corpus
    model: Network
    tokens: Tensor
    method_state: dict[str, Tensor] = field(default_factory=dict)
    frozen_models: dict[str, Network] = field(default_factory=dict)
    execution: Execution = field(default_factory=Execution)

    @functools.cached_property
    def loader(self) -> BatchLoader:
        """Where batches come from."""
        device = self.model.logit_scale.device
        side = models.preprocessing(self.model).size
        return BatchLoader(self.config, self.corpus, side, device)

    @functools.cached_property
    def method(self) -> UpdateMethod:
        """The update method."""
        value = get_option("method", self.config.method.name).value
        return value if isinstance(value, UpdateMethod) else UpdateMethod(prepare=value)

    @functools.cached_property
    def optimizer(self) -> torch.optim.Optimizer:
        """What takes the steps: fresh at the start of a run, and of each task that carries no
        moments."""
        return create_optimizer(self)


def make_train_state(
    config: RunConfig,
    corpus: Corpus,
    model: Network | None = None,
    device: str | torch.device = "cpu",
    execution: Execution | None = None,
) -> TrainState:
    """Return a network that is ready for the first step of a run.

    Args:
        config: The run's config.
        corpus: The run's data.
        model: Trained in place, its attention split; the weights that `config.model` names where
            None.
        device: Where the network lives.
        execution: How a step is computed, such as a `cmp.scale.execution.ExecutionConfig`; where
            None a batch at a time, by this process alone.

    Raises:
        CmpError: The model takes images of another size than the data's, cannot be loaded, or
            cannot be computed in this way.

    Example:
        >>> config = cmp.RunConfig(method=cmp.Method("bitfit"))
        >>> state = cmp.make_train_state(config, cmp.load_data("embedded"))
        >>> sum(p.requires_grad for p in state.model.parameters()) < 60
        True
    """
    execution = execution or Execution()
    model = (model or models.load_model(config.model, config.seeds.init)).to(device)
    models.split_attention(model)
    corpus.check_side(models.preprocessing(model).size, config.model.name)
    tokens = models.tokenize(config.model.name, tuple(corpus.texts))
    state = TrainState(config, corpus.on(device), model, tokens, execution=execution)
    if not execution.sees_whole_batch and (why := whole_batch_reason(state)):
        raise CmpError(
            f"method.name: {config.method.name!r} {why}; leave out --micro-batch and compute in "
            "one process, or choose another method"
        )
    execution.prepare(state)
    state.method.prepare(state)
    set_train_mode(model)
    return state


def whole_batch_reason(state: TrainState) -> str:
    """Return why the method of a run needs the whole batch at once, "" if it does not."""
    method = state.method
    if method.whole_batch_reason:
        return method.whole_batch_reason(state.config.method)
    has_losses = method.losses is not UpdateMethod.losses
    return "has losses that may look at the whole batch" if has_losses else ""


def encode_batch(
    state: TrainState, batch: Batch, task: int, step: int, part: tuple[int, int] | None = None
) -> ForwardOutput:
    """Pass the batch of (task, step) through both towers of the network, its images augmented.

    Args:
        state: The network and its run; each distinct caption is encoded once and then gathered.
        batch: The samples.
        task: The task's number, from 0.
        step: The step within the task, from 0.
        part: Where these samples are some of a batch: (number of the first, number in all).
    """
    model, config = state.model, state.config
    device = model.logit_scale.device
    generator = torch_generator("augment", config.seeds.augment, task, step)
    pixels = augment(to_device(batch.images, device), generator, part)
    pixels = normalise(pixels, model.visual.image_mean, model.visual.image_std)
    distinct, place = batch.texts.unique(return_inverse=True)
    distinct, place = state.tokens[distinct], to_device(place, device)
    with autocast(config.training.precision, device):
        image = models.encode_image(model, pixels)  # [B, E]
        text = models.encode_text(model, distinct)[place]  # [D, E] -> [B, E]
    return ForwardOutput(image, text, pixels, distinct, place, batch.replayed)


def create_optimizer(state: TrainState) -> torch.optim.Optimizer:
    """Return a fresh optimiser over what trains: AdamW, or the method's own.

    Example:
        >>> state = cmp.make_train_state(cmp.RunConfig(), cmp.load_data("embedded"))
        >>> type(cmp.create_optimizer(state)).__name__
        'AdamW'
    """
    factory = state.method.optimizer(state.config.method)
    return build_adamw(state.model, state.config.optimizer, factory)


def build_adamw(
    model: nn.Module, config: Optimizer, factory: OptimizerFactory = ADAMW
) -> torch.optim.Optimizer:
    """Return AdamW over what trains; it decays matrices only, not biases, norms or logit scale.

    Args:
        model: The network.
        config: The config section.
        factory: Another optimiser that takes AdamW's arguments.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return factory(groups, lr=0.0, betas=(config.beta1, config.beta2), eps=config.eps)


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return what trains, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def clamp_logit_scale(model: Network) -> None:
    """Keep the logit scale within CLIP's bounds, in place; a sigmoid loss has no such bounds."""
    if not uses_sigmoid_loss(model):
        model.logit_scale.clamp_(0, models.MAX_LOGIT_SCALE)


def check_weights_finite(state: TrainState, task: int, steps: int) -> None:
    """Check weights that are kept or scored; during a task the next loss would tell.

    Args:
        state: The network and all that belongs to it.
        task: The task's number.
        steps: Steps of the task that are done.

    Raises:
        Diverged: They are not finite, or the last step was not.
    """
    state.execution.wait()
    with torch.no_grad():
        if nn.utils.get_total_norm(state.model.parameters()).isfinite():
            return
    raise Diverged(
        f"training diverged: weights are not finite after {steps} steps of task {task}; lower "
        "schedule.peak",
        {"task": task, "step": steps - 1, "weights": "not finite"},
    )


def divergence_error(
    batch: Batch, task: int, step: int, terms: dict[str, Tensor], norm: Tensor, rate: float
) -> Diverged:
    """Return the error of a step whose loss or gradient is not finite, with a report of it."""
    loss = sum(term.item() for term in terms.values())
    report = {
        "task": task,
        "step": step,
        "loss": {name: str(term.item()) for name, term in terms.items()},
        "gradient_norm": str(norm.item()),
        "learning_rate": rate,
        "samples": batch.rows.tolist(),
    }
    return Diverged(
        f"training diverged at task {task}, step {step}: loss {loss:g}, gradient norm "
        f"{norm.item():g}, learning rate {rate:g}; lower schedule.peak or optimizer.clip",
        report,
    )
