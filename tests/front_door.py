"""The answer in one minute, as README and the first page open with it.

`book/lab/answer.md` states the answer, and its numbers come from published results.
`python -m tests.front_door` writes it into both pages.
"""

import textwrap

from cmp.errors import CmpError
from cmp.files import write_atomic
from lab import chapters, values

PAGES = (chapters.BOOK.parent / "README.md", chapters.BOOK / "index.md")
BEGIN, END = "<!-- answer: python -m tests.front_door writes it -->", "<!-- end of the answer -->"


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
    text = (chapters.BOOK / "lab" / "answer.md").read_text(encoding="utf-8")
    parts = values.fill_values(text, "answer: ").rstrip().split("\n\n")
    answer = "\n\n".join(textwrap.fill(x, 100) if x[0].isalpha() else x for x in parts) + "\n"
    return f"{before}{BEGIN}\n\n{answer}\n{END}{after}"


def write_front() -> None:
    """Write the answer into all pages that open with it."""
    for page in PAGES:
        write_atomic(page, with_answer(page.read_text(encoding="utf-8"), str(page)))


if __name__ == "__main__":
    write_front()
