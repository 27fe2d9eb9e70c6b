"""Make images from icons of `@iconify-json` packages (SVG bodies by name, names by codepoint),
including emoji.

An emoji concept is a codepoint, drawn once per style. The concepts are those without joiners and
skin tones that exist in both fluent styles (for testing) and in at least three of the other six. A
concept is hashed to [0, 1) by its codepoint, so splits by intervals of the hash never share a
concept.
"""

import collections
import functools
import json
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import resvg_py

from benchmark.packages import archive_member, archive_members
from cmp.data import IMAGE_SIZE
from cmp.embedded import manifest
from cmp.embedded.packed import Samples
from cmp.readers.images import decode_rgba
from cmp.seeds import unit_interval

RENDER_SIZE = 4 * IMAGE_SIZE
"""Vector drawings are rendered larger and then reduced, which keeps thin strokes visible."""
FREQUENT, RARE = 7, 3
"""Number of icons from which a head is frequent, and number below which it is left out."""
SUITS = {"clubs", "diamonds", "hearts", "spades"}
"""Playing cards differ only in their pips, so their heads do not make good classes."""
TEST_STYLES = ("fluent-flat", "fluent-3d")
OTHER_STYLES = ("noto", "twemoji", "noto-v1", "emojione", "emojione-v1", "openmoji")
BITMAP_STYLES = ("fluent-3d",)
"""Styles whose package contains image files named by codepoint, instead of an icon set."""
BITMAP_FOLDER = "package/assets/"
CIRCLE_FLAGS = "circle-flags"
SKIN_TONES = {"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"}
JOINER = "200d"
REGIONAL_A = 0x1F1E6
"""Codepoint of the regional indicator A; two indicators form a flag."""


class IconSet(NamedTuple):
    """One icon set.

    Attributes:
        icons: Name -> icon, with its SVG under "body" and its position and size.
        aliases: Name -> alias, with its target under "parent".
        characters: Codepoints -> name.
    """

    icons: dict[str, dict]
    aliases: dict[str, dict]
    characters: dict[str, str]

    def resolve(self, name: str) -> str | None:
        """Return the icon for a name or an alias, or None."""
        for _ in range(5):  # aliases of aliases
            name = self.aliases.get(name, {"parent": name})["parent"]
        return name if name in self.icons else None

    def render(self, name: str) -> np.ndarray:
        """Render an icon, in black if it has no colour.

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
    """Return whether at least 2% of the pixels are drawn, since a few sources have empty icons.

    Args:
        image: uint8 [4, 32, 32], RGBA.
    """
    return bool((image[3] > 8).mean() >= 0.02)


def head_side(head: str, count: int) -> str:
    """Return which of `IconRecipe.heads` a head belongs to.

    Args:
        head: The last word of the icons' names.
        count: The number of icons with this head.

    Returns:
        "seen" or "new" (the two halves of the frequent heads), "other" (less frequent) or "none".
    """
    if count < RARE or head in SUITS:
        return "none"
    if count < FREQUENT:
        return "other"
    return "new" if unit_interval("icon head", head) < 0.5 else "seen"


def _draw_icons(
    icon_set: IconSet, splits: dict[str, manifest.Interval], rows: dict[str, tuple], *salt: str
) -> Samples:
    """Draw icons in each split whose interval contains their hash, leaving out empty icons.

    Args:
        icon_set: The icon set.
        splits: Split -> interval.
        rows: Name -> the row of an icon, without its split.
        *salt: Hashed before a name.
    """
    images, kept = [], []
    for name, row in rows.items():
        hash_value = unit_interval(*salt, name)
        for split, (low, high) in splits.items():
            if low <= hash_value < high and is_visible(image := icon_set.render(name)):
                images.append(image)
                kept.append((split, *row))
    return images, kept


def make_icons(recipe: manifest.IconRecipe, archives: dict[str, Path]) -> Samples:
    """Draw the icons with one kind of head, split by a hash of the icon's name.

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


