"""Making a base: a pretraining run, its two checkpoints, and the model card beside each."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as checked_dataclass

from cmp import config, evaluation, models
from cmp.checkpoints import CheckpointManager
from cmp.config import RunConfig
from cmp.data import Corpus
from cmp.embedded import models as embedded_models
from cmp.errors import CmpError
from cmp.experiments import store
from cmp.experiments.store import TOLERANCE
from cmp.files import make_folder, parse_json, parse_record, project_folder, write_atomic
from cmp.runner import Observer, RunResult, execute, joint_training

OVERVIEW = f"""# Pretrained bases

Each weights file (safetensors, 16 bit, or 8 bit with a scale a row; scored as stored) has a model
card beside it: a JSON file with the config, the hashes of the data, and the zero-shot score,
standard error and chance of every dataset. *Un-annealed* is the checkpoint before the learning
rate's cooldown. *Joint* is A_KA after training on all adaptation data at once from that base.
Scores are percent, with the standard error over concepts. `cmpt pretrain MODEL --seed s` reproduces
a card within {TOLERANCE:g} points, and to the bit with the `numerics`, the versions and the kind of
processor that the card names.

`tiny` is a small residual network on the image side, pretrained for 2,600 steps: the start of
nearly all studies, with five bases. Its siblings `tiny-half`, `tiny-one`, `tiny-double` and
`tiny-quad` have 0.5, 1, 2 and 4 times its FLOPs and were pretrained for 5,200 steps, the larger two
at lower rates; `tiny-one` is `tiny` but for that. `tiny-vit` is a transformer behind a stem of
three strided convolutions, pretrained by the same recipe for 4,000 steps; neither distillation nor
other augmentation was needed. `lengths/` has the cards of bases that were pretrained for fewer or
more steps and do not ship.

