"""Drawings and pictures of any size, as 32-pixel RGBA."""

import io

import numpy as np
import resvg_py
from PIL import Image

from cmp.data.samples import SIZE

RENDER = 4 * SIZE
"""Vector drawings are rendered larger and reduced, which keeps thin strokes visible."""


def fit(image: Image.Image) -> np.ndarray:
    """Shrink or grow a picture into the square, centred: uint8 [4, 32, 32].

    Filtering happens on premultiplied colours, so that transparent pixels do not bleed.
    """
    image = image.convert("RGBA").convert("RGBa")
    scale = SIZE / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    canvas = Image.new("RGBa", (SIZE, SIZE))
    small = image.resize((width, height), Image.Resampling.LANCZOS)
    canvas.paste(small, ((SIZE - width) // 2, (SIZE - height) // 2))
    return np.asarray(canvas.convert("RGBA")).transpose(2, 0, 1)


def render_svg(svg: str) -> np.ndarray:
    """Render an SVG document: uint8 [4, 32, 32]."""
    return fit(Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=RENDER)))))


def decode(content: bytes) -> np.ndarray:
    """Decode a PNG, JPEG or WebP file: uint8 [4, 32, 32]."""
    return fit(Image.open(io.BytesIO(content)))


def from_grey(grey: np.ndarray) -> np.ndarray:
    """Put opaque grey images, uint8 [N, 28, 28], onto black: uint8 [N, 4, 32, 32]."""
    edge = (SIZE - grey.shape[-1]) // 2
    padded = np.pad(grey, ((0, 0), (edge, edge), (edge, edge)))
    return np.stack([padded, padded, padded, np.full_like(padded, 255)], axis=1)


def visible(image: np.ndarray) -> bool:
    """Whether at least 2% of the pixels are drawn: a few sources hold empty icons."""
    return bool((image[3] > 8).mean() >= 0.02)
