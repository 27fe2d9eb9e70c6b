"""Who is told of a run's progress."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from cmp.evaluation import Scores


@dataclass(frozen=True)
class Observer:
    """What is told of a run's progress; every hook may be left out.

    step: (task, step, loss, model) after each step; the model must not be changed. task: (number of
    tasks done, scores) after each evaluation, with 0 for the one before the stream; of the subset,
    if there is one, so that they can be compared. resumed: (number of steps done before), first of
    all, when a run goes on from a checkpoint.
    """

    step: Callable[[int, int, Tensor, nn.Module], None] = lambda task, step, loss, model: None
    task: Callable[[int, Scores], None] = lambda done, scores: None
    resumed: Callable[[int], None] = lambda steps: None


SILENT = Observer()
