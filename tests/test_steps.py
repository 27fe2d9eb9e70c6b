"""Steps: what they deploy, towers that are compiled, and checks that are deferred."""

import functools
import json
import math

import open_clip
import pytest
import torch

import cmp
from cmp import arithmetic, config, mixtures, models, training
from cmp.errors import CmpError, Diverged
from cmp.faults import explain_failure
from cmp.runs.runner import execute
from cmp.scale import compiling, execution
from cmp.scale.execution import ExecutionConfig
from cmp.training import create_optimizer, make_train_state, train_step
from tests import forked, options

DEFAULT = options.small()


@pytest.mark.parametrize(("before", "after"), [(9.0, math.log(100)), (-1.0, 0.0)])
def test_a_step_keeps_the_logit_scale_within_clips_bounds(before, after):
    """That is, a temperature between 0.01 and 1, as open_clip's own training keeps it."""
    state = make_train_state(DEFAULT, forked.small_corpus())
    with torch.no_grad():
        state.model.logit_scale.fill_(before)
    pools = mixtures.task_pools(DEFAULT, state.corpus)[0]
    batch = next(state.batches(pools, 0, [0]))
    train_step(state, create_optimizer(state), batch, 0, 0, 1e-6)
    assert state.model.logit_scale.item() == pytest.approx(after)


@pytest.mark.numbers
@pytest.mark.usefixtures("own_options")
def test_what_is_scored_and_kept_is_the_deployed_model():
    """Scores do not change where the weights before the stream are deployed all the time."""

    @cmp.register("merge_policy", "deploy-the-first")
    def deploy_the_first(end):
        return cmp.MergedWeights(end.memory, end.trained, end.memory["zero"])

    run_config = options.small("merging.policy=deploy-the-first")
    result = execute(run_config, forked.small_corpus())
    full = result.metrics[result.metrics["scope"] == "full"]
    before, after = (
        full[full["task"] == task].set_index("dataset")["score"]
        for task in (0, run_config.stream.tasks)
    )
    assert after.to_dict() == before.to_dict()
    start = models.load_model(run_config.model, run_config.seeds.init)
    first = start.state_dict()
    kept = result.model.state_dict()
    assert all(torch.equal(kept[name], x) for name, x in first.items())
    plain = execute(options.small(), forked.small_corpus()).model.state_dict()
    assert not all(torch.equal(plain[name], x) for name, x in first.items())


@pytest.fixture
def traced(monkeypatch):
    """Towers are traced as if to be compiled, and computed as they are; there are no graphs."""
    monkeypatch.setattr(compiling, "BACKEND", "eager")
    monkeypatch.setattr(arithmetic, "lacks_bf16_kernels", lambda kind: False)  # dynamo needs it
    monkeypatch.setattr(compiling, "LAUNCH_BOUND", 0)


@pytest.mark.numbers
@pytest.mark.parametrize("name", ["small", pytest.param("tiny-vit", marks=pytest.mark.long)])
def test_compiled_towers_train_alike_and_keep_their_names(corpus, traced, name):
    """With a compiler that traces alone, to the bit; of texts of all lengths, through adapters."""
    settings = [f"model.name={name}", "training.batch=12", "training.precision=fp32"]
    run_config = config.parse(config.override({}, [*settings, "method.name=lora"]))
    pools, found = mixtures.task_pools(run_config, corpus), []
    for how in (ExecutionConfig(), ExecutionConfig(compile_towers=True)):
        state = make_train_state(run_config, corpus, execution=how)
        optimizer, losses = create_optimizer(state), []
        state.model.train()
        for step in range(3):
            batch = next(state.batches(pools[0], 0, [step]))
            losses.append(train_step(state, optimizer, batch, 0, step, 1e-3).loss.item())
        found.append((losses, list(state.model.state_dict()), models.weights_digest(state.model)))
    assert found[0] == found[1]
    assert ExecutionConfig(compile_towers=True).record() == {"execution": "compiled"}


def test_many_batch_sizes_are_compiled_once(traced):
    """Months of unequal size have batches of many sizes; dynamo stops at eight."""
    network = models.load_model(config.Model("small", "random"), 0)
    compiling.compile_towers(network, replay=False)
    torch._dynamo.utils.counters.clear()
    for count in range(2, 13):
        models.encode_image(network, torch.zeros(count, 3, 32, 32)).sum().backward()
        models.encode_text(network, torch.ones(count, network.context_length, dtype=torch.long))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3


def test_a_hook_that_cannot_be_compiled_ends_no_run(traced):
    """As one that a method adds once it is known that the tower can be."""
    network = models.load_model(config.Model("small", "random"), 0)
    compiling.compile_towers(network, replay=False)

    def hook(module, inputs):
        torch._dynamo.graph_break()

    next(
        m for m in network.modules() if isinstance(m, torch.nn.GroupNorm)
    ).register_forward_pre_hook(hook)
    assert models.encode_image(network, torch.zeros(2, 3, 32, 32)).isfinite().all()


