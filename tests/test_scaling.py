"""Scaling: sizes of networks, curves, the catalogue of real models, regimes, 8-bit weights."""

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmark import pretraining
from cmp import budgets, config, mixtures, models
from cmp.embedded import models as embedded_models
from cmp.errors import CmpError
from cmp.parsing import read_yaml
from cmp.releases.sentences import signed
from cmp.runs import launch, store
from cmp.runs.paper import model_catalogue
from lab import analyses, chapters, figures
from lab.evidence import verdicts
from lab.evidence.scores import (
    MEASURES,
    by_replicate,
    claims_level,
    estimate_mean,
    setting_estimates,
    t_factor,
    t_interval,
)

SIZES = {
    "tiny-half": ("tiny", 0.5),
    "tiny-one": ("tiny", 1),
    "tiny-double": ("tiny", 2),
    "tiny-quad": ("tiny", 4),
    "small-quarter": ("small", 0.265),
}
"""A network, and its FLOPs as a multiple of those of another."""


def step_flops(name):
    return budgets.full_cost(config.parse({"model": {"name": name, "start": "random"}})).step


@pytest.mark.parametrize("name", SIZES)
def test_the_family_has_the_sizes_that_it_says(name):
    other, ratio = SIZES[name]
    assert step_flops(name) / step_flops(other) == pytest.approx(ratio, rel=0.03)


def test_the_sibling_of_tiny_s_size_is_tiny():
    one, other = (models.create_model(name).state_dict() for name in ("tiny", "tiny-one"))
    assert one.keys() == other.keys()
    assert all(torch.equal(x, other[name]) for name, x in one.items())


def test_means_have_intervals_over_bases():
    rows = [
        {"setting": "a", "replicate": r, "task": task, "scope": "full", "base": r % 3, "planned": 6}
        | dict.fromkeys(MEASURES, 10.0 * task + r % 3)
        for r in range(6)
        for task in (0, 2)
    ]
    frame = pd.DataFrame(rows)
    assert analyses.setting_means(frame).loc["a", "GM"] == 21
    assert t_factor(3, 0.95) == pytest.approx(4.303, rel=1e-3)
    half = t_factor(3, claims_level()) / 3**0.5
    assert setting_estimates(frame, "a")["GM"].half == pytest.approx(half)
    less = setting_estimates(frame[frame["replicate"] < 5], "a")["GM"]
    assert less.in_words() == "+20.8 (preliminary, 5 of 6 streams)"


def test_a_run_ends_after_its_own_last_task_on_the_widest_test():
    places = [(name, task, scope) for name, tasks in (("a", 2), ("joint", 1))
              for task in range(tasks + 1) for scope in ("subset", "full")]  # fmt: skip
    table = pd.DataFrame(places, columns=["setting", "task", "scope"])
    table = table[(table["scope"] == "subset") | (table["task"] != 1) | (table["setting"] != "a")]
    ends = store.final_scores(table.assign(replicate=0))
    assert ends[["setting", "task", "scope"]].to_numpy().tolist() == [
        ["a", 2, "full"],
        ["joint", 1, "full"],
    ]
    is_scored = (table["setting"] == "a") | (table["scope"] == "subset")
    with pytest.raises(CmpError, match="trajectory: setting 'joint': scored on a subset"):
        store.final_scores(table[is_scored].assign(replicate=0))
    of_one = table[table["setting"] == "a"].drop(columns="setting")  # as of a single run
    assert store.after_last_task(of_one)["scope"].tolist() == ["subset", "full"]


def test_an_update_on_a_subset_is_not_given_the_scores_of_the_month_before_it():
    places = [(0, "full"), (1, "full"), (2, "subset")]
    table = pd.DataFrame(places, columns=["task", "scope"])
    assert store.final_scores(table).to_numpy().tolist() == [[2, "subset"]]


def test_the_catalogue_agrees_with_the_paper_s_model():
    found = model_catalogue(("ViT-B-32", "ViT-B-16"))
    row = found.loc["ViT-B-16"]
    assert row["parameters"] == pytest.approx(149.6, abs=0.1)
    assert row["GFLOPs"] == pytest.approx(123.0, abs=0.1)
    assert row["steps"] == pytest.approx(28_400, rel=0.01)
    assert row["samples"] == row["steps"] * 512
    assert found.loc["ViT-B-32", "steps"] > row["steps"]


@pytest.mark.numbers
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


@pytest.mark.numbers
def test_eight_bits_are_read_as_they_were_stored(tmp_path):
    model = models.create_model("tiny-half", 3)
    path = tmp_path / "weights.safetensors"
    pretraining.save_base(model.state_dict(), path)
    read = models.load_from_file("tiny-half", path)
    first = models.weights_digest(read)
    pretraining.save_base(read.state_dict(), path)
    read = models.load_from_file("tiny-half", path)
    assert models.weights_digest(read) == first  # 8 bits of 8 bits are the same
    assert path.stat().st_size < 1.1 * sum(p.numel() for p in model.parameters())