| weights | steps | seconds | A_KA | A_ZS | joint A_KA |
|---|---|---|---|---|---|
"""


_CARD_CONFIG = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)


@checked_dataclass(frozen=True, config=_CARD_CONFIG)
class CardScore:
    """An aggregate and its standard error, in percent."""

    value: float
    standard_error: float


@checked_dataclass(frozen=True, config=_CARD_CONFIG)
class CardScores:
    """The two that a card gives."""

    A_KA: CardScore
    A_ZS: CardScore


@checked_dataclass(frozen=True, config=_CARD_CONFIG)
class ModelCard:
    """What a model card must say; it says more."""

    weights: str
    steps: int
    seconds: int
    tolerance: float
    scores: CardScores
    joint: CardScores | None = None


def pretraining_config(name: str, seed: int, *assignments: str) -> RunConfig:
    """The pretraining run of base `seed` of an embedded model."""
    if name not in models.family_names():
        raise CmpError(
            f"{name!r} is not an embedded model; those are {', '.join(models.family_names())}"
        )
    settings = [f"model.name={name}", *config.PRETRAINING_OF.get(name, ()), *assignments]
    tree = config.override(config.PRETRAINING | {"seed": seed}, settings)
    return config.parse(tree, f"pretraining of {name}")


def joint_config(name: str, seed: int) -> RunConfig:
    """The joint upper bound of the `cpu` profile, started from base `seed`."""
    settings = [f"model.name={name}", "evaluation.subset=null", f"seed={seed}"]
    return joint_training(config.parse(config.override(config.PROFILES["cpu"], settings)))


def pretrain(
    run_config: RunConfig, corpus: Corpus, folder: Path, observer: Observer
) -> dict[str, dict[str, Any]]:
    """Run a pretraining; write its checkpoints and their cards into `folder`.

    The un-annealed base is the checkpoint before the cooldown; a schedule of another family than
    the recipe's makes one base, called after it. Weights are stored in 16 or 8 bits and scored as
    stored. Stopped, it goes on where it was. Returns the cards by start.
    """
    make_folder(folder)
    steps = run_config.training.steps
    kept = steps - run_config.schedule.durations(steps)[1]
    name, seed = run_config.model.name, run_config.seeds.init
    family = run_config.schedule.name
    starts = ("annealed", "unannealed") if family == "wsd" else (family,)
    # those of `tiny` are the start of nearly all studies; the others must stay small beside them
    bits = torch.float16 if name == "tiny" else torch.int8
    paths = {start: folder / embedded_models.base_path(name, start, seed).name for start in starts}

    def after_step(task: int, step: int, loss: torch.Tensor, model: torch.nn.Module) -> None:
        if step + 1 == kept and "unannealed" in paths:
            models.save_weights(model, paths["unannealed"], bits)
        observer.step(task, step, loss, model)

    watched = dataclasses.replace(observer, step=after_step)
    with CheckpointManager(store.run_id_of(run_config, corpus)) as manager:
        result = execute(run_config, corpus, watched, manager=manager)
        models.save_weights(result.model, paths[starts[0]], bits)
        cards = {}
        for start, path in paths.items():
            done = kept if start == "unannealed" else steps
            cards[start] = make_card(run_config, corpus, path, done, result)
        cards[starts[0]]["joint"] = measure_joint(name, seed, corpus, paths[starts[0]], observer)
        for start, path in paths.items():
            save_card(cards[start], path)
        manager.remove()
    write_atomic(folder / "README.md", bases_overview(folder))
    return cards


def measure_joint(
    name: str, seed: int, corpus: Corpus, weights: Path, observer: Observer
) -> dict[str, dict[str, float]]:
    """A_KA and A_ZS after joint training from a base: the room that a stream has."""
    model = models.create_model(name)
    models.load_weights(model, weights)
    found: dict[str, dict[str, float]] = {}

    def after_task(done: int, scores: evaluation.Scores) -> None:
        found.update(round_scores(scores))

    execute(joint_config(name, seed), corpus, Observer(observer.step, after_task), model)
    return found


def make_card(
    run_config: RunConfig, corpus: Corpus, weights: Path, steps: int, result: RunResult
) -> dict[str, Any]:
    """Score stored weights: where they come from, and what they can do.

    steps: done when they were kept; result: of the run that made them.
    """
    name = run_config.model.name
    model = models.create_model(name)
    models.load_weights(model, weights)
    scores = evaluation.evaluate(model, name, corpus)
    return {
        "weights": weights.name,
        "config": run_config.to_dict(),
        "data_sha256": corpus.hashes,
        "steps": steps,
        "seconds": round(result.seconds),
        "machine": result.provenance,
        "parameters": sum(p.numel() for p in model.parameters()),
        "tolerance": TOLERANCE,
        "scores": round_scores(scores),
        "datasets": scores.datasets.round(2).to_dict(orient="index"),
    }


def round_scores(scores: evaluation.Scores) -> dict[str, dict[str, float]]:
    """A_KA and A_ZS with their standard errors, for a card."""
    found = {key: scores.aggregate(key) for key in evaluation.ROLES}
    return {
        key: {"value": round(value, 2), "standard_error": round(error, 2)}
        for key, (value, error) in found.items()
    }


def card_path(weights: Path) -> Path:
    """Where the card of a weights file lies."""
    return weights.with_suffix(".json")


def save_card(card: dict[str, Any], weights: Path) -> None:
    """Write a card, whole or not at all."""
    write_atomic(card_path(weights), json.dumps(card, indent=1) + "\n")


def read_card(weights: Path) -> dict[str, Any]:
    """The card of a weights file; `CmpError` if it has none that says what a `Card` must."""
    try:
        text = card_path(weights).read_text()
        parse_record(text, ModelCard)
        return parse_json(text)
    except (OSError, ValueError) as error:
        raise CmpError(f"{weights}: no readable model card beside it ({error})") from error


def bases_overview(*folders: Path) -> str:
    """A Markdown page of all bases of some folders: how each was made and what it scores."""
    weights = [path for folder in folders for path in folder.glob("*.safetensors")]
    weights.sort(key=lambda path: path.name)
    cards = [read_card(path) for path in weights if card_path(path).exists()]
    lines = []
    for card in cards:
        scores = [f"{s['value']:.1f} ± {s['standard_error']:.1f}" for s in card["scores"].values()]
        joint = f"{card['joint']['A_KA']['value']:.1f}" if "joint" in card else ""
        cells = [f"`{card['weights']}`", str(card["steps"]), str(card["seconds"]), *scores, joint]
        lines.append(f"| {' | '.join(cells)} |")
    return OVERVIEW + "\n".join([*lines, ""])


def pretraining_lengths() -> pd.DataFrame:
    """A row a card of base 0, annealed: `model`, `steps`, `peak`, whether it `ships`, and "A_KA",
    "A_ZS" in percent, with "A_KA error" and "A_ZS error", their standard errors.

    Of each model several were pretrained, from a new start each; the others' cards are kept.
    """
    rows = []
    others = project_folder() / "weights" / "lengths"
    folders = embedded_models.base_folders("annealed")[:2]
    shipped = [path for folder in folders for path in folder.glob("*-s0-annealed.json")]
    for path in sorted([*shipped, *others.glob("*.json")]):
        card = parse_json(path.read_text())
        row = {"model": card["config"]["model"]["name"], "steps": card["steps"]}
        row |= {"peak": card["config"]["schedule"]["peak"], "ships": path.parent != others}
        for key, score in card["scores"].items():
            row |= {key: score["value"], f"{key} error": score["standard_error"]}
        rows.append(row)
    return pd.DataFrame(rows).sort_values(["model", "steps", "peak"], ignore_index=True)


def compare_cards(card: dict[str, Any], shipped: dict[str, Any]) -> tuple[bool, str]:
    """(whether a rerun reproduces a shipped card within its tolerance, a sentence that says so)."""
    pairs = {
        key: (card["scores"][key]["value"], shipped["scores"][key]["value"])
        for key in shipped["scores"]
    }
    within = all(abs(new - old) <= shipped["tolerance"] for new, old in pairs.values())
    found = ", ".join(f"{key} {new:.2f} against {old:.2f}" for key, (new, old) in pairs.items())
    verdict = "reproduces" if within else "does NOT reproduce"
    return within, f"{verdict} the shipped card within {shipped['tolerance']:g} points: {found}"
