"""Image files as arrays: whole, or a random part of them, at the side that a model takes."""

import concurrent.futures
import dataclasses
import io
import json
import math
import os
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageFile, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from cmp.data import IMAGE_SIZE, WHOLE_BATCH
from cmp.errors import CmpError
from cmp.files import build_folder, parse_json, write_atomic
from cmp.readers.index import Fault, ImageIndex, ImageStore

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
MAX_PIXELS = 100_000_000
CROP_AREA, CROP_RATIO = (0.9, 1.0), (3 / 4, 4 / 3)
"""Of the part that training sees: its share of the image, and its width over its height, as in the
reference (spec 1.3)."""
DECODE_ERRORS = (OSError, ValueError, SyntaxError, UnidentifiedImageError, EOFError, MemoryError,
           OverflowError, IndexError, TypeError, KeyError)  # fmt: skip
"""What Pillow raises at a file that is not as it should be."""

assert not ImageFile.LOAD_TRUNCATED_IMAGES


def open_image(content: bytes, least: int = 0) -> Image.Image:
    """An image, not decoded yet. least: a JPEG may be decoded at a half, a quarter or an eighth of
    its size, as long as its sides are no shorter than this. `ValueError` if it is too large."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels; at most {MAX_PIXELS} are taken")
    if least and image.format == "JPEG" and min(image.size) >= 2 * least:
        scale = least / min(image.size)
        image.draft("RGB", (math.ceil(width * scale), math.ceil(height * scale)))
    return image


def decode_error(content: bytes) -> str | None:
    """Why an image cannot be used, if it cannot: every pixel is decoded."""
    try:
        open_image(content).load()
    except DECODE_ERRORS as error:
        return f"{error or type(error).__name__}"
    return None


def convert_to_rgb(image: Image.Image) -> Image.Image:
    """In three channels, what is transparent over white."""
    if image.mode == "RGB":
        return image
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def centre_crop(content: bytes, side: int) -> np.ndarray:
    """For evaluation: the shorter side becomes `side`, and the middle is kept: uint8 [3, S, S]."""
    image = open_image(content, 2 * side)
    width, height = image.size
    part = min(width, height)
    left, top = (width - part) / 2, (height - part) / 2
    return _resize_box(image, (left, top, left + part, top + part), side)


def random_crop(content: bytes, side: int, numbers: np.ndarray) -> np.ndarray:
    """For training: a random part of the image: uint8 [3, S, S]. numbers: four in [0, 1), which
    decide its area, its shape, and where it lies."""
    image = open_image(content, 2 * side)
    area, shape, across, down = map(float, numbers)
    ratio = math.exp(math.log(CROP_RATIO[0]) + shape * math.log(CROP_RATIO[1] / CROP_RATIO[0]))
    pixels = (CROP_AREA[0] + area * (CROP_AREA[1] - CROP_AREA[0])) * image.width * image.height
    width = min(image.width, math.sqrt(pixels * ratio))
    height = min(image.height, math.sqrt(pixels / ratio))
    left, top = across * (image.width - width), down * (image.height - height)
    return _resize_box(image, (left, top, left + width, top + height), side)


def _resize_box(
    image: Image.Image, box: tuple[float, float, float, float], side: int
) -> np.ndarray:
    small = convert_to_rgb(image).resize((side, side), Image.Resampling.BICUBIC, box=box)
    return np.asarray(small).transpose(2, 0, 1)


CHECK_BLOCK = 64
"""Images that are checked at a time."""


@dataclass(frozen=True)
class ImageFiles:
    """The images of some sets, in the order of a corpus. store: [N], which of `stores` an image is
    in, and place: [N], its number there; source: [N], its name. side: of `files[rows]`, which is
    what a tensor of all images would give."""

    stores: list[ImageStore]
    store: np.ndarray
    place: np.ndarray
    source: np.ndarray
    side: int = 224

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, rows: np.ndarray | Tensor) -> Tensor:
        return self.centred(np.asarray(rows), self.side)

    def at(self, side: int) -> "ImageFiles":
        """The same images, of another side."""
        return dataclasses.replace(self, side=side)

    def read(self, row: int) -> bytes:
        """The file of one image."""
        return self.stores[self.store[row]].read(int(self.place[row]))

    def centred(self, rows: np.ndarray, side: int) -> Tensor:
        """The middle of each image: uint8 [B, 3, side, side]."""
        return self._stacked(rows, side, lambda content, _: centre_crop(content, side))

    def random_crops(
        self, rows: np.ndarray, side: int, generator: np.random.Generator, own: slice = WHOLE_BATCH
    ) -> Tensor:
        """A random part of each image: uint8 [B, 3, side, side], a function of the rows and of the
        generator's state. own: decode these of the batch only; they look as they do in it."""
        numbers = generator.random((len(rows), 4))[own]
        return self._stacked(
            rows[own], side, lambda content, at: random_crop(content, side, numbers[at])
        )

    def _stacked(self, rows: np.ndarray, side: int, decode) -> Tensor:
        out = np.empty((len(rows), 3, side, side), np.uint8)
        for at, row in enumerate(rows):
            try:
                out[at] = decode(self.read(int(row)), at)
            except DECODE_ERRORS as error:
                raise CmpError(
                    f"{self.source[row]}: cannot be read ({error}), though its set was checked; "
                    "has it changed since?"
                ) from error
        return torch.from_numpy(out)


