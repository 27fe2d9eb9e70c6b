"""Compute stored runs again, and compare the results."""

from typing import NamedTuple

import numpy as np
import torch

from cmp.data import Corpus
from cmp.evaluation import ROLES
from cmp.runs.machine import machine_differences
from cmp.runs.runner import NO_OBSERVER, Observer, execute
from cmp.runs.store import METRIC_KEYS, StoredRun, make_stored_run
from cmp.scale.execution import ExecutionConfig

TOLERANCE, TOLERATED_QUESTIONS = 4.0, 2000
"""Points by which A_KA or A_ZS of at least so many questions may differ on another machine,
anywhere on a trajectory. Rounding differs from the first step on, and in the end changes some
answers. For fewer questions, the limit grows as the standard error of a mean does. Of 20 published
runs that were computed again with older vector instructions, the largest difference was 3.4 points,
on whole tests. So this is a convention, not a bound."""


class Verdict(NamedTuple):
    """The result of comparing two computations of a run.

    Attributes:
        answer: "bitwise equal", "within tolerance" or "different".
        sentence: The reason, with the first score that differs.
    """

    answer: str
    sentence: str


def verify_run(
    run: StoredRun,
    corpus: Corpus,
    observer: Observer = NO_OBSERVER,
    device: str = "cpu",
    execution: ExecutionConfig | None = None,
) -> Verdict:
    """Compute a run again with the same number of threads, and compare the results."""
    threads = torch.get_num_threads()
    torch.set_num_threads(run.provenance["threads"])
    try:
        result = execute(run.config, corpus, observer, device=device, execution=execution)
    finally:
        torch.set_num_threads(threads)
    return compare_runs(run, make_stored_run(run.config, result, run.identity))


def compare_runs(stored: StoredRun, again: StoredRun) -> Verdict:
    """Compare two computations of a run. Scores may differ on a GPU, or between machines."""
    machines = machine_differences(stored.provenance, again.provenance)
    if not machines and ("began" in stored.provenance or "began" in again.provenance):
        machines = "the machines on which the run began and finished"
    if not machines and stored.provenance.get("device", "cpu") != "cpu":
        machines = "sums on a GPU"
    now, count = again.metrics[[*METRIC_KEYS, "score"]], len(stored.metrics)
    pairs = stored.metrics.merge(now, "left", METRIC_KEYS, suffixes=("", "_now"))
    complete = len(now) == count and pairs["score_now"].notna().all()
    different = pairs[pairs["score"] != pairs["score_now"]]
    if different.empty and again.weights == stored.weights and complete:
        return Verdict("bitwise equal", f"all {count} scores and the final weights are equal")
    reason = "the scores are equal, but the final weights are not"
    if len(different):
        row = different.iloc[0]
        reason = (
            f"{len(different)} of {count} scores differ, first {row['dataset']} "
            f"({row['scope']}) after {row['task']} tasks: stored {row['score']:.2f}, now "
            f"{row['score_now']:.2f}"
        )
    pairs["aggregate"] = pairs["role"].map({role: name for name, role in ROLES.items()})
    groups = pairs.groupby(["task", "scope", "aggregate"])
    means, questions = groups[["score", "score_now"]].mean(), groups["images"].sum()
    drift = (means["score_now"] - means["score"]).abs().dropna()
    allowed = TOLERANCE * np.sqrt(TOLERATED_QUESTIONS / questions).clip(lower=1)
    worst = (drift / allowed).idxmax() if len(drift) else None
    if worst is not None:
        reason += (
            f"; A_KA and A_ZS differ by at most {drift.max():.2f} points, and where it matters "
            f"most by {drift[worst]:.2f}, after {worst[0]} tasks on {questions[worst]:,} images"
        )
    if not machines:
        return Verdict("different", f"{reason}, although nothing else differs")
    is_within = complete and (worst is None or drift[worst] <= allowed[worst])
    if worst is not None:
        reason += f"; {allowed[worst]:.1f} are allowed there if {machines} differ"
    return Verdict("within tolerance" if is_within else "different", reason)
