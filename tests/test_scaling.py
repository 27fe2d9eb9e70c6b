"""Scaling: what settings cost, curves and rankings, the catalogue of real models, 8-bit weights."""

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cmp import budgets, config, mixtures, models, schedules
from cmp.embedded import models as embedded_models
from cmp.experiments import pretraining, studies
from cmp.experiments.claims import AGGREGATES, setting_means
from cmp.experiments.paper import model_catalogue
from cmp.readers.files import read_yaml
from lab import analyses, chapters, explorers, figures
from tests import chapter_code
from tests.test_widgets import parts_of

SIZES = {"tiny-half": 0.5, "tiny-one": 1, "tiny-double": 2, "tiny-quad": 4}


def step_flops(name):
    return budgets.full_cost(config.parse({"model": {"name": name, "start": "random"}})).step


@pytest.mark.parametrize("name", SIZES)
def test_the_family_has_the_sizes_that_it_says(name):
    assert step_flops(name) / step_flops("tiny") == pytest.approx(SIZES[name], rel=0.03)


def test_the_sibling_of_tiny_s_size_is_tiny():
    one, other = (models.create_model(name).state_dict() for name in ("tiny", "tiny-one"))
    assert one.keys() == other.keys()
    assert all(torch.equal(x, other[name]) for name, x in one.items())


def test_compute_is_told_in_runs_of_the_profile():
    run_config = config.parse(config.profile("cpu"))
    assert analyses.run_compute(run_config) == analyses.compute_unit()
    tree = config.override(config.profile("cpu"), ["stream.tasks=16", "training.steps=80"])
    assert analyses.run_compute(config.parse(tree)) == pytest.approx(4 * analyses.compute_unit())
    under = ["method.name=lora", "training.budget=1.0"]
    found = analyses.run_compute(config.parse(config.override(config.profile("cpu"), under)))
    assert 0.98 * analyses.compute_unit() < found <= analyses.compute_unit()


def test_costs_of_the_chapter_s_settings():
    costs = analyses.setting_costs(studies.load_study("05"))
    for name, row in costs.iterrows():
        times = [float(word[:-1]) for word in name.split(", ") if word.endswith("x")] or [1.0]
        assert row["compute"] == pytest.approx(times[0], rel=0.025), name
    assert set(costs["updates"]) == {4, 8, 16, 32}
    assert set(costs["method"]) == {"full", "ema", "lora"}


def test_means_have_intervals():
    rows = [
        {"setting": "a", "replicate": r, "task": task, "scope": "full"}
        | dict.fromkeys(AGGREGATES, 10.0 * task + r)
        for r in range(3)
        for task in (0, 2)
    ]
    frame = pd.DataFrame(rows)
    assert setting_means(frame).loc["a", "GM"] == 21
    assert setting_means(frame, "change").loc["a", "GM"] == 20
    assert setting_means(frame).loc["a", "GM half"] == pytest.approx(4.303 / 3**0.5, rel=1e-3)


def test_agreement_is_held_against_what_replicates_say_of_each_other():
    """By hand: `other` ranks as `tiny` does in both replicates, which rank differently."""
    scores = {"tiny: a": [1, 3], "tiny: b": [2, 2], "tiny: c": [3, 1]}
    scores |= {name.replace("tiny", "other"): [10 * x for x in v] for name, v in scores.items()}
    one = pd.DataFrame(scores, dtype=float)
    found = chapter_code.definitions("05")["rank_agreements"](one, ["other"])
    assert found.loc["other", "mean"] == found.loc["other", "min"] == 1
    assert found.loc["tiny, other replicates", "mean"] == -1


def test_the_catalogue_agrees_with_the_paper_s_model():
    found = model_catalogue(("ViT-B-32", "ViT-B-16"))
    row = found.loc["ViT-B-16"]
    assert row["parameters"] == pytest.approx(149.6, abs=0.1)
    assert row["GFLOPs"] == pytest.approx(123.0, abs=0.1)
    assert row["steps"] == pytest.approx(28_400, rel=0.01)
    assert row["samples"] == row["steps"] * 512
    assert found.loc["ViT-B-32", "steps"] > row["steps"]


@given(st.integers(0, 2**31), st.floats(1e-6, 1e3))
def test_eight_bits_lose_half_a_scale_at_most(seed, size):
    generator = torch.Generator().manual_seed(seed)
    weights = {
        "matrix": size * torch.randn(5, 7, generator=generator),
        "kernel": size * torch.randn(4, 3, 2, 2, generator=generator),
        "zero": torch.zeros(2, 3),
        "bias": torch.randn(5, generator=generator),
        "scalar": torch.tensor(2.5),
    }
    found = embedded_models.quantize(weights)
    back = embedded_models.dequantize(found)
    assert back.keys() == weights.keys()
    assert found["matrix"].dtype == found["kernel"].dtype == torch.int8
    for name, x in weights.items():
        if x.dim() < 2:
            assert torch.equal(back[name], x.half().float())
        else:
            scale = found[f"{name}.scale"].view(-1, *[1] * (x.dim() - 1))
            assert ((back[name] - x).abs() <= 0.5001 * scale).all()