def image_files(indexes: list[ImageIndex]) -> ImageFiles:
    """The images of some sets, one after the other."""
    lengths = [len(each.table) for each in indexes]
    tables = [each.table for each in indexes]
    return ImageFiles(
        [each.store for each in indexes],
        np.repeat(np.arange(len(indexes)), lengths),
        np.concatenate([table["place"].to_numpy() for table in tables]),
        np.concatenate([table["source"].to_numpy(object) for table in tables]),
    )


def damaged_images(index: ImageIndex) -> list[Fault]:
    """The images of a set that cannot be decoded. Every file is decoded once; what was found is
    kept in the build folder, by the hash of the index, and looked up the next time."""
    path = build_folder() / "checked" / f"{index.data_hash()}.json"
    try:
        return [Fault(*pair) for pair in parse_json(path.read_text())]
    except (OSError, ValueError, TypeError):
        pass
    source, place = index.table["source"].tolist(), index.table["place"].tolist()

    def look(start: int) -> list[Fault]:
        found = []
        for at in range(start, min(start + CHECK_BLOCK, len(place))):
            try:
                why = decode_error(index.store.read(place[at]))
            except (OSError, ValueError) as error:
                why = str(error)
            if why:
                found.append(Fault("corrupt image", source[at]))
        return found

    starts = range(0, len(place), CHECK_BLOCK)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow frees the lock
        each = tqdm(pool.map(look, starts), f"check {index.dataset.name}", len(starts), leave=False)
        found = [fault for faults in each for fault in faults]
    write_atomic(path, json.dumps([[fault.kind, fault.where] for fault in found]))
    return found


def fit_square(image: Image.Image) -> np.ndarray:
    """Shrink or grow a picture into the square, centred: uint8 [4, 32, 32].

    Filtering happens on premultiplied colours, so that transparent pixels do not bleed.
    """
    image = image.convert("RGBA").convert("RGBa")
    scale = IMAGE_SIZE / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    canvas = Image.new("RGBa", (IMAGE_SIZE, IMAGE_SIZE))
    small = image.resize((width, height), Image.Resampling.LANCZOS)
    canvas.paste(small, ((IMAGE_SIZE - width) // 2, (IMAGE_SIZE - height) // 2))
    return np.asarray(canvas.convert("RGBA")).transpose(2, 0, 1)


def decode_rgba(content: bytes) -> np.ndarray:
    """Decode a PNG, JPEG or WebP file: uint8 [4, 32, 32]."""
    return fit_square(Image.open(io.BytesIO(content)))
