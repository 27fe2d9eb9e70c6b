"""Methods, merge rules and scores agree with other libraries, or differ as the book says.

The libraries' results were computed once, by tests/peers.py; they are not needed here. Agreement is
to 1e-5 of the largest entry. Where we differ by choice, a test takes the difference into account
and finds agreement, and shows that the choice matters. book/choices_beside_peers.md explains them.
"""

import itertools
import json
import math
from types import SimpleNamespace

import forked
import numpy as np
import pandas as pd
import peers
import pytest
import torch
from options import small
from safetensors import safe_open
from safetensors.torch import load_file
from torch.nn import functional as F

from cmp import budgets, evaluation, models
from cmp.config import Method
from cmp.data import Corpus
from cmp.merging.apply import merge
from cmp.methods import adapters, dora, galore, importance, lora, vera
from cmp.project import project_folder
from cmp.registry import get_option
from cmp.seeds import torch_generator
from cmp.training import ForwardOutput, make_train_state

pytestmark = pytest.mark.numbers
TOLERANCE = 1e-5
MAX_BYTES = 300_000
PAGE = project_folder() / "book" / "choices_beside_peers.md"


def load(name):
    return load_file(peers.FOLDER / f"{name}.safetensors")


def below(found, prefix):
    """What stands under a name."""
    return {
        key.removeprefix(f"{prefix}/"): x
        for key, x in found.items()
        if key.startswith(f"{prefix}/")
    }


def distance(ours, theirs):
    """The largest difference between two tensors, or dicts of them, as a part of the largest
    entry."""
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        return max(distance(x, theirs[name]) for name, x in ours.items())
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def assert_agree(ours, theirs):
    assert distance(ours, theirs) <= TOLERANCE


@pytest.mark.parametrize("name", peers.MAKERS)
def test_a_small_difference_is_no_agreement(name):
    """The tests below can fail: a part in ten thousand in one entry is seen."""
    tensors = {k: x for k, x in load(name).items() if x.is_floating_point() and x.abs().sum() > 0}
    for x in tensors.values():
        moved = x.clone()
        moved.view(-1)[x.abs().argmax()] *= 1 + 1e-4
        assert_agree(x, x)
        assert distance(moved, x) > TOLERANCE


# --- EWC and SI: avalanche -------------------------------------------------------------------


def make_state(name, **settings):
    """A train state of two small towers."""
    training = SimpleNamespace(steps=peers.BATCHES, precision="fp32")
    section = SimpleNamespace(method=Method(name=name, **settings), training=training)
    method = get_option("method", name).value
    state = SimpleNamespace(
        config=section, model=peers.Towers(), method=method, method_state={}, frozen_models={}
    )
    method.prepare(state)
    return state


def forward(model, x):
    image, text, _ = model(x)
    return ForwardOutput(image, text, x, x, torch.arange(len(x)))


def encode_further_of(state, task):
    """What passes the batches of a task through the network, again after the last."""
    batches = peers.samples(task).split(peers.BATCH)
    return lambda step: forward(state.model, batches[step % len(batches)])


def train_task(state, optimizer, task):
    """Train one task; return what the penalty's gradient adds to the path integral."""
    state.method.begin_task(state, task)
    parameters, of_penalty = dict(state.model.named_parameters()), {}
    for step in range(peers.BATCHES):
        output = encode_further_of(state, task)(step)
        optimizer.zero_grad()
        budgets.total_loss(state, output).backward()
        state.method.after_backward(state)
        before = {name: p.detach().clone() for name, p in parameters.items()}
        pull = {name: importance.penalty_gradient(state, name, p) for name, p in before.items()}
        state.method.step(state, optimizer)
        for name, p in parameters.items():
            moved = state.config.method.get("strength") * pull[name] * (before[name] - p.detach())
            of_penalty[name] = of_penalty.get(name, 0) + moved
    state.method.end_task(state, encode_further_of(state, task))
    return of_penalty


