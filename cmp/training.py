"""Training through one task: what a network sees, its loss, the optimiser, the step.

`train_step` is one optimisation step from a batch to new weights; `train_task` is the loop around
it. A batch that is too large to be seen at once, or that several processes share, goes through
`backward_in_micro_batches`.
"""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cmp import config as configs
from cmp import models, schedules
from cmp.config import Optimizer, RunConfig
from cmp.data import Batch, Corpus, augment, normalise, to_device
from cmp.errors import CmpError, Diverged
from cmp.mixtures import BatchLoader, Pools
from cmp.models import Network
from cmp.registry import get_option
from cmp.scale import processes
from cmp.scale.execution import ExecutionConfig, autocast
from cmp.seeds import torch_generator

ADAMW = functools.partial(torch.optim.AdamW, fused=True)
DEFERRED = {"cuda"}
"""Devices that the host does not wait for to learn whether a step was finite."""


@dataclass(frozen=True)
class ForwardOutput:
    """A batch as the network saw it, and its features.

    Attributes:
        pixels: Augmented and normalised images, [B, 3, H, W].
        tokens: Tokens of the distinct captions, [D, L].
        place: Each sample's caption among them, [B].
        image: Unit image features, [B, E].
        text: Unit text features, [B, E].
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
    image: Tensor
    text: Tensor
    replayed: int = 0


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
        unchecked: The last step, where nobody has waited yet for whether it was finite.

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
    execution: ExecutionConfig = field(default_factory=ExecutionConfig)
    unchecked: "list[UncheckedStep]" = field(default_factory=list)

    @functools.cached_property
    def loader(self) -> BatchLoader:
        """Where batches come from."""
        device = self.model.logit_scale.device
        side = models.preprocessing(self.model).size
        return BatchLoader(self.config, self.corpus, side, device)

    @functools.cached_property
    def method(self) -> "UpdateMethod":
        """The update method."""
        value = get_option("method", self.config.method.name).value
        return value if isinstance(value, UpdateMethod) else UpdateMethod(prepare=value)

    @functools.cached_property
    def optimizer(self) -> torch.optim.Optimizer:
        """What takes the steps: fresh at the start of a run, and of each task that carries no
        moments."""
        return create_optimizer(self)


class StepResult(NamedTuple):
    """What a step came to; numbers on the device, so that nothing waits for it.

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


ForwardStep = Callable[[int], ForwardOutput]
OptimizerFactory = Callable[..., torch.optim.Optimizer]


@dataclass(frozen=True)
class UpdateMethod:
    """An update method; a hook that is left out does nothing.

    Attributes:
        prepare: (state), once, before anything is restored: chooses what trains, adds to the
            network, fills `method_state`; draws by `cmp.seeds` only.
        begin_task: (state, task), before the task's first step, whatever weights it starts from.
        losses: (state, output), after each forward pass: terms by name that are added to the
            contrastive loss; `output` is None where a batch comes in micro-batches.
        whole_batch_reason: (section) -> why the method needs the whole batch at once, or "". A
            method with `losses` that does not say is taken to need it.
        optimizer: (section) -> a function that takes AdamW's arguments.
        after_backward: (state), when the gradients are there, before they are clipped.
        step: (state, optimizer), when they are clipped.
        end_task: (state, forward_step), after the task's last step; `forward_step(step)` passes any
            batch of the task through the network. Batch norms use their statistics there and
            leave them alone.

    Example:
        >>> def freeze_text(state):
        ...     state.model.transformer.requires_grad_(False)
        >>> _ = cmp.register("method", "freeze-text")(cmp.UpdateMethod(prepare=freeze_text))
    """

    prepare: Callable[[TrainState], None] = lambda state: None
    begin_task: Callable[[TrainState, int], None] = lambda state, task: None
    losses: Callable[[TrainState, ForwardOutput | None], dict[str, Tensor]] = lambda state, out: {}
    whole_batch_reason: Callable[[configs.Method], str] | None = None
    optimizer: Callable[[configs.Method], OptimizerFactory] = lambda section: ADAMW
    after_backward: Callable[[TrainState], None] = lambda state: None
    step: Callable[[TrainState, torch.optim.Optimizer], None] = lambda state, opt: opt.step()
    end_task: Callable[[TrainState, ForwardStep], None] = lambda state, forward_step: None


