"""Rules keep what they promise, and each agrees with a clear version of itself; policies are the
recurrences of the specification, in constant memory where that can be."""

import copy
import dataclasses
import itertools
import math
import weakref
from pathlib import Path

import forked
import numpy as np
import options
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from options import small
from safetensors.torch import save_file
from test_budgets import Held
from test_resume import BOUNDARY, MemoryManager

from cmp import config, models, registry, towers
from cmp.config import Merging, Schedule
from cmp.errors import CmpError
from cmp.merging import apply, policies, ranks, rules
from cmp.merging.apply import merge
from cmp.merging.files import merge_files
from cmp.merging.policies import TaskEnd, apply_policy
from cmp.merging.rules import MergeOptions, merge_weights, tensor_settings
from cmp.runs import checkpoints
from cmp.runs.runner import Observer, execute
from cmp.schedules import learning_rate
from cmp.seeds import torch_generator

pytestmark = pytest.mark.numbers
RULES = registry.option_names("merge_rule")
PAIR_RULES = registry.option_names("merge_rule", count=2)
TASK_VECTOR_RULES = registry.option_names("merge_rule", base=True)
DRAWING_RULES = registry.option_names("merge_rule", draws=True)
POLICIES = [name for name in registry.option_names("merge_policy") if name != "none"]

SHAPES = {"a.weight": (7, 5), "a.bias": (5,), "logit_scale": (), "b.weight": (3, 4, 2)}
SEEDS = st.integers(0, 2**31 - 1)
DENSITIES = st.floats(0.01, 1)
COUNTS = st.integers(1, 5)


def weights(seed, shapes=None, size=1.0):
    noise = torch_generator("test", seed)
    shapes = shapes or SHAPES
    return {name: size * torch.randn(shape, generator=noise) for name, shape in shapes.items()}


def several(count, seed, size=0.1):
    """Models, newest first, and the base that they are a little off."""
    base = weights(seed)
    near = [weights(seed + number, size=size) for number in range(1, count + 1)]
    return [{name: x + base[name] for name, x in each.items()} for each in near], base


def close(one, other, rtol=1e-5, atol=1e-6):
    assert one.keys() == other.keys()
    for name, x in one.items():
        torch.testing.assert_close(x, other[name], rtol=rtol, atol=atol)


def identical(one, other):
    return one.keys() == other.keys() and all(torch.equal(x, other[n]) for n, x in one.items())


def merge_with(rule, models_, base, options):
    """The merge by options of all rules, of which `merge` takes those that the rule reads."""
    option = registry.get_option("merge_rule", rule)
    return dict(apply.iter_merged(option, models_, base, options))


def base_for(rule, base):
    return base if rule in TASK_VECTOR_RULES else None


def merges_of(policy):
    """Whether a policy merges "two" models, or those of "all" tasks."""
    return registry.get_option("merge_policy", policy).facts["merges"]


# Clear versions: whole vectors, no blocks, nothing in place.


def flat(model):
    return torch.cat([x.reshape(-1) for x in model.values()])


def shaped(vector, like):
    parts = vector.split([x.numel() for x in like.values()])
    return {n: part.reshape(x.shape) for part, (n, x) in zip(parts, like.items(), strict=True)}


def vectors(tuned, base):
    return torch.stack([flat(model) - flat(base) for model in tuned])


def elect_reference(taus):
    agree = taus.sign() == taus.sum(0).sign()
    agree &= taus != 0
    return (taus * agree).sum(0) / agree.sum(0).clamp(min=1)


def trim_reference(taus, density, outliers=0.0):
    size = taus.shape[1]
    top = round(outliers * size)
    rank = max(size - top - max(1, round(density * size)), 0)
    ranks = taus.abs().sort(dim=1).values
    low, high = ranks[:, rank, None], ranks[:, size - top - 1, None]
    return torch.where((taus.abs() >= low) & (taus.abs() <= high), taus, 0)


def drop_reference(tuned, base, options):
    """By name and block as the fast one draws; the tensors here are one block each."""
    kept = []
    for index, model in enumerate(tuned):
        rows = []
        for name, x in model.items():
            noise = torch_generator("dare", *options.draw, name, 0, index)
            keep = torch.rand(x.numel(), generator=noise) < options.density
            rows.append((x - base[name]).reshape(-1) * keep / options.density)
        kept.append(torch.cat(rows))
    return torch.stack(kept)


def pick_reference(tuned, base, options):
    rows = []
    for name, x in base.items():
        noise = torch_generator("pick", *options.draw, name, 0)
        row = torch.randint(len(tuned), (1, x.numel()), generator=noise)
        taus = torch.stack([(model[name] - x).reshape(-1) for model in tuned])
        rows.append(taus.gather(0, row)[0])
    return torch.cat(rows)


def per_tensor(function):
    def apply(tuned, base, options):
        return torch.cat([
            function([m[name].double() for m in tuned], base[name].double(), options).reshape(-1)
            for name in base
        ]).float()  # fmt: skip

    return apply


def slerp_reference(tuned, base, options):
    a, b = tuned
    cosine = ((a * b).sum() / (a.norm() * b.norm())).clamp(-1, 1)
    angle = torch.acos(cosine)
    w = options.weights[0] if options.weights else 0.5
    if cosine.abs() > 1 - 1e-6:
        return w * a + (1 - w) * b
    return ((w * angle).sin() * a + ((1 - w) * angle).sin() * b) / angle.sin()


def stock_reference(tuned, base, options):
    taus = [x - base for x in tuned if not torch.equal(x, base)]
    k = len(taus)
    if k < 2:
        return base + sum(taus)
    cosines = [
        (x * y).sum() / (x.norm() * y.norm()) for i, x in enumerate(taus) for y in taus[i + 1 :]
    ]
    cos = max(0.0, float(sum(cosines) / len(cosines)))
    return base + k * cos / ((k - 1) * cos + 1) * sum(taus) / k


def total_reference(tuned, base, options):
    return flat(base) + (options.scale or 1 / len(tuned)) * vectors(tuned, base).sum(0)


def matrix_reference(on_matrix, otherwise):
    """Task vectors merged tensor by tensor in fp64, those with two dimensions in a way of their
    own; no name here says that it is a table of embeddings."""

    def merged_vector(tuned, base, options):
        merged = []
        for name, x in base.items():
            taus = [(model[name] - x).double() for model in tuned]
            merged.append((on_matrix if x.ndim == 2 else otherwise)(taus, options).reshape(-1))
        return torch.cat(merged)

    return merged_vector


def opcm_matrix(taus, options):
    """As in the paper, with all of U and V."""
    merged = taus[-1]
    for tau in taus[-2::-1]:
        u, s, vh = torch.linalg.svd(merged)
        split = int((s.cumsum(0) / s.sum() <= options.protect).sum())
        seen = u.T @ tau @ vh.T
        seen.fill_diagonal_(0)
        seen[:split, :split] = 0
        merged = merged + u @ seen @ vh
    return merged


