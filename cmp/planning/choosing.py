"""The plan: what the studies advise for a wish, as a run, with its costs and what was rejected."""

from dataclasses import dataclass
from typing import Any

import open_clip
import pandas as pd

from cmp import budgets, config, mixtures
from cmp.budgets import counting
from cmp.config import MOST, RunConfig
from cmp.planning import alternatives, costs
from cmp.planning.costs import Forecast
from cmp.planning.devices import DEVICES, GIGA, SPARE
from cmp.planning.evidence import Evidence, Place
from cmp.planning.wishes import Impossible, Wish, check

TAGS = {"ViT-B-16": "laion2b_s34b_b88k", "ViT-B-32": "laion2b_s34b_b79k"}
"""Pretrained weights of the paper (spec 1.3); of another model those that open_clip lists first."""
LIKE = config.profile("gpu")
"""Whose peak, optimizer and evaluation a real model's plan has: the paper's for ViT-B/16, with
AdamW at batch 512 (spec 1.3)."""
BATCHES = (512, 256, 128, 64, 32)
"""Of a real model: the largest that fits, at most the paper's."""


@dataclass(frozen=True)
class Plan:
    """tree: what differs from the defaults, as a file for `cmp run` has it; run: the same, from
    random weights where its own are a file's. place: where stored runs ended that are like it, or
    `outside`, why there are none. effects: a row a choice, what it did to both aggregates in the
    stored runs. rejected: alternative -> why. notes: sentences that a reader must know."""

    wish: Wish
    tree: dict[str, Any]
    run: RunConfig
    costs: Forecast
    place: Place | None
    outside: str
    effects: pd.DataFrame
    rejected: dict[str, str]
    notes: tuple[str, ...]


def plan(wish: Wish, known: Evidence) -> Plan:
    """The run that the studies advise; `Impossible`, a sentence, where there is none.

    known: see `cmp.planning.gather`.
    """
    check(wish)
    tree, notes = chosen(wish)
    tree, more = _sized(wish, tree)
    run = counted(tree)
    full_steps = counting.cost(run).step * _multiplier(run) / budgets.full_cost(run).step
    full_steps *= run.training.steps
    outside = known.outside(run, full_steps)
    place = None if outside else known.nearest(run, full_steps)
    return Plan(
        wish, tree, run, costs.forecast(wish, run), place,
        outside or ("" if place else "no stored setting is like this plan"),
        alternatives.effects(wish, tree, known, numbers=not outside),
        alternatives.rejected(wish, tree, known, numbers=not outside),
        (*notes, *more, *_remarks(wish, run)),
    )  # fmt: skip


def counted(tree: dict[str, Any]) -> RunConfig:
    """The run of a plan's tree; from random weights, for shapes cost the same and ask for no
    file."""
    model = tree["model"] | ({"start": "random"} if "start" in tree["model"] else {})
    return config.parse(tree | {"model": model}, "plan")


def _multiplier(run: RunConfig) -> float:
    return counting.cost(run).memory / budgets.full_cost(run).memory


def chosen(wish: Wish) -> tuple[dict[str, Any], list[str]]:
    """What the studies advise, without sizes; and what must be said of it."""
    tree: dict[str, Any] = {"model": _model(wish), "stream": {"tasks": wish.updates}}
    tree["mixture"], notes = _mixture(wish)
    careful = wish.keep != "balance" or wish.pool == 0
    if careful:
        tree["merging"] = {"policy": "ema"}
        if wish.keep == "all":
            tree["merging"]["weight"] = 0.1
            notes.append(
                "Nothing that was measured learns and loses nothing at all. An average that takes "
                "a tenth of each update came nearest."
            )
    else:
        tree |= {"merging": {"policy": "last-unrolled"}, "optimizer": {"carry": True}}
    if wish.new == "names":
        tree["method"] = {"name": "locked-image"}
    if not wish.embedded:
        tree, more = _real(tree)
        notes += more
    return tree, notes


