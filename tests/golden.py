"""Golden results: what every choice of a config, every merging rule and every published run gave.

`python -m tests.golden` adds to `golden.json` what is missing there, such as the run of a new
choice. It refuses to change what stands there, unless `NUMERICS` was raised.
"""

import functools
import hashlib
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch

from cmp import NUMERICS, config, models, schedules
from cmp.config import RunConfig
from cmp.data import Corpus, load_data
from cmp.embedded import packed
from cmp.errors import CmpError
from cmp.merging.apply import merge
from cmp.merging.rules import Weights
from cmp.registry import get_option, option_names
from cmp.runs import identity
from cmp.runs.machine import machine_differences, machine_record
from cmp.runs.runner import Observer, execute
from cmp.seeds import numpy_generator
from lab.evidence import results, studies
from tests import forked, options

PATH = Path(__file__).with_suffix(".json")
DEFAULT_RUNS = {
    f"{name} {precision}": [f"model.name={name}", f"training.precision={precision}"]
    for name in ("small", "tiny-vit")  # one of each architecture
    for precision in ("bf16", "fp32")
}
SMALL = ["stream.tasks=2", "training.steps=3", "training.batch=16", "evaluation.subset=8"]
EPS = 1e-4
STEADY = ("training.precision=fp32", f"optimizer.eps={EPS}", "schedule.peak=2e-4")
"""Settings under which rounding stays rounding: with AdamW's usual eps a gradient of nearly zero
makes a whole step, in a direction that its last bits decide."""
STRONG_DECAY = "strong weight decay"
DEFAULT_RUNS[STRONG_DECAY] = [*STEADY, "optimizer.weight_decay=5.0"]

ENOUGH = {
    "merging.policy": ("stream.tasks=4",),  # some differ only in what a fourth starts from
    "merging.shares": ("stream.tasks=3",),  # of two models, several shares are the same
    "merging.reverse": ("stream.tasks=3",),
    "schedule.name": ("training.steps=9",),  # three steps are too few for a cooldown
    "schedule.meta": ("training.steps=9",),
    "method.fisher": ("method.strength=100",),  # else penalties vanish in so few small steps
    "method.name=ewc": ("method.strength=100",),
    "method.name=si": ("method.strength=1000000",),
}
"""What the golden runs of a key or a row need besides, to differ from each other."""
WHOLE = ("stream", "mixture")
"""Sections whose rows take the whole benchmark; the others do with a small part of it."""

CLOSE = 1e-5
"""Relative tolerance between processors, which sum in different orders."""
ROUGH = 0.02
"""The same in bf16, which keeps 8 bits, or with AdamW's usual eps."""
CHOOSING = set(option_names("merge_rule", linear=False)) - {"random", "dare"}
"""Rules that choose entries by their values; those two choose by chance alone."""

SHAPES = {
    "visual.transformer.resblocks.0.mlp.c_fc.weight": (300, 300),  # rules take it in two blocks
    "visual.transformer.resblocks.1.mlp.c_fc.weight": (40, 30),
    "visual.bn1.running_mean": (40,),
    "visual.bn1.num_batches_tracked": (),
    "transformer.resblocks.0.ln_1.bias": (40,),
    "transformer.resblocks.1.ln_1.bias": (40,),
    "text_projection": (40, 20),
    "logit_scale": (),
}
UNMOVED = "text_projection"
"""What the newest model has as the base has it, which some rules treat in a way of its own."""
WEIGHTS = {"interpolation": (0.5, 0.3, 0.2), "slerp": (0.7, 0.3)}


class Case(NamedTuple):
    """A golden run. whole: whether it is of the whole benchmark."""

    config: RunConfig
    whole: bool


def run_cases() -> dict[str, Case]:
    """The golden runs by name: the default runs, and one for each row of `options`."""
    found = {
        name: Case(
            config.parse(config.override({"evaluation": {"full": False}}, [*SMALL, *row])), True
        )
        for name, row in DEFAULT_RUNS.items()
    }
    for row in options.SETTINGS:
        section, key = row[0].partition(".")[0], row[0].partition("=")[0]
        needs = (*ENOUGH.get(key, ()), *ENOUGH.get(row[0], ()))
        found[" ".join(row)] = Case(options.small(*STEADY, *row, *needs), section in WHOLE)
    return found


@functools.cache
def corpus(whole: bool) -> Corpus:
    """The embedded benchmark, or a small part of it."""
    return packed.load_embedded() if whole else forked.small_corpus()