def opcm_reference(tuned, base, options):
    merged = matrix_reference(opcm_matrix, lambda taus, _: sum(taus))(tuned, base, options)
    mean = vectors(tuned, base).norm(dim=1).mean()
    return flat(base) + ((options.scale or 1) * mean / merged.norm() * merged).float()


def tsv_matrix(taus, options):
    rank = min(taus[0].shape) // len(taus)
    if not rank:
        return sum(taus) / len(taus)
    parts = [torch.linalg.svd(tau, full_matrices=False) for tau in taus]
    left, s, right = (
        torch.cat([u[:, :rank] for u, _, _ in parts], 1),
        torch.cat([s[:rank] for _, s, _ in parts]),
        torch.cat([vh[:rank] for _, _, vh in parts]),
    )
    near = [
        u @ vh for u, _, vh in (torch.linalg.svd(x, full_matrices=False) for x in (left, right))
    ]
    return near[0] @ s.diag() @ near[1]


def tsv_reference(tuned, base, options):
    mean = lambda taus, _: sum(taus) / len(taus)  # noqa: E731
    merged = matrix_reference(tsv_matrix, mean)(tuned, base, options)
    return flat(base) + (options.scale or 1) * merged.float()


REFERENCES = {
    "interpolation": lambda tuned, base, options: sum(
        w * flat(m) for w, m in zip(options.weights or [1 / len(tuned)] * len(tuned), tuned,
                                    strict=True)
    ),
    "slerp": per_tensor(slerp_reference),
    "task-arithmetic": total_reference,
    "lines": lambda tuned, base, options: flat(base) + options.alpha * (
        total_reference(tuned, base, options) - flat(base)
    ),  # nothing here is numbered; blocks have their own test
    "model-stock": per_tensor(stock_reference),
    "magmax": lambda tuned, base, options: flat(base) + (options.scale or 1) * vectors(
        tuned, base
    ).gather(0, vectors(tuned, base).abs().max(0, keepdim=True).indices)[0],
    "random": lambda tuned, base, options: flat(base) + (options.scale or 1) * pick_reference(
        tuned, base, options
    ),
    "ties": lambda tuned, base, options: flat(base) + (options.scale or 1) * elect_reference(
        trim_reference(vectors(tuned, base), options.density)
    ),
    "dare": lambda tuned, base, options: flat(base) + (
        options.scale or 1 / len(tuned)
    ) * drop_reference(tuned, base, options).sum(0),
    "dare-ties": lambda tuned, base, options: flat(base) + (options.scale or 1) * elect_reference(
        drop_reference(tuned, base, options)
    ),
    "breadcrumbs": lambda tuned, base, options: flat(base) + (
        options.scale or 1 / len(tuned)
    ) * trim_reference(vectors(tuned, base), options.density, options.outliers).sum(0),
    "breadcrumbs-ties": lambda tuned, base, options: flat(base) + (
        options.scale or 1
    ) * elect_reference(trim_reference(vectors(tuned, base), options.density, options.outliers)),
    "opcm": opcm_reference,
    "tsv": tsv_reference,
}  # fmt: skip


def test_every_rule_of_the_package_has_a_reference():
    rules_ = {rule for rule in RULES if not registry.get_option("merge_rule", rule).sources}
    assert set(REFERENCES) == rules_, "give each rule a clear version of itself in REFERENCES"


@pytest.mark.parametrize("rule", REFERENCES)
@given(SEEDS, COUNTS, st.floats(0.01, 0.9), st.none() | st.floats(0.1, 2))
def test_fast_is_reference(rule, seed, count, density, scale):
    tuned, base = several(2 if rule in PAIR_RULES else count, seed)
    options = MergeOptions(scale=scale, density=density, outliers=0.05, draw=(seed, 3))
    fast = merge_with(rule, tuned, base_for(rule, base), options)
    close(fast, shaped(REFERENCES[rule](tuned, base, options), base), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule not in DRAWING_RULES])
@pytest.mark.parametrize("place", [0, 1, 2], ids=["newest", "oldest", "base"])
@given(SEEDS)
@settings(max_examples=20)
def test_mixed_types_give_what_the_widest_would_give_for_all(rule, place, seed):
    """Thresholds in fp32 once trimmed entries that fp64 puts a hair below them."""
    tuned, base = several(2, seed, size=1.0)
    wide = [{name: x.double() for name, x in each.items()} for each in [*tuned, base]]
    mixed = [*tuned, base]
    mixed[place] = wide[place]
    merged, expected = (merge(rule, x[:2], base_for(rule, x[2])) for x in (mixed, wide))
    if place == 2 and rule not in TASK_VECTOR_RULES:  # nothing is in fp64
        close(merged, {name: x.float() for name, x in expected.items()})
    else:
        assert identical(merged, {n: x.to(merged[n].dtype) for n, x in expected.items()})


@pytest.mark.parametrize("rule", RULES)
def test_blocks_are_seamless(rule, monkeypatch):
    """Tensors larger than a block; rules that draw at random draw again in each, so not they."""
    tuned, base = several(2, 5)
    merged = merge(rule, tuned, base_for(rule, base))
    monkeypatch.setattr(apply, "BLOCK_SIZES", {"linear": 4, "entries": 4})
    monkeypatch.setattr(ranks, "THRESHOLD_BLOCK", 4)
    monkeypatch.setattr(rules, "PRODUCT_BLOCK", 4)
    blocked = merge(rule, tuned, base_for(rule, base))
    if rule in DRAWING_RULES:
        assert not identical(blocked, merged)
        options = MergeOptions(density=1.0)
        pair = [merge_with(rule, [tuned[0]], base, options) for _ in range(2)]
        assert identical(*pair)
        close(pair[0], tuned[0])
    else:
        close(blocked, merged)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_rule_leaves_its_arguments_alone(rule, count):
    tuned, base = several(2 if rule in PAIR_RULES else count, 0)
    kept = copy.deepcopy([base, *tuned])
    merged = merge(rule, tuned, base_for(rule, base))
    assert all(identical(one, other) for one, other in zip([base, *tuned], kept, strict=True))
    places = {x.data_ptr() for each in [base, *tuned] for x in each.values()}
    assert places.isdisjoint(x.data_ptr() for x in merged.values())


@pytest.mark.parametrize(
    "rule",
    ["interpolation", "slerp", "task-arithmetic", "model-stock", "magmax", "random", "ties", "dare",
     "dare-ties"],
)  # fmt: skip
@given(SEEDS, COUNTS)
def test_equal_models_give_themselves(rule, seed, count):
    tuned, base = several(1, seed)
    count = 2 if rule in PAIR_RULES else count
    whole = MergeOptions(density=1.0)
    close(merge_with(rule, tuned * count, base_for(rule, base), whole), tuned[0])


