"""Sizes of runs by profile, recipes, and what pretraining is, as trees that `parse` takes."""

import json
from collections.abc import Mapping
from typing import Any

from cmp.config.schedule import Schedule
from cmp.errors import CmpError

PEAK = Schedule().peak

PROFILES: dict[str, dict[str, Any]] = {
    "quick": {
        "stream": {"tasks": 4},
        "training": {"steps": 20, "batch": 32},
        "evaluation": {"subset": 64, "full": False},
    },
    "cpu": {
        "stream": {"tasks": 8},
        "training": {"steps": 40, "batch": 64},
        "evaluation": {"subset": 64},
    },
    "gpu": {
        "data": "fomo",
        "model": {"name": "ViT-B-16", "start": "laion2b_s34b_b88k"},
        "stream": {"tasks": 20},
        "mixture": {"pretraining": 0.33, "update": 0.34, "buffer": 0.33},
        "schedule": {"peak": 1e-5},
        "optimizer": {"beta2": 0.999, "weight_decay": 0.2},
        "training": {"steps": 1428, "batch": 512, "budget": 1.0},
        "evaluation": {"subset": 1000},
    },
}
"""Sizes of a run, by profile. `gpu` is the paper's default (spec 1.2, 1.3): a cosine with a tenth
of warmup, gradients clipped at 1, and as many steps as 1.8e9 memory-adjusted GFLOPs buy by our
count; `replay` is a tenth of the pool, and decay acts on matrices only, as everywhere here."""

OWN_MODEL = ("gpu",)
"""Profiles of a model that is not embedded."""


def profile(name: str) -> dict[str, Any]:
    """The tree of a profile; `CmpError` for an unknown one."""
    if name not in PROFILES:
        raise CmpError(f"profile {name!r}: there are {', '.join(PROFILES)}")
    return json.loads(json.dumps(PROFILES[name]))


def translates(changes: dict[str, Any], name: str) -> bool:
    """Whether what a study changes can be asked of a profile: not the embedded models by name of
    one that has a model of its own."""
    return name not in OWN_MODEL or not any(key.startswith("model.") for key in changes)


def translated(changes: dict[str, Any], name: str) -> dict[str, Any]:
    """What a study changes, in a profile's own terms. Studies are written for `cpu`, so for a
    profile with a model of its own a peak is so many times that model's, and steps and tasks are so
    many times the profile's."""
    if name not in OWN_MODEL:
        return changes
    found, own, cpu = dict(changes), PROFILES[name], PROFILES["cpu"]
    if "schedule.peak" in found:
        peak = found["schedule.peak"] / PEAK * own["schedule"]["peak"]
        found["schedule.peak"] = float(f"{peak:.3g}")
    for key in ("training.steps", "stream.tasks"):
        if key in found:
            room, leaf = key.split(".")
            found[key] = round(found[key] * own[room][leaf] / cpu[room][leaf])
    return found


RECIPES: dict[str, dict[str, Any]] = {
    "default": {
        "mixture": {"pretraining": 0.25, "update": 0.25, "buffer": 0.5},
        "optimizer": {"carry": True},
        "merging": {"policy": "last-unrolled"},
    },
}
"""What chapter 08 recommends to begin with, on top of any profile."""


def expanded(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a tree with all that its `recipe` says of keys that it does not set."""
    tree = dict(tree)
    return laid_over(recipe(tree.pop("recipe")), tree) if "recipe" in tree else tree


def recipe(name: str) -> dict[str, Any]:
    """The tree of a recipe; `CmpError` for an unknown one."""
    if name not in list(RECIPES):
        raise CmpError(f"recipe: {name!r:.60}: there is {', '.join(RECIPES)}")
    return json.loads(json.dumps(RECIPES[name]))


def laid_over(below: dict[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Both trees in one; where both set a key, as `above` has it."""
    result = below | dict(above)
    for key in below.keys() & above.keys():
        if isinstance(below[key], Mapping) and isinstance(above[key], Mapping):
            result[key] = {**below[key], **above[key]}
    return result


PRETRAINING: dict[str, Any] = {
    "model": {"start": "random"},
    "stream": {"tasks": 1},
    "mixture": {"pretraining": 1.0, "update": 0.0, "buffer": 0.0, "replay": 1.0},
    "schedule": {"name": "wsd", "peak": 2e-3, "warmup": 0.04},
    "training": {"steps": 2600, "batch": 128},
    "evaluation": {"subset": None},
}  # fmt: skip
"""Pretraining is a run: one task, the pool alone, random weights."""

PRETRAINING_OF: dict[str, tuple[str, ...]] = {
    "tiny-half": ("training.steps=5200",),
    "tiny-one": ("training.steps=5200",),
    "tiny-double": ("training.steps=5200", "schedule.peak=0.0014"),
    "tiny-quad": ("training.steps=5200", "schedule.peak=0.001"),
    "tiny-vit": ("training.steps=4000",),
}
"""Where a model's pretraining differs from `PRETRAINING`, as key=value."""
