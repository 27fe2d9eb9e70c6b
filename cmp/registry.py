"""What can be added from outside the core: data sources and model families of other packages."""

import functools
from importlib.metadata import entry_points
from typing import Any


@functools.cache
def plugins(group: str) -> dict[str, Any]:
    """Return the installed entry points of a group, loaded.

    Args:
        group: "cmp.data" (functions that return a `Corpus`), "cmp.models" (modules of a model
            family, see `cmp.models.family_of`) or "cmp.statistics" (folders of tables).

    Returns:
        The loaded objects by name.
    """
    return {entry.name: entry.load() for entry in entry_points(group=group)}
