"""Reading `@iconify-json` packages: SVG bodies by name, names by codepoint."""

import functools
import json
from dataclasses import dataclass
from pathlib import Path

from cmp.data.fetch import members


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
def read(archive: Path) -> IconSet:
    """Read an icon set from its package."""
    files = {"package/icons.json": b"{}", "package/chars.json": b"{}"}
    files |= {name: data for name, data in members(archive, "package/") if name in files}
    icons = json.loads(files["package/icons.json"])
    return IconSet(
        icons={name: icon for name, icon in icons["icons"].items() if not icon.get("hidden")},
        aliases=icons.get("aliases", {}),
        characters=json.loads(files["package/chars.json"]),
        width=icons.get("width", 16),
        height=icons.get("height", 16),
    )