def test_eight_bits_are_read_as_they_were_stored(tmp_path):
    model = models.create_model("tiny-half", 3)
    path = tmp_path / "weights.safetensors"
    pretraining.save_base(model, path)
    models.load_weights(model, path, embedded_models.read_weights)
    first = models.weights_digest(model)
    pretraining.save_base(model, path)
    models.load_weights(model, path, embedded_models.read_weights)
    assert models.weights_digest(model) == first  # 8 bits of 8 bits are the same
    assert path.stat().st_size < 1.1 * sum(p.numel() for p in model.parameters())


def test_lengths_are_those_of_the_cards():
    paths = [*pretraining.BASES.glob("*-s0-annealed.json")]
    paths += (pretraining.BASES / "lengths").glob("*.json")
    found = chapter_code.definitions("05")["read_cards"](paths)
    for name in SIZES:
        rows = found[found["model"] == name]
        assert len(rows) >= 2
        assert rows["steps"].max() >= 5200
    assert found["A_ZS"].between(0, 100).all()


def test_curves_draw_a_line_a_group_and_ticks_at_the_values():
    points = pd.DataFrame(
        {"group": ["a", "a", "b"], "x": [1, 2, 1], "y": [3.0, 4, 5], "y half": [1.0, np.nan, 1]}
    )
    figure = figures.plot_curves(points, "x", {"y": "Score (%)"}, "Compute")
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.get_xticklabels()] == ["1", "2"]
    assert {text.get_text() for text in axes.texts} == {"a", "b"}
    assert axes.get_ylabel() == "Score (%)"


def test_rankings_put_the_best_on_top():
    scores = pd.DataFrame({"tiny": [3.0, 1, 2], "vit": [1.0, 2, 3]}, index=["a", "b", "c"])
    (axes,) = figures.plot_ranks(scores, "GM").axes
    lines = [line.get_ydata().tolist() for line in axes.lines]
    assert lines == [[1, 3], [3, 2], [2, 1]]
    bottom, top = axes.get_ylim()
    assert bottom > top


@pytest.fixture(scope="module")
def invented():
    """A trajectory of every setting of study 05 that rises with the setting's place in the grid."""
    rows = [
        {"setting": name, "replicate": r, "task": task, "scope": "full"}
        | dict.fromkeys(AGGREGATES, 20.0 + task * (place + r))
        for place, name in enumerate(studies.load_study("05").settings)
        for r in range(3)
        for task in (0, 1)
    ]
    return pd.DataFrame(rows)


def test_sweeps_hold_what_they_vary_and_nothing_else():
    costs = analyses.setting_costs(studies.load_study("05"))
    sizes, steps, updates = (
        f(costs) for f in (analyses.size_rows, analyses.step_rows, analyses.update_rows)
    )
    assert set(sizes["group"]) == set(SIZES)
    assert sizes["updates"].nunique() == 1
    assert set(steps["group"]) == set(updates["group"]) == {"full", "ema", "lora"}
    assert set(steps["updates"]) == {8}
    assert set(updates["x"]) == {4, 8, 16, 32}
    assert not any("control" in name for name in costs.index)


@pytest.mark.usefixtures("clean_drawing")
def test_the_scale_explorer_answers_each_question(invented):
    controls, _, sentence, picture, *_ = parts_of(
        explorers.scale_explorer(studies.load_study("05"), invented)
    )
    assert "tiny-quad, 4x, 40 steps in each of 8 updates" in sentence.value
    before = bytes(picture.value)
    controls["Question"].value = "Number of updates, for the same compute"
    assert "LoRA, T=32" in sentence.value
    assert bytes(picture.value) != before
    before = bytes(picture.value)
    controls["Measure"].value = "change"
    assert bytes(picture.value) != before


def test_the_regime_of_a_run_is_computed_by_every_measure_of_the_paper_s(corpus):
    paper = read_yaml(chapters.BOOK / "regime.yaml")
    run = config.parse(config.override({}, ["stream.tasks=3", "mixture.replay=0.5"]))
    joined = config.override(run.to_dict(), ["optimizer.carry=false"])
    table = analyses.regime_table({"a": run, "b": config.parse(joined)}, corpus)
    assert list(table.index) == list(paper)
    assert list(table["the paper"]) == list(paper.values())
    assert table.loc["moments", "a"] == "carried"
    assert table.loc["moments", "b"] == "begun anew"
    column = table["a"]
    assert column["updates"] == "3"
    # a third of 40 batches of 64, and half of the first batches, where there is no buffer
    pools = mixtures.task_pools(run, corpus)
    drawn = [40 * 32, 40 * 21, 40 * 21]
    passes = [count / len(each.update) for count, each in zip(drawn, pools, strict=True)]
    assert float(column["passes over an update's images"]) == pytest.approx(
        np.median(passes), rel=0.1
    )
    draws = 40 * (32 + 22 + 22) / len(pools[0].pretraining)
    assert float(column["draws of a replayed pool image"]) == pytest.approx(draws, rel=0.01)


def test_the_paper_s_sum_of_learning_rates_is_that_of_its_profile():
    run = config.parse(config.profile("gpu"))
    rates = schedules.learning_rates(run.schedule, run.stream.tasks, run.training.steps)
    paper = read_yaml(chapters.BOOK / "regime.yaml")
    assert rates.sum() == pytest.approx(paper["sum of learning rates"], rel=0.02)
    assert run.training.steps == pytest.approx(paper["steps of an update"], rel=0.01)