@pytest.mark.parametrize("rule", registry.option_names("merge_rule", idempotent=True))
@given(SEEDS, COUNTS)
@settings(max_examples=10)
def test_models_that_did_not_move_give_themselves(rule, seed, count):
    base = weights(seed)
    count = 2 if rule in PAIR_RULES else count
    close(merge(rule, [base] * count, base_for(rule, base)), base)


@pytest.mark.parametrize("rule", registry.option_names("merge_rule", "weight"))
@given(SEEDS, st.floats(0.01, 0.99))
def test_weights_are_of_the_newest_first(rule, seed, weight):
    (newer, older), _ = several(2, seed, size=1.0)
    assert identical(merge(rule, [newer, older], weights=(1.0, 0.0)), newer)
    assert identical(merge(rule, [newer, older], weights=(0.0, 1.0)), older)
    turned = merge(rule, [older, newer], weights=(1 - weight, weight))
    close(merge(rule, [newer, older], weights=(weight, 1 - weight)), turned)


@pytest.mark.parametrize(
    "rule",
    ["interpolation", "task-arithmetic", "lines", "model-stock", "ties", "breadcrumbs",
     "breadcrumbs-ties", "tsv"],
)  # fmt: skip
@given(SEEDS, st.permutations(range(4)))
@settings(max_examples=10)
def test_these_rules_know_no_order(rule, seed, order):
    tuned, base = several(4, seed)
    base = base_for(rule, base)
    turned = merge(rule, [tuned[place] for place in order], base)
    close(turned, merge(rule, tuned, base), rtol=1e-3, atol=1e-4)


@given(SEEDS, st.floats(0, 1))
def test_slerp_keeps_the_norm_of_equal_norms(seed, weight):
    a, b = (torch.randn(64, generator=torch_generator("s", seed, i)) for i in range(2))
    b = b * a.norm() / b.norm()
    merged = merge("slerp", [{"x": a}, {"x": b}], weights=(weight, 1 - weight))["x"]
    assert merged.norm().item() == pytest.approx(a.norm().item(), rel=1e-4)
    angle = math.acos(torch.dot(a, b) / a.norm() ** 2)
    reached = math.acos(min(1.0, torch.dot(merged, b) / (merged.norm() * b.norm())))
    assert reached == pytest.approx(weight * angle, abs=2e-3)


def test_slerp_of_opposites_and_zeros_is_a_line():
    a = {"x": torch.tensor([1.0, 2.0]), "y": torch.zeros(2)}
    b = {"x": torch.tensor([-2.0, -4.0]), "y": torch.ones(2)}
    close(merge("slerp", [a, b]), merge("interpolation", [a, b]))


def test_dare_keeps_the_expected_value():
    base = {"x": torch.zeros(200_000)}
    merged = merge("dare", [{"x": torch.ones(200_000)}], base, density=0.25)["x"]
    assert set(merged.tolist()) == {0.0, 4.0}
    assert merged.mean().item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("rule", DRAWING_RULES)
def test_chance_is_a_function_of_seed_and_counters(rule):
    tuned, base = several(2, 1)
    draws = [(0, 1), (0, 1), (0, 2), (1, 1)]
    first, again, later, other = (merge(rule, tuned, base, draw=draw) for draw in draws)
    assert identical(first, again)
    assert not identical(first, later) and not identical(first, other)
    backwards = [dict(reversed(model.items())) for model in tuned]
    assert identical(merge(rule, backwards, base, draw=(0, 1)), first)


@pytest.mark.parametrize(
    ("rule", "settings_", "taus", "expected"),
    [
        ("ties", {"density": 1.0}, [[3, 1, -1, 2], [1, -4, 1, 0]], [2, -4, 0, 2]),
        ("ties", {"density": 1.0}, [[1e-30, 1e-30], [3e-30, -3e-30]], [2e-30, -3e-30]),
        ("magmax", {}, [[3, 1, -1, 2], [1, -4, 1, 0]], [3, -4, -1, 2]),
        (
            "breadcrumbs", {"density": 0.5, "outliers": 0.2},
            [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]], [0, 0, 0, 4, 5, 6, 7, 8, 0, 0],
        ),
    ],
    ids=["signs", "tiny entries", "the newest wins ties", "both ends"],
)  # fmt: skip
def test_rules_by_hand(rule, settings_, taus, expected):
    models_ = [{"x": torch.tensor(tau, dtype=torch.float32)} for tau in taus]
    base = {"x": torch.zeros(len(expected))}
    merged = merge(rule, models_, base, **settings_)["x"]
    assert merged.tolist() == pytest.approx(expected, rel=1e-6, abs=0)


# Exact ranks.


@given(
    st.lists(st.integers(1, 400), min_size=1, max_size=4), SEEDS, DENSITIES,
    st.sampled_from(["normal", "few", "zero", "tail"]),
)  # fmt: skip
def test_the_threshold_is_that_of_kthvalue(sizes, seed, density, kind):
    rng = np.random.default_rng(seed)
    draw = {
        "normal": lambda n: rng.normal(size=n),
        "few": lambda n: rng.integers(0, 3, size=n),
        "zero": lambda n: rng.normal(size=n) * (rng.random(n) < 0.05),
        "tail": lambda n: rng.standard_cauchy(size=n),
    }[kind]
    model = {str(i): torch.tensor(draw(n), dtype=torch.float32) for i, n in enumerate(sizes)}
    base = {name: torch.zeros_like(x) for name, x in model.items()}
    kept = flat(model).abs()
    [(least, most)] = ranks.magnitude_thresholds([model], base, model, density, 0.0)
    rank = len(kept) - max(1, round(density * len(kept)))
    assert most == math.inf
    if rank == 0:
        assert least == 0
    else:
        assert least == kept.kthvalue(rank + 1).values.item()


@pytest.mark.parametrize("low", [0.0, 7.0])
def test_a_sample_that_misleads_costs_time_but_no_truth(low, monkeypatch):
    """Every second entry is much smaller or larger than all others, and only they are drawn."""
    monkeypatch.setattr(ranks, "SAMPLE", 500)
    tau = torch.arange(1000.0) / 1000 + 1
    tau[::2] = low
    base = {"x": torch.zeros(1000)}
    for density in (0.1, 0.3, 0.7, 0.9):
        [(least, _)] = ranks.magnitude_thresholds([{"x": tau}], base, base, density, 0.0)
        assert least == tau.sort().values[1000 - round(1000 * density)].item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("density", "outliers"), [(0.2, 0.0), (0.3, 0.01), (0.01, 0.5)])
def test_thresholds_are_the_same_on_every_device(dtype, density, outliers):
    """On a GPU, with memory for only one task vector at a time, and some blocks."""
    shapes = {"x": (299, 299), "y": (99,)}
    *models, base = (weights(seed, shapes) for seed in range(7))
    models[2]["x"] = models[2]["x"].to(dtype)
    expected = ranks.magnitude_thresholds(models, base, base, density, outliers)
    elsewhere = {name: x.to("meta") for name, x in base.items()}
    held = Held([x for model in (*models, base) for x in model.values()])
    before = held.now
    with held:
        found = ranks.magnitude_thresholds(models, base, elsewhere, density, outliers)
    assert found == expected
    assert held.peak - before < 4 * 8 * 299**2


