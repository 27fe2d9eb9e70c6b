"""The boxes of chapters: tables of sentences, as Markdown that every notebook shows."""

from IPython.display import Markdown

from cmp.experiments.guidelines import guideline_box


def beside_paper(guideline: str) -> Markdown:
    """Return a guideline's box: what the paper found, what was measured, and what to do.

    Args:
        guideline: Its name, such as "merging".
    """
    rows = [f"| **{name}** | {text} |" for name, text in guideline_box(guideline).items()]
    return Markdown("\n".join(["| | |", "|:--|:--|", *rows]))
