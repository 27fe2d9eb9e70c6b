"""The scoreboard: each guideline of the paper, the claims that speak of it, and their verdicts.

`book/guidelines.yaml` says which claims those are, what could embarrass the guideline, and which
contrasts study 05-transfer repeats on other networks. Whatever is judged here comes from the
published studies: another stored score is another verdict.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

import pandas as pd
from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass

from cmp.config import STRICT
from cmp.errors import CmpError
from cmp.experiments import results, store, studies
from cmp.experiments.claims import (
    REFUTED,
    SUPPORTED,
    UNDECIDED,
    claims_of,
    paired_difference,
    verdicts,
)
from cmp.files import project_folder, read_yaml

GUIDELINES = project_folder() / "book" / "guidelines.yaml"
TRANSFER = "05-transfer"
"""The study that has the same settings on several networks, "tiny-half: full" and so on."""
UNPUBLISHED = "not published yet"
DID, DID_NOT, OPEN = "yes", "no", "open"
"""Whether a rival embarrassed the guideline."""
HELD = ("clearly", "by sign", "against by sign", "clearly against")
"""How a contrast came out on a network: by its 95% interval, else by the sign of its mean."""

GuidelineText = Annotated[str, Field(min_length=1)]


@checked_dataclass(frozen=True, config=STRICT)
class Ground:
    """A claim of a study. rival: what could embarrass the guideline; it does where the verdict is
    what `wins` says, and does not where it is the contrary."""

    study: GuidelineText
    claim: GuidelineText
    rival: str = ""
    wins: Literal["supported", "not supported"] = "not supported"

    def embarrassed(self, verdict: str) -> str:
        """Whether the rival did, given the claim's verdict; empty where there is none."""
        if not self.rival:
            return ""
        return {self.wins: DID, UNDECIDED: OPEN, UNPUBLISHED: OPEN}.get(verdict, DID_NOT)


@checked_dataclass(frozen=True, config=STRICT)
class Contrast:
    """`setting` minus `against` on every network, and on which side of zero the guideline, or what
    was found on `tiny`, has it."""

    setting: GuidelineText
    against: GuidelineText
    aggregate: Literal["A_KA", "A_ZS", "GM"]
    direction: Literal["higher", "lower"] = "higher"

    def __str__(self) -> str:
        return f"{self.setting} − {self.against}, {self.aggregate} {self.direction}"


@checked_dataclass(frozen=True, config=STRICT)
class Guideline:
    """What the paper advises, and what speaks of it; see the head of `book/guidelines.yaml`."""

    name: GuidelineText
    chapter: GuidelineText
    paper: GuidelineText
    figure: GuidelineText
    claims: Annotated[tuple[Ground, ...], Field(min_length=1)]
    across: tuple[Contrast, ...] = ()
    reason: str = ""


def load_guidelines(path: Path = GUIDELINES) -> tuple[Guideline, ...]:
    """The guidelines of a file; `CmpError` with the key if it is not well-formed, or has a claim
    twice."""
    tree = read_yaml(path)
    if tree.keys() != {"guidelines"}:
        raise CmpError(f"{path}: one key is expected, 'guidelines'; found {', '.join(tree)}")
    try:
        text = json.dumps(tree["guidelines"])
        found = TypeAdapter(tuple[Guideline, ...]).validate_json(text)
    except ValidationError as error:
        fault = error.errors()[0]
        key = ".".join(map(str, fault["loc"]))
        raise CmpError(f"{path}: guidelines.{key}: {fault['msg']}") from error
    every = Counter((ground.study, ground.claim) for each in found for ground in each.claims)
    if twice := [pair for pair, count in every.items() if count > 1]:
        raise CmpError(f"{path}: claim {twice[0][1]!r} of study {twice[0][0]} stands there twice")
    return found


def judge_guidelines(guidelines: Sequence[Guideline]) -> dict[str, pd.DataFrame]:
    """Study -> the verdicts of its claims, see `cmp.claims.verdicts`, where it is published."""
    found = {}
    for study in sorted({ground.study for each in guidelines for ground in each.claims}):
        if results.is_published(study):
            trajectory = store.trajectory(results.published_metrics(study))
            found[study] = verdicts(trajectory, claims_of(studies.load_study(study)))
    return found


def claims_table(
    guidelines: Sequence[Guideline], verdicts: Mapping[str, pd.DataFrame]
) -> pd.DataFrame:
    """A row a claim: `guideline`, `study`, `claim` (its name), `claimed` (its sentence), `verdict`,
    the numbers of `cmp.claims.verdicts`, `rival` and whether it `embarrassed` the guideline.

    verdicts: see `judged`; a study that is not among them is named as not published. `CmpError` for
    a claim that its study does not make.
    """
    rows = []
    for guideline in guidelines:
        for ground in guideline.claims:
            about = {claim.name: claim for claim in claims_of(studies.load_study(ground.study))}
            if ground.claim not in about:
                raise CmpError(
                    f"guideline {guideline.name!r}: study {ground.study} claims no "
                    f"{ground.claim!r}; it claims {', '.join(about)}"
                )
            row = {"claimed": about[ground.claim].sentence, "verdict": UNPUBLISHED}
            if ground.study in verdicts:
                row |= verdicts[ground.study].loc[ground.claim].to_dict()
            rows.append(
                {"guideline": guideline.name, "study": ground.study, "claim": ground.claim}
                | row
                | {"rival": ground.rival, "embarrassed": ground.embarrassed(row["verdict"])}
            )
    return pd.DataFrame(rows)


