"""Interactive views over pure functions: a control that moves draws the same figures again.

An explorer shows its picture and its sentence from the first draw on, so an executed notebook holds
them without a kernel; a `*_still` is a plain figure of a few cases, for a page without widgets.
"""

from cmp.widgets.method import budget_calculator, method_explorer
from cmp.widgets.mixture import mixture_explorer, mixture_still
from cmp.widgets.path import path_explorer
from cmp.widgets.planner import planner
from cmp.widgets.scale import scale_explorer
from cmp.widgets.schedule import schedule_explorer, schedule_still
from cmp.widgets.stream import stream_explorer

__all__ = [
    "budget_calculator",
    "method_explorer",
    "mixture_explorer",
    "mixture_still",
    "path_explorer",
    "planner",
    "scale_explorer",
    "schedule_explorer",
    "schedule_still",
    "stream_explorer",
]
