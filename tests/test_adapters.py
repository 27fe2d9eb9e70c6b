"""Adapters: they begin without effect, fold in exactly, and leave open_clip's own layers behind."""

import copy

import forked
import options
import pytest
import torch
from options import small
from test_resume import BOUNDARY, END, MIDDLE, MemoryManager, equal, same

from cmp import mixtures, models, registry
from cmp.errors import CmpError
from cmp.methods import adapters
from cmp.runs import checkpoints
from cmp.runs.runner import Observer, execute
from cmp.training import make_train_state, train_task, trainable_parameters

pytestmark = pytest.mark.numbers
EMBEDDED = pytest.mark.parametrize("name", options.families())
ADAPTER_METHODS = registry.option_names("method", "fold")
ADAPTERS = pytest.mark.parametrize("method", ADAPTER_METHODS)


def inputs(model, count=4):
    """Images and full-length texts that depend on nothing."""
    noise = torch.Generator().manual_seed(1)
    pixels = torch.randn(count, 3, *model.visual.image_size, generator=noise)
    return pixels, models.tokenize("small", ("a red square", "two flags", "a cat", "b")[:count])


@torch.no_grad()
def outputs(model):
    pixels, tokens = inputs(model)
    return torch.cat([models.encode_image(model, pixels), models.encode_text(model, tokens)])


def make_state(*settings):
    return make_train_state(small(*settings), forked.small_corpus())


def perturb(state, size=0.05):
    """Move every trainable number, as training might, and return the state."""
    noise = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in trainable_parameters(state.model).values():
            p += size * torch.randn(p.shape, generator=noise)
    return state


@EMBEDDED
@ADAPTERS
@pytest.mark.parametrize("bf16", [False, True])
def test_at_their_start_outputs_are_the_same_to_the_bit(name, method, bf16):
    state = make_state(f"model.name={name}", f"method.name={method}")
    plain = models.load_model(state.config.model, 0)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        assert torch.equal(outputs(state.model.eval()), outputs(plain.eval()))
    assert len(adapters.adapted_layers(state.model)) > 10


@EMBEDDED
@ADAPTERS
def test_folded_in_they_equal_the_adapted_network(name, method):
    state = perturb(make_state(f"model.name={name}", f"method.name={method}"))
    model, before = state.model, outputs(state.model)
    start = outputs(models.load_model(state.config.model, 0))
    assert (before - start).abs().max() > 1e-4
    folded = adapters.merged_state_dict(model)
    fresh = models.create_model(name)
    fresh.load_state_dict(folded)  # by open_clip's own names and no others
    assert (outputs(fresh) - before).abs().max() <= 1e-6
    with adapters.merged(model):
        assert torch.equal(outputs(model), outputs(fresh))
    assert torch.equal(outputs(model), before)
    adapters.merge_and_unload(model)
    assert model.state_dict().keys() == fresh.state_dict().keys()
    assert torch.equal(outputs(model), outputs(fresh))
    assert not adapters.adapted_layers(model)


@ADAPTERS
def test_the_fold_is_the_formula(method):
    """One linear layer and one convolution, by hand in double precision."""
    state = perturb(make_state(f"method.name={method}", "method.rank=3", "method.scale=1.5"))
    for name in ("transformer.resblocks.0.mlp.c_fc", "visual.trunk.stages.0.1.conv_1"):
        layer = state.model.get_submodule(name)
        w = layer.weight.detach().double().flatten(1)
        a = {k: x.detach().double() for k, x in layer.adapter.named_parameters()}
        a |= {k: x.double() for k, x in layer.adapter.named_buffers()}
        if method == "vera":
            w = w + 1.5 * a["outer"].diag() @ a["up"] @ a["inner"].diag() @ a["down"]
        else:
            w = w + 1.5 * a["up"] @ a["down"]
        if method == "dora":
            w = a["magnitude"][:, None] * w / w.norm(dim=1, keepdim=True)
        expected = w.view_as(layer.weight).float()
        torch.testing.assert_close(layer.adapter.merged_weight(layer.weight), expected)


