"""Pretrain bases: a run, its two checkpoints, and a model card for each."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from cmp import budgets, config, evaluation, models, starts
from cmp.data import Corpus
from cmp.embedded import models as embedded_models
from cmp.errors import CmpError, explain_errors
from cmp.files import check_digest, listed_file, make_folder, save_tensors, write_atomic
from cmp.parsing import parse_json, read_yaml
from cmp.runs import identity, verify
from cmp.runs.checkpoints import CheckpointManager
from cmp.runs.runner import Observer, RunResult, execute
from cmp.training import StepResult

_TREES = read_yaml(Path(__file__).with_name("pretraining.yaml"))
PRETRAINING: dict[str, Any] = _TREES["recipe"]
"""Pretraining is a run with one task, from random weights, on the pool only."""
PRETRAINING_OF: dict[str, list[str]] = _TREES["models"]
"""How a model's pretraining differs from `PRETRAINING`, as key=value."""
TABLE_HEAD = """| weights | steps | seconds | A_KA | A_ZS |
|---|---|---|---|---|
"""
Card = dict[str, Any]


def pretraining_config(name: str, seed: int, *assignments: str) -> config.RunConfig:
    """Return the pretraining run of a base.

    Args:
        name: An embedded model.
        seed: The base's number.
        *assignments: Changes to the recipe, as "key=value".

    Raises:
        CmpError: The model is not embedded, or a change is invalid.
    """
    if name not in starts.family_names():
        raise CmpError(
            f"{name!r} is not an embedded model; choose from {', '.join(starts.family_names())}"
        )
    changes = [f"model.name={name}", *PRETRAINING_OF.get(name, ()), *assignments]
    tree = config.override(PRETRAINING | {"seed": seed}, changes)
    return config.parse(tree, f"pretraining of {name}")


def pretrain(
    run_config: config.RunConfig, corpus: Corpus, folder: Path, observer: Observer
) -> dict[str, Card]:
    """Run a pretraining, and write its checkpoints and their cards.

    The unannealed base is the checkpoint before the cooldown. A schedule other than the recipe's
    makes a single base, named after the schedule. Weights are stored in 8 bits and scored as
    stored. A stopped pretraining resumes where it was.

    Args:
        run_config: See `pretraining_config`.
        corpus: The embedded benchmark.
        folder: The folder for weights and cards.
        observer: Receives the progress.

    Returns:
        The cards by start.
    """
    make_folder(folder)
    name, seed, schedule = run_config.model.name, run_config.seeds.init, run_config.schedule
    steps = budgets.settle(run_config, corpus).steps
    total = sum(steps)
    kept = total - schedule.durations(steps[-1])[1]
    names = ("annealed", "unannealed") if schedule.name == "wsd" else (schedule.name,)
    paths = {start: folder / embedded_models.base_path(name, start, seed).name for start in names}

    def after_step(task: int, step: int, result: StepResult, model: torch.nn.Module) -> None:
        if sum(steps[:task]) + step + 1 == kept and "unannealed" in paths:
            manager.keep_base(kept, model.state_dict())
        observer.step(task, step, result, model)

    def resumed(done: int) -> None:
        if done >= kept and "unannealed" in paths:
            manager.load_base(kept)  # raises an error before anything is computed
        observer.resumed(done)

    hooks = dataclasses.replace(observer, step=after_step, resumed=resumed)
    with CheckpointManager(identity.run_id_of(run_config, corpus)) as manager:
        result = execute(run_config, corpus, hooks, manager=manager)
        save_base(result.model.state_dict(), paths[names[0]])
        if "unannealed" in paths:
            save_base(manager.load_base(kept), paths["unannealed"])
        cards = {}
        for start, path in paths.items():
            done = kept if start == "unannealed" else total
            cards[start] = make_card(run_config, corpus, path, done, result)
        for start, path in paths.items():
            with listed_file(path.with_suffix(".json")) as partial:
                partial.write_text(json.dumps(cards[start], indent=1) + "\n", encoding="utf-8")
        manager.remove()
    write_atomic(folder / "README.md", bases_overview(folder))
    return cards


def save_base(weights: dict[str, torch.Tensor], path: Path) -> None:
    """Write a base in 8 bits, and its sha256 beside it."""
    with listed_file(path) as partial:
        save_tensors(embedded_models.quantize(weights), partial)


def make_card(
    run_config: config.RunConfig, corpus: Corpus, weights: Path, steps: int, result: RunResult
) -> Card:
    """Score stored weights and return their card.

    Args:
        run_config: The pretraining.
        corpus: The embedded benchmark.
        weights: The file of the weights.
        steps: The number of steps before they were stored.
        result: The result of the pretraining.
    """
    model = models.load_from_file(run_config.model.name, weights)
    scores = evaluation.evaluate(model, run_config.model.name, corpus)
    aggregates = {key: scores.aggregate(key) for key in evaluation.ROLES}
    return {
        "weights": weights.name,
        "config": run_config.to_dict(),
        "data_sha256": corpus.hashes,
        "steps": steps,
        "seconds": round(result.seconds),
        "machine": result.provenance,
        "parameters": sum(p.numel() for p in model.parameters()),
        "tolerance": verify.TOLERANCE,
        "scores": {
            key: {"value": round(value, 2), "standard_error": round(error, 2)}
            for key, (value, error) in aggregates.items()
        },
        "datasets": scores.datasets.round(2).to_dict(orient="index"),
    }


def read_card(weights: Path) -> Card:
    """Return the card of a weights file; raise `CmpError` if it is missing or damaged."""
    with explain_errors(f"{weights}: cannot read the model card beside it"):
        path = weights.with_suffix(".json")
        check_digest(path, "get it from the project again, or make it with `cmpt pretrain`")
        return parse_json(path.read_text(encoding="utf-8"))


def bases_overview(*folders: Path) -> str:
    """Return a Markdown page on the bases in some folders: how each was made, and its scores.

    The text above the table comes from the README.md in one of the folders.
    """
    pages = [folder / "README.md" for folder in folders if (folder / "README.md").exists()]
    text = pages[0].read_text().partition(TABLE_HEAD)[0] if pages else "# Pretrained bases\n\n"
    rows, paths = [], [path for folder in folders for path in folder.glob("*.safetensors")]
    for path in sorted(paths, key=lambda path: path.name):
        if path.with_suffix(".json").exists():
            try:
                card = read_card(path)
            except CmpError:  # damaged, or made by an earlier version without sha256
                rows.append(f"| `{path.name}` | its card cannot be read | | | |\n")
                continue
            scores = card["scores"].values()
            scores = [f"{x['value']:.1f} ± {x['standard_error']:.1f}" for x in scores]
            cells = [f"`{card['weights']}`", card["steps"], card["seconds"], *scores]
            rows.append(f"| {' | '.join(map(str, cells))} |\n")
    return text + TABLE_HEAD + "".join(rows)


def compare_cards(card: Card, shipped: Card) -> tuple[bool, str]:
    """Return whether a card reproduces a shipped one within its tolerance, and a sentence that says
    so."""
    pairs = {
        key: (card["scores"][key]["value"], score["value"])
        for key, score in shipped["scores"].items()
    }
    within = all(abs(new - old) <= shipped["tolerance"] for new, old in pairs.values())
    scores = ", ".join(f"{key} {new:.2f} against {old:.2f}" for key, (new, old) in pairs.items())
    verdict = "reproduces" if within else "does NOT reproduce"
    return within, f"{verdict} the shipped card within {shipped['tolerance']:g} points: {scores}"
