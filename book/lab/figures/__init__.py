"""Figures as pure functions of frames, in one house style, listed in `__init__.pyi`.

The first sentence of a figure function's docstring is its caption on the site. Figures are drawn
without a screen and then closed; a notebook shows the returned figure.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
