"""A packed dataset as files: a folder a class, as a reader's own pictures would lie."""

from pathlib import Path

import numpy as np
from PIL import Image

from cmp.data.packed import Packed
from cmp.errors import CmpError
from cmp.files import make_folder


def class_folders(packed: Packed, folder: Path, split: str = "train") -> int:
    """Write the images of a split as `folder/class/number.png`, spaces as "_"; returns how many.

    `CmpError` for a class whose name is no name of a folder.
    """
    rows = np.flatnonzero((packed.table["split"] == split).to_numpy())
    for row in rows:
        label = packed.table["label"].iloc[row].replace(" ", "_")
        if "/" in label or label.startswith("."):
            raise CmpError(f"{packed.dataset.name}: {label!r} cannot be the name of a folder")
        make_folder(folder / label)
        pixels = np.ascontiguousarray(packed.images[row].transpose(1, 2, 0))
        Image.fromarray(pixels).save(folder / label / f"{row}.png")
    return len(rows)
