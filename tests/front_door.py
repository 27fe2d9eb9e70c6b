"""The answer in one minute, as README and the first page open with it, and README's picture.

`book/lab/answer.md` states the answer, its numbers come from published results. The picture is that
of chapter 00's notebook. `python -m tests.front_door` writes the answer into both pages, and the
picture beside them.
"""

import base64

import nbformat

from cmp.cli.shared import import_lab
from cmp.errors import CmpError
from cmp.files import write_atomic

chapters, values = import_lab("chapters"), import_lab("values")

PAGES = (chapters.BOOK.parent / "README.md", chapters.BOOK / "index.md")
PICTURE = chapters.BOOK / "forgetting.png"
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
    answer = values.fill_values(
        (chapters.BOOK / "lab" / "answer.md").read_text(encoding="utf-8"), "answer: "
    )
    return f"{before}{BEGIN}\n\n{answer}\n{END}{after}"


def picture() -> bytes:
    """Return the still of the forgetting scrubber, as chapter 00's notebook shows it."""
    [source] = chapters.select(["00"])
    cells = nbformat.read(source.with_suffix(".ipynb"), 4).cells
    [shown] = [cell for cell in cells if "scrubber_explorer" in cell.source]
    [png] = [each.data["image/png"] for each in shown.outputs if "image/png" in each.data]
    return base64.b64decode(png)


def write_front() -> None:
    """Write the picture, and the answer into all pages that open with it."""
    PICTURE.write_bytes(picture())
    for page in PAGES:
        write_atomic(page, with_answer(page.read_text(encoding="utf-8"), str(page)))


if __name__ == "__main__":
    write_front()
