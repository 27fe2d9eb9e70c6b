"""Train a network: one step, the loop over a task, and the state of a run.

`train_step` is one optimisation step, from top to bottom. `train_task` is the loop around it. A
`TrainState` contains what a step needs, an `UpdateMethod` changes the step through its hooks, and
an `Execution` computes it: here one batch at a time, on one device. `cmp.scale` has other
executions.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cmp import config as configs
from cmp import models, schedules
from cmp.arithmetic import autocast, bf16_products
from cmp.config import RunConfig
from cmp.data import NOISE, WHOLE_BATCH, Batch, Corpus, augment, normalise, to_device, to_rgb
from cmp.errors import CmpError, Diverged
from cmp.losses import model_loss, uses_sigmoid_loss
from cmp.mixtures import Pools, fit_mixture, fit_steps, make_batch
from cmp.models import Network, batch_norms, set_train_mode
from cmp.registry import get_option
from cmp.seeds import numpy_generator, seed_layers, torch_generator
from cmp.stored_features import StoredFeatures, store_features


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
        state: The network and its run, changed in place.
        optimizer: The optimiser, usually `state.optimizer`, whose moments checkpoints save.
        batch: The batch of (task, step).
        task: The task's number, from 0.
        step: The step within the task, from 0.
        rate: The learning rate.

    Raises:
        Diverged: The loss or the gradient is not finite; the weights are unchanged. If checks are
            deferred, as on a GPU, the error may be about the previous step.

    Example:
        >>> state = cmp.make_train_state(cmp.RunConfig(), cmp.load_data("embedded"))
        >>> pools = cmp.task_pools(state.config, state.corpus)
        >>> batch, optimizer = next(state.batches(pools[0], 0, [0])), cmp.create_optimizer(state)
        >>> result = cmp.train_step(state, optimizer, batch, task=0, step=0, rate=1e-3)
    """
    model, method, execution = state.model, state.method, state.execution
    optimizer.zero_grad()
    features = execution.encode(state, batch, task, step)  # unit features of both towers, [B, E]
    terms = {"contrastive": execution.loss(model, features)} | method.losses(state, features)
    loss = functools.reduce(torch.add, terms.values())
    with bf16_products(state.config.training.precision, loss.device):
        loss.backward()
        features.finish_backward()
    method.after_backward(state)
    norm = execution.clip(optimizer, model.parameters(), state.config.optimizer.clip)
    report = functools.partial(divergence_error, batch, task, step, terms, norm, rate)
    execution.check(state, optimizer, loss.isfinite() & norm.isfinite(), report)
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("multiple", 1.0)
    method.step(state, optimizer)
    clamp_logit_scale(model)
    return StepResult(loss.detach(), norm, rate, len(batch.rows))


def train_task(
    state: TrainState,
    pools: Pools,
    task: int,
    after_step: Callable[[int, StepResult], None] = lambda step, result: None,
    first: int = 0,
) -> None:
    """Train a network in place on one task, or on the rest of it.

    Called for all tasks in order, this gives exactly the weights of `cmp.run`, provided that the
    config sets no budget, does not merge weights, and its schedule is not one curve over the
    stream.

    Args:
        state: The network and its run.
        pools: The pools that the task may draw from.
        task: The task's number, from 0.
        after_step: Called with (step, result) after each step.
        first: The step to start from.

    Raises:
        Diverged: A loss, a gradient or the final weights are not finite.

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
        state.renew_optimizer()
    with execution.outside_steps():
        if first == 0:
            method.begin_task(state, task)
        state.store_features(pools, task)
    todo = range(first, steps)
    for step, batch in zip(todo, state.batches(pools, task, todo, own_samples), strict=True):
        after_step(step, train_step(state, state.optimizer, batch, task, step, rates[step]))

    def encode_further(number: int) -> ForwardOutput:
        [batch] = state.batches(pools, task, [steps + number])
        return encode_batch(state, batch, task, steps + number)

    execution.wait(state)
    for layer in batch_norms(state.model):  # a measurement must not change their statistics
        layer.eval()
    with execution.outside_steps(), state.layer_noise(task, "end"):
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
        """Finish the backward pass through the features. There is nothing to do if they share one
        graph with the weights."""


@dataclass(frozen=True)
class ForwardOutput(Features):
    """The network's inputs for a batch, and the resulting features.

    Attributes:
        image: Unit image features, [B, E].
        text: Unit text features, [B, E].
        pixels: Augmented and normalised images, [B, 3, H, W]; empty if features are stored.
        tokens: Tokens of the distinct captions, [D, L].
        place: The index of each sample's caption in `tokens`, [B].
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
    """The result of a step. The tensors stay on the device, so that the host does not wait.

    Attributes:
        loss: The loss before the step, [].
        gradient_norm: The norm of the gradient before clipping, [].
        rate: The learning rate.
        samples: The samples in the batch.

    Example:
        >>> cmp.StepResult(torch.tensor(2.0), torch.tensor(0.5), rate=1e-3).rate
        0.001
    """

    loss: Tensor
    gradient_norm: Tensor
    rate: float
    samples: int = 0