@ADAPTERS
def test_each_task_folds_and_begins_anew_or_goes_on(method):
    for fold in (True, False):
        state = perturb(make_state(f"method.name={method}", f"method.fold={str(fold).lower()}"))
        weights = {n: x.clone() for n, x in state.model.state_dict().items()}
        folded = adapters.merged_state_dict(state.model)
        state.method.begin_task(state, 1)
        after = state.model.state_dict()
        for name, layer in adapters.adapted_layers(state.model).items():
            kept = folded if fold else weights
            assert torch.equal(layer.weight, kept[f"{name}.weight"])
            if fold:
                assert torch.equal(layer.adapter.merged_weight(layer.weight), layer.weight)
        assert all(torch.equal(after[n], x) for n, x in weights.items()) == (not fold)


@pytest.mark.parametrize(
    "settings",
    options.one_in(
        2,
        [
            ("method.name=lora", "merging.policy=ema"),
            ("method.name=dora", "merging.policy=ema"),
            ("method.name=vera", "method.fold=false", "optimizer.carry=true"),
            ("method.name=lora", "schedule.name=infinite", "schedule.cooldown_steps=1"),
            ("method.name=galore", "optimizer.carry=true", "method.gap=2"),
            ("method.name=ewc", "merging.policy=ema", "method.batches=1"),
            ("method.name=si", "schedule.name=infinite", "schedule.cooldown_steps=1"),
        ],
    ),
    ids=" ".join,
)
def test_what_methods_are_combined_with_resumes_to_the_bit(settings):
    run_config, corpus, manager = small(*settings), forked.small_corpus(), MemoryManager()
    result = execute(run_config, corpus, manager=manager)
    for place in (MIDDLE, BOUNDARY, END):
        resumed = MemoryManager(manager.states[place])
        assert same(execute(run_config, corpus, manager=resumed), result), place
        assert all(equal(state, manager.states[at]) for at, state in resumed.states.items()), place


def test_merging_sees_folded_weights_and_the_average_is_trained_on():
    run_config = small(
        "method.name=lora", "merging.policy=ema", "merging.weight=0.25", "training.precision=fp32"
    )  # fmt: skip
    manager, ends, starts = MemoryManager(), [], []

    def step(task, number, result, model):
        if number == run_config.training.steps - 1:
            ends.append(adapters.merged_state_dict(model))

    result = execute(run_config, forked.small_corpus(), Observer(step), manager=manager)
    average = models.load_model(run_config.model, 0).state_dict()
    for end in ends:
        average = {n: 0.25 * end[n] + 0.75 * x for n, x in average.items()}
        starts.append(average)
    loaded = checkpoints.strip_prefix(manager.states[BOUNDARY].tensors, "weights/")
    for name, x in starts[0].items():
        torch.testing.assert_close(loaded[name], x)
    for name, x in result.model.state_dict().items():
        torch.testing.assert_close(x, starts[1][name])
    assert "visual.trunk.stem.0.weight" in starts[0]


@ADAPTERS
def test_a_finished_run_is_of_plain_layers(method):
    result = execute(small(f"method.name={method}", "stream.tasks=1"), forked.small_corpus())
    fresh = models.create_model("small")
    fresh.load_state_dict(result.model.state_dict())
    assert models.weights_digest(fresh) == models.weights_digest(result.model)
    assert models.weights_digest(fresh) != models.weights_digest(
        models.load_model(small().model, 0)
    )


