"""Decode image files to arrays of a model's size, whole or as random crops."""

import contextlib
import dataclasses
import functools
import io
import math
import struct
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch
from PIL import ExifTags, Image, ImageFile, ImageOps
from PIL.Image import Resampling, Transpose
from torch import Tensor
from torch.nn import functional as F
from torchvision.io import ImageReadMode, decode_jpeg

from cmp.data import IMAGE_SIZE, Preprocessing
from cmp.errors import CmpError, explain_errors
from cmp.readers.files import ReadImage
from cmp.readers.index import ImageIndex
from cmp.readers.manifest import PictureReader
from cmp.scale import decoding
from cmp.seeds import numpy_generator

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
MAX_PIXELS = 100_000_000
"""Most pixels that an image may have."""
CROP_AREA, CROP_RATIO = (0.9, 1.0), (3 / 4, 4 / 3)
"""Ranges of a training crop, as in the reference: its share of the image's area, and its aspect
ratio (width / height)."""
DECODE_ERRORS = (OSError, ValueError, SyntaxError, EOFError, MemoryError, OverflowError,
                 LookupError, TypeError, Image.DecompressionBombError)  # fmt: skip
"""Errors that Pillow raises for damaged files and decompression bombs."""
MAX_RATIO = 16
"""The aspect ratio above which the ends of an image are cut off."""
ALPHA_MODES = ("RGBA", "LA", "PA", "RGBa", "La")
PALETTE_MODES, COLOUR_MODES = ("1", "P", "PA"), ("CMYK", "YCbCr", "LAB")
"""Modes of pixels that cannot be mixed, and of colours whose mixtures differ from those of RGB."""
TURNS = {
    2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE, 6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}  # fmt: skip
"""Orientation in EXIF data -> the transpose that turns an image upright."""
USUAL = PictureReader()
"""How images are read if the manifest does not say."""
END_OF_JPEG = b"\xff\xd9"
"""The marker that ends a whole JPEG. For a file without it, torchvision makes up the rest."""

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # see `MAX_PIXELS`
warnings.filterwarnings("ignore", "Corrupt EXIF data")  # see `orientation`
warnings.filterwarnings("ignore", "Palette images with Transparency")  # see `convert_to_rgb`


def open_image(content: bytes, min_side: int = 0) -> Image.Image:
    """Open an image without decoding it.

    Args:
        content: The file.
        min_side: If positive, a JPEG may be decoded at a half, a quarter or an eighth of its size,
            as long as no side gets shorter than this many pixels.

    Raises:
        DecompressionBombError: It has more than `MAX_PIXELS` pixels.
        CmpError: Pillow is set to accept truncated images.
    """
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise CmpError("PIL.ImageFile.LOAD_TRUNCATED_IMAGES hides damage; set it to False")
    image = Image.open(io.BytesIO(content), formats=FORMATS)
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise Image.DecompressionBombError(
            f"{width} x {height} pixels; at most {MAX_PIXELS:,} are allowed"
        )
    if min_side and image.format == "JPEG" and min(image.size) >= 2 * min_side:
        scale = min_side / min(image.size)
        image.draft("RGB", (math.ceil(width * scale), math.ceil(height * scale)))
    return image


def open_upright(content: bytes, reader: PictureReader, min_side: int = 0) -> Image.Image:
    """Open an image with 8 bits per value, and upright if its dataset's manifest says so.

    Args:
        content: The file.
        reader: Says whether to apply the orientation in EXIF data.
        min_side: See `open_image`.
    """
    image = open_image(content, min_side)
    turn = None
    if reader.exif == "apply":
        image.load()  # Pillow itself turns a TIFF upright here
        turn = TURNS.get(orientation(image))
    image = scale_grey(image)
    return image if turn is None else image.transpose(turn)