class Execution:
    """How steps are computed: one batch at a time, on one device, in one process.

    `cmp.scale.execution.ExecutionConfig` overrides this for micro-batches, several processes,
    compiled towers and deferred checks.
    """

    sees_whole_batch = True
    """Whether a step sees its whole batch at once."""

    def prepare(self, state: TrainState) -> None:
        """Prepare a network before its method does.

        Raises:
            CmpError: There are several processes, and each would train separately.
        """
        processes = torch.distributed
        is_shared = processes.is_available() and processes.is_initialized()
        if is_shared and processes.get_world_size() > 1:
            raise CmpError(
                "make_train_state: several processes would each train separately; give "
                "execution=cmp.scale.execution.ExecutionConfig()"
            )

    def own_samples(self, batch: int) -> slice:
        """Return the samples of a batch that this process loads."""
        return WHOLE_BATCH

    def encode(self, state: TrainState, batch: Batch, task: int, step: int) -> Features:
        """Return the features of a batch."""
        return encode_batch(state, batch, task, step)

    def loss(self, model: Network, features: Features) -> Tensor:
        """Return the loss that the network was pretrained with."""
        return model_loss(model, features.image, features.text)

    def clip(
        self, optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], most: float
    ) -> Tensor:
        """Clip gradients to a norm of at most `most`, and return the original norm."""
        return nn.utils.clip_grad_norm_(parameters, most)

    def check(
        self, state: TrainState, optimizer: torch.optim.Optimizer, finite: Tensor, report: Report
    ) -> None:
        """Raise the error that `report` returns if a step is not finite, before taking it."""
        if not finite:
            raise report()

    def wait(self, state: TrainState) -> None:
        """Wait until the last step has been checked."""

    def outside_steps(self) -> contextlib.AbstractContextManager:
        """Return the context for everything computed between training steps."""
        return contextlib.nullcontext()


Report = Callable[[], Diverged]
"""Returns the error about a step that is not finite."""
UncheckedStep = tuple[Callable[[], Tensor], Report]
"""For a step, a function that waits for whether it was finite, and its report."""
EncodeFurther = Callable[[int], ForwardOutput]
OptimizerFactory = Callable[..., torch.optim.Optimizer]
ADAMW = functools.partial(torch.optim.AdamW, fused=True)


