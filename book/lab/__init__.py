"""The book's own package: explorers, figures, the chapters and the site; notebooks import it."""

from typing import Any

__all__ = ["check", "recall"]


def __getattr__(name: str) -> Any:
    """Return what answers exercises; whatever imports `lab` need not load it."""
    if name not in __all__:
        raise AttributeError(f"module 'lab' has no attribute {name!r}")
    from lab import exercises

    return getattr(exercises, name)
