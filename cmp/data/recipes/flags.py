"""Flags of countries: a class a country, one image a style."""

import re
from pathlib import Path

from cmp.data import raster
from cmp.data.manifest import FlagRecipe
from cmp.data.recipes import iconify
from cmp.data.recipes.emoji import Character, catalogue, drawings
from cmp.data.samples import Samples, from_rows
from cmp.seeds import unit

REGIONAL_A = 0x1F1E6
CIRCLE = "circle-flags"


def iso_code(code: str) -> str | None:
    """The letters that two regional indicators spell ("1f1eb-1f1f7" -> "fr"), or None."""
    letters = [int(part, 16) - REGIONAL_A for part in code.split("-")]
    if len(letters) != 2 or not all(0 <= letter < 26 for letter in letters):
        return None
    return "".join(chr(ord("a") + letter) for letter in letters)


def _names(style: str, archive: Path, characters: dict[str, Character]) -> dict[str, str]:
    """code -> icon name for one style: by codepoint, by ISO code, or as "flag-for-france"."""
    icons = iconify.read(archive)
    found = drawings(style, archive, characters)
    for code, character in characters.items():
        slug = re.sub(r"[^a-z]+", "-", _country(character).replace("&", "and")).strip("-")
        by_name = iso_code(code) if style == CIRCLE else f"flag-for-{slug}"
        found.setdefault(code, icons.resolve(by_name))
    return {code: name for code, name in found.items() if name}


def _country(character: Character) -> str:
    return character.name.removeprefix("flag: ")


def make(recipe: FlagRecipe, archives: dict[str, Path]) -> Samples:
    """Draw the countries that every style knows; the choice among them is by a hash."""
    characters = {
        code: character
        for code, character in catalogue(archives["emojibase"]).items()
        if character.name.startswith("flag: ") and iso_code(code)
    }
    styles = {style for chosen in recipe.splits.values() for style in chosen}
    names = {style: _names(style, archives[style], characters) for style in sorted(styles)}
    shared = [code for code in characters if all(code in found for found in names.values())]
    chosen = sorted(sorted(shared, key=lambda code: unit("flag", code))[: recipe.countries])
    images, rows = [], []
    for split, wanted in recipe.splits.items():
        for style in wanted:
            icons = iconify.read(archives[style])
            for code in chosen:
                name = _country(characters[code])
                images.append(raster.render_svg(icons.svg(names[style][code])))
                source = f"{style}/{names[style][code]}"
                rows.append((split, name, code, source, [f"flag of {name}"]))
    return from_rows(images, rows)
