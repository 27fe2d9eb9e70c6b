"""Figures as pure functions of frames, in one house style.

The first sentence of a figure function's docstring is its caption on the site. Figures are drawn
without a screen and closed; a notebook shows what a function returns.
"""

from lab.figures.comparisons import *  # noqa: F403
from lab.figures.inputs import *  # noqa: F403
from lab.figures.style import *  # noqa: F403
from lab.figures.trajectories import *  # noqa: F403
from lab.figures.verdicts import *  # noqa: F403
