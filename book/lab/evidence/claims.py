"""The primary claims of the book, and the fronts from which their gains are measured.

`book/claims.yaml` was committed before the runs of its claims. `lab.evidence.verdicts` judges
them.
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass as checked_dataclass

from cmp.errors import CmpError
from cmp.files import cached_by_file, child_path
from cmp.parsing import check_record, read_yaml
from cmp.values import STRICT
from lab.evidence import BOOK

CLAIMS = BOOK / "claims.yaml"
FAMILIES = (CLAIMS, *sorted(CLAIMS.parent.glob("claims-*.yaml")))
"""The files of all families; later ones ask what earlier ones left open."""
REPLICATES = 20
"""The number of replicates that each setting of a claim must have."""
MATTERS = 1.0
"""Points that matter to a reader, in A_KA, in A_ZS or in a gain."""
GAINS = ("gain", "gain from the start")
"""The measures that need a front."""

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
            `lab.evidence.fronts`.
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
        measure: "gain" (see `lab.evidence.fronts`); "gain from the start", which compares the
            changes of both scores since the start of the stream, for networks that start from other
            scores; "A_KA"; "A_ZS"; "GM" (the geometric mean of both, for settings that a front does
            not cover); "names" or "looks" (parts of A_KA, see `scores.PARTS`); or "spread": the
            standard deviation of A_KA over settings.
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
    measure: Literal[
        "gain", "gain from the start", "A_KA", "A_ZS", "GM", "names", "looks", "spread"
    ]
    terms: Annotated[tuple[Term, ...], Field(min_length=1)]
    expected: Literal["above 0", "below 0", "no difference"]
    half_width: Annotated[float, Field(gt=0)]
    why: str = ""
    seen: Annotated[int, Field(ge=0, lt=REPLICATES)] = 0
    names: Literal["all", "kept", "lacking"] = "all"

    def __post_init__(self) -> None:
        if self.names != "all" and self.measure not in ("gain", "A_ZS"):
            raise ValueError(
                f"{self.name!r}: names: {self.measure} is not measured by name; leave it out"
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
        fronts_of: The family whose fronts this one uses as well, such as "claims".
    """

    claims: tuple[Claim, ...]
    fronts: dict[str, FrontOf] = dataclasses.field(default_factory=dict)
    fronts_of: str = ""


def load_claims(path: Path = CLAIMS) -> ClaimsFile:
    """Return a family of primary claims; raise `CmpError` that names an invalid key."""
    known = _read_claims(path)
    if known.fronts_of:
        shared = _read_claims(child_path(path.parent, known.fronts_of, ".yaml")).fronts
        known = dataclasses.replace(known, fronts=shared | known.fronts)
    names = [claim.name for claim in known.claims]
    if twice := [name for name in names if names.count(name) > 1]:
        raise CmpError(f"{path}: claims: two have the name {twice[0]!r}")
    return known


@cached_by_file  # a chapter asks for them often
def _read_claims(path: Path) -> ClaimsFile:
    """Return the claims in a file."""
    return check_record(read_yaml(path), ClaimsFile, f"{path}: ")
