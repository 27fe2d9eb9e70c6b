"""A small book with everything that the theme shows, to be built with it."""

import json
from pathlib import Path

import nbformat

from lab import chapters, site

INDEX = """\
---
title: Sample
---

# Sample

(here)=
## A part

{set}`Sixty <mixture: {"heat": "x"}>`
of them, with `code`, $x^2$, [a link](https://example.org), {cite:p}`someone2024`,
and {ref}`here`. See {ref}`the equation <eq>`.

$$
a = b + c
$$ (eq)

- An item

| | two |
|---|---|
| a | 1 |

:::{dropdown} Not yet
Folded.
:::

```{code-block} python
def f(x):
    return x
```

**Figure 1.1.** What A_KA is, beside `A_KA`.

```{code-block} bash
cmpt export run  # for others
```

:::{glossary}
Base
: Where it starts.

Batch
: What a step takes.
:::

## Another part

:::{explorer} mixture
:::

More text.
"""
BIBLIOGRAPHY = """\
@misc{someone2024, author = {Someone, A.}, title = {A thing}, year = {2024}, url = {https://example.org}}
"""
PIXEL = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk"
    "+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
STILL = '<div class="answering" data-explorer="schedule"><p>Still.</p></div>'
FIXED = '<div class="answering"><p>A_ZS.</p></div>'
FRAME = (
    "<table><thead><tr><th>n</th><th>words</th></tr></thead><tbody><tr><td>1</td><td>short</td></tr>"
    f"<tr><td>2</td><td>{'long ' * 8}</td></tr></tbody></table><p>2 rows × 2 columns</p>"
)
TABLE = '<table border="1"><tr><th></th><th>n</th></tr><tr><th>a</th><td>1</td></tr></table>'
MYST = """\
version: 1
project:
  title: Sample
  bibliography:
    - refs.bib
  plugins:
    - {theme}/chapters.mjs
  toc:
    - file: index.md
    - file: cells.ipynb
  error_rules:
    - rule: reference-target-resolves
      severity: error
site:
  template: {theme}
"""


def cells() -> list:
    """Code cells with every kind of output, an explorer's still among them."""
    shown = [
        ("execute_result", {"text/html": TABLE, "text/plain": "a 1"}),
        ("display_data", {"image/png": PIXEL, "text/plain": "<Figure>"}),
        ("display_data", {"text/html": STILL}),
        ("execute_result", {"text/html": FRAME, "text/plain": "1 short"}),
    ]
    outputs = [nbformat.v4.new_output(kind, data) for kind, data in shown]
    outputs.append(nbformat.v4.new_output("stream", name="stdout", text="printed\n"))
    long = "\n".join(f"x{n} = {n}" for n in range(20))
    code = [
        nbformat.v4.new_code_cell(f"print({n})", outputs=[each]) for n, each in enumerate(outputs)
    ]
    both = [{"text/html": FIXED}, {"image/png": PIXEL}]
    still = [nbformat.v4.new_output("display_data", data) for data in both]
    code.append(nbformat.v4.new_code_cell("still", outputs=still))
    folded = nbformat.v4.new_markdown_cell(
        "## Evidence\n\nFor those who doubt.", metadata={chapters.FOLDED: True}
    )
    table = nbformat.v4.new_markdown_cell("### A table\n\nThe last words.")
    return [*code, nbformat.v4.new_code_cell(long), folded, table]


def write(folder: Path, index: str = INDEX) -> Path:
    """The sample's files in a folder; returns it."""
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    book = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_markdown_cell("# Cells\n\nText."), *cells()],
        metadata={"kernelspec": kernel},
    )
    (folder / "cells.ipynb").write_text(json.dumps(book))
    (folder / "index.md").write_text(index)
    (folder / "refs.bib").write_text(BIBLIOGRAPHY)
    (folder / "myst.yml").write_text(MYST.format(theme=site.THEME))
    return folder
