"""Limits that a new model must keep before it is served, read from a YAML file.

    all: {drop: 1}                  # the mean of all sets falls by at most a point
    A_ZS: {drop: 2, lost: 15}       # of what was right on known content, 15% may go wrong
    A_KA: {drop: 1}                 # the mean over the images of all updates, early ones included
    each: {drop: 5}                 # every set falls by at most five points
    sets: {emoji-signs: {drop: 1, sure: true}}   # overrides `each` for this set
    last_update: {gain: 3}          # the images of the last update gain at least three points
    each_update: {drop: 5, images: 200}   # each falls by at most five, if it has 200 test images
    updates: {2026-01: {drop: 2}}   # overrides `each_update` for one update

The images of one update are few, and there are more updates every month, so that some would break
a narrow limit by chance. With `images`, smaller updates are listed, but not judged.

Estimates are compared, since a gate that asked for certainty would stop every model whose test sets
are small, even an exact copy of the old one. `sure: true` asks for it: the whole 95% interval must
keep the limit, which a set of a few hundred images can hardly show for a limit of a few points. A
model with exactly the old one's features passes either way, as long as only losses are limited.
"""

import os
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import pandas as pd
from pydantic import Field
from pydantic.dataclasses import dataclass as checked_dataclass

from cmp.data import Corpus
from cmp.errors import CmpError, name_choices
from cmp.evaluation import ROLES
from cmp.parsing import check_record, read_yaml
from cmp.releases import sentences
from cmp.releases.compare import ALL, Comparison, shown_updates
from cmp.values import STRICT

ROUNDING = 1e-9
"""By how much a value may be beyond its limit, in points, since sums of weights are rounded."""
Points = Annotated[float, Field(ge=0, le=100)]
LIMITS = ("drop", "lost", "gain")
"""The keys of limits that are numbers to keep."""
EXAMPLE = "; a gate looks like `each: {drop: 5, lost: 20}` or `A_KA: {gain: 1, sure: true}`"


@checked_dataclass(frozen=True, config=STRICT)
class Limits:
    """The limits on a set, or on a mean of sets; None is no limit.

    Attributes:
        drop: The largest allowed fall of the score, in points.
        lost: The largest allowed percentage of right answers that became wrong.
        gain: The smallest required rise of the score, in points.
        sure: Whether the whole 95% interval must keep the limits, and not the estimate alone.
    """

    drop: Points | None = None
    lost: Points | None = None
    gain: Points | None = None
    sure: bool = False


@checked_dataclass(frozen=True, config=STRICT)
class UpdateLimits(Limits):
    """The limits on the images of an update.

    Attributes:
        images: The fewest test images with which an update is judged.
    """

    images: Annotated[int, Field(ge=1)] = 1


@checked_dataclass(frozen=True, config=STRICT)
class Gate:
    """The limits of a file.

    Attributes:
        all: Limits on the mean of all sets.
        A_KA: Limits on the mean of the sets of new content, whose role is "adapt".
        A_ZS: Limits on the mean of the sets of known content, whose role is "eval".
        each: Limits on every set.
        sets: Limits on single sets, in place of `each`.
        last_update: Limits on the images of the last update.
        each_update: Limits on the images of every update.
        updates: Limits on those of single updates by name, in place of `each_update`.
    """

    all: Limits = Limits()
    A_KA: Limits = Limits()
    A_ZS: Limits = Limits()
    each: Limits = Limits()
    sets: dict[str, Limits] = Field(default_factory=dict)
    last_update: UpdateLimits = UpdateLimits()
    each_update: UpdateLimits = UpdateLimits()
    updates: dict[str, UpdateLimits] = Field(default_factory=dict)


class GateLine(NamedTuple):
    """A limit, and whether it was kept.

    Attributes:
        key: Its key in the gate, such as "each.drop".
        scope: What it limits: the name of a dataset or an update, or "A_KA", "A_ZS" or "all".
        passed: Whether it is kept, or not judged.
        sentence: All of this in a sentence.
        judged: Whether there were enough images to judge it.
    """

    key: str
    scope: str
    passed: bool
    sentence: str
    judged: bool = True


def read_gate(path: Path) -> Gate:
    """Return the gate of a file.

    Args:
        path: A YAML file, see this module.

    Raises:
        CmpError: It cannot be read, has an unknown key or an invalid limit, or limits nothing.
    """
    gate = check_record(read_yaml(path), Gate, f"{path}: ", EXAMPLE)
    limits = [*_means(gate).values(), gate.each, gate.last_update, gate.each_update]
    limits += [*gate.sets.values(), *gate.updates.values()]
    if not any(map(_numbers, limits)):
        raise CmpError(f"{path}: this gate limits nothing{EXAMPLE}")
    return gate


def apply_gate(gate: Gate, comparison: Comparison) -> list[GateLine]:
    """Return every limit of a gate, and whether it was kept.

    Args:
        gate: The limits.
        comparison: The models.

    Raises:
        CmpError: It limits what was not compared, and would pass unseen.
    """
    check_scopes(gate, dict(comparison.sets["role"]), [*comparison.updates.index])
    lines = []
    for scope, limits in _means(gate).items():
        if _numbers(limits):
            lines += _apply(limits, scope, scope, comparison.summary.loc[scope])
    parts = {"sets": (comparison.sets, gate.sets, "each", gate.each)}
    parts["updates"] = comparison.updates, gate.updates, "each_update", gate.each_update
    for part, (table, own, usual_key, usual) in parts.items():
        for name, row in table.iterrows():
            key = f"{part}.{name}" if name in own else usual_key
            lines += _apply(own.get(str(name), usual), key, str(name), row)
    if _numbers(gate.last_update):
        label, name = _last_update(comparison.corpus)
        rows = comparison.updates[comparison.updates["label"] == label]
        row = rows.iloc[0] if len(rows) else pd.Series({"images": 0})
        lines += _apply(gate.last_update, "last_update", name, row)
    return lines