# Model stock, LiNeS, kinds of tensors.


def test_model_stock_leaves_theta_zero_and_never_goes_beyond():
    (one, two), base = several(2, 3)
    close(merge("model-stock", [one, base], base), one)  # the first merge of an average
    assert identical(merge("model-stock", [base, base], base), base)
    mirrored = {name: 2 * base[name] - x for name, x in one.items()}
    close(merge("model-stock", [one, mirrored], base), base)  # cos -1 counts as 0
    for name, x in merge("model-stock", [one, two], base).items():
        mean = (one[name] + two[name]) / 2 - base[name]
        assert (x - base[name]).norm() <= mean.norm() * (1 + 1e-5)


@pytest.mark.parametrize("rule", ["task-arithmetic", "lines", "model-stock"])
def test_many_small_task_vectors_are_added_up_before_the_base_is(rule):
    """(1 - s k) theta_0 + s sum theta_i would lose the digits in which they differ."""
    tuned, base = several(20, 1, size=1e-4)
    double = [{name: x.double() for name, x in one.items()} for one in (*tuned, base)]
    settings = {} if rule == "model-stock" else {"scale": 1.0}
    exact = merge(rule, double[:-1], double[-1], **settings)
    for name, x in merge(rule, tuned, base, **settings).items():
        torch.testing.assert_close(x.double(), exact[name], rtol=1.2e-7, atol=1e-8)


