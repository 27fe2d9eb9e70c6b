"""Retention at equal accumulation: how far a setting ends above plain fine-tuning's front.

A learning rate moves plain fine-tuning along a trade-off: with a higher peak it gains more A_KA and
keeps less A_ZS. The front is that curve, fitted to means over replicates of one family of plain
fine-tuning at several peaks. The *gain* of a setting is its A_ZS minus that of the front at the
same A_KA, in points; its mirror is the A_KA that it has beyond the front at the same A_ZS.

Errors are those of a jackknife that leaves out one base at a time, from the setting and the front
alike, so that they hold the front's own error. The whole sample decides what is asked: whether the
front covers the setting, up to which peak it goes, and whether the gain is a bound. A part of it
that happens to lie a little beyond the front's ends is measured from the tangent there, see
`REACH`, because leaving it out, or judging by it, would make the interval hang on one base.

Beyond its last point a front is flat, and a gain there is a bound. That a setting lies beyond it
may be noise, though; then the error of the A_KA counts as on the tangent, see `DOUBT`.
"""

import functools
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.interpolate import PchipInterpolator
from scipy.optimize import brentq, isotonic_regression

from cmp.errors import CmpError


class OutsideFrontError(CmpError):
    """A front says nothing of a setting, as it does not reach the setting's A_KA."""


MIN_PEAKS, MIN_LOCAL, MIN_SIGN, MAX_RATIO = 6, 4, 3, 1.61
"""Peaks that a front has at least, those of a local one, those of one that is to tell a sign alone,
and the largest factor between neighbours: 1.6 and rounding. A local front serves between its own
ends, and beyond its last one only where a higher peak has been seen to gain less."""
FLAT = 1.0
"""Points of A_KA that a front's last point may lack of the highest. Peaks beyond it gain hardly
more and retain less, so that a gain there would hang on which of them happens to gain most."""
REACH = 0.5
"""Points of A_KA by which the mean may lie beyond an end of the front where one base is left
out."""
DOUBT = 4.0
"""Standard errors up to which a setting's distance from the front's last point may be noise: about
half a t-interval over ten bases at the level of the claims. Were the front flat there for the error
of A_KA, too, intervals where it is steep would miss the gain eight times as often as they say."""
BELOW, BEYOND = "below the front", "beyond the front"
"""Where a setting lies of which the front says nothing, as errors have it."""


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
        return float(self._curve(min(accumulation, self.accumulation[-1])))

    def extended_to(self, accumulation: float) -> float:
        """Return the A_ZS at an A_KA; beyond both ends along the tangent."""
        inside = min(max(accumulation, self.accumulation[0]), self.accumulation[-1])
        return self.retention_at(inside) + self.slope_at(inside) * (accumulation - inside)

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

    @functools.cached_property
    def _curve(self) -> PchipInterpolator:
        return PchipInterpolator(self.accumulation, self.retention)


def fit_front(
    peaks: np.ndarray,
    accumulation: np.ndarray,
    retention: np.ndarray,
    least: int = MIN_PEAKS,
    count: int | None = None,
) -> Front:
    """Fit a front to the mean scores of plain fine-tuning at several peaks.

    Peaks beyond the front's last point (see `count_points`) are cut. Up to there A_KA is made to
    rise and A_ZS to fall with the peak by isotonic regression; a monotone cubic goes through what
    results.

    Args:
        peaks: Learning rates, rising, [n].
        accumulation: Mean A_KA at each, [n].
        retention: Mean A_ZS at each, [n].
        least: How many peaks it takes.
        count: How many peaks count, from the lowest, where that is known: those of the whole
            sample, so that a part of it cannot cut the front elsewhere.

    Raises:
        CmpError: There are too few peaks, they are too far apart, or A_KA rises nowhere.
    """
    check_peaks(peaks, least)
    last = count or count_points(accumulation)
    rising = isotonic_regression(accumulation[:last]).x
    falling = isotonic_regression(retention[:last], increasing=False).x
    # peaks with one A_KA or one A_ZS count as one point, so that the curve can be read both ways
    rising, falling = _merge_ties(rising, falling)
    falling, rising = _merge_ties(-falling, rising)
    if len(rising) < 2:
        raise CmpError("front: A_KA does not rise with the peak: lower peaks are needed")
    return Front(rising, -falling)


def count_points(accumulation: np.ndarray) -> int:
    """Return how many peaks, from the lowest, make a front, of their mean A_KA, [n]: it ends at the
    first that is within `FLAT` of the highest."""
    return int(np.argmax(accumulation >= np.max(accumulation) - FLAT)) + 1


def check_peaks(peaks: np.ndarray, least: int) -> None:
    """Raise `CmpError` unless peaks, rising, [n], are enough for a front and close enough."""
    if len(peaks) < least or np.max(peaks[1:] / peaks[:-1]) > MAX_RATIO:
        raise CmpError(
            f"front: peaks {', '.join(f'{peak:g}' for peak in peaks)}: at least {least} are "
            f"needed, neighbours at most a factor of {MAX_RATIO:.1f} apart"
        )


