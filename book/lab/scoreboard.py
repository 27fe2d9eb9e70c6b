"""The scoreboard: each guideline of the paper, the claims that speak of it, and their verdicts.

`book/guidelines.yaml` says which claims those are, what could embarrass the guideline (its rivals),
and which contrasts study 05-transfer repeats on other networks. Verdicts come from the published
studies: another stored score is another verdict.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import pandas as pd
from pydantic import Field
from pydantic.dataclasses import dataclass as checked_dataclass

from cmp.config import STRICT
from cmp.errors import CmpError
from cmp.experiments import claims, results, store, studies
from cmp.readers.files import check_record, read_yaml
from lab import chapters

GUIDELINES = chapters.BOOK / "guidelines.yaml"
TRANSFER = "05-transfer"
"""The study that has the same settings on several networks, "tiny-half: full" and so on."""
UNPUBLISHED = "not published yet"
VERDICTS = (claims.SUPPORTED, claims.REFUTED, claims.UNDECIDED, UNPUBLISHED)
DID, DID_NOT, OPEN = "yes", "no", "open"
"""Whether a rival embarrassed the guideline."""
HELD = ("clearly", "by sign", "against by sign", "clearly against")
"""How a contrast came out on a network: by its 95% interval, else by the sign of its mean."""

Text = Annotated[str, Field(min_length=1)]


@checked_dataclass(frozen=True, config=STRICT)
class Ground:
    """A claim of a study that speaks of a guideline.

    Attributes:
        study: The study.
        claim: The claim's name.
        rival: What could embarrass the guideline.
        wins: The verdict with which the rival does; with the contrary it does not.
    """

    study: Text
    claim: Text
    rival: str = ""
    wins: Literal["supported", "not supported"] = "not supported"

    def embarrassed(self, verdict: str) -> str:
        """Return whether the rival embarrassed the guideline; empty where there is no rival."""
        if not self.rival:
            return ""
        return {self.wins: DID, claims.UNDECIDED: OPEN, UNPUBLISHED: OPEN}.get(verdict, DID_NOT)


@checked_dataclass(frozen=True, config=STRICT)
class Contrast:
    """A difference of two settings on every network.

    Attributes:
        setting, against: The first minus the second.
        aggregate: Of which scores.
        direction: On which side of zero the guideline, or what was measured on `tiny`, has it.
    """

    setting: Text
    against: Text
    aggregate: Literal["A_KA", "A_ZS", "GM"]
    direction: Literal["higher", "lower"] = "higher"

    def __str__(self) -> str:
        return f"{self.setting} − {self.against}, {self.aggregate} {self.direction}"


@checked_dataclass(frozen=True, config=STRICT)
class Guideline:
    """What the paper advises, and what speaks of it; see the head of `book/guidelines.yaml`.

    Attributes:
        name: Of the guideline.
        chapter, figure: Where this book decides on it.
        paper: The advice, in our words.
        claims: What speaks of it.
        across: What is repeated on other networks.
        reason: Why this book differs, where it does.
    """

    name: Text
    chapter: Text
    paper: Text
    figure: Text
    claims: Annotated[tuple[Ground, ...], Field(min_length=1)]
    across: tuple[Contrast, ...] = ()
    reason: str = ""


def load_guidelines(path: Path = GUIDELINES) -> tuple[Guideline, ...]:
    """Read the guidelines of a file.

    Args:
        path: The file.

    Returns:
        The guidelines, in order.

    Raises:
        CmpError: The file is not well-formed, or has a claim twice; names the key.
    """
    tree = read_yaml(path)
    if tree.keys() != {"guidelines"}:
        raise CmpError(f"{path}: one key is expected, 'guidelines'; found {', '.join(tree)}")
    guidelines = check_record(tree["guidelines"], tuple[Guideline, ...], f"{path}: guidelines.")
    grounds = [(g.study, g.claim) for guideline in guidelines for g in guideline.claims]
    if twice := [ground for ground in grounds if grounds.count(ground) > 1]:
        raise CmpError(f"{path}: claim {twice[0][1]!r} of study {twice[0][0]} stands there twice")
    return guidelines


def claims_table(guidelines: Sequence[Guideline]) -> pd.DataFrame:
    """Judge every claim of some guidelines by the published studies.

    Args:
        guidelines: In the order of the table.

    Returns:
        A row per claim: `guideline`, `study`, `claim` (its name), `claimed` (its sentence),
        `verdict` (one of `VERDICTS`), the numbers of `cmp.experiments.claims.verdicts`, `rival` and
        whether it `embarrassed` the guideline.

    Raises:
        CmpError: A study does not make a claim.
    """
    named = sorted({ground.study for each in guidelines for ground in each.claims})
    judged, rows = {study: _judge_study(study) for study in named}, []
    for guideline in guidelines:
        for ground in guideline.claims:
            table = judged[ground.study]
            if ground.claim not in table.index:
                raise CmpError(
                    f"guideline {guideline.name!r}: study {ground.study} claims no "
                    f"{ground.claim!r}; it claims {', '.join(table.index)}"
                )
            row = {"guideline": guideline.name, "study": ground.study, "claim": ground.claim}
            row |= table.loc[ground.claim].to_dict()
            embarrassed = ground.embarrassed(row["verdict"])
            rows.append(row | {"rival": ground.rival, "embarrassed": embarrassed})
    return pd.DataFrame(rows)


def _judge_study(study: str) -> pd.DataFrame:
    """Return the verdicts of a study by claim; before it is published, its sentences alone."""
    made = claims.claims_of(studies.load_study(study))
    if results.is_published(study):
        return claims.verdicts(store.trajectory(results.published_metrics(study)), made)
    sentences = {claim.name: claim.sentence for claim in made}
    return pd.DataFrame({"claimed": sentences, "verdict": UNPUBLISHED})


def study_table(chapter: str) -> pd.DataFrame:
    """Judge the claims of one study, whatever guideline they speak of.

    Args:
        chapter: The study.

    Returns:
        As `claims_table`.
    """
    study = studies.load_study(chapter)
    grounds = tuple(Ground(chapter, claim.name) for claim in claims.claims_of(study))
    question = study.question
    return claims_table([Guideline(f"Study {chapter}", chapter, question, question, grounds)])


def transfer_trajectory() -> pd.DataFrame | None:
    """Return the trajectory of study 05-transfer; none while it is not published."""
    if results.is_published(TRANSFER):
        return store.trajectory(results.published_metrics(TRANSFER))


def across_networks(
    guidelines: Sequence[Guideline], trajectory: pd.DataFrame | None
) -> pd.DataFrame:
    """Tabulate how the guidelines' contrasts came out on each network.

    They were not claimed and bear no verdict.

    Args:
        guidelines: In the order of the table.
        trajectory: Of study 05-transfer; without one there are no rows.

    Returns:
        A row per (contrast, network): `guideline`, `contrast`, `network`, `difference`, `low`,
        `high` (points, at the end of the stream, with a 95% interval that knows of no other
        comparison) and `held`, one of `HELD`.
    """
    rows = []
    settings = [] if trajectory is None else trajectory["setting"]
    for guideline in guidelines:
        for contrast in guideline.across:
            for network in dict.fromkeys(name.partition(": ")[0] for name in settings):
                pair = [f"{network}: {name}" for name in (contrast.setting, contrast.against)]
                table = claims.paired_difference(trajectory[settings.isin(pair)], *pair)
                numbers = table.loc[contrast.aggregate, ["difference", "low", "high"]]
                held = _held(*numbers, contrast.direction)
                rows.append((guideline.name, str(contrast), network, *numbers, held))
    columns = ["guideline", "contrast", "network", "difference", "low", "high", "held"]
    return pd.DataFrame(rows, columns=columns)


def _held(mean: float, low: float, high: float, direction: str) -> str:
    """Return one of `HELD`; without an interval, by sign."""
    if direction == "lower":
        mean, low, high = -mean, -high, -low
    if low > 0 or high < 0:
        return HELD[0] if low > 0 else HELD[3]
    return HELD[1] if mean > 0 else HELD[2]


def guideline_overview(
    guidelines: Sequence[Guideline], rows: pd.DataFrame, networks: pd.DataFrame
) -> pd.DataFrame:
    """Sum up each guideline in words.

    Args:
        guidelines: In the order of the table.
        rows: As `claims_table` returns them.
        networks: As `across_networks` returns them.

    Returns:
        A row per guideline: what the paper says, our verdicts, the figure that decides, what
        embarrassed it, whether it held across networks, and, where not all is supported, why.
    """
    overview = {}
    for guideline in guidelines:
        own = rows[rows["guideline"] == guideline.name]
        counts, rivals = Counter(own["verdict"]), own[own["rival"] != ""]
        differs = counts[claims.REFUTED] + counts[claims.UNDECIDED] > 0
        answers = zip(rivals["rival"], rivals["embarrassed"], strict=True)
        overview[guideline.name] = {
            "the paper, in our words": guideline.paper,
            "claims here": ", ".join(f"{counts[key]} {key}" for key in VERDICTS if counts[key]),
            "decided by": f"chapter {guideline.chapter}: {guideline.figure}",
            "what could embarrass it, and did": " ".join(f"{r} ({did})" for r, did in answers),
            "across sizes and architectures": _across(guideline, networks),
            "where we differ, most likely because": guideline.reason if differs else "",
        }
    return pd.DataFrame.from_dict(overview, orient="index")


def _across(guideline: Guideline, networks: pd.DataFrame) -> str:
    """Return on how many networks each contrast came out as expected, in words."""
    if not guideline.across:
        return "not repeated on other networks"
    if networks.empty:
        return f"study {TRANSFER} is {UNPUBLISHED}"
    own = networks[networks["guideline"] == guideline.name]
    parts = []
    for contrast, held in own.groupby("contrast", sort=False)["held"]:
        same, clearly = held.isin(HELD[:2]).sum(), (held == HELD[0]).sum()
        parts.append(f"{contrast}: {same} of {len(held)}, {clearly} clearly")
    return "; ".join(parts)
