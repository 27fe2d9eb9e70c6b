"""The scale explorer: what size, steps and updates come to, at the end or as changes."""

import ipywidgets
import pandas as pd
from ipywidgets import Dropdown
from lab import analyses
from lab.explorers.view import Drawn, explorer, html_table
from lab.figures import methods

from cmp.experiments.claims import setting_means
from cmp.experiments.studies import Study

COMPUTE = "Compute, in runs of the cpu profile"
QUESTIONS = {
    "Size, for the same compute": (analyses.size_rows, COMPUTE),
    "Steps of an update": (analyses.step_rows, COMPUTE),
    "Number of updates, for the same compute": (analyses.update_rows, "Updates that share it"),
}
MEASURES = {"End of the stream": "end", "Change through the stream": "change"}
PANELS = {"A_KA": "A_KA (%)", "A_ZS": "A_ZS (%)", "GM": "Geometric mean (%)"}
CHANGES = {name: f"Change of {label}".replace("(%)", "(points)") for name, label in PANELS.items()}


def scale_explorer(study: Study, trajectory: pd.DataFrame) -> ipywidgets.VBox:
    """A question and a measure -> the study's curves. trajectory: of its published runs."""
    costs = analyses.setting_costs(study)
    points = {at: costs.join(setting_means(trajectory, at)) for at in MEASURES.values()}
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
        return Drawn(methods.scaling_curves(rows, "x", panels, label), sentence, below)

    return explorer(controls, draw)
