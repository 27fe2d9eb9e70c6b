"""Model and compute scaling: what a study's settings cost, and what they came to beside that."""

import numpy as np
import pandas as pd

from cmp import budgets, config
from cmp.claims import AGGREGATES, ranks
from cmp.config import RunConfig
from cmp.studies import Study

GIGA = 1e9


def compute(run_config: RunConfig) -> float:
    """Memory-adjusted FLOPs of a run's training in all (spec 1.2): of full fine-tuning, its FLOPs;
    of a method under a budget, what it uses of it."""
    found, tasks = budgets.of(run_config), run_config.stream.tasks
    if found is not None:
        return found.used(tasks)
    return tasks * run_config.training.steps * budgets.full_cost(run_config).step


def unit() -> float:
    """The FLOPs of the `cpu` profile's own run, which is what compute is told in."""
    return compute(config.parse(config.profile("cpu")))


def costs(study: Study) -> pd.DataFrame:
    """A row a setting of the `cpu` profile that learns anything: `model`, `method` (what trains, or
    the merging policy), `updates`, `steps` an update, and `compute` in multiples of the profile's
    own run."""
    grid = study.configs("cpu", 1)
    rows = {
        name: {
            "model": each.model.name,
            "method": _method(each),
            "updates": each.stream.tasks,
            "steps": budgets.applied(each).training.steps,
            "compute": compute(each) / unit(),
        }
        for (name, _), each in grid.items()
        if each.mixture.update > 0
    }
    return pd.DataFrame.from_dict(rows, orient="index")


def _method(run_config: RunConfig) -> str:
    merging, method = run_config.merging.policy, run_config.method.name
    return method if merging == "none" else merging


def agreements(table: pd.DataFrame, reference: str, others: list[str]) -> pd.DataFrame:
    """Mean rank correlation with `reference`, a row another family, a column an aggregate, with the
    lowest and the highest of a replicate; in the last row that of the reference's replicates with
    each other, which no other family can be expected to exceed.

    table: as `claims.by_replicate` gives it.
    """
    rows = {name: {} for name in [*others, f"{reference}, other replicates"]}
    for aggregate in AGGREGATES:
        scores = table[aggregate].dropna(axis=0, how="all")
        found = {name: ranks.agreement(scores, reference, name).dropna() for name in others}
        found[f"{reference}, other replicates"] = ranks.repeatability(scores, reference)
        for name, values in found.items():
            rows[name] |= {aggregate: values.mean()}
            rows[name] |= {
                f"{aggregate} lowest": values.min(),
                f"{aggregate} highest": values.max(),
            }
    return pd.DataFrame.from_dict(rows, orient="index")


def sizes(costs: pd.DataFrame) -> pd.DataFrame:
    """Those of `costs` that take the family's members through the stream, by `compute`: `group` is
    the model."""
    rows = costs[(costs["model"] != "tiny") & (costs["method"] == "full")]
    return rows.assign(group=rows["model"], x=_nominal(rows["compute"]))


def _nominal(compute: pd.Series) -> pd.Series:
    """The power of two that is meant: whole steps cost a few hundredths more or less."""
    return 2.0 ** np.log2(compute).round()


def steps(costs: pd.DataFrame) -> pd.DataFrame:
    """Those of `tiny` in the profile's number of updates, by `compute`: `group` is the method."""
    updates = config.profile("cpu")["stream"]["tasks"]
    rows = costs[(costs["model"] == "tiny") & (costs["updates"] == updates)]
    return rows.assign(group=rows["method"], x=_nominal(rows["compute"]))


def updates(costs: pd.DataFrame) -> pd.DataFrame:
    """Those of `tiny` for the compute of the profile's run, by `updates`: `group` is the method."""
    rows = costs[(costs["model"] == "tiny") & costs["compute"].between(0.9, 1.1)]
    return rows.assign(group=rows["method"], x=rows["updates"])
