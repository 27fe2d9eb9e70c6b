"""Write the table of `book/manual.md` that says which networks fit on which cards, by the bytes of
a training step: `python -m tests.card_table`, two minutes."""

import functools
from typing import NamedTuple

import pandas as pd

from cmp import budgets, config, models
from cmp.experiments import forecast
from cmp.experiments.forecast import DEVICES, USABLE_MEMORY
from cmp.files import write_atomic
from cmp.project import book_folder
from cmp.towers import tower_blocks

PAGE = book_folder() / "manual.md"
BEGIN, END = "% written by tests/card_table.py", "% end of the table"
MODELS = (
    "ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-H-14", "ViT-g-14", "ViT-bigG-14",
)  # fmt: skip
"""Networks of the table."""
LEFT_OUT = ("core", "t4")
"""Devices that are not in the table. A T4 computes attention in bf16 without a fused kernel, which
keeps more than is counted here."""
BATCH, SMALLEST = 512, 8
"""The paper's batch, and the smallest micro-batch of the table."""


class Fit(NamedTuple):
    """How a network fits on a card.

    Attributes:
        micro_batch: The largest power of two of samples that fit at a time, at most `BATCH`.
        recomputed: Whether activations are recomputed in the backward pass.
        bytes: The bytes of a step.
    """

    micro_batch: int
    recomputed: bool
    bytes: float

    def __str__(self) -> str:
        options = [f"--micro-batch {self.micro_batch}"] if self.micro_batch < BATCH else []
        options += ["--checkpoint-activations"] if self.recomputed else []
        how = f"`{' '.join(options)}`" if options else "whole batch"
        return f"{how} ({self.bytes / 1e9:.0f} GB)"


def fit_model(name: str, memory: float) -> Fit | None:
    """Return how full fine-tuning of a network in bf16 fits into a memory, at batch `BATCH`.

    Activations are recomputed only if not even `SMALLEST` samples fit without; the largest
    micro-batch is chosen.

    Args:
        name: The name of an open_clip model.
        memory: The memory in bytes, of which `USABLE_MEMORY` is used.

    Returns:
        The way, or None if the network does not fit.
    """
    fixed, sample, recomputed = step_parts(name)
    for is_recomputed, each in ((False, sample), (True, recomputed)):
        size = BATCH
        while size >= SMALLEST and each is not None:
            if (needed := fixed + size * each) <= USABLE_MEMORY * memory:
                return Fit(size, is_recomputed, needed)
            size //= 2
    return None


@functools.cache
def step_parts(name: str) -> tuple[float, float, float | None]:
    """Return the bytes of a step of full fine-tuning in bf16.

    Args:
        name: The name of an open_clip model.

    Returns:
        The bytes that do not depend on the number of samples; those of a sample's activations; and
        the latter if they are recomputed, or None if the network does not support that. Then the
        inputs of all blocks are kept, and the activations of one block are there at a time.
    """
    tree = config.override(config.profile("gpu"), [f"model.name={name}", "model.start=random"])
    run = config.parse(config.override(tree, ["training.batch=2"]), name)
    one, two = (_activations(name, size) for size in (2, 4))
    sample = (two - one) / 2
    account = forecast.memory_account(run)
    fixed = float(sum(account.values()) - account["activations"])
    model = models.create_on_meta(name)
    if not hasattr(getattr(model.visual, "transformer", None), "grad_checkpointing"):
        return fixed, sample / 2, None
    kept = (_activations(name, 4, True) - _activations(name, 2, True)) / 2
    counts = {count for _, count in tower_blocks(n for n, _ in model.named_parameters()).values()}
    return fixed, sample / 2, (kept + (sample - kept) / min(counts)) / 2  # bf16


def _activations(name: str, batch: int, recomputed: bool = False) -> int:
    """Return the bytes in fp32 of what a forward pass keeps for the backward pass."""
    model = models.create_on_meta(name)
    if recomputed:
        model.set_grad_checkpointing(True)
    state = budgets.shape_state(name, config.Method(), model)
    held = [*model.parameters(), *model.buffers()]
    return budgets.activation_bytes(
        lambda: budgets.total_loss(state, budgets.forward_shapes(state, batch)), held
    )


def fitting_table(names: tuple[str, ...] = MODELS) -> pd.DataFrame:
    """Tabulate how networks fit on the GPUs of `cmp.scale.devices.DEVICES`.

    Args:
        names: The networks.

    Returns:
        One row per network and one column per size of memory, with the cards of that size.
    """
    cards: dict[float, list[str]] = {}
    for card, facts in sorted(DEVICES.items(), key=lambda item: -item[1].memory):
        if card not in LEFT_OUT:
            cards.setdefault(facts.memory, []).append(card)
    columns = {
        f"{memory / 1e9:.0f} GB ({', '.join(own)})": [
            str(fit_model(name, memory) or "does not fit") for name in names
        ]
        for memory, own in cards.items()
    }
    return pd.DataFrame(columns, index=pd.Index(names, name="network"))


def as_markdown(table: pd.DataFrame) -> str:
    """The table in Markdown."""
    rows = [["network", *table.columns], [":--"] * (1 + table.shape[1])]
    rows += [
        [f"`{name}`", *cells] for name, cells in zip(table.index, table.to_numpy(), strict=True)
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def committed() -> str:
    """The table of the page."""
    return PAGE.read_text().partition(f"{BEGIN}\n")[2].partition(f"\n\n{END}")[0]


if __name__ == "__main__":
    before, found, after = PAGE.read_text().partition(f"{BEGIN}\n")
    after = after.partition(f"\n\n{END}")[2]
    table = as_markdown(fitting_table())
    write_atomic(PAGE, f"{before}{found}{table}\n\n{END}{after}")
