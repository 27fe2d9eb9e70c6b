"""What a study says: paired differences over replicates, and claims with verdicts.

A replicate is a base and a stream together, the same in every setting: it is the only unit that
counts as independent. Tasks and datasets are averaged away before and never raise `n`.

A chapter's claims stand in `book/studies/NN.yaml` beside the grid, under `claims`, so margins are
committed before a study is computed. How a verdict comes about, `judge` says once for all.
"""

from cmp.claims.judging import ALPHA, REFUTED, SUPPORTED, UNDECIDED, holm, judge, verdicts
from cmp.claims.ranks import agreement
from cmp.claims.replicates import (
    AGGREGATES,
    LEVEL,
    area,
    by_replicate,
    change,
    ends,
    final,
    means,
    paired_difference,
    t_interval,
)
from cmp.claims.statements import Claim, of

__all__ = [
    "AGGREGATES",
    "ALPHA",
    "LEVEL",
    "REFUTED",
    "SUPPORTED",
    "UNDECIDED",
    "Claim",
    "agreement",
    "area",
    "by_replicate",
    "change",
    "ends",
    "final",
    "holm",
    "judge",
    "means",
    "of",
    "paired_difference",
    "t_interval",
    "verdicts",
]
