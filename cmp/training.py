"""One task: the loop."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cmp import images, mixtures, models, schedules
from cmp.config import Optimizer, RunConfig
from cmp.data.corpus import Corpus
from cmp.errors import Diverged
from cmp.mixtures import Pools
from cmp.seeds import numpy_generator, torch_generator

Hook = Callable[[int, Tensor], None]


@dataclass(frozen=True)
class Batch:
    """rows: [B], the samples' positions in the corpus; images: uint8 [B, 4, H, W]; texts: [B], each
    sample's caption as a position in the corpus."""

    rows: np.ndarray
    images: Tensor
    texts: Tensor


def make_batch(config: RunConfig, corpus: Corpus, pools: Pools, task: int, step: int) -> Batch:
    """The samples of (task, step), each with one of its captions."""
    seed, size = config.seeds.data, config.training.batch
    rows = mixtures.batch_rows(pools, config.mixture, size, seed, task, step)
    choice = numpy_generator("data/caption", seed, task, step).random(size)
    starts, stops = corpus.caption_starts[rows], corpus.caption_starts[rows + 1]
    texts = corpus.caption_ids[starts + (choice * (stops - starts)).astype(np.int64)]
    images = corpus.images.index_select(0, torch.from_numpy(rows))  # whole rows: 5x indexing
    return Batch(rows, images, torch.from_numpy(texts))


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


def forward_loss(
    model: nn.Module, batch: Batch, tokens: Tensor, generator: torch.Generator, precision: str
) -> Tensor:
    """The loss of one batch; `tokens` [texts, L] holds every caption of the corpus.

    Each distinct caption is encoded once and then gathered.
    """
    device = model.logit_scale.device
    x = images.augmented(batch.images.to(device, non_blocking=True), generator)
    x = images.normalise(x, model.visual.image_mean, model.visual.image_std)
    distinct, place = batch.texts.unique(return_inverse=True)
    with autocast(precision, device):
        image = models.encode_image(model, x)
        text = models.encode_text(model, tokens[distinct])[place.to(device, non_blocking=True)]
    return contrastive_loss(image, text, model.logit_scale)


def train_task(
    model: nn.Module,
    config: RunConfig,
    corpus: Corpus,
    tokens: Tensor,
    pools: Pools,
    task: int,
    after_step: Hook = lambda step, loss: None,
    optimizer: torch.optim.AdamW | None = None,
    first: int = 0,
) -> None:
    """Train `model` in place through one task, or through what is left of it.

    tokens: [texts of the corpus, L]. after_step: called with (0-based step, loss) after each step.
    optimizer, first: where a task goes on from step `first`; a fresh optimizer where left out.
    Raises `Diverged` if a loss or gradient is not finite, with the weights as before the step, or
    if the task ends in weights that are not finite.
    """
    model.train()
    optimizer = optimizer or make_optimizer(model, config.optimizer)
    for step in range(first, config.training.steps):
        batch = make_batch(config, corpus, pools, task, step)
        generator = torch_generator("augment", config.seeds.augment, task, step)
        loss = forward_loss(model, batch, tokens, generator, config.training.precision)
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip)
        rate = schedules.learning_rate(config.schedule, config.training.steps, task, step)
        if not (loss.isfinite() and norm.isfinite()):
            raise diverged(batch, task, step, loss, norm, rate)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, models.MAX_LOGIT_SCALE)
        after_step(step, loss.detach())
    check_weights(model, task, config.training.steps)


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
    batch: Batch, task: int, step: int, loss: Tensor, norm: Tensor, rate: float
) -> Diverged:
    """The error of a step that is or leaves something not finite, with all that is known of it."""
    report = {
        "task": task,
        "step": step,
        "loss": {"contrastive": str(loss.item())},
        "gradient_norm": str(norm.item()),
        "learning_rate": rate,
        "samples": batch.rows.tolist(),
    }
    return Diverged(
        f"training diverged at task {task}, step {step}: loss {loss.item():g}, gradient norm "
        f"{norm.item():g}, learning rate {rate:g}; lower schedule.peak or optimizer.clip",
        report,
    )
