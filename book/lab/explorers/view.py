"""What all explorers look like: controls above a sentence, a picture, and what is below it."""

import html
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anywidget
import ipywidgets
import pandas as pd
import traitlets
from ipywidgets import VBox
from matplotlib.figure import Figure

from cmp.errors import CmpError

TABLE = (
    "<style>.cmp-table td, .cmp-table th"
    " {padding: 0 7px; text-align: right; font-size: 13px; line-height: 1.5}"
    " .cmp-table tr > :first-child, .cmp-table.words tr > :last-child {text-align: left}</style>"
)
LABEL_WIDTH, CONTROL_WIDTH, PICTURE_WIDTH = "190px", "460px", "900px"


@dataclass(frozen=True)
class Drawn:
    """What an explorer shows; sentence: plain text, below: HTML."""

    figure: Figure
    sentence: str
    below: str = ""


def png(figure: Figure) -> bytes:
    """The picture that a page shows."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=144)
    return file.getvalue()


def html_table(table: pd.DataFrame) -> str:
    """A table of text as HTML, without its index: words at the left, numbers at the right."""
    return TABLE + table.to_html(border=0, classes="cmp-table words", index=False)


def copyable(assignments: list[str]) -> str:
    """The command of a run with these key=value, as HTML that a click marks."""
    lines = html.escape(" \\\n    ".join(["cmpt run cpu", *assignments]))
    about = '<b>Copy as config</b> (a click marks it all)<pre style="user-select: all">'
    return f"{about}{lines}</pre>"


def _lay_out(control: ipywidgets.Widget) -> None:
    """All of one size; a slider tells of its value once it is let go."""
    if control.has_trait("style"):
        control.style.description_width = LABEL_WIDTH
        control.layout.width = CONTROL_WIDTH
    if control.has_trait("continuous_update"):
        control.continuous_update = False


def explorer(
    controls: Mapping[str, ipywidgets.Widget],
    draw: Callable[..., Drawn],
    buttons: Mapping[ipywidgets.Button, Callable[[], None]] | None = None,
) -> VBox:
    """Controls above what `draw` makes of their values, which it is given by name.

    Where `draw` raises `CmpError`, its words are the sentence and the last picture stays.
    buttons: what each does, before all is drawn again. The picture is one image widget whose bytes
    are replaced: nothing flickers and no figure is left to a notebook to show.
    """
    sentence, below = ipywidgets.HTML(), ipywidgets.HTML()
    picture = ipywidgets.Image(format="png")
    picture.layout.max_width, picture.layout.width = "100%", PICTURE_WIDTH

    def update(_: Any = None) -> None:
        try:
            drawn = draw(**{name: control.value for name, control in controls.items()})
        except CmpError as error:
            words = html.escape(str(error), quote=False)
            sentence.value = f"<b>Refused:</b> {words}. Below is what was drawn before."
            return
        sentence.value = html.escape(drawn.sentence, quote=False)
        picture.value, below.value = png(drawn.figure), drawn.below

    def pressed(button: ipywidgets.Button) -> None:
        buttons[button]()
        update()

    for control in controls.values():
        _lay_out(control)
        control.observe(update, names="value")
    for button in buttons or {}:
        button.on_click(pressed)
    update()
    flow = ipywidgets.Layout(flex_flow="row wrap")
    shown = [ipywidgets.Box([*controls.values(), *(buttons or {})], layout=flow), sentence, picture]
    return VBox([*shown, below] if below.value else shown)


class Triangle(anywidget.AnyWidget):
    """`value`: the shares of pool, update and buffer. `points`: stored mixtures, which a click
    chooses, each {"shares": [P, D, B], "name": ...}."""

    _esm = Path(__file__).with_name("triangle.js")
    value = traitlets.List(traitlets.Float()).tag(sync=True)
    points = traitlets.List(traitlets.Dict()).tag(sync=True)


def triangle(points: Mapping[str, tuple[float, float, float]]) -> Triangle:
    """The control, at thirds. points: stored mixtures by name."""
    dots = [{"name": name, "shares": list(map(float, shares))} for name, shares in points.items()]
    return Triangle(value=[1 / 3, 1 / 3, 1 / 3], points=dots)