def _last_update(corpus: Corpus) -> tuple[str, str]:
    """Return the label and the name of the last update, which may have no test images."""
    arrived = np.flatnonzero(corpus.table["dataset"].isin(corpus.by_role("adapt")))
    return [*shown_updates(corpus, arrived).items()][-1]


def check_scopes(gate: Gate, roles: Mapping[str, str], updates: Collection[str]) -> None:
    """Raise `CmpError` if a gate limits a set, an update or a mean that is not compared.

    Args:
        gate: The limits.
        roles: The role of each set that is compared.
        updates: The names of the updates whose images are compared.
    """
    for scope, role in ROLES.items():
        if _numbers(_means(gate)[scope]) and role not in roles.values():
            raise CmpError(
                f"gate: {scope}: no set of role {role} is compared; take the key out, or give such "
                "a set"
            )
    for name in gate.sets:
        if name not in roles:
            choices = name_choices(name, list(roles))
            raise CmpError(f"gate: sets.{name}: no such set is compared{choices}")
    for name in gate.updates:
        if name not in updates:
            choices = name_choices(name, list(updates)) if updates else ""
            raise CmpError(f"gate: updates.{name}: no image of it is compared{choices}")
    for key, limits in (("last_update", gate.last_update), ("each_update", gate.each_update)):
        if _numbers(limits) and not updates:
            raise CmpError(
                f"gate: {key}: no images of updates are compared; take the key out, or compare "
                "releases"
            )


def check_gate(gate: Gate | str | os.PathLike[str], comparison: Comparison) -> list[str]:
    """Return the limits that a new model breaks, in sentences.

    A gate is a YAML file that limits the mean of `all` sets, `A_KA`, `A_ZS`, `each` set, or some
    `sets` by name, in place of `each`. In the same way it limits the images of `each_update`, or
    of some `updates` by name, and those of the `last_update`. A limit is a largest `drop` or
    smallest `gain`, in points, or a largest percentage of right answers `lost`. It is checked
    against the estimate or, with `sure: true`, the worse end of the 95% interval. An update with
    fewer test `images` than its limits say is not judged.

    Args:
        gate: The limits, or their file.
        comparison: The models.

    Returns:
        A sentence per limit that is broken, which begins with its key; none where all are kept.

    Raises:
        CmpError: The file cannot be read, has an unknown key, or limits a set or a mean that was
            not compared.

    Example:
        >>> _ = (folder / "gate.yaml").write_text("A_ZS: {drop: 1, lost: 5, sure: true}")
        >>> itself = cmp.compare("small", "small", cmp.load_data("embedded"), subset=4)
        >>> cmp.check_gate(folder / "gate.yaml", itself)
        []
    """
    limits = gate if isinstance(gate, Gate) else read_gate(Path(os.path.expanduser(gate)))
    return [line.sentence for line in apply_gate(limits, comparison) if not line.passed]


def _means(gate: Gate) -> dict[str, Limits]:
    return {ALL: gate.all, "A_KA": gate.A_KA, "A_ZS": gate.A_ZS}


def _numbers(limits: Limits) -> dict[str, float]:
    """Return the limits that are given."""
    given = asdict(limits).items()
    return {key: limit for key, limit in given if key in LIMITS and limit is not None}


def _apply(limits: Limits, key: str, scope: str, row: pd.Series) -> list[GateLine]:
    """Return the lines of a set, or of a mean of sets, whose row has its numbers."""
    lines = []
    judged = not isinstance(limits, UpdateLimits) or row["images"] >= limits.images
    for name, limit in _numbers(limits).items():
        if judged:
            passed, sentence = _judge(limits, name, limit, row)
        else:
            count = sentences.count_of(int(row["images"]), "test image")
            passed, sentence = True, f"{count}, too few to judge it"
        is_named = key not in ("each", "each_update", "last_update")  # "A_ZS", or "sets.NAME"
        place = f"{key}.{name}" if is_named else f"{key}.{name}: {scope}"
        lines.append(GateLine(f"{key}.{name}", scope, passed, f"{place}: {sentence}", judged))
    return lines


def _judge(limits: Limits, name: str, limit: float, row: pd.Series) -> tuple[bool, str]:
    """Return whether a row keeps a limit, and its numbers in a sentence."""
    ends = " at the interval's worse end" if limits.sure else ""
    if name == "lost":
        value = row["lost_high"] if limits.sure else row["lost_share"]
        value, most = value if row["old"] else 0.0, limit  # where nothing was right nothing is lost
    else:  # a gain is a negative fall
        value = -(row["low"] if limits.sure else row["change"])
        most = -limit if name == "gain" else limit
    if np.isnan(value):
        return False, "one group of images is too few for an interval"
    passed = bool(value <= most + ROUNDING)
    # a value that breaks its limit does not look as if it kept it, such as 3.04 as 3.0
    digits = next(n for n in range(1, 17) if (round(value, n) <= most + ROUNDING) == passed)
    if name == "lost":
        words = f"{value:.{digits}f}% of right answers became wrong{ends}"
        return passed, f"{words}; at most {limit:g}% may"
    rule = f"a fall of at most {limit:g} is allowed"
    if name == "gain":
        rule = f"a gain of at least {limit:g} is required"
    size = sentences.signed(-value, digits)
    return passed, f"{row['old']:.1f} became {row['new']:.1f} ({size}{ends}); {rule}"
