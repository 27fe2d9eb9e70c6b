"""Figures of a plan: where stored runs like it ended, or the signs of its choices' effects."""

import pandas as pd
from matplotlib.figure import Figure

from cmp.claims import AGGREGATES
from cmp.planning import Evidence, Plan
from cmp.plots import AXES, COLOURS, canvas

SIGNS = {"+": COLOURS[0], "−": COLOURS[3]}


def draw(plan: Plan, known: Evidence) -> Figure:
    """The plane of A_KA and A_ZS with the place of a plan; signs alone where there is no place."""
    return signs(plan.effects) if plan.place is None else place(plan, known)


def place(plan: Plan, known: Evidence) -> Figure:
    """Every stored setting of the plan's model, pale, and the nearest one with its intervals."""
    x, y = AGGREGATES[:2]
    note = f"Blue: {plan.place.setting}, study {plan.place.study}, with 95% t-intervals. "
    note += "Grey: all other stored settings of this model."
    with canvas(9, 5.4, note) as (figure, axes):
        for (study, setting), run in known.runs.items():
            if run.model.name == plan.run.model.name:
                means = known.scores(study, setting)[0]["mean"]
                axes.plot(means[x], means[y], "o", color="0.8", markersize=6, zorder=1)
        scores = plan.place.scores
        mean, half = scores["mean"], scores["high"] - scores["mean"]
        look = {"marker": "o", "markersize": 11, "color": COLOURS[0], "capsize": 4, "zorder": 5}
        axes.errorbar(mean[x], mean[y], xerr=half[x], yerr=half[y], **look)
        axes.set(xlabel=AXES[x], ylabel=AXES[y])
    return figure


def signs(effects: pd.DataFrame) -> Figure:
    """A row a choice, the largest effect first, and the side that it moves each aggregate to.

    effects: of a plan without numbers.
    """
    note = "Signs in the stored runs, by 95% intervals; largest effect first. "
    note += "o: no difference that is seen."
    with canvas(9, 1.6 + 0.55 * len(effects), note) as (figure, axes):
        for y, row in enumerate(effects.itertuples()):
            for x, sign in enumerate((row.A_KA, row.A_ZS)):
                text, colour = (sign, SIGNS[sign]) if sign in SIGNS else ("o", "0.55")
                axes.text(x, y, text, color=colour, ha="center", va="center", fontsize=20)
        axes.set_xticks(range(2), AGGREGATES[:2])
        axes.set_yticks(range(len(effects)), effects["choice"])
        axes.xaxis.tick_top()
        axes.tick_params(length=0)
        axes.set(xlim=(-0.6, 1.6), ylim=(len(effects) - 0.5, -0.5))
    return figure
