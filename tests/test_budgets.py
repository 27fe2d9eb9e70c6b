"""Budgets: the paper's table by its own rule, FLOPs and memory that are counted, runs that stop."""

import dataclasses
import functools
import re
import weakref

import forked
import options
import pytest
import torch
from options import small
from test_resume import MIDDLE, MemoryManager, same
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from typer.testing import CliRunner

import cmp
from cmp import budgets, cli, config, models
from cmp.budgets import Budget, Cost
from cmp.config import Method
from cmp.errors import CmpError
from cmp.runs import forecast, paper, store
from cmp.runs.runner import Observer, execute
from cmp.training import create_optimizer

GIGA = 1e9


def config_of(name, batch, method="full", **settings):
    tree = {"model": {"name": name, "start": "random"}, "training": {"batch": batch}}
    return config.parse(tree | {"method": {"name": method, **settings}})


# --- Table 4 ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", paper.TABLE4)
def test_every_row_follows_from_the_papers_rule(name):
    row = paper.TABLE4[name]
    assert paper.rule_steps(row) == row.steps


@pytest.mark.parametrize(("tasks", "steps"), [(20, 1303), (50, 462), (100, 182), (200, 42)])
def test_ewc_charged_once_a_task(tasks, steps):
    """For 20 tasks the paper has 14 steps, since each step pays for a whole Fisher pass."""
    row = paper.TABLE4["EWC"]
    once = paper.budget_charged_once(row)
    assert dataclasses.replace(once, allowed=paper.TABLE4_TOTAL / tasks).steps == steps
    plain = paper.budget_charged_once(paper.TABLE4["full"])
    assert plain.end == 0
    assert plain.steps == 1419  # 1419.7: the paper rounds, a budget is not overrun


@pytest.mark.long
def test_vit_b_16_is_counted_with_its_attention():
    cost = budgets.method_cost(config_of("ViT-B-16", 8))
    assert cost.step / 8 / GIGA == pytest.approx(123.0, rel=0.005)
    assert budgets.method_cost(config_of("ViT-B-16", 16)).step == pytest.approx(
        2 * cost.step, rel=1e-3
    )


@pytest.mark.parametrize(
    ("method", "share"),
    [("locked-image", 53.0 / 123.03), ("bitfit", 83.5 / 123.03)],
)
@pytest.mark.long
def test_shares_of_frozen_parts(method, share):
    full, part = (budgets.method_cost(config_of("ViT-B-16", 8, m)).step for m in ("full", method))
    assert part / full == pytest.approx(share, rel=0.005)


QUICK = ("full", "locked-image")
"""Rows that every test run counts; `make test-long` counts the others."""


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in QUICK else pytest.mark.long)
        for name in ("full", "locked-text", "locked-image", "LNFit", "BitFit", "SI")
    ],
)
def test_ours_beside_table_4(name):
    """Our FLOPs of what is the same there, at its batch; adapters of ours reach more layers."""
    full = budgets.method_cost(config_of("ViT-B-16", 512))
    row = paper.TABLE4[name]
    cost = budgets.method_cost(config_of("ViT-B-16", 512, row.method))
    assert cost.step / GIGA == pytest.approx(row.gflops, rel=0.012)
    if name != "locked-image":  # whose 12 GB hold more than tensors
        assert cost.memory / full.memory == pytest.approx(row.multiplier, rel=0.07)


# --- what is counted -------------------------------------------------------------------------


class Held(TorchDispatchMode):
    """Bytes of tensors alive, and the most there were."""

    def __init__(self, tensors):
        super().__init__()
        self.alive, self.now, self.peak = {}, 0, 0
        for x in tensors:
            self.hold(x)

    def hold(self, x):
        storage = x.untyped_storage()
        key = storage._cdata
        if key not in self.alive:
            self.alive[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.let_go, key)

    def let_go(self, key):
        self.now -= self.alive.pop(key)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                self.hold(x)
        return result


