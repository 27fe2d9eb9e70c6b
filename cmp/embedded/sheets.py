"""Contact sheets and folders of a dataset's images, and ATTRIBUTION.md."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from cmp.data import IMAGE_SIZE
from cmp.embedded.manifest import Dataset, Package, embedded_packages, load_datasets
from cmp.embedded.packed import PackedDataset
from cmp.files import atomic_file, project_folder, write_atomic
from cmp.seeds import numpy_generator

SHEET_COLUMNS, SHEET_ZOOM, LABEL_HEIGHT, SHEET_GAP = 8, 4, 12, 4

ATTRIBUTION_HEAD = """# Attribution of the data

Made by `python -m cmp.embedded.sheets` from `data_manifests/packages.yaml`. The packages are
fetched when data are built; their content is not part of this repository. The weights in
`cmp/embedded/weights` and `weights` were trained on the sets below whose role is *pool*.

| source | licence | package | used in |
|---|---|---|---|
"""


def contact_sheet(packed: PackedDataset, path: Path, count: int = 64) -> None:
    """Write random images of a dataset with their labels, four times enlarged over white.

    Args:
        packed: The dataset.
        path: A PNG file.
        count: How many images.

    Raises:
        CmpError: If the file cannot be written.
    """
    size = len(packed.table)
    rows = np.sort(numpy_generator("sheet", 0, packed.dataset.name).permutation(size)[:count])
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


def attribution_text(packages: dict[str, Package], datasets: dict[str, Dataset]) -> str:
    """Return the content of ATTRIBUTION.md: one row per package.

    Args:
        packages: Packages by short name.
        datasets: Datasets by name.
    """
    rows = []
    for name, package in packages.items():
        users = ", ".join(d.name for d in datasets.values() if name in d.sources)
        source = f"{package.attribution} ({package.url})"
        version = f"`{package.package}` {package.version}"
        rows.append(f"| {source} | {package.licence} | {version} | {users} |")
    return ATTRIBUTION_HEAD + "\n".join(rows) + "\n"


if __name__ == "__main__":
    path = project_folder() / "ATTRIBUTION.md"
    write_atomic(path, attribution_text(embedded_packages(), load_datasets()))
