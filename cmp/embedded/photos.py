"""Reading Qt's binary resources (`.rcc`): a tree of nodes, a heap of names, a heap of data.

All numbers are big-endian. Every offset and every length is checked against the file, a node is
entered once, and sizes are capped, so that a damaged file is a `CmpError` and never a hang.
"""

import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from cmp.embedded import packed
from cmp.embedded.manifest import PhotoRecipe
from cmp.embedded.packages import ARCHIVE_CAP, MEMBER_CAP, archive_members
from cmp.embedded.packed import Samples, samples_from_rows
from cmp.errors import CmpError
from cmp.readers.images import decode_rgba
from cmp.seeds import unit_interval

_ZLIB_FLAG, _FOLDER_FLAG, _ZSTD_FLAG = 1, 2, 4
MAX_PATH = 4096


def resource_files(content: bytes, where: str) -> Iterator[tuple[str, bytes]]:
    """Yield (path, content) of every file of an .rcc; those packed by zstd are left out.

    `where` names the file in errors.
    """
    try:
        yield from _walk(content)
    except (ValueError, struct.error, UnicodeDecodeError, zlib.error) as error:
        raise CmpError(f"{where}: damaged Qt resource file ({error})") from error


def _walk(content: bytes) -> Iterator[tuple[str, bytes]]:
    magic, version, tree, data, names = struct.unpack_from(">4s4I", content)
    if magic != b"qres" or version not in (1, 2, 3):
        raise ValueError("not a resource file of version 1 to 3")
    node_size = 14 if version == 1 else 22
    entered, total = set(), 0
    waiting = [(0, None)]
    while waiting:
        index, parent = waiting.pop()
        if index in entered:
            raise ValueError(f"node {index} is reached twice")
        entered.add(index)
        name, flags, first, second = struct.unpack_from(">IHII", content, tree + index * node_size)
        # The root has no name.
        path = "" if parent is None else f"{parent}/{_name(content, names + name)}".lstrip("/")
        if len(path) > MAX_PATH:
            raise ValueError("a path is too long")
        if flags & _FOLDER_FLAG:
            if (len(entered) + len(waiting) + first) * node_size > len(content):
                raise ValueError(f"{path}: more entries than the file can hold")
            waiting.extend((second + place, path) for place in reversed(range(first)))
        elif not flags & _ZSTD_FLAG:
            found = _data(content, data + second, flags)
            total += len(found)
            if total > ARCHIVE_CAP:
                raise ValueError(f"{path}: unpacks to more than the cap")
            yield path, found


def _name(content: bytes, offset: int) -> str:
    """A name of the heap: its length in characters, a hash, UTF-16."""
    (length,) = struct.unpack_from(">H", content, offset)
    return _slice(content, offset + 6, 2 * length).decode("utf-16-be")


def _data(content: bytes, offset: int, flags: int) -> bytes:
    """An entry of the heap: its length, then the bytes, or for zlib their size and a stream."""
    (length,) = struct.unpack_from(">I", content, offset)
    packed = _slice(content, offset + 4, length)
    if not flags & _ZLIB_FLAG:
        return packed
    (size,) = struct.unpack_from(">I", packed)
    if size > MEMBER_CAP:
        raise ValueError("an entry unpacks to more than the cap")
    found = zlib.decompressobj().decompress(packed[4:], size + 1)
    if len(found) != size:
        raise ValueError(f"an entry has another size than {size}")
    return found


def _slice(content: bytes, offset: int, length: int) -> bytes:
    if offset + length > len(content):
        raise ValueError("it ends too early")
    return content[offset : offset + length]


STAMPS = "./usr/share/tuxpaint/stamps/"
SKIPPED_STAMPS = ("symbols/alphabets/", "symbols/money/")
"""Letters lose their case in a caption, and coins differ by print that 32 pixels do not hold."""

MAX_CAPTION = 5
"""Words of a caption; longer ones tell a story or give advice instead of naming the thing."""

RESOURCES = "./usr/share/gcompris-qt/rcc/"
ACTIVITIES = "gcompris/src/activities/"
FOLDERS = {
    "babymatch/resource/images", "babyshapes/resource/food",
    "categorization/resource/images/others", "categorization/resource/images/renewable",
    "categorization/resource/images/tools", "colors/resource", "drawnumbers/resource",
    "enumerate/resource", "erase/resource", "explore_farm_animals/resource/animals",
    "explore_world_animals/resource/animals", "family/resource", "instruments/resource",
    "lang/resource/words_sample", "memory/resource", "solar_system/resource",
}  # fmt: skip
"""The folders whose file names are names; elsewhere they are numbers, maps, parts of a game."""

