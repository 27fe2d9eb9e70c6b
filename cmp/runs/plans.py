"""What runs would do, from their configs alone: also where data, weights and card are not here."""

from cmp import budgets, mixtures
from cmp.budgets import counting, rules, table4
from cmp.config import Method, RunConfig
from cmp.runs import doctor

GIGA = 1e9
ABSENT = "absent"


def of_run(run_config: RunConfig, device: str = "cuda") -> list[str]:
    """Tasks, steps, batch parts, cost and forecast of a run; then what of it is not here."""
    checks = doctor.needs(run_config, device)
    absent = [each for each in checks if each.state == doctor.MISSING]
    return [
        steps(run_config),
        batch(run_config),
        cost(run_config),
        f"forecast: {doctor.forecast_sentence(run_config)}",
        *(f"{ABSENT}: {each.what}: {each.sentence}" for each in absent),
    ]


def steps(run_config: RunConfig) -> str:
    """How many, and how many the paper's table has for the same model, batch and method."""
    own, tasks = budgets.applied(run_config).training.steps, run_config.stream.tasks
    found = papers(run_config)
    theirs = f" (the paper's rule gives {found})" if found else ""
    return f"{tasks} tasks of {own} steps{theirs}, {tasks * own} in all"


def papers(run_config: RunConfig) -> int | None:
    """Steps a task by the paper's own numbers, if its table has such a run, of its budget."""
    if run_config.training.budget != 1:
        return None
    same = (run_config.model.name, run_config.training.batch) == (table4.MODEL, table4.BATCH)
    if not same or run_config.method != Method(run_config.method.name, rank=run_config.method.rank):
        return None
    rank = f",rank={run_config.method.rank}" if run_config.method.rank else ""
    for row in table4.TABLE4.values():
        if row.method.partition(",fisher")[0] == f"{run_config.method.name}{rank}":
            tasks = run_config.stream.tasks
            return rules.paper_steps(table4.TOTAL, tasks, row.gflops, row.multiplier)
    return None


def batch(run_config: RunConfig) -> str:
    """Whose samples make a batch."""
    size, mixture = run_config.training.batch, run_config.mixture
    p, d, b = mixtures.parts(mixture, size, empty_buffer=False)
    first = mixtures.parts(mixture, size, empty_buffer=True)
    return (
        f"batches of {size}: {p} of the pretraining pool, {d} of the update, {b} of the buffer; "
        f"{first[0]} and {first[1]} in the first task, which has none"
    )


def cost(run_config: RunConfig) -> str:
    """Memory-adjusted GFLOPs of a step and in all, as `cmp.budgets` counts them."""
    full, own = budgets.full_cost(run_config), counting.cost(run_config)
    found = rules.budget(0.0, own, full)
    applied = budgets.applied(run_config)
    total = applied.stream.tasks * (applied.training.steps * found.step + found.end)
    return (
        f"{found.step / GIGA:.6g} memory-adjusted GFLOPs a step (memory multiplier "
        f"{found.multiplier:.4f}), {total / GIGA:.4g} in all"
    )


def of_study(configs: dict[tuple[str, int], RunConfig], device: str) -> list[str]:
    """Setting by setting what a study would compute; then what of it is not here."""
    lines, absent = [f"runs: {len(configs)}"], {}
    for (setting, replicate), run_config in configs.items():
        found = of_run(run_config, device)
        lines.append(f"{setting}, replicate {replicate}")
        lines += [f"  {line}" for line in found if not line.startswith(ABSENT)]
        absent |= dict.fromkeys(line for line in found if line.startswith(ABSENT))
    return [*lines, *absent]
