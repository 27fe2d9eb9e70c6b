"""The second cell of a chapter: its parameters checked, and what is stored of its runs printed."""

import math
from collections.abc import Iterable
from typing import Any

import torch

from cmp import config
from cmp.config import RunConfig
from cmp.experiments import forecast, preflight, results, store, studies, workers
from lab import chapters

ROUND_TIMES = (1, 2, 5, 10, 20, 30, 45)
UNITS = {"s": 1, "min": 60, "h": 3600, "days": 86400}


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
    chapters.check_injected(scope)
    torch.set_num_threads(1)
    profile, seeds = scope["profile"], scope["seeds"]
    if profile in config.FOREIGN_MODEL_PROFILES:  # a CPU would take months
        scope["device"] = "cuda"
        scope["jobs"] = workers.default_jobs("cuda")
    jobs, device = scope["jobs"], scope["device"]
    if isinstance(runs, studies.Study):
        live = runs.configs(profile, seeds, live_only=profile != "cpu")
        published = {"quick": studies.band_of(runs), "cpu": runs}
        if profile in published:
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
    return live


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
        ids = [store.run_id_of(run) for run in set(live) - set(plan.todo)]
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


def round_time(seconds: float) -> str:
    """Return the nearest of a ladder of round times, by ratio: "20 s", "2 min"."""
    ladder = {f"{step} {unit}": step * size for unit, size in UNITS.items() for step in ROUND_TIMES}
    return min(ladder, key=lambda words: abs(math.log(ladder[words] / max(seconds, 0.1))))
