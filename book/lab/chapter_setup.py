"""A chapter that is being read: its parameters checked, what is stored of it and how long the rest
takes said, by one call in the cell after the parameters."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from lab import chapters

from cmp import config
from cmp.config import RunConfig
from cmp.embedded import packed
from cmp.errors import CmpError
from cmp.experiments import forecast, store, studies
from cmp.experiments.studies import Study

ROUND_TIMES = (1, 2, 5, 10, 20, 30, 45)
UNITS = {"s": 1, "min": 60, "h": 3600, "days": 86400}

Grid = dict[tuple[str, int], RunConfig]
Changes = dict[str, list[str]]


def begin_chapter(
    scope: dict[str, Any], runs: Study | Changes | None = None, anew: Iterable[RunConfig] = ()
) -> Grid:
    """For chapters, in the cell after the parameters cell: `live = begin(globals(), study)`.

    Checks the parameters, see `chapters.guard`, prints `status`, and has this process compute on
    one thread: more gain the small networks nothing, and where a core is busy, such as with the
    runs of another process, they made the same steps take ten times as long. runs: what the chapter
    computes live and stores: a study, or key=value changes to the profile by name; anew: what each
    replicate computes at every reading, without storing it. Returns (name, replicate) -> config of
    `runs`. With the parameter `dry_run` it prints what they would compute instead, and ends the
    notebook here, which papermill takes for an end like any other. Raises `CmpError` for a wrong
    parameter and a device that is not here.
    """
    chapters.check_injected(scope)
    torch.set_num_threads(1)
    profile, seeds, jobs, device = (scope[key] for key in ("profile", "seeds", "jobs", "device"))
    if isinstance(runs, Study):
        live = runs.configs(profile, seeds, live_only=profile != "cpu")
    else:
        live = {
            (name, seed): config.parse(
                config.override(config.profile(profile), [*changes, f"seed={seed}"]), name
            )
            for seed in range(seeds)
            for name, changes in (runs or {}).items()
        }
    if scope.get("dry_run"):
        print("\n".join(forecast.describe_study(live, device)))
        raise SystemExit(0)
    told = run_status(list(live.values()), list(anew) * seeds, jobs, device)
    print(f"Profile {profile}, device {device}, jobs {jobs}. {told}".strip())
    return live


def run_status(
    live: list[RunConfig], anew: list[RunConfig], jobs: int = 1, device: str = "cpu"
) -> str:
    """What is stored of some runs and what it took, how many are missing and what they will take;
    and what others will take that are never stored. Times are rounded, so that the same text comes
    again."""
    plan, words = studies.plan_study(live, device), []
    if live:
        took = _stored_seconds(set(live) - set(plan.todo))
        words.append(f"Stored: {len(took)} of {plan.runs} live runs")
        words[-1] += f", which took {_time_words(sum(took), len(took), jobs)}." if took else "."
        todo = len(plan.todo)
        forecast_of = f"{todo}, {_time_words(plan.seconds, todo, jobs)}" if todo else "none"
        words.append(f"To compute: {forecast_of}.")
    if anew:
        seconds = sum(forecast.forecast_seconds(anew, device))
        words.append(f"Computed at every reading and not stored: {_time_words(seconds, 1, 1)}.")
    return " ".join(words)


def _stored_seconds(stored: set[RunConfig]) -> list[float]:
    """Seconds that stored runs took."""
    corpus = packed.load_embedded()
    ids = [store.run_id_of(each, corpus) for each in stored]
    return [store.load_record(each)[0].provenance["seconds"] for each in ids]


def _time_words(seconds: float, runs: int, jobs: int) -> str:
    """How long runs of so many seconds in all take, `jobs` at a time, in words: "about 20 s"."""
    return f"about {round_time(seconds / min(jobs, runs))}"


def round_time(seconds: float) -> str:
    """The nearest of a ladder of round times, by ratio: "20 s", "2 min"."""
    ladder = {f"{step} {unit}": step * size for unit, size in UNITS.items() for step in ROUND_TIMES}
    return min(ladder, key=lambda words: abs(math.log(ladder[words] / max(seconds, 0.1))))


def refusal_message(call: Callable[[], object]) -> str:
    """For chapters: the sentence with which a call is refused, empty where it is not."""
    try:
        call()
    except CmpError as error:
        return str(error)
    return ""