def test_what_a_compiler_lacks_is_explained(traced, monkeypatch):
    def lacks_triton(graph, inputs):
        raise RuntimeError("Cannot find a working triton installation")

    monkeypatch.setattr(compiling, "BACKEND", lacks_triton)
    network = models.load_model(config.Model("small", "random"), 0)
    compiling.compile_towers(network, replay=False)
    with pytest.raises(RuntimeError) as caught:
        models.encode_image(network, torch.zeros(2, 3, 32, 32))
    words = "cannot be compiled here (Cannot find a working triton installation); leave out"
    assert words in explain_failure(caught.value)


def test_tracing_a_network_moves_no_running_statistic(traced, tmp_path):
    """Those of a tower with batch norms; training goes on with the mode that it sets itself."""
    tower = {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32}
    text = {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    tree = {"embed_dim": 32, "vision_cfg": tower, "text_cfg": text}
    path = tmp_path / "norms-32.json"
    path.write_text(json.dumps(tree))
    open_clip.add_model_config(path)
    network = models.load_model(config.Model(path.stem, "random"), 0)
    before = models.weights_digest(network)
    assert models.batch_norms(network)
    compiling.compile_towers(network, replay=False)
    assert models.weights_digest(network) == before


def test_on_a_cpu_nothing_is_compiled(corpus):
    with pytest.raises(CmpError, match=r"--compile: .* on a CPU"):
        make_train_state(DEFAULT, corpus, execution=ExecutionConfig(compile_towers=True))


def test_a_tower_that_cannot_be_compiled_whole_stays_as_it_is(corpus, monkeypatch, traced):
    run_config = config.parse(config.override({}, ["training.batch=12"]))
    model = models.load_model(run_config.model, 0)
    forward = type(model.visual).forward

    def broken(self, x):
        torch._dynamo.graph_break()
        return forward(self, x)

    monkeypatch.setattr(type(model.visual), "forward", broken)
    with pytest.warns(UserWarning, match="--compile: the image tower is not compiled"):
        state = make_train_state(
            run_config, corpus, model, execution=ExecutionConfig(compile_towers=True)
        )
    batch = next(state.batches(mixtures.task_pools(run_config, corpus)[0], 0, [0]))
    assert train_step(state, create_optimizer(state), batch, 0, 0, 1e-3).loss.isfinite()


@pytest.mark.parametrize(("replay", "limit"), [(True, 10**9), (False, 10**9), (True, 10)])
def test_towers_of_a_small_network_become_cuda_graphs(monkeypatch, replay, limit):
    """Unless a step computes its batch in parts, since a graph overwrites what it gave before."""
    monkeypatch.setattr(compiling, "LAUNCH_BOUND", limit)
    asked = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda tower, **how: asked.append(how))
    compiling.compile_towers(models.create_on_meta("small"), replay)
    mode = "reduce-overhead" if replay and limit > 10 else None
    assert [how["mode"] for how in asked if how["backend"] == compiling.BACKEND] == [mode, mode]
    assert mode is None or torch._inductor.list_mode_options(mode)["triton.cudagraphs"]


def test_a_step_in_parts_has_no_cuda_graphs(corpus, monkeypatch):
    asked = []
    monkeypatch.setattr(execution, "compile_towers", lambda _, replay: asked.append(replay))
    for part in (None, 6):
        run_config = config.parse(config.override({}, ["training.batch=12"]))
        make_train_state(run_config, corpus, execution=ExecutionConfig(part, False, True))
    assert asked == [True, False]


@pytest.mark.long
def test_only_steps_are_compiled(corpus, traced):
    """Evaluations and what methods do between tasks have batches of many sizes."""
    settings = [
        "stream.tasks=2", "training.steps=2", "training.batch=12", "evaluation.subset=1",
        "evaluation.full=false", "method.name=ewc", "method.batches=1",
    ]  # fmt: skip
    run_config = config.parse(config.override({}, settings))
    torch._dynamo.utils.counters.clear()
    result = execute(run_config, corpus, execution=ExecutionConfig(compile_towers=True))
    assert not any(layer._compiled_call_impl for layer in result.model.modules())
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs <= 5  # of each tower: traced to see whether it can be, then of a size or two


@pytest.fixture
def deferred(monkeypatch):
    """The CPU is treated as a card: nobody waits for whether a step was finite."""
    copy_later = lambda flag: functools.partial(bool, flag.clone())  # noqa: E731
    monkeypatch.setattr(execution, "DEFERRED", {"cpu", "meta"})
    monkeypatch.setattr(execution, "copy_to_host", copy_later)


def clipped_run(clip):
    """The default run with another limit of the gradients' norm, in fp32."""
    return options.small(f"optimizer.clip={clip}", "training.precision=fp32")


