"""Compute one run in several processes, as started by torchrun; a single process skips all this.

Every process has the whole network and takes its slice of a batch. The network is not wrapped:
features are gathered, every process computes the loss of its own samples (`cmp.scale.losses`), and
gradients are summed, so that the result equals that of one process.
"""

import contextlib
import datetime
import os
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

from cmp.errors import CmpError, first_line

BUCKET_BYTES = 25 * 2**20
"""Bytes of gradients that are sent together."""
PATIENCE = datetime.timedelta(hours=12)
"""How long processes wait for each other, as when the first one saves."""


@contextlib.contextmanager
def init_distributed(device: str = "cpu") -> Iterator[str]:
    """Connect the processes that torchrun or srun started, if they did.

    Args:
        device: "cpu", or "cuda" for one GPU per process.

    Yields:
        The device of this process.

    Raises:
        CmpError: Several processes cannot share this device.
    """
    _follow_slurm()
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield device
        return
    if device == "cuda":
        number, cards = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if number >= cards:
            raise CmpError(
                f"--device cuda: no GPU for process {number}, as this machine has {cards}; start "
                "fewer processes"
            )
        device = f"cuda:{number}"
        torch.cuda.set_device(device)  # before anything can start on the first GPU
    elif device != "cpu":
        raise CmpError(
            f"--device: {device!r}: several processes need cuda, with one GPU each, or cpu"
        )
    # gloo sends messages between processes without waiting for a GPU
    backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
    with _explain_absence():
        dist.init_process_group(backend, timeout=PATIENCE)
    yield device
    dist.destroy_process_group()  # after an error, the others may never get here


@contextlib.contextmanager
def _explain_absence() -> Iterator[None]:
    """Turn the errors of gloo and NCCL about a lost process into a `CmpError`."""
    try:
        yield
    except RuntimeError as error:
        reason = first_line(error).partition(". ")[0]
        raise CmpError(
            f"another process of this run has ended or cannot be reached ({reason:.200}); restart "
            "all processes to continue the run from its last checkpoint"
        ) from error


def _follow_slurm() -> None:
    """Set torchrun's variables from those of `srun`, if torchrun did not set them."""
    names = {"RANK": "SLURM_PROCID", "LOCAL_RANK": "SLURM_LOCALID"}
    names["WORLD_SIZE"] = "SLURM_STEP_NUM_TASKS"  # a batch script's own commands also have NTASKS
    if "RANK" in os.environ or not all(name in os.environ for name in names.values()):
        return
    if int(os.environ["SLURM_STEP_NUM_TASKS"]) > 1 and "MASTER_ADDR" not in os.environ:
        words = "`export MASTER_PORT=29500 MASTER_ADDR=$(scontrol show hostnames | head -n 1)`"
        raise CmpError(f"srun: MASTER_ADDR is not set; run {words} before srun")
    os.environ.update({name: os.environ[other] for name, other in names.items()})
    os.environ["LOCAL_WORLD_SIZE"] = str(srun_tasks())


def srun_tasks() -> int:
    """Return how many processes `srun` started on this machine, or 1 without `srun`."""
    counts = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "1")  # such as 4(x2),3
    runs = re.findall(r"(\d+)(?:\(x(\d+)\))?", counts)
    tasks = [int(count) for count, machines in runs for _ in range(int(machines or 1))]
    return tasks[int(os.environ.get("SLURM_NODEID", 0))]


def world_size() -> int:
    """Return how many processes compute this run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def local_world_size() -> int:
    """Return how many of the run's processes are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size())) if world_size() > 1 else 1


def rank() -> int:
    """Return this process's number; process 0 saves and reports for all."""
    return dist.get_rank() if world_size() > 1 else 0


def local_slice(count: int) -> slice:
    """Return the slice of `count` samples that this process takes; raise `CmpError` for an uneven
    split."""
    if count % world_size():
        raise CmpError(
            f"training.batch: {count} cannot be split evenly between {world_size()} processes; "
            "use a multiple of their number"
        )
    share = count // world_size()
    return slice(rank() * share, (rank() + 1) * share)


def all_gather(x: Tensor) -> Tensor:
    """Return the rows of all processes in the order of their slices, [N, E] -> [N * processes,
    E]."""
    if world_size() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(world_size())]
    with _explain_absence():
        dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def share_rows(items: Any, compute: Callable[[Any], Tensor]) -> Tensor:
    """Compute one row per item with all processes together, and return all rows, [items, E], on
    each.

    Args:
        items: A nonempty sequence or array.
        compute: Returns the rows of n of the items, [n, E].
    """
    if world_size() == 1:
        return compute(items)
    count = len(items)
    size = -(-count // world_size())
    start = min(rank() * size, count - 1)  # if there are too few items, repeat the last one
    own = compute(items[start : start + size])
    return all_gather(F.pad(own, (0, 0, 0, size - len(own))))[:count]


@contextlib.contextmanager
def all_reduce_gradients(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Sum gradients over all processes during the last backward pass of a step.

    Gradients are sent in buckets as soon as they are ready. Gradients that this pass does not reach
    are sent at the end. The sums are bitwise equal on every process.

    Args:
        parameters: The parameters; gradients of the trainable ones are summed.
    """
    if world_size() == 1:
        yield
        return
    trained = [p for p in parameters if p.requires_grad]
    waiting: list[nn.Parameter] = []
    sent: list[tuple[dist.Work, Tensor, list[nn.Parameter]]] = []

    def send() -> None:
        flat = torch.cat([cast(Tensor, p.grad).flatten() for p in waiting])
        with _explain_absence():
            work = cast(dist.Work, dist.all_reduce(flat, async_op=True))
        sent.append((work, flat, waiting.copy()))
        waiting.clear()

    def add(parameter: nn.Parameter) -> None:
        waiting.append(parameter)
        if sum(p.nbytes for p in waiting) >= BUCKET_BYTES:
            send()

    hooks = [p.register_post_accumulate_grad_hook(add) for p in trained]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    reached = {*waiting, *(p for *_, bucket in sent for p in bucket)}
    waiting += [p for p in trained if p.grad is not None and p not in reached]
    if waiting:
        send()
    for work, flat, bucket in sent:
        with _explain_absence():
            work.wait()
        parts = flat.split([p.numel() for p in bucket])
        for p, part in zip(bucket, parts, strict=True):
            cast(Tensor, p.grad).copy_(part.view_as(p))


def all_reduce_max(*numbers: int) -> list[int]:
    """Return the maximum of each number over all processes, for example of a signal that only some
    received."""
    largest = torch.tensor(numbers, dtype=torch.int64)
    if world_size() > 1:
        with _explain_absence():
            dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.tolist()


def broadcast(text: str) -> str:
    """Return the text of process 0 on every process; the others pass ""."""
    content = text.encode()
    [length] = all_reduce_max(len(content))
    return bytes(all_reduce_max(*content.ljust(length, b"\0"))).decode()


@contextlib.contextmanager
def first_process_first() -> Iterator[None]:
    """Make other processes wait for the first, which leaves its results in the build folder."""
    if rank():
        barrier()
    yield
    if not rank():
        barrier()


def barrier() -> None:
    """Wait until all processes have reached this point."""
    if world_size() > 1:
        with _explain_absence():
            dist.barrier()
