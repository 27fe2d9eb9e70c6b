"""One task: the loop."""

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cmp import images, methods, models, schedules
from cmp.config import Optimizer
from cmp.errors import Diverged
from cmp.methods import Learner
from cmp.mixtures import Batch, Pools, make_batch
from cmp.seeds import torch_generator

Hook = Callable[[int, Tensor], None]


def contrastive_loss(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """Symmetric InfoNCE over unit features [B, E] (spec 1.3)."""
    logits = logit_scale.exp() * image @ text.T
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def make_optimizer(model: nn.Module, config: Optimizer) -> torch.optim.AdamW:
    """AdamW over what trains; it decays matrices only, not biases, norms, or the logit scale."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=config.eps, fused=True)


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager:
    """The arithmetic of a forward pass: "bf16" by autocast, "fp32" as it is."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def features(
    model: nn.Module, batch: Batch, tokens: Tensor, generator: torch.Generator, precision: str
) -> tuple[Tensor, Tensor]:
    """Unit features of a batch's images, augmented, and of its captions, [B, E] each.

    tokens: [texts, L], every caption of the corpus; each distinct one is encoded once and then
    gathered. generator: of the augmentation, on the CPU. precision: "bf16" or "fp32".
    """
    device = model.logit_scale.device
    x = images.augmented(batch.images.to(device, non_blocking=True), generator)
    x = images.normalise(x, model.visual.image_mean, model.visual.image_std)
    distinct, place = batch.texts.unique(return_inverse=True)
    with autocast(precision, device):
        image = models.encode_image(model, x)
        text = models.encode_text(model, tokens[distinct])[place.to(device, non_blocking=True)]
    return image, text


def train_task(
    learner: Learner,
    pools: Pools,
    task: int,
    after_step: Hook = lambda step, loss: None,
    optimizer: torch.optim.AdamW | None = None,
    first: int = 0,
) -> None:
    """Train a network in place through one task, or through what is left of it.

    after_step: called with (0-based step, loss) after each step. optimizer, first: where a task
    goes on from step `first`; a fresh optimizer where left out.
    Raises `Diverged` if a loss or gradient is not finite, with the weights as before the step, or
    if the task ends in weights that are not finite.
    """
    config, model, method = learner.config, learner.model, methods.of(learner.config)
    steps = config.training.steps
    model.train()
    optimizer = optimizer or make_optimizer(model, config.optimizer)
    for step in range(first, steps):
        batch = make_batch(config, learner.corpus, pools, task, step)
        generator = torch_generator("augment", config.seeds.augment, task, step)
        image, text = features(model, batch, learner.tokens, generator, config.training.precision)
        terms = {"contrastive": contrastive_loss(image, text, model.logit_scale)}
        terms |= method.losses(learner, batch, image, text)
        loss = sum(terms.values())
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip)
        rate = schedules.learning_rate(config.schedule, steps, task, step)
        if not (loss.isfinite() and norm.isfinite()):
            raise diverged(batch, task, step, terms, norm, rate)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, models.MAX_LOGIT_SCALE)
        after_step(step, loss.detach())
    method.end_task(learner, pools, task)
    check_weights(model, task, steps)


def check_weights(model: nn.Module, task: int, steps: int) -> None:
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


def diverged(
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