@pytest.mark.parametrize("ranks", [(), pytest.param((4, 64), marks=pytest.mark.long)])
def test_why_ours_differ_from_table_4_is_counted(ranks):
    """The paper's GFLOPs to its last digit, by what the note below `paper.TABLE4` says of them."""

    def giga(method, *settings):
        tree = config.override(
            {"model": {"name": paper.TABLE4_MODEL, "start": "random"}, "training": {"batch": 512}},
            [f"method.name={method}", *settings],
        )
        return budgets.method_cost(config.parse(tree)).step / 1e9

    def again(heads, tokens, layers):  # scores of a head of 64: once more per layer and sample
        return 2 * 512 * layers * heads * tokens**2 * 64 / 1e9

    image, text = again(12, 197, 12), again(8, 77, 12)
    targets = "method.targets=[q_proj,k_proj,v_proj,c_proj]"
    whole = {rank: giga("dora", targets, f"method.rank={rank}") for rank in ranks}
    printed = {name: row.gflops for name, row in paper.TABLE4.items()}
    assert giga("full") + image + text == pytest.approx(printed["full"], abs=0.02)
    for rank in ranks:
        assert whole[rank] + image + text == pytest.approx(printed[f"LoRA r={rank}"], abs=0.02)


def peak(name, method, batch, precision="fp32"):
    """Bytes that two real steps on the CPU hold at most."""
    state = budgets.shape_state(name, Method(name=method), models.create_model(name))
    optimizer = create_optimizer(state)
    networks = [state.model, *state.frozen_models.values()]
    tensors = [x for network in networks for x in network.state_dict().values()]
    held = Held([*tensors, *state.method_state.values()])
    replayed = batch // 3 if method == "distillation" else 0
    with held:
        for _ in range(2):
            with torch.autocast("cpu", enabled=precision == "bf16"):
                loss = budgets.total_loss(state, budgets.forward_shapes(state, batch, replayed))
            optimizer.zero_grad()
            loss.backward()
            state.method.step(state, optimizer)
    return held.peak


SIZES = ("tiny-half", *options.ALIKE)
"""Networks of the same layers, in several sizes."""


@pytest.mark.parametrize(
    ("name", "method"),
    options.one_in(
        8,
        [
            pytest.param(*family.values, method, marks=family.marks)
            for family in options.families()
            for method in options.choices()["method.name"]
            if family.values[0] not in SIZES or method == "full"
        ],
        lambda name: name,
    ),
)
def test_memory_accounted_for_is_what_a_real_step_holds(name, method):
    """Never more; passing things that no gradient waits for make up to a quarter beside it."""
    ratio = budgets.method_cost(config_of(name, 48, method)).memory / peak(name, method, 48)
    assert 0.79 < ratio <= 1.0


@pytest.mark.long
def test_memory_of_a_larger_network_is_closer():
    assert budgets.method_cost(config_of("ViT-S-32", 4)).memory / peak("ViT-S-32", "full", 4) > 0.97


def test_a_step_in_bf16_holds_a_copy_of_the_weights():
    tree = {"model": {"name": "ViT-S-32", "start": "random"}}
    run = config.parse(tree | {"training": {"batch": 4, "precision": "bf16"}})
    assert 0.97 < forecast.step_memory(run) / peak("ViT-S-32", "full", 4, "bf16") < 1.05


@pytest.mark.parametrize("method", ["full", "lora", "galore", "distillation", "vera"])
def test_flops_on_shapes_are_those_of_a_real_step(method):
    state = budgets.shape_state("tiny", Method(name=method), models.create_model("tiny"))
    replayed = 3 if method == "distillation" else 0
    forward_shapes = functools.partial(budgets.forward_shapes, state, 9, replayed)
    real = budgets.count_flops(lambda: budgets.total_loss(state, forward_shapes()).backward())
    flops = budgets.method_cost(config_of("tiny", 9, method)).step
    # the optimizer of galore multiplies; the teacher of distillation reads no padding when it can
    loose = {"galore": 0.5, "distillation": 0.03}
    assert flops == pytest.approx(real, rel=loose.get(method, 0))
    assert (flops > real) == (method in loose)