def weights(state):
    return {name: p.detach() for name, p in state.model.named_parameters()}


def kept(state, part):
    return {name: x.clone() for name, x in below(state.method_state, part).items()}


def test_ewc_is_avalanches_with_half_the_strength_and_batches_for_samples():
    found = load("avalanche")
    strength, gamma = 2 * peers.EWC["ewc_lambda"], peers.EWC["decay_factor"]
    state = make_state("ewc", strength=strength, gamma=gamma, fisher="batch", batches=peers.BATCHES)
    assert_agree(weights(state), below(found, "start"))
    optimizer = peers.optimizer_of(state.model)
    for task in range(peers.TASKS):
        train_task(state, optimizer, task)
        assert_agree(weights(state), below(found, f"ewc/weights/{task}"))
        assert_agree(kept(state, "importance"), below(found, f"ewc/importance/{task}"))


def test_the_fisher_information_of_samples_is_avalanches_for_batches_of_one(monkeypatch):
    """Given that the other samples of the contrastive loss are held fixed."""
    monkeypatch.setattr(models, "encode_image", lambda model, x: model(x)[0])
    monkeypatch.setattr(models, "encode_text_unpacked", lambda model, x: model(x)[1])
    found, fishers = load("avalanche"), {}
    for kind in ("sample", "batch"):
        state = make_state("ewc", fisher=kind, batches=1, gamma=1.0)
        state.method.end_task(state, encode_further_of(state, 0))
        fishers[kind] = kept(state, "importance")
    assert_agree(fishers["sample"], below(found, "ewc/sample"))
    assert distance(fishers["batch"], fishers["sample"]) > 0.5


def test_si_is_avalanches_but_for_its_sign_its_clip_and_negative_importances():
    found, run = load("avalanche"), "si-free"
    state = make_state("si", strength=0.0, damping=peers.SI_DAMPING)
    optimizer, sums, clipped = peers.optimizer_of(state.model), {}, 0
    for task in range(peers.TASKS):
        before = kept(state, "importance")
        train_task(state, optimizer, task)
        assert_agree(weights(state), below(found, f"{run}/weights/{task}"))
        path = {name: -x for name, x in kept(state, "path").items()}
        assert_agree(path, below(found, f"{run}/path/{task}"))
        gained, old, sums = {}, sums, below(found, f"{run}/sum/{task}")
        for name, total in sums.items():
            gained[name] = (old.get(name, 0) - total).clamp_min(0)
            theirs = found[f"{run}/importance/{task}/{name}"]
            assert torch.equal(theirs, (-total).clamp_max(peers.CLIP_TO))
            clipped += (theirs < -total).sum().item()
        ours = {name: x - before[name] for name, x in kept(state, "importance").items()}
        assert_agree(ours, gained)
    assert clipped > 100
    assert any((x > 0).any() for x in below(found, f"{run}/path/1").values())


def test_si_holds_weights_as_avalanche_does_at_half_the_strength():
    found, run = load("avalanche"), "si-held"
    strength = peers.SI_STRENGTH["held"] / 2
    state = make_state("si", strength=strength, damping=peers.SI_DAMPING)
    optimizer = peers.optimizer_of(state.model)
    for task in range(peers.TASKS):
        of_penalty = train_task(state, optimizer, task)
        assert_agree(weights(state), below(found, f"{run}/weights/{task}"))
        theirs = below(found, f"{run}/path/{task}")
        ours = {name: -x for name, x in kept(state, "path").items()}
        with_penalty = {name: x - of_penalty[name] for name, x in ours.items()}
        assert_agree(with_penalty, theirs)
        assert (distance(ours, theirs) > 0.1) == (task > 0)  # avalanche's path has the penalty
        for name, x in below(found, f"{run}/importance/{task}").items():
            state.method_state[f"importance/{name}"] = x


# --- GaLore ----------------------------------------------------------------------------------


