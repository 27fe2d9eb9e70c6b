"""A chapter that is being read: its parameters checked, what is stored of it and how long the rest
takes said, by one call in the cell after the parameters."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch

from cmp import config, studies
from cmp.book import chapters
from cmp.config import RunConfig
from cmp.data import corpus as corpora
from cmp.errors import CmpError
from cmp.runs import forecast, plans, store
from cmp.studies import Study

ROUND = (1, 2, 5, 10, 20, 30, 45)
UNITS = {"s": 1, "min": 60, "h": 3600, "days": 86400}

Grid = dict[tuple[str, int], RunConfig]
Changes = dict[str, list[str]]


def begin(
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
    chapters.guard(scope)
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
        print("\n".join(plans.of_study(live, device)))
        raise SystemExit(0)
    told = status(list(live.values()), list(anew) * seeds, jobs, device)
    print(f"Profile {profile}, device {device}, jobs {jobs}. {told}".strip())
    return live


def status(live: list[RunConfig], anew: list[RunConfig], jobs: int = 1, device: str = "cpu") -> str:
    """What is stored of some runs and what it took, how many are missing and what they will take;
    and what others will take that are never stored. Times are rounded, so that the same text comes
    again."""
    plan, words = studies.plan(live, device), []
    if live:
        took = _took(set(live) - set(plan.todo))
        words.append(f"Stored: {len(took)} of {plan.runs} live runs")
        words[-1] += f", which took {_about(sum(took), len(took), jobs)}." if took else "."
        todo = len(plan.todo)
        forecast_of = f"{todo}, {_about(plan.seconds, todo, jobs)}" if todo else "none"
        words.append(f"To compute: {forecast_of}.")
    if anew:
        seconds = sum(forecast.seconds(anew, device))
        words.append(f"Computed at every reading and not stored: {_about(seconds, 1, 1)}.")
    return " ".join(words)


def _took(stored: set[RunConfig]) -> list[float]:
    """Seconds that stored runs took."""
    corpus = corpora.load()
    ids = [store.identify(each, corpus) for each in stored]
    return [store.about(each)[0].provenance["seconds"] for each in ids]


def _about(seconds: float, runs: int, jobs: int) -> str:
    """How long runs of so many seconds in all take, `jobs` at a time, in words: "about 20 s"."""
    return f"about {rounded(seconds / min(jobs, runs))}"


def rounded(seconds: float) -> str:
    """The nearest of a ladder of round times, by ratio: "20 s", "2 min"."""
    ladder = {f"{step} {unit}": step * size for unit, size in UNITS.items() for step in ROUND}
    return min(ladder, key=lambda words: abs(math.log(ladder[words] / max(seconds, 0.1))))


def refused(call: Callable[[], object]) -> str:
    """For chapters: the sentence with which a call is refused, empty where it is not."""
    try:
        call()
    except CmpError as error:
        return str(error)
    return ""
