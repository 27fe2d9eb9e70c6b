"""The forgetting scrubber: a model's predictions for the same test images after each update."""

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from cmp.data import Corpus
from lab import explorers, figures

SHOWN, IN_STILL = 24, 9
"""Images that the explorer shows, and those in its still."""


def shown_images(names: pd.DataFrame, corpus: Corpus) -> np.ndarray:
    """Choose images that lost their correct name at least once, from each dataset in turn.

    Args:
        names: The `old` or `new` of `lab.analyses.predict_names`.
        corpus: The embedded benchmark.

    Returns:
        The images' corpus positions, sorted.
    """
    lost = np.sort(names.index[_lost(names)])
    turn = pd.Series(lost).groupby(corpus.table["dataset"].array[lost].astype(str)).cumcount()
    return np.sort(lost[np.argsort(turn, kind="stable")[:SHOWN]])


def _lost(names: pd.DataFrame) -> pd.Series:
    """Return which images had their correct name at the start, but not after some update."""
    right = names.drop(columns="truth").eq(names["truth"], axis=0)
    return right[0] & ~right.all(axis=1)


def scrubber_table(names: pd.DataFrame, corpus: Corpus) -> dict[str, Any]:
    """Return the data of the scrubber.

    Args:
        names: The `old` or `new` of `lab.analyses.predict_names`.
        corpus: The embedded benchmark.

    Returns:
        `images`: for each, the `truth` and the `names` by update; `sprite`: their pictures side by
        side, as a data URL; `right`: by update, how many of all `scored` images are named
        correctly; `lost`: how many lose their correct name.
    """
    answers, rows = names.drop(columns="truth"), shown_images(names, corpus)
    return {
        "images": [
            {"truth": names.loc[row, "truth"], "names": answers.loc[row].tolist()} for row in rows
        ],
        "sprite": sprite(corpus, rows),
        "right": answers.eq(names["truth"], axis=0).sum().tolist(),
        "scored": len(names),
        "lost": int(_lost(names).sum()),
    }


def sprite(corpus: Corpus, rows: Sequence[int]) -> str:
    """Return pictures side by side, as the data URL of one PNG; "" if there are none.

    Args:
        corpus: The embedded benchmark.
        rows: The pictures' corpus positions.
    """
    if not len(rows):
        return ""
    pixels = np.asarray(corpus.images[np.asarray(rows)]).transpose(2, 0, 3, 1)
    return _address(pixels.reshape(pixels.shape[0], -1, pixels.shape[-1]))


def one_picture(address: str, place: int) -> str:
    """Return the data URL of one picture of a `sprite`, counted from 0."""
    with Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))) as pictures:
        pixels = np.asarray(pictures)
    side = pixels.shape[0]
    return _address(pixels[:, place * side : (place + 1) * side])


def _address(pixels: np.ndarray) -> str:
    Image.fromarray(np.ascontiguousarray(pixels)).save(file := io.BytesIO(), "png", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def scrubber_explorer(names: pd.DataFrame, corpus: Corpus) -> explorers.Explorer:
    """Explore a model's predictions for the same test images after each update.

    Args:
        names: The `old` or `new` of `lab.analyses.predict_names`.
        corpus: The embedded benchmark.

    Returns:
        The explorer. Its still includes its table, since that does not come from published results.
    """
    table, rows = scrubber_table(names, corpus), shown_images(names, corpus)[:: SHOWN // IN_STILL]
    rows = rows[:IN_STILL]
    answers = names.loc[rows].drop(columns="truth")
    figure = figures.plot_changing_names(corpus.images[rows], answers, names.loc[rows, "truth"])
    words = f"Names of {len(rows)} test images before the stream and after each update."
    still = explorers.draw_still("scrubber", figure, words, table=table)
    return explorers.Explorer("scrubber", table, still)
