"""Cut-out photographs and drawings with a caption each, from Debian's packages of two programs."""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from cmp.data import qt_resources, raster
from cmp.data.fetch import members
from cmp.data.manifest import PhotoRecipe
from cmp.data.samples import Samples, from_rows
from cmp.errors import CmpError
from cmp.seeds import unit

STAMPS = "./usr/share/tuxpaint/stamps/"
SKIPPED_STAMPS = ("symbols/alphabets/", "symbols/money/")
"""Letters lose their case in a caption, and coins differ by print that 32 pixels do not hold."""

LONGEST = 5
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
    place = unit("photo", identity)
    for split, (low, high) in recipe.splits.items():
        if low <= place < high:
            return split
    return None


def _stamps(archive: Path) -> Iterator[tuple[str, str, bytes]]:
    """(path without suffix, caption, PNG) of the stamps that have a caption, in order of path."""
    files = {
        name.removeprefix(STAMPS): content
        for name, content in members(archive, STAMPS)
        if name.endswith((".png", ".txt"))
    }
    for path in sorted(files):
        stem, _, suffix = path.rpartition(".")
        if suffix == "png" and f"{stem}.txt" in files and not path.startswith(SKIPPED_STAMPS):
            text = files[f"{stem}.txt"].decode("utf-8", "replace")
            yield stem, caption(text.partition("\n")[0]), files[path]


def tuxpaint(recipe: PhotoRecipe, archives: dict[str, Path]) -> Samples:
    """The stamps of Tux Paint, `X.png` beside `X.txt`; a caption is used once."""
    images, rows, seen = [], [], set()
    for stem, name, png in _stamps(archives["tuxpaint"]):
        if name in seen or not 1 <= len(name.split()) <= LONGEST:
            continue
        image = raster.decode(png)
        if not raster.visible(image):
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
    for resource, content in members(archive, RESOURCES):
        for path, picture in qt_resources.files(content, f"{archive}: {resource}"):
            path = path.removeprefix(ACTIVITIES)
            if path.rpartition("/")[0] in FOLDERS and path.endswith((".svg", ".webp")):
                found[path] = picture
    return dict(sorted(found.items()))


def gcompris(recipe: PhotoRecipe, archives: dict[str, Path]) -> Samples:
    """The pictures of GCompris whose file names say what they show; a name may have several."""
    images, rows = [], []
    for path, picture in _pictures(archives["gcompris"]).items():
        name = file_name(path)
        group = f"gcompris {name}"
        split = _split(recipe, group)
        if name in LEFT_OUT or not name or not split:
            continue
        svg = path.endswith(".svg")
        image = raster.render_svg(picture.decode()) if svg else raster.decode(picture)
        if raster.visible(image):
            images.append(image)
            rows.append((split, name, group, f"gcompris/{path}", [name]))
    return _samples(archives["gcompris"], images, rows)


def _samples(archive: Path, images: list[np.ndarray], rows: list[tuple]) -> Samples:
    if not rows:
        raise CmpError(f"{archive}: no pictures with a name were found in it")
    return from_rows(images, rows)
