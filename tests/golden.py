"""The golden runs: `python -m tests.golden` computes them again and writes `golden.json`.

Do so only together with a new `NUMERICS`, that is, when results are meant to change.
"""

import json
from pathlib import Path

import torch

from cmp import NUMERICS, config, models
from cmp.embedded import packed
from cmp.errors import CmpError
from cmp.runner import Observer, execute, machine_record

PATH = Path(__file__).with_suffix(".json")
RUNS = {
    f"{name} {precision}": [f"model.name={name}", f"training.precision={precision}"]
    for name in ("tiny", "tiny-vit")  # one of each architecture
    for precision in ("bf16", "fp32")
}
SMALL = ["stream.tasks=2", "training.steps=3", "training.batch=16", "evaluation.subset=8"]


def compute() -> dict:
    """Weights' hash and losses of each golden run, with where they were computed."""
    found = {}
    for name, settings in RUNS.items():
        losses = []
        tree = config.override(config.profile("quick"), [*SMALL, *settings])
        result = execute(
            config.parse(tree),
            packed.load_embedded(),
            Observer(step=lambda task, step, loss, model, to=losses: to.append(loss.item())),
        )
        scores = result.metrics["score"].round(9).tolist()
        found[name] = {
            "weights": models.weights_digest(result.model),
            "losses": losses,
            "scores": scores,
        }
    return {
        "numerics": NUMERICS,
        "machine": machine_record(),
        "defaults": defaults(),
        "runs": found,
    }


def defaults() -> dict:
    """What a config means where it says nothing."""
    shares = {f"schedule.{kind} share": x for kind, x in config.DEFAULT_SHARES.items()}
    methods = {
        f"method.{key} of {name}": x
        for name, keys in config.METHOD_SETTINGS.items()
        for key, x in keys.items()
        if config.defaults()[f"method.{key}"] is None
    }
    return config.defaults() | shares | methods


def read() -> dict:
    """The golden runs as committed."""
    return json.loads(PATH.read_text())


if __name__ == "__main__":
    if PATH.exists() and read()["numerics"] == NUMERICS:
        raise CmpError(f"{PATH.name} is of NUMERICS {NUMERICS}; raise it in cmp/__init__.py first")
    torch.set_num_threads(1)
    PATH.write_text(json.dumps(compute(), indent=1) + "\n")
