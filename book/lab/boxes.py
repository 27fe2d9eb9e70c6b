"""The boxes of chapters: tables of sentences."""

from html import escape

from IPython.display import HTML

from cmp.experiments.guidelines import guideline_box

LEFT = 'style="text-align: left; vertical-align: top; white-space: normal"'


def beside_paper(*guidelines: str) -> HTML:
    """Return guidelines' boxes: what the paper found, what was measured, and what to do.

    Args:
        guidelines: Their names, such as "merging". Several have their names above them.
    """
    boxes = []
    for guideline in guidelines:
        rows = guideline_box(guideline).items()
        cells = [f"<th {LEFT}>{name}</th><td {LEFT}>{escape(text)}</td>" for name, text in rows]
        name = f"<h3>{guideline.capitalize()}</h3>" * (len(guidelines) > 1)
        boxes.append(f"{name}<table><tr>{'</tr><tr>'.join(cells)}</tr></table>")
    return HTML("\n".join(boxes))