RENAMED = {
    "buffetset": "tea set", "eggpot": "egg cup", "fishingboat": "fishing boat",
    "flute traversiere": "flute", "fusee": "rocket", "long nosed monkey": "proboscis monkey",
    "postpoint": "mail box", "rape": "grater", "raquette": "racket", "round cookie": "doughnut",
    "sailingboat": "sailing boat", "tuxhelico": "helicopter", "tuxplane": "plane",
    "windflag": "red flag",
}  # fmt: skip
"""File names that are run together or French."""

LEFT_OUT = {
    # Scenery and parts of a game.
    "background", "backcard", "blackpoint", "blackslate", "bluepoint", "bluepoint highlight",
    "check error", "emptycard", "farm animals", "greenpoint", "paper", "question",
    "transparent square", "transparent square green", "transparent square yellow",
    # Words that an arrow in the picture points out, or that fit many pictures.
    "animal", "arm", "back", "boy", "brother", "bug", "child", "color", "dad", "flies", "friend",
    "grandmother", "leg", "light", "mother", "neck", "reptile", "sister", "skin", "son",
    # Another thing than one would expect.
    "bluebaby", "bluebirds", "chamaeleon", "dragon", "geothermal", "glass", "greenbaby",
    "orange color", "redbird", "rings", "solar", "sound", "tux",
}  # fmt: skip


def caption(line: str) -> str:
    """The name in the first line of a stamp's text: "A wombat." -> "wombat"."""
    text = re.sub(r"[“”\"]", "", line.lower().replace("’", "'"))
    text = re.split(r"[.!?]+(?=\s|$)|[—(;:]", text, maxsplit=1)[0]
    return re.sub(r"^(a|an|the) ", "", " ".join(text.split()))


def file_name(path: str) -> str:
    """The words of a file name: "07_polarBear2.webp" -> "polar bear"."""
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", Path(path).stem)
    name = " ".join(re.sub(r"[\d_-]+", " ", words).lower().split())
    return RENAMED.get(name, name)


def _split(recipe: PhotoRecipe, identity: str) -> str | None:
    """The split whose interval holds the hash of what a picture shows, or None."""
    place = unit_interval("photo", identity)
    for split, (low, high) in recipe.splits.items():
        if low <= place < high:
            return split
    return None


def _stamps(archive: Path) -> Iterator[tuple[str, str, bytes]]:
    """(path without suffix, caption, PNG) of the stamps that have a caption, in order of path."""
    files = {
        name.removeprefix(STAMPS): content
        for name, content in archive_members(archive, STAMPS)
        if name.endswith((".png", ".txt"))
    }
    for path in sorted(files):
        stem, _, suffix = path.rpartition(".")
        if suffix == "png" and f"{stem}.txt" in files and not path.startswith(SKIPPED_STAMPS):
            text = files[f"{stem}.txt"].decode("utf-8", "replace")
            yield stem, caption(text.partition("\n")[0]), files[path]


def make_tuxpaint(recipe: PhotoRecipe, archives: dict[str, Path]) -> Samples:
    """The stamps of Tux Paint, `X.png` beside `X.txt`; a caption is used once."""
    images, rows, seen = [], [], set()
    for stem, name, png in _stamps(archives["tuxpaint"]):
        if name in seen or not 1 <= len(name.split()) <= MAX_CAPTION:
            continue
        image = decode_rgba(png)
        if not packed.is_visible(image):
            continue
        seen.add(name)
        source = f"tuxpaint/{stem}"
        if split := _split(recipe, source):
            images.append(image)
            rows.append((split, name, source, source, [name]))
    return _samples(archives["tuxpaint"], images, rows)


def _pictures(archive: Path) -> dict[str, bytes]:
    """path -> SVG or WebP for the chosen folders, in order of path."""
    found = {}
    for resource, content in archive_members(archive, RESOURCES):
        for path, picture in resource_files(content, f"{archive}: {resource}"):
            path = path.removeprefix(ACTIVITIES)
            if path.rpartition("/")[0] in FOLDERS and path.endswith((".svg", ".webp")):
                found[path] = picture
    return dict(sorted(found.items()))


def make_gcompris(recipe: PhotoRecipe, archives: dict[str, Path]) -> Samples:
    """The pictures of GCompris whose file names say what they show; a name may have several."""
    images, rows = [], []
    for path, picture in _pictures(archives["gcompris"]).items():
        name = file_name(path)
        group = f"gcompris {name}"
        split = _split(recipe, group)
        if name in LEFT_OUT or not name or not split:
            continue
        svg = path.endswith(".svg")
        image = packed.render_svg(picture.decode()) if svg else decode_rgba(picture)
        if packed.is_visible(image):
            images.append(image)
            rows.append((split, name, group, f"gcompris/{path}", [name]))
    return _samples(archives["gcompris"], images, rows)


def _samples(archive: Path, images: list[np.ndarray], rows: list[tuple]) -> Samples:
    if not rows:
        raise CmpError(f"{archive}: no pictures with a name were found in it")
    return samples_from_rows(images, rows)
