"""`cmpt tune`: choose the peak of an update's learning rate on the validation split."""

import contextlib
import json
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from cmp import config
from cmp.errors import CmpError, Diverged
from cmp.evaluation import ROLES, make_test_sets
from cmp.files import SHORT_ID, check_target, child_path, read_kept, write_atomic, write_kept
from cmp.releases.sentences import count_of
from cmp.releases.update import check_room, own_steps, train_update, update_manager
from cmp.releases.update_plan import UpdatePlan, plan_update
from cmp.runs import store
from cmp.runs.runner import NO_OBSERVER, Observer
from cmp.scale import processes
from cmp.scale.devices import check_device
from cmp.scale.execution import ExecutionConfig

FACTOR = 3.0
"""Factor between neighbouring peaks."""
MOST_PEAKS = 9
"""The most peaks that are tried."""
SCORES = ("A_KA", "A_ZS", "GM")
CHOSEN = "# Chosen by `cmpt tune` on the validation split:"
"""The first line of the file with the best peak."""


def tune(
    start: str | os.PathLike[str],
    data: str | os.PathLike[str],
    settings: Mapping[str, Any] | Sequence[str] = (),
    *,
    folder: Path,
    peaks: Sequence[float] = (),
    device: str = "cpu",
    execution: ExecutionConfig | None = None,
    observer: Callable[[UpdatePlan], Observer] = lambda plan: NO_OBSERVER,
    on_row: Callable[[pd.Series], object] = lambda row: None,
    **pictures: Any,
) -> pd.DataFrame:
    """Try an update at several peaks, and score each on the validation split.

    While the best peak is the lowest or the highest, the next one beyond it is tried as well.
    Scores are kept in a folder, so that the same call continues after a stop.

    Args:
        start, data, settings, **pictures: As for `cmp.releases.update_plan.plan_update`.
        folder: The folder for the scores and, meanwhile, the checkpoints.
        peaks: The first peaks to try; by default, the config's own, a third of it, and three times
            as much.
        device: "cpu" or "cuda".
        execution: How steps are computed.
        observer: Given the plan of an update, returns the observer of its training.
        on_row: Called with each row of the table as soon as it is known.

    Returns:
        One row per peak, sorted: `peak`; those of A_KA, A_ZS and GM that are scored, in percent,
        NaN where training diverged; and `is_best`.

    Raises:
        CmpError: The update cannot be computed, it has no validation images, or it diverged at
            every peak.
        Interrupted: SIGINT, SIGTERM or SIGHUP was received; the same call continues.

    Example:
        >>> table = cmp.tune(release, "pictures/2026-02", folder=Path("tuning"))  # doctest: +SKIP
        >>> table.loc[table["is_best"], "peak"].item()  # doctest: +SKIP
        0.0024
    """
    check_device(device)
    with processes.first_process_first():
        middle = plan_update(start, data, settings, **pictures).on_validation()
    middle.check_parent()
    arrived = middle.corpus.by_role("adapt")
    if not any(len(middle.corpus.rows("validation", dataset=name)) for name in arrived):
        raise CmpError(
            "cmpt tune: no update has validation images to compare peaks on; add some with a "
            "column `split` in a table, or wait for a larger update"
        )
    center = middle.config.schedule.peak
    first = [*peaks] or [center / FACTOR, center, center * FACTOR]
    waiting = [*dict.fromkeys(map(_round, first))]
    rows: dict[float, dict[str, float]] = {}
    while waiting and len(rows) < max(MOST_PEAKS, len(peaks)):
        peak = waiting.pop(0)
        plan = middle.with_peak(peak)
        rows[peak] = _scores_of(plan, folder, observer(plan), device, execution)
        on_row(pd.Series({"peak": peak} | rows[peak]))
        best = _best_peak(rows)
        if not waiting and best is not None:
            if best == min(rows):
                waiting.append(_round(best / FACTOR))
            if best == max(rows):
                waiting.append(_round(best * FACTOR))
    best = _best_peak(rows)
    if best is None:
        tried = ", ".join(f"{peak:g}" for peak in sorted(rows))
        raise CmpError(f"cmpt tune: training diverged at each peak ({tried}); give lower --peaks")
    if not processes.rank():
        with contextlib.suppress(OSError):  # it has other checkpoints, or is gone
            (folder / "checkpoints").rmdir()
        _warn_of_others(folder / "checkpoints")
    table = pd.DataFrame([{"peak": peak} | rows[peak] for peak in sorted(rows)])
    return table.assign(is_best=table["peak"] == best)