def galore_steps(name, theirs=False):
    """One parameter after each step, in our order of operations or in galore-torch's."""
    parameter = torch.nn.Parameter(peers.galore_start()[name])
    keys = {"rank": "rank", "update_proj_gap": "gap", "scale": "scale"}
    shape = {keys[key]: peers.GALORE[key] for key in keys}
    optimizer = galore.ProjectedAdamW([{"params": [parameter]}], **shape, **peers.ADAM)
    [group] = optimizer.param_groups
    rate, decay, (_, beta) = peers.ADAM["lr"], peers.ADAM["weight_decay"], peers.ADAM["betas"]
    steps = []
    for step in range(peers.STEPS):
        parameter.grad = peers.galore_gradient(name, step)
        if theirs:  # eps beside the root before its bias is corrected, decay after the step
            group["eps"] = peers.ADAM["eps"] / math.sqrt(1 - beta ** (step + 1))
            group["weight_decay"] = 0.0
        optimizer.step()
        if theirs:
            parameter.data.mul_(1 - rate * decay)
        steps.append(parameter.detach().clone())
    return steps


@pytest.fixture
def inject_bases(monkeypatch):
    """Give GaLore the bases that galore-torch found, as they are."""

    def inject(found, name):
        gap = peers.GALORE["update_proj_gap"]
        bases = iter([found[f"basis/{step}/{name}"] for step in range(0, peers.STEPS, gap)])
        monkeypatch.setattr(galore, "leading_directions", lambda gradient, rank: next(bases))
        monkeypatch.setattr(galore, "align", lambda basis, old: basis)

    return inject


@pytest.mark.parametrize("name", [*peers.MATRICES, "vector"])
def test_galore_is_galore_torch_within_a_gap(name):
    found, gap = load("galore"), peers.GALORE["update_proj_gap"]
    last = peers.STEPS if name == "vector" else gap
    for step, ours in enumerate(galore_steps(name, theirs=True)[:last]):
        assert_agree(ours, found[f"{step}/{name}"])
    plain = galore_steps(name)[0]
    assert distance(plain, found[f"0/{name}"]) > TOLERANCE  # eps and decay are seen


@pytest.mark.parametrize("name", peers.MATRICES)
def test_galore_is_galore_torch_over_gaps_but_for_the_alignment(name, inject_bases):
    found = load("galore")
    aligned = galore_steps(name, theirs=True)
    inject_bases(found, name)
    steps = galore_steps(name, theirs=True)
    for step, ours in enumerate(steps):
        assert_agree(ours, found[f"{step}/{name}"])
    assert distance(aligned[-1], steps[-1]) > 1e-3


@pytest.mark.parametrize("name", peers.MATRICES)
def test_the_directions_span_what_galore_torchs_do(name):
    found = load("galore")
    for step in range(0, peers.STEPS, peers.GALORE["update_proj_gap"]):
        gradient = peers.galore_gradient(name, step)
        gradient = gradient.T if name == "wide" else gradient
        ours = galore.leading_directions(gradient, peers.GALORE["rank"])
        theirs = found[f"basis/{step}/{name}"]
        assert_agree(ours @ ours.T, theirs @ theirs.T)


# --- LoRA, DoRA and VeRA: peft ---------------------------------------------------------------

KINDS = {"lora": lora.LoraAdapter, "dora": dora.DoraAdapter, "vera": vera.VeraAdapter}
NAMES = {
    "lora_A": "down", "lora_B": "up", "lora_magnitude_vector": "magnitude",
    "vera_lambda_d": "inner", "vera_lambda_b": "outer",
}  # fmt: skip
"""What peft calls a parameter, and what we do."""


def translated(found, model):
    """Peft's parameters by our names and in our shapes."""
    result, parameters = {}, dict(model.named_parameters())
    for key, x in found.items():
        layer, name, *_ = key.split(".")
        ours = f"{layer}.adapter.{NAMES[name]}"
        result[ours] = x.reshape(parameters[ours].shape)
    return result


