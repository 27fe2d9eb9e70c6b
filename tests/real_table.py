"""Write the table of `book/manual.md` with the results that people sent of `cmpt study first-real`,
after those of our small network: `python -m tests.real_table`."""

from pathlib import Path

import pandas as pd

from cmp.errors import CmpError
from cmp.files import write_atomic
from lab import values
from lab.evidence import BOOK, real

PAGE = BOOK / "manual.md"
SENT = BOOK / "results" / "real"
BEGIN, END = "% written by tests/real_table.py", "% end of the results"
OURS = {
    "before": "before {} recipe/recipe",
    "new data alone": "{} recipe/new data alone, peak 0.0005",
    "plain, with replay": "{} front/plain, peak 0.00063",
    "recipe": "{} recipe/recipe",
}
"""Rows of our small network -> the mark of their scores, see `lab.values.estimate`."""
SCORES = ("A_KA", "A_ZS", "GM")


def our_rows() -> list[list[str]]:
    """Return the rows of the published results: the model, the GPU, the setting, and the scores."""
    rows = []
    for words, mark in OURS.items():
        scores = [values.estimate(mark.format(score))[0].value for score in SCORES]
        rows.append(["`small`, ours", "none", words, *(f"{score:.1f}" for score in scores)])
    return rows


def sent_rows(path: Path) -> list[list[str]]:
    """Return the rows of a file that somebody sent.

    Raises:
        CmpError: The file is not a table that `cmpt study first-real` writes.
    """
    try:
        table = pd.read_csv(path, dtype={"run": str})
        numbers = table[[*SCORES]].astype(float)
        names = table[["model", "device", "setting"]].astype(str)
    except (KeyError, ValueError) as error:
        raise CmpError(
            f"{path}: {error}; expected {real.STUDY}.csv as `cmpt study {real.STUDY}` writes it"
        ) from error
    if not numbers.apply(lambda column: column.between(0, 100)).all(axis=None):
        raise CmpError(f"{path}: scores must be 0 to 100; send the file as the study wrote it")
    cells = names.apply(lambda column: column.str.replace("|", "/"))
    return [
        [*words, *(f"{score:.1f}" for score in scores)]
        for words, scores in zip(cells.to_numpy(), numbers.to_numpy(), strict=True)
    ]


def as_markdown() -> str:
    """Return the table in Markdown: our rows first, then those of each file in `SENT`."""
    rows = [["model", "GPU", "setting", *(f"{score} %" for score in SCORES)]]
    rows += [[*[":--"] * 3, *["--:"] * 3], *our_rows()]
    rows += [row for path in sorted(SENT.glob("*.csv")) for row in sent_rows(path)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def with_table(page: str) -> str:
    """Return the text of a page with the table between its two marks."""
    before, begin, rest = page.partition(f"{BEGIN}\n")
    _, end, after = rest.partition(f"\n\n{END}")
    if not begin or not end:
        raise CmpError(f"{PAGE}: expected {BEGIN!r} and {END!r}")
    return f"{before}{begin}{as_markdown()}{end}{after}"


if __name__ == "__main__":
    page = PAGE.read_text(encoding="utf-8")
    write_atomic(PAGE, with_table(page))
