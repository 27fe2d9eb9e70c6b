"""The picture on the first page: what updates do to a model, in the plane of A_KA and A_ZS."""

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from lab import figures
from matplotlib.figure import Figure

from cmp.experiments import results, store
from cmp.files import project_folder

PICTURE = project_folder() / "book" / "idea.svg"
STUDY = "01"
WORDS = {
    "update only": "new data alone",
    "pool only": "new + pretraining data",
    "buffer only": "new + earlier updates",
    "thirds": "new + both",
    figures.JOINT: figures.JOINT,
    figures.CONTROL: figures.CONTROL,
}
"""Settings of the study, by what they train on."""
STABLE = {"svg.hashsalt": "idea", "svg.fonttype": "path"}


def idea(trajectory: pd.DataFrame) -> Figure:
    """Ways through a stream by what is trained on, with the two directions named at the axes.

    trajectory: of study `STUDY`; see `cmp.plots`.
    """
    chosen = trajectory[trajectory["setting"].isin(WORDS)]
    figure = figures.plane(chosen.assign(setting=chosen["setting"].map(WORDS)))
    [axes] = figure.axes
    axes.set_xlabel("A_KA (%): what is new is learned  \N{RIGHTWARDS ARROW}")
    axes.set_ylabel("A_ZS (%): what was known is kept  \N{RIGHTWARDS ARROW}")
    return figure


def write(path: Path = PICTURE) -> Path:
    """Draw the picture from the published results, the same to the byte every time."""
    figure = idea(store.trajectory(results.published_metrics(STUDY)))
    with plt.rc_context(STABLE):
        figure.savefig(path, metadata={"Date": None, "Creator": None})
    return path
