"""Update methods at equal compute: what a step costs, and how many a budget allows (spec 1.2).

`rules` is arithmetic, `counting` finds FLOPs and memory on shapes alone, `table4` is the paper's.
"""

import dataclasses

import torch

from cmp import methods, models
from cmp.budgets import counting
from cmp.budgets.rules import Budget, Cost, budget
from cmp.config import Method, RunConfig, parse
from cmp.errors import CmpError

__all__ = ["Budget", "Cost", "applied", "budget", "full_cost", "measured_memory", "of", "spent"]


def full_cost(config: RunConfig) -> Cost:
    """What full fine-tuning costs with the same model and batch."""
    return counting.cost(dataclasses.replace(config, method=Method()))


def of(config: RunConfig) -> Budget | None:
    """The budget that a config sets each task; none where it sets none."""
    training = config.training
    if training.budget is None:
        return None
    full = full_cost(config)
    allowed = training.budget * training.steps * full.step
    return budget(allowed, counting.cost(config), full)


def applied(config: RunConfig) -> RunConfig:
    """The config with the steps that its budget allows, and no budget; as it is without one.

    `CmpError`, with numbers, where not one step is allowed or the schedule wants more steps.
    """
    found = of(config)
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


def spent(found: Budget, tasks: int) -> dict[str, float | int]:
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
    found = counting.learner(name, config.method, models.create(name).cuda())
    replayed = size // 3 if config.method.name == "distillation" else 0
    optimizer = methods.optimizer(found)
    for _ in range(2):
        value = counting.loss(found, counting.empty_look(found, size, replayed))
        optimizer.zero_grad()
        value.backward()
        methods.of(found.config).step(found, optimizer)
    return torch.cuda.max_memory_allocated()
