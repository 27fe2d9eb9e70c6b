"""Retention at equal accumulation: how far a setting ends above plain fine-tuning's front.

A learning rate moves plain fine-tuning along a trade-off: with a higher peak it gains more A_KA and
keeps less A_ZS. The front is that curve, fitted to means over replicates of one family of plain
fine-tuning at several peaks. The *gain* of a setting is its A_ZS minus that of the front at the
same A_KA, in points; its mirror is the A_KA that it has beyond the front at the same A_ZS.

Errors are those of a jackknife that leaves out one base at a time, from the setting and the front
alike, so that they hold the front's own error.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.interpolate import PchipInterpolator
from scipy.optimize import brentq, isotonic_regression

from cmp.errors import CmpError

MIN_PEAKS, MIN_LOCAL, MAX_RATIO = 6, 2, 1.61
"""Peaks that a front has at least, those of a local one, and the largest factor between neighbours:
1.6 and rounding. A local front serves between its own ends, and beyond its last one only where a
higher peak has been seen to gain less."""


@dataclass(frozen=True)
class Front:
    """A falling curve through the plane of A_KA and A_ZS.

    Attributes:
        accumulation: A_KA of its points, rising, [n].
        retention: A_ZS of its points, falling, [n].
    """

    accumulation: np.ndarray
    retention: np.ndarray

    def retention_at(self, accumulation: float) -> float:
        """Return the A_ZS at an A_KA; beyond its last point that of the last point."""
        last = self.accumulation[-1]
        return float(self._curve(min(accumulation, last)))

    def slope_at(self, accumulation: float) -> float:
        """Return dA_ZS/dA_KA at an A_KA; 0 beyond its last point, where the front goes nowhere."""
        if accumulation > self.accumulation[-1]:
            return 0.0
        return float(self._curve.derivative()(accumulation))

    def accumulation_at(self, retention: float) -> float:
        """Return the A_KA at an A_ZS; NaN where the front has no such A_ZS."""
        if not self.retention[-1] <= retention <= self.retention[0]:
            return float("nan")
        curve, (low, *_, high) = self._curve, self.accumulation
        if curve(low) <= retention or curve(high) >= retention:  # an end, but for rounding
            return float(low if curve(low) <= retention else high)
        return float(brentq(lambda x: curve(x) - retention, low, high))

    @property
    def _curve(self) -> PchipInterpolator:
        return PchipInterpolator(self.accumulation, self.retention)


def fit_front(
    peaks: np.ndarray, accumulation: np.ndarray, retention: np.ndarray, is_local: bool = False
) -> Front:
    """Fit a front to the mean scores of plain fine-tuning at several peaks.

    What lies beyond the peak of the highest A_KA is cut. Up to there A_KA is made to rise and A_ZS
    to fall with the peak by isotonic regression; a monotone cubic goes through what results.

    Args:
        peaks: Learning rates, rising, [n].
        accumulation: Mean A_KA at each, [n].
        retention: Mean A_ZS at each, [n].
        is_local: Whether `MIN_LOCAL` peaks will do.

    Raises:
        CmpError: There are too few peaks, they are too far apart, or A_KA rises nowhere.
    """
    least = MIN_LOCAL if is_local else MIN_PEAKS
    if len(peaks) < least or np.max(peaks[1:] / peaks[:-1]) > MAX_RATIO:
        raise CmpError(
            f"front: peaks {', '.join(f'{peak:g}' for peak in peaks)}: at least {least} are "
            f"needed, neighbours at most a factor of {MAX_RATIO:.1f} apart"
        )
    last = int(np.argmax(accumulation)) + 1
    rising = isotonic_regression(accumulation[:last]).x
    falling = isotonic_regression(retention[:last], increasing=False).x
    # peaks with one A_KA or one A_ZS count as one point, so that the curve can be read both ways
    points = pd.DataFrame({0: rising, 1: falling}).round(9)  # equal means differ by rounding
    points = points.groupby(0, as_index=False).mean().round(9)
    points = points.groupby(1, as_index=False, sort=False).mean().to_numpy()[:, ::-1]
    if len(points) < 2:
        raise CmpError("front: A_KA does not rise with the peak: lower peaks are needed")
    return Front(points[:, 0], points[:, 1])


@dataclass(frozen=True)
class Gain:
    """What a setting keeps beyond the front.

    Attributes:
        values: Of each replicate, in points of A_ZS; their mean is the estimate, [replicates].
        pseudo: The jackknife's pseudo-values, one per base; they count as independent, [bases].
        mirror: Points of A_KA beyond the front at the same A_ZS; NaN where it has no such A_ZS.
        slope: dA_ZS/dA_KA of the front there.
        nearest: The front's setting that the replicates are paired with.
        is_bound: Whether A_KA is more than the front reaches, so that the gain is at least this.
    """

    values: pd.Series
    pseudo: pd.Series
    mirror: float
    slope: float
    nearest: str
    is_bound: bool


def measure_gain(
    own: pd.DataFrame,
    front: dict[str, pd.DataFrame],
    peaks: dict[str, float],
    name: str,
    is_local: bool = False,
) -> Gain:
    """Return what a setting keeps beyond the front.

    The estimate is the distance of the mean scores from the fitted curve. Each replicate's part in
    it is paired with the same replicate of the front's nearest peak, along the front's slope.

    Args:
        own: A row per replicate of the setting: `A_KA`, `A_ZS` and `base`.
        front: The same of each of the front's settings.
        peaks: The peak of each of those.
        name: What errors call the setting.
        is_local: Whether the front is local: beyond its ends it says nothing.

    Raises:
        CmpError: The front does not cover the A_KA, lacks replicates, or cannot be fitted.
    """
    if missing := [each for each in front if not own.index.isin(front[each].index).all()]:
        raise CmpError(f"{name!r}: the front's {missing[0]!r} lacks some of its replicates")
    ordered = sorted(front, key=lambda each: peaks[each])
    front = {each: front[each].loc[own.index] for each in ordered}
    values, mirror, slope, nearest, is_bound = _gain(own, front, peaks, name, is_local)
    estimate, bases, pseudo = float(values.mean()), own["base"].unique(), {}
    for base in bases if len(bases) > 1 else []:
        keep = own["base"] != base
        part = {each: table[keep] for each, table in front.items()}
        without = float(_gain(own[keep], part, peaks, name, is_local, nearest)[0].mean())
        pseudo[base] = len(bases) * estimate - (len(bases) - 1) * without
    return Gain(values, pd.Series(pseudo, dtype=float), mirror, slope, nearest, is_bound)


def _gain(
    own: pd.DataFrame,
    front: dict[str, pd.DataFrame],
    peaks: dict[str, float],
    name: str,
    is_local: bool,
    nearest: str | None = None,
) -> tuple[pd.Series, float, float, str, bool]:
    """Return the gain per replicate, its mirror, the slope, the nearest peak and whether it is a
    bound; `nearest` pairs with that peak."""
    means = pd.DataFrame({each: table[["A_KA", "A_ZS"]].mean() for each, table in front.items()}).T
    curve = fit_front(np.array([peaks[each] for each in front]), *means.to_numpy().T, is_local)
    mean, last = own[["A_KA", "A_ZS"]].mean(), curve.accumulation[-1]
    has_maximum = means["A_KA"].idxmax() != means.index[-1]
    if is_local and mean["A_KA"] > last and not has_maximum:
        raise CmpError(
            f"{name!r}: its A_KA of {mean['A_KA']:.1f} is beyond the local front, which ends at "
            f"{last:.1f}: a higher peak of the front or a lower one of the setting"
        )
    if mean["A_KA"] < curve.accumulation[0]:
        raise CmpError(
            f"{name!r}: its A_KA of {mean['A_KA']:.1f} is below the front, which begins at "
            f"{curve.accumulation[0]:.1f}: a lower peak of the front or a higher one of the setting"
        )
    if nearest is None:
        reached = means[: int(np.argmax(means["A_KA"])) + 1]
        nearest = str((reached["A_KA"] - mean["A_KA"]).abs().idxmin())
    gain, slope = mean["A_ZS"] - curve.retention_at(mean["A_KA"]), curve.slope_at(mean["A_KA"])
    apart = own - front[nearest]
    values = apart["A_ZS"] - slope * apart["A_KA"]
    values += gain - values.mean()
    mirror = float(mean["A_KA"] - curve.accumulation_at(mean["A_ZS"]))
    return values, mirror, slope, nearest, bool(mean["A_KA"] > last)