def test_lines_scales_task_vectors_by_block():
    names = {"token_embedding.weight": (2,)}
    names |= {f"transformer.resblocks.{i}.ln_1.weight": (2,) for i in range(3)}
    base = {name: torch.zeros(shape) for name, shape in names.items()}
    one = {name: torch.ones(shape) for name, shape in names.items()}
    merged = merge("lines", [one], base, alpha=0.5, beta=0.5)
    assert [x[0].item() for x in merged.values()] == [0.5, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("name", options.families())
def test_blocks_of_the_embedded_models_are_in_order(name):
    names = list(models.create_model(name).state_dict())
    depth = towers.layer_depth(tuple(names))
    assert depth == towers.layer_depth(tuple(sorted(names, reverse=True)))
    for tower in ("visual.", "transformer."):
        places = [depth[key] for key in names if key.startswith(tower)]
        inside = [place for place in places if place]
        assert inside == sorted(inside) and inside[-1] == 1
    others = ("token_embedding.weight", "text_projection", "logit_scale", "positional_embedding")
    assert {depth[key] for key in others} == {0.0}


def test_blocks_of_other_models():
    depth = towers.layer_depth(
        tuple(f"visual.layer{i}.{j}.conv1.weight" for i in (1, 2) for j in (0, 1, 10))
    )
    assert list(depth.values()) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert towers.layer_depth(("a.0.weight", "b")) == {"a.0.weight": 0, "b": 0}


@pytest.mark.parametrize(
    ("image", "text"),
    [
        ("module.visual.transformer.resblocks", "module.transformer.resblocks"),
        ("_orig_mod.module.visual.trunk.blocks", "_orig_mod.module.transformer.resblocks"),
        ("vision_model.encoder.layers", "text_model.encoder.layers"),
    ],
)
def test_both_towers_have_blocks_under_wrappers_and_in_transformers(image, text):
    names = [f"{image}.{n}.weight" for n in range(3)] + [f"{text}.{n}.weight" for n in range(2)]
    assert [*towers.layer_depth(tuple(names)).values()] == [0, 0.5, 1, 0, 1]


@pytest.mark.parametrize("rule", RULES)
def test_what_is_no_parameter(rule):
    """Counts are the newest's, running statistics a mean, whatever the rule; halves stay halves."""

    def with_buffers(count, mean, var, value):
        return {
            "bn.num_batches_tracked": torch.tensor(count),
            "bn.running_mean": torch.tensor([mean]),
            "bn.running_var": torch.tensor([var]),
            "half": torch.full((3,), value, dtype=torch.float16),
            "double": torch.full((3,), value, dtype=torch.float64),
            "empty": torch.zeros(0),
        }

    tuned = [with_buffers(7, 1.0, 0.5, 1.0), with_buffers(3, 3.0, 1.5, 1.0)]
    base = with_buffers(1, 100.0, 100.0, 1.0)
    merged = merge(rule, tuned, base_for(rule, base))
    assert merged["bn.num_batches_tracked"].item() == 7
    assert merged["bn.running_mean"].item() == 2 and merged["bn.running_var"].item() == 1
    assert {n: x.dtype for n, x in merged.items()} == {n: x.dtype for n, x in base.items()}
    torch.testing.assert_close(merged["half"], base["half"])
    torch.testing.assert_close(merged["double"], base["double"])


def test_statistics_of_batch_norm_have_the_weights_of_the_models():
    def model(value):
        return {"w": torch.tensor([value]), "bn.running_mean": torch.tensor([value])}

    pair = [model(10.0), model(0.0)]
    for rule in ("interpolation", "slerp"):
        merged = merge(rule, pair, weights=(0.75, 0.25))
        assert merged["bn.running_mean"].item() == pytest.approx(7.5)
    beyond = merge("interpolation", pair, weights=(1.5, -0.5))
    assert beyond["w"].item() == 15 and beyond["bn.running_mean"].item() == 5


@pytest.mark.parametrize("rule", ["interpolation", "task-arithmetic", "magmax", "ties"])
@pytest.mark.parametrize("zero", [False, True])
def test_the_mean_of_all_tasks_is_also_that_of_statistics(rule, zero):
    memory = {"zero": {"w": torch.zeros(3), "bn.running_var": torch.full((1,), 9.0)}}
    merging = Merging(policy="all-all", rule=rule, shares="equal", zero=zero)
    for done in range(1, 5):
        trained = {"w": torch.randn(3), "bn.running_var": torch.full((1,), float(done))}
        result = policies.apply_policy(policies.TaskEnd(merging, memory, trained, done, 0))
        memory = result.memory
    mean = (1 + 2 + 3 + 4 + 9 * zero) / (4 + zero)
    assert result.deployed["bn.running_var"].item() == pytest.approx(mean)


@pytest.mark.parametrize("rule", ["breadcrumbs", "breadcrumbs-ties"])
def test_frozen_tensors_do_not_count_where_a_rule_trims(rule):
    """A few biases changed, fewer than the share of all entries that are dropped as outliers."""
    base = {"frozen": torch.randn(10_000), "bias": torch.zeros(50)}
    tuned = [base | {"bias": torch.arange(50.0) + 1}, base | {"bias": torch.arange(50.0) + 51}]
    merged = merge(rule, tuned, base, density=0.5)
    alone = merge(rule, [{"bias": x["bias"]} for x in tuned], {"bias": base["bias"]}, density=0.5)
    assert merged["bias"].any() and (merged["bias"] == alone["bias"]).all()
    assert (merged["frozen"] == base["frozen"]).all()


def test_doubles_are_merged_as_doubles():
    pair = [{"x": torch.tensor([1 + 2e-12], dtype=torch.float64)},
            {"x": torch.tensor([1.0], dtype=torch.float64)}]  # fmt: skip
    assert merge("interpolation", pair)["x"].item() == 1 + 1e-12


# Rules on matrices.

MATRIX_RULES = registry.option_names("merge_rule", matrix=True)
MATRICES = {"wide": (6, 9), "tall": (11, 4), "token_embedding.weight": (12, 3)}


def drawn(count, seed, shapes=None):
    """Models that are one apart from a base of zeros."""
    shapes = shapes or MATRICES
    base = {name: torch.zeros(shape) for name, shape in shapes.items()}
    return [weights(seed + number, shapes) for number in range(count)], base


@pytest.mark.parametrize("rule", MATRIX_RULES)
@given(SEEDS, st.floats(0.01, 100))
@settings(max_examples=10)
def test_a_rule_on_matrices_scales_with_the_task_vectors(rule, seed, factor):
    tuned, base = drawn(3, seed)
    larger = [{name: factor * x for name, x in model.items()} for model in tuned]
    merged = merge(rule, tuned, base)
    expected = {name: factor * x for name, x in merged.items()}
    close(merge(rule, larger, base), expected, rtol=1e-3, atol=1e-3 * factor)


@given(SEEDS, st.integers(1, 4))
@settings(max_examples=10)
def test_equal_models_merge_into_their_leading_part(seed, count):
    """By TSV, the best approximation of as many directions as each model may bring; by OPCM, whose
    later models bring nothing new to a matrix, themselves."""
    [model], base = drawn(1, seed, {"wide": (6, 9), "tall": (11, 4)})
    close(merge("opcm", [model] * count, base), model, rtol=1e-3, atol=1e-4)
    merged = merge("tsv", [model] * count, base)
    for name, x in model.items():
        u, s, vh = torch.linalg.svd(x, full_matrices=False)
        rank = min(x.shape) // count
        torch.testing.assert_close(
            merged[name], u[:, :rank] * s[:rank] @ vh[:rank], rtol=1e-3, atol=1e-4
        )


def test_opcm_with_protect_1_protects_everything():
    """Whichever way the sums of singular values are rounded."""
    for seed in range(30):
        (newer, older), base = drawn(2, seed, {"square": (16, 16)})
        merged = merge("opcm", [newer, older], base, protect=1.0)["square"]
        u, _, vh = torch.linalg.svd(older["square"])
        off = u.T @ merged @ vh.T
        assert (off - off.diag().diag()).abs().max() < 1e-4 * off.abs().max()


@pytest.mark.parametrize("protect", [0.0, 0.5, 1.0])
def test_opcm_protects_what_the_older_model_knows(protect):
    """The newer model adds nothing between the protected directions, and keeps the rest."""
    (newer, older), base = drawn(2, 3, {"wide": (6, 9)})
    merged = merge("opcm", [newer, older], base, protect=protect)["wide"]
    u, s, vh = torch.linalg.svd(older["wide"], full_matrices=False)
    inside = u.T @ merged @ vh.T
    scale = inside[0, 0] / s[0]
    added = inside / scale - s.diag()
    first = int((s.cumsum(0) <= protect * s.sum() * (1 + 1e-6)).sum())
    assert first in {0.0: [0], 0.5: [1, 2], 1.0: [6]}[protect]
    theirs = u.T @ newer["wide"] @ vh.T
    theirs[:first, :first] = 0
    torch.testing.assert_close(added, theirs.fill_diagonal_(0), rtol=1e-3, atol=1e-4)
    mean = (newer["wide"].norm() + older["wide"].norm()) / 2
    assert merged.norm().item() == pytest.approx(mean.item(), rel=1e-4)


@pytest.mark.parametrize("rule", MATRIX_RULES)
def test_what_is_no_matrix_falls_back(rule):
    """Vectors, convolutions and tables of embeddings are added by OPCM and averaged by TSV, and so
    is a matrix that is too small to share."""
    shapes = {"vector": (5,), "conv": (4, 3, 2), "pos_embed": (6, 5), "number": ()}
    tuned, base = drawn(3, 7, shapes)
    merged = merge(rule, tuned, base)
    added = {name: sum(model[name] for model in tuned) for name in base}
    ratio = merged["number"] / added["number"]
    close(merged, {name: ratio * x for name, x in added.items()}, rtol=1e-3)
    if rule == "tsv":
        assert ratio.item() == pytest.approx(1 / 3)
        thin, zero = drawn(3, 7, {"thin": (2, 9)})
        close(merge(rule, thin, zero), merge("task-arithmetic", thin, zero))


@pytest.mark.parametrize("rule", MATRIX_RULES)
def test_directions_that_do_not_exist_play_no_part(rule):
    """Models of low rank, one of which did not move: nothing depends on what a decomposition puts
    where a singular value is zero."""
    left, right = weights(1, {"x": (8, 2)})["x"], weights(2, {"x": (2, 7)})["x"]
    low, zero = {"x": left @ right}, {"x": torch.zeros(8, 7)}
    merged = merge(rule, [low, zero], zero)["x"]
    assert torch.linalg.matrix_rank(merged, atol=1e-4) <= 2
    scale = merged.norm() / low["x"].norm()
    torch.testing.assert_close(merged, scale * low["x"], rtol=1e-3, atol=1e-4)


# What is refused.

GOOD = {"a": torch.ones(2), "n": torch.tensor(1)}


@pytest.mark.parametrize(
    ("rule", "tuned", "base", "words"),
    [
        ("interpolation", [], None, ["0 models", "at least 1"]),
        ("slerp", [GOOD] * 3, None, ["slerp", "3 models", "exactly 2"]),
        ("interpolation", [GOOD] * 2, GOOD, ["takes no base"]),
        ("ties", [GOOD] * 2, None, ["ties", "needs a base"]),
        ("interpolation", [GOOD, GOOD | {"b": GOOD["a"]}], None, ["b", "model 2", "model 1"]),
        ("interpolation", [GOOD, GOOD | {"a": torch.ones(3)}], None, ["a", "[3]", "[2]"]),
        ("ties", [GOOD], GOOD | {"a": torch.ones(2, 1)}, ["a", "[2, 1]", "base"]),
        ("interpolation", [GOOD, GOOD | {"n": torch.ones(())}], None, ["n", "int64"]),
    ],
)
def test_models_that_a_rule_cannot_merge_are_refused_by_name(rule, tuned, base, words):
    with pytest.raises(CmpError) as error:
        merge(rule, tuned, base)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("rule", "settings_", "words"),
    [
        ("interpolation", {"weights": (0.9, 0.9)}, ["0.9, 0.9", "sum to 1, not 1.8"]),
        ("interpolation", {"weights": (math.nan, 1)}, ["nan", "sum to 1"]),
        ("interpolation", {"weights": (0.5, 0.5, 0)}, ["3 weights for 2 models"]),
        ("interpolation", {"weights": 0.9}, ["weights 0.9", "one number per model"]),
        ("slerp", {"weights": (1.5, -0.5)}, ["1.5, -0.5", "interpolates between"]),
        ("ties", {"weights": (0.5, 0.5)}, ["weights 0.5, 0.5", "not used by 'ties'"]),
        # a key of a run's config, which would be left unread here
        (
            "interpolation", {"weight": 0.9},
            ["takes weights, not 'weight'; give weights=(0.9, 0.1), one per model, newest first"],
        ),
        ("interpolation", {"policy": "ema"}, ["takes weights, not 'policy'; give weights="]),
        ("ties", {"densty": 0.2}, ["'ties' takes scale, density, not 'densty'"]),
        ("model-stock", {"scale": 2.0}, ["'model-stock' takes no settings, not 'scale'"]),
        ("ties", {"density": 2.0}, ["density", "less than or equal to 1", "2.0"]),
        ("dare", {"draw": ()}, ["draw", "at least 1 item"]),
    ],
)  # fmt: skip
def test_settings_are_refused_by_name_wherever_they_are_given(rule, settings_, words, tmp_path):
    """In a policy of one's own, in Python, and for files."""
    zero, one = ({"a": torch.full((3,), x)} for x in (0.0, 1.0))
    end = TaskEnd(Merging("ema", rule), {"zero": zero}, one, 1, 0)
    path, start = tmp_path / "one.safetensors", tmp_path / "zero.safetensors"
    save_file(one, path)
    save_file(zero, start)
    out, base_file = tmp_path / "out.safetensors", base_for(rule, start)
    for call in (
        lambda: end.merge([one, one], "mine", **settings_),
        lambda: merge(rule, [one, one], base_for(rule, zero), **settings_),
        lambda: merge_files(rule, [path, path], out, base_file, **settings_),
    ):
        with pytest.raises(CmpError) as error:
            call()
        assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    ("rule", "bad", "place"),
    [(rule, math.nan, place) for rule in RULES for place in (0, 1)]
    + [(rule, math.nan, 2) for rule in TASK_VECTOR_RULES]
    + [("interpolation", math.inf, 0), ("interpolation", -math.inf, 1)],
)
def test_what_is_not_finite_is_refused(rule, bad, place):
    tuned, base = several(2, 0)
    [*tuned, base][place]["b.weight"][1, 2, 0] = bad
    weighted = rule in registry.option_names("merge_rule", "weight")
    label = ["model 1", "model 2", "base"][place]
    for weights_ in [(0.5, 0.5), (1.0, 0.0), (0.0, 1.0)] if weighted else [None]:
        with pytest.raises(CmpError, match=rf"^{label}: b\.weight: contains NaN or infinite"):
            merge(rule, tuned, base_for(rule, base), weights=weights_)