def make_train_state(
    config: RunConfig,
    corpus: Corpus,
    model: Network | None = None,
    device: str | torch.device = "cpu",
    execution: ExecutionConfig | None = None,
) -> TrainState:
    """Return a network that is ready for the first step of a run.

    Args:
        config: The run's config.
        corpus: The run's data.
        model: Trained in place, its attention split; the weights that `config.model` names where
            None.
        device: Where the network lives.
        execution: How a step is computed.

    Raises:
        CmpError: The model takes images of another size than the data's, cannot be loaded, or
            cannot be computed in this way.

    Example:
        >>> config = cmp.RunConfig(method=cmp.Method("bitfit"))
        >>> state = cmp.make_train_state(config, cmp.load_data("embedded"))
        >>> sum(p.requires_grad for p in state.model.parameters()) < 60
        True
    """
    execution = execution or ExecutionConfig()
    model = (model or models.load_model(config.model, config.seeds.init)).to(device)
    models.split_attention(model)
    corpus.check_side(models.preprocessing(model).size, config.model.name)
    tokens = models.tokenize(config.model.name, tuple(corpus.texts))
    state = TrainState(config, corpus.on(device), model, tokens, execution=execution)
    why, reason = "", state.method.whole_batch_reason
    if reason or state.method.losses is not UpdateMethod.losses:
        why = reason(config.method) if reason else "has losses that may look at the whole batch"
    if execution.uses_micro_batches and why:
        raise CmpError(
            f"method.name: {config.method.name!r} {why}; leave out --micro-batch and compute in "
            "one process, or choose another method"
        )
    execution.prepare(model, config.model.name, config.training)
    state.method.prepare(state)
    set_train_mode(model)
    return state


def set_train_mode(model: nn.Module) -> None:
    """Put a network into training mode, all but the batch norms that do not train as a whole: the
    statistics of what is frozen stay. A norm without parameters follows the layer around it."""
    model.train()
    for layer, around in batch_norms(model).items():
        parameters = [*layer.parameters()] or [*around.parameters()]
        layer.train(all(p.requires_grad for p in parameters))


