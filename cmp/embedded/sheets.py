"""Contact sheets: what the images of a dataset look like, at the resolution that models see."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from cmp.data import IMAGE_SIZE
from cmp.embedded.manifest import Dataset, Package
from cmp.embedded.packed import PackedDataset
from cmp.errors import CmpError
from cmp.files import atomic_file, make_folder
from cmp.seeds import numpy_generator

SHEET_COLUMNS, SHEET_ZOOM, LABEL_HEIGHT, SHEET_GAP = 8, 4, 12, 4


def contact_sheet(packed: PackedDataset, path: Path, count: int = 64) -> None:
    """Write `count` random images, 4 times enlarged over white, with their labels, as PNG."""
    size = len(packed.table)
    chosen = np.sort(numpy_generator("sheet", 0, packed.dataset.name).permutation(size)[:count])
    side = IMAGE_SIZE * SHEET_ZOOM
    cell = (side + SHEET_GAP, side + LABEL_HEIGHT + SHEET_GAP)
    rows = -(-len(chosen) // SHEET_COLUMNS)
    sheet = Image.new("RGB", (SHEET_COLUMNS * cell[0], rows * cell[1]), "white")
    draw = ImageDraw.Draw(sheet)
    for place, index in enumerate(chosen):
        x, y = place % SHEET_COLUMNS * cell[0], place // SHEET_COLUMNS * cell[1]
        rgba = Image.fromarray(np.ascontiguousarray(packed.images[index].transpose(1, 2, 0)))
        seen = Image.new("RGBA", rgba.size, "white")
        seen.alpha_composite(rgba)
        sheet.paste(seen.resize((side, side), Image.Resampling.NEAREST), (x, y))
        label = packed.table["label"].iloc[index].encode("ascii", "replace").decode()
        draw.text((x, y + side), label[:20], fill="black")
    with atomic_file(path) as partial:
        sheet.save(partial, "PNG")


def export_class_folders(packed: PackedDataset, folder: Path, split: str = "train") -> int:
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


ATTRIBUTION_HEAD = """# Attribution of the data

Made by `cmpt data attribution` from `data_manifests/packages.yaml`. The packages are fetched when
data are built; their content is not part of this repository. The weights in `cmp/weights` were
trained on the sets below whose role is *pool*.

| source | licence | package | used in |
|---|---|---|---|
"""


def attribution_text(packages: dict[str, Package], datasets: dict[str, Dataset]) -> str:
    """The text of the file: a row a package."""
    rows = []
    for name, package in packages.items():
        used = ", ".join(d.name for d in datasets.values() if name in d.sources)
        source = f"{package.attribution} ({package.url})"
        where = f"`{package.package}` {package.version}"
        rows.append(f"| {source} | {package.licence} | {where} | {used} |")
    return ATTRIBUTION_HEAD + "\n".join(rows) + "\n"