def orientation(image: Image.Image) -> int:
    """Return the orientation in an image's EXIF data, or 1 if it is missing or damaged."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except (*DECODE_ERRORS, struct.error):
        return 1


def grey_depth(image: Image.Image) -> int:
    """Return the bits per grey value if Pillow keeps more than 8, and 0 otherwise.

    Values of 32 bits do not count, since files do not record their range.
    """
    if image.mode.startswith("I;16"):
        return getattr(image, "tag_v2", {}).get(258, (16,))[0]  # BitsPerSample of a TIFF
    return 16 if image.mode == "I" and image.format in ("PNG", "PPM") else 0


def scale_grey(image: Image.Image) -> Image.Image:
    """Reduce a grey image of up to 16 bits per value to its upper 8; return others unchanged.

    Pillow does this for 16-bit colours, but would clip grey values at 255, which is white.
    """
    if not (depth := grey_depth(image)):
        return image
    values = np.asarray(image)
    grey = Image.fromarray((values >> (depth - 8)).astype(np.uint8))
    if (hidden := image.info.get("transparency")) is not None:  # the transparent value
        grey.putalpha(Image.fromarray(np.where(values == hidden, 0, 255).astype(np.uint8)))
    return grey


def has_alpha(image: Image.Image) -> bool:
    """Return whether parts of an image may be transparent."""
    return "transparency" in image.info or image.mode in ALPHA_MODES


def convert_to_rgb(image: Image.Image, transparency: str = "white") -> Image.Image:
    """Convert an image with 8 bits per value to RGB.

    Args:
        image: An image of any mode. The colour that an RGB image may declare transparent is kept,
            as in open_clip's own transform.
        transparency: See `manifest.PictureReader`.
    """
    if image.mode == "RGB":
        return image
    if transparency == "white" and has_alpha(image):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def prepare_image(content: bytes, how: Preprocessing, reader: PictureReader = USUAL) -> np.ndarray:
    """Decode an image for evaluation, as open_clip's `image_transform` does.

    There are four differences. 16-bit grey values are scaled to 8 bits, where open_clip clips them
    at 255. Unless `reader` says "as-open-clip", transparent parts become white, and all images are
    converted to RGB before they are resized, where open_clip resizes first, without smoothing if an
    image has a palette or one bit per pixel. Depending on `reader`, EXIF data may turn an image.
    The ends of an image with an aspect ratio above `MAX_RATIO` are cut off before resizing, which
    would otherwise need unlimited memory.

    Args:
        content: The file.
        how: How the image is resized.
        reader: How the image is read.

    Returns:
        uint8 [3, how.size, how.size].
    """
    image, side = open_upright(content, reader), how.size
    if reader.transparency != "as-open-clip":
        image = convert_to_rgb(image)
    size = [side, side]
    if how.resize_mode == "longest":
        size = [max(1, round(side * length / max(image.size))) for length in image.size]
    elif how.resize_mode == "shortest":
        cut = [max(0, length - MAX_RATIO * min(image.size)) // 2 for length in image.size]
        image = ImageOps.crop(image, (*cut, *cut))
        size = [int(side * length / min(image.size)) for length in image.size]
    bilinear = how.interpolation == "bilinear"
    image = image.resize(size, Resampling.BILINEAR if bilinear else Resampling.BICUBIC)
    missing, fill = [max(0, side - n) for n in size], (how.fill_color,) * len(image.getbands())
    border = [missing[0] // 2, missing[1] // 2, (missing[0] + 1) // 2, (missing[1] + 1) // 2]
    image = ImageOps.expand(image, tuple(border), fill)
    left, top = (round((n - side) / 2) for n in image.size)
    square = image.crop((left, top, left + side, top + side)).convert("RGB")
    return np.asarray(square).transpose(2, 0, 1)


def random_crop(
    content: bytes, numbers: np.ndarray, side: int, reader: PictureReader = USUAL
) -> np.ndarray:
    """Decode a random crop of an image, for training.

    Args:
        content: The file.
        numbers: Four numbers in [0, 1) that determine the area, shape and position of the crop.
        side: The side of the result in pixels.
        reader: How the image is read.

    Returns:
        uint8 [3, side, side].
    """
    image = open_upright(content, reader, side if reader.draft == "side" else 2 * side)
    box = crop_box(image.width, image.height, numbers)
    if reader.resize == "torch":
        return _resize_by_torch(_decode_to_tensor(content, image, reader), box, side)
    if reader.transparency != "as-open-clip":
        image = convert_to_rgb(image)
    crop = image.resize((side, side), Resampling.BICUBIC, box=box).convert("RGB")
    return np.asarray(crop).transpose(2, 0, 1)


def crop_box(width: int, height: int, numbers: np.ndarray) -> tuple[float, float, float, float]:
    """Return the box of a training crop: (left, top, right, bottom) in pixels.

    Its area and shape are drawn from the ranges, among those that fit into the image. If none fits,
    it is the largest box in the middle whose shape is in its range, as in torchvision's
    `RandomResizedCrop`.

    Args:
        width: The width of the image.
        height: Its height.
        numbers: As in `random_crop`.
    """
    area, shape, across, down = map(float, numbers)
    aspect = width / height
    largest = min(CROP_AREA[1], CROP_RATIO[1] / aspect, aspect / CROP_RATIO[0])
    if largest < CROP_AREA[0]:
        share, ratio = largest, min(max(aspect, CROP_RATIO[0]), CROP_RATIO[1])
        across = down = 0.5
    else:
        share = CROP_AREA[0] + area * (largest - CROP_AREA[0])
        narrowest, widest = max(CROP_RATIO[0], share * aspect), min(CROP_RATIO[1], aspect / share)
        ratio = narrowest * (widest / narrowest) ** shape
    pixels = share * width * height
    box_width = min(width, math.sqrt(pixels * ratio))
    box_height = min(height, math.sqrt(pixels / ratio))
    left, top = across * (width - box_width), down * (height - box_height)
    return left, top, left + box_width, top + box_height


def _decode_to_tensor(content: bytes, image: Image.Image, reader: PictureReader) -> Tensor:
    """Return the pixels of an opened image in RGB, uint8 [3, H, W].

    torchvision decodes a colour JPEG, unless Pillow must reduce it (`decoderconfig`), rotate it, or
    report a missing end. The pixels are the same, and need not be copied.
    """
    is_plain = image.format == "JPEG" and image.mode == "RGB" and reader.exif == "ignore"
    is_plain = is_plain and not cast(ImageFile.ImageFile, image).decoderconfig
    if is_plain and content.endswith(END_OF_JPEG) and torchvision_equals_pillow():
        with contextlib.suppress(RuntimeError):  # damaged: Pillow decides
            return _decode_by_torchvision(content)
    rgb = convert_to_rgb(image, reader.transparency)
    return torch.from_numpy(np.array(rgb)).permute(2, 0, 1)


def _decode_by_torchvision(content: bytes) -> Tensor:
    encoded = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    return decode_jpeg(encoded, mode=ImageReadMode.RGB)


@functools.cache
def torchvision_equals_pillow() -> bool:
    """Return whether torchvision decodes a small JPEG to the same bits as Pillow. It does not if
    they were built with different JPEG libraries, or torchvision without one."""
    noise = numpy_generator("JPEG decoders", 0).integers(0, 256, (7, 9, 3), np.uint8)
    Image.fromarray(noise).resize((90, 70)).save(file := io.BytesIO(), "JPEG")
    try:
        pixels = _decode_by_torchvision(file.getvalue())
    except RuntimeError:
        return False
    return bool((pixels.permute(1, 2, 0).numpy() == np.asarray(Image.open(file))).all())


def _resize_by_torch(pixels: Tensor, box: tuple[float, ...], side: int) -> np.ndarray:
    """Return the part of an image in a box, which is rounded to whole pixels.

    Args:
        pixels: uint8 [3, H, W].
        box: Left, top, right and bottom.
        side: The side of the result.

    Returns:
        uint8 [3, side, side].
    """
    left, top, right, bottom = map(round, box)
    part = pixels[None, :, top : max(bottom, top + 1), left : max(right, left + 1)]
    resized = F.interpolate(part, size=(side, side), mode="bicubic", antialias=True)
    return resized[0].contiguous().numpy()


@dataclasses.dataclass(frozen=True)
class ImageFiles:
    """The images of several datasets in the order of a corpus, decoded on demand; a
    `data.ImageFiles`.

    Attributes:
        readers: For each dataset, the function that returns its files.
        set_ids: int [N], the index of each image's dataset.
        positions: int [N], the position of each image in its dataset.
        sources: object [N], each image's name.
        seen: How the images of each dataset are read.
        preprocessing: How `files[rows]` prepares images.
    """

    readers: list[ReadImage]
    set_ids: np.ndarray
    positions: np.ndarray
    sources: np.ndarray
    seen: list[PictureReader]
    preprocessing: Preprocessing = dataclasses.field(default_factory=Preprocessing)

    def __getitem__(self, rows: np.ndarray | Tensor) -> Tensor:
        """Return images prepared for evaluation: uint8 [B, 3, size, size]."""
        return self.decode(rows.tolist(), functools.partial(prepare_image, how=self.preprocessing))

    def at(self, preprocessing: Preprocessing) -> "ImageFiles":
        """Return the same images with different preprocessing.

        Args:
            preprocessing: How indexing prepares images.
        """
        return dataclasses.replace(self, preprocessing=preprocessing)

    def ahead(
        self, make: Callable[[Any], Any], keys: Sequence, device: torch.device
    ) -> Iterator[Any]:
        """Return an iterator over items that decoding processes prepare ahead.

        Args:
            make: Returns the item for a key, from these images.
            keys: The keys in order.
            device: The device that will use the items.
        """
        return decoding.prefetch(make, keys, decoding.worker_count(device), device)

    def read(self, row: int) -> bytes:
        """Return the file of one image.

        Args:
            row: The image's row in the corpus.
        """
        return self.readers[self.set_ids[row]](int(self.positions[row]))

    def random_crops(self, rows: np.ndarray, side: int, numbers: np.ndarray) -> Tensor:
        """Return a random crop of each image.

        Args:
            rows: int [B], the corpus rows of the images.
            side: Side in pixels.
            numbers: What each crop is drawn from, see `random_crop`, [B, 4].

        Returns:
            uint8 [B, 3, side, side].
        """
        crop = functools.partial(random_crop, side=side)
        return self.decode(rows.tolist(), crop, numbers)

    def decode(self, rows: Iterable[int], make: Callable[..., np.ndarray], *numbers) -> Tensor:
        """Apply `make` to each file, and return the stacked results.

        Files are read in their order on disk, not in the order of the rows, so that a row group of
        a table is read once and not once per image.

        Args:
            rows: The rows in the corpus.
            make: Called with a file's content, its row of each of `numbers`, and its dataset's
                `reader`.
            *numbers: Arrays with one row per image.

        Raises:
            CmpError: A file cannot be decoded.
        """
        rows, images = list(rows), {}
        for place in np.lexsort((self.positions[rows], self.set_ids[rows])):
            source, reader = self.sources[rows[place]], self.seen[self.set_ids[rows[place]]]
            changed = ", although its dataset was checked; it may have changed since"
            with explain_errors(f"{source}: cannot be read", changed, *DECODE_ERRORS):
                content = self.read(rows[place])
                images[place] = make(content, *(x[place] for x in numbers), reader=reader)
        return torch.from_numpy(np.stack([images[place] for place in range(len(rows))]))


def image_files(indexes: list[ImageIndex]) -> ImageFiles:
    """Join the images of several datasets.

    Args:
        indexes: The datasets.
    """
    tables = [index.table for index in indexes]
    return ImageFiles(
        [index.read for index in indexes],
        np.repeat(np.arange(len(tables)), [len(table) for table in tables]),
        np.concatenate([table["position"].to_numpy() for table in tables]),
        np.concatenate([table["source"].to_numpy(object) for table in tables]),
        [index.dataset.reader for index in indexes],
    )


def decode_rgba(content: bytes, reader: PictureReader = USUAL) -> np.ndarray:
    """Decode an image and fit it into the embedded benchmark's square, centred.

    Premultiplied colours are filtered, so that transparent pixels do not bleed.

    Args:
        content: A PNG, JPEG or WebP file.
        reader: How the image is read. Parts that stay transparent are later put over white.

    Returns:
        uint8 [4, 32, 32], RGBA.
    """
    image = open_upright(content, reader)
    if reader.transparency == "as-open-clip":
        image = image.convert("RGB")
    image = image.convert("RGBA").convert("RGBa")
    scale = IMAGE_SIZE / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    square = Image.new("RGBa", (IMAGE_SIZE, IMAGE_SIZE))
    picture = image.resize((width, height), Image.Resampling.LANCZOS)
    square.paste(picture, ((IMAGE_SIZE - width) // 2, (IMAGE_SIZE - height) // 2))
    return np.asarray(square.convert("RGBA")).transpose(2, 0, 1)
