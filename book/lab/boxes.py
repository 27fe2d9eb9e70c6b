"""Boxes in chapters, as tables of paragraphs."""

import re
from collections.abc import Sequence
from html import escape

from IPython.display import HTML

from lab.evidence.claims import FAMILIES
from lab.evidence.guidelines import ROWS, judged_claims, load_guidelines, measure_guideline

LESSON, EVIDENCE = (ROWS[0], ROWS[3]), ROWS[1:3]
"""The rows of a box in a lesson, and those for its evidence."""
LEFT = 'style="text-align: left; vertical-align: top; white-space: normal"'


def beside_paper(*guidelines: str, rows: Sequence[str] = ROWS) -> HTML:
    """Return the boxes of guidelines: what the paper found, what was measured, and what to do.

    Args:
        guidelines: The names, such as "merging". If there are several, each box has its name above
            it.
        rows: The rows to show, such as `LESSON`.
    """
    boxes = []
    for guideline in guidelines:
        cells = [
            f"<th {LEFT}>{name}</th><td {LEFT}>{''.join(map(_paragraph, texts))}</td>"
            for name, texts in guideline_box(guideline).items()
            if name in rows
        ]
        name = f"<h3>{guideline.capitalize()}</h3>" if len(guidelines) > 1 else ""
        boxes.append(f"{name}<table><tr>{'</tr><tr>'.join(cells)}</tr></table>")
    return HTML("\n".join(boxes))


def _paragraph(text: str) -> str:
    """Return a text as HTML, with `names` as code and with typographic quotes and apostrophes."""
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text, quote=False))
    text = re.sub(r"(?<!\w)'([^']+)'", r"‘\1’", re.sub(r'"([^"]+)"', r"“\1”", text))
    text = text.replace("'", "’")
    return f'<p style="margin: 0 0 0.5em">{text}</p>'


def guideline_box(name: str) -> dict[str, tuple[str, ...]]:
    """Return the rows of a guideline's box, `ROWS` -> paragraphs."""
    guideline = load_guidelines()[name]
    measured = measure_guideline(guideline, judged_claims(*FAMILIES))
    follows_paper = guideline.follows == "paper" or measured.disagrees
    why = ("The advice follows the paper, whose evidence is at scale.",) if follows_paper else ()
    paragraphs = (
        (guideline.paper, f"Its scale: {guideline.scale}."),
        measured.sentences,
        measured.networks or ("Not tried for these claims.",),
        (guideline.advice, *why, f"Still open: {guideline.open}"),
    )
    return dict(zip(ROWS, paragraphs, strict=True))
