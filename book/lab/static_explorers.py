"""What the explorers say, for every setting of a grid: the page of a chapter answers from such a
table where there is no Python."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from lab import analyses
from lab.analyses import Surface
from lab.explorers import mixture, schedule

from cmp.errors import CmpError
from cmp.experiments import results, statistics
from cmp.files import write_atomic
from cmp.registry import option_names

STUDIES = {"mixture": "07", "schedule": "04"}
"""The published study that an explorer's table rests on."""
PARTS = 20
"""Steps from one corner of the triangle of mixtures to the next."""
BATCH, TASKS, STEPS, REPLAY = 64, 8, 40, 0.1
LENGTHS = (4, 8, 16)
"""Numbers of tasks that the schedule's table holds."""
PEAKS = tuple(float(f"{10**exponent:.2g}") for exponent in np.arange(-4, -2.35, 0.1))
DIGITS = 4


def write_tables(folder: Path) -> None:
    """Write each explorer's table as `NAME.json` in a folder that is there."""
    for name, table in (("mixture", mixture_table()), ("schedule", schedule_table())):
        write_atomic(folder / f"{name}.json", json.dumps(table, separators=(",", ":")))


def mixture_table() -> dict[str, Any]:
    """`points`: "P/D/B" -> what is seen, the command, the scores, the nearest stored mixtures;
    `stored`: those; `misses`: what interpolation adds to the intervals."""
    found = analyses.surface(results.published_metrics(STUDIES["mixture"]), mixture.LIKE)
    means = found.scores.mean(axis=0)
    stored = zip(found.names, found.shares.tolist(), means.round(1).tolist(), strict=True)
    return {
        "stored": [{"name": name, "shares": at, "scores": mean} for name, at, mean in stored],
        "replicates": len(found.scores),
        "misses": found.misses().round(1).to_list(),
        "points": {shares_key(shares): _mixture(shares, found) for shares in _shares(found)},
    }


def shares_key(shares: list[float]) -> str:
    """The name of a mixture in the table: its shares with three digits."""
    return "/".join(f"{share:.3f}" for share in shares)


def _shares(found: Surface) -> Iterator[list[float]]:
    """The points of the grid, then the stored mixtures themselves."""
    for pool, update in itertools.product(range(PARTS + 1), repeat=2):
        if pool + update <= PARTS:
            yield [part / PARTS for part in (pool, update, PARTS - pool - update)]
    yield from found.shares.tolist()


def _mixture(shares: list[float], found: Surface) -> dict[str, Any]:
    run = mixture.run_of(shares, BATCH, TASKS, STEPS, REPLAY)
    sizes = REPLAY * mixture.POOL, mixture.ARRIVING / TASKS
    parts, passes = statistics.expected_counts(run.mixture, BATCH, TASKS, STEPS, *sizes)
    near = found.nearest(run.mixture)
    distances = zip(near["setting"], near["distance"], strict=True)
    scores = found.predict(run.mixture).round(1) if found.holds(run.mixture) else None
    return {
        "sentence": mixture.mixture_sentence(run.mixture, passes),
        "batch": parts.iloc[-1].round(1).to_list(),
        "command": schedule.assignments(run),
        "scores": None if scores is None else scores.to_numpy().tolist(),
        "near": [[found.names.index(name), round(far, 3)] for name, far in distances],
    }


def schedule_table() -> dict[str, Any]:
    """`curves`: every curve with every meta schedule that it goes with, in multiples of the peak,
    for `LENGTHS` tasks of `steps` steps, and for each of `peaks` the nearest of `stored`."""
    known = schedule.stored_schedules(results.published_metrics(STUDIES["schedule"]))
    stored = [
        {"name": each.name, "scores": [round(each.A_KA, 1), round(each.A_ZS, 1)]}
        | {"besides": " ".join(each.besides)}
        for each in known
    ]
    curves = [
        {"name": name, "meta": meta, "lengths": lengths, "near": _nearest(name, meta, known)}
        for name, meta in itertools.product(option_names("schedule"), option_names("meta_schedule"))
        if (lengths := _lengths(name, meta))
    ]
    return {"steps": STEPS, "peaks": PEAKS, "stored": stored, "curves": curves}


def _lengths(name: str, meta: str) -> dict[str, list[float]]:
    """Number of tasks -> the rates in multiples of the peak; none where the two do not go
    together, or the meta schedule asks for a list of peaks."""
    try:
        runs = {T: schedule.schedule_run(name, meta, 1.0, T, STEPS) for T in LENGTHS}
        return {str(T): _rounded(schedule.schedule_rates(run)) for T, run in runs.items()}
    except (CmpError, ValueError):
        return {}


def _rounded(values: np.ndarray) -> list[float]:
    return [float(f"{value:.{DIGITS}g}") for value in values.ravel()]


def _nearest(name: str, meta: str, known: list[schedule.Stored]) -> list[list]:
    """For each peak, the nearest stored settings as [place in `stored`, distance]."""
    names, found = [each.name for each in known], []
    for peak in PEAKS:
        near = schedule.nearest_schedules(
            schedule.schedule_run(name, meta, peak, TASKS, STEPS), known, 5
        )
        pairs = zip(near["setting"], near["distance"], strict=True)
        found.append([[names.index(setting), far] for setting, far in pairs])
    return found
