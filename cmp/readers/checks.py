"""Which images of a dataset can be used, with the hashes and traits that decoding them gives."""

import contextlib
import dataclasses
import functools
import hashlib
import math
import threading
from typing import NamedTuple, get_args

import numpy as np
import pandas as pd
from PIL import Image, UnidentifiedImageError
from PIL.Image import Resampling
from tqdm import tqdm
from tqdm.contrib.concurrent import thread_map

from cmp.errors import CmpError, explain_limit
from cmp.files import keep_value
from cmp.project import build_folder
from cmp.readers import images
from cmp.readers.files import FILE_ERRORS, ReadImage
from cmp.readers.index import TRAITS, Fault, ImageIndex
from cmp.readers.manifest import Split
from cmp.scale import decoding

LARGE = 10_000_000
"""Most pixels for checking images in parallel, as larger ones fill memory."""
_large_images = threading.Lock()
CHECK_BLOCK = 64
"""Images that are checked per block."""
UNKNOWN_FORMAT = f"not an image of a known format ({', '.join(images.FORMATS)})"
REPEATED = "image also in another split"
"""The fault of an image that can be used, but is listed in two splits."""
HASHES = ("digest", "pixels", "look")
"""The hashes of a checked image."""


def usable_images(index: ImageIndex, decode_again: bool = False) -> tuple[ImageIndex, list[Fault]]:
    """Leave out images of a dataset that cannot be decoded or are listed in two splits.

    Every image is decoded once. The result is cached in the build folder until a file changes. An
    image listed in two splits stays only in training, except in FoMo-in-Flux, whose splits are left
    as published.

    Args:
        index: The dataset.
        decode_again: Whether to decode even if there is a cached result.

    Returns:
        The dataset, with its `content` and the columns `digest`, `pixels`, `look` and `traits`
        filled in, and a fault for each image that is left out.
    """
    table, content = examine_images(index, decode_again)
    left_out = table[table["fault"] != ""]
    faults = [Fault(*each) for each in zip(left_out["fault"], left_out["source"], strict=True)]
    table = table.drop(index=left_out.index, columns="fault").reset_index(drop=True)
    return dataclasses.replace(index, table=table, content=content), faults


def examine_images(index: ImageIndex, decode_again: bool = False) -> tuple[pd.DataFrame, str]:
    """Decode every image of a dataset, see `usable_images`.

    Returns:
        The dataset's table, with all images, whose column `fault` is "" for those that are usable;
        and a hash of the content of these.
    """
    name = f"images-{index.data_hash('changed')}-{len(TRAITS)}.json"  # counts all known traits
    path = build_folder() / "checked" / name
    if decode_again:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
    content, faulty, hashes, noted = keep_value(path, functools.partial(_examine, index))
    table = index.table.assign(**hashes, traits=0, fault="")
    table.loc[[row for row, _ in noted], "traits"] = [traits for _, traits in noted]
    table.loc[[row for row, _ in faulty], "fault"] = [kind for _, kind in faulty]
    return table, content


def _examine(
    index: ImageIndex,
) -> tuple[str, list[tuple[int, str]], dict[str, list[int]], list[tuple[int, int]]]:
    """Return the sha256 of all usable images; the row and fault of the others; 60 bits of each hash
    of an image, which distinguish millions of images; and the row and traits of images with any."""
    positions = index.table["position"].tolist()

    def check_block(start: int) -> list[CheckedImage]:
        block = positions[start : start + CHECK_BLOCK]
        return [_check_image(index.read, position) for position in block]

    blocks = thread_map(  # Pillow releases the GIL
        check_block, range(0, len(positions), CHECK_BLOCK), tqdm_class=tqdm, delay=1, leave=False,
        max_workers=math.ceil(decoding.usable_cores()), desc=f"check {index.dataset.name}",
    )  # fmt: skip
    results = [result for block in blocks for result in block]
    checked = pd.DataFrame(results, columns=CheckedImage._fields)
    split = index.table["split"].map(list(get_args(Split)).index)
    if index.dataset.reader.kind != "fomo":
        repeated = split > split.groupby(checked["digest"]).transform("min")
        repeated &= index.table["given"] & (checked["fault"] == "")
        checked.loc[repeated, "fault"] = REPEATED
    bad = checked["fault"][checked["fault"] != ""]
    content = hashlib.sha256("".join(checked["digest"].drop(bad.index)).encode())
    hashes = {name: [int(x[:15] or "0", 16) for x in checked[name]] for name in HASHES}
    noted = [(row, traits) for row, traits in enumerate(checked["traits"].tolist()) if traits]
    faulty = list(zip(bad.index.tolist(), bad, strict=True))
    return content.hexdigest(), faulty, hashes, noted