def adapted(kind, found, scale=peers.SCALE):
    """A network with adapters; VeRA's random matrices are peft's."""
    model = peers.Dense() if kind == "vera" else peers.Layers()
    names = tuple(name for name, _ in model.named_children())
    scale = scale if kind != "vera" else 1.0
    adapters.attach(model, lambda w: KINDS[kind](w, peers.RANK, scale), peers.RANK, names)
    for layer in adapters.adapted_layers(model).values():
        if kind == "vera":
            rows, columns = layer.weight.shape
            down = found["vera/buffer/A"][:, :columns]  # peft cuts all from one pair
            layer.adapter.share(down, found["vera/buffer/B"][:rows])
        layer.adapter.begin(layer.weight, torch_generator("test", 0))
    return model


def at_values(kind, found, **settings):
    model = adapted(kind, found, **settings)
    model.load_state_dict(translated(below(found, f"{kind}/value"), model), strict=False)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_are_pefts_forwards_backwards_and_merged(kind):
    found = load("peft")
    model = at_values(kind, found)
    output = model(peers.adapter_input(kind))
    assert_agree(output.detach(), found[f"{kind}/output"])
    (output * peers.output_gradient()).sum().backward()
    trainable = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert_agree(trainable, translated(below(found, f"{kind}/gradient"), model))
    merged = adapters.merged_state_dict(model)
    assert_agree(merged, below(found, f"{kind}/merged"))
    for name, delta in below(found, f"{kind}/delta").items():
        assert_agree(merged[f"{name}.weight"] - model.get_submodule(name).weight, delta)


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_begin_as_pefts_do(kind):
    """All but LoRA's A, which is drawn: uniformly within 1 / sqrt(in) on both sides."""
    found = load("peft")
    model = adapted(kind, found)
    start = translated(below(found, f"{kind}/start"), model)
    for name, ours in model.named_parameters():
        if not ours.requires_grad:
            continue
        if name.endswith("down"):
            bound = ours.shape[1] ** -0.5
            for x in (ours.detach(), start[name]):
                assert 0.75 * bound < x.abs().max() <= bound
        else:
            torch.testing.assert_close(ours.detach(), start[name], rtol=TOLERANCE, atol=0)


def test_random_matrices_are_of_pefts_distribution():
    found = load("peft")
    run_config = small("method.name=vera", "method.targets=[q_proj]")
    state = make_train_state(run_config, forked.small_corpus(), models.create_model("small"))
    layer = next(iter(adapters.adapted_layers(state.model).values()))
    pairs = [found["vera/buffer/A"], found["vera/buffer/B"], layer.adapter.down, layer.adapter.up]
    for x in pairs:
        bound = math.sqrt(6 / x.shape[1])
        assert 0.75 * bound < x.abs().max() <= bound


# --- merging: mergekit -----------------------------------------------------------------------

BASE, TUNED = peers.base_weights(), peers.tuned_weights()


def by_tensor(rule, count=3, **settings):
    """A merge of each tensor as if it were a model of its own."""
    merged = {}
    for name, x in BASE.items():
        each = [{name: model[name]} for model in TUNED[:count]]
        merged |= merge(rule, each, {name: x}, **settings)
    return merged


def whole(rule, **settings):
    return peers.concatenated(merge(rule, TUNED, BASE, **settings))


def special(case):
    newer, older, base = ({"x": x} for x in peers.special_weights()[case])
    return newer, older, base, load("mergekit")[f"special/{case}"]


def test_linear_rules_are_mergekits():
    found = load("mergekit")
    merged = merge("interpolation", TUNED, weights=peers.LINEAR_WEIGHTS)
    assert_agree(merged, below(found, "linear"))
    merged = merge("task-arithmetic", TUNED, BASE, scale=peers.SUM_SCALE)
    assert_agree(merged, below(found, "task_arithmetic"))
    weight = (peers.SHARE, 1 - peers.SHARE)
    assert_agree(merge("slerp", TUNED[:2], weights=weight), below(found, "slerp"))
    assert_agree(merge("model-stock", TUNED, BASE), below(found, "model_stock"))
    assert_agree(merge("model-stock", TUNED[:2], BASE), below(found, "model_stock-2"))


