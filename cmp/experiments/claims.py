"""The primary claims of the book, and the fronts from which their gains are measured.

`book/claims.yaml` was committed before the runs of its claims. `cmp.experiments.verdicts` judges
them.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass as checked_dataclass

from cmp.errors import CmpError
from cmp.experiments import studies
from cmp.experiments.scores import CLAIMS, claims_level, planned_streams
from cmp.files import cached_by_file, child_path
from cmp.parsing import check_record, read_yaml
from cmp.values import STRICT

FAMILIES = (CLAIMS, *sorted(CLAIMS.parent.glob("claims-*.yaml")))
"""The files of all families; later ones ask what earlier ones left open."""
REPLICATES = 20
"""The number of replicates that each setting of a claim must have."""
MATTERS = 1.0
"""Points that matter to a reader, in A_KA, in A_ZS or in a gain."""
GAINS = ("gain", "gain from the start")
"""The measures that need a front."""
SPREAD_SETTINGS = 3
"""The fewest settings of a spread."""

Text = Annotated[str, Field(min_length=1)]
Settings = Annotated[
    tuple[Text, ...],
    BeforeValidator(lambda value: (value,) if isinstance(value, str) else tuple(value)),
    Field(min_length=1),
]


@checked_dataclass(frozen=True, config=STRICT)
class FrontOf:
    """A front of plain fine-tuning.

    Attributes:
        study: The study.
        settings: The settings of the study, one per peak.
        check: A further peak between them, with a gain of 0 if the front is right; see chapter 01.
        local: Whether a few peaks around the measured setting are enough, see
            `cmp.experiments.fronts`.
        least: The fewest peaks allowed, if not the default.
    """

    study: Text
    settings: Settings
    check: str = ""
    local: bool = False
    least: int | None = None


@checked_dataclass(frozen=True, config=STRICT)
class Term:
    """One side of a contrast.

    Attributes:
        of: A setting; for a spread, several settings, whose standard deviation is used.
        times: The coefficient.
        at: "end" for the end of the stream, or "way" for the mean over the middle half of its
            updates.
        front: The front that a gain is measured from.
        study: The study of the setting, if it is not the claim's.
    """

    of: Settings
    times: float = 1.0
    at: Literal["end", "way"] = "end"
    front: Text = "plain"
    study: str = ""


@checked_dataclass(frozen=True, config=STRICT)
class Claim:
    """A claim made before its runs.

    Attributes:
        name: A short name.
        guideline: The guideline that the claim is about.
        study: The study with the claim's settings.
        source: Whether the paper or this book makes the claim.
        sentence: The claim as a sentence.
        measure: "gain" (see `cmp.experiments.fronts`); "gain from the start", which compares the
            changes of both scores since the start of the stream, for networks that start from other
            scores; "A_KA"; "A_ZS"; "GM" (the geometric mean of both, for settings that a front
            does not cover); or "spread": the standard deviation of A_KA over settings.
        terms: The terms of the sum.
        expected: The claimed sign, or that there is no difference that matters.
        half_width: The half-width of the interval in points, as planned from exploration.
        why: Why the planned half-width exceeds `MATTERS`, if it does.
        seen: How many replicates, from the first, were published when the claim was committed or
            its analysis last changed.
        names: The class names for A_ZS: all names of pretraining, or those that replay kept or was
            lacking.
    """

    name: Text
    guideline: Text
    study: Text
    source: Literal["paper", "ours"]
    sentence: Text
    measure: Literal["gain", "gain from the start", "A_KA", "A_ZS", "GM", "spread"]
    terms: Annotated[tuple[Term, ...], Field(min_length=1)]
    expected: Literal["above 0", "below 0", "no difference"]
    half_width: Annotated[float, Field(gt=0)]
    why: str = ""
    seen: Annotated[int, Field(ge=0, lt=REPLICATES)] = 0
    names: Literal["all", "kept", "lacking"] = "all"

    def __post_init__(self) -> None:
        if self.half_width > MATTERS and not self.why:
            raise ValueError(
                f"{self.name!r}: half_width: above {MATTERS:g}; give a reason in `why`"
            )
        if self.names != "all" and self.measure not in ("gain", "A_ZS"):
            raise ValueError(
                f"{self.name!r}: names: {self.measure} is not measured by name; leave it out"
            )
        for term in self.terms:
            if (len(term.of) >= SPREAD_SETTINGS) != (self.measure == "spread"):
                raise ValueError(
                    f"{self.name!r}: of: give at least {SPREAD_SETTINGS} settings for a spread, "
                    "and one for any other measure"
                )
            if term.at == "way" and self.measure != "spread":
                raise ValueError(
                    f"{self.name!r}: at: {self.measure} is only measured at the end of the stream"
                )

    def study_of(self, term: Term) -> str:
        """Return the study with the settings of a term."""
        return term.study or self.study


@checked_dataclass(frozen=True, config=STRICT)
class ClaimsFile:
    """A family of claims, and the fronts from which their gains are measured.

    Attributes:
        claims: The claims.
        fronts: The fronts by name.
        planned: The largest number of claims in the family, if some are committed later. It
            determines the level of the intervals from the start.
        fronts_of: The family whose fronts this one uses as well, such as "claims".
    """

    claims: tuple[Claim, ...]
    fronts: dict[str, FrontOf] = dataclasses.field(default_factory=dict)
    planned: Annotated[int, Field(ge=0)] = 0
    fronts_of: str = ""

    def __post_init__(self) -> None:
        if 0 < self.planned < len(self.claims):
            raise ValueError(f"planned: {self.planned} for {len(self.claims)} claims; raise it")

    @property
    def level(self) -> float:
        """The level of each interval."""
        return claims_level(max(self.planned, len(self.claims)))


def load_claims(path: Path = CLAIMS) -> ClaimsFile:
    """Return a family of primary claims; raise `CmpError` that names an invalid key."""
    known = _read_claims(path)
    if known.fronts_of:
        shared = _read_claims(child_path(path.parent, known.fronts_of, ".yaml")).fronts
        known = dataclasses.replace(known, fronts=shared | known.fronts)
    names = [claim.name for claim in known.claims]
    if twice := [name for name in names if names.count(name) > 1]:
        raise CmpError(f"{path}: claims: two have the name {twice[0]!r}")
    for front in known.fronts.values():
        settings = [*front.settings, *filter(None, [front.check])]
        _check_settings(front.study, settings, str(path))
    for claim in known.claims:
        source = f"{path}: claim {claim.name!r}"
        for term in claim.terms:
            _check_settings(claim.study_of(term), term.of, source)
            if claim.measure in GAINS and term.front not in known.fronts:
                raise CmpError(f"{source}: no front {term.front!r}; define it under fronts")
    return known


@cached_by_file  # a chapter asks for them often
def _read_claims(path: Path) -> ClaimsFile:
    """Return the claims in a file."""
    return check_record(read_yaml(path), ClaimsFile, f"{path}: ")


def _check_settings(study: str, names: Sequence[str], source: str) -> None:
    """Raise `CmpError` unless a confirming study has the settings with enough replicates."""
    grid = studies.load_study(study)
    if grid.explores:
        raise CmpError(f"{source}: study {study!r} explores, so its runs cannot confirm a claim")
    for name in names:
        if name not in grid.settings:
            raise CmpError(f"{source}: study {study!r} has no setting {name!r}")
        count = planned_streams(study, name)
        if count < REPLICATES:
            raise CmpError(
                f"{source}: {name!r} of study {study!r} has {count} replicates; a claim needs "
                f"{REPLICATES}"
            )
