"""What a batch is made of, and how often an image is seen over the stream."""

import ipywidgets
import pandas as pd
from ipywidgets import FloatLogSlider, FloatSlider, IntSlider
from matplotlib.figure import Figure

from cmp import mixtures, plot_inputs
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


def exposure(
    mixture: Mixture, batch: int, tasks: int, steps: int, pool_size: float, task_size: float
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What a batch is made of, and how often an image is seen over the stream, on average.

    pool_size: images of the pretraining pool that are kept for replay; task_size: images that
    arrive in each task. The buffer of a task holds all earlier tasks' images, drawn uniformly.
    Returns (parts, passes) as `plot_inputs.batch_mixture` takes them; `passes` has another column,
    `images`: what is seen times how many there are adds up to batch * steps * tasks.
    """
    if min(pool_size, task_size) <= 0:
        raise CmpError(f"exposure: sizes must be positive, not {pool_size} and {task_size}")
    first, later = (mixtures.parts(mixture, batch, empty) for empty in (True, False))
    each = pd.DataFrame([first] + [later] * (tasks - 1), columns=list(plot_inputs.POOLS))
    # what a task's buffer part adds to each earlier image, summed over the tasks that follow
    replay = [0.0] + [steps * later[2] / (task_size * earlier) for earlier in range(1, tasks)]
    passes = pd.DataFrame(
        {
            "pretraining pool": [steps * each["pretraining pool"].sum() / pool_size]
            + [0.0] * tasks,
            "update": [0.0, *steps * each["update"] / task_size],
            "buffer": [0.0, *[sum(replay[task:]) for task in range(1, tasks + 1)]],
            "images": [pool_size] + [task_size] * tasks,
        },
        index=pd.RangeIndex(tasks + 1, name="arrives"),
    )
    names = ["first task", "later tasks"][: min(tasks, 2)]
    return each.iloc[: len(names)].set_axis(names), passes


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
        name: exposure(mixture, 64, 8, 40, 0.1 * POOL, ARRIVING / 8)
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
        parts, passes = exposure(mixture, batch, tasks, steps, kept, arriving / tasks)
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
