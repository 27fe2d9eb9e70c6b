"""Small images as data URIs, for pages without a network."""

import base64
import collections
import io
from collections.abc import Iterable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cmp.data import Corpus, Preprocessing, to_rgb

SIDE = 112
"""Pixels per side of images from files; embedded ones keep their size."""
JPEG_QUALITY = 74
WHITE = 255


def picture_uris(corpus: Corpus, rows: Iterable[int], budget: int) -> dict[int, str]:
    """Return images as data URIs, as many as fit into a number of characters.

    Args:
        corpus: The data.
        rows: Positions of the images, the most important first. A position that occurs several
            times counts as often.
        budget: The most characters in all.

    Returns:
        The URIs by position. Transparent parts are white; images are not cropped, and the rest of
        the square is white.
    """
    counts, uris, used = collections.Counter(rows), {}, 0
    wanted = list(counts)
    how = Preprocessing(size=SIDE, resize_mode="longest", fill_color=WHITE)
    for start in range(0, len(wanted), 64):
        block = wanted[start : start + 64]
        for row, pixels in zip(block, _read(corpus, np.array(block, int), how), strict=True):
            uri = _as_uri(pixels)
            used += len(uri) * counts[row]
            if used > budget:
                return uris
            uris[row] = uri
    return uris


def _read(corpus: Corpus, rows: np.ndarray, how: Preprocessing) -> Tensor:
    """Return images as uint8 RGB, [B, 3, H, W], from files or from memory."""
    if not isinstance(corpus.images, Tensor):
        return corpus.images.at(how)[rows]
    images = to_rgb(corpus.images[torch.from_numpy(rows)])
    return (255 * images).round().to(torch.uint8).cpu()


def _as_uri(pixels: Tensor) -> str:
    """Return an image, uint8 [3, H, W], as a data URI: a JPEG, or a PNG if it is small."""
    file, image = io.BytesIO(), Image.fromarray(pixels.permute(1, 2, 0).numpy())
    if image.width < SIDE:
        kind = "png"
        image.save(file, "PNG", optimize=True)
    else:
        kind = "jpeg"
        image.save(file, "JPEG", quality=JPEG_QUALITY, optimize=True)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
