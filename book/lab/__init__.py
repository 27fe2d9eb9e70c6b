"""The book's package, which notebooks import: explorers, figures, chapters and the site."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__, submod_attrs={"exercises": ["check", "recall"]}
)