def test_slerp_follows_the_arc_where_mergekit_is_on_the_line():
    """Both are on the line between opposites."""
    weight = (peers.SHARE, 1 - peers.SHARE)
    for case, apart in (("nearly-parallel", True), ("opposite", False)):
        newer, older, _, theirs = special(case)
        assert_agree(merge("interpolation", [newer, older], weights=weight)["x"], theirs)
        ours = merge("slerp", [newer, older], weights=weight)["x"]
        assert (TOLERANCE < distance(ours, theirs) < 2e-4) == apart


def test_model_stock_does_not_extrapolate_and_leaves_out_what_did_not_move():
    newer, older, base, theirs = special("against")
    mean = (newer["x"] + older["x"]) / 2 - base["x"]
    assert torch.dot(theirs - base["x"], mean) < -0.1 * mean.square().sum()
    assert_agree(merge("model-stock", [newer, older], base)["x"], base["x"])
    newer, older, base, theirs = special("one-is-base")
    assert_agree(base["x"], theirs)
    assert_agree(merge("model-stock", [newer, older], base)["x"], newer["x"])


def test_ties_is_mergekits_by_tensor_and_trims_whole_models_otherwise():
    found, density = load("mergekit"), peers.DENSITY
    assert_agree(by_tensor("ties", density=density), below(found, "ties"))
    assert_agree(whole("ties", density=density), found["whole/ties"])
    assert distance(found["whole/ties"], peers.concatenated(below(found, "ties"))) > 0.01


def test_ties_rounds_to_the_nearest_number_of_entries():
    """4.8 of the bias's 16 entries: five here, four in mergekit, as at a quarter."""
    theirs = below(load("mergekit"), "ties-uneven")
    ours = by_tensor("ties", density=peers.UNEVEN_DENSITY)
    quarter = by_tensor("ties", density=0.25)
    assert_agree(quarter["a.bias"], theirs["a.bias"])
    assert distance(ours.pop("a.bias"), theirs.pop("a.bias")) > 0.01
    assert_agree(ours, theirs)


def test_without_a_majority_ties_moves_nothing_and_mergekit_upwards():
    newer, older, base, theirs = special("no-majority")
    assert torch.equal(merge("ties", [newer, older], base, density=1.0)["x"], base["x"])
    assert_agree(torch.maximum(newer["x"], older["x"]), theirs)


def test_breadcrumbs_is_mergekits_by_tensor_and_trims_whole_models_otherwise():
    found = load("mergekit")
    trims = {"density": peers.DENSITY, "outliers": peers.GAMMA}
    scaled = trims | {"scale": peers.SUM_SCALE}
    assert_agree(by_tensor("breadcrumbs", **scaled), below(found, "breadcrumbs"))
    assert_agree(whole("breadcrumbs", **scaled), found["whole/breadcrumbs"])
    ours = whole("breadcrumbs-ties", **trims)
    assert_agree(ours, found["whole/breadcrumbs_ties"])
    added, mean = (x - peers.concatenated(BASE) for x in (found["sum/breadcrumbs_ties"], ours))
    moved = mean.abs() > 0
    number = added[moved] / mean[moved]  # mergekit's own default adds up what agrees
    torch.testing.assert_close(number, number.round(), rtol=0, atol=1e-3)
    assert set(number.round().tolist()) == {1.0, 2.0, 3.0}


@pytest.fixture
def inject_masks(monkeypatch):
    """Let DARE keep what mergekit kept."""

    def inject(masks):
        noise = itertools.cycle(1 - mask.reshape(-1) for mask in masks)
        monkeypatch.setattr(torch, "rand", lambda shape, generator: next(noise).reshape(shape))

    return inject


