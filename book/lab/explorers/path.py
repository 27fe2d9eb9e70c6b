"""The path between two models, scored on the spot wherever a slider stops."""

import time

import ipywidgets
import numpy as np
import pandas as pd
from ipywidgets import Dropdown, FloatSlider
from lab.explorers.view import Drawn, explorer
from lab.figures import methods

from cmp import evaluation, models
from cmp.data import Corpus
from cmp.merging.apply import merge
from cmp.merging.rules import MergeOptions, Weights

RULES = ("interpolation", "slerp")
PLACES = np.linspace(0, 1, 6)
SUBSET = 64
"""Images a dataset that are scored."""


def path_explorer(name: str, before: Weights, tuned: Weights, corpus: Corpus) -> ipywidgets.VBox:
    """The share of the fine-tuned model, and how it is combined with the one before -> its scores.

    name: the model's. The line is drawn through six shares; what the slider asks for is merged
    and evaluated at that moment, on fixed subsets of the tests.
    """
    network = models.create_model(name).eval()
    known: dict[tuple[str, float], pd.Series] = {}

    def scored(rule: str, share: float) -> pd.Series:
        if (rule, share) not in known:
            merged = merge(rule, [tuned, before], options=MergeOptions(weights=(share, 1 - share)))
            network.load_state_dict(merged)
            found = evaluation.evaluate(network, name, corpus, subset=SUBSET).summary()
            known[rule, share] = pd.Series(found, name=share)
        return known[rule, share]

    def draw(share: float, rule: str) -> Drawn:
        moved = bool(known)  # what is drawn first is stored in notebooks, and says no time
        between = pd.DataFrame([scored(rule, float(each)) for each in PLACES])
        started, new = time.perf_counter(), moved and (rule, round(share, 6)) not in known
        here = scored(rule, round(share, 6))
        took = f" Merged and scored in {time.perf_counter() - started:.1f} s." if new else ""
        words = ", ".join(f"{key} {value:.1f}%" for key, value in here.items())
        sentence = f"{share:.2f} of the fine-tuned weights, by {rule}: {words}.{took}"
        return Drawn(methods.merge_path(between, here), sentence)

    controls = {
        "share": FloatSlider(0.5, min=0, max=1, step=0.05, description="Share of fine-tuned"),
        "rule": Dropdown(options=RULES, description="Rule"),
    }
    return explorer(controls, draw)
