"""Compare retention at equal accumulation: how far a setting is above plain fine-tuning's front.

The learning rate moves plain fine-tuning along a trade-off: a higher peak gains more A_KA and keeps
less A_ZS. The front is this curve, fitted to means over replicates of plain fine-tuning at several
peaks. The *gain* of a setting is its A_ZS minus that of the front at the same A_KA, in points. Its
mirror is its A_KA minus that of the front at the same A_ZS.

Errors come from a jackknife that leaves out one base at a time from both the setting and the front,
so they include the front's error. The whole sample determines whether the front covers the setting,
up to which peak the front goes, and whether the gain is a bound. A partial sample that is slightly
beyond the front's ends is measured from the tangent there, see `REACH`, because leaving it out, or
basing these decisions on it, would make the interval depend on one base.

Beyond its last point, a front is flat, and a gain there is a bound. But if the setting may be
beyond it only by noise, the error of its A_KA is propagated along the tangent, see `DOUBT`.
"""

import functools
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.interpolate import PchipInterpolator
from scipy.optimize import brentq, isotonic_regression

from cmp.errors import CmpError


class OutsideFrontError(CmpError):
    """An error for a setting whose A_KA the front does not cover."""


MIN_PEAKS, MIN_LOCAL, MIN_SIGN, MAX_RATIO = 6, 4, 3, 1.61
"""Fewest peaks of a front, of a local front, and of a front used only for a sign; and the largest
ratio between neighbours, 1.6 plus rounding. A local front is valid between its ends, and beyond its
last point only if a higher peak is known to gain less."""
FLAT = 1.0
"""Points of A_KA by which a front's last point may be below the highest. Peaks beyond it gain
hardly more and retain less, so a gain there would depend on which of them happens to gain most."""
REACH = 0.5
"""Points of A_KA by which the mean may be beyond an end of the front when one base is left out."""
DOUBT = 4.0
"""Standard errors up to which a setting's distance from the front's last point counts as noise:
about half a t-interval over ten bases at the level of the claims. If the front were also treated as
flat for the error of A_KA, intervals where it is steep would miss the gain eight times as often as
stated."""
BELOW, BEYOND = "below the front", "beyond the front"
"""How errors name the places that a front does not cover."""


@dataclass(frozen=True)
class Front:
    """A decreasing curve in the plane of A_KA and A_ZS.

    Attributes:
        accumulation: The A_KA of its points, increasing, [n].
        retention: The A_ZS of its points, decreasing, [n].
    """

    accumulation: np.ndarray
    retention: np.ndarray

    def retention_at(self, accumulation: float) -> float:
        """Return the A_ZS at an A_KA; beyond the last point, that of the last point."""
        return float(self._curve(min(accumulation, self.accumulation[-1])))

    def extended_to(self, accumulation: float) -> float:
        """Return the A_ZS at an A_KA, extended along the tangent beyond both ends."""
        inside = min(max(accumulation, self.accumulation[0]), self.accumulation[-1])
        return self.retention_at(inside) + self.slope_at(inside) * (accumulation - inside)

    def slope_at(self, accumulation: float) -> float:
        """Return dA_ZS/dA_KA at an A_KA; 0 beyond the last point, where the front is flat."""
        if accumulation > self.accumulation[-1]:
            return 0.0
        return float(self._curve.derivative()(accumulation))

    def accumulation_at(self, retention: float) -> float:
        """Return the A_KA at an A_ZS, or NaN if the front does not reach it."""
        if not self.retention[-1] <= retention <= self.retention[0]:
            return float("nan")
        curve, (low, *_, high) = self._curve, self.accumulation
        if curve(low) <= retention or curve(high) >= retention:  # at an end, up to rounding
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

    Peaks beyond the front's last point (see `count_points`) are removed. Isotonic regression makes
    A_KA increase and A_ZS decrease with the peak, and a monotone cubic interpolates the result.

    Args:
        peaks: The learning rates, increasing, [n].
        accumulation: The mean A_KA at each, [n].
        retention: The mean A_ZS at each, [n].
        least: The fewest peaks allowed.
        count: The number of peaks to use, from the lowest, if it is known from the whole sample, so
            that a partial sample does not cut the front elsewhere.

    Raises:
        CmpError: There are too few peaks, they are too far apart, or A_KA never increases.
    """
    check_peaks(peaks, least)
    last = count or count_points(accumulation)
    rising = isotonic_regression(accumulation[:last]).x
    falling = isotonic_regression(retention[:last], increasing=False).x
    # peaks with equal A_KA or equal A_ZS are merged into one point, so that the curve is invertible
    rising, falling = _merge_ties(rising, falling)
    falling, rising = _merge_ties(-falling, rising)
    if len(rising) < 2:
        raise CmpError("front: A_KA does not increase with the peak; add lower peaks")
    return Front(rising, -falling)


def count_points(accumulation: np.ndarray) -> int:
    """Return how many peaks, from the lowest, form a front, given their mean A_KA, [n]. It ends at
    the first that is within `FLAT` of the highest."""
    return int(np.argmax(accumulation >= np.max(accumulation) - FLAT)) + 1


def check_peaks(peaks: np.ndarray, least: int) -> None:
    """Raise `CmpError` unless the peaks, increasing, [n], are enough for a front and close
    enough."""
    if len(peaks) < least or np.max(peaks[1:] / peaks[:-1]) > MAX_RATIO:
        raise CmpError(
            f"front: peaks {', '.join(f'{peak:g}' for peak in peaks)}: use at least {least}, with "
            f"neighbours at most a factor of {MAX_RATIO:.1f} apart"
        )


def _merge_ties(keys: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the distinct keys, increasing, and the mean value of each. Equal keys may differ by
    rounding."""
    distinct, place = np.unique(keys.round(9), return_inverse=True)
    return distinct, np.bincount(place, values) / np.bincount(place)


