"""Image files as arrays: whole, or a random part of them, at the side that a model takes."""

import concurrent.futures
import contextlib
import dataclasses
import functools
import io
import json
import math
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageFile, ImageOps
from PIL.Image import Resampling
from torch import Tensor
from tqdm import tqdm

from cmp.config import Preprocessing
from cmp.data import IMAGE_SIZE
from cmp.errors import CmpError
from cmp.files import build_folder, write_atomic
from cmp.readers.files import parse_json
from cmp.readers.index import Fault, ImageIndex, ReadImage

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
MAX_PIXELS = 100_000_000
CROP_AREA, CROP_RATIO = (0.9, 1.0), (3 / 4, 4 / 3)
"""Ranges of a training crop: its share of the image's area, and its width over its height, as in
the reference (spec 1.3)."""
DECODE_ERRORS = (OSError, ValueError, SyntaxError, EOFError, MemoryError, OverflowError,
                 LookupError, TypeError, Image.DecompressionBombError)  # fmt: skip
"""What Pillow raises at a damaged file, and at one that unpacks to too much."""
MAX_RATIO = 16
"""How many times as long as wide an image may be before its ends are cut off."""
CHECK_BLOCK = 64
"""Images that are checked at a time."""

assert not ImageFile.LOAD_TRUNCATED_IMAGES
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # see `MAX_PIXELS`


def open_image(content: bytes, min_side: int = 0) -> Image.Image:
    """Open an image without decoding it yet.

    Args:
        content: The file.
        min_side: If positive, a JPEG may be decoded at a half, a quarter or an eighth of its size,
            as long as its sides are no shorter than this many pixels.

    Raises:
        ValueError: If it has more than `MAX_PIXELS` pixels.
    """
    image = Image.open(io.BytesIO(content), formats=FORMATS)
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels; at most {MAX_PIXELS} are taken")
    if min_side and image.format == "JPEG" and min(image.size) >= 2 * min_side:
        scale = min_side / min(image.size)
        image.draft("RGB", (math.ceil(width * scale), math.ceil(height * scale)))
    return image