@functools.cache
def compute_run(case: Case) -> dict[str, Any]:
    """Id, losses, weights' hash and scores of a run. Rows that come to one case share it."""
    losses = []
    observer = Observer(step=lambda task, step, result, model: losses.append(result.loss.item()))
    result = execute(case.config, corpus(case.whole), observer)
    return {
        "id": identity.run_id_of(case.config, corpus(case.whole)),
        "weights": models.weights_digest(result.model),
        "losses": losses,
        "scores": result.metrics["score"].round(9).tolist(),
    }


def compute_rule(rule: str, dtype: torch.dtype) -> dict[str, Any]:
    """Hash, and sum and norm of each tensor, of what a rule makes of fixed models."""
    base, facts, made = synthetic("base", dtype), get_option("merge_rule", rule).facts, []
    for number in range(facts["count"] or 3):
        step = synthetic(f"model {number}", dtype)
        made.append({name: x + (step[name] / 8).to(x.dtype) for name, x in base.items()})
    made[0][UNMOVED] = base[UNMOVED].clone()
    settings = {"weights": WEIGHTS.get(rule), "draw": (0, 1, "golden")}
    found = merge(rule, made, base if facts["base"] else None, **settings)
    digest = hashlib.sha256()
    for name, x in found.items():
        digest.update(f"{name} {x.dtype} {list(x.shape)}\n".encode())
        digest.update(x.flatten().view(torch.uint8).numpy().data)
    return {
        "sha256": digest.hexdigest(),
        "sums": {name: x.double().sum().item() for name, x in found.items()},
        "norms": {name: x.double().norm().item() for name, x in found.items()},
    }


def synthetic(seed: str, dtype: torch.dtype) -> Weights:
    """A small state dict from a named seed, of integers over a power of two: no processor rounds
    them differently."""
    found = {}
    for name, shape in SHAPES.items():
        draw = numpy_generator("golden", 0, seed, name)
        x = torch.as_tensor(draw.integers(-(1 << 20), 1 << 20, shape))
        whole = name.endswith("num_batches_tracked")
        found[name] = x.abs() if whole else (x / (1 << 20)).to(dtype)
    return found


RULE_CASES = {
    f"{rule} {str(dtype).removeprefix('torch.')}": (rule, dtype)
    for rule in option_names("merge_rule")
    for dtype in (torch.float32, torch.bfloat16)
}


def compared(run_config: RunConfig) -> tuple[int, float]:
    """How many losses of a run are compared with those of another processor, and how closely."""
    training, optimizer = run_config.training, run_config.optimizer
    count = training.steps * run_config.stream.tasks
    if run_config.method.name == "galore":
        # its first step projects on singular vectors, and those of close singular values turn with
        # the rounding of the linear algebra library
        count = 1
    elif run_config.merging.rule in CHOOSING:
        # at the end of a task, an entry at the edge of being chosen may fall on either side
        count = training.steps
    rough = training.precision == "bf16" or optimizer.eps < EPS
    return count, ROUGH if rough else CLOSE


def run_changes(run_config: RunConfig, known: dict, found: dict, elsewhere: str) -> dict:
    """What of a run is not as known: key -> (known, found). elsewhere: where the machines differ;
    if they do not, everything must be equal to the bit."""
    changed = unequal(known, found)
    if not elsewhere:
        return changed
    count, tolerance = compared(run_config)
    alike = len(known["losses"]) == len(found["losses"]) and all(
        math.isclose(one, other, rel_tol=tolerance)
        for one, other in list(zip(known["losses"], found["losses"], strict=True))[:count]
    )
    keys = ("id",) if alike else ("id", "losses")
    return {key: pair for key, pair in changed.items() if key in keys}


def rule_changes(dtype: torch.dtype, known: dict, found: dict, elsewhere: str) -> dict:
    """The same of a rule's result. Elsewhere an entry may be rounded the other way."""
    changed = unequal(known, found)
    if not elsewhere:
        return changed
    tolerance = CLOSE if dtype == torch.float32 else torch.finfo(dtype).eps
    alike = known["norms"].keys() == found["norms"].keys() and all(
        abs(known[key][name] - found[key][name]) <= tolerance * norm
        for name, norm in known["norms"].items()
        for key in ("norms", "sums")
    )
    return {} if alike else changed


