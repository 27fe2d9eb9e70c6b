"""Combine what the paper found and what this book measured into guidelines.

`book/advice.yaml` states the paper's finding and the advice. Measurements are read from the
published studies, so the text follows the results.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pandas as pd
from pydantic.dataclasses import dataclass as checked_dataclass

from cmp.errors import CmpError
from cmp.files import DIGESTS, cached_by_file
from cmp.parsing import check_record, read_yaml
from cmp.releases.sentences import signed
from cmp.values import STRICT
from lab.evidence import BOOK, claims, fronts, results, verdicts
from lab.evidence.claims import MATTERS, FrontOf, Text
from lab.evidence.fronts import MIN_SIGN

ADVICE = BOOK / "advice.yaml"
ROWS = ("The paper found", "We measured", "On other networks", "So you should")
OWN = "small"
"""The book's own network."""
UNTUNED = (
    "We tuned learning rates for `small` and `small-quarter`, and the others use those of `small`."
)


@checked_dataclass(frozen=True, config=STRICT)
class Network:
    """A technique applied to a network.

    Attributes:
        network: The network.
        technique: The technique, as text.
        study: The study.
        setting: The setting in the study.
        front: The front of the gain: its name in `claims.yaml`, or settings of the study, plain
            fine-tuning of that network at a few peaks.
    """

    network: Text
    technique: Text
    study: Text
    setting: Text
    front: Text | tuple[Text, ...] = "plain"


@checked_dataclass(frozen=True, config=STRICT)
class Guideline:
    """A guideline of the paper.

    Attributes:
        name: The name used by claims, see `lab.evidence.claims.Claim`.
        paper: What the paper found.
        scale: The scale of the paper's experiments.
        advice: What to do.
        follows: The evidence for the advice: "both", or only "paper".
        open: What remains to be measured.
        networks: Techniques on networks, starting with the book's own.
    """

    name: Text
    paper: Text
    scale: Text
    advice: Text
    follows: Literal["both", "paper"]
    open: Text
    networks: tuple[Network, ...] = ()


def load_guidelines() -> dict[str, Guideline]:
    """Return the guidelines by name; raise `CmpError` that names an invalid key."""
    guidelines = check_record(read_yaml(ADVICE), dict[str, tuple[Guideline, ...]], f"{ADVICE}: ")
    return {each.name: each for each in guidelines.get("guidelines", ())}


@dataclass(frozen=True)
class Measured:
    """The results of the published studies on a guideline.

    Attributes:
        sentences: One sentence per primary claim.
        networks: One sentence per technique and network, in the guideline's order.
        disagrees: Whether a decided claim contradicts the paper, or the gain of a technique, if
            above a point, differs in sign between networks.
    """

    sentences: tuple[str, ...]
    networks: tuple[str, ...]
    disagrees: bool


def measure_guideline(guideline: Guideline, judged: pd.DataFrame) -> Measured:
    """Return the measurements for a guideline.

    Args:
        guideline: The guideline.
        judged: The verdicts, see `lab.evidence.verdicts.judge_claims`.
    """
    made = judged[judged["guideline"] == guideline.name]
    sentences = tuple(f'Claim: "{row.claimed}" {row.sentence}' for row in made.itertuples())
    words, signs = [], dict[str, set[bool]]()
    for network in guideline.networks:
        text, sign = _measure_network(network)
        own = " (the book's network)" if network.network == OWN else ""
        words.append(f"{network.technique} on `{network.network}`{own}: {text}.")
        if sign is not None:
            signs.setdefault(network.technique, set()).add(sign)
    if words:
        words.append(UNTUNED)
    flips = any(len(found) > 1 for found in signs.values())
    disagrees = (made.loc[made["source"] == "paper", "agrees"] == "no").any()
    return Measured(sentences, tuple(words), flips or bool(disagrees))


def _measure_network(network: Network) -> tuple[str, bool | None]:
    """Return the gain of a technique on a network as text, and whether it is positive. The latter
    is None if the gain is not measured, lacks streams, or is at most a point."""
    if isinstance(network.front, str):
        front = claims.load_claims().fronts[network.front]
    else:
        front = FrontOf(network.study, network.front, local=True, least=MIN_SIGN)
    try:
        gain = verdicts.gain_of(network.study, network.setting, front)
    except verdicts.NotComputed:
        return verdicts.NOT_COMPUTED, None
    except fronts.OutsideFrontError as error:
        learned = "less" if fronts.BELOW in str(error) else "more"
        words = f"it learned {learned} than plain fine-tuning at any peak that we tried"
        return f"cannot be compared, because {words}", None
    except CmpError as error:
        return f"its gain cannot be formed: {error}", None
    found = verdicts.estimate_gain(network.study, network.setting, gain)
    sign = found.value > 0 if abs(found.value) > MATTERS and not found.progress else None
    counted = f"preliminary, {found.progress}" if found.progress else f"n = {found.streams}"
    return f"{signed(found.value)} points of A_ZS at equal A_KA ({counted})", sign


def judged_claims(*families: Path) -> pd.DataFrame:
    """Return the verdicts on the book's claims, judged again only if a result or a claim has
    changed.

    Args:
        *families: The files of the families, such as `*claims.FAMILIES`; by default, the first.
    """
    used = (results.RESULTS / DIGESTS, *claims.FAMILIES)  # a family may use fronts of another
    stamps = tuple(path.stat().st_mtime_ns for path in used if path.exists())
    return pd.concat([_judged(path, stamps) for path in families or claims.FAMILIES[:1]])


@cached_by_file
def _judged(path: Path, stamps: tuple[int, ...]) -> pd.DataFrame:
    return verdicts.judge_claims(claims.load_claims(path))
