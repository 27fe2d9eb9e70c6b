"""One task: the loop."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from cmp import methods, schedules
from cmp.errors import Diverged
from cmp.methods import Learner
from cmp.mixtures import Batch, Pools
from cmp.steps import (
    autocast,
    bound_scale,
    contrastive_loss,
    features,
    make_optimizer,
    objective,
)
from cmp.training import gradcache

__all__ = ["autocast", "contrastive_loss", "features", "make_optimizer", "train_task"]

Hook = Callable[[int, Tensor], None]


def train_task(
    learner: Learner,
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
    config, model, method = learner.config, learner.model, methods.of(learner.config)
    steps = config.training.steps
    model.train()
    optimizer = optimizer or methods.optimizer(learner)
    if first == 0:
        method.begin_task(learner, task)
    for step in range(first, steps):
        batch, terms, loss = backward(learner, optimizer, pools, task, step)
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip)
        rate = schedules.learning_rate(config.schedule, steps, task, step)
        if not (loss.isfinite() and norm.isfinite()):
            raise diverged(batch, task, step, terms, norm, rate)
        for group in optimizer.param_groups:
            group["lr"] = rate
        method.step(learner, optimizer)
        bound_scale(model)
        after_step(step, loss.detach())
    method.end_task(learner, functools.partial(methods.look, learner, pools, task))
    check_weights(model, task, steps)


def backward(
    learner: Learner, optimizer: torch.optim.Optimizer, pools: Pools, task: int, step: int
) -> tuple[Batch, dict[str, Tensor], Tensor]:
    """The batch at (task, step), the terms of its loss and their sum; leaves its gradients at the
    weights."""
    if learner.execution.in_parts:
        optimizer.zero_grad()
        return gradcache.backward(learner, pools, task, step)
    batch, seen = methods.look(learner, pools, task, step)
    terms = {"contrastive": objective(learner.model, seen.image, seen.text)}
    terms |= methods.of(learner.config).losses(learner, seen)
    loss = sum(terms.values())
    optimizer.zero_grad()
    loss.backward()
    return batch, terms, loss


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
