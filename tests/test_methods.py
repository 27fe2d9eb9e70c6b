"""Update methods: what trains has a gradient, what is frozen stays, and the formulas by hand."""

import copy
import dataclasses
import itertools
import json
import math
from types import SimpleNamespace

import forked
import open_clip
import options
import pytest
import torch
from options import small

from cmp import budgets, mixtures, models, starts
from cmp.config import Method
from cmp.evaluation import evaluate
from cmp.methods import distillation, ewc, galore, importance, locked_text, si
from cmp.runs import identity
from cmp.runs.runner import Observer, execute
from cmp.seeds import torch_generator
from cmp.training import (
    ForwardOutput,
    UpdateMethod,
    create_optimizer,
    encode_batch,
    make_train_state,
    train_task,
    trainable_parameters,
)
from lab import chapters

pytestmark = pytest.mark.numbers
NAMES = options.choices()["method.name"]


def matrix(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def vit():
    """ViT-S/32 at random weights, made once, two blocks of each tower; each test trains a copy."""
    model = models.create_model("ViT-S-32")
    for tower in (model.visual.transformer, model.transformer):
        tower.resblocks = tower.resblocks[:2]
    return model


def two_steps(state, batch):
    """Two steps on noise; returns which parameters had a gradient, and which moved."""
    model, method = state.model.train(), state.method
    before = {name: x.clone() for name, x in model.state_dict().items()}
    optimizer, with_gradient = create_optimizer(state), set()
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    for number in range(2):
        noise = torch.Generator().manual_seed(number)
        pixels = torch.randn(batch, 3, *model.visual.image_size, generator=noise)
        most = model.vocab_size - 1
        tokens = torch.randint(1, most, (batch, model.context_length), generator=noise)
        tokens[:, -1] = most
        image, text = models.encode_image(model, pixels), models.encode_text(model, tokens)
        output = ForwardOutput(image, text, pixels, tokens, torch.arange(batch), replayed=batch - 1)
        optimizer.zero_grad()
        budgets.total_loss(state, output).backward()
        method.after_backward(state)
        method.step(state, optimizer)
        trainable = trainable_parameters(model).items()
        with_gradient |= {name for name, p in trainable if p.grad is not None and p.grad.any()}
    moved = {n for n, x in model.state_dict().items() if not torch.equal(x, before[n])}
    return with_gradient, moved


@pytest.mark.parametrize(
    ("model", "name"),
    options.one_in(
        4,
        [pytest.param(m, n) for m in (*starts.family_names(), "ViT-S-32") for n in NAMES],
        lambda model: model,
    ),
)
def test_after_two_steps_all_that_trains_had_a_gradient_and_moved(model, name, vit):
    network = copy.deepcopy(vit) if model == "ViT-S-32" else models.create_model(model)
    state = budgets.shape_state(model, Method(name=name), network)
    gradient, moved = two_steps(state, batch=3)
    trainable = set(trainable_parameters(state.model))
    assert gradient == moved == trainable != set()
    everything = {n for n, _ in state.model.named_parameters()}
    is_penalty = state.method.losses is not UpdateMethod.losses
    assert (trainable == everything) == (is_penalty or name in ("full", "galore"))


@pytest.mark.parametrize("name", options.families())
def test_bitfit_and_lnfit_train_what_they_are_called_after(name):
    trains = {}
    for method in ("bitfit", "lnfit"):
        state = budgets.shape_state(name, Method(name=method), models.create_model(name))
        trains[method] = set(trainable_parameters(state.model))
    everything = [n for n, _ in models.create_model(name).named_parameters()]
    assert trains["bitfit"] == {n for n in everything if n.endswith(".bias")}
    for part in ("visual.trunk.stem.1.weight", "transformer.resblocks.0.ln_1.bias"):
        assert part in trains["lnfit"]
    assert not any("proj" in n or "logit_scale" in n for n in trains["lnfit"])


def test_lnfit_says_that_it_trains_no_norm_of_a_resnet():
    with pytest.warns(UserWarning, match="'lnfit' trains no norm of this image tower"):
        state = budgets.shape_state("RN50", Method(name="lnfit"), models.create_on_meta("RN50"))
    assert not any(name.startswith("visual") for name in trainable_parameters(state.model))


# --- GaLore ----------------------------------------------------------------------------------


ADAM = {"lr": 0.01, "betas": (0.9, 0.98), "eps": 1e-8, "weight_decay": 0.1}


def two_parameters():
    return [torch.nn.Parameter(matrix(6, 4, 1)), torch.nn.Parameter(matrix(1, 5, 2)[0])]


def trained(optimizer, parameters, numbers=range(5)):
    """The parameters after a step with each of some numbered gradients."""
    for number in numbers:
        for index, parameter in enumerate(parameters):
            parameter.grad = matrix(1, parameter.numel(), 10 * number + index).view_as(parameter)
        optimizer.step()
    return parameters


def test_galore_with_the_identity_for_directions_is_adamw(monkeypatch):
    monkeypatch.setattr(galore, "leading_directions", lambda gradient, rank: torch.eye(rank))
    ours, theirs = two_parameters(), two_parameters()
    groups = [{"params": ours}]
    trained(galore.ProjectedAdamW(groups, rank=4, gap=2, scale=1.0, **ADAM), ours)
    trained(torch.optim.AdamW(theirs, **ADAM), theirs)
    for one, other, start in zip(ours, theirs, two_parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
        assert not torch.allclose(one, start, atol=1e-3)


@pytest.mark.parametrize("shape", [(6, 4), (5, 5)])
def test_at_full_rank_the_gradient_comes_back_and_below_its_best_part(shape):
    gradient = matrix(*shape)
    basis = galore.leading_directions(gradient, min(shape))
    torch.testing.assert_close(gradient @ basis @ basis.T, gradient)
    basis = galore.leading_directions(gradient, 2)
    left, values, right = torch.linalg.svd(gradient, full_matrices=False)
    best = left[:, :2] * values[:2] @ right[:2]
    torch.testing.assert_close(gradient @ basis @ basis.T, best, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (5, 3, 2, 2)])
def test_galore_does_not_depend_on_the_signs_of_singular_vectors(shape, monkeypatch):
    """Linear algebra libraries choose them freely, anew at each projection."""

    def train():
        parameter = torch.nn.Parameter(matrix(1, math.prod(shape), 0).view(shape))
        groups = [{"params": [parameter]}]
        optimizer = galore.ProjectedAdamW(groups, rank=3, gap=10, scale=2.0, **ADAM)
        return trained(optimizer, [parameter], range(50))[0].detach()

    plain, directions = train(), galore.leading_directions
    signs = torch_generator("signs", 0)

    def flipped(gradient, rank):
        return directions(gradient, rank) * (2 * torch.randint(2, (rank,), generator=signs) - 1)

    monkeypatch.setattr(galore, "leading_directions", flipped)
    torch.testing.assert_close(train(), plain, rtol=0, atol=1e-5)


def test_an_aligned_basis_has_the_new_span_and_is_nearest_to_the_old_one():
    old, new = (torch.linalg.qr(matrix(6, 3, seed)).Q for seed in (1, 2))
    aligned = galore.align(new, old)
    torch.testing.assert_close(aligned @ aligned.T, new @ new.T)
    torch.testing.assert_close(aligned.T @ aligned, torch.eye(3))
    for seed in range(20):
        other = new @ torch.linalg.qr(matrix(3, 3, seed)).Q
        assert (aligned - old).norm() <= (other - old).norm()


def test_galore_finds_directions_anew_every_gap_and_keeps_small_moments():
    parameters = two_parameters()
    groups = [{"params": parameters}]
    optimizer = galore.ProjectedAdamW(groups, rank=2, gap=3, scale=2.0, **ADAM)
    bases = []
    for number in range(6):
        trained(optimizer, parameters, [number])
        bases.append(optimizer.state[parameters[0]]["basis"].clone())
    kept = [torch.equal(a, b) for a, b in itertools.pairwise(bases)]
    assert kept == [True, True, False, True, True]
    assert optimizer.state[parameters[0]]["exp_avg"].shape == (6, 2)
    assert "basis" not in optimizer.state[parameters[1]]


# --- EWC and SI ------------------------------------------------------------------------------


def run_losses(*settings):
    """Losses and final weights of a small run."""
    losses = []
    hook = Observer(step=lambda task, number, result, model: losses.append(result.loss.item()))
    result = execute(small(*settings), forked.small_corpus(), hook)
    return losses, models.weights_digest(result.model)


@pytest.mark.parametrize(
    "settings", [("method.name=ewc", "method.batches=1"), ("method.name=si",)], ids=" ".join
)
def test_without_strength_a_penalty_is_full_fine_tuning_to_the_bit(settings):
    full = run_losses()
    assert run_losses(*settings, "method.strength=0.0") == full
    assert run_losses(*settings, "method.strength=1e6") != full


def make_encode_further(state):
    """What passes further batches of the first task through the network, as `train_task` does."""
    pools = mixtures.task_pools(state.config, state.corpus)[0]

    def encode_further(number):
        step = state.config.steps[0] + number
        return encode_batch(state, next(state.batches(pools, 0, [step])), 0, step)

    return encode_further


def test_fisher_by_hand():
    """Per batch: the square of the gradient of the mean; per sample: the mean of the squares of
    each sample's own; both at the temperature of training."""
    states = {}
    for kind in ("batch", "sample"):
        run_config = small("method.name=ewc", f"method.fisher={kind}", "method.batches=1",
                       "method.gamma=0.5", "training.precision=fp32")  # fmt: skip
        state = make_train_state(run_config, forked.small_corpus())
        encode_further = make_encode_further(state)
        for name in trainable_parameters(state.model):
            state.method_state[f"importance/{name}"] += 1.0
        ewc.end_task(state, encode_further)
        states[kind] = (state, encode_further)
    for kind, (state, encode_further) in states.items():
        output = encode_further(0)
        scale = state.model.logit_scale
        logits = scale.exp() * output.image @ output.text.T
        rows = torch.arange(len(logits))
        sample_losses = -(logits.log_softmax(1)[rows, rows] + logits.log_softmax(0)[rows, rows]) / 2
        [own] = torch.autograd.grad(sample_losses.mean(), [scale], retain_graph=True)
        if kind == "batch":
            expected = own.square()
        else:
            gradients = [
                torch.autograd.grad(loss, [scale], retain_graph=True)[0] for loss in sample_losses
            ]
            expected = torch.stack(gradients).square().mean()
        fisher = state.method_state["importance/logit_scale"]
        torch.testing.assert_close(fisher, 0.5 + expected, rtol=1e-4, atol=0)
    both = [state.method_state["importance/ln_final.weight"] for state, _ in states.values()]
    assert (both[1].mean() - 0.5) > 2 * (both[0].mean() - 0.5)  # a mean of gradients cancels


def test_locked_text_leaves_what_the_user_froze():
    model = models.create_model("tiny", 0)
    frozen = next(name for name, _ in model.named_parameters() if name.startswith("visual."))
    model.get_parameter(frozen).requires_grad_(False)
    run = SimpleNamespace(method=Method("locked-text"))
    locked_text.prepare(SimpleNamespace(model=model, config=run))
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (name.startswith("visual.") and name != frozen), name


def scalar_state(method, value):
    """A train state of one parameter."""
    model = torch.nn.Module()
    model.theta = torch.nn.Parameter(torch.tensor([value]))
    config_ = SimpleNamespace(method=method)
    return SimpleNamespace(config=config_, model=model, method_state={}, frozen_models={})


def test_the_penalty_and_its_gradient_by_hand():
    state = scalar_state(Method(name="ewc", strength=3.0), 2.0)
    state.method_state = {
        "importance/theta": torch.tensor([5.0]),
        "anchor/theta": torch.tensor([0.5]),
    }
    [term] = ewc.losses(state, None).values()
    assert term.item() == pytest.approx(3.0 / 2 * 5.0 * 1.5**2)
    term.backward()
    assert state.model.theta.grad.item() == pytest.approx(3.0 * 5.0 * 1.5)
    state.config.method = Method(name="si", strength=3.0)
    [term] = si.losses(state, None).values()
    assert term.item() == pytest.approx(3.0 * 5.0 * 1.5**2)


def test_the_autograd_function_is_that_of_autograd():
    p = matrix(3, 2).double().requires_grad_()
    importances, anchor = matrix(3, 2, 1).double().abs(), matrix(3, 2, 2).double()
    assert torch.autograd.gradcheck(
        lambda x: importance._QuadraticPenalty.apply(x, importances, anchor), [p]
    )


def test_the_path_integral_on_a_quadratic():
    """Gradient descent on k theta^2 / 2 from theta_0 by n small steps: the path integral is the
    loss that was gained, k (theta_0^2 - theta_n^2) / 2, but for the steps' size."""
    k, rate, start, damping = 4.0, 1e-3, 1.5, 0.1
    state = scalar_state(Method(name="si", damping=damping), start)
    importance.prepare(state)
    si.begin_task(state, 0)
    theta = state.model.theta
    optimizer = torch.optim.SGD([theta], lr=rate)
    by_hand = 0.0
    for _ in range(200):
        old = theta.item()
        theta.grad = k * theta.detach()
        si.after_backward(state)
        si.step(state, optimizer)
        by_hand += k * old * rate * k * old
    gained = k * (start**2 - theta.item() ** 2) / 2
    assert state.method_state["path/theta"].item() == pytest.approx(by_hand, rel=1e-4)
    assert state.method_state["path/theta"].item() == pytest.approx(gained, rel=5e-3)
    si.end_task(state, None)
    expected = by_hand / ((theta.item() - start) ** 2 + damping)
    assert state.method_state["importance/theta"].item() == pytest.approx(expected, rel=1e-4)
    assert state.method_state["anchor/theta"].item() == start
    si.begin_task(state, 1)  # the next path begins here
    assert state.method_state["anchor/theta"].item() == theta.item()
    assert state.method_state["path/theta"].item() == 0


def test_what_a_way_cost_is_no_importance():
    state = scalar_state(Method(name="si"), 1.0)
    importance.prepare(state)
    si.begin_task(state, 0)
    state.model.theta.grad = torch.tensor([-2.0])
    si.after_backward(state)
    si.step(state, SimpleNamespace(step=lambda: state.model.theta.data.sub_(0.1)))
    assert state.method_state["path/theta"].item() == pytest.approx(-0.2)
    si.end_task(state, None)
    assert state.method_state["importance/theta"].item() == 0


def test_the_path_is_of_the_loss_alone_and_of_what_was_before_clipping():
    state = scalar_state(Method(name="si", strength=5.0), 1.0)
    importance.prepare(state)
    si.begin_task(state, 0)
    theta, kept = state.model.theta, state.method_state
    kept["importance/theta"].fill_(2.0)
    kept["anchor/theta"].fill_(0.5)
    (3 * theta + si.losses(state, None)["si"]).backward()
    assert theta.grad.item() == pytest.approx(3 + 5 * 2 * 2 * 0.5)
    si.after_backward(state)
    torch.nn.utils.clip_grad_norm_([theta], 0.1)
    si.step(state, torch.optim.SGD([theta], lr=1.0))
    assert theta.item() == pytest.approx(0.9)
    assert kept["path/theta"].item() == pytest.approx(3 * 0.1)
    assert "gradient/theta" not in kept  # it is of this step, and not saved


# --- distillation ----------------------------------------------------------------------------


def test_distillation_is_nothing_at_first_and_looks_at_the_pool_alone():
    run_config = small("method.name=distillation", "training.precision=fp32")
    state = make_train_state(run_config, forked.small_corpus())
    pools = mixtures.task_pools(run_config, state.corpus)
    batch = next(state.batches(pools[1], 1, [0]))
    output = encode_batch(state, batch, 1, 0)
    in_pool = state.corpus.table["dataset"].iloc[batch.rows].isin(state.corpus.by_role("pool"))
    assert in_pool.tolist() == [False] * (8 - output.replayed) + [True] * output.replayed
    assert output.replayed == 3
    assert abs(distillation.losses(state, output)["distillation"].item()) < 1e-6
    with torch.no_grad():
        state.model.text_projection.add_(0.1 * matrix(*state.model.text_projection.shape))
    output = encode_batch(state, batch, 1, 0)
    far = distillation.losses(state, output)["distillation"]
    assert far.item() > 1e-4
    others = dataclasses.replace(output, image=output.image.clone(), text=output.text.clone())
    with torch.no_grad():
        others.image[: 8 - output.replayed] = 0.0
    assert distillation.losses(state, others)["distillation"].item() == far.item()


def test_divergence_by_hand():
    student, teacher, against = (matrix(3, 4, seed) for seed in range(3))
    p = (2.0 * teacher @ against.T).softmax(1)
    q = (2.0 * student @ against.T).softmax(1)
    divergence = distillation.divergence(student, teacher, against, torch.tensor(2.0))
    torch.testing.assert_close(divergence, (p * (p / q).log()).sum() / 3, rtol=1e-4, atol=0)


def test_the_teacher_stays_and_is_no_part_of_the_state():
    run_config = small("method.name=distillation", "stream.tasks=1")
    state = make_train_state(run_config, forked.small_corpus())
    train_task(state, mixtures.task_pools(run_config, state.corpus)[0], 0)
    start = models.load_model(run_config.model, 0).state_dict()
    teacher = state.frozen_models["teacher"].state_dict()
    assert all(torch.equal(x, teacher[name]) for name, x in start.items())
    assert not state.method_state


def test_draws_of_methods_leave_the_global_stream_alone():
    networks = {name: models.create_model("tiny") for name in NAMES}
    before = torch.get_rng_state()
    for name, network in networks.items():
        budgets.shape_state("tiny", Method(name=name), network)
    assert torch.equal(torch.get_rng_state(), before)


NANO_RESNET = {
    "vision_cfg": {"layers": [1, 1, 1, 1], "width": 16, "image_size": 32},
    "text_cfg": {"width": 32, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module", params=["nano", pytest.param("RN50", marks=pytest.mark.long)])
def resnet(request, tmp_path_factory):
    """The name of a network with batch norms, for small pictures."""
    tree = open_clip.get_model_config("RN50")
    tree["vision_cfg"]["image_size"] = 32
    if request.param == "nano":
        tree |= {key: tree[key] | value for key, value in NANO_RESNET.items()}
    path = tmp_path_factory.mktemp("models") / f"{request.param}-32.json"
    path.write_text(json.dumps(tree))
    open_clip.add_model_config(path)
    return path.stem


def resnet_state(name, *settings, frozen=lambda model: ()):
    """The state of a run of a network at random weights, some parts of it frozen."""
    sizes = (f"model.name={name}", "model.start=random", "training.batch=6")
    model = models.create_model(name)
    for part in frozen(model):
        part.requires_grad_(False)
    return make_train_state(small(*sizes, *settings), forked.small_corpus(), model)


def statistics(model):
    """The running statistics of a network."""
    endings = ("running_mean", "running_var", "num_batches_tracked")
    return {name: x.clone() for name, x in model.state_dict().items() if name.endswith(endings)}


def moved_statistics(state):
    """Which running statistics the steps of a task move, and which its end; scored on the way."""
    looks = [statistics(state.model)]

    def look(step, result):
        looks[1:] = [statistics(state.model)]
        if step == 0:
            evaluate(state.model, state.config.model.name, state.corpus, subset=1)

    train_task(state, mixtures.task_pools(state.config, state.corpus)[0], 0, look)
    looks.append(statistics(state.model))
    return [
        {name for name, x in one.items() if not torch.equal(x, other[name])}
        for one, other in itertools.pairwise(looks)
    ]


@pytest.mark.filterwarnings("ignore:.*trains no norm of this image tower")
@pytest.mark.defect
@pytest.mark.parametrize("name", ["locked-image", "lora", "bitfit", "lnfit"])
def test_running_statistics_of_what_is_frozen_stay(resnet, name):
    state = resnet_state(resnet, f"method.name={name}", "training.steps=20")
    assert moved_statistics(state) == [set(), set()]


@pytest.mark.defect
@pytest.mark.parametrize("fisher", ["sample", "batch"])
def test_a_measurement_moves_no_running_statistics(resnet, fisher):
    settings = ("method.name=ewc", f"method.fisher={fisher}", "method.batches=1")
    state = resnet_state(resnet, *settings, "training.steps=2")
    in_steps, at_end = moved_statistics(state)
    assert in_steps == statistics(state.model).keys() and at_end == set()
    assert state.method_state["importance/visual.conv1.weight"].any()


@pytest.mark.defect
def test_running_statistics_stay_where_a_user_froze_the_network(resnet):
    state = resnet_state(resnet, "training.steps=2", frozen=lambda model: [model.visual.layer1])
    frozen = {name for name in statistics(state.model) if name.startswith("visual.layer1.")}
    in_steps, _ = moved_statistics(state)
    assert frozen and in_steps == statistics(state.model).keys() - frozen


@pytest.mark.filterwarnings("ignore:.*trains no norm of this image tower")
@pytest.mark.defect
def test_runs_whose_running_statistics_stay_have_ids_of_their_own_and_no_others(resnet):
    def is_marked(model, method):
        settings = [f"model.name={model}", "model.start=random", f"method.name={method}"]
        settings += ["method.rank=2"] * (method == "galore")  # of the narrowest matrix
        return "batch_norm" in identity.run_identity(small(*settings), forked.small_corpus())

    marked = {name for name in NAMES if is_marked(resnet, name)}
    assert marked == {"locked-image", "bitfit", "lnfit", "lora", "dora", "vera", "ewc"}
    assert not any(is_marked(model, name) for model in ("small", "ViT-B-32") for name in NAMES)


def test_in_chapter_02_a_reader_s_method_has_its_usual_strength():
    source = chapters.select(["02"])[0]
    cells = chapters.notebook(source).cells
    [code] = [cell.source for cell in cells if cell.source.startswith("dials = ")]
    scope = {name: each.default for name, each in chapters.parameters(source).items()}
    exec(code.partition("chosen = ")[0], scope)
    found = {
        name: given["strength"] for name, given in scope["dials"].items() if "rank" not in given
    }
    assert found == {
        name: Method(name=name).get("strength") for name in ("ewc", "distillation", "si")
    }
