"""The loss of a batch, computed by several processes or in parts, is that of the whole batch."""

import itertools
import os
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import ranks
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from cmp.losses import model_loss
from cmp.mixtures import task_pools
from cmp.project import project_folder
from cmp.scale import losses
from cmp.scale.execution import ExecutionConfig
from cmp.training import make_train_state, train_task

pytestmark = pytest.mark.numbers
SAME = {"atol": 1e-9, "rtol": 1e-9}


class Scales(torch.nn.Module):
    """What a loss reads of a network: its logit scale, and a bias for a sigmoid loss."""

    def __init__(self, scale, bias=None):
        super().__init__()
        self.logit_scale = torch.nn.Parameter(torch.tensor(scale, dtype=torch.float64))
        value = None if bias is None else torch.tensor([bias], dtype=torch.float64)
        self.logit_bias = None if value is None else torch.nn.Parameter(value)


def features(seed, count, width=5):
    """Unit features of images and of texts, in fp64, and their model, without a bias for an odd
    seed."""
    noise = torch.randn(2, count, width, generator=torch.Generator().manual_seed(seed)).double()
    image, text = (F.normalize(x, dim=1).requires_grad_() for x in noise)
    return Scales(1.0 + seed % 3, None if seed % 2 else -3.0), image, text


def loss_and_gradients(loss, model, image, text):
    """The loss, doubled so that its gradient is not 1, and the gradients of what it reads."""
    inputs = [image, text, *model.parameters()]
    value = 2 * loss(model, image, text)
    return [value.detach(), *torch.autograd.grad(value, inputs)]


@given(st.integers(0, 2**31), st.integers(1, 9), st.integers(1, 40))
def test_a_loss_in_parts_is_the_whole_loss(seed, count, entries):
    """With any number of columns at a time, one included."""
    given_features = features(seed, count)
    expected = loss_and_gradients(model_loss, *given_features)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "ENTRIES", entries)
        own = slice(0, count)
        found = loss_and_gradients(lambda *x: losses.shared_loss(*x, own), *given_features)
    torch.testing.assert_close(found, expected, **SAME)


def test_only_so_many_logits_are_there_at_once(monkeypatch):
    sizes, plain = [], losses._logits
    monkeypatch.setattr(losses, "ENTRIES", 20)

    def watch(*arguments):
        for part, logits in plain(*arguments):
            sizes.append(logits.numel())
            yield part, logits

    monkeypatch.setattr(losses, "_logits", watch)
    loss_and_gradients(lambda *x: losses.shared_loss(*x, slice(0, 9)), *features(1, 9))
    assert max(sizes) == 18 and sum(sizes) == 4 * 81


def test_one_process_uses_it_only_for_a_large_batch(corpus, monkeypatch):
    """Small batches keep their bits."""
    shared = []
    plain = losses.shared_loss
    monkeypatch.setattr("cmp.scale.execution.shared_loss", lambda *x: shared.append(x) or plain(*x))

    def trained(entries, micro_batch):
        monkeypatch.setattr(losses, "ENTRIES", entries)
        run_config, found = ranks.small("training.steps=1", "stream.tasks=1"), []
        state = make_train_state(run_config, corpus, execution=ExecutionConfig(micro_batch))
        pools = task_pools(run_config, state.corpus)[0]
        train_task(state, pools, 0, lambda step, result: found.append(result.loss))
        return found[0], state.model.state_dict()

    plain_run, small = trained(2**26, None), trained(2**26, 5)
    assert not shared
    large = trained(143, 5)  # fewer than 12 x 12 logits
    assert len(shared) == 1
    torch.testing.assert_close(small, plain_run, atol=1e-5, rtol=0)
    torch.testing.assert_close(large, plain_run, atol=1e-5, rtol=0)


def as_processes(count, compute):
    """The results of `compute(rank)` in threads that gather tensors from each other."""
    barrier, parts = threading.Barrier(count), [None] * count
    number = threading.local()

    def all_gather(x, count=None):
        parts[number.rank] = x
        barrier.wait(60)
        whole = torch.cat(parts)
        barrier.wait(60)  # all have read the parts
        return whole

    def work(rank):
        number.rank = rank
        try:
            return compute(rank)
        except Exception:
            barrier.abort()  # else the others would wait
            raise

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(count) as pool:
        patch.setattr(losses.processes, "all_gather", all_gather)
        return list(pool.map(work, range(count)))


@given(st.integers(0, 2**31), st.lists(st.integers(1, 5), min_size=2, max_size=4))
def test_shares_of_any_size_add_up_to_the_whole_loss(seed, sizes):
    """Each process has the loss, the gradients of its own features, and those of the scales."""
    ends = list(itertools.accumulate(sizes))
    given_features = features(seed, ends[-1])
    expected = loss_and_gradients(model_loss, *given_features)
    own = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]

    def compute(rank):
        return loss_and_gradients(
            lambda *x: losses.shared_loss(*x, own[rank]), *features(seed, ends[-1])
        )

    found = as_processes(len(sizes), compute)
    for part, mine in zip(own, found, strict=True):
        torch.testing.assert_close(mine[0], expected[0], **SAME)
        torch.testing.assert_close(mine[3:], expected[3:], **SAME)
        for tower in (1, 2):
            torch.testing.assert_close(mine[tower][part], expected[tower][part], **SAME)
            assert mine[tower][part.stop :].eq(0).all() and mine[tower][: part.start].eq(0).all()


SHARED = """
import sys
import torch
import test_shared_loss as test
from cmp.losses import model_loss
from cmp.scale import losses, processes

torch.set_num_threads(1)
with processes.init_distributed():
    cases = ((1, 4, 2**26), (2, 4, 2**26), (3, 5, 7), (4, 3, 7), (5, 1, 1), (6, 3, 2**26))
    for seed, share, entries in cases:
        count = share * processes.world_size() + seed // 4  # the first processes have one more
        own = processes.local_slice(count)
        given = test.features(seed, count)
        expected = test.loss_and_gradients(model_loss, *given)
        losses.ENTRIES = entries
        found = test.loss_and_gradients(lambda *x: losses.shared_loss(*x, own), *given)
        for number in (1, 2):  # a process has the gradients of its own features
            others = torch.ones(count, dtype=torch.bool)
            others[own] = False
            assert (found[number][others] == 0).all()
            found[number], expected[number] = found[number][own], expected[number][own]
        torch.testing.assert_close(found, expected, **test.SAME)
        every = processes.all_gather(found[0][None])
        assert (every == every[0]).all(), "the loss has the same bits everywhere"
    print("equal")
"""


@pytest.mark.long
@pytest.mark.parametrize("count", [2, 3])
def test_processes_together_compute_the_whole_loss(count):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    own = {"WORLD_SIZE": str(count), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    folders = [str(project_folder()), str(project_folder() / "tests")]
    own |= {"PYTHONPATH": os.pathsep.join(folders), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", SHARED], env=os.environ | own | {"RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(count)
    ]  # fmt: skip
    said = [process.communicate(timeout=120) for process in started]
    assert [words for words, _ in said] == ["equal\n"] * count, said