def study_table(study: str) -> pd.DataFrame:
    """The table of one study's claims by themselves, whatever guideline they speak of."""
    about = studies.load_study(study)
    grounds = tuple(Ground(study, claim.name) for claim in claims_of(about))
    alone = [Guideline(f"Study {study}", study, about.question, about.question, grounds)]
    return claims_table(alone, judge_guidelines(alone))


def across_networks(
    guidelines: Sequence[Guideline], trajectory: pd.DataFrame | None
) -> pd.DataFrame:
    """How the guidelines' contrasts came out on each network of study 05-transfer.

    trajectory: see `transfer`; without one there are no rows. A row a (contrast, network):
    `guideline`, `contrast`, `network`, `difference`, `low`, `high` (points, at the end of the
    stream, with a 95% interval that knows of no other comparison) and `held`, one of `HELD`. They
    were not claimed and bear no verdict.
    """
    columns = ["guideline", "contrast", "network", "difference", "low", "high", "held"]
    if trajectory is None:
        return pd.DataFrame(columns=columns)
    networks = list(dict.fromkeys(name.partition(": ")[0] for name in trajectory["setting"]))
    rows = []
    for guideline in guidelines:
        for contrast in guideline.across:
            for network in networks:
                pair = [f"{network}: {name}" for name in (contrast.setting, contrast.against)]
                chosen = trajectory[trajectory["setting"].isin(pair)]
                found = paired_difference(chosen, *pair).loc[contrast.aggregate]
                numbers = found[["difference", "low", "high"]].to_dict()
                rows.append(
                    {"guideline": guideline.name, "contrast": str(contrast), "network": network}
                    | numbers
                    | {"held": _held(numbers, contrast.direction)}
                )
    return pd.DataFrame(rows, columns=columns)


def _held(numbers: Mapping[str, float], direction: str) -> str:
    """One of `HELD`; without an interval, by sign."""
    mean, low, high = (numbers[key] for key in ("difference", "low", "high"))
    if direction == "lower":
        mean, low, high = -mean, -high, -low
    if low > 0 or high < 0:
        return HELD[0] if low > 0 else HELD[3]
    return HELD[1] if mean > 0 else HELD[2]


def transfer_trajectory() -> pd.DataFrame | None:
    """The trajectory of study 05-transfer; none while it is not published."""
    return (
        store.trajectory(results.published_metrics(TRANSFER))
        if results.is_published(TRANSFER)
        else None
    )


def guideline_overview(
    guidelines: Sequence[Guideline], rows: pd.DataFrame, networks: pd.DataFrame
) -> pd.DataFrame:
    """A row a guideline, in words: the paper's, our verdicts, the figure that decides, what
    embarrassed it, whether it held across networks, and, where not all is supported, why.

    rows: see `table`; networks: see `across`.
    """
    found = {}
    for guideline in guidelines:
        own = rows[rows["guideline"] == guideline.name]
        verdicts = Counter(own["verdict"])
        order = (SUPPORTED, REFUTED, UNDECIDED, UNPUBLISHED)
        differs = guideline.reason and set(verdicts) & {REFUTED, UNDECIDED}
        found[guideline.name] = {
            "the paper, in our words": guideline.paper,
            "claims here": ", ".join(f"{verdicts[k]} {k}" for k in order if verdicts[k]),
            "decided by": f"chapter {guideline.chapter}: {guideline.figure}",
            "what could embarrass it, and did": _rivals(own),
            "across sizes and architectures": _networks(guideline, networks),
            "where we differ, most likely because": guideline.reason if differs else "",
        }
    return pd.DataFrame.from_dict(found, orient="index")


def _rivals(own: pd.DataFrame) -> str:
    """Every rival, and whether it did."""
    named = own[own["rival"] != ""]
    pairs = zip(named["rival"], named["embarrassed"], strict=True)
    return " ".join(f"{rival} ({answer})" for rival, answer in pairs)


def _networks(guideline: Guideline, networks: pd.DataFrame) -> str:
    """On how many networks each contrast came out as expected."""
    if not guideline.across:
        return "not repeated on other networks"
    if networks.empty:
        return f"study {TRANSFER} is {UNPUBLISHED}"
    parts = []
    for contrast in guideline.across:
        held = networks.loc[
            (networks["guideline"] == guideline.name) & (networks["contrast"] == str(contrast)),
            "held",
        ]
        same, clearly = held.isin(HELD[:2]).sum(), (held == HELD[0]).sum()
        parts.append(f"{contrast}: {same} of {len(held)}, {clearly} clearly")
    return "; ".join(parts)