def test_curves_draw_a_line_a_group_and_ticks_at_the_values():
    points = pd.DataFrame(
        {"group": ["a", "a", "b"], "x": [1, 2, 1], "y": [3.0, 4, 5], "y half": [1.0, np.nan, 1]}
    )
    figure = figures.plot_curves(points, "x", {"y": "Score (%)"}, "Compute")
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.get_xticklabels()] == ["1", "2"]
    assert {text.get_text() for text in axes.texts} == {"a", "b"}
    assert axes.get_ylabel() == "Score (%)"


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
    drawn = column["draws of a replayed image, in all"]
    assert float(drawn) == pytest.approx(draws, rel=0.01)


def test_the_paper_s_sum_of_learning_rates_is_that_of_its_profile():
    run = config.parse(config.profile("gpu"))
    rates = analyses.learning_rates(run.schedule, run.stream.tasks, run.training.steps)
    paper = read_yaml(chapters.BOOK / "regime.yaml")
    assert rates.sum() == pytest.approx(paper["sum of learning rates"], rel=0.02)
    assert run.training.steps == pytest.approx(paper["steps of an update"], rel=0.01)


def test_means_over_shared_streams_compare_the_same_streams():
    places = {"plain": "front/plain, peak 0.00063", "joint": "scaling-more/joint"}
    scores = {words: verdicts.setting_scores(*at.split("/")) for words, at in places.items()}
    common = scores["plain"].index.intersection(scores["joint"].index)
    assert 0 < len(common) < len(scores["plain"])
    means = analyses.mean_scores(places, shared=True)
    for words, each in scores.items():
        assert means.loc[words, "A_KA"] == pytest.approx(each.loc[common, "A_KA"].mean())
    assert set(means["streams"]) == {len(common)}
    of_common = estimate_mean(scores["plain"].loc[common, "A_KA"], scores["plain"]["base"], 5)
    assert means.loc["plain", "A_KA half"] == pytest.approx(of_common.half)
    assert set(means["preliminary"]) == {""}
    assert analyses.mean_scores(places).loc["plain", "streams"] == len(scores["plain"])


def test_tables_are_shown_with_thousands_and_dashes():
    table = pd.DataFrame({"a": [1234567, 1], "b": [0.26, None], "c": ["x", "y"]})
    shown = analyses.readable(table.rename_axis("name"))
    assert shown.to_numpy().tolist() == [["1,234,567", "0.3", "x"], ["1", "–", "y"]]
    assert shown.index.name is None


def test_means_have_the_interval_of_a_textbook():
    mean, error, half = t_interval(np.array([1.0, 3.0]), 0.95)
    assert (mean, error) == (2.0, pytest.approx(1.0))
    assert half == pytest.approx(12.706, abs=1e-3)  # the quantile of one degree of freedom
    assert t_interval(np.array([5.0]), 0.95)[0] == 5.0
    assert np.isnan(t_interval(np.array([5.0]), 0.95)[1:]).all()
    assert np.isnan(t_interval(np.array([]), 0.95)).all()


def test_points_have_a_sign_but_zero():
    assert [signed(x) for x in (2, -10.14, 0.04, -0.04)] == ["+2.0", "−10.1", "0.0", "0.0"]


def test_a_run_that_is_there_twice_is_no_second_replicate():
    rows = {"setting": ["a", "b"], "replicate": 0, "task": 1, "scope": "full"}
    once = pd.DataFrame(rows | {"A_KA": [1.0, 2.0], "A_ZS": [3.0, 4.0], "GM": 2.0})
    assert by_replicate(once).loc[0].to_list() == [1, 2, 3, 4, 2, 2]
    twice = pd.concat([once, once.iloc[1:]])
    with pytest.raises(CmpError, match="replicate 0 of 'b' occurs twice"):
        by_replicate(twice)


@pytest.fixture
def turn():
    """Steps per update -> what chapter 05 makes of them before it trains the reader's run."""
    cells = chapters.notebook(chapters.select(["05"])[0]).cells
    [code] = [cell.source for cell in cells if "mine = " in cell.source]

    def cut(steps):
        scope = {"launch": launch, "profile": "quick", "stream_seed": 3, "steps": steps}
        exec(code.partition("# the weight")[0], scope)
        return scope["cut"]

    return cut


@pytest.mark.parametrize("steps", [1, 2, 201, 300])
def test_a_reader_s_steps_that_the_budget_cannot_buy_are_refused(turn, steps):
    with pytest.raises(AssertionError, match="steps: choose 3 to 200"):
        turn(steps)


@pytest.mark.parametrize(("steps", "tasks"), [(3, 66), (50, 4), (110, 1), (200, 1)])
def test_a_reader_is_told_which_part_of_the_budget_is_used(turn, capsys, corpus, steps, tasks):
    run_config = launch.from_keywords("quick", turn(steps))
    assert run_config.stream.tasks == tasks
    assert f"{tasks * steps} of 200 steps are used" in capsys.readouterr().out
    mixtures.task_pools(budgets.settle(run_config, corpus), corpus)  # every batch is filled
