"""The second cell of a chapter: its parameters checked, and what is stored of its runs printed."""

import asyncio
import html
import json
from collections.abc import Iterable, Mapping
from typing import Any

import ipywidgets as widgets
import torch
from IPython.display import display

from cmp import budgets, config
from cmp.config import RunConfig
from cmp.experiments import forecast, preflight, results, studies, workers
from cmp.experiments.forecast import round_time
from cmp.runs import identity, logs, store
from cmp.runs.checkpoints import StopRequest
from lab import chapters

LOOK_SECONDS = 1.0
"""How often a cell looks at the logs of its runs."""


def begin_chapter(
    scope: dict[str, Any],
    runs: studies.Study | dict[str, list[str]] | None = None,
    uncached: Iterable[RunConfig] = (),
) -> dict[tuple[str, int], RunConfig]:
    """Begin a chapter, in the cell after the parameters cell: `begin_chapter(globals(), study)`.

    Checks the parameters, stores runs of the study that are published at this size, so that they
    need not be computed, prints `run_status`, and has this process compute on one thread: small
    networks gain nothing from more, and where a core is busy, such as with runs of other processes,
    two threads made the same steps take ten times as long. A profile with a model of its own sets
    `device` and `jobs`: every card that is visible, a run on each. With the parameter `dry_run` it
    prints what the runs would compute instead and ends the notebook, which papermill takes for its
    end.

    Args:
        scope: The chapter's `globals()`.
        runs: What the chapter computes live and stores: a study, or name -> key=value changes to
            the profile.
        uncached: What each replicate computes at every reading without storing it.

    Returns:
        (name, replicate) -> config of `runs`.

    Raises:
        CmpError: A parameter is wrong, or the device is not there.
    """
    declared = chapters.check_injected(scope)
    torch.set_num_threads(1)
    profile, seeds = scope["profile"], scope["seeds"]
    if profile in config.FOREIGN_MODEL_PROFILES:  # a CPU would take months
        scope["device"] = "cuda"
        scope["jobs"] = workers.default_jobs("cuda")
    jobs, device = scope["jobs"], scope["device"]
    if isinstance(runs, studies.Study):
        live = runs.configs(profile, seeds, live_only=profile != "cpu")
        published = {"quick": studies.band_of(runs), "cpu": runs}
        if profile in published and not scope.get("dry_run"):
            results.restore_runs(published[profile])
    else:
        base = config.profile(profile)
        live = {
            (name, seed): config.parse(config.override(base, [*changes, f"seed={seed}"]), name)
            for seed in range(seeds)
            for name, changes in (runs or {}).items()
        }
    if scope.get("dry_run"):
        print("\n".join(preflight.describe_study(live, device)))
        raise SystemExit(0)
    status = run_status(list(live.values()), list(uncached) * seeds, jobs, device)
    print(f"Profile {profile}, device {device}, jobs {jobs}. {status}".strip())
    own = {name: scope[name] for name in declared if name not in SHARED_PARAMETERS}
    words = [f"{name}={value}" for name, value in own.items() if value != ""]
    print(f"Live: {', '.join([profile, *words])}. {published_words(runs)}".strip())
    if declared:
        display(profile_control(scope))
    return live


SHARED_PARAMETERS = ("profile", "seeds", "jobs", "device", "dry_run", "stream_seed")
"""The parameters that all chapters have."""


def published_words(runs: object) -> str:
    """Return of which runs the published figures of a chapter are, if it has a study."""
    if not isinstance(runs, studies.Study) or not results.is_published(runs.name):
        return ""
    count = results.published_metrics(runs.name)["replicate"].nunique()
    return f"Published: cpu, {count} replicates of study {runs.name}."


def profile_control(scope: dict[str, Any]) -> widgets.Widget:
    """Return a control that sets a chapter's profile, for the cells that are run after it.

    Args:
        scope: The chapter's `globals()`.
    """
    names = [name for name in config.PROFILES if name not in config.FOREIGN_MODEL_PROFILES]
    names += [scope["profile"]] * (scope["profile"] not in names)
    choice = widgets.Dropdown(options=names, value=scope["profile"], description="Profile")
    said = widgets.Label()

    def choose(change: dict[str, Any]) -> None:
        scope["profile"] = change["new"]
        said.value = "Run this cell and those below again: its first line says what that takes."

    choice.observe(choose, names="value")
    return widgets.HBox([choice, said])


async def compute_live(live: Mapping[Any, RunConfig], jobs: int = 1, device: str = "cpu") -> None:
    """Compute runs while the kernel hears of other things, such as of an explorer's buttons.

    Their losses are shown while they go on.

    Args:
        live: Runs, as `begin_chapter` returns them.
        jobs: Runs at the same time.
        device: "cpu" or "cuda".

    Raises:
        CmpError: Runs failed.
        Interrupted: The cell was interrupted; unfinished runs are saved.
    """
    shown, runs = widgets.HTML(), [*live.values()]
    display(shown)
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
    """Return a line for each run in progress: how far it is, and its loss so far as bars."""
    lines = []
    for name, run_config in live.items():
        run_id = identity.known_id(run_config)
        log = logs.read_log(run_id) if run_id else {}  # its weights are still being fetched
        if "loss" not in log or store.is_stored(run_id):
            continue
        losses = log["loss"].dropna()
        total = budgets.total_steps(run_config)
        words = name if isinstance(name, str) else name[0]
        lines.append(
            f"{words}: step {len(losses)} of {total}, loss {losses.iloc[0]:.2f} "
            f"{logs.sparkline(losses)} {losses.iloc[-1]:.2f}"
        )
    return "\n".join(lines)


def run_status(
    live: list[RunConfig], uncached: list[RunConfig], jobs: int = 1, device: str = "cpu"
) -> str:
    """Say what is stored of some runs and what it took, and what is missing and what it will take.

    Args:
        live: Runs that are stored.
        uncached: Runs that never are.
        jobs: Runs at the same time.
        device: Where they are computed.

    Returns:
        Sentences. Times are rounded, so that the same text comes again.
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


def print_ends(scope: dict[str, Any]) -> None:
    """Print where the runs of a chapter's own variables ended, as JSON: name -> [A_KA, A_ZS].

    Args:
        scope: The chapter's `globals()`; runs, and dicts of them by name, are taken.
    """
    runs = {}
    for name, value in scope.items():
        named = value.items() if isinstance(value, dict) else [(name, value)]
        runs |= {str(key): run for key, run in named if isinstance(run, store.StoredRun)}
    ends = {name: store.scores_on_way(run).iloc[-1] for name, run in runs.items()}
    print(json.dumps({name: end[["A_KA", "A_ZS"]].round(3).tolist() for name, end in ends.items()}))
