"""The scale explorer: what size, steps and updates come to, at the end or as changes."""

import ipywidgets
import pandas as pd
from ipywidgets import Dropdown

from cmp import claims
from cmp.analyses import scaling
from cmp.plots import scaling as plot_scaling
from cmp.studies import Study
from cmp.widgets.view import Drawn, explorer, html_table

COMPUTE = "Compute, in runs of the cpu profile"
QUESTIONS = {
    "Size, for the same compute": (scaling.sizes, COMPUTE),
    "Steps of an update": (scaling.steps, COMPUTE),
    "Number of updates, for the same compute": (scaling.updates, "Updates that share it"),
}
MEASURES = {"End of the stream": "end", "Change through the stream": "change"}
PANELS = {"A_KA": "A_KA (%)", "A_ZS": "A_ZS (%)", "GM": "Geometric mean (%)"}
CHANGES = {name: f"Change of {label}".replace("(%)", "(points)") for name, label in PANELS.items()}


def scale_explorer(study: Study, trajectory: pd.DataFrame) -> ipywidgets.VBox:
    """A question and a measure -> the study's curves. trajectory: of its published runs."""
    costs = scaling.costs(study)
    points = {at: costs.join(claims.means(trajectory, at)) for at in MEASURES.values()}
    controls = {
        "question": Dropdown(options=list(QUESTIONS), description="Question"),
        "measure": Dropdown(options=list(MEASURES), description="Measure"),
    }

    def draw(question, measure) -> Drawn:
        select, label = QUESTIONS[question]
        at = MEASURES[measure]
        rows = select(points[at])
        best = rows.loc[rows["GM"].idxmax()]
        sentence = (
            f"Highest in the geometric mean: {best.name}, {best['steps']} steps in each of "
            f"{best['updates']} updates."
        )
        panels = PANELS if at == "end" else CHANGES
        shown = rows[["updates", "steps"]].join(rows[list(PANELS)].round(1)).astype(str)
        below = html_table(shown.rename_axis("setting").reset_index())
        return Drawn(plot_scaling.curves(rows, "x", panels, label), sentence, below)

    return explorer(controls, draw)
