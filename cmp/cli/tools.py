"""The commands `config`, `doctor` and `bench`, which support runs."""

import typer

from cmp.cli import shared
from cmp.errors import CmpError, did_you_mean


def explain_keys(section: shared.OptionalArgument = None) -> None:
    """Print the keys of a run's config with their types, units, defaults and meanings.

    Give them to `cmpt run` as KEY=VALUE or in a file. seed=N sets all seeds at once, and
    recipe=NAME sets the keys of a recipe.

    Args:
        section: A section, such as schedule, or a single key, such as schedule.peak, seed or
            recipe. Default: all.

    Example:
        cmpt config schedule
    """
    from cmp import config
    from cmp.cli.keys import describe_sections

    known = describe_sections()
    known["seed"] = "seed\n    whole number at least 0\n    Sets all keys of seeds at once."
    recipes = ", ".join(config.RECIPES)
    known["recipe"] = f"recipe\n    one of {recipes}\n    Sets the keys of a recipe."
    names = [*config.RunConfig.__dataclass_fields__] if section is None else [section]
    if section not in (None, *known):
        near = did_you_mean(section, known)
        raise CmpError(f"config: no section or key is called {section!r}{near}")
    typer.echo("\n\n".join(known[name] for name in names))


def doctor(
    settings: shared.Settings = None,
    profile: str | None = None,
    device: str | None = None,
    micro_batch: shared.OptionalPositive = None,
    checkpoint_activations: bool = False,
    compile: bool = False,
) -> None:
    """Check the setup, and with --profile everything that a run needs.

    The exit status is 1 if anything is missing or damaged.

    Args:
        profile: quick, cpu, gpu, or a file of settings, NAME.yaml. Default: only check the setup.

    Example:
        cmpt doctor --profile gpu
    """
    from cmp import config, starts
    from cmp.cli.computing import report_checks
    from cmp.runs import preflight
    from cmp.scale.execution import ExecutionConfig

    if profile is None:
        if settings:
            raise CmpError(f"{settings[0]}: settings need --profile, such as --profile gpu")
        shared.refuse_options(
            "needs --profile", device=device, micro_batch=micro_batch,
            checkpoint_activations=checkpoint_activations, compile=compile,
        )  # fmt: skip
        checks = preflight.check_setup()
    else:
        run_config = config.read_config(profile, settings or [])
        device = starts.default_device(run_config.model.name, device)
        execution = ExecutionConfig(micro_batch, checkpoint_activations, compile)
        checks, _, fitted = preflight.check_run(run_config, device, execution)
        typer.echo(preflight.describe_run(run_config, fitted)[0])
    report_checks(checks)


def bench(
    name: str,
    model: list[str] | None = None,
    rounds: shared.Positive = 15,
    batch: shared.Batch = None,
    threads: shared.Threads = 1,
) -> None:
    """Compare the speed of several ways to do the same step, and write a JSON file.

    The alternatives run in turn in this process. Each number is the median over rounds, with the 10
    to 90% range.

    Args:
        name: Benchmark: step, features or gpu.
        model: Name of a model; repeat for more. Default: the models of the benchmark.
        rounds: Number of times that each alternative runs.
        batch: Samples per step, at least 2. Default: 128; 64 for bench-mid; 512 for ViT-B-16.

    Example:
        cmpt bench step --model small
    """
    import torch

    from cmp.bench import run_benchmark

    torch.set_num_threads(threads)
    report = run_benchmark(name, model, rounds, batch)
    rows = [[row.get(column, "") for column in report.columns] for row in report.rows]
    shared.print_table(report.columns, rows, report.title)
    typer.echo("\n".join([*report.notes, f"written: {report.write()}"]))
