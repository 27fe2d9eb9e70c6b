"""`cmp doctor`: what is here and what is missing, before anything starts."""

from typing import Annotated

import typer
from rich.table import Table

from cmp.cli.runs import read_config
from cmp.cli.shared import Device, console, place
from cmp.runs import doctor as doctors
from cmp.runs import plans


def doctor(
    settings: Annotated[list[str] | None, typer.Argument(help="key=value ...")] = None,
    profile: Annotated[str | None, typer.Option(help="quick, cpu, gpu, or FILE.yaml.")] = None,
    device: Device = None,
) -> None:
    """Check the set-up, or with --profile what a run needs; status 1 if anything is missing."""
    if profile is None:
        checks = doctors.of_setup()
    else:
        run_config = read_config(profile, settings or [])
        checks = doctors.of_run(run_config, place(profile, device))
        console.print(plans.steps(run_config), highlight=False)
    table = Table(box=None, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for check in checks:
        table.add_row(check.what, check.state, check.sentence)
    console.print(table)
    if doctors.MISSING in [check.state for check in checks]:
        raise typer.Exit(1)
