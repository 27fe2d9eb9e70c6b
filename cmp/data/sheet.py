"""Contact sheets: what the images of a dataset look like, at the resolution that models see."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from cmp.data.packed import Packed
from cmp.data.samples import SIZE
from cmp.files import whole_file
from cmp.seeds import numpy_generator

COLUMNS, ZOOM, LINE, GAP = 8, 4, 12, 4


def contact_sheet(packed: Packed, path: Path, count: int = 64) -> None:
    """Write `count` random images, 4 times enlarged over white, with their labels, as PNG."""
    size = len(packed.table)
    chosen = np.sort(numpy_generator("sheet", 0, packed.dataset.name).permutation(size)[:count])
    side = SIZE * ZOOM
    cell = (side + GAP, side + LINE + GAP)
    rows = -(-len(chosen) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * cell[0], rows * cell[1]), "white")
    draw = ImageDraw.Draw(sheet)
    for place, index in enumerate(chosen):
        x, y = place % COLUMNS * cell[0], place // COLUMNS * cell[1]
        rgba = Image.fromarray(np.ascontiguousarray(packed.images[index].transpose(1, 2, 0)))
        seen = Image.new("RGBA", rgba.size, "white")
        seen.alpha_composite(rgba)
        sheet.paste(seen.resize((side, side), Image.Resampling.NEAREST), (x, y))
        label = packed.table["label"].iloc[index].encode("ascii", "replace").decode()
        draw.text((x, y + side), label[:20], fill="black")
    with whole_file(path) as partial:
        sheet.save(partial, "PNG")