def batch_norms(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """Return the layers of a network that keep running statistics, each with what it is part of."""
    pairs = ((layer, around) for around in model.modules() for layer in around.children())
    kind = nn.modules.batchnorm._BatchNorm
    return {layer: around for layer, around in pairs if isinstance(layer, kind)}


def contrastive_loss(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """Return the symmetric InfoNCE loss over unit features [B, E] (spec 1.3)."""
    logits = logit_scale.exp() * image @ text.T  # [B, B]
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def sigmoid_loss(image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
    """Return the loss of every image-text pair by itself over unit features [B, E] (SigLIP, Zhai
    et al. 2023)."""
    logits = logit_scale.exp() * image @ text.T + logit_bias  # [B, B]
    sign = 2 * torch.eye(len(logits), device=logits.device) - 1
    return -F.logsigmoid(sign * logits).sum() / len(logits)


def uses_sigmoid_loss(model: nn.Module) -> bool:
    """Return whether a network was made for `sigmoid_loss`: it has a bias beside the scale."""
    return getattr(model, "logit_bias", None) is not None


def model_loss(model: Network, image: Tensor, text: Tensor) -> Tensor:
    """Return the loss that a network was made for, over unit features [B, E]."""
    if uses_sigmoid_loss(model):
        return sigmoid_loss(image, text, model.logit_scale, cast(Tensor, model.logit_bias))
    return contrastive_loss(image, text, model.logit_scale)


def add_up(terms: Iterable[Tensor]) -> Tensor:
    """Return the sum of the terms of a loss, of which there is at least one."""
    return functools.reduce(torch.add, terms)


def forward(
    model: Network,
    batch: Batch,
    tokens: Tensor,
    generator: torch.Generator,
    precision: str,
    part: tuple[int, int] | None = None,
) -> ForwardOutput:
    """Pass a batch through both towers, its images augmented.

    Args:
        model: The network.
        batch: The samples.
        tokens: Tokens of every caption of the corpus, [texts, L]; each distinct one is encoded
            once and then gathered.
        generator: Randomness of the augmentation, on the CPU.
        precision: "bf16" or "fp32".
        part: Where these samples are some of a batch: (number of the first, number in all).
    """
    device = model.logit_scale.device
    pixels = augment(to_device(batch.images, device), generator, part)
    pixels = normalise(pixels, model.visual.image_mean, model.visual.image_std)
    distinct, place = batch.texts.unique(return_inverse=True)
    distinct, place = tokens[distinct], to_device(place, device)
    with autocast(precision, device):
        image = models.encode_image(model, pixels)  # [B, E]
        text = models.encode_text(model, distinct)[place]  # [D, E] -> [B, E]
    return ForwardOutput(pixels, distinct, place, image, text, batch.replayed)


def forward_batch(
    state: TrainState, batch: Batch, task: int, step: int, part: tuple[int, int] | None = None
) -> ForwardOutput:
    """Pass the batch of (task, step), or a part of it, through the network of a run."""
    generator = torch_generator("augment", state.config.seeds.augment, task, step)
    precision = state.config.training.precision
    return forward(state.model, batch, state.tokens, generator, precision, part)


def loss_terms(
    state: TrainState, image: Tensor, text: Tensor, output: ForwardOutput | None
) -> dict[str, Tensor]:
    """Return the terms of a batch's loss by name: the model's own and those of the method.

    Args:
        state: The network and its method.
        image: Unit image features, [B, E].
        text: Unit text features, [B, E].
        output: The forward pass; None where the batch comes in micro-batches.
    """
    own = {"contrastive": model_loss(state.model, image, text)}
    return own | state.method.losses(state, output)


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


def create_optimizer(state: TrainState) -> torch.optim.Optimizer:
    """Return a fresh optimiser over what trains: AdamW, or the method's own.

    Example:
        >>> state = cmp.make_train_state(cmp.RunConfig(), cmp.load_data("embedded"))
        >>> type(cmp.create_optimizer(state)).__name__
        'AdamW'
    """
    factory = state.method.optimizer(state.config.method)
    return build_adamw(state.model, state.config.optimizer, factory)


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return what trains, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def clamp_logit_scale(model: Network) -> None:
    """Keep the logit scale within CLIP's bounds, in place; a sigmoid loss has no such bounds."""
    if not uses_sigmoid_loss(model):
        model.logit_scale.clamp_(0, models.MAX_LOGIT_SCALE)


def train_step(
    state: TrainState,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    task: int,
    step: int,
    rate: float,
) -> StepResult:
    """Take one optimisation step and return what it came to.

    Args:
        state: The network and all that belongs to it, changed in place.
        optimizer: The optimiser.
        batch: The batch of (task, step).
        task: The task's number, from 0.
        step: The step within the task, from 0.
        rate: The learning rate.

    Raises:
        Diverged: The loss or the gradient is not finite, on a card perhaps those of the step
            before, see `check_step`; the weights are as before it.

    Example:
        >>> state = cmp.make_train_state(cmp.RunConfig(), cmp.load_data("embedded"))
        >>> pools = cmp.task_pools(state.config, state.corpus)
        >>> batch, optimizer = state.loader.batch(pools[0], 0, 0), cmp.create_optimizer(state)
        >>> result = cmp.train_step(state, optimizer, batch, task=0, step=0, rate=1e-3)
    """
    optimizer.zero_grad()
    compute = backward_in_micro_batches if state.execution.uses_micro_batches else backward
    terms = compute(state, batch, task, step)
    state.method.after_backward(state)
    loss = add_up(terms.values())
    norm = nn.utils.clip_grad_norm_(state.model.parameters(), state.config.optimizer.clip)
    terms = {name: term.detach() for name, term in terms.items()}
    error = functools.partial(divergence_error, batch, task, step, terms, norm, rate)
    check_step(state, optimizer, loss.isfinite() & norm.isfinite(), error)
    for group in optimizer.param_groups:
        group["lr"] = rate
    state.method.step(state, optimizer)
    clamp_logit_scale(state.model)
    return StepResult(loss.detach(), norm, rate)


UncheckedStep = tuple[Callable[[], Tensor], Callable[[], Diverged]]
"""Of a step: what waits until the host knows whether it was finite, and the error if it was not."""


def check_step(
    state: TrainState,
    optimizer: torch.optim.Optimizer,
    finite: Tensor,
    error: Callable[[], Diverged],
) -> None:
    """Check a step before its weights change, without waiting for a card.

    There the optimiser is told to leave weights and moments as they are if the step is not finite,
    and the host looks at the answer during the next step, while the card is busy with that one.

    Args:
        state: The network and all that belongs to it.
        optimizer: What takes the step; it is waited for one that cannot be told.
        finite: Whether the step is finite, bool [].
        error: Makes the error.

    Raises:
        Diverged: This step, or the one before, is not finite.
    """
    check_last_step(state)
    can_skip = getattr(optimizer, "_step_supports_amp_scaling", False)  # as mixed precision does
    if not (can_skip and finite.device.type in DEFERRED):
        if not finite:
            raise error()
        return
    cast(Any, optimizer).found_inf = (~finite).float()
    state.unchecked.append((copy_to_host(finite), error))


def check_last_step(state: TrainState) -> None:
    """Wait until the host knows whether the last step was finite; raise `Diverged` if not."""
    while state.unchecked:
        is_finite, error = state.unchecked.pop()
        if not is_finite():
            raise error()


def copy_to_host(x: Tensor) -> Callable[[], Tensor]:
    """Begin to copy a tensor from a card; return what waits for it, and for nothing that the card
    is given to do afterwards."""
    if x.device.type not in DEFERRED:
        return lambda: x
    copy = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    copy.copy_(x, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(x.device))

    def wait() -> Tensor:
        event.synchronize()
        return copy

    return wait


def backward(state: TrainState, batch: Batch, task: int, step: int) -> dict[str, Tensor]:
    """Compute the gradients of a batch and return the terms of its loss by name."""
    output = forward_batch(state, batch, task, step)
    terms = loss_terms(state, output.image, output.text, output)
    add_up(terms.values()).backward()
    return terms


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
        after_step: Called with (step, what it came to) after each step.
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
    config, method = state.config, state.method
    steps = config.training.steps
    every = (steps,) * config.stream.tasks
    rates = [schedules.learning_rate(config.schedule, every, task, step) for step in range(steps)]
    local = processes.local_slice(config.training.batch)
    set_train_mode(state.model)
    if first == 0 and not config.carries_moments:
        vars(state).pop("optimizer", None)
    optimizer = optimizer or state.optimizer
    if first == 0:
        with state.execution.outside_steps():
            method.begin_task(state, task)
    for step in range(first, steps):
        batch = state.loader.batch(pools, task, step, local)
        after_step(step, train_step(state, optimizer, batch, task, step, rates[step]))

    check_last_step(state)

    def forward_step(step: int) -> ForwardOutput:
        return forward_batch(state, state.loader.batch(pools, task, step), task, step)

    for layer in batch_norms(state.model):  # a measurement moves no statistics
        layer.eval()
    with state.execution.outside_steps():
        method.end_task(state, forward_step)
    check_weights_finite(state, task, steps)


def check_weights_finite(state: TrainState, task: int, steps: int) -> None:
    """Check the last step, and weights that are kept or scored; elsewhere the next loss tells.

    Args:
        state: The network and all that belongs to it.
        task: The task's number.
        steps: Steps of the task that are done.

    Raises:
        Diverged: They are not finite.
    """
    check_last_step(state)
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
    loss = add_up(terms.values()).item()
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


# Micro-batches. A contrastive loss compares every sample with every other, so it is no sum over
# parts of a batch. But it depends on the weights through the features alone (GradCache, Gao et al.
# 2021): the features of all parts first, without what a backward pass needs; then the loss and its
# gradient with respect to the features; then each part again, with that gradient sent back.


def backward_in_micro_batches(
    state: TrainState, batch: Batch, task: int, step: int
) -> dict[str, Tensor]:
    """Add the gradients of a batch to those of the weights, and return the terms of its loss."""
    model, local = state.model, processes.local_slice(state.config.training.batch)
    size = state.execution.micro_batch or local.stop - local.start
    starts = range(local.start, local.stop, size)
    pieces = [slice(start, min(start + size, local.stop)) for start in starts]

    def forward_piece(rows: slice) -> tuple[Tensor, Tensor]:
        """Return unit features (image, text), augmented as in the whole batch."""
        images = batch.images[rows.start - local.start : rows.stop - local.start]
        piece = Batch(batch.rows[rows], images, batch.texts[rows])
        output = forward_batch(state, piece, task, step, (rows.start, len(batch.rows)))
        return output.image, output.text

    with torch.set_grad_enabled(len(pieces) == 1):
        outputs = [forward_piece(rows) for rows in pieces]
    features = [
        processes.all_gather(torch.cat(tower).detach()).requires_grad_()
        for tower in zip(*outputs, strict=True)
    ]
    terms = loss_terms(state, *features, output=None)
    add_up(terms.values()).backward()
    if processes.rank():  # what does not go through the features would count once per process
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.zero_()
    for rows in pieces:
        towers = outputs[0] if len(pieces) == 1 else forward_piece(rows)
        gradients = [cast(Tensor, feature.grad)[rows] for feature in features]
        trained = [pair for pair in zip(towers, gradients, strict=True) if pair[0].requires_grad]
        is_last = rows is pieces[-1]
        with processes.all_reduce_gradients(model.parameters() if is_last else ()):
            if trained:  # both towers may be frozen
                torch.autograd.backward([x for x, _ in trained], [x for _, x in trained])
    return terms