def test_adapters_of_two_tasks_are_drawn_apart_and_of_one_alike():
    draws = []
    for task in (0, 0, 1):
        state = make_state("method.name=lora")
        adapters.begin_task(state, task)
        draws.append(state.model.get_submodule("visual.trunk.stem.0").adapter.down.detach())
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_vera_shares_what_it_draws_and_stores_none_of_it():
    state = make_state("method.name=vera", "method.targets=[q_proj, k_proj]")
    layers = list(adapters.adapted_layers(state.model).values())
    assert len({layer.adapter.down.data_ptr() for layer in layers}) == 1
    assert not any("down" in name for name in state.model.state_dict())


@pytest.mark.parametrize("target", ["q_proj", "visual.trunk.stem", "mlp.c_fc", "stem.0"])
def test_targets_are_parts_of_names(target):
    state = make_state("method.name=lora", f"method.targets=[{target}]")
    names = adapters.adapted_layers(state.model)
    assert names
    assert all(f".{target}." in f".{name}." for name in names)


def refused(*settings, model=None):
    with pytest.raises(CmpError) as caught:
        run_config = small(*settings)
        make_train_state(run_config, forked.small_corpus(), model)
    return str(caught.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("name=lora", "rank=17"), ("17", "visual.trunk.stem.0", "16 x 27", "at most 16")),
        (("name=galore", "rank=28"), ("28", "positional_embedding", "16 x 128", "at most 16")),
        (("name=lora", "targets=[q_porj]"), ("'q_porj'", "did you mean 'q_proj'?")),
        (
            ("name=lora", "targets=[foo]"),
            ("no layer has 'foo' in its name; choose from attn, c_fc",),
        ),
        (("name=full", "rank=4"), ("rank: not used by 'full'", "lora, dora, vera, galore")),
        (("name=galore", "fold=false"), ("fold: not used by 'galore'", "lora, dora, vera")),
        (("name=ewc", "damping=2.0"), ("damping: not used by 'ewc'", "si")),
        (("name=lora", "rank=0"), ("method.rank", "0")),
        (("name=si", "strength=-1.0"), ("method.strength", "-1")),
    ],
)
def test_what_cannot_be_is_refused_by_name(settings, words):
    message = refused(*(f"method.{setting}" for setting in settings))
    for word in words:
        assert word in message


def test_combinations_without_sense_are_refused_with_a_reason():
    message = refused("method.name=lora", "method.fold=false", "merging.policy=ema")
    assert "merging.policy 'ema'" in message
    assert "method.fold=true" in message
    message = refused("method.name=lora", "merging.policy=step-ema")
    assert "averages weights after every step" in message
    message = refused("method.name=dora", "optimizer.carry=true")
    assert "optimizer.carry" in message
    message = refused(
        "method.name=distillation", "mixture.pretraining=0.0", "mixture.update=0.5",
        "mixture.buffer=0.5",
    )  # fmt: skip
    assert "mixture.pretraining 0" in message


@pytest.mark.parametrize("method", ["lora", "bitfit", "lnfit"])
def test_a_frozen_tower_is_refused(method):
    model = models.create_model("small")
    model.visual.requires_grad_(False)
    message = refused(f"method.name={method}", model=model)
    assert "visual." in message
    assert "frozen" in message
    if method == "lora":
        run_config = small("method.name=lora", "method.targets=[q_proj]")
        assert adapters.adapted_layers(
            make_train_state(run_config, forked.small_corpus(), model).model
        )


def test_every_method_with_adapters_folds_or_not():
    assert {"lora", "dora", "vera"} <= set(ADAPTER_METHODS)
    assert set(ADAPTER_METHODS) <= set(options.choices()["method.name"])
    assert {s for (s, *_) in options.SETTINGS if "fold" in s} == {
        "method.fold=false",
        "method.fold=true",
    }


def test_a_copy_of_an_adapted_network_is_one_of_its_own():
    state = perturb(make_state("method.name=vera"))
    other = copy.deepcopy(state.model)
    before = outputs(other)
    train_task(state, mixtures.task_pools(state.config, state.corpus)[0], 0)
    assert torch.equal(outputs(other), before)
