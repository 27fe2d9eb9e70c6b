"""How far weights go over a stream, and in which directions (spec 4; figures of chapter 03)."""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from torch import Tensor

from cmp.merging import parts


def drift(ends: Sequence[Mapping[str, Tensor]]) -> tuple[pd.DataFrame, np.ndarray]:
    """How far each task took the weights, and the cosines between the steps of all tasks.

    ends: the weights before the stream and after each of T tasks. Returns (a row a task (index
    `task`, from 1): `step`, the length of theta_t - theta_{t-1}, and `away`, of theta_t - theta_0,
    in percent of the length of theta_0; cosines [T, T] of the steps).
    """
    names = [name for name, x in ends[0].items() if x.is_floating_point()]
    steps = [
        {name: now[name] - before[name] for name in names}
        for before, now in itertools.pairwise(ends)
    ]
    away = [{name: now[name] - ends[0][name] for name in names} for now in ends[1:]]
    product = sum(parts.products([step[name] for step in steps]) for name in names)
    size = {key: _lengths(of, names) for key, of in (("step", steps), ("away", away))}
    [whole] = _lengths([ends[0]], names)
    index = pd.RangeIndex(1, len(ends), name="task")
    table = pd.DataFrame({key: 100 * x / whole for key, x in size.items()}, index)
    lengths = np.sqrt(np.diag(product))
    return table, product / np.outer(lengths, lengths)


def _lengths(models: Sequence[Mapping[str, Tensor]], names: Sequence[str]) -> np.ndarray:
    squares = [sum(float(x[name].double().square().sum()) for name in names) for x in models]
    return np.sqrt(squares)
