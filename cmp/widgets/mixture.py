"""What a batch is made of, and how often an image is seen over the stream."""

import ipywidgets
import pandas as pd
from ipywidgets import FloatLogSlider, FloatSlider, IntSlider
from matplotlib.figure import Figure

from cmp import exposures, plot_inputs
from cmp.config import Mixture
from cmp.errors import CmpError
from cmp.widgets.view import Drawn, explorer

POOL, ARRIVING = 5893, 6375
"""Images of the embedded benchmark: the pretraining set, and all updates together."""


def normalised(pretraining: float, update: float, buffer: float, replay: float = 0.1) -> Mixture:
    """The mixture whose shares are weight / sum of weights; thirds where all weights are zero."""
    total = pretraining + update + buffer
    if total == 0:
        return Mixture(replay=replay)
    return Mixture(pretraining / total, update / total, buffer / total, replay)


def mixture_sentence(mixture: Mixture, passes: pd.DataFrame) -> str:
    """The shares, and how often images are seen, in words."""
    seen = passes[list(plot_inputs.POOLS)].sum(axis=1)
    return (
        f"Shares P {mixture.pretraining:.2f}, D {mixture.update:.2f}, B {mixture.buffer:.2f}. "
        f"An image of the replay pool ({passes['images'][0]:,.0f} images) is seen {seen[0]:.1f} "
        f"times, one that arrives first {seen[1]:.1f} times, one that arrives last "
        f"{seen.iloc[-1]:.1f} times."
    )


STILLS = {
    "thirds (right)": Mixture(),
    "update only": Mixture(0.0, 1.0, 0.0),
    "buffer only": Mixture(0.0, 0.5, 0.5),
    "pool only": Mixture(0.5, 0.5, 0.0),
}


def mixture_still() -> Figure:
    """The batches of four mixtures, and for thirds how often images are seen, by the sizes of the
    embedded benchmark."""
    cases = {
        name: exposures.expected(mixture, 64, 8, 40, 0.1 * POOL, ARRIVING / 8)
        for name, mixture in STILLS.items()
    }
    parts = pd.DataFrame({name: parts.iloc[-1] for name, (parts, _) in cases.items()}).T
    return plot_inputs.batch_mixture(parts, cases["thirds (right)"][1])


def mixture_explorer(pool: int = POOL, arriving: int = ARRIVING) -> ipywidgets.VBox:
    """Weights of P, D and B, batch, tasks, steps, replay share -> the batch and what is seen.

    pool: images of the pretraining set; arriving: images of all updates together, evenly divided.
    `CmpError` if there are none.
    """
    if min(pool, arriving) <= 0:
        raise CmpError(f"mixture_explorer: sizes must be positive, not {pool} and {arriving}")

    def draw(p, d, b, batch, tasks, steps, replay):
        mixture = normalised(p, d, b, replay)
        kept = max(1, round(replay * pool))
        parts, passes = exposures.expected(mixture, batch, tasks, steps, kept, arriving / tasks)
        return Drawn(plot_inputs.batch_mixture(parts, passes), mixture_sentence(mixture, passes))

    weight = {"min": 0.0, "max": 1.0, "step": 0.05}
    controls = {
        "p": FloatSlider(0.5, **weight, description="Pool P: weight / sum"),
        "d": FloatSlider(0.5, **weight, description="Update D: weight / sum"),
        "b": FloatSlider(0.5, **weight, description="Buffer B: weight / sum"),
        "batch": IntSlider(64, min=8, max=512, step=8, description="Batch"),
        "tasks": IntSlider(8, min=1, max=20, description="Tasks T"),
        "steps": IntSlider(40, min=5, max=200, description="Steps a task"),
        "replay": FloatLogSlider(
            0.1, min=-2, max=0, readout_format=".0%", description="Pool kept for replay"
        ),
    }
    return explorer(controls, draw)
