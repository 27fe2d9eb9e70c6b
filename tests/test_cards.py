"""Which networks fit on which cards."""

import pytest
import torch

from cmp import budgets, config, models
from cmp.runs import forecast, paper
from tests import card_table
from tests.card_table import Fit


def test_the_parts_of_a_step_add_up_to_its_memory():
    fixed, sample, _ = card_table.step_parts("ViT-B-16")
    run = config.parse(config.override(config.profile("gpu"), ["model.start=random"]))
    assert fixed + 512 * sample == pytest.approx(forecast.step_memory(run), rel=0.01)
    assert (fixed + 512 * sample) / 1e9 == pytest.approx(paper.TABLE4["full"].memory, rel=0.02)


def test_recomputed_activations_are_the_inputs_of_blocks_and_one_block():
    """Measured on a small network: what a forward pass saves."""
    _, sample, recomputed = card_table.step_parts("ViT-B-32")
    assert recomputed < sample / 4
    kept = []
    model = models.create_on_meta("ViT-B-32")
    model.set_grad_checkpointing(True)
    state = budgets.shape_state("ViT-B-32", config.Method(), model)

    def keep(x):
        kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = budgets.total_loss(state, budgets.forward_shapes(state, 2))
    inputs = [x for x in kept if x.dim() == 3 and x.shape[-1] == 768]
    assert loss.requires_grad and len(inputs) >= 12  # of the image tower's blocks


def test_what_fits_is_the_largest_power_of_two(monkeypatch):
    gigabyte = 1e9
    monkeypatch.setattr(
        card_table, "step_parts", lambda name: (2 * gigabyte, gigabyte, gigabyte / 10)
    )
    usable = forecast.USABLE_MEMORY

    def fit(memory, recomputed=False):
        return card_table.fit_model("x", memory * gigabyte / usable, recomputed)

    assert fit(600) == Fit(512, 514 * gigabyte)
    assert fit(513) == Fit(256, 258 * gigabyte)
    assert fit(9.9) is None and fit(9.9, True) == Fit(64, 8.4 * gigabyte)
    assert fit(2.7, True) is None
    cell = lambda memory: card_table.fit_cell("x", memory * gigabyte / usable)  # noqa: E731
    assert cell(513) == "256 (258 GB) / 512 (53 GB)"
    assert (cell(9.9), cell(2.7)) == ("none / 64 (8 GB)", "does not fit")
    monkeypatch.setattr(card_table, "step_parts", lambda name: (2 * gigabyte, gigabyte, None))
    assert fit(9.9, True) is None


def test_the_page_has_the_table():
    """Of the smaller networks; `python -m tests.card_table` writes all."""
    names = ("ViT-B-32", "ViT-B-16")
    lines = card_table.committed().splitlines()
    assert lines[:4] == card_table.as_markdown(card_table.fitting_table(names)).splitlines()
    assert [line.split("`")[1] for line in lines[2:]] == list(card_table.MODELS)
