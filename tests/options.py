"""Every choice that a run's config offers, so that a new one is tested without being named here."""

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pandas as pd
import pytest

from cmp import config, mixtures, registry, starts
from cmp.config import RunConfig
from cmp.embedded import packed
from cmp.embedded.manifest import embedded_manifests
from cmp.methods import ewc
from cmp.readers import class_statistics

KIND_OF = {about.key: kind for kind, about in registry.KINDS.items()}
"""Key that names an option -> the option's kind."""
TABLES = {
    "mixture.pool": mixtures.ROLE_OF_POOL,
    "method.fisher": ewc.FISHERS,
} | {key: registry.option_names(kind) for key, kind in KIND_OF.items()}
"""What must hold a row for each name of a key."""

WITH = {
    "stream.order=listed": ("stream.traits=by-hand",),
    "mixture.policy=class-balanced": ("mixture.capacity=40",),
    "schedule.meta=free": ("schedule.peaks=[1.0, 0.5]",),
    "merging.reverse=true": ("merging.policy=zero-all", "merging.shares=power"),
    "merging.zero=true": ("merging.policy=zero-all",),
    "merging.policy=wsm": ("merging.window=0.6",),  # two of three steps
    "merging.policy=wsm-last": ("merging.window=0.6",),
}
"""What else a choice needs, to be valid or to matter in a run of a few steps, besides what it
declares."""

NOT_SHIPPED = ("model.start", "cosine")
"""A base that has to be made first; its weights take the same way as the others'."""
OF_OTHER_DATA = ("stream.order", "given")
"""An order of data that name their updates; `test_updates.py` has some."""

ALIKE = ("tiny-double", "tiny-quad", "tiny-one", "small-quarter")
"""Networks of the layers of `tiny-half` or `small`, in other sizes."""

ALSO = {
    "merging.rule": ("merging.policy=ema",),
    "method.fold": ("method.name=dora",),
    "method.fisher": ("method.name=ewc", "method.batches=1"),
    "merging.shares": ("merging.policy=zero-all",),
}
"""What else every choice of a key needs, to be used at all."""


def declared_needs(key: str, name: str) -> list[str]:
    """What an option needs by what it declares: a capacity, or a curve other than the default."""
    facts = registry.get_option(KIND_OF[key], name).facts if key in KIND_OF else {}
    needs = ["mixture.capacity=40"] if facts.get("capacity") == "required" else []
    if facts.get("curve") not in (None, config.Schedule().name):
        needs.append(f"schedule.name={facts['curve']}")
    return needs


def choices() -> dict[str, tuple]:
    """Every key that takes one of some names, or true and false, with its values; of `model.start`
    those that need no file."""
    values: dict[str, tuple] = {"model.start": config.STARTS}
    for key, kind in KIND_OF.items():
        values[key] = tuple(registry.option_names(kind))
    for section in dataclasses.fields(RunConfig)[1:]:  # the first is `data`
        for field in dataclasses.fields(section.type):
            if get_origin(field.type) is Literal:
                values[f"{section.name}.{field.name}"] = get_args(field.type)
            elif field.type in (bool, bool | None):
                values[f"{section.name}.{field.name}"] = (False, True)
    return values


def settings() -> list[tuple[str, ...]]:
    """Assignments to the defaults for every choice but the default, and for every model."""
    rows = [(f"model.name={name}",) for name in starts.family_names()]
    for key, names in choices().items():
        for name in names:
            if (key, name) in (NOT_SHIPPED, OF_OTHER_DATA):
                continue
            text = f"{key}={name if isinstance(name, str) else json.dumps(name)}"
            needs = (*declared_needs(key, name), *WITH.get(text, ()), *ALSO.get(key, ()))
            rows.append((text, *needs))
    return rows


def one_in(
    count: int, values: Iterable[Any], kind: Callable[[Any], object] = lambda value: None
) -> list:
    """Values for `parametrize`: of each kind every `count`-th stays in the fast suite, from the
    first on; the others are long. A value is one argument, or what `pytest.param` gave."""
    seen, found = Counter(), []
    for value in values:
        param = value if hasattr(value, "marks") else pytest.param(value)
        of_kind = kind(param.values[0])
        marks = (*param.marks, *([pytest.mark.long] if seen[of_kind] % count else []))
        seen[of_kind] += 1
        found.append(pytest.param(*param.values, marks=marks, id=param.id))
    return found


def families() -> list:
    """Values for `parametrize`: the embedded models; of networks of the same layers all but `tiny`
    and `tiny-half` are long."""
    names = starts.family_names()
    return [pytest.param(name, marks=[pytest.mark.long] * (name in ALIKE)) for name in names]


def key_of(row: tuple[str, ...]) -> str:
    """The key that a row of `SETTINGS` is about: a kind of choice, for `one_in`."""
    return row[0].partition("=")[0]


SETTINGS = settings()
SMALL = (
    "stream.tasks=2", "training.steps=3", "training.batch=8", "evaluation.subset=1",
    "evaluation.full=false",
)  # fmt: skip


def small(*assignments: str) -> RunConfig:
    """A run of two tasks of three steps."""
    return config.parse(config.override({}, [*SMALL, *assignments]))


def write_list() -> Path:
    """Write the list that `stream.order=listed` follows in tests: flags, by name."""
    flags = packed.read_packed(embedded_manifests()["new-flags"]).header.classes
    entries = [f"new-flags+++{name}" for name in flags]
    positions = pd.DataFrame({"entry": entries, "position": range(len(entries))})
    return class_statistics.write_statistics(positions, "by-hand")