def _merge_ties(keys: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the distinct keys, rising, and the mean of the values of each; equal keys may differ
    by rounding."""
    distinct, place = np.unique(keys.round(9), return_inverse=True)
    return distinct, np.bincount(place, values) / np.bincount(place)


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
    least: int | None = None,
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
        least: How many peaks the front takes; `MIN_LOCAL` or `MIN_PEAKS` where None.

    Raises:
        OutsideFrontError: The front does not cover the A_KA.
        CmpError: The front lacks replicates or cannot be fitted.
    """
    if missing := [each for each in front if not own.index.isin(front[each].index).all()]:
        raise CmpError(f"{name!r}: the front's {missing[0]!r} lacks some of its replicates")
    least = least or (MIN_LOCAL if is_local else MIN_PEAKS)
    ordered = sorted(front, key=lambda each: peaks[each])
    rates = np.array([peaks[each] for each in ordered])
    tables = [own, *(front[each].loc[own.index] for each in ordered)]
    scores = np.array([(table["A_KA"], table["A_ZS"]) for table in tables]).swapaxes(1, 2)
    (gained, kept), *points = scores.mean(axis=1)
    reached = np.array(points)[:, 0]
    count = count_points(reached)
    curve = fit_front(rates, *np.array(points).T, least)
    _check_covered(name, gained, curve, is_local and count == len(rates))
    slope, is_bound = curve.slope_at(gained), bool(gained > curve.accumulation[-1])
    nearest = ordered[int(np.argmin(np.abs(reached[:count] - gained)))]
    apart = own - front[nearest].loc[own.index]
    values = apart["A_ZS"] - slope * apart["A_KA"]
    estimate = float(kept - curve.retention_at(gained))
    values += estimate - values.mean()
    bases, parts = own["base"].unique(), []
    for base in bases if len(bases) > 1 else []:
        part = scores[:, (own["base"] != base).to_numpy()].mean(axis=1)
        parts.append(_distance_of_part(part, rates, least, count, is_bound, name))
    distances, beyond = np.array(parts).reshape(-1, 2).T
    pseudo = _pseudo_values(estimate, distances)
    if is_bound and parts:
        last = curve.accumulation[-1]
        over = _pseudo_values(gained - last, beyond)
        if gained - last < DOUBT * over.std(ddof=1) / np.sqrt(len(over)):
            pseudo -= curve.slope_at(last) * (over - (gained - last))
    by_base = pd.Series(pseudo, bases[: len(parts)], dtype=float)
    mirror = float(gained - curve.accumulation_at(kept))
    return Gain(values, by_base, mirror, slope, nearest, is_bound)


def _pseudo_values(whole: float, parts: np.ndarray) -> np.ndarray:
    """Return the jackknife's pseudo-values, from those of the whole sample and of its parts."""
    return len(parts) * whole - (len(parts) - 1) * parts


def _check_covered(name: str, gained: float, curve: Front, ends_rising: bool) -> None:
    """Raise `OutsideFrontError` unless a front says something of an A_KA."""
    first, last = curve.accumulation[[0, -1]]
    if ends_rising and gained > last:
        raise OutsideFrontError(
            f"{name!r}: its A_KA of {gained:.1f} is {BEYOND}, a local one, which ends at "
            f"{last:.1f}: a higher peak of the front or a lower one of the setting"
        )
    if gained < first:
        raise OutsideFrontError(
            f"{name!r}: its A_KA of {gained:.1f} is {BELOW}, which begins at "
            f"{first:.1f}: a lower peak of the front or a higher one of the setting"
        )


def _distance_of_part(
    means: np.ndarray, rates: np.ndarray, least: int, count: int, is_bound: bool, name: str
) -> tuple[float, float]:
    """Return the distance from the front where one base is left out, and how far the A_KA is beyond
    the front's last point.

    Args:
        means: (A_KA, A_ZS) of the setting and of the front's peaks, [1 + peaks, 2].
        rates: The peaks, rising, [peaks].
        least: How many of them the front takes.
        count: How many of them count, as in the whole sample.
        is_bound: Whether the whole sample's gain is a bound, measured from the last point.
        name: What errors call the setting.

    Raises:
        OutsideFrontError: The setting lies more than `REACH` beyond the front.
    """
    (gained, kept), *points = means
    curve = fit_front(rates, *np.array(points).T, least, count)
    first, last = curve.accumulation[[0, -1]]
    if gained < first - REACH or (gained > last + REACH and not is_bound):
        raise OutsideFrontError(
            f"{name!r}: without one of the bases its A_KA of {gained:.1f} is more than {REACH:g} "
            f"{BELOW if gained < first else BEYOND}, from {first:.1f} to {last:.1f}"
        )
    on_front = curve.extended_to(last if is_bound else gained)
    return float(kept - on_front), float(gained - last)
