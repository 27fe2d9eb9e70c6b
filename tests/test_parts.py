"""A batch in micro-batches, over processes, or with activations computed again: the same run."""

import functools
import json
import os
import signal
import socket
import subprocess
import sys
import types
from pathlib import Path

import open_clip
import options
import pytest
import ranks
import torch
from forked import small_corpus
from open_clip.loss import SigLipLoss
from safetensors.torch import load_file

import cmp
from cmp import budgets, config, mixtures, models
from cmp.bench import networks  # noqa: F401, open_clip gets its models
from cmp.data import Batch
from cmp.embedded import packed
from cmp.errors import CmpError, Diverged, Interrupted
from cmp.losses import model_loss
from cmp.project import build_folder, project_folder
from cmp.runs.checkpoints import StopRequest
from cmp.runs.machine import machine_differences, machine_record
from cmp.runs.runner import NO_OBSERVER, Run, execute
from cmp.scale import micro_batches, processes
from cmp.scale.execution import ExecutionConfig
from cmp.scale.micro_batches import check_divisible
from cmp.training import (
    clamp_logit_scale,
    encode_batch,
    make_train_state,
    train_task,
    whole_batch_reason,
)

SAME = {"atol": 1e-5, "rtol": 0}


def trained(execution, *settings):
    """(losses, weights) after two tasks without any evaluation."""
    run_config, losses = ranks.small(*settings), []
    state = make_train_state(run_config, packed.load_embedded(), execution=execution)
    for task, pools in enumerate(mixtures.task_pools(run_config, state.corpus)):
        train_task(state, pools, task, lambda step, result: losses.append(result.loss.item()))
    return losses, state.model.state_dict()


@functools.cache
def whole_batch_run(*settings):
    """The run that one process computes, seeing each batch at once."""
    return ranks.noted(ranks.small(*settings))


def same(one, other):
    """Losses and weights of two runs."""
    torch.testing.assert_close(torch.tensor(one[0]), torch.tensor(other[0]), **SAME)
    torch.testing.assert_close(one[1], other[1], **SAME)


QUICK = ("full", "lora", "si", "distillation")
"""Methods that every test run sees in parts; `make test-long` sees the others."""


@pytest.mark.numbers
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in QUICK else pytest.mark.long)
        for name in options.choices()["method.name"]
    ],
)
def test_micro_batches_are_the_same_run_or_are_refused_by_name(corpus, name):
    settings = (f"method.name={name}",)
    if name == "ewc":
        settings += ("method.batches=1",)
    if whole_batch_reason(make_train_state(ranks.small(*settings), corpus)):
        with pytest.raises(CmpError, match=rf"method\.name: '{name}'.*--micro-batch"):
            trained(ExecutionConfig(micro_batch=5), *settings)
        return
    same(trained(ExecutionConfig(micro_batch=5), *settings), trained(ExecutionConfig(), *settings))


def test_fisher_information_of_whole_batches_is_refused_in_parts(corpus):
    settings = ("method.name=ewc", "method.fisher=batch", "method.batches=1")
    with pytest.raises(CmpError, match="'ewc' needs the gradient of a whole batch"):
        trained(ExecutionConfig(micro_batch=5), *settings)


@pytest.mark.numbers
def test_losses_of_one_s_own_are_refused_in_parts_unless_they_say_that_they_take_them(
    own_options, corpus
):
    """As `output` is None there."""
    small = {"losses": lambda state, output: {"small": output.image.square().mean()}}
    cmp.register("method", "small")(cmp.UpdateMethod(**small))
    with pytest.raises(CmpError, match="'small' has losses that may need the whole batch"):
        trained(ExecutionConfig(micro_batch=5), "method.name=small")
    taken = {"losses": lambda state, output: {}, "whole_batch_reason": lambda section: ""}
    cmp.register("method", "small")(cmp.UpdateMethod(**taken))
    same(
        trained(ExecutionConfig(micro_batch=5), "method.name=small"),
        trained(ExecutionConfig(), "method.name=small"),
    )


def test_micro_batches_do_change_what_is_held_at_once(corpus, monkeypatch):
    """Else the tests above would say nothing."""
    sizes = []

    def note_size(state, batch, *rest):
        sizes.append((len(batch.rows), torch.is_grad_enabled()))
        return encode_batch(state, batch, *rest)

    monkeypatch.setattr(micro_batches, "encode_batch", note_size)
    trained(ExecutionConfig(micro_batch=5), "stream.tasks=1", "training.steps=1")
    assert sizes == [(5, False), (5, False), (2, False), (5, True), (5, True), (2, True)]


