"""What a recipe returns: images with a table, before they are packed."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

SIZE = 32
"""Side of an embedded image in pixels: the resolution that the models see."""

ALL = slice(None)
"""All samples of a batch, where some of them could be asked for."""

COLUMNS = ["split", "label", "group", "source", "captions"]


@dataclass(frozen=True)
class Samples:
    """Images and their rows, in one order.

    images: uint8 [N, 4, 32, 32], RGBA with straight alpha.
    table: a row an image: `split`; `label`, a class name; `group`, what the image shows (an emoji's
        codepoint, shared by all its drawings), by which standard errors are clustered; `source`,
        the image's identity in its package; `captions`, the texts that training draws from.
    """

    images: np.ndarray
    table: pd.DataFrame


def from_rows(images: list[np.ndarray], rows: list[tuple]) -> Samples:
    """Stack images [4, 32, 32] with rows in the order of `COLUMNS`."""
    return Samples(np.stack(images), pd.DataFrame(rows, columns=COLUMNS))