def convert_to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to RGB, transparent parts over white.

    Args:
        image: An image of any mode.
    """
    if image.mode == "RGB":
        return image
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def prepare_image(content: bytes, side: int, how: Preprocessing) -> np.ndarray:
    """Decode an image as a network sees it in evaluation, as open_clip's `image_transform` does.

    What is transparent is white here, and the ends of an image that is more than `MAX_RATIO` times
    as long as wide are cut off before it is resized, since it would take any amount of memory.

    Args:
        content: The file.
        side: Side of the result in pixels.
        how: How it is resized.

    Returns:
        uint8 [3, side, side].
    """
    image, size = convert_to_rgb(open_image(content)), (side, side)
    if how.resize_mode == "longest":
        size = [max(1, round(side * length / max(image.size))) for length in image.size]
    elif how.resize_mode == "shortest":
        cut = [max(0, length - MAX_RATIO * min(image.size)) // 2 for length in image.size]
        image = ImageOps.crop(image, (*cut, *cut))
        size = [int(side * length / min(image.size)) for length in image.size]
    bilinear = how.interpolation == "bilinear"
    resized = image.resize(size, Resampling.BILINEAR if bilinear else Resampling.BICUBIC)
    square = Image.new("RGB", (side, side), (how.fill_color,) * 3)
    square.paste(resized, [(side - n) // 2 if n < side else -round((n - side) / 2) for n in size])
    return np.asarray(square).transpose(2, 0, 1)


def random_crop(content: bytes, side: int, numbers: np.ndarray) -> np.ndarray:
    """Decode a random part of an image, for training.

    Args:
        content: The file.
        side: Side of the result in pixels.
        numbers: Four numbers in [0, 1) that decide the part's area, shape, and where it lies.

    Returns:
        uint8 [3, side, side].
    """
    image = open_image(content, 2 * side)
    area, shape, across, down = map(float, numbers)
    ratio = math.exp(math.log(CROP_RATIO[0]) + shape * math.log(CROP_RATIO[1] / CROP_RATIO[0]))
    pixels = (CROP_AREA[0] + area * (CROP_AREA[1] - CROP_AREA[0])) * image.width * image.height
    width = min(image.width, math.sqrt(pixels * ratio))
    height = min(image.height, math.sqrt(pixels / ratio))
    left, top = across * (image.width - width), down * (image.height - height)
    box = (left, top, left + width, top + height)
    square = convert_to_rgb(image).resize((side, side), Resampling.BICUBIC, box=box)
    return np.asarray(square).transpose(2, 0, 1)


@dataclass(frozen=True)
class ImageFiles:
    """The images of some sets in the order of a corpus, decoded on demand; a `data.ImageFiles`.

    Attributes:
        readers: What returns the files of each set.
        set_ids: int [N], the number of each image's set.
        positions: int [N], the position of each image in its set.
        sources: object [N], each image's name.
        preprocessing: How what `files[rows]` gives is prepared.
    """

    readers: list[ReadImage]
    set_ids: np.ndarray
    positions: np.ndarray
    sources: np.ndarray
    preprocessing: Preprocessing = dataclasses.field(default_factory=Preprocessing)

    def __getitem__(self, rows: np.ndarray | Tensor) -> Tensor:
        """Return images prepared for evaluation: uint8 [B, 3, size, size]."""
        prepare = functools.partial(prepare_image, how=self.preprocessing)
        return self._decode_rows(np.asarray(rows), self.preprocessing.size, prepare)

    def at(self, preprocessing: Preprocessing) -> "ImageFiles":
        """Return the same images prepared in another way.

        Args:
            preprocessing: How what indexing gives is prepared.
        """
        return dataclasses.replace(self, preprocessing=preprocessing)

    def read(self, row: int) -> bytes:
        """Return the file of one image.

        Args:
            row: The image's row in the corpus.
        """
        return self.readers[self.set_ids[row]](int(self.positions[row]))

    def random_crops(
        self, rows: np.ndarray, side: int, generator: np.random.Generator, local: slice
    ) -> Tensor:
        """Return a random part of each image, a function of the rows and the generator's state.

        Args:
            rows: int [B], rows of a batch in the corpus.
            side: Side in pixels.
            generator: Source of all randomness.
            local: Samples of the batch that are decoded; they look as they do in the whole batch.

        Returns:
            uint8 [B, 3, side, side], or fewer with `local`.
        """
        numbers = generator.random((len(rows), 4))[local]
        return self._decode_rows(rows[local], side, random_crop, numbers)

    def _decode_rows(self, rows: np.ndarray, side: int, crop: Callable, *numbers) -> Tensor:
        """Crop each image to uint8 [3, side, side]; `numbers` has an entry per row, if any."""
        images = np.empty((len(rows), 3, side, side), np.uint8)
        for sample, row in enumerate(rows):
            try:
                content = self.read(int(row))
                images[sample] = crop(content, side, *(entries[sample] for entries in numbers))
            except DECODE_ERRORS as error:
                raise CmpError(
                    f"{self.sources[row]}: cannot be read ({error}), though its set was checked; "
                    "has it changed since?"
                ) from error
        return torch.from_numpy(images)


def image_files(indexes: list[ImageIndex]) -> ImageFiles:
    """Put the images of some sets one after the other.

    Args:
        indexes: The sets.
    """
    tables = [index.table for index in indexes]
    return ImageFiles(
        [index.read for index in indexes],
        np.repeat(np.arange(len(tables)), [len(table) for table in tables]),
        np.concatenate([table["position"].to_numpy() for table in tables]),
        np.concatenate([table["source"].to_numpy(object) for table in tables]),
    )


def damaged_images(index: ImageIndex) -> list[Fault]:
    """Decode every image of a set once, and return those that cannot be decoded.

    The result is kept in the build folder under the index's hash, and looked up the next time.

    Args:
        index: The set.

    Returns:
        A fault per damaged image.
    """
    path = build_folder() / "checked" / f"{index.data_hash()}.json"
    with contextlib.suppress(OSError, ValueError, TypeError):
        return [Fault(*pair) for pair in parse_json(path.read_text())]
    images = list(zip(index.table["source"], index.table["position"], strict=True))

    def check_block(start: int) -> list[Fault]:
        faults = []
        for source, position in images[start : start + CHECK_BLOCK]:
            try:
                open_image(index.read(position)).load()
            except DECODE_ERRORS:
                faults.append(Fault("corrupt image", source))
        return faults

    starts = range(0, len(images), CHECK_BLOCK)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow frees the lock
        checked = pool.map(check_block, starts)
        bar = tqdm(checked, f"check {index.dataset.name}", len(starts), leave=False)
        faults = [fault for block in bar for fault in block]
    write_atomic(path, json.dumps(faults))
    return faults


def decode_rgba(content: bytes) -> np.ndarray:
    """Decode an image and fit it into the embedded benchmark's square, centred.

    Filtering happens on premultiplied colours, so that transparent pixels do not bleed.

    Args:
        content: A PNG, JPEG or WebP file.

    Returns:
        uint8 [4, 32, 32], RGBA.
    """
    image = Image.open(io.BytesIO(content)).convert("RGBA").convert("RGBa")
    scale = IMAGE_SIZE / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    square = Image.new("RGBa", (IMAGE_SIZE, IMAGE_SIZE))
    picture = image.resize((width, height), Image.Resampling.LANCZOS)
    square.paste(picture, ((IMAGE_SIZE - width) // 2, (IMAGE_SIZE - height) // 2))
    return np.asarray(square.convert("RGBA")).transpose(2, 0, 1)