def train(poisoned=None):
    """Five steps of task 1 without clipping; the losses of some are not finite. Returns the weights
    before each step, and the step that an error names."""
    run = clipped_run(1e9)
    state = make_train_state(run, forked.small_corpus(), execution=ExecutionConfig())
    pools, weights = mixtures.task_pools(run, state.corpus)[1], []
    optimizer = create_optimizer(state)
    try:
        for step in range(5):
            weights.append(models.weights_digest(state.model))
            batch = next(state.batches(pools, 1, [step]))
            if step == poisoned:
                batch = batch._replace(images=batch.images.float().fill_(torch.nan))
            train_step(state, optimizer, batch, 1, step, 1e-3)
        training.check_weights_finite(state, 1, 5)
    except Diverged as error:
        return [*weights, models.weights_digest(state.model)], error.report["step"]
    return [*weights, models.weights_digest(state.model)], None


@pytest.mark.numbers
def test_a_deferred_check_changes_no_bit(deferred, monkeypatch):
    later = train()
    monkeypatch.undo()
    assert later == train()
    assert len(set(later[0])) == 6


def last_weights(clip):
    """The weights after five steps at a limit of the gradients' norm, and these norms."""
    run = clipped_run(clip)
    state = make_train_state(run, forked.small_corpus(), execution=ExecutionConfig())
    pools, norms = mixtures.task_pools(run, state.corpus)[1], []
    optimizer = create_optimizer(state)
    for step in range(5):
        batch = next(state.batches(pools, 1, [step]))
        norms.append(train_step(state, optimizer, batch, 1, step, 1e-3).gradient_norm)
    return torch.nn.utils.parameters_to_vector(state.model.parameters()).detach(), norms


def divide_gradients(parameters, most):
    """Clip gradients as `torch.nn.utils.clip_grad_norm_`, which multiplies them instead, and so
    rounds otherwise than an optimiser that divides."""
    gradients = [x.grad for x in parameters]
    norm = torch.nn.utils.get_total_norm(gradients)
    for gradient in gradients:
        gradient /= (norm / most).clamp(min=1)
    return norm


@pytest.mark.numbers
@pytest.mark.parametrize("clip", [0.01, 1e9])
def test_an_optimizer_clips_within_its_step_as_if_before_it(clip, deferred, monkeypatch):
    """AdamW's eps makes the size of gradients matter, so clipping changes the weights."""
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: pytest.fail("a pass more"))
    within, norms = last_weights(clip)
    monkeypatch.undo()
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", divide_gradients)
    before, same = last_weights(clip)
    assert norms == same and min(norms) > 0.01
    assert torch.equal(within, before)
    if clip < 1:
        free, _ = last_weights(1e9)
        assert (free - before).abs().max() > 1e-4


@pytest.mark.numbers
@pytest.mark.parametrize(("poisoned", "started"), [(0, 2), (2, 4), (4, 5)])
def test_a_deferred_check_finds_the_step_and_leaves_its_weights(deferred, poisoned, started):
    weights, step = train(poisoned)
    assert step == poisoned
    assert weights[-1] == weights[poisoned]
    assert len(weights) == started + 1  # one step more was begun, unless it was the last


def test_two_loops_with_one_execution_tell_each_other_nothing(deferred):
    how, pools = ExecutionConfig(), mixtures.task_pools(DEFAULT, forked.small_corpus())
    states = [make_train_state(DEFAULT, forked.small_corpus(), execution=how) for _ in range(2)]
    for number, state in enumerate(states):
        batch = next(state.batches(pools[1], 1, [0]))
        if number == 0:
            batch = batch._replace(images=batch.images.float().fill_(torch.nan))
        train_step(state, state.optimizer, batch, 1, 0, 1e-3)
    training.check_weights_finite(states[1], 1, 1)
    with pytest.raises(Diverged):
        training.check_weights_finite(states[0], 1, 1)


def test_an_optimizer_that_cannot_skip_a_step_is_waited_for(deferred):
    state = make_train_state(DEFAULT, forked.small_corpus(), execution=ExecutionConfig())
    optimizer = torch.optim.SGD(state.model.parameters(), lr=0.1)
    bad = torch.tensor(False)
    with pytest.raises(Diverged):
        ExecutionConfig().check(state, optimizer, bad, lambda: Diverged("now", {}))


class Skipping(torch.optim.SGD):
    """An optimizer that can skip a step, as the fused one, which meta does not have."""

    _step_supports_amp_scaling = True

    def step(self):
        assert self.found_inf.is_meta


def test_nothing_in_a_step_waits_for_the_device(deferred, monkeypatch):
    """Numbers on the device `meta` cannot be had at all."""
    monkeypatch.setattr(execution, "copy_to_host", lambda flag: lambda: True)
    state = make_train_state(
        DEFAULT, forked.small_corpus(), device="meta", execution=ExecutionConfig()
    )
    optimizer = Skipping(state.model.parameters(), lr=0.1)
    batch = next(state.batches(mixtures.task_pools(DEFAULT, state.corpus)[1], 1, [0]))
    for step in range(2):
        result = train_step(state, optimizer, batch, 1, step, 1e-3)
    assert result.loss.is_meta
    with pytest.raises(RuntimeError, match="meta tensors"):
        result.loss.item()