def _warn_of_others(checkpoints: Path) -> None:
    """Warn if checkpoints of other updates remain, since nothing else names their folder."""
    sizes = [path.stat().st_size for path in checkpoints.rglob("*.safetensors")]
    if sizes:
        warnings.warn(
            f"{checkpoints}: has {sum(sizes) / 1e9:.2g} GB of checkpoints of other updates, whose "
            "tuning was stopped; repeat their commands, or delete this folder",
            stacklevel=3,
        )


def describe_evidence(plan: UpdatePlan) -> str:
    """Return a sentence on how many images the scores of a tried peak rest on, and what one image
    is worth.

    Args:
        plan: The plan of the update, scored on the validation split.
    """
    section, parts = plan.config.evaluation, []
    subset = None if section.full else section.subset
    sets = make_test_sets(plan.corpus, section.split, subset)
    for name, role in ROLES.items():
        sizes = [len(each.rows) for each in sets if each.dataset.role == role]
        if sizes:
            worth = 100 / (min(sizes) * len(sizes))
            at_most = "" if len({*sizes}) == 1 else "up to "
            parts.append(f"{name} rests on {count_of(sum(sizes), 'image')}, where one is "
                         f"worth {at_most}{worth:.1f} points")  # fmt: skip
    return f"{'; '.join(parts)}; differences of a few images may be chance"


def _round(peak: float) -> float:
    """Return a peak with three digits, as it is printed and written."""
    return float(f"{peak:.3g}")


def _best_peak(rows: Mapping[float, Mapping[str, float]]) -> float | None:
    """Return the peak with the highest GM, or A_KA if nothing else is scored; None if training
    diverged at all peaks."""
    scored = {peak: row.get("GM", row["A_KA"]) for peak, row in rows.items() if row}
    return max(scored, key=scored.__getitem__, default=None)


def _scores_of(
    plan: UpdatePlan,
    folder: Path,
    observer: Observer,
    device: str,
    execution: ExecutionConfig | None,
) -> dict[str, float]:
    """Return the scores after an update, from the folder if they are stored there; none if it
    diverged.

    With several processes, the first reads the folder and tells the others.
    """
    path = child_path(folder, plan.id[:SHORT_ID], ".json")
    known = json.loads(processes.broadcast("" if processes.rank() else json.dumps(read_kept(path))))
    work = folder / "checkpoints" / plan.id[:SHORT_ID]
    if known is not None and not work.exists():
        return known
    if known is None and not processes.rank():
        check_room(plan, folder, work)
    with update_manager(plan, work, device) as manager:
        if known is not None:  # killed before it had deleted the checkpoints
            return known
        # only the first process shows progress
        seen_by = own_steps(plan, observer) if manager else NO_OBSERVER
        scores = {}
        with contextlib.suppress(Diverged):
            result = train_update(plan, device, execution, seen_by, manager)
            last = store.final_scores(store.trajectory(result.metrics))
            scores = {name: x for name in SCORES if not math.isnan(x := float(last[name].iloc[0]))}
        if manager:
            write_kept(path, scores)
    return scores


def check_choice(path: Path) -> None:
    """Check, before hours of computing, that `write_choice` can write a file.

    Args:
        path: The file, NAME.yaml.

    Raises:
        CmpError: It exists, and `cmpt tune` did not write it.
    """
    check_target(path)
    if path.exists() and not path.read_bytes().startswith(CHOSEN.encode()):
        raise CmpError(f"{path}: already exists, and is not from `cmpt tune`; name another file")


def write_choice(
    table: pd.DataFrame, path: Path, settings: Mapping[str, Any] | None = None
) -> float:
    """Write the best peak, and the settings that it was tuned with, for `cmpt update --settings`;
    return the peak.

    Args:
        table: The result of `tune`.
        path: The file, NAME.yaml.
        settings: The settings that were given to `tune`.
    """
    peak = float(table.loc[table["is_best"], "peak"].iloc[0])
    lines = [CHOSEN]
    rounded = table.round(dict.fromkeys(SCORES, 2))
    lines += [f"# {line}" for line in rounded.to_string(index=False).splitlines()]
    tree = config.overlay(dict(settings or {}), {"schedule": {"peak": peak}})
    write_atomic(path, "\n".join(lines) + "\n" + json.dumps(tree) + "\n")
    return peak
