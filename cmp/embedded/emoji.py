"""Emoji in many drawing styles: one concept is one codepoint, drawn once a style.

The concepts are those without joiners and skin tones that exist in both fluent styles (the test
side) and in at least three of the other six. A concept's place in [0, 1) is a hash of its
codepoint, so that a split by intervals of it can never put one concept on two sides.
"""

import functools
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cmp.embedded import icons as icon_sets
from cmp.embedded import packed
from cmp.embedded.manifest import EmojiRecipe, FlagRecipe
from cmp.embedded.packages import archive_member, archive_members
from cmp.embedded.packed import Samples, samples_from_rows
from cmp.errors import CmpError
from cmp.readers.images import decode_rgba
from cmp.seeds import unit_interval

TEST_STYLES = ("fluent-flat", "fluent-3d")
OTHER_STYLES = ("noto", "twemoji", "noto-v1", "emojione", "emojione-v1", "openmoji")
RENDERED_STYLES = ("fluent-3d",)
SKIN_TONES = {"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"}
JOINER = "200d"
GROUPS = {
    "smileys-emotion", "people-body", "animals-nature", "food-drink",
    "travel-places", "activities", "objects", "symbols",
}  # fmt: skip


@dataclass(frozen=True)
class Character:
    """One emoji of the catalogue; `code` is its codepoint sequence without variation selectors."""

    code: str
    name: str
    tags: tuple[str, ...]
    group: str
    subgroup: str


def normalise_codepoints(code: str) -> str:
    """Lower-case hexadecimal codepoints joined by "-", without the variation selector FE0F."""
    return "-".join(part for part in code.lower().split("-") if part != "fe0f")


@functools.lru_cache(maxsize=2)
def catalogue(emojibase: Path) -> dict[str, Character]:
    """All emoji of `emojibase-data` (English) by code."""
    groups = json.loads(archive_member(emojibase, "package/meta/groups.json"))
    entries = json.loads(archive_member(emojibase, "package/en/data.json"))
    characters = {}
    for entry in entries:
        code = normalise_codepoints(entry["hexcode"])
        characters[code] = Character(
            code=code,
            name=entry["label"].lower(),
            tags=tuple(tag.lower() for tag in entry.get("tags", [])),
            group=groups["groups"].get(str(entry.get("group")), "none"),
            subgroup=groups["subgroups"].get(str(entry.get("subgroup")), "none"),
        )
    return characters


def drawings(style: str, archive: Path, characters: dict[str, Character]) -> dict[str, str]:
    """code -> icon name (or file name) for one style; by codepoint, else by the emoji's name."""
    if style in RENDERED_STYLES:
        prefix = "package/assets/"
        files = [name for name, _ in archive_members(archive, prefix)]
        found = {normalise_codepoints(Path(name).stem): name for name in files}
        return {code: name for code, name in found.items() if code in characters}
    icons = icon_sets.read_icon_set(archive)
    found = {}
    for code, name in icons.characters.items():
        if not set(code.split("-")) & SKIN_TONES and normalise_codepoints(code) in characters:
            found[normalise_codepoints(code)] = name
    by_name = {re.sub(r"[^a-z0-9]+", "-", c.name).strip("-"): c.code for c in characters.values()}
    for name in [*icons.icons, *icons.aliases]:
        if name in by_name:
            found.setdefault(by_name[name], name)
    resolved = {code: icons.resolve(name) for code, name in found.items()}
    return {code: name for code, name in resolved.items() if name}


@functools.lru_cache(maxsize=2)
def concepts(archives: tuple[tuple[str, Path], ...]) -> dict[str, dict[str, str]]:
    """code -> {style -> icon name} for the concepts of the benchmark, in order of code."""
    sources = dict(archives)
    if missing := {"emojibase", *TEST_STYLES, *OTHER_STYLES} - set(sources):
        raise CmpError(f"sources: an emoji dataset needs {sorted(missing)[0]!r} as well")
    characters = catalogue(sources["emojibase"])
    styles = {
        name: drawings(name, path, characters)
        for name, path in sources.items()
        if name != "emojibase"
    }
    kept = {}
    for code, character in sorted(characters.items()):
        drawn = {style: icons[code] for style, icons in styles.items() if code in icons}
        if (
            character.group in GROUPS
            and JOINER not in code
            and not character.name.startswith("japanese")
            and all(style in drawn for style in TEST_STYLES)
            and sum(style in drawn for style in OTHER_STYLES) >= 3
        ):
            kept[code] = drawn
    return kept


