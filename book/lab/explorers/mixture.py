"""What a batch is made of, how often an image is seen over the stream, and what runs with such a
mixture scored."""

from collections.abc import Mapping
from fractions import Fraction

import ipywidgets
import pandas as pd
from ipywidgets import FloatLogSlider, IntSlider
from lab import analyses
from lab.analyses import Surface
from lab.explorers import schedule
from lab.explorers.view import Drawn, copyable, explorer, html_table, triangle
from lab.figures import inputs
from matplotlib.figure import Figure

from cmp import config
from cmp.config import Mixture, RunConfig
from cmp.errors import CmpError
from cmp.experiments import statistics

POOL, ARRIVING = 5893, 6375
"""Images of the embedded benchmark: the pretraining set, and all updates together."""
LIKE = "thirds"
"""The setting of a published study whose neighbours in the triangle predict."""
SIZES = ("training.batch", "stream.tasks", "training.steps", "mixture.replay")
"""What the explorer sets beside the shares; stored runs speak of their own sizes alone."""


def run_of(shares: list[float], batch: int, tasks: int, steps: int, replay: float) -> RunConfig:
    """The run of a mixture: its shares are taken as fractions, without a slider's stray digits."""
    names = ("pretraining", "update", "buffer")
    tidy = [float(Fraction(share).limit_denominator(1000)) for share in shares]
    tree = {"mixture": dict(zip(names, tidy, strict=True)) | {"replay": replay}}
    tree |= {"stream": {"tasks": tasks}, "training": {"batch": batch, "steps": steps}}
    return config.parse(tree, "mixture_explorer")


def mixture_sentence(mixture: Mixture, passes: pd.DataFrame) -> str:
    """The shares, and how often images are seen, in words."""
    seen = passes[list(inputs.POOLS)].sum(axis=1)
    return (
        f"Shares P {mixture.pretraining:.2f}, D {mixture.update:.2f}, B {mixture.buffer:.2f}. "
        f"An image of the replay pool ({passes['images'][0]:,.0f} images) is seen {seen[0]:.1f} "
        f"times, one that arrives first {seen[1]:.1f} times, one that arrives last "
        f"{seen.iloc[-1]:.1f} times."
    )


def forecast(run: RunConfig, found: Surface) -> str:
    """What stored runs say of a run, as HTML: their scores between them, and the nearest ones."""
    keys = [dict(config.flat_keys(each.to_dict())) for each in (run, found.like)]
    if differing := [key for key in SIZES if keys[0][key] != keys[1][key]]:
        words = ", ".join(f"{key}={keys[1][key]}" for key in differing)
        return f"<p>No prediction: the stored runs are of {words}.</p>"
    if not found.holds(run.mixture):
        return "<p>No prediction: no stored mixtures lie around this one.</p>"
    between, misses = found.predict(run.mixture), found.misses()
    scores = " and ".join(
        f"<b>{name} {row['mean']:.1f}%</b> ({row['low']:.1f} to {row['high']:.1f})"
        for name, row in between.iterrows()
    )
    near = found.nearest(run.mixture)
    near = near.map(lambda value: f"{value:.2f}" if isinstance(value, float) else value).assign(
        A_KA=[f"{value:.1f}" for value in near["A_KA"]],
        A_ZS=[f"{value:.1f}" for value in near["A_ZS"]],
    )
    return (
        f"<p>Between the stored runs: {scores}, 95% t-intervals over {len(found.scores)} "
        f"replicates. Interpolation adds to them: where a stored mixture is left out, it misses by "
        f"{misses['A_KA']:.1f} and {misses['A_ZS']:.1f} points.</p>"
        f"<b>The nearest stored runs</b>, by the share of a batch that differs{html_table(near)}"
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
        name: statistics.expected_counts(mixture, 64, 8, 40, 0.1 * POOL, ARRIVING / 8)
        for name, mixture in STILLS.items()
    }
    parts = pd.DataFrame({name: parts.iloc[-1] for name, (parts, _) in cases.items()}).T
    return inputs.batch_mixture(parts, cases["thirds (right)"][1])


def mixture_explorer(
    published: pd.DataFrame | None = None, pool: int = POOL, arriving: int = ARRIVING
) -> ipywidgets.VBox:
    """A point in the triangle of P, D and B, batch, tasks, steps and replay share -> the batch,
    what is seen, what stored runs with such mixtures scored, and the command.

    published: the metrics of a study that has a setting `LIKE`. pool: images of the pretraining
    set; arriving: images of all updates together, evenly divided. `CmpError` if there are none.
    """
    if min(pool, arriving) <= 0:
        raise CmpError(f"mixture_explorer: sizes must be positive, not {pool} and {arriving}")
    found = None if published is None else analyses.surface(published, LIKE)
    points = {} if found is None else dict(zip(found.names, found.shares, strict=True))

    def draw(shares, batch, tasks, steps, replay) -> Drawn:
        run = run_of(shares, batch, tasks, steps, round(replay, 6))
        kept = max(1, round(run.mixture.replay * pool))
        parts, passes = statistics.expected_counts(
            run.mixture, batch, tasks, steps, kept, arriving / tasks
        )
        below = (forecast(run, found) if found else "") + copyable(schedule.assignments(run))
        figure = inputs.batch_mixture(parts, passes)
        return Drawn(figure, mixture_sentence(run.mixture, passes), below)

    return explorer({"shares": triangle(points), **_sliders()}, draw)


def _sliders() -> Mapping[str, ipywidgets.ValueWidget]:
    return {
        "batch": IntSlider(64, min=8, max=512, step=8, description="Batch"),
        "tasks": IntSlider(8, min=1, max=20, description="Tasks T"),
        "steps": IntSlider(40, min=5, max=200, description="Steps a task"),
        "replay": FloatLogSlider(
            0.1, min=-2, max=0, readout_format=".0%", description="Pool kept for replay"
        ),
    }
