"""The answer in one minute, as README and the first page open with it: `python -m lab.front_door`.

`book/lab/answer.md` states it, its numbers come from published results.
"""

import re

from cmp.errors import CmpError
from cmp.files import write_atomic
from lab import chapters, values

PAGES = (chapters.BOOK.parent / "README.md", chapters.BOOK / "index.md")
BRACKETS = "Brackets hold intervals (chapter 01), or say how many streams are computed so far."
BEGIN, END = "<!-- answer: python -m lab.front_door writes it -->", "<!-- end of the answer -->"


def with_answer(page: str, source: str) -> str:
    """Return a page with the answer between its two marks.

    Args:
        page: The page's text.
        source: What errors call it.

    Raises:
        CmpError: The page has no such marks.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise CmpError(f"{source}: expected {BEGIN!r} and {END!r}")
    answer = values.fill_values(
        (chapters.BOOK / "lab" / "answer.md").read_text(encoding="utf-8"), "answer: "
    )
    return f"{before}{BEGIN}\n\n{say_once(answer)}\n{END}{after}"


def say_once(answer: str) -> str:
    """Return an answer that says below its table what all its values have in their brackets."""
    statuses = {*re.findall(r"[+−]\d+\.\d \(([^)]*)\)", answer)}
    words = next(iter(statuses), "")
    if len(statuses) > 1 or not words.startswith("preliminary"):
        return answer
    return answer.replace(f" ({words})", "").replace(BRACKETS, f"All values are {words}.")


def write_answer() -> None:
    """Write the answer into all pages that open with it."""
    for page in PAGES:
        write_atomic(page, with_answer(page.read_text(encoding="utf-8"), str(page)))


if __name__ == "__main__":
    write_answer()
