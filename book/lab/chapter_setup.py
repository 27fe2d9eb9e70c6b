"""Set up a chapter in its second cell: check its parameters, and print which runs are stored."""

import asyncio
import html
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import torch
from IPython.display import display

from cmp import budgets, config
from cmp.config import RunConfig
from cmp.errors import CmpError
from cmp.runs import forecast, identity, logs, store
from cmp.runs.checkpoints import StopRequest
from cmp.scale import devices
from lab import chapters, keeping, stamps, values
from lab.evidence import results, studies, workers
from lab.live_runs import scores_on_way

LOOK_SECONDS = 1.0
"""Seconds between a cell's looks at the logs of its runs."""
ROUND_TIMES = (1, 2, 5, 10, 20, 30, 45)


def begin_chapter(
    scope: dict[str, Any],
    runs: studies.Study | dict[str, list[str]] | None = None,
    uncached: Iterable[RunConfig] = (),
) -> dict[tuple[str, int], RunConfig]:
    """Begin a chapter, in the cell after the parameters cell: `begin_chapter(globals(), study)`.

    This checks the parameters, stores published runs of the study at this size so that they need
    not be computed, prints `run_status`, and limits this process to one thread: small networks do
    not benefit from more, and on a busy core, two threads took ten times as long for the same
    steps. A profile with another model sets `device` and `jobs` to one run on each visible GPU.

    Args:
        scope: The chapter's `globals()`.
        runs: The runs that the chapter computes and stores: a study, or name -> key=value changes
            to the profile.
        uncached: The runs that each replicate computes at every reading without storing them.

    Returns:
        (name, replicate) -> config of `runs`.

    Raises:
        CmpError: A parameter is invalid, or the device is not available.
    """
    declared = chapters.check_injected(scope)
    torch.set_num_threads(1)
    profile, seeds = scope["profile"], scope["seeds"]
    if profile in config.FOREIGN_MODEL_PROFILES:  # a CPU would take months
        try:
            devices.check_device("cuda")
        except CmpError as error:
            raise CmpError(f"profile {profile}: needs a GPU; choose quick or cpu") from error
        scope |= {"device": "cuda", "jobs": workers.default_jobs("cuda")}
    jobs, device = scope["jobs"], scope["device"]
    said = ""
    if isinstance(runs, studies.Study):
        live = runs.configs(profile, seeds, live_only=profile != "cpu")
        results.restore_runs(runs, profile)
        if results.is_published(runs.name):
            count = results.published_metrics(runs.name)["replicate"].nunique()
            said = f"Published: cpu, {count} replicates of study {runs.name}."
    else:
        base = config.profile(profile)
        live = {
            (name, seed): config.parse(config.override(base, [*changes, f"seed={seed}"]), name)
            for seed in range(seeds)
            for name, changes in (runs or {}).items()
        }
    status = run_status(list(live.values()), list(uncached) * seeds, jobs, device)
    print(f"Profile {profile}, device {device}, jobs {jobs}. {status}".strip())
    own = {name: scope[name] for name in declared if name not in SHARED_PARAMETERS}
    words = [f"{name}={value}" for name, value in own.items() if value != ""]
    print(f"Live: {', '.join([profile, *words])}. {said}".strip())
    return live


SHARED_PARAMETERS = ("profile", "seeds", "jobs", "device", "stream_seed")
"""The parameters of all chapters."""


async def compute_live(live: Mapping[Any, RunConfig], jobs: int, device: str) -> None:
    """Compute runs while the kernel handles other events, such as an explorer's buttons.

    Their losses are shown meanwhile.

    Args:
        live: The runs, as returned by `begin_chapter`.
        jobs: The number of runs at a time.
        device: "cpu" or "cuda".

    Raises:
        CmpError: Runs failed.
        Interrupted: The cell was interrupted; unfinished runs are saved.
    """
    shown, runs = widgets.HTML(), [*live.values()]
    display(shown, metadata=keeping.PASSING)
    try:
        with StopRequest() as stop:
            work = asyncio.to_thread(studies.compute_runs, runs, jobs, device, stop=stop)
            task = asyncio.create_task(work)
            while not task.done():
                shown.value = f"<pre>{html.escape(loss_curves(live))}</pre>"
                await asyncio.wait([task], timeout=LOOK_SECONDS)
        await task
    finally:
        shown.close()


