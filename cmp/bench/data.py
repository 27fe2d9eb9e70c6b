"""Measure reading a table of a hundred thousand rows, a tar of ten thousand images, and JPEGs."""

import functools
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, v2

from cmp.bench import timing
from cmp.bench.report import Report
from cmp.data import WHOLE_BATCH, Corpus
from cmp.readers import collection, images, tars
from cmp.readers.manifest import FileSet, PictureReader
from cmp.seeds import numpy_generator

ROWS, MEMBERS, IMAGES, SIDE = 100_000, 10_000, 2_000, 224
SIZE = (298, SIDE)
"""Pixels of a photograph that was resized in advance to `SIDE` on its shorter side."""
SIZES = (SIZE, (500, 375), (640, 480), (800, 600), (1024, 768))
"""Usual sizes of photographs, in pixels."""
WAYS = {
    "": {},
    ", draft: side": {"draft": "side"},
    ", resize: torch": {"resize": "torch"},
    ", draft: side, resize: torch": {"draft": "side", "resize": "torch"},
}
"""Ways of decoding, with the keys of their `PictureReader`."""
COLUMNS = ("what", "time / plain", "ms", "a second", "plain ms")


def photographs(folder: Path, count: int, size: tuple[int, int] = SIZE) -> None:
    """Write JPEG files of a size with smooth colours and a little noise, like photographs."""
    for number in range(count):
        noise = numpy_generator("bench/photograph", 0, number)
        coarse = Image.fromarray(noise.integers(0, 256, (24, 32, 3), np.uint8))
        image = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), np.int16)
        image = image + noise.integers(-8, 9, image.shape)
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(folder / f"{number}.jpg")


def manifest(kind: str, path: str) -> FileSet:
    """Return the manifest of the data for this benchmark."""
    about = {"name": "bench", "title": "A benchmark", "role": "pool", "licence": "none"}
    return FileSet.model_validate(about | {"reader": {"kind": kind, "path": path}})


def table(folder: Path) -> dict[str, Callable[[], object]]:
    """Return a function that reads and checks a CSV file, and one in which pandas only reads it."""
    names = [str(folder / f"{n % IMAGES}.jpg") for n in range(ROWS)]
    frame = pd.DataFrame({"filepath": names, "title": [f"photograph {n}" for n in range(ROWS)]})
    frame.to_csv(folder / "table.csv", index=False)
    return {
        "plain": functools.partial(pd.read_csv, folder / "table.csv", dtype=str),
        "ours": functools.partial(collection.read_index, manifest("csv", "table.csv"), folder),
    }


def stream(folder: Path) -> dict[str, Callable[[], object]]:
    """Return a function that reads every sample of a tar, and one that reads every member with
    `tarfile`."""
    path = folder / "shard.tar"
    with tarfile.open(path, "w") as archive:
        for number in range(MEMBERS):
            archive.add(folder / f"{number % IMAGES}.jpg", f"{number:05}.jpg")

    def plain() -> int:
        with tarfile.open(path) as archive:
            return sum(len(archive.extractfile(info).read()) for info in archive)

    def ours() -> int:
        members = tars.tar_members(path, [])
        return sum(len(tars.member_bytes(member, file)) for member, file in members)

    return {"plain": plain, "ours": ours}


def decode(folder: Path, batch: int) -> dict[str, Callable[[], object]]:
    """Return a function that makes batches of random crops of JPEGs, and one with torchvision's
    equivalent transforms. Both give bytes, which go to the device as they are."""
    paths = [folder / f"{number}.jpg" for number in range(IMAGES)]
    index = collection.read_index(manifest("csv", "files.csv"), _write_list(folder))
    files = images.image_files([index])
    transform = v2.Compose(
        [
            v2.RandomResizedCrop(
                SIDE, images.CROP_AREA, images.CROP_RATIO, InterpolationMode.BICUBIC, antialias=True
            ),
            v2.PILToTensor(),
        ]
    )

    def open_image(path: Path) -> Image.Image:
        with path.open("rb") as file:
            return Image.open(file).convert("RGB")

    def plain() -> None:
        for start in range(0, IMAGES, batch):
            torch.stack([transform(open_image(path)) for path in paths[start : start + batch]])

    def ours() -> None:
        for start in range(0, IMAGES, batch):
            rows = np.arange(start, min(start + batch, IMAGES))
            files.random_crops(rows, SIDE, numpy_generator("bench/part", 0, start), WHOLE_BATCH)

    return {"plain": plain, "ours": ours}


def decoding_rates(count: int = 40) -> dict[str, float]:
    """Measure how many photographs of usual sizes one core decodes and crops per second.

    Args:
        count: Photographs of each size.

    Returns:
        Images per second by size and, if they are not the defaults, by keys of
        `cmp.readers.manifest.PictureReader`.
    """
    rates = {}
    for size in SIZES:
        with tempfile.TemporaryDirectory(prefix="cmp-bench-") as folder:
            photographs(Path(folder), count, size)
            contents = [path.read_bytes() for path in sorted(Path(folder).glob("*.jpg"))]
        for ending, keys in WAYS.items():
            reader = PictureReader.model_validate(keys)
            numbers = numpy_generator("bench/part", 0).random((count, 4))
            started = time.perf_counter()
            for content, row in zip(contents, numbers, strict=True):
                images.random_crop(content, row, SIDE, reader)
            rates[f"{size[0]} x {size[1]}{ending}"] = count / (time.perf_counter() - started)
    return rates


def _write_list(folder: Path) -> Path:
    names = [f"{number}.jpg" for number in range(IMAGES)]
    pd.DataFrame({"filepath": names, "title": names}).to_csv(folder / "files.csv", index=False)
    return folder


def data(names: list[str], corpus: Corpus, rounds: int, batch: int | None) -> Report:
    """Measure each kind of reading against the plain way, on generated files."""
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        photographs(folder, IMAGES)
        mean = sum(path.stat().st_size for path in folder.iterdir()) / IMAGES
        alternatives = {
            (f"{ROWS:,} rows of CSV", ROWS): table(folder),
            (f"{MEMBERS:,} images of a tar", MEMBERS): stream(folder),
            (f"{IMAGES:,} JPEGs at {SIDE} px", IMAGES): decode(folder, batch or 128),
        }
        rows = []
        for (what, count), calls in alternatives.items():
            seconds = timing.interleaved(calls, rounds)
            ours = float(np.median(seconds["ours"]))
            rows.append(
                {
                    "what": what,
                    "time / plain": timing.times_faster(seconds["ours"], seconds["plain"]),
                    "ms": 1e3 * ours,
                    "a second": count / ours,
                    "plain ms": 1e3 * float(np.median(seconds["plain"])),
                }
            )
    notes = [
        "plain: only pandas.read_csv; tarfile; torchvision's RandomResizedCrop and PILToTensor",
        f"JPEGs of {SIZE[0]} x {SIZE[1]} pixels, {mean / 1e3:.0f} KB each",
    ]
    return Report("data", "reading data", COLUMNS, rows, notes)
