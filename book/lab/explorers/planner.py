"""The planner: what one has and what must be kept -> a run, its costs, where such runs ended."""

import html

import ipywidgets
import pandas as pd
from ipywidgets import BoundedIntText, Dropdown, FloatLogSlider, FloatSlider, IntSlider
from lab.explorers.view import Drawn, explorer, html_table
from lab.figures import methods

from cmp import models
from cmp.experiments import evidence, planner
from cmp.experiments.evidence import Evidence
from cmp.experiments.paper import CATALOGUE_MODELS
from cmp.experiments.planner import Plan, PlanRequest

BUFFERS = {"all that arrives": None, "1000 images": 1000, "300 images": 300, "nothing": 0}
POOLS = {"pretraining data": False, "public data instead": True}


def planner_explorer(known: Evidence | None = None) -> ipywidgets.VBox:
    """Model, compute, updates, what must be kept and what can be replayed -> the plan of them.

    known: what studies found, see `cmp.planning.gather`; all that is published where left out.
    """
    known = evidence.gather_evidence() if known is None else known

    def draw(hours, images, pool, other, **values) -> Drawn:
        real = values["model"] not in models.family_names()
        wish = PlanRequest(
            gpu_hours=float(f"{hours:.3g}"), images=images if real else None,
            pool=0.0 if other else round(pool, 2), other_pool=other, **values,
        )  # fmt: skip
        plan = planner.make_plan(wish, known)
        return Drawn(methods.plan_picture(plan, known), planner.plan_summary(plan), below(plan))

    return explorer(_controls(), draw)


def _controls() -> dict[str, ipywidgets.ValueWidget]:
    """By the names of `Wish`."""
    return {
        "model": Dropdown(
            options=[*models.family_names(), *CATALOGUE_MODELS], value="tiny", description="Model"
        ),
        "device": Dropdown(options=list(planner.DEVICES), value="core", description="Device"),
        "hours": FloatLogSlider(
            0.0064, min=-4, max=4, step=0.05, readout_format=".2g", description="Hours on it"
        ),
        "updates": IntSlider(8, min=1, max=100, description="Updates"),
        "images": BoundedIntText(
            10_000, min=1, max=10_000_000, description="Images of each (real models)"
        ),
        "keep": Dropdown(options=_named(planner.KEEP), value="balance", description="Must be kept"),
        "new": Dropdown(options=_named(planner.NEW), value="both", description="What is new"),
        "pool": FloatSlider(
            0.1, min=0, max=1, step=0.05, readout_format=".0%", description="Of them at hand"
        ),
        "other": Dropdown(options=list(POOLS.items()), description="To replay"),
        "buffer": Dropdown(options=list(BUFFERS.items()), description="Buffer of updates"),
    }


def _named(words: dict[str, str]) -> list[tuple[str, str]]:
    return [(f"{name}: {text}", name) for name, text in words.items()]


def below(plan: Plan) -> str:
    """Costs, place, notes, effects, what was rejected, and the file, as HTML."""
    said = [planner.place_sentence(plan), *plan.notes]
    parts = "".join(f"<p>{html.escape(each, quote=False)}</p>" for each in said)
    rejected = pd.DataFrame(plan.rejected.items(), columns=["rejected", "why"])
    text = html.escape(planner.plan_as_yaml(plan, comments=False))
    return (
        f"{html_table(planner.costs_table(plan))}{parts}"
        f"<b>What each choice did in the stored runs</b>{html_table(plan.effects)}"
        f"<b>What was rejected</b>{html_table(rejected)}"
        "<b>Copy as a file for</b> <code>cmpt run FILE --dry-run</code> (a click marks it all)"
        f'<pre style="user-select: all">{text}</pre>'
    )
