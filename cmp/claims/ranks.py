"""Does one model rank settings as another does? Rank correlations, a replicate each."""

import itertools
from collections.abc import Iterable

import pandas as pd
from scipy import stats

from cmp.errors import CmpError

FEWEST = 3
"""Settings that a ranking must have to say anything."""


def members(settings: Iterable[str], family: str) -> dict[str, str]:
    """The settings of a family, "tiny: full" and so on of "tiny", by what follows its name."""
    start = f"{family}: "
    return {name.removeprefix(start): name for name in settings if name.startswith(start)}


def common(settings: Iterable[str], one: str, other: str, source: str) -> list[tuple[str, str]]:
    """The settings that two families share, as pairs; `CmpError` if they are too few to rank."""
    first, second = (members(list(settings), family) for family in (one, other))
    found = [(first[name], second[name]) for name in first if name in second]
    if len(found) < FEWEST:
        raise CmpError(
            f"{source}: {one!r} and {other!r} share {len(found)} settings, as in '{one}: NAME'; "
            f"a ranking takes {FEWEST}"
        )
    return found


def agreement(table: pd.DataFrame, one: str, other: str) -> pd.Series:
    """Spearman's correlation, in each replicate, of the scores of two families' common settings.

    table: a row a replicate, a column a setting. NaN for a replicate that lacks a run.
    """
    pairs = common(table.columns, one, other, "agreement")
    left, right = (table[list(names)] for names in zip(*pairs, strict=True))
    found = {
        replicate: float(stats.spearmanr(left.loc[replicate], right.loc[replicate]).statistic)
        for replicate in table.index
    }
    return pd.Series(found).reindex(table.index)


def repeatability(table: pd.DataFrame, family: str) -> pd.Series:
    """Spearman's correlation of a family's ranking in one replicate with that in another, each
    pair of replicates once. table: a row a replicate, a column a setting."""
    scores = table[list(members(table.columns, family).values())].dropna()
    pairs = itertools.combinations(scores.index, 2)
    return pd.Series(
        {
            pair: float(stats.spearmanr(*scores.loc[list(pair)].to_numpy()).statistic)
            for pair in pairs
        }
    )
