"""A plan in words: YAML that `cmp run` takes, with all else as comments above it."""

import textwrap

import pandas as pd
import yaml

from cmp.claims import AGGREGATES
from cmp.planning.choosing import Plan
from cmp.planning.devices import DEVICES, GIGA

WIDTH = 98


def as_yaml(plan: Plan, comments: bool = True) -> str:
    """The run's file; what it costs and why in comments above, if they are wanted."""
    text = yaml.safe_dump(plan.tree, sort_keys=False)
    if not comments:
        return text
    lines = [line for said in paragraphs(plan) for line in textwrap.wrap(said, WIDTH)]
    return "".join(f"# {line}\n" for line in lines) + text


def paragraphs(plan: Plan) -> list[str]:
    """What a plan is, costs and comes to; one sentence or two each."""
    found = [summary(plan), cost_sentence(plan), place_sentence(plan)]
    found += [f"Note: {each}" for each in plan.notes]
    found += [
        f"Effect of {row.choice}: A_KA {row.A_KA}, A_ZS {row.A_ZS} (chapter {row.study})."
        for row in plan.effects.itertuples()
    ]
    return found + [f"Rejected: {name}. {why}." for name, why in plan.rejected.items()]


def summary(plan: Plan) -> str:
    """The plan in a sentence."""
    run = plan.run
    mixture, method = run.mixture, run.method.name
    policy = {"ema": "EMA-Merge", "last-unrolled": "an average deployed, training goes on"}
    what = "everything trained" if method == "full" else f"trained by {method}"
    return (
        f"{run.model.name}: {run.stream.tasks:,} updates of {run.training.steps:,} steps at batch "
        f"{run.training.batch}, {what}; batches of {mixture.pretraining:.0%} pretraining "
        f"data, {mixture.update:.0%} update, {mixture.buffer:.0%} earlier updates; "
        f"{policy[run.merging.policy]}."
    )


def cost_sentence(plan: Plan) -> str:
    """What it costs, and by which assumptions."""
    costs, device = plan.costs, DEVICES[plan.wish.device]
    return (
        f"Training costs {costs.flops:.3g} FLOPs ({costs.gmafs:.3g} memory-adjusted GFLOPs), "
        f"{costs.hours:.3g} hours on {plan.wish.device} ({device.about}), "
        f"{costs.memory / GIGA:.3g} GB of memory as accounted for, and {costs.disk / GIGA:.3g} GB "
        "of disk for checkpoints; scoring comes on top."
    )


def place_sentence(plan: Plan) -> str:
    """Where stored runs like it ended, or that there are none."""
    if plan.place is None:
        return (
            f"No numbers for where it will end: {plan.outside}. Below stand the signs of effects "
            "in the stored runs, largest first; sizes do not carry over."
        )
    scores = ", ".join(
        f"{name} {row['mean']:.1f}% ({row['low']:.1f} to {row['high']:.1f})"
        for name, row in plan.place.scores.loc[list(AGGREGATES)].iterrows()
    )
    own = f" It differs in {', '.join(plan.place.differs)}." if plan.place.differs else ""
    return (
        f"The nearest stored runs, {plan.place.setting!r} of study {plan.place.study}, ended at "
        f"{scores}: 95% t-intervals over {plan.place.n} replicates.{own}"
    )


def costs_table(plan: Plan) -> pd.DataFrame:
    """The same numbers as a table of text, a row a quantity."""
    costs = plan.costs
    rows = {
        "FLOPs of training": f"{costs.flops:.3g}",
        "memory-adjusted GFLOPs": f"{costs.gmafs:.3g}",
        f"hours on {plan.wish.device}": f"{costs.hours:.3g}",
        "GB of memory": f"{costs.memory / GIGA:.3g}",
        "GB of disk": f"{costs.disk / GIGA:.3g}",
    }
    return pd.DataFrame({"what": list(rows), "amount": list(rows.values())})
