"""Icons: silhouettes by the head of their name ("melting ice cube" is a cube), and whole sets."""

import collections
from pathlib import Path

from cmp.data import raster
from cmp.data.manifest import IconRecipe, IconSetRecipe
from cmp.data.recipes import iconify
from cmp.data.samples import Samples, from_rows
from cmp.seeds import unit

FREQUENT, RARE = 7, 3
SUITS = {"clubs", "diamonds", "hearts", "spades"}
"""Playing cards differ by their pips, not by what they show; their heads are no classes."""


def side(head: str, count: int) -> str:
    """ "seen", "new" (the halves of the frequent heads), "other" (less frequent) or "none"."""
    if count < RARE or head in SUITS:
        return "none"
    if count < FREQUENT:
        return "other"
    return "new" if unit("icon head", head) < 0.5 else "seen"


def make(recipe: IconRecipe, archives: dict[str, Path]) -> Samples:
    """Draw the icons of one side, split by a hash of the icon's name."""
    icons = iconify.read(archives["game-icons"])
    heads = {name: name.split("-")[-1] for name in icons.icons}
    counts = collections.Counter(heads.values())
    images, rows = [], []
    for name, head in sorted(heads.items()):
        if side(head, counts[head]) != recipe.heads:
            continue
        place = unit("icon", name)
        for split, (low, high) in recipe.splits.items():
            image = raster.render_svg(icons.svg(name)) if low <= place < high else None
            if image is not None and raster.visible(image):
                captions = list(dict.fromkeys([name.replace("-", " "), head]))
                images.append(image)
                rows.append((split, head, f"icon {name}", f"game-icons/{name}", captions))
    return from_rows(images, rows)


def whole_set(recipe: IconSetRecipe, archives: dict[str, Path]) -> Samples:
    """Draw every icon of the one set that is given; its name is label and caption."""
    ((name_of_set, archive),) = archives.items()
    icons, images, rows = iconify.read(archive), [], []
    for name in sorted(icons.icons):
        place, words = unit("icon", name_of_set, name), name.replace("-", " ")
        for split, (low, high) in recipe.splits.items():
            image = raster.render_svg(icons.svg(name)) if low <= place < high else None
            if image is not None and raster.visible(image):
                images.append(image)
                rows.append(
                    (split, words, f"{name_of_set} {name}", f"{name_of_set}/{name}", [words])
                )
    return from_rows(images, rows)
