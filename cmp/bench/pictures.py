"""A collection of JPEG files, each with a caption of its own, as a run reads its data.

Pictures and captions say nothing, but they are as large and as long as real ones: a step on them
decodes, crops and encodes as much as a step on a web crawl does.
"""

import json
from pathlib import Path

import numpy as np
import pandas as pd

from cmp.bench.data import photographs
from cmp.data import Corpus, load_data
from cmp.files import write_atomic
from cmp.seeds import numpy_generator

WORDS = (
    "dog cat bird horse tree house street river car boat blue red green old new small large near "
    "under over with and the of on in man woman child sky water table chair light stone wall"
)
"""Words that are one token each in CLIP's vocabulary."""
LENGTHS = {"short": (11, 33), "long": (75, 75)}
"""The fewest and the most words of a caption. With the marks of its start and end a short one has
24 tokens on average, as alt texts of the web have; a long one fills the 77 of CLIP's context."""
SETS = {"updates": ("adapt", 0.45), "crawl": ("pool", 0.4), "known": ("eval", 0.15)}
"""Name -> role, and share of the images."""
CLASSES = ("fox", "owl", "oak", "elm", "ant", "bee", "cod", "yak")


def write_collection(folder: Path, count: int, captions: str = "short") -> Path:
    """Write pictures and the manifests of three sets, unless they are there.

    Args:
        folder: Where they are written.
        count: How many pictures there are in all.
        captions: A key of `LENGTHS`.

    Returns:
        The folder, which `config.data` may name.
    """
    files = folder / "pictures"
    if not (folder / f"{[*SETS][-1]}.yaml").exists():
        files.mkdir(parents=True, exist_ok=True)
        photographs(files, count)
        write_sets(folder, count, captions)
    return folder


def write_sets(folder: Path, count: int, captions: str) -> None:
    """Write a table and a manifest for each of `SETS`; the last one comes last, so that a
    collection which has it is whole.

    Args:
        folder: Where `pictures` are.
        count: How many there are.
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


def load_collection(folder: Path, count: int, captions: str = "short") -> Corpus:
    """Return the data of such a collection, which is written if it is not there.

    Args:
        folder: Where it is.
        count: How many pictures there are in all.
        captions: A key of `LENGTHS`.
    """
    return load_data(str(write_collection(folder, count, captions)))