def unequal(known: dict, found: dict) -> dict:
    """Where two dicts of the same keys differ: key -> (known, found); more keys in `known` are
    ignored."""
    return {key: (known.get(key), x) for key, x in found.items() if known.get(key) != x}


def defaults() -> dict[str, Any]:
    """What a config means where it says nothing."""
    shares = {f"schedule.{kind} share": x for kind, x in schedules.DEFAULT_SHARES.items()}
    methods = {
        f"method.{key} of {name}": x
        for name in option_names("method")
        for key, x in get_option("method", name).settings.items()
        if config.defaults()[f"method.{key}"] is None
    }
    return config.defaults() | shares | methods


def chapters() -> list[str]:
    """The studies with published results."""
    return sorted(path.stem for path in results.RESULTS.glob("*.parquet"))


def published(chapter: str) -> dict[str, list[str]]:
    """The ids of a study's published runs of this `NUMERICS`: "chapter: setting" -> one a
    replicate."""
    columns = ["setting", "replicate", "run", "provenance"]
    rows = pd.read_parquet(results.results_file(chapter), columns=columns).drop_duplicates()
    rows = rows[[json.loads(text)["numerics"] == NUMERICS for text in rows["provenance"]]]
    rows = rows.sort_values("replicate", kind="stable")
    return {f"{chapter}: {name}": list(ids) for name, ids in rows.groupby("setting")["run"]}


def recomputed(chapter: str) -> tuple[dict[str, list[str | None]], int]:
    """The same from a study's grid, and how many are left out, as None: their bases are of a start
    that does not ship, and not here."""
    found: dict[str, list[str | None]] = {}
    for (name, _), each in studies.load_study(chapter).configs("cpu").items():
        known = each.model.start != options.NOT_SHIPPED[1] or identity.has_start(each)
        run_id = identity.run_id_of(each, load_data(each.data)) if known else None
        found.setdefault(f"{chapter}: {name}", []).append(run_id)
    return found, sum(ids.count(None) for ids in found.values())


@functools.cache
def read() -> dict[str, Any]:
    """The golden results as committed."""
    return json.loads(PATH.read_text())


def differences(entry: dict[str, Any]) -> str:
    """Where this machine differs from the one that a golden result was computed on."""
    return machine_differences(read()["machines"][entry["machine"]], machine_record())


def update() -> None:
    """Add what is missing; `CmpError` where something that is there would change."""
    known = read() if PATH.exists() else {"numerics": None}
    if known["numerics"] != NUMERICS:
        known = {"machines": {}, "defaults": {}, "runs": {}, "rules": {}, "published": {}}
    changed = list(unequal(defaults(), known["defaults"]))
    cases = run_cases()
    found_runs = {name: compute_run(each) for name, each in cases.items()}
    found_rules = {name: compute_rule(*case) for name, case in RULE_CASES.items()}
    found_ids = {name: ids for each in chapters() for name, ids in published(each).items()}
    for name, entry in known["runs"].items():
        found = found_runs.get(name)
        if not found or run_changes(cases[name].config, entry, found, differences(entry)):
            changed.append(name)
    for name, entry in known["rules"].items():
        found = found_rules.get(name)
        if not found or rule_changes(RULE_CASES[name][1], entry, found, differences(entry)):
            changed.append(name)
    changed += unequal(found_ids, known["published"])
    if changed:
        raise CmpError(
            f"{PATH.name}: {len(changed)} of NUMERICS {NUMERICS} changed or are gone, such as "
            f"{changed[0]!r}; raise NUMERICS in cmp/__init__.py first, or delete the lines of what "
            "is meant to go, or was published anew"
        )
    machines, here = known["machines"], machine_record()
    number = next((key for key, x in machines.items() if x == here), str(len(machines) + 1))
    new_runs = {name: {"machine": number} | x for name, x in found_runs.items()}
    new_rules = {name: {"machine": number} | x for name, x in found_rules.items()}
    tree = {
        "machines": machines | {number: here},
        "defaults": defaults() | known["defaults"],
        "runs": new_runs | known["runs"],
        "rules": new_rules | known["rules"],
        "published": found_ids | known["published"],
    }
    sections = [f'"numerics": {NUMERICS}']
    for name, entries in tree.items():
        lines = [f"{json.dumps(key)}: {json.dumps(x)}" for key, x in entries.items()]
        sections.append(f"{json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n}")
    PATH.write_text("{\n" + ",\n".join(sections) + "\n}\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    by_hand = options.write_list()
    try:
        update()
    finally:
        by_hand.unlink()
