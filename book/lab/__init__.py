"""The book's own package: explorers, figures, the chapters and the site; notebooks import it."""

from lab.exercises import check, recall

__all__ = ["check", "recall"]