def render(style: str, archive: Path, names: dict[str, str]) -> dict[str, np.ndarray]:
    """code -> image uint8 [4, 32, 32] for the icons of one style; empty drawings are left out."""
    if style in RENDERED_STYLES:
        codes = {name: code for code, name in names.items()}
        files = archive_members(archive, "package/assets/")
        images = {codes[name]: decode_rgba(data) for name, data in files if name in codes}
    else:
        icons = icon_sets.read_icon_set(archive)
        images = {code: packed.render_svg(icons.svg(name)) for code, name in names.items()}
    return {code: image for code, image in images.items() if packed.is_visible(image)}


def _texts(character: Character, kinds: list[str]) -> list[str]:
    """The captions of an image, in the order of `kinds`, without repetition."""
    some = [tag for tag in character.tags if tag != character.name]
    subgroup = character.subgroup.replace("-", " ")
    made = {
        "name": character.name,
        "name-tags": ", ".join([character.name, *some[:2]]),
        "name-all": ", ".join([character.name, *some[:3]]),
        "subgroup-name": f"{subgroup}, {character.name}",
        "tags": ", ".join(some[:3]) or character.name,
    }
    return list(dict.fromkeys(made[kind] for kind in kinds))


def make_emoji(recipe: EmojiRecipe, archives: dict[str, Path]) -> Samples:
    """Draw every wanted concept in every wanted style."""
    characters = catalogue(archives["emojibase"])
    drawn = concepts(tuple(sorted(archives.items())))
    wanted = [code for code in drawn if characters[code].group in recipe.groups]
    images, rows = [], []
    for split, chosen in recipe.splits.items():
        low, high = chosen.concepts
        codes = [code for code in wanted if low <= unit_interval("concept", code) < high]
        for style in chosen.styles:
            names = {code: drawn[code][style] for code in codes if style in drawn[code]}
            for code, image in sorted(render(style, archives[style], names).items()):
                character = characters[code]
                by_name = recipe.label == "name"
                label = character.name if by_name else character.subgroup.replace("-", " ")
                captions = _texts(character, recipe.captions)
                images.append(image)
                rows.append((split, label, code, f"{style}/{names[code]}", captions))
    return samples_from_rows(images, rows)


REGIONAL_A = 0x1F1E6
CIRCLE = "circle-flags"


def iso_code(code: str) -> str | None:
    """The letters that two regional indicators spell ("1f1eb-1f1f7" -> "fr"), or None."""
    letters = [int(part, 16) - REGIONAL_A for part in code.split("-")]
    if len(letters) != 2 or not all(0 <= letter < 26 for letter in letters):
        return None
    return "".join(chr(ord("a") + letter) for letter in letters)


def _country_names(style: str, archive: Path, characters: dict[str, Character]) -> dict[str, str]:
    """code -> icon name for one style: by codepoint, by ISO code, or as "flag-for-france"."""
    icons = icon_sets.read_icon_set(archive)
    found = drawings(style, archive, characters)
    for code, character in characters.items():
        slug = re.sub(r"[^a-z]+", "-", _country_of(character).replace("&", "and")).strip("-")
        by_name = iso_code(code) if style == CIRCLE else f"flag-for-{slug}"
        found.setdefault(code, icons.resolve(by_name))
    return {code: name for code, name in found.items() if name}


def _country_of(character: Character) -> str:
    return character.name.removeprefix("flag: ")


def make_flags(recipe: FlagRecipe, archives: dict[str, Path]) -> Samples:
    """Draw the countries that every style knows; the choice among them is by a hash."""
    characters = {
        code: character
        for code, character in catalogue(archives["emojibase"]).items()
        if character.name.startswith("flag: ") and iso_code(code)
    }
    styles = {style for chosen in recipe.splits.values() for style in chosen}
    names = {style: _country_names(style, archives[style], characters) for style in sorted(styles)}
    shared = [code for code in characters if all(code in found for found in names.values())]
    chosen = sorted(
        sorted(shared, key=lambda code: unit_interval("flag", code))[: recipe.countries]
    )
    images, rows = [], []
    for split, wanted in recipe.splits.items():
        for style in wanted:
            icons = icon_sets.read_icon_set(archives[style])
            for code in chosen:
                name = _country_of(characters[code])
                images.append(packed.render_svg(icons.svg(names[style][code])))
                source = f"{style}/{names[style][code]}"
                rows.append((split, name, code, source, [f"flag of {name}"]))
    return samples_from_rows(images, rows)
