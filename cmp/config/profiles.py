"""Sizes of runs by profile, recipes, and what pretraining is, as trees that `parse` takes."""

import json
from collections.abc import Mapping
from typing import Any

from cmp.errors import CmpError

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
}
"""Sizes of a run, by profile."""


def profile(name: str) -> dict[str, Any]:
    """The tree of a profile; `CmpError` for an unknown one."""
    if name not in PROFILES:
        raise CmpError(f"profile {name!r}: there are {', '.join(PROFILES)}")
    return json.loads(json.dumps(PROFILES[name]))


RECIPES: dict[str, dict[str, Any]] = {
    "default": {
        "mixture": {"pretraining": 0.25, "update": 0.25, "buffer": 0.5},
        "optimizer": {"carry": True},
        "merging": {"policy": "last-unrolled"},
    },
}
"""What chapter 08 recommends to begin with, on top of any profile."""


def expanded(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a tree with all that its `recipe` says of keys that it does not set; `CmpError` for
    an unknown one."""
    tree = dict(tree)
    if "recipe" not in tree:
        return tree
    if (name := tree.pop("recipe")) not in list(RECIPES):
        raise CmpError(f"recipe: {name!r:.60}: there is {', '.join(RECIPES)}")
    below = json.loads(json.dumps(RECIPES[name]))
    for key in below.keys() & tree.keys():
        if isinstance(tree[key], Mapping):
            below[key] |= tree[key]
        else:  # which `parse` refuses by its name
            below[key] = tree[key]
    return tree | below


PRETRAINING: dict[str, Any] = {
    "model": {"start": "random"},
    "stream": {"tasks": 1},
    "mixture": {"pretraining": 1.0, "update": 0.0, "buffer": 0.0, "replay": 1.0},
    "schedule": {"name": "wsd", "peak": 2e-3, "warmup": 0.04},
    "training": {"steps": 2600, "batch": 128},
    "evaluation": {"subset": None},
}  # fmt: skip
"""Pretraining is a run: one task, the pool alone, random weights."""

PRETRAINING_OF: dict[str, tuple[str, ...]] = {"tiny-vit": ("training.steps=4000",)}
"""Where a model's pretraining differs from `PRETRAINING`, as key=value."""