def test_a_copy_of_an_error_about_a_tensor_says_the_same():
    error = rules.NotFiniteError("a")
    assert str(copy.copy(error)) == str(error)


def test_an_overflow_is_refused():
    with pytest.raises(CmpError, match=r"a: the merged weights overflow torch.float16"):
        one, zero = ({"a": torch.full((2,), x, dtype=torch.float16)} for x in (6e4, 0.0))
        merge("task-arithmetic", [one], zero, scale=2.0)


@pytest.mark.parametrize(
    ("settings_", "words"),
    [
        ({"rule": "ties"}, ["rule 'ties'", "policy 'none'"]),
        ({"policy": "step-ema", "rule": "slerp"}, ["rule 'slerp'", "'step-ema'"]),
        ({"policy": "zero-all", "rule": "slerp"}, ["'slerp' merges 2 models", "'zero-all'"]),
        ({"policy": "ema", "rule": "ties", "weight": 0.3}, ["weight", "not used by 'ties'"]),
        ({"policy": "ema", "rule": "magmax", "density": 0.5}, ["density", "ties"]),
        ({"policy": "ema", "shares": "log"}, ["shares", "not used by 'ema'", "zero-all"]),
        ({"policy": "step-ema", "window": 0.9}, ["window", "not used by 'step-ema'", "wsm"]),
        ({"policy": "zero-all", "weight": 0.3}, ["weight 0.3", "newest"]),
        ({"policy": "zero-all", "power": 2.0}, ["power 2", "shares 'power'"]),
        ({"policy": "zero-all", "shares": "power", "power": 1000}, ["merging.power", "100"]),
        ({"policy": "zero-all", "reverse": True}, ["reverse", "'equal'"]),
        ({"policy": "ema", "rule": "breadcrumbs", "density": 1.0}, ["density 1", "outliers 0.01"]),
        ({"policy": "ema", "rule": "dare", "density": 0.0}, ["density"]),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(settings_, words):
    with pytest.raises(CmpError) as error:
        config.parse({"merging": settings_})
    for word in ["merging", *words]:
        assert word in str(error.value)


@pytest.mark.parametrize("policy", POLICIES)
def test_no_policy_goes_with_the_infinite_schedule(policy):
    with pytest.raises(CmpError, match=rf"merging.policy '{policy}': with schedule 'infinite'"):
        config.parse({"merging": {"policy": policy}, "schedule": {"name": "infinite"}})


# Policies.


def combinations():
    """Every policy with every rule that it takes."""
    for policy in POLICIES:
        for rule in RULES:
            if not merges_of(policy) and rule != "interpolation":
                continue
            if "all" in merges_of(policy) and rule in PAIR_RULES:
                continue
            yield policy, rule


def stream(merging, tasks=3, seed=0):
    """(memory, start, deployed, theta_t) after each task; training adds noise to the start."""
    memory, start = {"zero": weights(100)}, weights(100)
    for task in range(1, tasks + 1):
        trained = {n: x + 0.1 * weights(task)[n] for n, x in start.items()}
        if registry.get_option("merge_policy", merging.policy).facts["step_share"]:
            memory = memory | {"average": weights(50 + task)}
        memory, start, deployed = apply_policy(TaskEnd(merging, memory, trained, task, seed))
        yield memory, start, deployed, trained


@pytest.mark.parametrize(("policy", "rule"), list(combinations()))
def test_every_policy_and_rule_go_on_from_what_was_saved(policy, rule, tmp_path):
    merging = Merging(policy=policy, rule=rule)
    ends = list(stream(merging))
    assert all(identical(memory["zero"], weights(100)) for memory, *_ in ends)
    saved, trained = copy.deepcopy(ends[1][0]), copy.deepcopy(ends[2][3])
    if registry.get_option("merge_policy", policy).facts["step_share"]:
        saved["average"] = weights(53)
    memory, start, deployed = apply_policy(TaskEnd(merging, saved, trained, 3, 0))
    assert identical(start, ends[2][1]) and identical(deployed, ends[2][2])
    assert memory.keys() == ends[2][0].keys()
    assert all(identical(memory[name], each) for name, each in ends[2][0].items())
    places = [x.data_ptr() for each in memory.values() for x in each.values()]
    assert len(set(places)) == len(places)


def direct(merging, choice, ends, base, seed=0):
    """An answer from all task ends at once, oldest first: what a policy does bit by bit."""
    rule = merging.rule
    options = MergeOptions(
        scale=merging.scale, density=merging.density, draw=(seed, len(ends), choice)
    )
    start = base_for(rule, base)
    if choice == "all":
        models_ = [*reversed(ends), *([base] if merging.zero else [])]
        if rule == "interpolation":
            weights_ = tuple(merge_weights(merging, len(models_)))
            options = dataclasses.replace(options, weights=weights_)
        return merge_with(rule, models_, start, options)
    pair = (merging.weight, 1 - merging.weight) if rule not in TASK_VECTOR_RULES else None
    first, rest = (base, ends) if choice == "average" else (ends[0], ends[1:])
    for number, end in enumerate(rest, 1 + len(ends) - len(rest)):
        options = dataclasses.replace(options, weights=pair, draw=(seed, number, choice))
        first = merge_with(rule, [end, first], start, options)
    return first


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("policy", "choice"), [("zs", "average"), ("zero-unrolled", "unrolled")])
def test_constant_memory_equals_the_recurrence_exactly(policy, choice, rule):
    merging = Merging(policy=policy, rule=rule)
    ends_of_tasks = list(stream(merging, 4))
    ends = [trained for *_, trained in ends_of_tasks]
    for done, (memory, start, deployed, _) in enumerate(ends_of_tasks, 1):
        assert identical(deployed, direct(merging, choice, ends[:done], weights(100)))
        assert identical(start, weights(100))
        assert memory.keys() == {"zero", choice}


OF_ALL = [
    *({"rule": rule} for rule in RULES if rule not in PAIR_RULES),
    *({"rule": rule, "scale": 0.4} for rule in ("task-arithmetic", "lines", "magmax")),
    *({"shares": shares} for shares in options.choices()["merging.shares"]),
    *(
        {"shares": shares, "reverse": True}
        for shares in options.choices()["merging.shares"]
        if shares not in ("equal", "newest")
    ),
    {"shares": "power", "power": 2.0},
    {"shares": "newest", "weight": 0.7},
]
RUNNING = ("interpolation", "task-arithmetic", "lines", "magmax")
"""Rules with which one running model can replace those of all tasks."""


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("settings_", OF_ALL, ids=str)
def test_a_merge_of_all_is_one_merge(settings_, zero):
    merging = Merging(policy="zero-all", zero=zero, **settings_)
    ends_of_tasks = list(stream(merging, 4))
    ends = [trained for *_, trained in ends_of_tasks]
    for done, (memory, _, deployed, _) in enumerate(ends_of_tasks, 1):
        close(deployed, direct(merging, "all", ends[:done], weights(100)))
        if merging.rule in RUNNING and merging.shares != "newest" and not merging.reverse:
            assert memory.keys() == {"zero", "all"}


def test_shares_by_hand():
    def of(name, count=3, **extra):
        return merge_weights(Merging(policy="zero-all", shares=name, **extra), count)

    assert of("equal") == pytest.approx([1 / 3] * 3)
    assert of("newest", weight=0.5) == pytest.approx([0.5, 0.25, 0.25])
    assert of("newest", 1, weight=0.2) == [1.0]
    assert of("power") == pytest.approx([3 / 6, 2 / 6, 1 / 6])
    assert of("power", reverse=True) == pytest.approx([1 / 6, 2 / 6, 3 / 6])
    assert of("power", power=2.0) == pytest.approx([9 / 14, 4 / 14, 1 / 14])
    assert of("exponential") == pytest.approx([4 / 7, 2 / 7, 1 / 7])
    assert of("log", 2) == pytest.approx([math.log(3) / math.log(6), math.log(2) / math.log(6)])


TABLE = {
    "ema": ("average", "average"), "zs": ("zero", "average"), "ft": ("patched", "patched"),
    "ft-last": ("last", "patched"), "zero-all": ("zero", "all"), "all-all": ("all", "all"),
    "all-last": ("all", "last"), "all-unrolled": ("all", "unrolled"),
    "last-all": ("last", "all"), "last-unrolled": ("last", "unrolled"),
    "unrolled-all": ("unrolled", "all"), "unrolled-last": ("unrolled", "last"),
    "zero-unrolled": ("zero", "unrolled"), "step-ema": ("steps", "steps"),
    "wsm": ("steps", "steps"), "wsm-last": ("last", "steps"),
}  # fmt: skip
"""By policy: where training goes on, and what is deployed."""


@pytest.mark.parametrize("name", TABLE)
def test_named_points_are_the_table_of_the_specification(name):
    merging = Merging(policy=name)
    ends_of_tasks = list(stream(merging, 3))
    ends = [trained for *_, trained in ends_of_tasks]
    answers = {
        "zero": weights(100), "last": ends[-1],
        "average": direct(merging, "average", ends, weights(100)),
        "unrolled": direct(merging, "unrolled", ends, weights(100)),
        "all": direct(merging, "all", ends, weights(100)),
        "patched": merge("interpolation", [ends[-1], weights(100)]),
        "steps": weights(53),
    }  # fmt: skip
    start, deploy = TABLE[name]
    close(ends_of_tasks[-1][1], answers[start])
    close(ends_of_tasks[-1][2], answers[deploy])


def test_facts_of_policies():
    shipped = {n for n in POLICIES if not registry.get_option("merge_policy", n).sources}
    assert set(TABLE) == shipped, (
        "give each policy its row in TABLE: what the next task starts from, and what is deployed"
    )
    for name, pair in TABLE.items():
        merges = merges_of(name)
        assert ("all" in merges) == ("all" in pair)
        assert ("two" in merges) == bool({"average", "unrolled", "patched"} & set(pair))
    of_all = {name for name, pair in TABLE.items() if "all" in pair}
    for key in ("shares", "power", "reverse", "zero"):
        assert shipped & set(registry.option_names("merge_policy", key)) == of_all, key


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_reads_the_settings_that_it_lists(rule):
    option, usual = registry.get_option("merge_rule", rule), MergeOptions()
    shapes = {f"resblocks.{number}.weight": (20, 6) for number in range(3)}
    *tuned, base = (weights(seed, shapes) for seed in range(1 + (option.facts["count"] or 3)))
    plain = merge_with(rule, tuned, base_for(rule, base), usual)
    read = {
        key for name in RULES for key in tensor_settings(registry.get_option("merge_rule", name))
    }
    changes = {key: (getattr(usual, key) or 1.0) / 2 for key in read} | {"draw": (1,)}
    for key, value in changes.items():
        changed = merge_with(rule, tuned, base_for(rule, base), MergeOptions(**{key: value}))
        is_read = option.facts["draws"] if key == "draw" else key in option.settings
        assert identical(changed, plain) != is_read, key


# Whole runs.


@pytest.mark.parametrize("policy", ["step-ema", "wsm", "wsm-last"])
def test_an_average_over_steps_deploys_and_training_goes_on_from_it_or_from_the_last(policy):
    """Of "step-ema" it has a recurrence over the whole stream; of the others it is the mean of the
    last weights of a task, which stands in for their decay."""
    key = "merging.decay=0.7" if policy == "step-ema" else "merging.window=0.6"  # 3 of 5 steps
    run_config = small(
        f"merging.policy={policy}", key, "training.steps=5", "training.precision=fp32"
    )  # fmt: skip
    start, seen = models.load_model(run_config.model, 0).state_dict(), ([], [])

    def average_after(task):
        if policy != "step-ema":
            return {name: sum(each[name] for each in seen[task][-3:]) / 3 for name in start}
        average = start
        for each in itertools.chain(*seen[: task + 1]):
            average = {name: 0.7 * x + 0.3 * each[name] for name, x in average.items()}
        return average

    def step(task, number, result, network):
        seen[task].append(copy.deepcopy(network.state_dict()))

    manager = MemoryManager()
    result = execute(run_config, forked.small_corpus(), Observer(step), manager=manager)
    deployed = result.model.state_dict()
    close(deployed, average_after(1), rtol=1e-4, atol=1e-6)
    tensors = manager.states[BOUNDARY].tensors
    loaded = checkpoints.strip_prefix(tensors, "weights/")
    kept = checkpoints.strip_prefix(tensors, "merging/average/")
    close(kept, average_after(0), rtol=1e-4, atol=1e-6)
    assert identical(loaded, seen[0][-1] if policy == "wsm-last" else kept)
    assert not identical(kept, seen[0][-1])


@given(st.integers(1, 12), st.floats(0.05, 1), SEEDS)
def test_a_mean_of_last_steps_is_a_decay_along_a_line(steps, window, seed):
    """What each update enters with is the rate of schedule "wsd" with as long a cooldown."""
    merging, moves = Merging("wsm", window=window), weights(seed, {"x": (steps, 3)})["x"].double()
    memory, path = {"zero": {"x": torch.zeros(3).double()}}, moves.cumsum(0)
    for step in range(steps):
        policies.update_step_average(merging, memory, lambda s=step: {"x": path[s]}, step, steps)
    curve = Schedule("wsd", peak=1.0, warmup=0.0, cooldown=window)
    rates = [learning_rate(curve, steps, 0, step) for step in range(steps)]
    decayed = (torch.tensor(rates).double()[:, None] * moves).sum(0)
    torch.testing.assert_close(memory["average"]["x"], decayed, rtol=1e-4, atol=1e-6)


def test_a_policy_merges_on_the_device_one_tensor_of_each_model_at_a_time(monkeypatch):
    alive, most, devices = set(), [], set()

    class Watched(policies.MovedWeights):
        def __getitem__(self, name):
            x = super().__getitem__(name).clone()
            alive.add(id(x))
            weakref.finalize(x, alive.discard, id(x))
            most.append(len(alive))
            devices.add(self.device)
            return x

    monkeypatch.setattr(policies, "MovedWeights", Watched)
    zero, trained = ({f"layer {n}": torch.full((4,), x) for n in range(50)} for x in (0.0, 1.0))
    end = TaskEnd(Merging("ema", weight=0.25), {"zero": zero}, trained, 1, 0, "cpu:0")
    assert apply_policy(end).deployed["layer 49"].tolist() == [0.25] * 4
    assert max(most) <= 4 and devices == {"cpu:0"}


@pytest.mark.defect
@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Path("a.safetensors"), ["Path", "not a state dict", "merge_files"]),
        ("a.safetensors", ["str", "not a state dict", "merge_files"]),
        (torch.nn.Linear(2, 2), ["Linear", "not a state dict", "state_dict()"]),
        ({"a": 1.0}, ["a: ", "float", "not a tensor"]),
        *(
            ({"a": torch.ones(2).to(dtype)}, [f"a: {dtype} ", "convert it to float32"])
            for dtype in (torch.int8, torch.uint8, torch.complex64, torch.float8_e4m3fn)
        ),
    ],
)
def test_what_is_no_state_dict_is_refused_by_name(model, words):
    good = {"a": torch.ones(2)}
    for which, chosen, base in (("model 2", [good, model], None), ("base", [good], model)):
        with pytest.raises(CmpError) as error:
            merge("interpolation" if base is None else "ties", chosen, base)
        assert all(word in str(error.value) for word in [which, *words])