@dataclass(frozen=True)
class UpdateMethod:
    """An update method. Hooks that are not given do nothing.

    Attributes:
        prepare: (state), called once, before anything is restored. It selects the trainable
            parameters, adds modules and fills `method_state`; random draws must use `cmp.seeds`.
        begin_task: (state, task), called before the task's first step, with the weights in place.
        losses: (state, output) -> terms by name to add to the contrastive loss, called after each
            forward pass. If the batch is processed in parts, `output` has only its features.
        whole_batch_reason: (section) -> why the method needs the whole batch at once, or "". A
            method with `losses` but without this hook is assumed to need it.
        optimizer: (section) -> a function with AdamW's arguments that returns an optimiser.
        views: (state, task) -> how many views of each image are encoded once and stored, for a task
            that does not train the image tower; 0 if the tower runs at every step.
        rates: (state) -> multiples of the learning rate by parameter name; 1 if not given.
        after_backward: (state), called before the gradients are clipped.
        step: (state, optimizer), called after clipping, to take the optimiser's step. On a GPU, the
            optimiser clips within its step.
        end_task: (state, encode_further), called after the task's last step. `encode_further(n)`
            encodes further batches of the task, n = 0, 1, ..., without changing the statistics of
            batch norms.

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
    views: Callable[[TrainState, int], int] = lambda state, task: 0
    rates: Callable[[TrainState], dict[str, float]] = lambda state: {}
    after_backward: Callable[[TrainState], None] = lambda state: None
    step: Callable[[TrainState, torch.optim.Optimizer], None] = lambda state, opt: opt.step()
    end_task: Callable[[TrainState, EncodeFurther], None] = lambda state, encode_further: None


@dataclass
class TrainState:
    """A network in training, and the run that it belongs to.

    Attributes:
        config: The run's config.
        corpus: The run's data.
        model: The network.
        tokens: Tokens of every caption of the corpus, [texts, L].
        method_state: Tensors that the method keeps between steps besides weights and moments, by
            name. They are saved and restored, so they must not be views of weights.
        frozen_models: Other networks that the method uses. They depend only on the weights that the
            run starts from, so they are not saved.
        execution: How a step is computed.
        stored_features: Image features that steps read instead of running the image tower.
        unchecked: The steps that are not known to be finite yet, if checks are deferred.

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
    stored_features: StoredFeatures | None = field(default=None, repr=False)
    unchecked: list[UncheckedStep] = field(default_factory=list, repr=False)

    @functools.cached_property
    def side(self) -> int:
        """Pixels per side of the images that the network takes."""
        return models.preprocessing(self.model).size

    def batches(
        self, pools: Pools, task: int, steps: Sequence[int], local: slice = WHOLE_BATCH
    ) -> Iterator[Batch]:
        """Return the batches of some steps of a task, with the images of its `local` samples, or
        with none if their features are stored. They are prepared ahead of their step if images
        must be decoded."""
        corpus = self.corpus
        if not (isinstance(corpus.images, Tensor) or self.config.training.augment):
            images = corpus.images.at(models.preprocessing(self.model))
            corpus = dataclasses.replace(corpus, images=images)
        if self.stored_features:
            local = slice(0, 0)
        make = functools.partial(
            make_batch, self.config, corpus, pools, task, side=self.side, local=local
        )
        if isinstance(corpus.images, Tensor) or self.stored_features:
            return map(make, steps)
        return corpus.images.ahead(make, steps, self.model.logit_scale.device)

    def store_features(self, pools: Pools, task: int) -> None:
        """Encode the images of a task whose features its steps read, if its method says so."""
        if views := self.method.views(self, task):
            self.stored_features = store_features(
                self.config, self.corpus, self.model, pools.rows, views, self.stored_features
            )

    @functools.cached_property
    def method(self) -> UpdateMethod:
        """The update method of the run."""
        value = get_option("method", self.config.method.name).value
        return value if isinstance(value, UpdateMethod) else UpdateMethod(prepare=value)

    @functools.cached_property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimiser of the run, created when it is first needed. Its moments carry over from
        task to task if the config says so."""
        return create_optimizer(self)

    @functools.cached_property
    def has_random_layers(self) -> bool:
        """Whether layers of the network are random in training, such as DropPath."""
        return models.has_random_layers(self.model)

    def layer_noise(self, task: int, step: int | str) -> contextlib.AbstractContextManager:
        """Return the context in which random layers draw what belongs to (task, step)."""
        if not self.has_random_layers:
            return contextlib.nullcontext()
        device = self.model.logit_scale.device
        return seed_layers(device, "layers", self.config.seeds.augment, task, step)

    def renew_optimizer(self) -> None:
        """Forget the optimiser and its moments, so that the next step begins a new one."""
        vars(self).pop("optimizer", None)


def make_train_state(
    config: RunConfig,
    corpus: Corpus,
    model: Network | None = None,
    device: str | torch.device = "cpu",
    execution: Execution | None = None,
) -> TrainState:
    """Return the state of a network that is ready for the first step of a run.

    Args:
        config: The run's config. The state has the steps that `training.passes` gives with this
            data.
        corpus: The run's data.
        model: The network, trained in place with its attention split. If None, the network and
            weights that `config.model` names.
        device: The device of the network.
        execution: How steps are computed, such as a `cmp.scale.execution.ExecutionConfig`. If None,
            one batch at a time, in this process only.

    Raises:
        CmpError: The model cannot be loaded, takes images of a different size, or does not work
            with this execution.

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
    config = fit_steps(fit_mixture(config, corpus), corpus)
    tokens = models.tokenize(config.model.name, tuple(corpus.texts))
    state = TrainState(config, corpus.on(device), model, tokens, execution=execution)
    if not execution.sees_whole_batch and (why := whole_batch_reason(state)):
        raise CmpError(
            f"method.name: {config.method.name!r} {why}; leave out --micro-batch and use one "
            "process, or choose another method"
        )
    execution.prepare(state)
    state.method.prepare(state)
    set_train_mode(model)
    return state


