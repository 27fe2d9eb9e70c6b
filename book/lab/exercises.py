"""Check answers to exercises, and show questions with answers to reveal."""

import html
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

from cmp.errors import CmpError
from cmp.parsing import read_yaml

SHEET = Path(__file__).resolve().parents[1] / "exercises.yaml"
RIGHT, NEAR, WRONG = "right", "near", "not yet"


def _as_html(text: str) -> str:
    """Return a text as HTML, with text between backticks as code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))


@dataclass(frozen=True)
class Verdict:
    """The verdict on an answer.

    Attributes:
        word: "right", "near" or "not yet".
        why: One or two sentences.
    """

    word: str
    why: str

    def __str__(self) -> str:
        return f"{self.word.capitalize()}. {self.why}".strip()

    __repr__ = __str__

    def _repr_html_(self) -> str:
        sign = {RIGHT: "✓", NEAR: "≈", WRONG: "✗"}[self.word]
        said = f"<b>{sign} {self.word.capitalize()}.</b> {_as_html(self.why)}"
        return f'<p class="verdict {self.word.replace(" ", "-")}">{said}</p>'


@dataclass(frozen=True)
class Questions:
    """The questions of a chapter, each with an answer that a click reveals."""

    pairs: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        return "\n".join(f"{n}. {question}" for n, (question, _) in enumerate(self.pairs, 1))

    __repr__ = __str__

    def _repr_html_(self) -> str:
        rows = (
            f"<details><summary>{_as_html(question)}</summary><p>{_as_html(answer)}</p></details>"
            for question, answer in self.pairs
        )
        return f'<div class="recall">{"".join(rows)}</div>'


def check(number: str, answer: Any) -> Verdict:
    """Return whether an answer to an exercise is right and, if not, why.

    Args:
        number: The chapter and the exercise, such as "03.2".
        answer: A number, a list of numbers, or a word, depending on the exercise.

    Returns:
        The verdict, which a notebook displays.

    Raises:
        CmpError: The exercise cannot be checked.

    Example:
        >>> lab.check("05.1", 2)
        Not yet. FLOPs alone would buy twice the steps. What does the budget multiply them with?
    """
    exercise = _look_up("exercises", number)
    wanted = exercise["answer"]
    if isinstance(wanted, str):
        if not isinstance(answer, str):
            return Verdict(WRONG, f"Expected words in quotes: {exercise['asks']}.")
        also = {_words(key): name for key, name in exercise.get("also", {}).items()}
        given, is_near = also.get(_words(answer), answer), False
    else:
        given, count = _numbers(answer), len(_numbers(wanted) or [])
        if given is None or len(given) != count:
            kind = "a number" if count == 1 else f"a list of {count} numbers"
            return Verdict(WRONG, f"Expected {kind}: {exercise['asks']}.")
        is_near = _fits(given, wanted, exercise["near"])
    if _fits(given, wanted, exercise.get("within")):
        return Verdict(RIGHT, exercise.get("right", ""))
    for hint in exercise.get("hints", ()):
        if _fits(given, hint["answer"], hint.get("within")):
            return Verdict(NEAR if is_near else WRONG, hint["say"])
    if is_near:
        return Verdict(NEAR, "You are close: look at the last step again.")
    return Verdict(WRONG, f"That is not it. The exercise asks for {exercise['asks']}.")


def _words(text: str) -> str:
    """Return a text in lower case, without the signs between its words."""
    return " ".join(re.findall(r"[^\W_]+", text.casefold()))


def _numbers(value: Any) -> list[float] | None:
    """Return a number or numbers as a list of floats, or None for anything else."""
    values = value.tolist() if hasattr(value, "tolist") else value
    listed = list(values) if isinstance(values, list | tuple) else [values]
    if any(isinstance(each, bool) or not isinstance(each, Real) for each in listed):
        return None
    most = sys.float_info.max  # a larger integer has no float
    return [float(max(-most, min(each, most))) for each in listed]


def _fits(given: Any, wanted: Any, room: Any) -> bool:
    """Return whether an answer is the expected word, or numbers within the given tolerances."""
    if isinstance(wanted, str):
        return _words(given) == _words(wanted)
    numbers, rooms = _numbers(wanted) or [], _numbers(room) or []
    return all(
        abs(one - other) <= most * (1 + 1e-9)
        for one, other, most in zip(given, numbers, rooms, strict=True)
    )


def recall(chapter: str) -> Questions:
    """Return questions about a chapter, with answers that a click reveals.

    Args:
        chapter: The chapter's number, such as "03".

    Raises:
        CmpError: The chapter has no such questions.
    """
    return Questions(tuple((ask, answer) for ask, answer in _look_up("recall", chapter)))


def _look_up(section: str, key: str) -> Any:
    known: Mapping[str, Any] = read_yaml(SHEET)[section]
    if key not in known:
        raise CmpError(f"{section}: nothing for {key!r}; choose from {', '.join(known)}")
    return known[key]