@pytest.mark.parametrize("name", peers.SHAPES)
def test_dare_is_mergekits_for_the_same_masks(name, inject_masks):
    found, tuned, base = load("mergekit"), [{name: m[name]} for m in TUNED], {name: BASE[name]}
    masks, settings = found[f"mask/{name}"], {"density": peers.DENSITY}
    assert masks.shape == (3, *peers.SHAPES[name])
    inject_masks(masks)
    ours = merge("dare", tuned, base, **settings, scale=peers.SUM_SCALE)
    assert_agree(ours[name], found[f"dare/{name}"])
    assert_agree(merge("dare-ties", tuned, base, **settings)[name], found[f"dare-ties/{name}"])


@pytest.mark.parametrize("name", peers.SHAPES)
def test_mergekit_rescales_what_dare_kept_by_its_sum_of_magnitudes(name, inject_masks):
    """We divide by the density, as DARE's authors do, so that the expected value stays."""
    found, base = load("mergekit"), BASE[name]
    masks, total = found[f"mask/{name}"], base.clone()
    for model, mask in zip(TUNED, masks, strict=True):
        inject_masks([mask])
        own = {"density": peers.DENSITY, "scale": 1.0}
        kept = merge("dare", [{name: model[name]}], {name: base}, **own)[name] - base
        share = (model[name] - base).abs().sum() / kept.abs().sum()
        total += peers.SUM_SCALE * share * kept
    assert_agree(total, found[f"dare-default/{name}"])


# --- zero-shot evaluation: CLIP_benchmark ----------------------------------------------------


@pytest.fixture
def scores(monkeypatch):
    """`evaluate` on a classification and a retrieval set whose features are given."""
    image, prompt, label = peers.classification_features()
    picture, caption, owner = peers.retrieval_features()
    count, names = peers.PICTURES, [str(number) for number in range(peers.CLASSES)]
    table = pd.DataFrame({
        "dataset": np.repeat(["classes", "captions"], count),
        "split": "test",
        "label": [names[i] for i in label] + [""] * count,
        "group": np.arange(2 * count),
    })  # fmt: skip
    captions = [f"text {number}" for number in range(len(owner))]
    ends = np.searchsorted(owner.numpy(), np.arange(count + 1))
    starts = np.concatenate([np.zeros(count, int), ends])
    about = {"prompt": "a photo of {}", "year": None}
    classes = SimpleNamespace(name="classes", role="adapt", task="classification", **about)
    pairs = SimpleNamespace(name="captions", role="eval", task="retrieval", **about)
    corpus = Corpus(
        torch.zeros(2 * count, 4, 32, 32, dtype=torch.uint8), table, captions,
        np.arange(len(owner)), starts, {"classes": classes, "captions": pairs},
        {"classes": names, "captions": []}, {},
    )  # fmt: skip
    vectors = {f"a photo of {name}": prompt[i] for i, name in enumerate(names)}
    vectors |= {text: caption[i] for i, text in enumerate(captions)}

    def text_features(model, name, texts, precision):
        return F.normalize(torch.stack([vectors[text] for text in texts]), dim=1)

    def image_features(model, corpus, rows, precision):
        return F.normalize(torch.cat([image, picture])[rows], dim=1)

    monkeypatch.setattr(evaluation, "text_features", text_features)
    monkeypatch.setattr(evaluation, "image_features", image_features)
    return evaluation.evaluate(models.create_model("tiny"), "tiny", corpus)


def test_zero_shot_classification_is_clip_benchmarks(scores):
    found = load("clip_benchmark")
    hits = scores.hits[scores.hits["dataset"] == "classes"]
    assert hits["answer"].tolist() == [str(number) for number in found["answer"].tolist()]
    expected = 100 * found["top1"].item()
    assert scores.datasets.loc["classes", "score"] == pytest.approx(expected, rel=TOLERANCE)
    assert 0 < hits["hit"].sum() < len(hits)


