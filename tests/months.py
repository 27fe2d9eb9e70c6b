"""Updates one at a time against the same stream at once: every tensor must have the same bits."""

import json
from pathlib import Path
from typing import Any
from zlib import crc32

import pandas as pd
import torch
from pictures import picture, tree
from safetensors.torch import load_file

from cmp import config
from cmp.data import load_data
from cmp.releases import update, update_plan
from cmp.releases.ledger import Ledger
from cmp.releases.release import Release
from cmp.runs.checkpoints import CheckpointManager
from cmp.runs.runner import execute
from cmp.starts import usual_prompt

SIZES = (60, 7, 13, 150, 30, 40, 5, 90, 33, 24, 64, 18)
"""Pictures of each update, training pictures and others."""
NAMES = ("mug", "shirt", "lamp", "shoe", "ring", "sofa", "vase")
START = "tiny:random"
COMMON = ("training.batch=12", "evaluation.subset=2", "evaluation.full=false")
PLAIN = ("merging.policy=none",)
SETTINGS: dict[str, tuple[str, ...]] = {
    "plain": PLAIN,
    "EMA": (),
    "average deployed": ("merging.policy=last-unrolled",),
    "merged at the end": ("merging.policy=ft-last",),
    "all merged": ("merging.policy=last-all", "merging.rule=ties", "merging.zero=true"),
    "average of steps": ("merging.policy=step-ema",),
    "LoRA": ("method.name=lora", *PLAIN),
    "LoRA that goes on": ("method.name=lora", "method.fold=false", *PLAIN),
    "EWC": ("method.name=ewc", "method.batches=1", *PLAIN),
    "SI": ("method.name=si", *PLAIN),
    "GaLore": ("method.name=galore", *PLAIN),
    "distillation": ("method.name=distillation", *PLAIN),
    "meta rsqrt": ("schedule.name=cosine", "schedule.meta=rsqrt"),
    "meta cosine": ("schedule.name=cosine", "schedule.meta=cosine-dynamic"),
    "infinite": ("schedule.name=infinite", *PLAIN),
    "moments begin anew": ("optimizer.carry=false",),
    "reservoir": ("mixture.policy=reservoir", "mixture.capacity=30"),
    "class-balanced": ("mixture.policy=class-balanced", "mixture.capacity=30"),
    "task-balanced": ("mixture.policy=task-balanced",),
}


def month_name(number: int) -> str:
    """Return the folder of a month, which sorts before that of the month before it."""
    return f"{chr(ord('z') - number)}-month"


SMALL = ["training.batch=8", "evaluation.full=false", "evaluation.subset=2"]
"""Settings of a small update."""


def write_pictures(root: Path, updates: int) -> None:
    """Write a pool, a folder for each month, and all months as one table.

    Names come again with new looks, and each month may bring one that is new.
    """
    rows, place = [], 0
    pool = {f"pool/{'abc'[n % 3]}/{n}.png": picture(crc32(b"%d" % n)) for n in range(40)}
    tree(root, pool)
    for month in range(updates):
        own = []
        for n in range(SIZES[month % len(SIZES)]):
            label = NAMES[(n + month) % min(len(NAMES), 2 + month)]
            split = ("train", "train", "train", "test", "validation")[n % 5]
            own.append((f"{n}.png", label, split))
            tree(root / month_name(month), {f"{n}.png": picture(place)})
            rows.append((f"{month_name(month)}/{n}.png", label, split, month + 1))
            place += 1
        frame = pd.DataFrame(own, columns=["filepath", "label", "split"])
        frame.to_csv(root / month_name(month) / "months.csv", index=False)
    frame = pd.DataFrame(rows, columns=["filepath", "label", "split", "update"])
    frame.to_csv(root / "all.csv", index=False)
    columns = {"label": "label", "split": "split", "update": "update"}
    manifests = {
        "pool": {"role": "pool", "reader": {"kind": "folder", "path": "pool"}},
        "catalogue": {"role": "adapt", "reader": {"kind": "csv", "path": "all.csv", **columns}},
    }
    for name, about in manifests.items():
        usual = {"title": name, "licence": "own", "prompt": usual_prompt(START.partition(":")[0])}
        text = json.dumps({"name": name} | usual | about)
        (root / f"{name}.yaml").write_text(text)


def plan_first(root: Path, *settings: str, **pictures: Any) -> update_plan.UpdatePlan:
    """Plan a small update of a model with the first month, which replays the pool."""
    pictures = {"pool": root / "pool"} | pictures
    return update_plan.plan_update(START, root / month_name(0), [*SMALL, *settings], **pictures)


def pictures_in(ledger: Ledger, **wanted: object) -> list[Any]:
    """Return the rows of a ledger's images that have some values."""
    table = ledger.pictures
    for name, value in wanted.items():
        table = table[table[name] == value]
    return [*table.itertuples()]


def update_months(root: Path, releases: Path, updates: int, settings: tuple[str, ...]) -> Release:
    """Bring a model up to date with one month after the other; return the last release."""
    start: str | Path = START
    for month in range(updates):
        first = {"pool": root / "pool"} if month == 0 else {}
        own = [*COMMON, *settings] if month == 0 else []
        plan = update_plan.plan_update(start, root / month_name(month), own, **first)
        start = update.compute_update(plan, releases / str(month + 1)).folder
    return update.release.read_release(start)


def stream_at_once(root: Path, folder: Path, last: Release) -> Path:
    """Take a model through all months of a release in one run, whose steps follow from its data;
    return its last checkpoint."""
    settings = [f"data={root}", "training.task_steps=[]"]
    run_config = config.parse(config.override(last.config.to_dict(), settings))
    with CheckpointManager("at-once", folder=folder) as manager:
        execute(run_config, load_data(str(root)), manager=manager)
        assert manager.last
    return manager.last


def differences(one: Path, other: Path) -> list[str]:
    """Return the tensors of two states that differ; what was scored does not count."""
    states = [
        {name: x for name, x in load_file(path).items() if not name.startswith("hits/")}
        for path in (one, other)
    ]
    both = states[0].keys() & states[1].keys()
    same = {name for name in both if torch.equal(*(state[name] for state in states))}
    return sorted((states[0].keys() | states[1].keys()) - same)


def compare_setting(root: Path, folder: Path, updates: int, settings: tuple[str, ...]) -> list[str]:
    """Return where updates one at a time differ from the stream at once."""
    last = update_months(root, folder / "releases", updates, settings)
    state = last.path(last.record.state)
    return differences(state, stream_at_once(root, folder / "once", last))
