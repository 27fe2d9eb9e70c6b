"""A control for three shares that sum to one: a point in a triangle, dragged or moved by keys."""

from collections.abc import Mapping
from pathlib import Path

import anywidget
import traitlets


class Triangle(anywidget.AnyWidget):
    """`value`: the shares of pool, update and buffer. `points`: stored mixtures, which a click
    chooses, each {"shares": [P, D, B], "name": ...}."""

    _esm = Path(__file__).with_suffix(".js")
    value = traitlets.List(traitlets.Float()).tag(sync=True)
    points = traitlets.List(traitlets.Dict()).tag(sync=True)


def triangle(points: Mapping[str, tuple[float, float, float]]) -> Triangle:
    """The control, at thirds. points: stored mixtures by name."""
    dots = [{"name": name, "shares": list(map(float, shares))} for name, shares in points.items()]
    return Triangle(value=[1 / 3, 1 / 3, 1 / 3], points=dots)