@dataclass(frozen=True)
class Gain:
    """What a setting keeps beyond the front.

    Attributes:
        values: The gain of each replicate, in points of A_ZS, [replicates]; their mean is the
            estimate.
        pseudo: The jackknife's pseudo-values, one per base, treated as independent, [bases].
        mirror: Points of A_KA beyond the front at the same A_ZS, or NaN if the front does not reach
            it.
        slope: The front's dA_ZS/dA_KA at the setting's A_KA.
        nearest: The front's setting with which replicates are paired.
        is_bound: Whether A_KA is beyond the front, so that the gain is a lower bound.
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

    The estimate is the distance of the mean scores from the fitted curve. Each replicate's
    contribution is paired with the same replicate of the front's nearest peak, along the front's
    slope.

    Args:
        own: One row per replicate of the setting: `A_KA`, `A_ZS` and `base`.
        front: The same for each of the front's settings.
        peaks: The peak of each of the front's settings.
        name: The name of the setting in error messages.
        is_local: Whether the front is local, and so not valid beyond its ends.
        least: The fewest peaks allowed for the front; if None, `MIN_LOCAL` or `MIN_PEAKS`.

    Raises:
        OutsideFrontError: The front does not cover the A_KA.
        CmpError: The front lacks replicates or cannot be fitted.
    """
    if missing := [each for each in front if not own.index.isin(front[each].index).all()]:
        raise CmpError(
            f"{name!r}: the front's {missing[0]!r} lacks some of the setting's replicates"
        )
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
    """Return the jackknife's pseudo-values from the values of the whole sample and of its parts."""
    return len(parts) * whole - (len(parts) - 1) * parts


def _check_covered(name: str, gained: float, curve: Front, ends_rising: bool) -> None:
    """Raise `OutsideFrontError` unless a front covers an A_KA."""
    first, last = curve.accumulation[[0, -1]]
    if ends_rising and gained > last:
        raise OutsideFrontError(
            f"{name!r}: its A_KA of {gained:.1f} is {BEYOND}, which is local and ends at "
            f"{last:.1f}: add a higher peak to the front or use a lower one for the setting"
        )
    if gained < first:
        raise OutsideFrontError(
            f"{name!r}: its A_KA of {gained:.1f} is {BELOW}, which begins at {first:.1f}: add a "
            "lower peak to the front or use a higher one for the setting"
        )


def _distance_of_part(
    means: np.ndarray, rates: np.ndarray, least: int, count: int, is_bound: bool, name: str
) -> tuple[float, float]:
    """Return the distance from the front with one base left out, and how far the A_KA is beyond the
    front's last point.

    Args:
        means: The (A_KA, A_ZS) of the setting and of the front's peaks, [1 + peaks, 2].
        rates: The peaks, increasing, [peaks].
        least: The fewest peaks allowed.
        count: The number of peaks to use, as in the whole sample.
        is_bound: Whether the gain of the whole sample is a bound, measured from the last point.
        name: The name of the setting in error messages.

    Raises:
        OutsideFrontError: The setting is more than `REACH` beyond the front.
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
