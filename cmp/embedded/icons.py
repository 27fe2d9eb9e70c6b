"""Icons of `@iconify-json` packages: SVG bodies by name, names by codepoint."""

import collections
import functools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import resvg_py

from cmp.data import IMAGE_SIZE
from cmp.embedded.manifest import IconRecipe, IconSetRecipe, Interval, Split
from cmp.embedded.packages import archive_members
from cmp.embedded.packed import Samples
from cmp.readers.images import decode_rgba
from cmp.seeds import unit_interval

RENDER_SIZE = 4 * IMAGE_SIZE
"""Vector drawings are rendered larger and reduced, which keeps thin strokes visible."""
FREQUENT, RARE = 7, 3
"""How many icons make a head frequent, and with how few it is left out."""
SUITS = {"clubs", "diamonds", "hearts", "spades"}
"""Playing cards differ by their pips, not by what they show; their heads are no classes."""


@dataclass(frozen=True)
class IconSet:
    """One icon set.

    Attributes:
        icons: Name -> icon, with its SVG under "body" and its place and size.
        aliases: Name -> alias, with what it stands for under "parent".
        characters: Codepoints -> name.
    """

    icons: dict[str, dict]
    aliases: dict[str, dict]
    characters: dict[str, str]

    def resolve(self, name: str) -> str | None:
        """Return the icon that a name or an alias stands for, or None.

        Args:
            name: The name.
        """
        for _ in range(5):  # of an alias of an alias
            name = self.aliases.get(name, {"parent": name})["parent"]
        return name if name in self.icons else None

    def render(self, name: str) -> np.ndarray:
        """Render an icon; drawings without a colour of their own are black.

        Args:
            name: The icon.

        Returns:
            uint8 [4, 32, 32], RGBA.
        """
        icon = self.icons[name]
        left, top, width, height = (icon[key] for key in ("left", "top", "width", "height"))
        body = icon["body"].replace("currentColor", "#000")
        svg = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'width="{width}" height="{height}" viewBox="{left} {top} {width} {height}">'
            f"{body}</svg>"
        )
        return decode_rgba(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=RENDER_SIZE)))


@functools.lru_cache(maxsize=16)
def read_icon_set(archive: Path) -> IconSet:
    """Read an icon set from its package.

    Args:
        archive: The package.
    """
    files = {"package/icons.json": b"{}", "package/chars.json": b"{}"}
    files |= {name: data for name, data in archive_members(archive, "package/") if name in files}
    given = {"width": 16, "height": 16} | json.loads(files["package/icons.json"])
    size = {"left": 0, "top": 0, "width": given["width"], "height": given["height"]}
    icons = {name: size | icon for name, icon in given["icons"].items() if not icon.get("hidden")}
    return IconSet(icons, given.get("aliases", {}), json.loads(files["package/chars.json"]))


def is_visible(image: np.ndarray) -> bool:
    """Return whether at least 2% of the pixels are drawn: a few sources hold empty icons.

    Args:
        image: uint8 [4, 32, 32], RGBA.
    """
    return bool((image[3] > 8).mean() >= 0.02)


def head_side(head: str, count: int) -> str:
    """Return which of `IconRecipe.heads` a head belongs to.

    Args:
        head: The last word of icons' names.
        count: How many icons have it.

    Returns:
        "seen" or "new" (the halves of the frequent heads), "other" (less frequent) or "none".
    """
    if count < RARE or head in SUITS:
        return "none"
    if count < FREQUENT:
        return "other"
    return "new" if unit_interval("icon head", head) < 0.5 else "seen"


def _draw_icons(
    icon_set: IconSet, splits: dict[Split, Interval], rows: dict[str, tuple], *salt: str
) -> Samples:
    """Draw icons in each split whose interval holds their hash; empty icons are left out.

    Args:
        icon_set: The set.
        splits: Split -> interval.
        rows: Name -> an icon's row, without its split.
        *salt: What is hashed before a name.
    """
    images, kept = [], []
    for name, row in rows.items():
        hash_value = unit_interval(*salt, name)
        for split, (low, high) in splits.items():
            if low <= hash_value < high and is_visible(image := icon_set.render(name)):
                images.append(image)
                kept.append((split, *row))
    return images, kept


def make_icons(recipe: IconRecipe, archives: dict[str, Path]) -> Samples:
    """Draw the icons of one side, split by a hash of the icon's name.

    Args:
        recipe: The recipe.
        archives: Short name -> package.
    """
    icon_set = read_icon_set(archives["game-icons"])
    heads = {name: name.split("-")[-1] for name in icon_set.icons}
    counts = collections.Counter(heads.values())
    rows = {}
    for name, head in sorted(heads.items()):
        if head_side(head, counts[head]) == recipe.heads:
            captions = list(dict.fromkeys([name.replace("-", " "), head]))
            rows[name] = (head, f"icon {name}", f"game-icons/{name}", captions)
    return _draw_icons(icon_set, recipe.splits, rows, "icon")


def make_icon_set(recipe: IconSetRecipe, archives: dict[str, Path]) -> Samples:
    """Draw every icon of the one set that is given; its name is label and caption.

    Args:
        recipe: The recipe.
        archives: Short name -> package.
    """
    ((set_name, archive),) = archives.items()
    icon_set, rows = read_icon_set(archive), {}
    for name in sorted(icon_set.icons):
        words = name.replace("-", " ")
        rows[name] = (words, f"{set_name} {name}", f"{set_name}/{name}", [words])
    return _draw_icons(icon_set, recipe.splits, rows, "icon", set_name)