def test_fused_and_split_attention_are_told_apart_and_can_be_made_alike():
    fused, split = models.create_fused_model("tiny", 1), models.create_model("tiny", 0)
    pair = [split.state_dict(), fused.state_dict()]
    for number, chosen in ((2, pair), (1, pair[::-1])):
        words = f"attention of model {number} is fused.*cmp.models.split_attention"
        with pytest.raises(CmpError, match=words):
            merge("interpolation", chosen)
    merged = merge("interpolation", [pair[0], models.split_attention(fused).state_dict()])
    split.load_state_dict(merged)


def test_weights_that_a_model_trains_are_merged_without_a_graph():
    newer, older, base = (
        {name: torch.nn.Parameter(x) for name, x in weights(seed).items()} for seed in range(3)
    )
    for rule in RULES:
        start = base if registry.get_option("merge_rule", rule).facts["base"] else None
        merged = merge(rule, [newer, older], start)
        assert not any(x.requires_grad for x in merged.values()), rule


def test_trimming_keeps_as_many_entries_where_types_differ():
    base = {"a": torch.zeros(4), "b": torch.zeros(2, dtype=torch.float64)}
    newer = {
        "a": torch.tensor([0.1, 0.2, 0.3, 0.4]),
        "b": torch.tensor([0.01, 0.02], dtype=torch.float64),
    }
    merged = merge("ties", [newer], base, density=0.5)
    assert sum(int(x.count_nonzero()) for x in merged.values()) == 3
    assert merged["a"].tolist() == pytest.approx([0.0, 0.2, 0.3, 0.4])


def test_a_matrix_that_does_not_converge_is_decomposed_in_fp64(monkeypatch):
    svd = torch.linalg.svd

    def fails_in_fp32(x, **options):
        if x.dtype == torch.float32:
            raise torch.linalg.LinAlgError("linalg.svd: The algorithm failed to converge")
        return svd(x, **options)

    base, newer, older = ({"w": torch.randn(6, 9)} for _ in range(3))
    expected = {rule: merge(rule, [newer, older], base) for rule in ("opcm", "tsv")}
    monkeypatch.setattr(torch.linalg, "svd", fails_in_fp32)
    for rule, merged in expected.items():
        close(merge(rule, [newer, older], base), merged, rtol=1e-3, atol=1e-4)
