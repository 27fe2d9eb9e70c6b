"""A claim, as a chapter's study states it before its runs are computed."""

import json
from collections.abc import Iterable
from typing import Annotated, Literal

import numpy as np
import pandas as pd
from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from cmp.claims import ranks
from cmp.claims.replicates import known
from cmp.config import STRICT
from cmp.errors import CmpError
from cmp.studies import Study

Text = Annotated[str, Field(min_length=1)]


@dataclass(frozen=True, config=STRICT)
class Claim:
    """What is claimed of `setting` minus `against` on one aggregate: at the end of the stream, or
    with `at: change` of what the stream did to it, or with `at: area` in the mean over its tasks
    (of the subset that is scored after each).

    superiority: the difference lies beyond `margin` on the side of `direction`; equivalence: it
    lies within ± `margin`. The margin is in points: what the reader of a chapter would care about.
    beyond: two more settings, first minus second; claimed is how far the difference exceeds theirs.
    ranks: `setting` and `against` are families of settings, such as "tiny" of "tiny: full", and
    claimed is that the rank correlation of what they share lies above `margin`.
    """

    name: Text
    sentence: Text
    setting: str
    against: str
    aggregate: Literal["A_KA", "A_ZS", "GM"]
    direction: Literal["higher", "lower"] = "higher"
    margin: Annotated[float, Field(ge=0)] = 2.0
    kind: Literal["superiority", "equivalence", "ranks"] = "superiority"
    at: Literal["end", "area", "change"] = "end"
    beyond: tuple[str, str] | None = None

    def __post_init__(self) -> None:
        if self.setting == self.against:
            raise ValueError(f"{self.name!r} holds {self.setting!r} against itself")
        if self.kind == "equivalence" and (self.direction == "lower" or self.margin == 0):
            raise ValueError(f"{self.name!r}: equivalence has no direction, and a margin above 0")
        if self.kind == "ranks" and (self.direction == "lower" or self.margin >= 1 or self.beyond):
            raise ValueError(
                f"{self.name!r}: ranks have no direction, a margin below 1, and nothing beyond"
            )

    @property
    def unit(self) -> str:
        """What its margin and its interval are in."""
        return "rank correlation" if self.kind == "ranks" else "points"

    @property
    def settings(self) -> tuple[str, ...]:
        """Those whose runs it is of; of ranks the two families."""
        return (self.setting, self.against, *(self.beyond or ()))

    def check(self, settings: Iterable[str], source: str) -> None:
        """`CmpError` if it is of settings that are not there."""
        if self.kind == "ranks":
            ranks.common(settings, self.setting, self.against, source)
        else:
            known(settings, self.settings, source)

    def names(self, settings: Iterable[str]) -> list[str]:
        """The settings whose runs it is of, of those that there are."""
        if self.kind != "ranks":
            return [*self.settings]
        pairs = ranks.common(settings, self.setting, self.against, f"claim {self.name!r}")
        return [name for pair in pairs for name in pair]

    def measured(self, table: pd.DataFrame) -> pd.Series:
        """What is claimed, in each replicate. table: a row a replicate, a column a setting."""
        if self.kind == "ranks":
            return ranks.agreement(table, self.setting, self.against)
        differences = table[self.setting] - table[self.against]
        if self.beyond:
            differences -= table[self.beyond[0]] - table[self.beyond[1]]
        return differences

    @property
    def region(self) -> tuple[float, float]:
        """The open interval of values, in its unit, of which the claim is true."""
        if self.kind == "equivalence":
            return -self.margin, self.margin
        return (self.margin, np.inf) if self.direction == "higher" else (-np.inf, -self.margin)


def of(study: Study) -> tuple[Claim, ...]:
    """The claims of a chapter's study; `CmpError` names the claim and the key that are wrong."""
    source = f"study {study.chapter}: claims"
    try:
        found = TypeAdapter(tuple[Claim, ...]).validate_json(json.dumps(study.claims))
    except TypeError as error:
        raise CmpError(f"{source}: {error}") from error
    except ValidationError as error:
        fault = error.errors()[0]
        key, message = ".".join(map(str, fault["loc"])), fault["msg"].removeprefix("Value error, ")
        keys = ", ".join(Claim.__dataclass_fields__)
        message = f"{message} (found {fault['input']!r:.80}); the keys of a claim are {keys}"
        raise CmpError(f"{source}.{key}: {message}") from error
    names = [claim.name for claim in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise CmpError(f"{source}: two are named {twice[0]!r}")
    for claim in found:
        claim.check(study.settings, f"{source}: {claim.name!r}")
    return found
