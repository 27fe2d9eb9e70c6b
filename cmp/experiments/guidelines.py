"""The guidelines: what the paper found, what this book measured, and so what to do.

`book/advice.yaml` states the paper's finding and the advice; what was measured is read from the
published studies, so that another result is another text.
"""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pandas as pd
from pydantic import Field
from pydantic.dataclasses import dataclass as checked_dataclass

from cmp.config import STRICT
from cmp.errors import CmpError
from cmp.experiments import results, verdicts
from cmp.experiments.verdicts import FrontOf
from cmp.files import project_folder
from cmp.readers.files import check_record, read_yaml

ADVICE = project_folder() / "book" / "advice.yaml"
ROWS = ("The paper found", "We measured", "On other networks", "So you should")
NOT_HERE = "The studies are in a checkout of the project, not in this installation."

Text = Annotated[str, Field(min_length=1)]


@checked_dataclass(frozen=True, config=STRICT)
class Network:
    """A technique on another network than the default one.

    Attributes:
        network: The network.
        technique: What is tried on it, in words.
        study: The study.
        setting: Its setting.
        front: Plain fine-tuning of that network at a few peaks, whose front the gain is from.
    """

    network: Text
    technique: Text
    study: Text
    setting: Text
    front: tuple[Text, ...]


@checked_dataclass(frozen=True, config=STRICT)
class Guideline:
    """A guideline of the paper.

    Attributes:
        name: As claims name it, see `cmp.experiments.verdicts.Claim`.
        chapter: The number of the chapter that teaches it.
        paper: What the paper found.
        scale: At which scale.
        advice: What to do.
        follows: Whose evidence the advice rests on: "both", or "paper" alone.
        open: What would have to be measured to know more.
        networks: Techniques on other networks.
    """

    name: Text
    chapter: Text
    paper: Text
    scale: Text
    advice: Text
    follows: Literal["both", "paper"]
    open: Text
    networks: tuple[Network, ...] = ()


@functools.cache
def load_guidelines(path: Path = ADVICE) -> dict[str, Guideline]:
    """Return the guidelines by name; raise `CmpError` that names the key at fault."""
    guidelines = check_record(read_yaml(path), dict[str, tuple[Guideline, ...]], f"{path}: ")
    return {each.name: each for each in guidelines.get("guidelines", ())}


@dataclass(frozen=True)
class Measured:
    """What the published studies say of a guideline.

    Attributes:
        sentences: A sentence per primary claim.
        networks: A sentence per technique on another network.
        disagrees: Whether a decided claim came out other than the paper has it, or the sign of a
            technique's gain differs between networks.
    """

    sentences: tuple[str, ...]
    networks: tuple[str, ...]
    disagrees: bool


def measure_guideline(guideline: Guideline, judged: pd.DataFrame) -> Measured:
    """Return what was measured.

    Args:
        guideline: The guideline.
        judged: The verdicts, see `cmp.experiments.verdicts.judge_claims`.
    """
    own = judged[judged["guideline"] == guideline.name]
    sentences = tuple(f"{row.claimed} {row.sentence}" for row in own.itertuples())
    words, signs = [], dict[str, set[bool]]()
    for each in guideline.networks:
        if not results.is_published(each.study):
            words.append(f"{each.network}: {each.technique}: not computed yet.")
            continue
        front = FrontOf(each.study, each.front, local=True)
        try:
            gain = verdicts.gain_of(each.study, each.setting, front)
        except CmpError as error:
            words.append(f"{each.network}: {each.technique}: not measured ({error}).")
            continue
        estimate = float(gain.values.mean())
        signs.setdefault(each.technique, set()).add(estimate > 0)
        words.append(
            f"{each.network}: {each.technique}: {estimate:+.1f} points of A_ZS at equal A_KA "
            f"(n = {len(gain.values)})."
        )
    flips = any(len(found) > 1 for found in signs.values())
    return Measured(sentences, tuple(words), flips or (own["agrees"] == "no").any())


def guideline_box(name: str, judged: pd.DataFrame | None = None) -> dict[str, str]:
    """Return the rows of a guideline's box: `ROWS` -> text.

    Args:
        name: The guideline.
        judged: The verdicts; those of the book where None.
    """
    guideline = load_guidelines()[name]
    if judged is None and verdicts.CLAIMS.exists():
        judged = judged_claims()
    measured = Measured((NOT_HERE,), (), False)
    if judged is not None:
        measured = measure_guideline(guideline, judged)
    why = " The advice follows the paper, whose evidence is at scale." * (
        guideline.follows == "paper"
    )
    texts: tuple[Any, ...] = (
        f"{guideline.paper} ({guideline.scale})",
        " ".join(measured.sentences),
        " ".join(measured.networks) or "Not tried.",
        f"{guideline.advice}{why} Still open: {guideline.open}",
    )
    return dict(zip(ROWS, texts, strict=True))


def judged_claims() -> pd.DataFrame:
    """Return the verdicts of the book's claims, read again only if a result has changed."""
    stamps = [(path.name, path.stat().st_mtime_ns) for path in results.RESULTS.glob("*.parquet")]
    return _judged(tuple(sorted(stamps)))


@functools.lru_cache(maxsize=2)
def _judged(stamps: tuple[tuple[str, int], ...]) -> pd.DataFrame:
    return verdicts.judge_claims(verdicts.load_claims())
