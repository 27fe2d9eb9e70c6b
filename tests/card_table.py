"""Write the table of `book/manual.md` that says which networks fit on which cards:
`python -m tests.card_table`, two minutes."""

import pandas as pd

from cmp.experiments import cards
from cmp.files import write_atomic
from cmp.project import book_folder

PAGE = book_folder() / "manual.md"
BEGIN, END = "% written by tests/card_table.py", "% end of the table"


def as_markdown(table: pd.DataFrame) -> str:
    """The table in Markdown."""
    rows = [["network", *table.columns], [":--"] * (1 + table.shape[1])]
    rows += [
        [f"`{name}`", *cells] for name, cells in zip(table.index, table.to_numpy(), strict=True)
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def committed() -> str:
    """The table of the page."""
    return PAGE.read_text().partition(f"{BEGIN}\n")[2].partition(f"\n\n{END}")[0]


if __name__ == "__main__":
    before, found, after = PAGE.read_text().partition(f"{BEGIN}\n")
    after = after.partition(f"\n\n{END}")[2]
    table = as_markdown(cards.fitting_table())
    write_atomic(PAGE, f"{before}{found}{table}\n\n{END}{after}")
