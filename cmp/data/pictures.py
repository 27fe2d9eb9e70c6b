"""Image files as arrays: whole, or a random part of them, at the side that a model takes."""

import io
import math
import warnings

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
MOST_PIXELS = 100_000_000
AREA, RATIO = (0.9, 1.0), (3 / 4, 4 / 3)
"""Of the part that training sees: its share of the image, and its width over its height, as in the
reference (spec 1.3)."""
DAMAGED = (OSError, ValueError, SyntaxError, UnidentifiedImageError, EOFError, MemoryError,
           OverflowError, IndexError, TypeError, KeyError)  # fmt: skip
"""What Pillow raises at a file that is not as it should be."""

assert not ImageFile.LOAD_TRUNCATED_IMAGES


def opened(content: bytes, least: int = 0) -> Image.Image:
    """An image, not decoded yet. least: a JPEG may be decoded at a half, a quarter or an eighth of
    its size, as long as its sides are no shorter than this. `ValueError` if it is too large."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    width, height = image.size
    if width * height > MOST_PIXELS:
        raise ValueError(f"{width} x {height} pixels; at most {MOST_PIXELS} are taken")
    if least and image.format == "JPEG" and min(image.size) >= 2 * least:
        scale = least / min(image.size)
        image.draft("RGB", (math.ceil(width * scale), math.ceil(height * scale)))
    return image


def check(content: bytes) -> str | None:
    """Why an image cannot be used, if it cannot: every pixel is decoded."""
    try:
        opened(content).load()
    except DAMAGED as error:
        return f"{error or type(error).__name__}"
    return None


def rgb(image: Image.Image) -> Image.Image:
    """In three channels, what is transparent over white."""
    if image.mode == "RGB":
        return image
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def centre(content: bytes, side: int) -> np.ndarray:
    """For evaluation: the shorter side becomes `side`, and the middle is kept: uint8 [3, S, S]."""
    image = opened(content, 2 * side)
    width, height = image.size
    part = min(width, height)
    left, top = (width - part) / 2, (height - part) / 2
    return _resized(image, (left, top, left + part, top + part), side)


def part(content: bytes, side: int, numbers: np.ndarray) -> np.ndarray:
    """For training: a random part of the image: uint8 [3, S, S]. numbers: four in [0, 1), which
    decide its area, its shape, and where it lies."""
    image = opened(content, 2 * side)
    area, shape, across, down = map(float, numbers)
    ratio = math.exp(math.log(RATIO[0]) + shape * math.log(RATIO[1] / RATIO[0]))
    pixels = (AREA[0] + area * (AREA[1] - AREA[0])) * image.width * image.height
    width = min(image.width, math.sqrt(pixels * ratio))
    height = min(image.height, math.sqrt(pixels / ratio))
    left, top = across * (image.width - width), down * (image.height - height)
    return _resized(image, (left, top, left + width, top + height), side)


def _resized(image: Image.Image, box: tuple[float, float, float, float], side: int) -> np.ndarray:
    small = rgb(image).resize((side, side), Image.Resampling.BICUBIC, box=box)
    return np.asarray(small).transpose(2, 0, 1)