def loss_curves(live: Mapping[Any, RunConfig]) -> str:
    """Return one line for each run in progress: how far it is, and its loss so far as bars."""
    lines = []
    for name, run_config in live.items():
        run_id = identity.known_id(run_config)
        # without an id, its weights are still downloading
        log = logs.read_log(logs.log_path(run_id)) if run_id else {}
        losses = log["loss"].dropna() if "loss" in log else ()  # NaN where training diverged
        if not len(losses) or store.is_stored(run_id):
            continue
        total = budgets.total_steps(run_config)
        words = name if isinstance(name, str) else name[0]
        lines.append(
            f"{words}: step {len(losses)} of {total}, loss {losses.iloc[0]:.2f} "
            f"{logs.sparkline(losses)} {losses.iloc[-1]:.2f}"
        )
    return "\n".join(lines)


def run_status(live: list[RunConfig], uncached: list[RunConfig], jobs: int, device: str) -> str:
    """Return which runs are stored and how long they took, and which are missing and how long they
    will take.

    Args:
        live: Runs that are stored once computed.
        uncached: Runs that are never stored.
        jobs: The number of runs at a time.
        device: The device of the runs.

    Returns:
        Sentences. Times are rounded, so that the text is reproducible.
    """
    plan, words = studies.plan_study(live, device), []
    if live:
        ids = [identity.run_id_of(run) for run in set(live) - set(plan.todo)]
        took = [store.load_record(run_id)[0].provenance["seconds"] for run_id in ids]
        stored, todo = f"{len(took)} of {plan.runs} live runs", len(plan.todo)
        if took:
            stored += f", which took about {round_time(sum(took) / min(jobs, len(took)))}"
        needed = f"{todo}, about {round_time(plan.seconds / min(jobs, todo))}" if todo else "none"
        words.append(f"Stored: {stored}. To compute: {needed}.")
    if uncached:
        seconds = round_time(sum(forecast.forecast_seconds(uncached, device)))
        words.append(f"Computed at every reading and not stored: about {seconds}.")
    return " ".join(words)


def print_record(scope: dict[str, Any], source: str) -> None:
    """Print, as JSON, what `lab.run` stores of a chapter that ends here: the final scores of runs
    in its variables as `ends`, name -> [A_KA, A_ZS]; its `texts` with the marks filled in; and the
    `files` that it read.

    Args:
        scope: The chapter's `globals()`; runs and dicts of runs by name are used.
        source: The path of the chapter.
    """
    runs = {}
    for name, value in scope.items():
        named = value.items() if isinstance(value, dict) else [(name, value)]
        runs |= {str(key): run for key, run in named if isinstance(run, store.StoredRun)}
    ends = {name: scores_on_way(run).iloc[-1] for name, run in runs.items()}
    scores = {name: end[["A_KA", "A_ZS"]].round(3).tolist() for name, end in ends.items()}
    page = chapters.notebook(Path(source))
    values.fill_notebook(page, Path(source).stem.partition("_")[0])
    texts = [cell.source for cell in page.cells if cell.cell_type == "markdown"]
    print(json.dumps({"ends": scores, "texts": texts, "files": stamps.read_names()}))


def round_time(seconds: float) -> str:
    """Return a time rounded, by ratio, to a scale of round times such as "20 s" and "2 min"."""
    units = forecast.UNITS.items()
    ladder = {f"{step} {unit}": step * size for unit, size in units for step in ROUND_TIMES}
    return min(ladder, key=lambda words: abs(math.log(ladder[words] / max(seconds, 0.1))))