@pytest.mark.long
def test_the_smallest_batch_has_a_sample_for_the_teacher():
    costs = [cmp.step_cost("ViT-B-32", 2, method) for method in ("full", "distillation")]
    assert costs[1].step > costs[0].step


def test_the_end_of_a_task_is_counted():
    full = budgets.method_cost(config_of("tiny", 16)).step
    ends = {
        fisher: budgets.method_cost(config_of("tiny", 16, "ewc", fisher=fisher, batches=3)).end
        for fisher in ("batch", "sample")
    }
    assert ends["batch"] == pytest.approx(3 * full, rel=0.01)
    assert ends["sample"] == pytest.approx(4 * full, rel=0.02)  # one more pass forward
    assert all(
        budgets._end_flops(models.create_on_meta("tiny"), "tiny", Method(name=method), 16) == 0
        for method in options.choices()["method.name"]
        if method != "ewc"
    )


@pytest.mark.parametrize("name", ["RN50", "convnext_base", "ViT-B-16-SigLIP", "ViT-g-14"])
@pytest.mark.long
def test_any_open_clip_model_is_counted(name):
    costs = {m: budgets.method_cost(config_of(name, 2, m)) for m in ("full", "locked-image")}
    assert costs["full"].step > costs["locked-image"].step > 0
    assert costs["full"].memory > costs["locked-image"].memory > 0


@pytest.mark.parametrize(
    ("name", "words"),
    [("tinny", "'tinny' is not an open_clip model"), ("coca_ViT-B-32", "CoCa's networks")],
)
def test_other_models_are_refused(name, words):
    with pytest.raises(CmpError, match=words):
        budgets.method_cost(config_of(name, 2))


# --- the rule --------------------------------------------------------------------------------


def test_a_budget_by_hand():
    """Half the memory, so each FLOP counts half: 100 - 0.5 * 10 is 9.5 steps of 0.5 * 20."""
    budget = budgets.make_budget(100.0, Cost(20.0, 10.0, 4e9), Cost(1.0, 0.0, 8e9))
    assert (budget.steps, budget.multiplier) == (9, 0.5)
    assert budget.used(2) == 2 * (9 * 10 + 5)
    assert Budget(4.0, 10.0, 5.0, 1.0).steps == 0


@pytest.mark.parametrize("method", options.one_in(4, options.choices()["method.name"]))
def test_steps_fill_the_budget_and_no_more(method):
    run_config = config.parse(config.profile("cpu") | {"method": {"name": method}})
    run_config = dataclasses.replace(
        run_config, training=dataclasses.replace(run_config.training, budget=1.0)
    )
    budget = budgets.task_budget(run_config)
    steps = budgets.apply_budget(run_config).training.steps
    assert steps == budget.steps
    assert budget.used(1) <= budget.allowed * (1 + budgets.SLACK) < budget.used(1) + budget.step
    assert (steps == 40) == (method == "full")
    assert budgets.apply_budget(budgets.apply_budget(run_config)) == budgets.apply_budget(
        run_config
    )


def test_without_a_budget_nothing_is_changed():
    assert budgets.apply_budget(small()) is small() or budgets.apply_budget(small()) == small()
    assert budgets.task_budget(small()) is None
    assert "training.budget" not in small().changes()
    assert small("training.budget=1.0").changes()["training.budget"] == 1.0


def test_a_budget_too_small_is_refused_with_numbers():
    run_config = small("method.name=ewc", "training.budget=0.5")
    with pytest.raises(CmpError) as caught:
        execute(run_config, forked.small_corpus())
    least = float(re.search(r"set it to (\S+) or more", str(caught.value))[1])
    assert "training.budget: 0.5 allows" in str(caught.value)
    assert budgets.apply_budget(small("method.name=ewc", f"training.budget={least}")).steps == (
        1,
        1,
    )
    for batch in range(9, 17):  # some of these round up, and some down
        tiny = ("training.budget=1e-4", f"training.batch={batch}", "method.name=lora")
        with pytest.raises(CmpError) as caught:
            budgets.apply_budget(small(*tiny))
        least = re.search(r"set it to (\S+) or more", str(caught.value))[1]
        assert budgets.apply_budget(small(*tiny, f"training.budget={least}")).training.steps == 1
    message = "training.budget: 1 steps of 'full': .*warmup 1 [+] cooldown 1 steps in a task of 1"
    with pytest.raises(CmpError, match=message):
        budgets.apply_budget(
            small("training.budget=0.4", "schedule.name=wsd", "schedule.warmup_steps=1",
                  "schedule.cooldown_steps=1")
        )  # fmt: skip


