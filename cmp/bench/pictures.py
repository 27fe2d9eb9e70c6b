"""Generate a collection of JPEG files, each with its own caption, for runs to read.

Images and captions are meaningless but have realistic sizes and lengths, so a step decodes, crops
and encodes as much as on a web crawl.
"""

import json
from pathlib import Path

import numpy as np
import pandas as pd

from cmp.bench.jpegs import SIZE, photographs
from cmp.data import Corpus, load_data
from cmp.files import write_atomic
from cmp.seeds import numpy_generator

WORDS = (
    "dog cat bird horse tree house street river car boat blue red green old new small large near "
    "under over with and the of on in man woman child sky water table chair light stone wall"
)
"""Words with one token each in CLIP's vocabulary."""
LENGTHS = {"short": (11, 33), "long": (75, 75)}
"""The fewest and the most words of a caption. Including start and end tokens, a short one has 24
tokens on average, like alt texts on the web, and a long one fills CLIP's context of 77."""
SETS = {"updates": ("adapt", 0.45), "crawl": ("pool", 0.4), "known": ("eval", 0.15)}
"""Name -> role and share of the images."""
CLASSES = ("fox", "owl", "oak", "elm", "ant", "bee", "cod", "yak")


def write_sets(folder: Path, count: int, captions: str) -> None:
    """Write a table and a manifest for each of `SETS`, in order, so that a collection with the last
    one is complete.

    Args:
        folder: The folder that contains `pictures`.
        count: The number of images.
        captions: A key of `LENGTHS`.
    """
    noise, (least, most) = numpy_generator("bench/captions", 0), LENGTHS[captions]
    texts = [
        " ".join(noise.choice(WORDS.split(), noise.integers(least, most + 1))) for _ in range(count)
    ]
    frame = pd.DataFrame({"filepath": [f"pictures/{n}.jpg" for n in range(count)], "title": texts})
    frame["label"] = np.resize(CLASSES, count)
    ends = np.cumsum([round(share * count) for _, share in SETS.values()])
    for (name, (role, _)), rows in zip(
        SETS.items(), np.split(np.arange(count), ends[:-1]), strict=True
    ):
        frame.iloc[rows].to_csv(folder / f"{name}.csv", index=False)
        reader = {"kind": "csv", "path": f"{name}.csv", "label": "label"}
        about = {"name": name, "title": "A benchmark", "role": role, "licence": "none"}
        write_atomic(folder / f"{name}.yaml", json.dumps(about | {"reader": reader}))


def load_collection(
    folder: Path, count: int, captions: str = "short", size: tuple[int, int] = SIZE
) -> Corpus:
    """Return the data of a generated collection, writing it if necessary.

    Args:
        folder: The folder of the collection, a valid value of `config.data`.
        count: The total number of images.
        captions: A key of `LENGTHS`.
        size: Width and height of the images in pixels.
    """
    if not (folder / f"{[*SETS][-1]}.yaml").exists():
        files = folder / "pictures"
        files.mkdir(parents=True, exist_ok=True)
        photographs(files, count, size)
        write_sets(folder, count, captions)
    return load_data(str(folder))
