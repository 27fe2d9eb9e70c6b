"""Continual multimodal pretraining: training, merging, schedules, mixtures, streams, budgets.

The public API is listed in `__init__.pyi`. Names are imported on first use, which keeps
`import cmp` fast.
"""

import lazy_loader

__version__ = "0.3.0"

NUMERICS = 4
"""Part of every run's id. Raise it by hand when a change may alter a run's result."""

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
