"""Table 4 of the paper: ViT-B/16, batch 512, 1.8e9 memory-adjusted GFLOPs over 20 tasks (spec 9.1).

The column that the paper heads "Per-Task GFlops" is of one step. EWC's holds 98 batches of Fisher
information beside each step's own, though they are measured once a task.
"""

from typing import NamedTuple

from cmp.budgets.rules import Budget

MODEL, BATCH, TOTAL, TASKS = "ViT-B-16", 512, 1.8e9, 20
FISHER_BATCHES = 98


class Row(NamedTuple):
    """gflops: of a step; memory: GB at the peak; multiplier: as printed; steps: a task at T = 20;
    method: what we compare with, as `cmp budget --method` takes it."""

    gflops: float
    memory: float
    multiplier: float
    steps: int
    method: str


TABLE4: dict[str, Row] = {
    "full": Row(63394.76, 46.59, 1.0, 1420, "full"),
    "locked-text": Row(57254.62, 37.58, 0.8064, 1949, "locked-text"),
    "locked-image": Row(27176.67, 11.88, 0.2551, 12982, "locked-image"),
    "LNFit": Row(43165.60, 30.56, 0.6558, 3179, "lnfit"),
    "BitFit": Row(43165.60, 30.55, 0.6558, 3179, "bitfit"),
    "LoRA r=4": Row(54479.25, 40.54, 0.8702, 1898, "lora,rank=4"),
    "LoRA r=64": Row(54505.02, 40.68, 0.8730, 1891, "lora,rank=64"),
    "DoRA r=4": Row(54479.82, 40.66, 0.8726, 1893, "dora,rank=4"),
    "DoRA r=64": Row(54514.18, 40.79, 0.8754, 1886, "dora,rank=64"),
    "VeRA r=4": Row(54479.34, 40.54, 0.8702, 1898, "vera,rank=4"),
    "VeRA r=64": Row(54507.83, 40.57, 0.8708, 1896, "vera,rank=64"),
    "EWC": Row(6276081.09, 47.21, 1.0132, 14, f"ewc,fisher=batch,batches={FISHER_BATCHES}"),
    "SI": Row(63394.76, 46.65, 1.0013, 1418, "si"),
}
"""By method. The row of full fine-tuning is that of ZS-, FT- and EMA-Merge too; GaLore has none."""


def once_a_task(row: Row) -> Budget:
    """A row's budget from the paper's own numbers, with what comes after a task charged once."""
    step = min(row.gflops, TABLE4["full"].gflops)
    end = FISHER_BATCHES * step if row.gflops > step else 0.0
    adjusted = (step * row.multiplier, end * row.multiplier)
    return Budget(TOTAL / TASKS, *adjusted, row.multiplier)
