"""One step's arithmetic: what the network sees and makes of it, the loss, the optimizer."""

import contextlib
import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cmp import config, distributed, mixtures, models, schedules
from cmp.config import Optimizer, RunConfig
from cmp.data import Batch, Corpus, augment, normalise
from cmp.errors import CmpError, Diverged
from cmp.mixtures import Pools, batch_counts
from cmp.seeds import torch_generator

ADAMW = functools.partial(torch.optim.AdamW, fused=True)


@dataclass(frozen=True)
class ForwardOutput:
    """A batch as the network saw it, and what it made of it.

    pixels: [B, 3, H, W], augmented and normalised; tokens: [D, L] of the distinct captions, and
    place: [B], each sample's among them; image, text: unit features [B, E]. replayed: so many
    samples at the end are of the pretraining pool.
    """

    pixels: Tensor
    tokens: Tensor
    place: Tensor
    image: Tensor
    text: Tensor
    replayed: int = 0


def contrastive_loss(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """Symmetric InfoNCE over unit features [B, E] (spec 1.3)."""
    logits = logit_scale.exp() * image @ text.T
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def sigmoid_loss(image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
    """Every pair of an image and a text by itself, matching or not (SigLIP, Zhai et al. 2023); unit
    features [B, E]."""
    logits = logit_scale.exp() * image @ text.T + logit_bias
    sign = 2 * torch.eye(len(logits), device=logits.device) - 1
    return -F.logsigmoid(sign * logits).sum() / len(logits)


def uses_sigmoid_loss(model: nn.Module) -> bool:
    """Whether a network was made for `sigmoid_loss`: it then has a bias beside its logit scale."""
    return getattr(model, "logit_bias", None) is not None


def model_loss(model: nn.Module, image: Tensor, text: Tensor) -> Tensor:
    """The contrastive loss that a network was made for; unit features [B, E]."""
    if uses_sigmoid_loss(model):
        return sigmoid_loss(image, text, model.logit_scale, model.logit_bias)
    return contrastive_loss(image, text, model.logit_scale)


@torch.no_grad()
def clamp_logit_scale(model: nn.Module) -> None:
    """Keep the logit scale where CLIP has it, in place; a sigmoid's has no such bound."""
    if not uses_sigmoid_loss(model):
        model.logit_scale.clamp_(0, models.MAX_LOGIT_SCALE)


def make_optimizer(
    model: nn.Module, config: Optimizer, kind: Callable[..., torch.optim.Optimizer] = ADAMW
) -> torch.optim.Optimizer:
    """AdamW over what trains; it decays matrices only, not biases, norms, or the logit scale.

    kind: another optimizer of AdamW's arguments, for a method that has its own.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return kind(groups, lr=0.0, betas=(config.beta1, config.beta2), eps=config.eps)


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager:
    """The arithmetic of a forward pass: "bf16" by autocast, "fp32" as it is."""
    if device.type == "meta":  # has no arithmetic
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def forward(
    model: nn.Module,
    batch: Batch,
    tokens: Tensor,
    generator: torch.Generator,
    precision: str,
    replayed: int = 0,
    of: tuple[int, int] | None = None,
) -> ForwardOutput:
    """A batch through both towers, images augmented.

    tokens: [texts, L], every caption of the corpus; each distinct one is encoded once and then
    gathered. generator: of the augmentation, on the CPU. precision: "bf16" or "fp32". of: as in
    `images.augmented`.
    """
    device = model.logit_scale.device
    x = augment(batch.images.to(device, non_blocking=True), generator, of)
    x = normalise(x, model.visual.image_mean, model.visual.image_std)
    distinct, place = batch.texts.unique(return_inverse=True)
    distinct, place = tokens[distinct], place.to(device, non_blocking=True)
    with autocast(precision, device):
        image = models.encode_image(model, x)
        text = models.encode_text(model, distinct)[place]
    return ForwardOutput(x, distinct, place, image, text, replayed)


def forward_features(
    model: nn.Module, batch: Batch, tokens: Tensor, generator: torch.Generator, precision: str
) -> tuple[Tensor, Tensor]:
    """Unit features of a batch's images, augmented, and of its captions, [B, E] each; see `see`."""
    seen = forward(model, batch, tokens, generator, precision)
    return seen.image, seen.text


_STOCHASTIC_LAYERS = {"p": "Dropout", "drop_prob": "DropPath", "prob": "PatchDropout"}
"""Layers that draw from chance while they train, and where they keep their rate."""


@dataclass(frozen=True)
class ExecutionConfig:
    """micro_batch: samples at a time in each process, the loss still that of the whole batch (see
    `cmp.training.gradcache`); all where left out. checkpoint_activations: what a block computes is
    computed again for its gradients, instead of kept."""

    micro_batch: int | None = None
    checkpoint_activations: bool = False

    @property
    def in_parts(self) -> bool:
        """Whether no process sees the whole batch at once."""
        return self.micro_batch is not None or distributed.world_size() > 1

    def record(self) -> dict[str, str]:
        """What a run's provenance says of it; nothing for a run that is computed at once."""
        words = [
            f"{distributed.world_size()} processes" if distributed.world_size() > 1 else "",
            f"micro-batches of {self.micro_batch}" if self.micro_batch else "",
            "activations recomputed" if self.checkpoint_activations else "",
        ]
        said = ", ".join(word for word in words if word)
        return {"execution": said} if said else {}

    def prepare(self, model: nn.Module, name: str, batch: int) -> None:
        """Make a network ready; `CmpError` if it, or the batch, cannot be computed so."""
        if self.checkpoint_activations:
            trunk = getattr(model.visual, "trunk", None)
            if trunk is not None and not hasattr(trunk, "set_grad_checkpointing"):
                raise CmpError(
                    f"--checkpoint-activations: the image tower of {name!r} does not offer it; "
                    "transformers of open_clip do"
                )
            model.set_grad_checkpointing(True)
        if self.in_parts:
            distributed.local_slice(batch)
            check_divisible(model, name)


DEFAULT_EXECUTION = ExecutionConfig()
"""At once, in this process."""


def check_divisible(model: nn.Module, name: str) -> None:
    """`CmpError` for a network that makes another thing of a sample with each batch it stands in,
    or with each time that it is looked at."""
    for where, layer in model.named_modules():
        kind = type(layer).__name__
        rates = [
            key
            for key, word in _STOCHASTIC_LAYERS.items()
            if word in kind and getattr(layer, key, 0)
        ]
        if rates or isinstance(layer, nn.modules.batchnorm._BatchNorm):
            what = "draws from chance" if rates else "normalises over the batch"
            raise CmpError(
                f"model.name: {where} of {name!r} is a {kind}, which {what}: a batch in parts "
                "would be another batch; leave out --micro-batch and compute in one process"
            )


Hook = Callable[[int, Tensor], None]


def check_weights_finite(model: nn.Module, task: int, steps: int) -> None:
    """`Diverged` if weights are not finite after so many steps of a task.

    For where weights are kept or scored; elsewhere the next loss tells.
    """
    with torch.no_grad():
        if nn.utils.get_total_norm(model.parameters()).isfinite():
            return
    raise Diverged(
        f"training diverged: weights are not finite after {steps} steps of task {task}; lower "
        "schedule.peak",
        {"task": task, "step": steps - 1, "weights": "not finite"},
    )


def divergence_error(
    batch: Batch, task: int, step: int, terms: dict[str, Tensor], norm: Tensor, rate: float
) -> Diverged:
    """The error of a step whose loss or gradient is not finite, with all that is known of it."""
    loss = sum(terms.values()).item()
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


ForwardStep = Callable[[int], tuple[Batch | None, ForwardOutput]]


@dataclass(frozen=True)
class TrainState:
    """A network as one run trains it. tokens: [texts of the corpus, L].

    state: what a method carries from step to step and from task to task beside weights and
    moments, by name. It is saved and restored with them, so its tensors are the method's own,
    never views of a weight. aside: other networks that a method looks at, functions of the weights
    that the run starts from, and so not saved.
    """

    config: RunConfig
    corpus: Corpus
    model: nn.Module
    tokens: Tensor
    state: dict[str, Tensor] = field(default_factory=dict)
    aside: dict[str, nn.Module] = field(default_factory=dict)
    execution: ExecutionConfig = DEFAULT_EXECUTION

    @functools.cached_property
    def loader(self) -> mixtures.BatchLoader:
        """Where its batches come from."""
        device = self.model.logit_scale.device
        return mixtures.BatchLoader(self.config, self.corpus, models.image_side(self.model), device)


def train_task(
    learner: TrainState,
    pools: Pools,
    task: int,
    after_step: Hook = lambda step, loss: None,
    optimizer: torch.optim.Optimizer | None = None,
    first: int = 0,
) -> None:
    """Train a network in place through one task, or through what is left of it.

    after_step: called with (0-based step, loss) after each step. optimizer, first: where a task
    goes on from step `first`; a fresh optimizer where left out.
    Raises `Diverged` if a loss or gradient is not finite, with the weights as before the step, or
    if the task ends in weights that are not finite.
    """
    config, model, method = learner.config, learner.model, method_of(learner.config)
    steps = config.training.steps
    model.train()
    optimizer = optimizer or create_optimizer(learner)
    if first == 0:
        method.begin_task(learner, task)
    for step in range(first, steps):
        batch, terms, loss = compute_gradients(learner, optimizer, pools, task, step)
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip)
        rate = schedules.learning_rate(config.schedule, steps, task, step)
        if not (loss.isfinite() and norm.isfinite()):
            raise divergence_error(batch, task, step, terms, norm, rate)
        for group in optimizer.param_groups:
            group["lr"] = rate
        method.step(learner, optimizer)
        clamp_logit_scale(model)
        after_step(step, loss.detach())
    method.end_task(learner, functools.partial(forward_batch, learner, pools, task))
    check_weights_finite(model, task, steps)


def compute_gradients(
    learner: TrainState, optimizer: torch.optim.Optimizer, pools: Pools, task: int, step: int
) -> tuple[Batch, dict[str, Tensor], Tensor]:
    """The batch at (task, step), the terms of its loss and their sum; leaves its gradients at the
    weights."""
    if learner.execution.in_parts:
        optimizer.zero_grad()
        return compute_gradients_in_micro_batches(learner, pools, task, step)
    batch, seen = forward_batch(learner, pools, task, step)
    terms = {"contrastive": model_loss(learner.model, seen.image, seen.text)}
    terms |= method_of(learner.config).losses(learner, seen)
    loss = sum(terms.values())
    optimizer.zero_grad()
    loss.backward()
    return batch, terms, loss


def local_samples(learner: TrainState) -> slice:
    """What this process sees of a batch."""
    return distributed.local_slice(learner.config.training.batch)


def micro_batches(learner: TrainState) -> list[slice]:
    """The same, piece by piece."""
    start, stop = local_samples(learner).start, local_samples(learner).stop
    size = learner.execution.micro_batch or stop - start
    return [slice(first, min(first + size, stop)) for first in range(start, stop, size)]


def forward_micro_batch(
    learner: TrainState, batch: Batch, part: slice, task: int, step: int
) -> tuple[Tensor, Tensor]:
    """Unit features (image, text) of a part of a batch, augmented as in the whole."""
    config, start = learner.config, local_samples(learner).start
    generator = torch_generator("augment", config.seeds.augment, task, step)
    images = batch.images[part.start - start : part.stop - start]  # they begin with this process's
    piece = Batch(batch.rows[part], images, batch.texts[part])
    seen = forward(
        learner.model, piece, learner.tokens, generator, config.training.precision,
        of=(part.start, len(batch.rows)),
    )  # fmt: skip
    return seen.image, seen.text


def compute_gradients_in_micro_batches(
    learner: TrainState, pools: Pools, task: int, step: int
) -> tuple[Batch, dict[str, Tensor], Tensor]:
    """The batch at (task, step), the terms of its loss and their sum, whose gradients are added to
    those of the weights."""
    model, method = learner.model, method_of(learner.config)
    batch, pieces = (
        learner.loader.batch(pools, task, step, local_samples(learner)),
        micro_batches(learner),
    )
    with torch.set_grad_enabled(len(pieces) == 1):
        seen = [forward_micro_batch(learner, batch, part, task, step) for part in pieces]
    leaves = [
        distributed.all_gather(torch.cat(tower).detach()).requires_grad_()
        for tower in zip(*seen, strict=True)
    ]
    terms = {"contrastive": model_loss(model, *leaves)} | method.losses(learner, None)
    loss = sum(terms.values())
    loss.backward()
    if distributed.rank():  # what does not go through the features would count once a process
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.zero_()
    for part in pieces:
        towers = (
            seen[0] if len(pieces) == 1 else forward_micro_batch(learner, batch, part, task, step)
        )
        pairs = [(x, leaf.grad[part]) for x, leaf in zip(towers, leaves, strict=True)]
        training = [pair for pair in pairs if pair[0].requires_grad]  # a tower may be frozen
        torch.autograd.backward(*zip(*training, strict=True))
    distributed.all_reduce_gradients(p.grad for p in model.parameters() if p.grad is not None)
    return batch, terms, loss


@dataclass(frozen=True)
class UpdateMethod:
    """An update method; a hook that is left out does nothing.

    prepare: (learner) once, before anything is restored: what trains, what is added to the network,
    what `state` begins as; draws only by `cmp.seeds`. begin_task: (learner, task) before the task's
    first step, from whatever weights it starts. losses: (learner, seen) after each forward pass:
    terms by name that are added to the contrastive loss; seen is `None` where a batch comes in
    parts. whole: (settings) -> why the method cannot do with that, if it cannot. optimizer:
    (settings) -> what is called with AdamW's arguments. step: (learner, optimizer) when gradients
    are ready. end_task: (learner, look) after the task's last step; look(step) shows any batch of
    the task to the network.
    """

    prepare: Callable[[TrainState], None] = lambda learner: None
    begin_task: Callable[[TrainState, int], None] = lambda learner, task: None
    losses: Callable[[TrainState, ForwardOutput | None], dict[str, Tensor]] = lambda learner, seen: {}
    whole: Callable[[config.Method], str] = lambda settings: ""
    optimizer: Callable[[config.Method], Callable[..., torch.optim.Optimizer]] = lambda settings: (
        ADAMW
    )
    step: Callable[[TrainState, torch.optim.Optimizer], None] = lambda learner, optimizer: (
        optimizer.step()
    )
    end_task: Callable[[TrainState, ForwardStep], None] = lambda learner, look: None


def method_of(config: RunConfig) -> UpdateMethod:
    """The method that a config names."""
    return importlib.import_module(f"cmp.methods.{config.method.name.replace('-', '_')}").METHOD


def make_train_state(
    config: RunConfig,
    corpus: Corpus,
    model: nn.Module | None = None,
    device: str | torch.device = "cpu",
    execution: ExecutionConfig = DEFAULT_EXECUTION,
) -> TrainState:
    """A network ready for the first step of a run.

    model: trained in place; the weights that `config.model` names where left out, see `models.load`
    for what it raises. device: where the network lives. `CmpError` if the model takes images of
    another size than the data's, or cannot be computed by this execution.
    """
    model = (model or models.load_model(config.model, config.seeds.init)).to(device)
    corpus.check_side(models.image_side(model), config.model.name)
    if execution.in_parts and (why := method_of(config).whole(config.method)):
        raise CmpError(
            f"method.name: {config.method.name!r} {why}; leave out --micro-batch and compute in "
            "one process, or choose another method"
        )
    execution.prepare(model, config.model.name, config.training.batch)
    tokens = models.tokenize(config.model.name, corpus.texts)
    found = TrainState(config, corpus, model, tokens, execution=execution)
    method_of(config).prepare(found)
    return found


def forward_batch(
    learner: TrainState, pools: Pools, task: int, step: int
) -> tuple[Batch, ForwardOutput]:
    """The batch at (task, step), and what the network makes of it."""
    config = learner.config
    batch = learner.loader.batch(pools, task, step)
    replayed, _, _ = batch_counts(config.mixture, len(batch.rows), len(pools.buffer) == 0)
    generator = torch_generator("augment", config.seeds.augment, task, step)
    precision = config.training.precision
    return batch, forward(learner.model, batch, learner.tokens, generator, precision, replayed)


def create_optimizer(learner: TrainState) -> torch.optim.Optimizer:
    """A fresh optimizer over what trains: AdamW, or the method's own."""
    config = learner.config
    kind = method_of(config).optimizer(config.method)
    return make_optimizer(learner.model, config.optimizer, kind)


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What trains, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
