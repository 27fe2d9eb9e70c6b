"""Generate JPEG files like photographs, and measure how fast a core decodes and crops them."""

import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from cmp.readers import images
from cmp.readers.manifest import PictureReader
from cmp.seeds import numpy_generator

SIDE = 224
"""Pixels per side of a crop."""
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


def photographs(folder: Path, count: int, size: tuple[int, int]) -> None:
    """Write JPEG files of a size with smooth colours and a little noise, like photographs."""
    for number in range(count):
        noise = numpy_generator("bench/photograph", 0, number)
        coarse = Image.fromarray(noise.integers(0, 256, (24, 32, 3), np.uint8))
        image = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), np.int16)
        image = image + noise.integers(-8, 9, image.shape)
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(folder / f"{number}.jpg")


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
