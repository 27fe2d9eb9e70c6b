"""Streams as the published reference writes them: a JSON list of "DATASET+++class" (spec 6)."""

from pathlib import Path

import pandas as pd

from cmp.errors import CmpError
from cmp.files import parse_json

LARGEST = 64 * 2**20
"""Bytes of a stream file; the reference's are below one million."""


def read(path: Path) -> list[str]:
    """The classes of a stream file in order of arrival.

    `CmpError` with the entry for anything but a list of distinct "DATASET+++class".
    """
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError(f"larger than {LARGEST} bytes")
        found = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CmpError(f"{path}: cannot be read as a stream ({error})") from error
    if not isinstance(found, list) or not found:
        raise CmpError(f'{path}: a stream is a JSON list of "DATASET+++class", not {found!r:.60}')
    for place, entry in enumerate(found, start=1):
        parts = entry.split("+++") if isinstance(entry, str) else []
        if len(parts) != 2 or not all(parts):
            raise CmpError(f'{path}: entry {place}: {entry!r:.60} is no "DATASET+++class"')
    if len(set(found)) < len(found):
        seen: dict[str, int] = {}
        for place, entry in enumerate(found, start=1):
            if seen.setdefault(entry, place) != place:
                raise CmpError(
                    f"{path}: entry {place}: {entry!r} stands there already, as entry {seen[entry]}"
                )
    return found


def table(order: list[str]) -> pd.DataFrame:
    """The table of traits of an imported list: each entry's position in it."""
    return pd.DataFrame({"entry": order, "position": range(len(order))})
