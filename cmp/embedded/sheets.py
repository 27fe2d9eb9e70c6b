"""Draw contact sheets of a dataset's images."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from cmp.data import IMAGE_SIZE
from cmp.embedded.packed import PackedDataset
from cmp.files import atomic_file
from cmp.seeds import numpy_generator

SHEET_COUNT, SHEET_COLUMNS, SHEET_ZOOM, LABEL_HEIGHT, SHEET_GAP = 64, 8, 4, 12, 4


def contact_sheet(packed: PackedDataset, path: Path) -> None:
    """Write a sheet of random images of a dataset with their labels, enlarged four times over
    white.

    Args:
        packed: The dataset.
        path: A PNG file.

    Raises:
        CmpError: The file cannot be written.
    """
    size = len(packed.table)
    rows = np.sort(numpy_generator("sheet", 0, packed.dataset.name).permutation(size)[:SHEET_COUNT])
    side = IMAGE_SIZE * SHEET_ZOOM
    width, height = side + SHEET_GAP, side + LABEL_HEIGHT + SHEET_GAP
    lines = -(-len(rows) // SHEET_COLUMNS)
    sheet = Image.new("RGB", (SHEET_COLUMNS * width, lines * height), "white")
    draw = ImageDraw.Draw(sheet)
    for cell, row in enumerate(rows):
        x, y = cell % SHEET_COLUMNS * width, cell // SHEET_COLUMNS * height
        image = Image.fromarray(packed.images[row].transpose(1, 2, 0))
        image = image.resize((side, side), Image.Resampling.NEAREST)
        sheet.paste(image, (x, y), image)
        label = packed.table["label"].iloc[row].encode("ascii", "replace").decode()
        draw.text((x, y + side), label[:20], fill="black")
    with atomic_file(path) as partial:
        sheet.save(partial, "PNG")
