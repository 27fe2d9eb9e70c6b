"""The book's package, which notebooks import: explorers, figures, chapters and the site."""

from typing import Any

__all__ = ["check", "recall"]


def __getattr__(name: str) -> Any:
    """Return the functions for exercises, loaded only when they are used."""
    if name not in __all__:
        raise AttributeError(f"module 'lab' has no attribute {name!r}")
    from lab import exercises

    return getattr(exercises, name)