def _real(tree: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The plan of a model that is not embedded: with data, a peak and an optimizer of that size."""
    peak = LIKE["schedule"]["peak"]
    notes = [
        "FoMo-in-Flux stands for your data: name the folder of their manifests under `data` "
        "(chapter A1).",
        f"The peak of {peak:g} is the paper's for ViT-B/16. Try a third and three times of it "
        "on a validation split first: the rate moved more than any schedule (chapter 04).",
    ]
    own = {key: dict(LIKE[key]) for key in ("schedule", "optimizer", "evaluation")}
    own["optimizer"] |= tree.get("optimizer", {})
    return {"data": LIKE["data"]} | tree | own, notes


def _model(wish: Wish) -> dict[str, str]:
    """Name and starting weights."""
    if wish.embedded:
        return {"name": wish.model}
    tags = open_clip.list_pretrained_tags_by_model(wish.model)
    if not tags:
        raise Impossible(
            f"{wish.model}: open_clip has no pretrained weights of it, so there is nothing to keep"
        )
    return {"name": wish.model, "start": TAGS.get(wish.model, tags[0])}


def _mixture(wish: Wish) -> tuple[dict[str, Any], list[str]]:
    """Shares of a batch by what can be replayed."""
    replay, buffer, notes = wish.pool > 0, wish.buffer != 0, []
    shares = {
        (True, True): (0.25, 0.25, 0.5),
        (True, False): (0.5, 0.5, 0.0),
        (False, True): (0.0, 0.5, 0.5),
        (False, False): (0.0, 1.0, 0.0),
    }[replay, buffer]
    found = dict(zip(("pretraining", "update", "buffer"), shares, strict=True))
    if replay:
        found["replay"] = float(wish.pool)
    if buffer and wish.buffer is not None and wish.buffer < wish.updates * wish.arriving:
        found |= {"policy": "reservoir", "capacity": wish.buffer}
    if not replay:
        notes.append(
            "Without the pretraining data much of what the model knew will be lost; an average of "
            "weights saves a part of it (chapter 03)."
        )
    if not buffer:
        notes.append(
            "Without a buffer of earlier updates the model accumulates little: a few hundred "
            "images would do (chapter 07)."
        )
    return found, notes


def _sized(wish: Wish, tree: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The same with a batch that fits and the steps that the compute allows; a method that takes
    less memory where the chosen one does not fit."""
    room = SPARE * DEVICES[wish.device].memory
    for method in (tree.get("method", {}), {"name": "locked-image"}):
        for batch in (64,) if wish.embedded else BATCHES:
            sized = tree | {"training": {"batch": batch, "steps": 1}}
            sized |= {"method": method} if method else {}
            run = counted(sized)
            if costs.of_run(run) <= room:
                sized["training"]["steps"] = _steps(wish, run)
                switched = method != tree.get("method", {})
                words = (
                    f"Training everything does not fit into {wish.device}'s memory, so the image "
                    "tower stays as it is."
                )
                return sized, [words] * switched
    raise Impossible(
        f"{wish.model} does not fit into {wish.device}, {DEVICES[wish.device].memory / GIGA:.0f} "
        f"GB, even at batch {BATCHES[-1]} with its image tower locked; choose a smaller model or a "
        "larger device"
    )


def _steps(wish: Wish, run: RunConfig) -> int:
    """Steps of an update."""
    allowed = costs.allowance(wish, run)
    if allowed.steps < 1:
        most = int(wish.updates * allowed.allowed / (allowed.step + allowed.end))
        much = f"{most:,} at most" if most else "not even one"
        raise Impossible(
            f"this compute buys no step in each of {wish.updates:,} updates of {wish.model} at "
            f"batch {run.training.batch}: {much}. Update less often, or give more compute"
        )
    if allowed.steps > MOST:
        raise Impossible(f"{allowed.steps:.3g} steps an update: more than a run can count")
    return allowed.steps


def _remarks(wish: Wish, run: RunConfig) -> list[str]:
    """How often an image is seen, and small updates."""
    _, update, _ = mixtures.parts(run.mixture, run.training.batch, empty_buffer=False)
    seen = run.training.steps * update / wish.arriving
    found = [
        f"In its own update an image is seen {seen:.2g} times; in most stored runs, about once."
    ]
    if run.training.steps < 10:
        found.append(
            f"{run.training.steps} steps an update are few: warmup and cooldown take most of them."
        )
    if not wish.embedded and wish.images is None:
        found.append("Images of an update are those of FoMo-in-Flux, 1.76 million in all.")
    if wish.embedded and wish.images is not None:
        found.append("The embedded stream brings its own images; the number given is not used.")
    return found