# --- runs ------------------------------------------------------------------------------------


def test_a_run_has_the_steps_of_its_budget_and_says_what_it_used():
    run_config = small("method.name=locked-text", "training.budget=1.0")
    steps = budgets.apply_budget(run_config).training.steps
    assert steps > run_config.training.steps
    counted = []
    hook = Observer(step=lambda task, number, result, model: counted.append((task, number)))
    manager = MemoryManager()
    result = execute(run_config, forked.small_corpus(), hook, manager=manager)
    assert counted == [(task, number) for task in range(2) for number in range(steps)]
    assert budgets.total_steps(run_config) == len(counted)
    spent = result.provenance["budget"]
    assert spent["steps_per_task"] == steps
    assert (
        spent["allowed_gflops"] - spent["used_gflops"]
        < 2 * budgets.task_budget(run_config).step / GIGA
    )
    assert spent["used_gflops"] <= spent["allowed_gflops"]
    assert manager.states[MIDDLE].progress.config == run_config.to_dict()
    resumed = execute(
        run_config, forked.small_corpus(), manager=MemoryManager(manager.states[MIDDLE])
    )
    assert same(resumed, result)
    assert resumed.provenance["budget"] == spent
    stored = store.make_stored_run(run_config, result, {})
    assert stored.provenance["budget"] == spent
    same_steps = small("method.name=locked-text", f"training.steps={steps}")
    assert same(execute(same_steps, forked.small_corpus()), result)


# --- from a shell ----------------------------------------------------------------------------


def shell(*arguments):
    return CliRunner().invoke(cli.app, ["budget", *arguments])


@pytest.mark.long
def test_the_command_prints_every_method():
    result = shell("--model", "tiny", "--batch", "16")  # as they are counted above
    assert result.exit_code == 0, result.output
    rows = {line.split()[0]: line.split() for line in result.output.splitlines() if line.split()}
    for name in options.choices()["method.name"]:
        assert name in rows
    assert rows["full"][-2:] == ["40", "640"]
    assert "…" not in result.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--total", "0"), "--total: 0"),
        (("--method", "lorra"), "--method lorra: method.name"),
        (("--method", "lora,rank=500"), "at most 16"),
        (("--method", "full,rank=5"), "rank: not used by 'full'"),
        (("--model", "tinny"), "'tinny' is not an open_clip model"),
    ],
)
def test_the_command_refuses_by_name(arguments, words):
    assert words in str(shell(*arguments).exception)


def test_the_command_counts_the_same_beside_a_gpu(monkeypatch):
    arguments = ("--model", "tiny", "--batch", "16", "--method", "full")
    without = shell(*arguments).output
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert shell(*arguments).output == without


def test_methods_of_the_command_take_settings():
    lines = {}
    for rank in ("2", "16"):
        result = shell("--method", f"lora,rank={rank}", "--tasks", "2", "--total", "100")
        [lines[rank]] = [x.split() for x in result.output.splitlines() if x.startswith(" lora")]
    assert float(lines["2"][1]) < float(lines["16"][1])
    assert int(lines["2"][-2]) > int(lines["16"][-2])


@pytest.mark.defect
@pytest.mark.parametrize("batch", [-1, 0, 1, 2.5, "8", 2**40])
def test_a_batch_is_a_number_of_samples(batch):
    with pytest.raises(CmpError, match=r"^step_cost: training\.batch: Input should be"):
        budgets.step_cost("small", batch)


def test_a_step_cost_is_that_of_a_named_model():
    with pytest.raises(CmpError, match="model: give a name, such as 'small'"):
        budgets.step_cost(torch.nn.Linear(2, 2), 8)
