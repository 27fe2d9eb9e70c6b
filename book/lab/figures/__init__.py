"""Figures as pure functions of frames, in one house style; `__init__.pyi` lists them.

The first sentence of a figure function's docstring is its caption on the site. Figures are drawn
without a screen and closed; a notebook shows what a function returns.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