def whole_batch_reason(state: TrainState) -> str:
    """Return why the method of a run needs the whole batch at once, or "" if it does not."""
    method = state.method
    if method.whole_batch_reason:
        return method.whole_batch_reason(state.config.method)
    has_losses = method.losses is not UpdateMethod.losses
    return "has losses that may need the whole batch" if has_losses else ""


def encode_batch(
    state: TrainState, batch: Batch, task: int, step: int, part: tuple[int, int] | None = None
) -> ForwardOutput:
    """Augment the images of the batch of (task, step) and encode it with both towers.

    Args:
        state: The network and its run. Each distinct caption is encoded only once.
        batch: The samples.
        task: The task's number, from 0.
        step: The step within the task, from 0.
        part: For part of a batch, (index of the first sample, samples in the whole batch).
    """
    model, config = state.model, state.config
    device = model.logit_scale.device
    first, count = part or (0, len(batch.rows))
    own = slice(first, first + len(batch.rows))
    if stored := state.stored_features:
        generator = numpy_generator("data/view", config.seeds.augment, task, step)
        views = generator.integers(len(stored.table), size=count)[own]
        image = to_device(stored.read(batch.rows, views), device)  # [B, E]
        pixels = image.new_empty(0)
    else:
        image, pixels = None, to_device(batch.images, device)
        if config.training.augment:
            generator = torch_generator("augment", config.seeds.augment, task, step)
            pixels = augment(pixels, torch.rand(count, NOISE, generator=generator)[own])
        else:
            pixels = to_rgb(pixels)
        pixels = normalise(pixels, model.visual.image_mean, model.visual.image_std)
    distinct, place = batch.texts.unique(return_inverse=True)
    distinct, place = state.tokens[distinct], to_device(place, device)
    with autocast(config.training.precision, device), state.layer_noise(task, step):
        image = models.encode_image(model, pixels) if image is None else image  # [B, E]
        text = models.encode_text(model, distinct)[place]  # [D, E] -> [B, E]
    return ForwardOutput(image, text, pixels, distinct, place, batch.replayed)


def create_optimizer(state: TrainState) -> torch.optim.Optimizer:
    """Return a new optimiser over the trainable parameters: AdamW, or the method's own. It decays
    only matrices, and not biases, norms or the logit scale. Its learning rate is 0 until
    `train_step` sets it at each step.

    Example:
        >>> state = cmp.make_train_state(cmp.RunConfig(), cmp.load_data("embedded"))
        >>> type(cmp.create_optimizer(state)).__name__
        'AdamW'
    """
    config, multiples = state.config.optimizer, state.method.rates(state)
    by_multiple = {1.0: ([], [])}
    for name, parameter in trainable_parameters(state.model).items():
        matrices, others = by_multiple.setdefault(multiples.get(name, 1.0), ([], []))
        (matrices if parameter.ndim > 1 else others).append(parameter)
    groups = [
        {"params": parameters, "weight_decay": decay, "multiple": multiple}
        for multiple, both in by_multiple.items()
        for parameters, decay in zip(both, (config.weight_decay, 0.0), strict=True)
    ]
    factory = state.method.optimizer(state.config.method)
    return factory(groups, lr=0.0, betas=(config.beta1, config.beta2), eps=config.eps)


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trainable parameters by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def clamp_logit_scale(model: Network) -> None:
    """Clamp the logit scale to CLIP's bounds in place; with a sigmoid loss there are no bounds."""
    if not uses_sigmoid_loss(model):
        model.logit_scale.clamp_(0, models.MAX_LOGIT_SCALE)


def check_weights_finite(state: TrainState, task: int, steps: int) -> None:
    """Check that weights about to be kept or scored are finite; during a task, the next loss shows
    it.

    Args:
        state: The network and its run.
        task: The task's number.
        steps: Completed steps of the task.

    Raises:
        Diverged: The weights or the last step are not finite.
    """
    state.execution.wait(state)
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
    """Return the error for a step with a loss or gradient that is not finite, including a
    report."""
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
