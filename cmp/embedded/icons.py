"""Reading `@iconify-json` packages: SVG bodies by name, names by codepoint."""

import collections
import functools
import json
from dataclasses import dataclass
from pathlib import Path

from cmp.embedded import packed
from cmp.embedded.manifest import IconRecipe, IconSetRecipe
from cmp.embedded.packages import archive_members
from cmp.embedded.packed import Samples, samples_from_rows
from cmp.seeds import unit_interval


@dataclass(frozen=True)
class IconSet:
    """One icon set. `icons` and `aliases` are by name, `characters` maps codepoints to names."""

    icons: dict[str, dict]
    aliases: dict[str, dict]
    characters: dict[str, str]
    width: int
    height: int

    def resolve(self, name: str) -> str | None:
        """The icon that a name or an alias stands for, or None."""
        for _ in range(5):
            if name in self.icons:
                return name
            if name not in self.aliases:
                return None
            name = self.aliases[name]["parent"]
        return None

    def svg(self, name: str) -> str:
        """The SVG document of an icon; drawings without a colour of their own are black."""
        icon = self.icons[name]
        left, top = icon.get("left", 0), icon.get("top", 0)
        width, height = icon.get("width", self.width), icon.get("height", self.height)
        body = icon["body"].replace("currentColor", "#000")
        return (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'width="{width}" height="{height}" viewBox="{left} {top} {width} {height}">'
            f"{body}</svg>"
        )


@functools.lru_cache(maxsize=16)
def read_icon_set(archive: Path) -> IconSet:
    """Read an icon set from its package."""
    files = {"package/icons.json": b"{}", "package/chars.json": b"{}"}
    files |= {name: data for name, data in archive_members(archive, "package/") if name in files}
    icons = json.loads(files["package/icons.json"])
    return IconSet(
        icons={name: icon for name, icon in icons["icons"].items() if not icon.get("hidden")},
        aliases=icons.get("aliases", {}),
        characters=json.loads(files["package/chars.json"]),
        width=icons.get("width", 16),
        height=icons.get("height", 16),
    )


FREQUENT, RARE = 7, 3
SUITS = {"clubs", "diamonds", "hearts", "spades"}
"""Playing cards differ by their pips, not by what they show; their heads are no classes."""


def head_side(head: str, count: int) -> str:
    """ "seen", "new" (the halves of the frequent heads), "other" (less frequent) or "none"."""
    if count < RARE or head in SUITS:
        return "none"
    if count < FREQUENT:
        return "other"
    return "new" if unit_interval("icon head", head) < 0.5 else "seen"


def make_icons(recipe: IconRecipe, archives: dict[str, Path]) -> Samples:
    """Draw the icons of one side, split by a hash of the icon's name."""
    icons = read_icon_set(archives["game-icons"])
    heads = {name: name.split("-")[-1] for name in icons.icons}
    counts = collections.Counter(heads.values())
    images, rows = [], []
    for name, head in sorted(heads.items()):
        if head_side(head, counts[head]) != recipe.heads:
            continue
        place = unit_interval("icon", name)
        for split, (low, high) in recipe.splits.items():
            image = packed.render_svg(icons.svg(name)) if low <= place < high else None
            if image is not None and packed.is_visible(image):
                captions = list(dict.fromkeys([name.replace("-", " "), head]))
                images.append(image)
                rows.append((split, head, f"icon {name}", f"game-icons/{name}", captions))
    return samples_from_rows(images, rows)


def make_icon_set(recipe: IconSetRecipe, archives: dict[str, Path]) -> Samples:
    """Draw every icon of the one set that is given; its name is label and caption."""
    ((name_of_set, archive),) = archives.items()
    icons, images, rows = read_icon_set(archive), [], []
    for name in sorted(icons.icons):
        place, words = unit_interval("icon", name_of_set, name), name.replace("-", " ")
        for split, (low, high) in recipe.splits.items():
            image = packed.render_svg(icons.svg(name)) if low <= place < high else None
            if image is not None and packed.is_visible(image):
                images.append(image)
                rows.append(
                    (split, words, f"{name_of_set} {name}", f"{name_of_set}/{name}", [words])
                )
    return samples_from_rows(images, rows)
