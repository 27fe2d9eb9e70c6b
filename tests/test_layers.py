"""Rates that fall from block to block, and locked towers whose last blocks train."""

import dataclasses
import re

import pytest
import torch

from cmp import budgets, config, mixtures, models, towers
from cmp.config import Method
from cmp.errors import CmpError
from cmp.methods import layers
from cmp.training import create_optimizer, make_train_state, train_step, trainable_parameters

TIMM, CUSTOM = "tiny", "ViT-B-16-SigLIP"


def state_of(network, **settings):
    """A network on the meta device, prepared by a method."""
    return budgets.shape_state(network, Method(**settings), models.create_on_meta(network))


def test_layers_are_counted_from_the_output_of_each_tower():
    found = towers.layers_from_top(models.create_on_meta("ViT-B-16"))
    assert {name: found[name] for name in found if "resblocks" not in name} == {
        **dict.fromkeys(("visual.class_embedding", "visual.positional_embedding"), 13),
        **dict.fromkeys(("visual.conv1.weight", "token_embedding.weight"), 13),
        **dict.fromkeys(("visual.ln_pre.weight", "visual.ln_pre.bias", "positional_embedding"), 13),
        **dict.fromkeys(("visual.proj", "visual.ln_post.weight", "visual.ln_post.bias"), 0),
        **dict.fromkeys(("ln_final.weight", "ln_final.bias", "text_projection", "logit_scale"), 0),
    }
    for tower in ("visual.transformer", "transformer"):
        for number in (0, 11):
            names = [n for n in found if n.startswith(f"{tower}.resblocks.{number}.")]
            assert names and {found[n] for n in names} == {12 - number}


@pytest.mark.parametrize("name", [TIMM, CUSTOM, "RN50"])
def test_in_other_networks_the_stem_is_lowest_and_what_projects_is_highest(name):
    found = towers.layers_from_top(models.create_on_meta(name))
    stems = ("conv1", "patch_embed", "stem", "token_embedding")
    for tower in (True, False):
        mine = {n: layer for n, layer in found.items() if n.startswith("visual.") == tower}
        lowest = max(mine.values())
        assert lowest > 1, "there are blocks"
        outside = [n for n in mine if not re.search(r"\d\.", n.replace("conv1.", ""))]
        assert all(mine[n] == lowest for n in outside if any(f".{s}" in f".{n}" for s in stems))
        assert all(mine[n] == 0 for n in mine if n.endswith(("text_projection", "ln_final.weight")))


@pytest.mark.numbers
def test_each_block_s_rate_is_a_fraction_of_the_next_one_s(corpus):
    run = config.parse(
        {"method": {"name": "full", "layer_decay": 0.5}, "training": {"precision": "fp32"}}
    )
    state = make_train_state(run, corpus)
    optimizer = create_optimizer(state)
    assert {group["multiple"] for group in optimizer.param_groups} == {
        0.5**n for n in set(towers.layers_from_top(state.model).values())
    } | {1.0}
    matrices = {group["weight_decay"] for group in optimizer.param_groups for p in group["params"]
                if p.ndim > 1}  # fmt: skip
    assert matrices == {run.optimizer.weight_decay}
    names = {id(p): name for name, p in state.model.named_parameters()}
    multiples = layers.rate_multiples(state)
    for group in optimizer.param_groups:
        assert all(multiples[names[id(p)]] == group["multiple"] for p in group["params"])

    pools = mixtures.task_pools(run, corpus)
    before = {name: p.detach().clone() for name, p in state.model.named_parameters()}
    batch = next(state.batches(pools[0], 0, [0]))
    train_step(state, optimizer, batch, 0, 0, 1e-3)
    assert {group["lr"] for group in optimizer.param_groups} == {
        1e-3 * group["multiple"] for group in optimizer.param_groups
    }
    # Adam's first step moves each weight by its rate
    for name, p in state.model.named_parameters():
        if p.ndim == 1 and p.grad.abs().min() > 1e-5 and "logit" not in name:
            moved = (p - before[name]).abs().mean().item()
            assert moved == pytest.approx(1e-3 * multiples[name], rel=0.02), name


@pytest.mark.numbers
def test_a_decay_of_one_is_the_same_run(corpus):
    def weights(**settings):
        run = config.parse({"method": {"name": "full", **settings}, "seed": 3})
        state = make_train_state(run, corpus)

        batch = next(state.batches(mixtures.task_pools(run, corpus)[0], 0, [0]))
        train_step(state, create_optimizer(state), batch, 0, 0, 1e-3)
        return state.model.state_dict()

    plain, other = weights(), weights(layer_decay=1.0)
    assert all(torch.equal(plain[name], other[name]) for name in plain)


@pytest.mark.parametrize(("method", "tower"), [("locked-image", "visual."), ("locked-text", "")])
def test_the_last_blocks_of_a_locked_tower_train_if_asked(method, tower):
    trained = {
        count: set(trainable_parameters(state_of("ViT-B-16", name=method, unlock=count).model))
        for count in (None, 1, 3)
    }
    other = "transformer." if tower else "visual."
    assert {n for n in trained[None] if n.startswith(other)}
    new = trained[3] - trained[None]
    blocks = {int(n.split("resblocks.")[1].split(".")[0]) for n in new if "resblocks" in n}
    assert blocks == {9, 10, 11}
    after = ("visual.proj", "visual.ln_post.weight") if tower else ("text_projection",)
    assert set(after) <= new
    assert all(n.startswith("visual.") == bool(tower) for n in new)
    assert trained[1] < trained[3]
    assert ("logit_scale" in trained[3]) == (method == "locked-image")


def test_unlocking_a_whole_tower_or_another_method_s_is_refused():
    with pytest.raises(CmpError, match=r"method\.unlock: 12 unlocks all 12 blocks"):
        state_of("ViT-B-16", name="locked-image", unlock=12)
    for key, value in (("unlock", 1), ("layer_decay", 0.9)):
        with pytest.raises(CmpError, match=f"{key}: not used by 'lora'"):
            Method("lora", **{key: value})
    with pytest.raises(CmpError, match="unlock: not used by 'full'"):
        Method("full", unlock=1)
    with pytest.raises(CmpError, match="layer_decay"):
        Method("full", layer_decay=1.5)


def test_locked_towers_without_the_setting_are_as_before_and_unlocked_ones_cost_more():
    plain, some = (budgets.step_cost("tiny-vit", 4, "locked-image", **settings)
                   for settings in ({}, {"unlock": 1}))  # fmt: skip
    full = budgets.step_cost("tiny-vit", 4)
    assert plain.step < some.step < full.step
    assert plain.memory < some.memory < full.memory
    assert dataclasses.asdict(Method("locked-image"))["unlock"] is None
    assert config.RunConfig(method=Method("locked-image")).changes() == {
        "method.name": "locked-image"
    }
