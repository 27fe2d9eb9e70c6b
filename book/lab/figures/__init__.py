"""Figures as pure functions of frames, in one house style.

The first sentence of a figure function's docstring is its caption on the site. Figures are drawn
without a screen and closed; a notebook shows what a function returns.
"""

from lab.figures.comparisons import (
    plot_against,
    plot_allowed_steps,
    plot_along,
    plot_curves,
    plot_gains,
    plot_merge_path,
    plot_plan,
    plot_ranks,
    plot_scatter,
    plot_triangles,
    plot_weight_drift,
)
from lab.figures.inputs import (
    plot_batch,
    plot_gallery,
    plot_learning_rates,
    plot_mixtures,
    plot_schedules,
    plot_stream,
)
from lab.figures.style import COLOURS, CONTROL, SPECIAL, palette
from lab.figures.trajectories import (
    plot_change_by_dataset,
    plot_loss_drift,
    plot_over_tasks,
    plot_plane,
    write_idea,
)
from lab.figures.verdicts import plot_claims, plot_networks, plot_scoreboard
