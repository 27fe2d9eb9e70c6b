"""Write the table of `book/manual.md` that says which networks fit on which cards, by the bytes of
a training step: `python -m tests.card_table`, two minutes."""

import functools
from typing import NamedTuple

import pandas as pd

from cmp import config
from cmp.files import write_atomic
from cmp.runs import forecast
from cmp.runs.forecast import DEVICES, USABLE_MEMORY
from lab.evidence import BOOK

PAGE = BOOK / "manual.md"
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
        bytes: The bytes of a step.
    """

    micro_batch: int
    bytes: float

    def __str__(self) -> str:
        return f"{self.micro_batch} ({self.bytes / 1e9:.0f} GB)"


def fit_model(name: str, memory: float, recomputed: bool) -> Fit | None:
    """Return how full fine-tuning of a network in bf16 fits into a memory, at batch `BATCH`.

    Args:
        name: The name of an open_clip model.
        memory: The memory in bytes, of which `USABLE_MEMORY` is used.
        recomputed: Whether activations are recomputed in the backward pass.

    Returns:
        The largest micro-batch, or None if not even `SMALLEST` samples fit.
    """
    fixed, *samples = step_parts(name)
    size = BATCH
    while size >= SMALLEST and (each := samples[recomputed]) is not None:
        if (needed := fixed + size * each) <= USABLE_MEMORY * memory:
            return Fit(size, needed)
        size //= 2
    return None


def fit_cell(name: str, memory: float) -> str:
    """Return the cell of a network and a memory: what fits, and what fits with recomputation."""
    both = [fit_model(name, memory, recomputed) for recomputed in (False, True)]
    return " / ".join(str(fit or "none") for fit in both) if any(both) else "does not fit"


@functools.cache
def step_parts(name: str) -> tuple[float, float, float | None]:
    """Return the bytes of a step of full fine-tuning in bf16.

    Args:
        name: The name of an open_clip model.

    Returns:
        The bytes that do not depend on the number of samples; those of a sample's activations; and
        the latter if they are recomputed, or None if the network does not support that.
    """
    tree = config.override(config.profile("gpu"), [f"model.name={name}", "model.start=random"])
    runs = [config.parse(config.override(tree, [f"training.batch={n}"]), name) for n in (2, 4)]
    few, more = map(forecast.step_memory, runs)
    sample, recomputed = (more - few) / 2, None
    if forecast.recomputed_activations(runs[0]) is not None:
        few_again, more_again = (forecast.step_memory(run, recomputed=True) for run in runs)
        recomputed = (more_again - few_again) / 2
    return few - 2 * sample, sample, recomputed


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
        f"{memory / 1e9:.0f} GB ({', '.join(own)})": [fit_cell(name, memory) for name in names]
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