class CheckedImage(NamedTuple):
    """The result of decoding an image.

    Attributes:
        digest: The sha256 of the file.
        pixels: A hash of the pixels, see `hash_pixels`.
        look: A hash shared by similar images, see `hash_look`.
        fault: What is wrong with the image, or "".
        traits: The traits, see `picture_traits`.
    """

    digest: str = ""
    pixels: str = ""
    look: str = ""
    fault: str = ""
    traits: int = 0


def _check_image(read: ReadImage, position: int) -> CheckedImage:
    """Decode an image and return its hashes, fault and traits.

    Raises:
        CmpError: The disk or the network failed, so nothing is known about the file.
    """
    digest = ""
    try:
        content = read(position)
        digest = hashlib.sha256(content).hexdigest()
        image = images.open_image(content)
        with _large_images if image.width * image.height > LARGE else contextlib.nullcontext():
            traits = picture_traits(image)
            rgb = images.convert_to_rgb(images.scale_grey(image))
            return CheckedImage(digest, hash_pixels(rgb), hash_look(rgb), "", traits)
    except images.DECODE_ERRORS as error:
        limit = explain_limit(error)
        if limit or (isinstance(error, OSError) and error.errno not in (None, *FILE_ERRORS)):
            raise CmpError(f"an image cannot be read ({limit or error}); try again") from error
        kind = "corrupt image"
        if isinstance(error, Image.DecompressionBombError):
            kind = f"image of more than {images.MAX_PIXELS:,} pixels"
        elif isinstance(error, UnidentifiedImageError):  # a web page, or AVIF called .jpg
            kind = UNKNOWN_FORMAT
        return CheckedImage(digest, fault=kind)


def hash_pixels(rgb: Image.Image) -> str:
    """Return a hash of an image's pixels, which is the same for other files with these pixels."""
    return hashlib.blake2b(rgb.tobytes(), salt=repr(rgb.size).encode()[:16]).hexdigest()


def hash_look(rgb: Image.Image) -> str:
    """Return a hash shared by images that look the same at any size: for 60 positions of a small
    grey copy, whether each is darker than its right neighbour."""
    small = np.asarray(rgb.convert("L").resize((9, 8), Resampling.BOX), int)
    bits = (small[:, :-1] < small[:, 1:]).ravel()[:60]
    return f"{int(''.join('01'[bit] for bit in bits.tolist()), 2):015x}"


def picture_traits(image: Image.Image) -> int:
    """Decode an image, and return which of `index.TRAITS` it has, one bit each.

    Args:
        image: An opened image.
    """
    wide = any(";16" in str(tile.args) for tile in image.tile)  # lost after decoding
    has = dict.fromkeys(TRAITS, False)
    has["palette"] = image.mode in images.PALETTE_MODES
    has["colours"] = image.mode in images.COLOUR_MODES
    image.load()
    has["grey16"] = images.grey_depth(image) > 0
    has["colour16"] = wide and image.mode not in ("I", "F") and not has["grey16"]
    has["values32"] = image.mode in ("I", "F") and not has["grey16"]
    has["rotated"] = images.orientation(image) in images.TURNS
    if image.mode != "RGB" and images.has_alpha(image):
        alpha = images.scale_grey(image).convert("RGBA").getchannel("A")
        has["transparent"] = alpha.getextrema()[0] < 255
    return sum(bit << i for i, bit in enumerate(has.values()))