@pytest.mark.numbers
def test_a_part_is_augmented_as_it_is_in_the_whole(corpus):
    run_config = ranks.small()
    pools = mixtures.task_pools(run_config, corpus)[1]
    batch = mixtures.make_batch(run_config, corpus, pools, 1, 0)
    state = make_train_state(run_config, corpus)
    part = slice(4, 9)

    def pixels(batch, part=None):
        return encode_batch(state, batch, 1, 0, part).pixels

    piece = Batch(batch.rows[part], batch.images[part], batch.texts[part])
    torch.testing.assert_close(pixels(piece, (4, 12)), pixels(batch)[part], atol=1e-5, rtol=0)


@pytest.fixture(scope="module", params=[2, 3], ids="{} processes".format)
def together(request, tmp_path_factory):
    """What some processes find, as `ranks.py` writes it, after one of others was killed."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "build").mkdir()
    (folder / "build" / "data").symlink_to((build_folder() / "data").resolve())
    killed = launch(folder, request.param, "killed")
    assert killed.returncode and "SIGKILL" in killed.stderr
    done = launch(folder, request.param)
    assert done.returncode == 0, done.stderr
    return folder


def launch(folder, count, *arguments):
    """Run `ranks.py` in some processes."""
    own = {
        "CMP_BUILD": str(folder / "build"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(project_folder()),
    }
    command = ["-m", "torch.distributed.run", "--nproc-per-node", str(count), "--standalone"]
    return subprocess.run(
        [sys.executable, *command, Path(ranks.__file__), folder, *arguments],
        env=os.environ | own,
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.long
@pytest.mark.parametrize("name", ranks.RUNS)
def test_some_processes_are_the_same_run_as_one(corpus, together, sigmoid, name):
    losses, scores = json.loads((together / f"{name}.json").read_text())
    weights = load_file(together / f"{name}.safetensors")
    alone = whole_batch_run(*ranks.RUNS[name][0])
    same((losses, weights), alone)
    found = load_file(together / f"{name}-gradients.safetensors")
    expected = ranks.first_gradients(ranks.small(*ranks.RUNS[name][0]), ExecutionConfig())
    torch.testing.assert_close(found, expected, **SAME)
    assert 100 * SAME["atol"] < max(float(x.abs().max()) for x in expected.values())
    assert scores == pytest.approx(alone[2]["score"].tolist())


@pytest.mark.long
@pytest.mark.parametrize("name", ["resumed", "after"], ids=["stopped together", "one was killed"])
def test_processes_that_end_go_on_in_the_same_bits(together, name):
    one, other = (load_file(together / f"{each}.safetensors") for each in ("full", name))
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.numbers
def test_the_loss_of_parts_is_open_clips_over_all_features(corpus):
    run_config = ranks.small()
    state = make_train_state(run_config, corpus, execution=ExecutionConfig(micro_batch=5))
    pools = mixtures.task_pools(run_config, corpus)[1]
    batch = mixtures.make_batch(run_config, corpus, pools, 1, 0)
    seen = state.execution.encode(state, batch, 1, 0)
    output = encode_batch(state, batch, 1, 0)
    expected = open_clip.ClipLoss()(output.image, output.text, state.model.logit_scale.exp())
    torch.testing.assert_close(model_loss(state.model, seen.image, seen.text), expected, **SAME)
    assert len(batch.rows) == 12


def nano(corpus, execution):
    """A plain transformer that is ready to train."""
    settings = ("model.name=bench-nano", "model.start=random", "training.batch=8")
    run_config = config.parse(config.override({}, [*ranks.SMALL, *settings]))
    return make_train_state(run_config, corpus, execution=execution)


def step_of(state, corpus):
    """(gradients, how many tensors a step keeps for its backward pass)."""
    pools, kept = mixtures.task_pools(state.config, corpus)[1], []
    batch = mixtures.make_batch(state.config, corpus, pools, 1, 0)

    def keep(x):
        kept.append(1)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        seen = state.execution.encode(state, batch, 1, 0)
        model_loss(state.model, seen.image, seen.text).backward()
    return {name: p.grad for name, p in state.model.named_parameters()}, len(kept)


@pytest.mark.numbers
def test_activations_that_are_computed_again_give_the_same_gradients(corpus):
    plain, kept = step_of(nano(corpus, ExecutionConfig()), corpus)
    recomputed, fewer = step_of(nano(corpus, ExecutionConfig(checkpoint_activations=True)), corpus)
    torch.testing.assert_close(recomputed, plain, atol=1e-6, rtol=1e-5)
    assert fewer < kept / 2


def test_a_tower_without_it_is_refused_by_name(corpus):
    with pytest.raises(CmpError, match=r"--checkpoint-activations.*'small'"):
        trained(ExecutionConfig(checkpoint_activations=True), "model.name=small")


@pytest.mark.parametrize(
    ("layer", "word"),
    [
        (torch.nn.BatchNorm2d(4), "normalises over the batch"),
        (torch.nn.Dropout(0.1), "is random in training"),
    ],
)
def test_layers_that_see_the_batch_or_draw_are_refused_by_name(layer, word):
    model = torch.nn.Sequential(layer)
    with pytest.raises(CmpError, match=rf"model\.name: 0 of 'net'.*{word}"):
        check_divisible(model, "net")
    check_divisible(torch.nn.Sequential(torch.nn.Dropout(0.0)), "net")


def test_provenance_tells_of_parts_and_of_nothing_else():
    assert ExecutionConfig().record() == {}
    record = ExecutionConfig(5, True).record()
    assert record == {"execution": "micro-batches of 5, activations recomputed"}
    machine = machine_record()
    assert "execution" in machine_differences(machine, machine | record)


@pytest.fixture
def sigmoid(tmp_path):
    """The name of a small model with a sigmoid loss."""
    return ranks.add_sigmoid_model(tmp_path)


@pytest.mark.numbers
@pytest.mark.long
def test_a_sigmoid_model_trains_by_open_clips_loss_in_parts_and_at_once(corpus, sigmoid):
    settings = (f"model.name={sigmoid}",)
    run = trained(ExecutionConfig(), *settings)
    same(trained(ExecutionConfig(micro_batch=5), *settings), run)
    start = models.create_model(sigmoid, 0)
    assert run[1]["logit_bias"] != start.logit_bias
    image, text = (torch.nn.functional.normalize(torch.randn(6, 8), dim=1) for _ in range(2))
    ours = model_loss(start, image, text)
    expected = SigLipLoss()(image, text, start.logit_scale.exp(), start.logit_bias)
    torch.testing.assert_close(ours, expected)
    with torch.no_grad():
        start.logit_scale.fill_(5.0)
    clamp_logit_scale(start)
    assert start.logit_scale == 5.0


def test_fisher_information_of_samples_is_refused_with_a_sigmoid(corpus, sigmoid):
    with pytest.raises(CmpError, match=r"method\.fisher.*fisher=batch"):
        trained(ExecutionConfig(), f"model.name={sigmoid}", "method.name=ewc")


def test_the_plain_execution_refuses_several_processes(corpus, monkeypatch):
    """Else each process would train by itself, and nothing would say so."""
    for name, value in (("is_initialized", True), ("get_world_size", 2)):
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    with pytest.raises(CmpError, match="several processes would each train separately"):
        make_train_state(ranks.small(), corpus)


def test_a_batch_that_cannot_be_dealt_is_refused(corpus, monkeypatch):
    monkeypatch.setattr("cmp.scale.processes.world_size", lambda: 13)
    with pytest.raises(CmpError, match=r"batch of 12 .*13 processes.*training\.batch"):
        make_train_state(ranks.small(), corpus, execution=ExecutionConfig())


@pytest.mark.parametrize(("count", "shares"), [(12, [4, 4, 4]), (13, [5, 4, 4]), (3, [1] * 3)])
def test_shares_differ_by_one_at_most(monkeypatch, count, shares):
    monkeypatch.setattr(processes, "world_size", lambda: 3)
    found = []
    for number in range(3):
        monkeypatch.setattr(processes, "rank", lambda n=number: n)
        own = processes.local_slice(count)
        found += range(own.start, own.stop)
        assert own.stop - own.start == shares[number]
    assert found == [*range(count)]


@pytest.mark.parametrize("count", [1, 2, 3, 7, 9])
def test_rows_are_shared_whatever_their_number(monkeypatch, count):
    rows, parts, waits = torch.arange(2.0 * count).view(count, 2), [], []
    monkeypatch.setattr(processes, "world_size", lambda: 3)
    for number in range(3):
        monkeypatch.setattr(processes, "rank", lambda n=number: n)
        monkeypatch.setattr(processes, "all_gather", lambda x: parts.append(x) or x)
        monkeypatch.setattr(processes, "barrier", lambda: waits.append(len(parts)))
        processes.share_rows(rows, lambda part: part)
    assert len({len(part) for part in parts}) == 1  # as a gather needs it
    assert torch.equal(torch.cat(parts)[:count], rows)
    assert waits == [0, 1, 2]  # before each gather, which waits for minutes alone


class Reducer:
    """Notes what is sent, and answers with the double of it, as from two equal processes."""

    def __init__(self, monkeypatch):
        self.sent = []
        monkeypatch.setattr(processes, "world_size", lambda: 2)
        monkeypatch.setattr(processes.dist, "all_reduce", self.all_reduce)

    def all_reduce(self, flat, async_op):
        self.sent.append(flat.numel())
        flat.mul_(2)
        return types.SimpleNamespace(wait=lambda: None)


@pytest.mark.parametrize("backwards", [False, True])
def test_buckets_are_sent_in_one_order_whichever_gradient_comes_first(monkeypatch, backwards):
    """Else processes might add up buckets that do not belong together."""
    reducer = Reducer(monkeypatch)
    monkeypatch.setattr(processes, "BUCKET_BYTES", 20)
    sizes = [3, 5, 1, 2, 7]
    parameters = [torch.nn.Parameter(torch.ones(size)) for size in sizes]
    unused = torch.nn.Parameter(torch.ones(4))
    filled = processes.fill_buckets([*parameters, unused])
    assert [[len(p) for p in bucket] for bucket in filled] == [[4, 7], [2, 1, 5], [3]]
    with processes.all_reduce_gradients([*parameters, unused]):
        for p in reversed(parameters) if backwards else parameters:
            (p * len(p)).sum().backward()
            assert reducer.sent == []  # the first bucket waits for the unused one
    assert reducer.sent == [11, 8, 3]
    assert unused.grad is None
    assert all((p.grad == 2 * len(p)).all() for p in parameters)


def test_a_bucket_is_sent_as_soon_as_it_and_all_before_it_are_ready(monkeypatch):
    reducer = Reducer(monkeypatch)
    monkeypatch.setattr(processes, "BUCKET_BYTES", 4)
    one, two, three = parameters = [torch.nn.Parameter(torch.ones(n)) for n in (1, 2, 3)]
    seen = []
    with processes.all_reduce_gradients(parameters):
        for p in (two, three, one):
            p.sum().backward()
            seen.append(list(reducer.sent))
    assert seen == [[], [3, 2], [3, 2, 1]]


def test_only_the_host_waits_for_hours(monkeypatch):
    """Features and gradients are waited for ten minutes, the first process's work twelve hours."""
    made, waits = {}, []
    dist = processes.dist
    monkeypatch.setattr(dist, "init_process_group", lambda backend, timeout: made.update(
        {backend: timeout}))  # fmt: skip
    monkeypatch.setattr(dist, "new_group", lambda backend, timeout: made.update(
        host=(backend, timeout)) or "host")  # fmt: skip
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    monkeypatch.setattr(dist, "barrier", lambda group: waits.append(group))
    monkeypatch.setattr(dist, "all_reduce", lambda x, op, group: waits.append(group))
    monkeypatch.setattr(processes, "world_size", lambda: 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with processes.init_distributed("cuda"):
        processes.barrier()
        processes.all_reduce_max(3)
    assert made["cpu:gloo,cuda:nccl"].total_seconds() == 600
    assert (made["host"][0], made["host"][1].total_seconds()) == ("gloo", 12 * 3600)
    assert waits == ["host", "host"]


def test_weights_that_are_not_finite_stop_all_processes_where_the_first_one_saves(monkeypatch):
    reduce = lambda *numbers: [0, 1] if len(numbers) == 2 else list(numbers)  # noqa: E731
    monkeypatch.setattr(processes, "all_reduce_max", reduce)  # (signal, whether to save)
    with pytest.raises(Diverged, match="weights are not finite after 1 steps"):
        ranks.noted(ranks.small("schedule.peak=1e30"))


def test_processes_without_a_checkpoint_know_that_the_first_one_has_it(corpus, monkeypatch):
    monkeypatch.setattr(processes, "all_reduce_max", lambda *numbers: [1])
    run = Run(
        ranks.small(), make_train_state(ranks.small(), corpus), NO_OBSERVER, None, StopRequest(), {}
    )
    run.stop_if_asked(1, 0, signal=0)
    with pytest.raises(Interrupted, match="everything is saved; the same command continues"):
        run.stop_if_asked(1, 0, signal=15)


def test_processes_of_slurm_find_each_other(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR",
                 "MASTER_PORT"):  # fmt: skip
        monkeypatch.setenv(name, "")  # so that it is gone again after the test
        monkeypatch.delenv(name)
    for name, value in (("PROCID", "3"), ("NTASKS", "8"), ("LOCALID", "1")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    processes._follow_slurm()  # a command of a batch script, which is no step of eight tasks
    assert "RANK" not in os.environ
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    with pytest.raises(CmpError, match="MASTER_ADDR is not set"):
        processes._follow_slurm()
    monkeypatch.setenv("MASTER_ADDR", "node-1")
    with pytest.raises(CmpError, match="MASTER_PORT is not set"):
        processes._follow_slurm()
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", "2(x2),3,1")
    monkeypatch.setenv("SLURM_NODEID", "2")
    processes._follow_slurm()
    found = [os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")]
    assert found == ["3", "8", "1"]
    assert os.environ["LOCAL_WORLD_SIZE"] == "3"
    monkeypatch.setenv("SLURM_PROCID", "5")
    processes._follow_slurm()
    assert os.environ["RANK"] == "3"  # what torchrun says stays


def test_more_processes_than_cards_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    refused = processes.init_distributed("cuda")
    with pytest.raises(CmpError, match="no GPU for process 2, as this machine has 2"), refused:
        pass


class Chosen(Exception):
    """A GPU was chosen."""


def test_a_task_of_slurm_takes_the_only_card_that_it_sees(monkeypatch):
    def choose(device):
        raise Chosen(device)

    for name, value in {"WORLD_SIZE": "4", "RANK": "2", "LOCAL_RANK": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_GPUS_PER_TASK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", choose)
    with pytest.raises(Chosen, match="cuda:0"), processes.init_distributed("cuda"):
        pass


LEFT_ALONE = """
import os, signal
import torch
from cmp.scale import processes
from cmp.errors import CmpError

def add_gradients():
    weight = torch.nn.Parameter(torch.ones(3))
    with processes.all_reduce_gradients([weight]):
        weight.sum().backward()

torch.set_num_threads(1)
with processes.init_distributed():
    processes.barrier()
    if processes.rank():
        os.kill(os.getpid(), signal.SIGKILL)
    for call in (
        lambda: processes.all_gather(torch.ones(1, 1)), add_gradients,
        lambda: processes.all_reduce_max(1), lambda: processes.broadcast("words"),
        processes.barrier,
    ):
        try:
            call()
            print("went on")
        except CmpError as error:
            print(error)
    os._exit(0)
"""


def two_processes(script, *own):
    """Start two processes that find each other, with some variables of their own."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    shared["PYTHONPATH"] = str(project_folder())
    return [
        subprocess.Popen(
            [sys.executable, "-c", script],
            env=os.environ | shared | {"RANK": str(rank)} | variables,
            stdout=subprocess.PIPE,
        )
        for rank, variables in enumerate(own)
    ]


@pytest.mark.defect
@pytest.mark.long
def test_a_process_that_is_left_alone_says_so():
    first, second = two_processes(LEFT_ALONE, {}, {})
    said, _ = first.communicate(timeout=120)
    assert second.wait(60) == -signal.SIGKILL
    second.stdout.close()
    lines = said.decode().splitlines()
    assert len(lines) == 5
    assert all("another process" in line and "restart all processes" in line for line in lines)


MEET = """
from cmp.errors import CmpError
from cmp.scale import processes

try:
    with processes.init_distributed():
        print("met")
except CmpError as error:
    print(error)
"""


@pytest.mark.parametrize("folders", [("a", "b"), pytest.param(("a", "a"), marks=pytest.mark.long)])
def test_machines_without_a_common_folder_are_refused_at_once(tmp_path, folders):
    own = [{"LOCAL_WORLD_SIZE": "1", "CMP_BUILD": str(tmp_path / folder)} for folder in folders]
    said = [child.communicate(timeout=120)[0].decode() for child in two_processes(MEET, *own)]
    if folders == ("a", "a"):
        assert said == ["met\n"] * 2 and not any((tmp_path / "a").iterdir())
    else:
        assert all("not all machines of this run see this folder" in words for words in said)


def test_a_batch_that_processes_cannot_share_is_refused_before_anything_is_computed(monkeypatch):
    """Not only the batch of the config: a task with few images has a smaller one."""
    run_config, corpus = ranks.small("training.batch=64", "training.passes=0.1"), small_corpus()
    pools = mixtures.task_pools(budgets.settle(run_config, corpus), corpus)
    assert sum(pools[0].counts) == 63
    monkeypatch.setattr(processes, "world_size", lambda: 64)
    monkeypatch.setattr(processes, "rank", lambda: 0)
    monkeypatch.setattr(processes, "all_reduce_max", lambda *numbers: list(numbers))
    monkeypatch.setattr("cmp.runs.runner.evaluate", lambda *_: pytest.fail("was evaluated"))
    with pytest.raises(CmpError, match=r"batch of 63 samples is too small .* at most 63 proc"):
        execute(run_config, corpus)
