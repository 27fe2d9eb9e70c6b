"""How often intervals of gains miss the truth, in simulations with fronts like the book's.

`python -m tests.intervals --draws 2000` prints the shares; the suite takes fewer draws.
"""

import argparse

import numpy as np
import pandas as pd

from lab.evidence.fronts import OutsideFrontError, measure_gain
from lab.evidence.scores import claims_level, t_interval

STEPS = np.arange(8)
A_KA = 54 - 27 * np.exp(-STEPS / 2.6)
"""Of eight peaks a factor of 1.6 apart, from 27 to 52."""
BASES = np.repeat(np.arange(10), 2)


def retention(accumulation):
    """A smooth front like that of the book: flat, and steep where it ends."""
    return 53.2 - 0.25 * (accumulation - 27) - np.exp(accumulation - 51.2)


FLAT_TOP = np.array([[46.7, 49.4, 49.6, 49.6], [49.3, 47.7, 44.5, 40.3]])
"""A_KA and A_ZS of a local front like one of the book's, whose higher peaks only forget."""
PLACES = {
    "inside": (45.0, retention(45.0), A_KA, retention(A_KA)),
    "steep end": (51.9, retention(51.9), A_KA, retention(A_KA)),
    "beyond": (53.0, retention(A_KA[-1]), A_KA, retention(A_KA)),
    "local": (48.8, retention(48.8), A_KA[2:6], retention(A_KA[2:6])),
    "flat top": (51.1, FLAT_TOP[1, 1], *FLAT_TOP),
}
"""Where the setting ends, the true front there, and A_KA and A_ZS of the front's peaks."""
GAIN = 2.0


def count_misses(place: str, draws: int, seed: int = 0) -> pd.DataFrame:
    """Return how many intervals miss the true gain: a row per level, columns `above`, `below`, and
    `refused`, of studies whose setting lies beyond a local front.

    Settings share what a base and a replicate do, and each has noise of its own. Beyond the front,
    a gain is a lower bound, and only a miss above counts.

    Args:
        place: One of `PLACES`.
        draws: How many studies of ten bases and twenty streams are drawn.
        seed: Of the noise.
    """
    accumulation, on_front, gained, kept = PLACES[place]
    noise, names = np.random.default_rng(seed), [f"{step}" for step in range(len(gained))]
    peaks = dict(zip(names, 4e-5 * 1.6 ** np.arange(len(gained)), strict=True))
    means = np.array([[accumulation, *gained], [on_front + GAIN, *kept]]).T
    levels = (0.95, claims_level())
    missed = pd.DataFrame(0, index=levels, columns=["above", "below", "refused"])
    for _ in range(draws):
        base = noise.normal(0, 1.5, (2, 10)) + noise.normal(0, 0.5, (len(means), 2, 10))
        own = noise.normal(0, 1.0, (2, 20)) + noise.normal(0, 0.8, (len(means), 2, 20))
        values = means[:, :, None] + base[:, :, BASES] + own
        mine, *front = (pd.DataFrame({"A_KA": a, "A_ZS": z, "base": BASES}) for a, z in values)
        tables = dict(zip(names, front, strict=True))
        try:
            found = measure_gain(mine, tables, peaks, "mine", is_local=len(names) < 8)
        except OutsideFrontError:
            missed["refused"] += 1
            continue
        for level in levels:
            half = t_interval(found.pseudo.to_numpy(), level)[2]
            missed.loc[level, "above"] += found.values.mean() - half > GAIN
            missed.loc[level, "below"] += found.values.mean() + half < GAIN and not found.is_bound
    return missed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=2000)
    draws = parser.parse_args().draws
    for place in PLACES:
        share = 100 * count_misses(place, draws) / draws
        share.index = [f"{100 * (1 - level):.2f}% allowed" for level in share.index]
        print(f"{place}: percent of {draws} intervals that miss\n{share.round(2)}\n", flush=True)


if __name__ == "__main__":
    main()