def test_retrieval_is_the_mean_of_clip_benchmarks_two_recalls(scores):
    found, k = load("clip_benchmark"), evaluation.RETRIEVAL_K
    hits = scores.hits.loc[scores.hits["dataset"] == "captions", "hit"].to_numpy()
    expected = torch.cat([found[f"to-text@{k}"], found[f"to-image@{k}"]]).double().numpy()
    assert np.array_equal(hits, expected)
    recalls = [found[f"{way}_retrieval_recall@{k}"].item() for way in ("image", "text")]
    score = scores.datasets.loc["captions", "score"]
    assert score == pytest.approx(50 * sum(recalls), rel=TOLERANCE)
    assert abs(recalls[0] - recalls[1]) > 0.01  # so that another weighting would be seen


def test_recall_at_any_k_is_clip_benchmarks():
    found = load("clip_benchmark")
    image, text, owner = peers.retrieval_features()
    image, text = F.normalize(image, dim=1), F.normalize(text, dim=1)
    for k in peers.RECALLS:
        to_text, to_image = evaluation.retrieval_hits(image, text, owner, k)
        assert np.array_equal(to_text, found[f"to-text@{k}"].numpy())
        assert np.array_equal(to_image, found[f"to-image@{k}"].numpy())
        for way, hits in (("text", to_text), ("image", to_image)):
            recall = found[f"{way}_retrieval_recall@{k}"].item()
            assert hits.mean() == pytest.approx(recall, rel=TOLERANCE)


# --- merging matrices: fusion_bench ----------------------------------------------------------


def map_weights(count):
    """Models, newest first, and their base."""
    *models_, base = (dict(model.state_dict()) for model in peers.maps())
    return models_[:count], base


@pytest.mark.parametrize("protect", peers.PROTECTED)
@pytest.mark.parametrize("count", [3, 2])
def test_opcm_is_fusion_benchs(count, protect):
    tuned, base = map_weights(count)
    theirs = below(load("fusion_bench"), f"opcm-{count}-{protect}")
    assert_agree(merge("opcm", tuned, base, protect=protect), theirs)
    assert distance(merge("opcm", tuned, base, protect=0.9), theirs) > TOLERANCE
    assert distance(merge("opcm", tuned[::-1], base, protect=protect), theirs) > TOLERANCE


@pytest.mark.parametrize("count", [3, 2])
def test_tsv_is_fusion_benchs_but_for_small_matrices_and_tables_of_embeddings(count):
    """Upstream leaves matrices with fewer rows than models where they were, and averages embeddings
    only on request."""
    tuned, base = map_weights(count)
    merged, theirs = merge("tsv", tuned, base), below(load("fusion_bench"), f"tsv-{count}")
    small = "small.weight"
    assert torch.equal(theirs.pop(small), base[small])
    assert_agree(merged.pop(small), sum(model[small] for model in tuned) / count)
    assert_agree(merged, theirs)
    table = load("fusion_bench")[f"tsv-tables-{count}/embedding.weight"]
    assert distance(merged["embedding.weight"], table) > TOLERANCE
    renamed = [{"table.weight": model["embedding.weight"]} for model in [*tuned, base]]
    assert_agree(merge("tsv", renamed[:-1], renamed[-1])["table.weight"], table)


# --- the files and the page ------------------------------------------------------------------


def test_the_fixtures_are_small_and_the_page_names_their_libraries():
    paths = {path.stem: path for path in peers.FOLDER.glob("*.safetensors")}
    assert paths.keys() == peers.MAKERS.keys()
    assert sum(path.stat().st_size for path in paths.values()) < MAX_BYTES
    page = PAGE.read_text(encoding="utf-8")
    for name, path in paths.items():
        with safe_open(path, "pt") as file:
            versions = json.loads(file.metadata()["versions"])
        assert set(versions) == {*peers.MAKERS[name][1], "torch"}
        for library, version in versions.items():
            assert library == "torch" or f"{library} {version}" in page