def make_icon_set(recipe: manifest.IconSetRecipe, archives: dict[str, Path]) -> Samples:
    """Draw every icon of the given set, with its name as label and caption.

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


class Character(NamedTuple):
    """An emoji of the catalogue.

    Attributes:
        name: The name, in lower case.
        tags: Associated words.
        group: The group in Emojibase.
        subgroup: The subgroup in Emojibase, with spaces.
    """

    name: str
    tags: tuple[str, ...]
    group: str
    subgroup: str


def normalise_codepoints(code: str) -> str:
    """Return codepoints in normal form: lower case, without the variation selector FE0F.

    Args:
        code: Hexadecimal codepoints, joined by "-".
    """
    return "-".join(part for part in code.lower().split("-") if part != "fe0f")


@functools.lru_cache(maxsize=2)
def read_catalogue(emojibase: Path) -> dict[str, Character]:
    """Read all emoji of `emojibase-data` in English.

    Args:
        emojibase: The package.

    Returns:
        Code -> emoji.
    """
    groups = json.loads(archive_member(emojibase, "package/meta/groups.json"))
    characters = {}
    for entry in json.loads(archive_member(emojibase, "package/en/data.json")):
        code = normalise_codepoints(entry["hexcode"])
        characters[code] = Character(
            name=entry["label"].lower(),
            tags=tuple(tag.lower() for tag in entry.get("tags", [])),
            group=groups["groups"].get(str(entry.get("group")), "none"),
            subgroup=groups["subgroups"].get(str(entry.get("subgroup")), "none").replace("-", " "),
        )
    return characters


def find_drawings(style: str, archive: Path, characters: dict[str, Character]) -> dict[str, str]:
    """Find the drawings of a style by codepoint, or else by the emoji's name.

    Args:
        style: The style.
        archive: The style's package.
        characters: Code -> emoji.

    Returns:
        Code -> name of the icon or file.
    """
    if style in BITMAP_STYLES:
        files = [name for name, _ in archive_members(archive, BITMAP_FOLDER)]
        by_code = {normalise_codepoints(Path(name).stem): name for name in files}
        return {code: name for code, name in by_code.items() if code in characters}
    icon_set, names = read_icon_set(archive), {}
    for code, name in icon_set.characters.items():
        if not set(code.split("-")) & SKIN_TONES and normalise_codepoints(code) in characters:
            names[normalise_codepoints(code)] = name
    slugs = {re.sub(r"[^a-z0-9]+", "-", c.name).strip("-"): code for code, c in characters.items()}
    for name in [*icon_set.icons, *icon_set.aliases]:
        if name in slugs:
            names.setdefault(slugs[name], name)
    resolved = {code: icon_set.resolve(name) for code, name in names.items()}
    return {code: name for code, name in resolved.items() if name}


@functools.lru_cache(maxsize=2)
def find_concepts(archives: tuple[tuple[str, Path], ...]) -> dict[str, dict[str, str]]:
    """Find the benchmark's concepts.

    Args:
        archives: (short name, package) pairs of the catalogue and of all styles.

    Returns:
        Code -> {style -> name of the icon or file}, in order of code.
    """
    packages = dict(archives)
    characters = read_catalogue(packages.pop("emojibase"))
    drawings = {style: find_drawings(style, path, characters) for style, path in packages.items()}
    concepts = {}
    for code, character in sorted(characters.items()):
        names = {style: codes[code] for style, codes in drawings.items() if code in codes}
        drawn = names.keys() >= {*TEST_STYLES} and len(names.keys() & {*OTHER_STYLES}) >= 3
        if drawn and JOINER not in code and not character.name.startswith("japanese"):
            concepts[code] = names
    return concepts


def render_emoji(style: str, archive: Path, names: dict[str, str]) -> dict[str, np.ndarray]:
    """Render drawings of a style, leaving out empty ones.

    Args:
        style: The style.
        archive: The style's package.
        names: Code -> name of the icon or file.

    Returns:
        Code -> uint8 [4, 32, 32], RGBA.
    """
    if style in BITMAP_STYLES:
        codes = {name: code for code, name in names.items()}
        files = archive_members(archive, BITMAP_FOLDER)
        images = {codes[name]: decode_rgba(content) for name, content in files if name in codes}
    else:
        icon_set = read_icon_set(archive)
        images = {code: icon_set.render(name) for code, name in names.items()}
    return {code: image for code, image in images.items() if is_visible(image)}


def _captions(character: Character, kinds: list[str]) -> list[str]:
    """Return the captions of an emoji, in the order of `kinds`, without repetition."""
    tags = [tag for tag in character.tags if tag != character.name]
    captions = {
        "name": character.name,
        "name-tags": ", ".join([character.name, *tags[:2]]),
        "name-all": ", ".join([character.name, *tags[:3]]),
        "subgroup-name": f"{character.subgroup}, {character.name}",
        "tags": ", ".join(tags[:3]) or character.name,
    }
    return list(dict.fromkeys(captions[kind] for kind in kinds))


def make_emoji(recipe: manifest.EmojiRecipe, archives: dict[str, Path]) -> Samples:
    """Draw every concept of the recipe in every style.

    Args:
        recipe: The recipe.
        archives: Short name -> package.
    """
    characters = read_catalogue(archives["emojibase"])
    concepts = find_concepts(tuple(sorted(archives.items())))
    candidates = [code for code in concepts if characters[code].group in recipe.groups]
    images, rows = [], []
    for split, drawings in recipe.splits.items():
        low, high = drawings.concepts
        codes = [code for code in candidates if low <= unit_interval("concept", code) < high]
        for style in drawings.styles:
            names = {code: concepts[code][style] for code in codes if style in concepts[code]}
            for code, image in sorted(render_emoji(style, archives[style], names).items()):
                character = characters[code]
                label = character.name if recipe.label == "name" else character.subgroup
                captions = _captions(character, recipe.captions)
                images.append(image)
                rows.append((split, label, code, f"{style}/{names[code]}", captions))
    return images, rows


def iso_code(code: str) -> str | None:
    """Return the letters that two regional indicators spell, or None.

    Args:
        code: Codepoints, such as "1f1eb-1f1f7" for "fr".
    """
    letters = [int(part, 16) - REGIONAL_A for part in code.split("-")]
    if len(letters) != 2 or not all(0 <= letter < 26 for letter in letters):
        return None
    return "".join(chr(ord("a") + letter) for letter in letters)


def _find_flags(style: str, archive: Path, characters: dict[str, Character]) -> dict[str, str]:
    """Return code -> icon for a style, found by codepoint, by ISO code, or as "flag-for-france"."""
    icon_set = read_icon_set(archive)
    names = find_drawings(style, archive, characters)
    for code, character in characters.items():
        slug = re.sub(r"[^a-z]+", "-", _country(character).replace("&", "and")).strip("-")
        name = iso_code(code) if style == CIRCLE_FLAGS else f"flag-for-{slug}"
        names.setdefault(code, icon_set.resolve(name))
    return {code: name for code, name in names.items() if name}


def _country(character: Character) -> str:
    return character.name.removeprefix("flag: ")


def make_flags(recipe: manifest.FlagRecipe, archives: dict[str, Path]) -> Samples:
    """Draw countries that every style has, chosen by a hash.

    Args:
        recipe: The recipe.
        archives: Short name -> package.
    """
    characters = {
        code: character
        for code, character in read_catalogue(archives["emojibase"]).items()
        if character.name.startswith("flag: ") and iso_code(code)
    }
    styles = sorted({style for styles in recipe.splits.values() for style in styles})
    names = {style: _find_flags(style, archives[style], characters) for style in styles}
    shared = [code for code in characters if all(code in names[style] for style in styles)]
    shared.sort(key=lambda code: unit_interval("flag", code))
    images, rows = [], []
    for split, split_styles in recipe.splits.items():
        for style in split_styles:
            icon_set = read_icon_set(archives[style])
            for code in sorted(shared[: recipe.countries]):
                country, name = _country(characters[code]), names[style][code]
                images.append(icon_set.render(name))
                rows.append((split, country, code, f"{style}/{name}", [f"flag of {country}"]))
    return images, rows
