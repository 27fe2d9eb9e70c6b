"""Measure a training step against plain open_clip's, and the contribution of each piece."""

import dataclasses

import numpy as np
import torch

from cmp.bench import networks, timing
from cmp.bench.networks import BF16, FP32, PLAIN, Pieces, Setting
from cmp.bench.report import Report
from cmp.data import Corpus

LABELS = {
    "compact": "compact vocabulary",
    "split": "attention as products",
    "paired": "texts in pairs",
    "distinct": "distinct captions",
    "fused": "fused AdamW",
    "bf16": "bf16",
}
"""The pieces of `networks.Pieces`, in the order in which they are added."""
COLUMNS = ("path", "times as fast", "ms", "samples/s", "GFLOP", "% of peak")


def measure(setting: Setting, paths: dict[str, Pieces], rounds: int) -> list[dict[str, object]]:
    """Return one row per path; the first is the baseline of the others."""
    steppers = {name: networks.stepper(setting, pieces) for name, pieces in paths.items()}
    seconds = timing.interleaved(steppers, rounds)
    base, *_ = seconds.values()
    peaks = {
        bf16: timing.matmul_peak(torch.bfloat16 if bf16 else torch.float32)
        for bf16 in {pieces.bf16 for pieces in paths.values()}
    }
    rows = []
    for name, pieces in paths.items():
        middle = float(np.median(seconds[name]))
        flops = networks.step_flops(setting, pieces)
        rows.append(
            {
                "path": f"{setting.name} {name}",
                "times as fast": timing.times_faster(base, seconds[name]),
                "ms": 1e3 * middle,
                "samples/s": setting.config.training.batch / middle,
                "GFLOP": flops / 1e9,
                "% of peak": 100 * flops / middle / peaks[pieces.bf16],
            }
        )
    return rows


def describe(setting: Setting, first: Pieces) -> str:
    """Return a note on the batches and on the size of the baseline model."""
    plain, fast = (networks.network(setting, pieces)[0] for pieces in (first, FP32))
    size = sum(p.numel() for p in plain.parameters())
    return (
        f"{setting.name}: {size / 1e6:.1f} M parameters; batches of "
        f"{setting.config.training.batch} with {setting.distinct_captions():.0f} distinct "
        f"captions of at most {plain.context_length} tokens; vocabulary "
        f"{plain.token_embedding.num_embeddings:,} rows, ours "
        f"{fast.token_embedding.num_embeddings:,}"
    )


def step(names: list[str], corpus: Corpus, rounds: int, batch: int | None) -> Report:
    """Measure our step in bf16 and fp32 against plain open_clip's in fp32, for each model.

    The vocabulary of an embedded model is part of the model, so plain open_clip uses it, too.
    """
    rows, notes = [], []
    for name in names:
        plain = PLAIN if name in networks.BENCH else Pieces(compact=True)
        paths = {"plain fp32": plain, "fp32": FP32, "bf16": BF16}
        setting = networks.setting(name, corpus, batch)
        rows += measure(setting, paths, rounds)
        notes.append(describe(setting, plain))
    return Report("step", "a training step", COLUMNS, rows, notes)


def pieces(names: list[str], corpus: Corpus, rounds: int, batch: int | None) -> Report:
    """Measure steps while adding one piece after another to plain open_clip with CLIP's full
    vocabulary."""
    paths, current = {"plain fp32": PLAIN}, PLAIN
    for key, label in LABELS.items():
        current = dataclasses.replace(current, **{key: True})
        paths[f"+ {label}"] = current
    rows, notes = [], []
    for name in names:
        setting = networks.setting(name, corpus, batch)
        rows += measure(setting, paths, rounds)
        notes.append(describe(setting, PLAIN))
    return Report("pieces", "a training step, piece by piece", COLUMNS, rows, notes)
