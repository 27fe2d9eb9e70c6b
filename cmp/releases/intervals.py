"""95% intervals of paired differences and of shares, over groups that are independent.

All drawings of one emoji are named or missed together. As in `cmp.evaluation.aggregate`, they count
as one observation, so that the errors here are those of a bootstrap over groups.
"""

import math
from statistics import NormalDist

import numpy as np

LEVEL = 0.95
Z = NormalDist().inv_cdf((1 + LEVEL) / 2)
ROUNDING = 1e-12
"""A standard error below this is zero, since sums of weights are rounded."""


def t_quantile(freedom: int) -> float:
    """Return the two-sided quantile of Student's t at `LEVEL`.

    It is an expansion in 1 / freedom (Abramowitz and Stegun, 26.7.5), which is too small by 1% at
    two degrees and by 0.1% at three. scipy has the exact one, but comes with an extra only.

    Args:
        freedom: Degrees of freedom, at least 1.
    """
    if freedom == 1:
        return math.tan(math.pi * LEVEL / 2)
    terms = (
        (Z**3 + Z) / 4,
        (5 * Z**5 + 16 * Z**3 + 3 * Z) / 96,
        (3 * Z**7 + 19 * Z**5 + 17 * Z**3 - 15 * Z) / 384,
        (79 * Z**9 + 776 * Z**7 + 1482 * Z**5 - 1920 * Z**3 - 945 * Z) / 92160,
    )
    return Z + sum(term / freedom**power for power, term in enumerate(terms, start=1))


def wilson_interval(share: float, count: float) -> tuple[float, float]:
    """Return Wilson's interval of a share of independent observations.

    Args:
        share: The share, in [0, 1].
        count: The number of observations, possibly an effective one.
    """
    if not count > 0:
        return 0.0, 1.0
    middle = (share + Z**2 / (2 * count)) / (1 + Z**2 / count)
    half = Z * math.sqrt(share * (1 - share) / count + (Z / count) ** 2 / 4) / (1 + Z**2 / count)
    return max(0.0, middle - half), min(1.0, middle + half)


def mean_interval(
    value: np.ndarray, weight: np.ndarray, part: np.ndarray, group: np.ndarray
) -> tuple[float, float, float]:
    """Return the mean of paired differences with its interval.

    If the differences within each dataset are all equal, such as zero, the interval is at least as
    wide as that of a share of zero, since other images could differ. For the same reason, each of
    several datasets adds the error of one more group: a small one whose few images happen to agree
    would add none, although it may weigh as much as a large one.

    Args:
        value: New minus old of each question, in [-1, 1].
        weight: The weight of each question in the mean; those of a part sum to the part's weight.
        part: The number of each question's dataset, from whose mean deviations are taken.
        group: The group of each as a number.

    Returns:
        The mean and the interval's ends, which are NaN if there is only one group.
    """
    mean = float(weight @ value)
    groups = len(np.unique(group))
    if groups < 2:
        return mean, float("nan"), float("nan")
    totals = np.bincount(part, weight)
    means = np.bincount(part, weight * value) / np.where(totals, totals, 1)
    influence = np.bincount(group, weight * (value - means[part]))
    error = float(np.linalg.norm(influence)) * math.sqrt(groups / (groups - 1))
    more = np.linalg.norm(_group_weights(weight, part, group))
    half = t_quantile(groups - 1) * math.hypot(error, more)
    if error < ROUNDING:
        half = max(half, wilson_interval(0, groups)[1])
    return mean, max(-1.0, mean - half), min(1.0, mean + half)


def _group_weights(weight: np.ndarray, part: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Return the mean weight of a group of each dataset, or nothing if there is only one dataset,
    whose own deviations are enough."""
    parts, part = np.unique(part, return_inverse=True)
    if len(parts) < 2:
        return np.zeros(0)
    among = np.unique(part * (group.max() + 1) + group) // (group.max() + 1)
    return np.bincount(part, weight) / np.bincount(among)


def share_interval(
    hit: np.ndarray, among: np.ndarray, weight: np.ndarray, part: np.ndarray, group: np.ndarray
) -> tuple[float, float, float]:
    """Return a weighted share with its interval: Wilson's, for as many independent observations as
    would have the same standard error. Each of several datasets adds an error as in
    `mean_interval`.

    Args:
        hit: Whether each question counts, bool.
        among: Whether it is in the set of which the share is taken, bool.
        weight: Of each question.
        part: The number of each question's dataset.
        group: The group of each as a number.

    Returns:
        The share and its interval's ends, in [0, 1]; NaN if no question is in `among`.
    """
    total = float(weight @ among)
    if not total:
        return float("nan"), float("nan"), float("nan")
    share = float(weight @ (hit & among)) / total
    influence = np.bincount(group, weight * among * (hit - share)) / total
    count = len(np.unique(group[among]))
    more = _group_weights(weight[among] / total, part[among], group[among])
    if variance := float(influence @ influence + more @ more):
        usual = max(share, more.sum())  # that of one more group of each dataset, if there are fewer
        count = min(float(among.sum()), max(1.0, usual * (1 - usual) / variance))
    return share, *wilson_interval(share, count)
